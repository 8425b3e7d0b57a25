"""The Routing record: every router makes one; experts, losses and metrics take one.

A routing is a sparse gate matrix G (N tokens, E experts): the layer's output is
y = sum over e of G[:, e] * FFN_e(x). Its nonzeros are stored as a flat list of A assignments, sorted
by expert and then by token, because a token may have any number of experts (expert choice).
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from ..autograd.tensor import Tensor, primitive
from .routing_checks import check_limit, check_mask, check_routing

DROP_POLICIES = ("order", "gate")


@dataclass(frozen=True, eq=False)
class Routing:
    """Which expert takes which token, and with what weight.

    token      (A,) int     row of each assignment; sorted by expert, then by token
    offsets    (E+1,) int   assignments of expert e are token[offsets[e]:offsets[e+1]]
    gate       (A,) Tensor  the weight; its gradient reaches the router
    logits     (N, E) Tensor  the router's scores
    probs      (N, E) Tensor  usually their softmax, in rows of sum 1; for the losses and metrics
    n_dropped  int          assignments that a capacity limit removed
    soft_load  (E,) Tensor  a router's smooth estimate of its load, or None
    demand     (E,) int     the load that the router asked for, before any capacity limit; None: the load

    Raises ValueError for wrong types, sizes that do not fit, and assignments unsorted or repeated (routing_checks.py).
    """

    token: np.ndarray
    offsets: np.ndarray
    gate: Tensor
    logits: Tensor
    probs: Tensor
    n_dropped: int = 0
    soft_load: Tensor | None = None
    demand: np.ndarray | None = None

    def __post_init__(self):
        check_routing(self)
        if self.demand is None:
            object.__setattr__(self, "demand", self.load)

    @property
    def n_tokens(self) -> int:
        return self.probs.shape[0]

    @property
    def n_experts(self) -> int:
        return self.probs.shape[1]

    @property
    def load(self) -> np.ndarray:
        """(E,) int: tokens of each expert, the column counts of the gate matrix."""
        return np.diff(self.offsets)

    @property
    def coverage(self) -> np.ndarray:
        """(N,) int: how many experts each token has, the row counts. metrics.token_coverage is the share above 0."""
        return np.bincount(self.token, minlength=self.n_tokens)

    @property
    def expert(self) -> np.ndarray:
        """(A,) int: the expert of each assignment."""
        return np.repeat(np.arange(self.n_experts), self.load)

    def mask(self) -> np.ndarray:
        """(N, E) bool: where the gate matrix has an assignment."""
        return _scatter(np.ones(len(self.token), bool), (self.token, self.expert), self.probs.shape)

    def to_dense(self) -> Tensor:
        """The gate matrix (N, E) as a Tensor, zero where nothing is assigned."""
        place = (self.token, self.expert)
        return primitive(_scatter(self.gate.data, place, self.probs.shape), (self.gate, lambda g: g[place]))


def _scatter(values, place, shape):
    """A matrix with values at some places, and zeros elsewhere."""
    matrix = np.zeros(shape, values.dtype)
    matrix[place] = values
    return matrix


def largest(scores: np.ndarray, k: int, axis: int = -1) -> np.ndarray:
    """Boolean mask of the k largest scores along an axis. Ties go to the lowest index; NaN counts as the smallest.

    Raises ValueError if k is below 0, or the axis has fewer than k entries.
    """
    if not 0 <= k <= scores.shape[axis]:
        raise ValueError(f"k {k} must be from 0 to {scores.shape[axis]}, the number of entries along this axis")
    if k == 0:
        return np.zeros(scores.shape, bool)
    scores = np.where(np.isnan(scores), -np.inf, scores)
    kth = np.take(np.partition(scores, -k, axis), [-k], axis)
    chosen = scores >= kth
    if np.count_nonzero(chosen) == k * kth.size:  # no ties at the k-th score, the usual case
        return chosen
    above, ties = scores > kth, scores == kth
    room = k - above.sum(axis, keepdims=True)
    return above | ties & (ties.cumsum(axis) <= room)


def shares(values: Tensor, chosen: np.ndarray) -> Tensor:
    """(N, E): values where chosen (N, E) bool, each divided by its row's sum; 0 elsewhere, and in rows of sum 0."""
    kept = values.data * chosen
    total = np.einsum("ne->n", kept)[:, None]  # faster than .sum
    total += total == 0
    share = kept / total
    return primitive(share, (values, lambda g: (g - np.einsum("ne,ne->n", g, share)[:, None]) / total * chosen))


def from_mask(chosen: np.ndarray, gates: Tensor, logits: Tensor, probs: Tensor, **fields) -> Routing:
    """A Routing from assignments `chosen` (N, E) bool. gates (N, E) Tensor: read where chosen. fields: of Routing.

    Raises ValueError unless gates, logits and probs are Tensors of the shape of chosen.
    """
    check_mask(chosen, gates, logits, probs)
    n_tokens, n_experts = chosen.shape
    expert, token = np.divmod(np.flatnonzero(np.ascontiguousarray(chosen.T)), n_tokens)  # nonzero, but faster
    offsets = np.concatenate([[0], np.cumsum(np.bincount(expert, minlength=n_experts))])
    gate = primitive(gates.data[token, expert], (gates, lambda g: _scatter(g, (token, expert), gates.shape)))
    return Routing(token, offsets, gate, logits, probs, **fields)


def merge(routings: list[Routing]) -> Routing:
    """One Routing of the tokens of several, in order, outside any graph: for metrics of a whole validation set."""
    parts = zip(*((r.mask(), r.to_dense().data, r.logits.data, r.probs.data) for r in routings))
    chosen, gates, logits, probs = map(np.concatenate, parts)
    return from_mask(chosen, Tensor(gates), Tensor(logits), Tensor(probs), demand=sum(r.demand for r in routings),
                     n_dropped=sum(r.n_dropped for r in routings))


def first_experts(routing: Routing, n: int) -> Routing:
    """The Routing to the first n experts alone."""
    end = routing.offsets[n]
    return Routing(routing.token[:end], routing.offsets[:n + 1], routing.gate[:end], routing.logits[:, :n],
                   routing.probs[:, :n])


def capacity(n_tokens: int, n_experts: int, per_token: float, factor: float = 1.0) -> int:
    """Assignments that one expert may hold: ceil(factor * N * K / E), at least 1 and at most N. K = per_token.

    Raises ValueError unless factor and K are above 0, E is at least 1 and N at least 0.
    """
    check_limit(n_tokens, n_experts, per_token, factor)
    exact = min(n_tokens, factor * n_tokens * per_token / n_experts)
    return min(n_tokens, max(1, math.ceil(exact * (1 - 1e-12))))  # 1.1 * 10 is 11.000000000000002, but means 11


def limit_capacity(routing: Routing, factor: float, top_k: float, policy: str = "order") -> Routing:
    """Drop the assignments of each expert beyond its `capacity`; a dropped assignment adds nothing to its token.

    policy "order" keeps first choices before second choices, and earlier tokens before later ones
    (GShard, Lepikhin et al. 2020, algorithm 1); "gate" keeps the largest gates. Ties go to the earlier token; where
    the gates of a token are equal, its first choice is the expert of the lower number.
    Raises ValueError for another policy, and where `capacity` does.
    """
    if policy not in DROP_POLICIES:
        raise ValueError(f"unknown drop policy {policy!r}: choose one of {', '.join(DROP_POLICIES)}")
    limit = capacity(routing.n_tokens, routing.n_experts, top_k, factor)
    urgency = _choice_rank(routing) if policy == "order" else -routing.gate.data
    # sorted by expert, then urgency, then token: a stable sort keeps the token order within ties
    order = np.lexsort((urgency, routing.expert))
    kept = np.sort(order[_index_within(routing.load) < limit])
    offsets = np.concatenate([[0], np.cumsum(np.minimum(routing.load, limit))])
    return dataclasses.replace(routing, token=routing.token[kept], gate=routing.gate[kept], offsets=offsets,
                               n_dropped=routing.n_dropped + len(order) - len(kept), demand=routing.demand)


def _choice_rank(routing):
    """(A,) int: 0 for a token's first choice (largest gate), 1 for its second, ..."""
    order = np.lexsort((-routing.gate.data, routing.token))
    rank = np.empty(len(order), int)
    rank[order] = _index_within(routing.coverage)
    return rank


def _index_within(lengths):
    """0, 1, ... within each of several runs of these lengths, one after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
