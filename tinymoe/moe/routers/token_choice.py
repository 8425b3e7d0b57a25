"""Each token chooses its K experts."""

import numpy as np

from ...autograd import functional as F
from ...layers.nn import INIT_STD, freeze, zeros
from ..routing import from_mask, largest
from ...autograd.tensor import Tensor
from .base import LinearRouter

SECOND_EXPERT = ("all", "random", "threshold")
TINY = 1e-20  # added to sums of sigmoids, which may all be 0


class TopK(LinearRouter, name="top_k"):
    """Each token takes its K experts of largest probability (Switch, Fedus et al. 2021; Mixtral, Jiang et al. 2024).

    Gates are the softmax over all experts: as it is for K = 1 (Switch eq. 2), renormalised over the
    chosen ones for K > 1 (Mixtral), which equals a softmax over the chosen logits alone.
    renormalise: False with K > 1 leaves gates raw, as Grok-1 does; True with K = 1 makes them the constant 1.
    jitter: while training, inputs are multiplied by noise from U(1 - jitter, 1 + jitter) (Switch).
    n_groups, group_limit: experts in equal groups, of which the best group_limit stay, a group being as good
        as its best expert (DeepSeek-V2, section 2.2.2).
    second_expert, with K = 2, while training: "all" keeps every second expert; "threshold" those whose
        gate is above second_threshold; "random" keeps one with probability gate / second_threshold (GShard,
        Lepikhin et al. 2020, algorithm 1, where the threshold is 0.5).
    Raises ValueError for groups that do not divide, or training with noise but without an rng.
    """

    paper = "Fedus 2021; Jiang 2024"
    options = ("router_std", "renormalise", "jitter", "n_groups", "group_limit", "second_expert", "second_threshold")

    def __init__(self, d_model, n_experts, top_k, rng, dtype, renormalise=None, router_std=INIT_STD, jitter=0.0,
                 n_groups=1, group_limit=None, second_expert="all", second_threshold=0.5):
        super().__init__(d_model, n_experts, top_k, rng, dtype, router_std)
        check_groups(n_experts, top_k, n_groups, group_limit)
        if second_expert not in SECOND_EXPERT or (second_expert != "all" and top_k != 2):
            raise ValueError(f"second_expert {second_expert!r} must be one of {', '.join(SECOND_EXPERT)}, "
                             f"and all unless top_k is 2")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter {jitter} must be at least 0 and below 1")
        self.renormalise = top_k > 1 if renormalise is None else renormalise
        self.jitter, self.n_groups, self.group_limit = jitter, n_groups, group_limit
        self.second_expert, self.second_threshold = second_expert, second_threshold

    def forward(self, x, context):
        return self._choose(self.scores(self._jittered(x, context)), context)

    def _jittered(self, x, context):
        if not (self.jitter and context.training):
            return x
        noise = noise_source(self, context).uniform(1 - self.jitter, 1 + self.jitter, x.shape)
        return x * noise.astype(x.dtype)

    def _choose(self, logits, context, soft_load=None):
        probs = F.softmax(logits)
        chosen = self._select(in_best_groups(logits.data, self.n_groups, self.group_limit, 1), context)
        gates = probs * chosen
        if self.renormalise:
            gates = gates / gates.sum(axis=-1, keepdims=True)
        if context.training and self.second_expert != "all":
            chosen = chosen & self._keeps_second(gates.data, context)
        return from_mask(chosen, gates, logits, probs, soft_load=soft_load)

    def _select(self, scores, context):
        return largest(scores, self.top_k)

    def _keeps_second(self, gates, context):
        """(N, E) bool: all but the second choices that the policy drops."""
        limit = np.full(len(gates), self.second_threshold, float)
        if self.second_expert == "random":
            limit *= noise_source(self, context).random(len(gates))
        return largest(gates, 1) | (gates > limit[:, None])


class NoisyTopK(TopK, name="noisy_top_k"):
    """Top-K of logits with learned Gaussian noise while training (Shazeer et al. 2017, eq. 3 to 5).

    H = x W + epsilon * (softplus(x W_noise) + 0.01), epsilon ~ N(0, 1); without noise at evaluation.
    Both weights start at zero. While training, the Routing carries the smooth load of appendix A, but not with groups,
    which it knows nothing of.
    Raises ValueError when training without an rng.
    """

    paper = "Shazeer 2017"
    cost = "4 N D E"
    options = ("router_std", "renormalise", "jitter", "n_groups", "group_limit")  # no second-expert policy
    has_soft_load = True

    def __init__(self, d_model, n_experts, top_k, rng, dtype, router_std=0.0, **options):
        super().__init__(d_model, n_experts, top_k, rng, dtype, router_std=router_std, **options)
        self.noise = zeros((d_model, n_experts), dtype)

    def forward(self, x, context):
        x = self._jittered(x, context)
        clean = self.scores(x)
        if not context.training:
            return self._choose(clean, context)
        sigma = F.softplus(F.linear(x, self.noise)) + 0.01
        epsilon = noise_source(self, context).standard_normal(clean.shape).astype(clean.dtype)
        noisy = clean + epsilon * sigma
        return self._choose(noisy, context, self._soft_load(clean, noisy, sigma) if self.n_groups == 1 else None)

    def _soft_load(self, clean, noisy, sigma):
        """(E,): sum over tokens of P(expert i is in the top K if its own noise is drawn again), eq. 8 to 10."""
        n, n_experts = clean.shape
        if self.top_k == n_experts:
            return Tensor(np.full(n_experts, n, clean.dtype))
        order = np.argsort(-noisy.data, axis=-1, kind="stable")
        kth, next_best = order[:, self.top_k - 1:self.top_k], order[:, self.top_k:self.top_k + 1]
        # the K-th largest among the others: the (K+1)-th of all for those inside, the K-th for those outside
        rival = np.where(largest(noisy.data, self.top_k), next_best, kth)
        return F.normal_cdf((clean - F.gather(noisy, rival)) / sigma).sum(axis=0)


class SigmoidBias(LinearRouter, name="sigmoid_bias"):
    """Sigmoid scores, and a bias that balances the load without a loss (DeepSeek-V3, eq. 12 to 16; Wang et al. 2024).

    s = sigmoid(x W). Each token takes the K experts of largest s + b; its gates are s / (sum of the chosen s)
    * gate_scale, in which b has no part. After each training step b_e += bias_rate * sign(mean load - load_e).
    `probs` are s / (sum of all s), as in DeepSeek-V3's sequence-wise balance loss.
    renormalise: False leaves out the sum, as is the default for K = 1, whose gate would be the constant gate_scale.
    n_groups, group_limit: a group is as good as the sum of its two best s + b.
    """

    paper = "DeepSeek-AI 2024; Wang 2024"
    balanced = "in the long run"
    options = ("router_std", "renormalise", "bias_rate", "gate_scale", "n_groups", "group_limit")

    def __init__(self, d_model, n_experts, top_k, rng, dtype, renormalise=None, router_std=INIT_STD, bias_rate=1e-3,
                 gate_scale=1.0, n_groups=1, group_limit=None):
        super().__init__(d_model, n_experts, top_k, rng, dtype, router_std)
        check_groups(n_experts, top_k, n_groups, group_limit)
        self.bias = Tensor(np.zeros(n_experts, dtype))  # no gradient, but part of the model that is saved
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


class Frozen(TopK, name="frozen"):
    """Top-K whose weights stay as they were drawn (Fan et al. 2024, arXiv 2402.13089): must a router learn?

    Its gates still depend on the hidden states, so the layers below learn through them. Any other router is
    frozen by `freeze=("router",)` in ModelConfig.
    """

    paper = "Fan 2024"
    learned = False

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        freeze(self)


class Shuffled(TopK, name="shuffled"):
    """Top-K whose choices are dealt out to tokens at random: the same load, but a token's experts say nothing of it.

    A null: is it balance alone that helps? With context.causal a token takes the choice of a random token of its own
    prefix. It draws from the context's generator; without one, from a generator that starts alike in each call.
    Raises ValueError for context.causal without ids.
    """

    paper = "–"
    chooses = "neither"
    causal = causal_training = False

    def _select(self, scores, context):
        chosen, rng = super()._select(scores, context), context.rng or np.random.default_rng(0)
        if not context.causal:
            return chosen[rng.permutation(len(chosen))]
        if context.ids is None:
            raise ValueError("causal shuffling needs RouteContext.ids to know where sequences begin")
        place = np.tile(np.arange(context.ids.shape[1]), len(context.ids))
        back = (rng.random(len(chosen)) * (place + 1)).astype(int)  # 0 to place
        return chosen[np.arange(len(chosen)) - back]


class Reinforce(LinearRouter, name="reinforce"):
    """Top-1, learned by trial: while training an expert is drawn from softmax(x W), at evaluation the best is taken.

    The gate is the constant 1, so that the language-model loss gives the router nothing; `losses.policy_loss`, times
    policy_coef, does (REINFORCE, Williams 1992). Raises ValueError when training without an rng.
    """

    paper = "Williams 1992"
    top_1_only = True
    sampled = True

    def forward(self, x, context):
        logits = self.scores(x)
        scores = logits.data
        if context.training:  # the largest of logit + Gumbel noise is a draw from the softmax
            scores = scores + noise_source(self, context).gumbel(size=scores.shape)
        return from_mask(largest(scores, 1), Tensor(np.ones_like(logits.data)), logits, F.softmax(logits))


def noise_source(router, context):
    """The context's generator. ValueError where there is none."""
    if context.rng is None:
        raise ValueError(f"{router.name} draws noise while training: give RouteContext an rng")
    return context.rng


def check_groups(n_experts, top_k, n_groups, group_limit):
    """Raise ValueError unless the groups are equal and those that stay hold top_k experts."""
    if n_groups < 1 or (n_groups > 1) != (group_limit is not None):
        raise ValueError(f"n_groups {n_groups} and group_limit {group_limit} go together: give both, or neither")
    if n_experts % n_groups or not 1 <= (n_groups if group_limit is None else group_limit) <= n_groups:
        raise ValueError(f"n_groups {n_groups} must divide n_experts {n_experts}, and group_limit {group_limit} "
                         f"be from 1 to n_groups")
    if group_limit is not None and top_k > group_limit * (n_experts // n_groups):
        raise ValueError(f"group_limit {group_limit} leaves {group_limit * (n_experts // n_groups)} experts, "
                         f"fewer than top_k {top_k}")


def in_best_groups(scores, n_groups, group_limit, n_best):
    """Scores (N, E), but -inf (a biased score may be below 0) outside a token's best group_limit groups; a group is as
    good as the sum of its n_best best experts. Without a limit, the scores as they are."""
    if group_limit is None:
        return scores
    grouped = scores.reshape(len(scores), n_groups, -1)
    value = np.sort(grouped, axis=-1)[..., -n_best:].sum(axis=-1)  # (N, groups)
    return np.where(np.repeat(largest(value, group_limit), grouped.shape[-1], axis=-1), scores, -np.inf)
