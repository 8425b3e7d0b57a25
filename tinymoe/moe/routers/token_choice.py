"""Other routers in which each token chooses: by noisy scores, by sigmoid scores with a bias, by a random draw."""

from typing import Literal

import numpy as np

from ...autograd import functional as F
from ...autograd.tensor import Tensor
from ...layers.nn import zeros
from ..routing import from_mask, largest
from .base import LinearRouter
from .top_k import TopK

TINY = 1e-20  # added to sums of sigmoids, which may all be 0


class NoisyTopK(TopK, name="noisy_top_k"):
    """Top-K of logits with learned Gaussian noise while training (Shazeer et al. 2017, eq. 3 to 5).

    H = x W + epsilon * (softplus(x W_noise) + 0.01), epsilon ~ N(0, 1). At evaluation there is no noise.
    Both weights start at zero. While training, the Routing carries the smooth load of appendix A, which is not defined
    with groups and is left out there. Raises ValueError when training without an rng.
    """

    paper = "Shazeer 2017"
    formula = "h = x W + epsilon (softplus(x V) + 0.01) while training, epsilon ~ N(0, 1), else x W; then as top_k"
    used_by = "Shazeer's mixtures of LSTMs; V-MoE, with raw gates and noise of width 1 / E"
    cost = "4 N D E"
    shapes = {"weight": "DE", "noise": "DE"}
    has_soft_load = True
    router_std: float = 0.0
    second_expert, second_threshold = "all", 0.5  # fixed, because the smooth load counts all second experts

    def __init__(self, d_model, n_experts, top_k, rng, dtype, **options):
        super().__init__(d_model, n_experts, top_k, rng, dtype, **options)
        self.noise = zeros((d_model, n_experts), dtype)

    def forward(self, x, context):
        x = self._jittered(x, context)
        clean = self.scores(x)
        if not context.training:
            return self._choose(clean, context)
        sigma = F.softplus(F.linear(x, self.noise)) + 0.01
        epsilon = context.need("rng", self).standard_normal(clean.shape).astype(clean.dtype)
        noisy = clean + epsilon * sigma
        return self._choose(noisy, context, self._soft_load(clean, noisy, sigma) if self.n_groups == 1 else None)

    def _soft_load(self, clean, noisy, sigma):
        """(E,): the sum over tokens of P(expert i is in the top K when its noise is drawn again), eq. 8 to 10."""
        n, n_experts = clean.shape
        if self.top_k == n_experts:
            return Tensor(np.full(n_experts, n, clean.dtype))
        order = np.argsort(-noisy.data, axis=-1, kind="stable")
        kth, next_best = order[:, self.top_k - 1:self.top_k], order[:, self.top_k:self.top_k + 1]
        # the K-th largest among the others: the (K+1)-th of all for those inside, the K-th for those outside
        rival = np.where(largest(noisy.data, self.top_k), next_best, kth)
        return F.normal_cdf((clean - F.gather(noisy, rival)) / sigma).sum(axis=0)


def log_softplus(z: Tensor) -> Tensor:
    """log(log(1 + exp(z))), which is z where exp(z) is too small for the other form."""
    low = z.data < -40
    return F.where(low, z, F.softplus(F.where(low, 0, z)).log())


SCORES = {  # name -> (score of the logits, its logarithm)
    "sigmoid": (lambda z: F.sigmoid(z), lambda z: -F.softplus(-z)),  # DeepSeek-V3
    "softmax": (lambda z: F.softmax(z), lambda z: F.log_softmax(z)),
    "sqrt_softplus": (lambda z: (0.5 * log_softplus(z)).exp(), lambda z: 0.5 * log_softplus(z)),  # DeepSeek-V4
}


class Scored(TopK):
    """Scores s of the logits. Gates are gate_scale * s / (sum of the chosen s + 1e-20), or gate_scale * s for K = 1.

    `probs` are s / (sum of all s), which sum to 1 whatever the scores.

    score: s is the sigmoid of the logit (DeepSeek-V3), sqrt(log(1 + exp(logit))) (sqrt_softplus, DeepSeek-V4) or the
        softmax over experts.
    gate_scale: a factor of all gates; 2.5 in DeepSeek-V3, 1.5 in DeepSeek-V4-Flash.
    """

    score: Literal["sigmoid", "softmax", "sqrt_softplus"] = "sigmoid"
    gate_scale: float = 1.0
    jitter, second_expert, second_threshold = 0.0, "all", 0.5  # fixed

    def forward(self, x, context):
        logits = self.scores(x)
        s = SCORES[self.score][0](logits)
        chosen = self._select(s.data, context)
        gates = s * chosen
        if self.renormalise:
            gates = gates / (gates.sum(axis=-1, keepdims=True) + TINY)
        return from_mask(chosen, gates * self.gate_scale, logits, self._shares(s, logits))

    def _shares(self, s, logits):
        """s / (sum of all s), which sums to 1 even where every s is too small for that division."""
        if self.score == "softmax":
            return s
        total = s.sum(axis=-1, keepdims=True)
        return s / (total + TINY) if (total.data > 1e-9).all() else F.softmax(SCORES[self.score][1](logits))


class SigmoidBias(Scored, name="sigmoid_bias"):
    """Sigmoid scores, and a bias that balances the load without a loss (DeepSeek-V3, eq. 12 to 16; Wang et al. 2024).

    s = sigmoid(x W). Each token takes the K experts of largest s + b. Its gates are gate_scale * s / (sum of the chosen
    s + 1e-20), or gate_scale * s for K = 1; the bias b takes no part in them. After each training step
    b_e += bias_rate * sign(mean load - load_e).
    `probs` are s / (sum of all s), as in DeepSeek-V3's sequence-wise balance loss.

    bias_rate: how much the bias changes in a training step.
    bias_rule: "sign" is that of Wang et al.; "centred" subtracts the mean of the step over the experts, so that the
        biases cannot drift together (torchtitan).
    n_groups, group_limit: as in top_k, but the score of a group is the sum of its two largest s + b.
    """

    paper = "DeepSeek-AI 2024 (V3); Wang 2024 (bias)"
    formula = ("s = sigmoid(x W); the K largest s + b; gates s / (sum of the chosen s), or s for K = 1; "
               "b_e += rate sign(mean load - load_e)")
    used_by = "DeepSeek-V3, Kimi K2, GLM-4.5"
    balanced = "in the long run"
    shapes = {"weight": "DE", "bias": "E"}
    bias_rate: float = 1e-3
    bias_rule: Literal["sign", "centred"] = "sign"

    def __init__(self, d_model, n_experts, top_k, rng, dtype, **options):
        super().__init__(d_model, n_experts, top_k, rng, dtype, **options)
        self.bias = Tensor(np.zeros(n_experts, dtype))  # no gradient, but saved with the model

    def _select(self, scores, context):
        return largest(self._in_best_groups(scores + self.bias.data, n_best=2), self.top_k)

    def after_step(self, routing):
        if self.weight.requires_grad:  # a frozen router keeps its bias too
            self.bias.data = (self.bias.data + self._step(routing)).astype(self.bias.dtype)

    def _step(self, routing):
        """(E,): the change of the bias after a training step with this Routing."""
        load = routing.demand
        step = self.bias_rate * np.sign(load.mean() - load)
        return step - step.mean() if self.bias_rule == "centred" else step


class Reinforce(LinearRouter, name="reinforce"):
    """Top-1, learned by trial (REINFORCE, Williams 1992). The model takes the mean of the loss "policy" over its L
    layers that draw: a coefficient of L gives the gradient of the expected loss, the default of 1 gives 1 / L of it.

    While training an expert is drawn from softmax(x W); at evaluation the most probable one is taken. The gate is the
    constant 1, so the language-model loss gives the router no gradient. The loss "policy" does. Raises ValueError when
    training without an rng.
    """

    paper = "Williams 1992"
    formula = "an expert drawn from softmax(x W) while training, else the most probable; gate 1"
    used_by = "studies: Bengio 2015, Clark 2022"
    top_1_only = True
    sampled = True
    losses = {"policy": 1.0}

    def forward(self, x, context):
        logits = self.scores(x)
        scores = logits.data
        if context.training:  # the largest of logit + Gumbel noise is a draw from the softmax
            scores = scores + context.need("rng", self).gumbel(size=scores.shape)
        return from_mask(largest(scores, 1), Tensor(np.ones_like(logits.data)), logits, F.softmax(logits))
