"""Routers: hidden states in, a Routing out. `ROUTERS` lists them by name.

A router scores every token against every expert, chooses places in that (N, E) matrix, and gives
each chosen place a gate. Choosing has no gradient; the language-model loss trains the router
through the gates alone, so a gate must depend on the scores (a renormalised top-1 gate is the
constant 1 and would never train).

To add a router, write a class with `forward(x, context)` that returns a Routing, and list it.
"""

from dataclasses import dataclass

import numpy as np

from . import functional as F
from .nn import INIT_STD, Module, normal, zeros
from .routing import capacity, from_mask
from .tensor import Tensor


@dataclass(frozen=True)
class RouteContext:
    """What a router may know besides the hidden states.

    ids: (B, T) tokens, N = B * T; rows of x follow them, sequence by sequence.
    training: noise and other training-only behaviour. rng: the generator for it.
    causal: decide each token's route from its own sequence's prefix alone. Routers with
        `causal = True` do so anyway; the others change their rule.
    """

    ids: np.ndarray | None = None
    training: bool = False
    rng: np.random.Generator | None = None
    causal: bool = False


def largest(scores, k, axis=-1):
    """Boolean mask of the k largest scores along an axis; ties go to the lowest index."""
    kth = np.take(np.partition(scores, -k, axis), [-k], axis)
    above, ties = scores > kth, scores == kth
    room = k - above.sum(axis, keepdims=True)
    return above | ties & (ties.cumsum(axis) <= room)


class TopK(Module):
    """Each token takes its K experts of largest probability (Switch, Fedus et al. 2021; Mixtral, Jiang et al. 2024).

    Gates are the softmax over all experts: as it is for K = 1 (Switch eq. 2), renormalised over the
    chosen ones for K > 1 (Mixtral). `renormalise=False` with K > 1 leaves it raw, as Grok-1 does.
    """

    causal = True

    def __init__(self, d_model, n_experts, top_k, rng, dtype, renormalise=None):
        if not 1 <= top_k <= n_experts or int(top_k) != top_k:
            raise ValueError(f"top_k {top_k} must be a whole number from 1 to n_experts {n_experts}")
        self.top_k = int(top_k)
        self.renormalise = top_k > 1 if renormalise is None else renormalise
        self.weight = self._initial_weight(d_model, n_experts, rng, dtype)

    def _initial_weight(self, d_model, n_experts, rng, dtype):
        return normal(rng, (d_model, n_experts), INIT_STD, dtype)

    def forward(self, x, context):
        return self._choose(F.linear(x, self.weight))

    def _choose(self, logits, soft_load=None):
        probs = F.softmax(logits)
        chosen = largest(logits.data, self.top_k)
        gates = probs * chosen
        if self.renormalise:
            gates = gates / gates.sum(axis=-1, keepdims=True)
        return from_mask(chosen, gates, logits, probs, soft_load=soft_load)


class NoisyTopK(TopK):
    """Top-K of logits with learned Gaussian noise while training (Shazeer et al. 2017, eq. 3 to 5).

    H = x W + epsilon * (softplus(x W_noise) + 0.01), epsilon ~ N(0, 1); without noise at evaluation.
    Both weights start at zero. While training, the Routing carries the smooth load of appendix A.
    Raises ValueError when training without an rng.
    """

    def __init__(self, d_model, n_experts, top_k, rng, dtype, renormalise=None):
        super().__init__(d_model, n_experts, top_k, rng, dtype, renormalise)
        self.noise = zeros((d_model, n_experts), dtype)

    def _initial_weight(self, d_model, n_experts, rng, dtype):
        return zeros((d_model, n_experts), dtype)

    def forward(self, x, context):
        clean = F.linear(x, self.weight)
        if not context.training:
            return self._choose(clean)
        if context.rng is None:
            raise ValueError("noisy_top_k draws noise while training: give RouteContext an rng")
        sigma = F.softplus(F.linear(x, self.noise)) + 0.01
        epsilon = context.rng.standard_normal(clean.shape).astype(clean.dtype)
        noisy = clean + epsilon * sigma
        return self._choose(noisy, self._soft_load(clean, noisy, sigma))

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


class ExpertChoice(Module):
    """Each expert takes the C = N * K / E tokens of largest probability (Zhou et al. 2022, eq. 1 to 3).

    K is the mean number of experts a token gets (the paper's c) and may be a fraction; a token may
    get none. Gates are the softmax over experts, not renormalised. Load is equal by construction,
    but a token's route depends on later tokens and on its neighbours in the batch. With
    context.causal, a token is taken by an expert where it is among the best ceil(n * K / E) of the
    n tokens of its own sequence so far.
    """

    causal = False

    def __init__(self, d_model, n_experts, top_k, rng, dtype):
        if not 0 < top_k <= n_experts:
            raise ValueError(f"top_k {top_k} must be above 0 and at most n_experts {n_experts}")
        self.top_k = top_k
        self.weight = normal(rng, (d_model, n_experts), INIT_STD, dtype)

    def forward(self, x, context):
        logits = F.linear(x, self.weight)
        probs = F.softmax(logits)
        chosen = self._prefix_choice(probs.data, context) if context.causal else self._batch_choice(probs.data)
        return from_mask(chosen, probs, logits, probs)

    def _batch_choice(self, p):
        return largest(p, capacity(*p.shape, self.top_k), axis=0)

    def _prefix_choice(self, p, context):
        if context.ids is None:
            raise ValueError("causal expert choice needs RouteContext.ids to know where sequences begin")
        length, n_experts = context.ids.shape[1], p.shape[1]
        room = np.array([capacity(t + 1, n_experts, self.top_k) for t in range(length)])
        chosen = np.empty((len(p) // length, length, n_experts), bool)
        for sequence, p in zip(chosen, p.reshape(chosen.shape)):
            for t in range(length):  # an earlier token wins a tie, as in the batch form
                sequence[t] = (p[:t] >= p[t]).sum(axis=0) < room[t]
        return chosen.reshape(-1, n_experts)


ROUTERS = {"top_k": TopK, "noisy_top_k": NoisyTopK, "expert_choice": ExpertChoice}


def make(name, d_model, n_experts, top_k=2, seed=0, dtype=np.float32, **options):
    """The named router for d_model features and n_experts experts.

    seed: an integer or a NumPy Generator for the initial weights. options: the class's own.
    Raises ValueError for an unknown name or an impossible top_k.
    """
    if name not in ROUTERS:
        raise ValueError(f"unknown router {name!r}: choose one of {', '.join(ROUTERS)}")
    return ROUTERS[name](d_model, n_experts, top_k, np.random.default_rng(seed), dtype, **options)
