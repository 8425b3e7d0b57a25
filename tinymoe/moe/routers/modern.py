"""Routers since 2024, each a variation of one in the files before."""

from ...autograd import functional as F
from ...layers.nn import zeros
from .top_k import TopK


class BiasedTopK(TopK, name="biased_top_k"):
    """top_k with a learned bias in the logits, z = x W + b (GPT-OSS, OpenAI 2025).

    The bias starts at 0. GPT-OSS takes the softmax over the chosen logits, which renormalised gates are.
    """

    paper = "OpenAI 2025"
    formula = "z = x W + b, with a learned b; the K largest z; gates softmax over the chosen z"
    used_by = "GPT-OSS"
    shapes = {"weight": "DE", "bias": "E"}

    def __init__(self, d_model, n_experts, top_k, rng, dtype, **options):
        super().__init__(d_model, n_experts, top_k, rng, dtype, **options)
        self.bias = zeros(n_experts, dtype)

    def scores(self, x):
        return F.linear(x, self.weight, self.bias)
