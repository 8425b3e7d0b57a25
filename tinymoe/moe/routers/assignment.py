"""Tokens and experts are matched so that every expert gets its share, exactly or by Sinkhorn's iteration."""

import numpy as np
from scipy.special import logsumexp

from ...autograd import functional as F
from ..routing import capacity, from_mask, largest
from .base import LinearRouter

PRICE_ROUNDS = 3  # fewer leave more tokens to move, more take longer than that saves


class Sinkhorn(LinearRouter, name="sinkhorn"):
    """While training, a token takes the K largest entries of a balanced plan; at evaluation top-K (Clark et al. 2022).

    The plan is exp(logits) with rows and columns scaled to sums 1 and N / E in turn. The gate is sigmoid(logit) for
    K = 1 and softmax(logits) otherwise, not renormalised, as in Megatron-LM. The plan has no gradient.

    sinkhorn_iterations: how often rows and columns are scaled.
    """

    paper = "Clark 2022"
    formula = ("the K largest entries of exp(x W), scaled to balance, while training; else of x W; "
               "gates sigmoid(x W) for K = 1, else softmax(x W)")
    used_by = "BlackMamba; studies: Clark 2022"
    balanced = "nearly, while training"
    causal_training = False
    cost = "2 N D E + 4 N E an iteration"
    sinkhorn_iterations: int = 20

    def forward(self, x, context):
        logits = self.scores(x)
        balanced = context.training and not context.causal
        scores, probs = logits.data, F.softmax(logits)
        if balanced:  # the logarithm of the plan but for the factor of the row, which changes no order
            scores = scores + sinkhorn_factors(scores, self.sinkhorn_iterations)[1]
        gates = F.sigmoid(logits) if self.top_k == 1 else probs
        return from_mask(largest(scores, self.top_k), gates, logits, probs)


class BaseAssignment(LinearRouter, name="base_assignment"):
    """While training, the balanced assignment of largest total score (BASE layers, Lewis et al. 2021).

    At evaluation each token takes its best expert. The gate is sigmoid(score), K = 1. The assignment is exact; its
    time grows as N E^2, and as N^2 at worst.
    """

    paper = "Lewis 2021"
    formula = "the balanced assignment of largest total x W while training, else the best expert; gate sigmoid(x W)"
    used_by = "BASE layers (Lewis 2021)"
    chooses = "neither"
    balanced = "while training"
    causal_training = False
    top_1_only = True
    cost = "2 N D E + an assignment, about N E^2"

    def forward(self, x, context):
        logits = self.scores(x)
        balanced = context.training and not context.causal
        chosen = balanced_assignment(logits.data) if balanced else largest(logits.data, 1)
        return from_mask(chosen, F.sigmoid(logits), logits, F.softmax(logits))


def sinkhorn_plan(scores: np.ndarray, iterations: int = 20) -> np.ndarray:
    """(N, E) float64: exp(scores) with its rows scaled to sum 1 and its columns to sum N / E, in turn; columns last.

    From Sinkhorn 1967. An entry that is too small for a float is 0.
    """
    rows, columns = sinkhorn_factors(scores, iterations)
    return np.exp(rows[:, None] + scores + columns)


def sinkhorn_factors(scores: np.ndarray, iterations: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """(N,) and (E,) float64: logarithms of the factors of rows and columns in `sinkhorn_plan`."""
    (n, n_experts), top = scores.shape, scores.max(axis=1).astype(float)
    z, iterations = scores - top[:, None], iterations if n else 0
    if z.min(initial=0) > -300:  # no factor leaves the range of float64; products are ten times faster than logarithms
        start, rows, columns = np.exp(z), np.ones(n), np.ones(n_experts)
        for _ in range(iterations):
            rows = 1 / np.einsum("ne,e->n", start, columns)
            columns = n / n_experts / np.einsum("ne,n->e", start, rows)
        return np.log(rows) - top, np.log(columns)
    rows, columns = np.zeros(n), np.zeros(n_experts)
    for _ in range(iterations):
        rows = -logsumexp(z + columns, axis=1)
        columns = np.log(n / n_experts) - logsumexp(z + rows[:, None], axis=0)
    return rows - top, columns


def balanced_assignment(scores: np.ndarray) -> np.ndarray:
    """(N, E) bool: one expert a token, at most ceil(N / E) tokens an expert, of the largest total score.

    With a price for each expert, as in the auction of BASE layers, each token takes its best score - price: no other
    choice with these loads scores more. Prices are first set one by one, to sell each expert out. Then shortest paths
    move what is left from the too popular experts to the others (Ahuja et al. 1993, section 9.7), which is exact.
    """
    n, n_experts = scores.shape
    room = max(1, capacity(n, n_experts, 1))
    gain, price = np.zeros((room * n_experts, n_experts)), np.zeros(n_experts)  # places for all; rows beyond n are 0
    gain[:n] = np.nan_to_num(scores, nan=0.0, posinf=1e30, neginf=-1e30)  # training stops at a loss that is not finite
    for e in [*range(n_experts)] * (PRICE_ROUNDS if n_experts > 1 else 0):
        margin = gain[:, e] - (np.delete(gain, e, axis=1) - np.delete(price, e)).max(axis=1)
        price[e] = -np.partition(-margin, (room - 1, room))[[room - 1, room]].mean()  # `room` tokens want it at this
    owner = (gain - price).argmax(axis=1)
    while np.bincount(owner, minlength=n_experts).max() > room:
        price = _shift_tokens(gain, price, owner, room)
    return owner[:n, None] == np.arange(n_experts)


def _shift_tokens(gain, price, owner, room):
    """Move tokens along the cheapest path from an expert above `room` to one below; changes owner -> new prices

    The length of a step from i to j is the least loss of a token that i owns and j takes, after prices. Prices change
    by the distance from the nearest expert above `room`, so that no token prefers another expert afterwards.
    """
    load, net = np.bincount(owner, minlength=len(price)), gain - price
    loss = np.maximum(np.take_along_axis(net, owner[:, None], axis=1) - net, 0)
    step = np.stack([loss[owner == i].min(axis=0, initial=np.inf) for i in range(len(price))])
    distance, before, seen = np.where(load > room, 0, np.inf), {}, np.zeros(len(price), bool)
    while load[j := int(np.where(seen, np.inf, distance).argmin())] >= room:  # Dijkstra 1959
        seen[j] = True
        closer = ~seen & (distance[j] + step[j] < distance)
        distance[closer] = distance[j] + step[j, closer]
        before |= dict.fromkeys(np.flatnonzero(closer).tolist(), j)
    price, moves, count = price - np.minimum(distance, distance[j]), [], room - load[j]
    while j in before:
        i = before[j]
        moves.append((j, np.flatnonzero((owner == i) & (loss[:, j] == step[i, j]))))  # more than one where they tie
        j = i
    count = min(count, load[j] - room, *(len(tokens) for _, tokens in moves))
    for j, tokens in moves:
        owner[tokens[:count]] = j
    return price


def greedy_assignment(scores: np.ndarray) -> np.ndarray:
    """A balanced choice that takes the largest free score again and again; ties go to the earlier token."""
    n, n_experts = scores.shape
    chosen, room = np.zeros(scores.shape, bool), capacity(n, n_experts, 1)
    for place in np.argsort(-scores, axis=None, kind="stable"):
        token, expert = divmod(place, n_experts)
        chosen[token, expert] = not chosen[token].any() and chosen[:, expert].sum() < room
    return chosen


def shortfall(scores: np.ndarray, chosen: np.ndarray) -> float:
    """How far the mean score of a top-1 choice (N, E) falls short of the exact balanced assignment's.

    Negative where the choice scores higher. Only a less balanced choice can.
    """
    return float((scores * (balanced_assignment(scores).astype(int) - chosen)).sum() / len(scores))
