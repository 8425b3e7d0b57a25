"""Routers since 2024, each a variation of one in the files before."""

from typing import Literal

import numpy as np

from ...autograd import functional as F
from ...autograd.tensor import Tensor
from ...layers.nn import INIT_STD, normal, zeros
from ..routing import capacity, from_mask, largest, shares
from .base import LinearRouter
from .baselines import ByToken
from .token_choice import SCORES, Scored, SigmoidBias
from .top_k import TopK


class BiasedTopK(TopK, name="biased_top_k"):
    """top_k with a learned bias in the logits, z = x W + b (GPT-OSS, OpenAI 2025).

    The bias starts at 0. GPT-OSS takes the softmax over the chosen logits, which equals renormalised gates. Here K = 1
    is not renormalised by default (see top_k): a gate is then the softmax over all logits, p.
    """

    paper = "OpenAI 2025"
    formula = ("z = x W + b, with a learned b; the K largest z; gates softmax over the chosen z, or p = softmax(z) for "
               "K = 1")
    used_by = "GPT-OSS"
    shapes = {"weight": "DE", "bias": "E"}

    def __init__(self, d_model, n_experts, top_k, rng, dtype, **options):
        super().__init__(d_model, n_experts, top_k, rng, dtype, **options)
        self.bias = zeros(n_experts, dtype)

    def scores(self, x):
        return F.linear(x, self.weight, self.bias)


class NormalisedTopK(TopK, name="normalised_top_k"):
    """top_k of logits that are normalised for each token (Skywork-MoE, Wei et al. 2024).

    z' = logit_scale * (z - mean z) / sqrt(var z + 1e-12) over the E experts. The variance divides by E - 1, as in
    Skywork's code. `logits` of the Routing are z'.

    With two experts z' keeps no more of z than which is larger, so the router has no gradient.

    logit_scale: the standard deviation of a token's logits; a larger one makes its gates more different. Skywork-MoE
        has 1.
    router_std: standard deviation of the initial weights, above 0.
    """

    paper = "Wei 2024"
    formula = "z = x W; top_k of logit_scale (z - mean z) / std z"
    used_by = "Skywork-MoE"
    logit_scale: float = 1.0

    @classmethod
    def check(cls, n_experts, top_k, options):
        super().check(n_experts, top_k, options)
        if options.get("router_std", 1) == 0:
            raise ValueError("router_std 0 must be above 0 for normalised_top_k: it divides by that of the logits")

    def scores(self, x):
        z = super().scores(x)
        z = z - z.mean(axis=-1, keepdims=True)
        variance = (z ** 2).sum(axis=-1, keepdims=True) * (1 / max(1, self.n_experts - 1))
        return z * (self.logit_scale / (variance + 1e-12).sqrt())


class CosineTopK(TopK, name="cosine_top_k"):
    """top_k of cosines between projected tokens and experts (X-MoE, Chi et al. 2022; Swin-MoE).

    z_e = cos(x P, c_e) / tau, P (D, R), with a learned tau of at least 0.01, as in Tutel. P has no bias; in Tutel it
    has one. X-MoE's code in torchscale divides c_e by its length but not x P, and has no tau.

    router_width: R, the width of the projection; 16 in torchscale, 256 in Tutel.
    router_std: standard deviation of the initial c_e, above 0. That of P is 0.02.
    temperature: tau at the start; 0.5 in Tutel.
    """

    paper = "Chi 2022"
    formula = "top_k of cos(x P, c_e) / tau, tau learned"
    used_by = "Swin-MoE, X-MoE"
    cost = "2 N R (D + E)"
    shapes = {"weight": "RE", "projection": "DR", "log_scale": ""}
    router_width: int = 16
    temperature: float = 0.5

    def __init__(self, d_model, n_experts, top_k, rng, dtype, **options):
        super().__init__(d_model, n_experts, top_k, rng, dtype, **options)
        self.weight = normal(rng, (self.router_width, n_experts), self.router_std, dtype)
        self.projection = normal(rng, (d_model, self.router_width), INIT_STD, dtype)
        self.log_scale = Tensor(np.array(-np.log(self.temperature), dtype), requires_grad=True)  # log(1 / tau)

    @classmethod
    def check(cls, n_experts, top_k, options):
        super().check(n_experts, top_k, options)
        if options.get("temperature", 1) < 0.01:
            raise ValueError(f"temperature {options['temperature']} must be at least 0.01")
        if options.get("router_std", 1) == 0:
            raise ValueError("router_std 0 must be above 0 for cosine_top_k: a vector of zeros has no direction")

    def scores(self, x):
        top = np.log(100.0).astype(x.dtype)
        scale = F.where(self.log_scale.data > top, top, self.log_scale).exp()
        return F.linear(_unit(F.linear(x, self.projection), axis=1), _unit(self.weight, axis=0)) * scale


def _unit(x, axis):
    """x divided by its length along an axis; a vector of zeros stays."""
    return x / ((x * x).sum(axis=axis, keepdims=True) + 1e-24).sqrt()


class TopP(LinearRouter, name="top_p"):
    """The fewest experts whose probabilities sum to at least top_p (Huang et al. 2024, arXiv 2403.07652).

    A token that is sure of its expert has one, an undecided one many. A gate is the probability of its expert. The loss
    "entropy" keeps the number small; its default here is the paper's 1e-4.

    top_p: the least sum of the chosen probabilities; the paper has 0.4.
    steer: if above 0, after each training step top_p rises by steer * (K - mean experts of a token) / E, so that a
        token has K experts on average. It stays between 0.01 (or a lower start) and 1, and is saved with the model.
        DTop-p (Jin et al. 2025, arXiv 2512.13996) has a PI controller of one threshold for all layers, and normalises
        the logits. Here each layer has its own, and the controller is the integral part alone.
    renormalise: whether a token's gates are divided by their sum.
    """

    paper = "Huang 2024"
    formula = "p = softmax(x W); the fewest experts whose p sum to at least top_p; gates p"
    used_by = "studies: Huang 2024, DTop-p"
    mean_k = True
    shapes = {"weight": "DE", "threshold": ""}
    losses = {"entropy": 1e-4}
    top_p: float = 0.4
    steer: float = 0.0
    renormalise: bool = False

    def __init__(self, d_model, n_experts, top_k, rng, dtype, **options):
        super().__init__(d_model, n_experts, top_k, rng, dtype, **options)
        self.threshold = Tensor(np.array(self.top_p, dtype))

    @classmethod
    def check(cls, n_experts, top_k, options):
        super().check(n_experts, top_k, options)
        if not 0 < options.get("top_p", 1) <= 1:
            raise ValueError(f"top_p {options['top_p']} must be above 0 and at most 1")

    def forward(self, x, context):
        logits = self.scores(x)
        probs = F.softmax(logits)
        order = np.argsort(-probs.data, axis=1, kind="stable")
        ranked = np.take_along_axis(probs.data, order, axis=1).astype(float)
        chosen = np.empty(probs.shape, bool)  # an expert is in where the larger ones do not reach top_p
        np.put_along_axis(chosen, order, ranked.cumsum(axis=1) - ranked < self.threshold.data, axis=1)
        gates = shares(probs, chosen) if self.renormalise else probs * chosen
        return from_mask(chosen, gates, logits, probs)

    def after_step(self, routing):
        p, missing = self.threshold, self.top_k - routing.demand.sum() / max(1, routing.n_tokens)
        if self.weight.requires_grad:  # a frozen router keeps its top_p too
            p.data = np.clip(p.data + self.steer * missing / self.n_experts, min(0.01, self.top_p), 1).astype(p.dtype)


class ReMoE(LinearRouter, name="remoe"):
    """Gates relu(x W): every expert with a positive logit is chosen, and K is a mean (Wang et al. 2024, 2412.14711).

    A gate is continuous in the logits: it is 0 where its expert drops out. The penalty is lambda * E / K * sum over e
    of f_e * (mean of g_e), with f_e the share of the tokens that expert e serves, without gradient. After each training
    step lambda grows by the factor where more than K / E of the gates are positive, and shrinks by it where fewer are;
    here it stays within 1e-20 to 1e20. The paper has one lambda for all layers; here each layer has its own, which is
    saved with the model. `probs` are the softmax of the logits.

    penalty_start: lambda at the start.
    penalty_factor: what lambda is multiplied or divided by; at least 1.
    """

    paper = "Wang 2024 (ReMoE)"
    formula = "gates relu(x W); penalty lambda E / K sum f_e mean(g_e), lambda steered to K experts a token"
    used_by = "studies: Wang 2024 (ReMoE)"
    mean_k = True
    shapes = {"weight": "DE", "coefficient": ""}
    penalty_start: float = 1e-8
    penalty_factor: float = 1.2

    def __init__(self, d_model, n_experts, top_k, rng, dtype, **options):
        super().__init__(d_model, n_experts, top_k, rng, dtype, **options)
        self.coefficient = Tensor(np.array(self.penalty_start, dtype))

    @classmethod
    def check(cls, n_experts, top_k, options):
        super().check(n_experts, top_k, options)
        if options.get("penalty_factor", 1) < 1:
            raise ValueError(f"penalty_factor {options['penalty_factor']} must be at least 1")

    def forward(self, x, context):
        logits = self.scores(x)
        return from_mask(logits.data > 0, F.relu(logits), logits, F.softmax(logits))

    def penalty(self, routing, context):
        share = (routing.demand / routing.n_tokens).astype(routing.gate.dtype)
        mean = F.relu(routing.logits).mean(axis=0)  # (E,), before any capacity limit, as the share
        return (share * mean).sum() * (self.coefficient.data * self.n_experts / self.top_k)

    def after_step(self, routing):
        surplus = np.sign(routing.demand.sum() - self.top_k * routing.n_tokens)
        new = np.clip(self.coefficient.data * self.penalty_factor ** surplus, 1e-20, 1e20)
        if self.weight.requires_grad:  # a frozen router keeps its lambda too
            self.coefficient.data = new.astype(self.coefficient.dtype)


class MixtureOfDepths(LinearRouter, name="mixture_of_depths"):
    """The tokens of largest score in each sequence pass through the experts, the others skip them (Raposo et al. 2024).

    As published (arXiv 2404.02258, eq. 1) with n_experts 1 and top_k below 1, the share of the tokens that pass: the
    ceil(T * K / E) tokens of largest logit z = x w, with z itself as the gate. (The paper routes around the attention
    too; here only the experts are skipped.) With more experts each takes its own tokens. That choice sees later tokens.
    With context.causal an expert takes the tokens with z > 0, as the paper does to sample: the penalty, a binary
    cross-entropy that predicts the choice from z, trains z to be positive there.

    The form was not checked against the paper itself.

    choice_loss: coefficient of the penalty; 0.01 is our choice. The penalty also reaches the layers below.
    Raises ValueError without RouteContext.ids, unless context.causal is set.
    """

    paper = "Raposo 2024"
    formula = "z = x w; the T K / E tokens of largest z in a sequence; gate z"
    used_by = "studies: Raposo 2024"
    chooses = "expert"
    balanced = "yes"
    causal = causal_training = False
    mean_k = True
    choice_loss: float = 0.01

    def forward(self, x, context):
        logits = self.scores(x)
        if context.causal:
            chosen = logits.data > 0
        else:
            length = context.need("ids", self).shape[1]
            sequences = logits.data.reshape(-1, length, self.n_experts)  # (B, T, E)
            chosen = largest(sequences, capacity(length, self.n_experts, self.top_k), axis=1).reshape(logits.shape)
        return from_mask(chosen, logits, logits, F.softmax(logits))

    def penalty(self, routing, context):
        z = routing.logits
        return self.choice_loss * (F.softplus(z) - routing.mask().astype(z.dtype) * z).mean()


class MomentumBias(SigmoidBias, name="momentum_bias"):
    """sigmoid_bias whose bias moves smoothly (SMEBU: Arcee Trinity, Singh et al. 2026, arXiv 2602.17004).

    v_e = (mean load - load_e) / mean load; step = bias_rate * tanh(clamp * v), minus its mean over the experts;
    m <- momentum * m + (1 - momentum) * step; b <- b + m. The mean m is saved with the model. The defaults are those
    of Trinity Large.

    bias_rate: the largest step, before its mean is subtracted.
    clamp: the slope of tanh at balance; a large one makes the step a sign.
    momentum: the weight of the steps before; below 1.
    """

    paper = "Singh 2026"
    formula = ("as sigmoid_bias, with b += m, m the running mean of rate * tanh(clamp * (1 - load_e / mean load)), "
               "centred")
    used_by = "Arcee Trinity Large"
    shapes = {"weight": "DE", "bias": "E", "mean_step": "E"}
    bias_rate: float = 5e-4
    clamp: float = 2.0
    momentum: float = 0.5
    bias_rule = "centred"  # fixed

    def __init__(self, d_model, n_experts, top_k, rng, dtype, **options):
        super().__init__(d_model, n_experts, top_k, rng, dtype, **options)
        self.mean_step = Tensor(np.zeros(n_experts, dtype))

    @classmethod
    def check(cls, n_experts, top_k, options):
        super().check(n_experts, top_k, options)
        if options.get("momentum", 0) >= 1:
            raise ValueError(f"momentum {options['momentum']} must be at least 0 and below 1")

    def _step(self, routing):
        load = routing.demand
        step = self.bias_rate * np.tanh(self.clamp * (1 - load / max(load.mean(), 1e-20)))
        mean = self.momentum * self.mean_step.data + (1 - self.momentum) * (step - step.mean())
        self.mean_step.data = mean.astype(self.mean_step.dtype)
        return mean


class QuantileBias(SigmoidBias, name="quantile_bias"):
    """sigmoid_bias whose bias is solved for, not stepped (quantile balancing, Su 2026, kexue.fm/archives/11619).

    Each token takes the K experts of largest s + b. After each training step, for the batch's scores s (N, E):
    a_n = the (K + 1)-th largest of s_n + b; b_e <- -(the (C + 1)-th largest over n of s_ne - a_n), C = ceil(N K / E).
    So C tokens have s_ne + b_e above a_n, where no two are equal. With beta = -b these are the dual
    variables of the balanced assignment, which the two lines solve in turn. Then the mean of b over the experts is
    subtracted, as in Kimi K3 and Megatron: no choice changes, and the biases cannot drift together. There are no
    groups, because the rule solves for all experts at once.

    bias_rate: how far the bias goes to its new value in a training step; 1 is the published rule.
    """

    paper = "Su 2026"
    formula = ("as sigmoid_bias, with a_n = the (K + 1)-th largest of s_n + b; "
               "b_e = -(the (C + 1)-th largest over n of s_ne - a_n), centred; C = ceil(N K / E)")
    used_by = "Kimi K3, Marin"
    bias_rate: float = 1.0
    bias_rule, n_groups, group_limit = "sign", 1, None  # fixed; the first is not used

    def _step(self, routing):
        s, bias = SCORES[self.score][0](routing.logits).data, self.bias.data
        place = len(s) - 1 - capacity(*s.shape, self.top_k)  # of the (C + 1)-th largest of N in rising order
        if place < 0:  # every expert takes every token
            return np.zeros_like(bias)
        alpha = np.sort(s + bias, axis=1)[:, -self.top_k - 1]
        solved = -np.sort(s - alpha[:, None], axis=0)[place]
        return self.bias_rate * (solved - solved.mean() - bias)


class RealBias(SigmoidBias, name="real_bias"):
    """Softmax scores, and a bias that steers how many real experts a token has (LongCat-Flash 2025, arXiv 2509.01322).

    For ModelConfig.n_copy or n_zero: the first n_real experts are real. After each training step b_e += bias_rate *
    (real_k / K / n_real - load_e / (N K)) for these; the bias of the others stays 0, and they share what is left.

    n_real: number of real experts, the first ones; null is all. A model sets it to n_experts.
    real_k: real experts that a token is to have on average; at most top_k and n_real. A token's K experts differ, so
        with fewer than K - real_k others it cannot have so few: then the target is K minus the others.
    renormalise: whether a token's gates are divided by their sum. LongCat-Flash does not, and its gate_scale is 6.
    """

    paper = "Meituan 2025"
    formula = ("p = softmax(x W); the K largest p + b; gates p; b_e += rate (real_k / (K n_real) - load_e / (N K)) for "
               "real experts")
    used_by = "LongCat-Flash"
    renormalise: bool = False
    score: Literal["sigmoid", "softmax", "sqrt_softplus"] = "softmax"
    n_real: int | None = None
    real_k: float = 1.0
    bias_rule = "sign"  # fixed; not used

    @classmethod
    def check(cls, n_experts, top_k, options):
        super().check(n_experts, top_k, options)
        real_k, n_real = options.get("real_k", cls.real_k), options.get("n_real") or n_experts
        if n_real > n_experts:
            raise ValueError(f"n_real {n_real} must be at most n_experts {n_experts}")
        if real_k > (most := min(top_k, n_real)):
            raise ValueError(f"real_k {real_k} must be at most {most}, the smaller of top_k and n_real")

    @staticmethod
    def reachable(real_k, top_k, n_others):
        """Real experts that a token can have on average: its K choices differ, so at most n_others are not real."""
        return max(real_k, top_k - n_others)

    def _step(self, routing):
        n_real = self.n_real or self.n_experts
        real_k = self.reachable(self.real_k, self.top_k, self.n_experts - n_real)
        step = real_k / self.top_k / n_real - routing.demand / max(1, routing.n_tokens * self.top_k)
        return self.bias_rate * np.where(np.arange(self.n_experts) < n_real, step, 0)


class HashGated(ByToken, Scored, name="hash_gated"):
    """A random table of the token's id chooses K experts, and learned scores of those are the gates (DeepSeek-V4).

    DeepSeek-V4 has it in the first three MoE layers, with score sqrt_softplus, and sigmoid_bias in the others: give
    ModelConfig a list of routers. How its table was made is not published; the one here ignores how frequent an id is.
    Raises ValueError without RouteContext.ids.
    """

    paper = "DeepSeek-AI 2026"
    formula = "K experts of table[id]; gates s / (sum of the chosen s), or s for K = 1; s = sigmoid(x W)"
    used_by = "DeepSeek-V4, first three layers"
    chooses = "neither"
    cost = "2 N D E + a lookup"
    shapes = {"weight": "DE", "table": "VE"}
    n_groups, group_limit = 1, None  # fixed

    def _select(self, scores, context):
        return self.read(context)
