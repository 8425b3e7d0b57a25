"""Each token chooses its K experts by sigmoid scores, and a bias balances the load without a loss."""

import numpy as np

from ...autograd import functional as F
from ...autograd.tensor import Tensor
from ...layers.nn import INIT_STD
from ..routing import from_mask, largest
from .base import LinearRouter
from .top_k import check_groups, in_best_groups

TINY = 1e-20  # added to sums of sigmoids, which may all be 0


class SigmoidBias(LinearRouter, name="sigmoid_bias"):
    """Sigmoid scores, and a bias that balances the load without a loss (DeepSeek-V3, eq. 12 to 16; Wang et al. 2024).

    s = sigmoid(x W). Each token takes the K experts of largest s + b. Its gates are gate_scale * s / (sum of the chosen
    s); the bias b takes no part in them. After each training step b_e += bias_rate * sign(mean load - load_e).
    `probs` are s / (sum of all s), as in DeepSeek-V3's sequence-wise balance loss.

    renormalise: whether the gates are divided by the sum of the chosen s; None for K > 1 only, because for K = 1 the
        gate would be the constant gate_scale.
    bias_rate: the step of the bias.
    gate_scale: a factor of all gates.
    n_groups, group_limit: as in top_k, but a group is as good as the sum of its two largest s + b.
    """

    paper = "DeepSeek-AI 2024; Wang 2024"
    balanced = "in the long run"
    shapes = {"weight": "DE", "bias": "E"}

    def __init__(self, d_model, n_experts, top_k, rng, dtype, renormalise: bool | None = None,
                 router_std: float = INIT_STD, bias_rate: float = 1e-3, gate_scale: float = 1.0, n_groups: int = 1,
                 group_limit: int | None = None):
        super().__init__(d_model, n_experts, top_k, rng, dtype, router_std)
        check_groups(n_experts, top_k, n_groups, group_limit)
        self.bias = Tensor(np.zeros(n_experts, dtype))  # no gradient, but saved with the model
        self.renormalise = top_k > 1 if renormalise is None else renormalise
        self.bias_rate, self.gate_scale = bias_rate, gate_scale
        self.n_groups, self.group_limit = n_groups, group_limit

    def forward(self, x, context):
        logits = self.scores(x)
        s = F.sigmoid(logits)
        biased = s.data + self.bias.data
        chosen = largest(in_best_groups(biased, self.n_groups, self.group_limit, 2), self.top_k)
        gates = s * chosen
        if self.renormalise:
            gates = gates / (gates.sum(axis=-1, keepdims=True) + TINY)
        return from_mask(chosen, gates * self.gate_scale, logits, s / (s.sum(axis=-1, keepdims=True) + TINY))

    def after_step(self, routing):
        if self.weight.requires_grad:  # a frozen router keeps its bias too
            load = routing.wanted
            self.bias.data = self.bias.data + (self.bias_rate * np.sign(load.mean() - load)).astype(self.bias.dtype)
