"""Routers since 2024, each a variation of one in the files before."""

import numpy as np

from ...autograd.tensor import Tensor
from ..routing import capacity, largest
from .token_choice import SCORES, Scored, SigmoidBias


class MomentumBias(SigmoidBias, name="momentum_bias"):
    """sigmoid_bias whose bias moves smoothly (SMEBU: Arcee Trinity, Singh et al. 2026, arXiv 2602.17004).

    v_e = (mean load - load_e) / mean load; step = bias_rate * tanh(clamp * v), minus its mean over the experts;
    m <- momentum * m + (1 - momentum) * step; b <- b + m. The mean m is saved with the model.

    bias_rate: the largest step, before its mean is subtracted.
    clamp: the slope of tanh at balance; a large one makes the step a sign.
    momentum: the weight of the steps before.
    """

    paper = "Singh 2026"
    shapes = {"weight": "DE", "bias": "E", "mean_step": "E"}
    clamp: float = 2.0
    momentum: float = 0.5
    bias_rule = "centred"  # fixed

    def __init__(self, d_model, n_experts, top_k, rng, dtype, **options):
        super().__init__(d_model, n_experts, top_k, rng, dtype, **options)
        self.mean_step = Tensor(np.zeros(n_experts, dtype))

    def _step(self, routing):
        load = routing.wanted
        step = self.bias_rate * np.tanh(self.clamp * (1 - load / max(load.mean(), 1e-20)))
        mean = self.momentum * self.mean_step.data + (1 - self.momentum) * (step - step.mean())
        self.mean_step.data = mean.astype(self.mean_step.dtype)
        return mean


class QuantileBias(SigmoidBias, name="quantile_bias"):
    """sigmoid_bias whose bias is solved for, not stepped (quantile balancing, Su 2026, kexue.fm/archives/11619).

    Each token takes the K experts of largest s + b. After each training step, for the batch's scores s (N, E):
    alpha_n = the (K + 1)-th largest of s_n + b; b_e <- - (the (N K / E + 1)-th largest over n of s_e - alpha). So N K /
    E tokens would have taken expert e, had the others kept their bias. With beta = -b these are the dual variables of
    the balanced assignment, which the two lines solve in turn.

    bias_rate: how far the bias goes to its new value in a training step; 1 is the published rule.
    """

    paper = "Su 2026"
    bias_rate: float = 1.0
    bias_rule = "sign"  # fixed; not used

    def _step(self, routing):
        s, bias = SCORES[self.score][0](routing.logits).data, self.bias.data
        place = len(s) - 1 - capacity(*s.shape, self.top_k)  # of the (C + 1)-th largest of N in rising order
        if place < 0:  # every expert takes every token
            return np.zeros_like(bias)
        alpha = np.sort(s + bias, axis=1)[:, -self.top_k - 1]
        return self.bias_rate * (-np.sort(s - alpha[:, None], axis=0)[place] - bias)


class HashGated(Scored, name="hash_gated"):
    """A random table of the token's id chooses K experts, and learned scores of those are the gates (DeepSeek-V4).

    DeepSeek-V4 has it in the first three MoE layers, with score sqrt_softplus, and sigmoid_bias in the others: give
    ModelConfig a list of routers. Raises ValueError without RouteContext.ids.

    vocab_size: ids run from 0 to vocab_size - 1; the model gives its own.
    """

    paper = "DeepSeek-AI 2026"
    chooses = "neither"
    cost = "2 N D E + a lookup"
    shapes = {"weight": "DE", "table": "VE"}
    vocab_size: int = 256
    n_groups, group_limit = 1, None  # fixed

    def __init__(self, d_model, n_experts, top_k, rng, dtype, **options):
        super().__init__(d_model, n_experts, top_k, rng, dtype, **options)
        chosen = largest(rng.random((self.vocab_size, n_experts)), top_k)
        self.table = Tensor(chosen.astype(dtype))  # (V, E), 1 at each id's experts; saved with the model

    def _select(self, scores, context):
        return self.table.data[context.need("ids", self).reshape(-1)] > 0
