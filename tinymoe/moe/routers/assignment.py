"""Tokens and experts are matched so that every expert gets its share, exactly or by Sinkhorn's iteration."""

import numpy as np
from scipy.optimize import linear_sum_assignment

from ...autograd import functional as F
from ..routing import capacity, from_mask, largest
from .base import LinearRouter


class Sinkhorn(LinearRouter, name="sinkhorn"):
    """While training, a token takes the K largest entries of a balanced plan; at evaluation top-K (Clark et al. 2022).

    The plan is exp(logits) with rows and columns scaled to sums 1 and N / E in turn. The gate is sigmoid(logit) for
    K = 1 and softmax(logits) otherwise, not renormalised. The plan has no gradient.

    sinkhorn_iterations: how often rows and columns are scaled.
    """

    paper = "Clark 2022"
    formula = "the K largest entries of exp(x W), scaled to balance, while training; else of x W"
    used_by = "BlackMamba; studies: Clark 2022"
    balanced = "nearly, while training"
    causal_training = False
    cost = "2 N D E + 2 N E an iteration"
    sinkhorn_iterations: int = 20

    def forward(self, x, context):
        logits = self.scores(x)
        balanced = context.training and not context.causal
        scores = sinkhorn_plan(logits.data, self.sinkhorn_iterations) if balanced else logits.data
        probs = F.softmax(logits)
        gates = F.sigmoid(logits) if self.top_k == 1 else probs
        return from_mask(largest(scores, self.top_k), gates, logits, probs)


class BaseAssignment(LinearRouter, name="base_assignment"):
    """While training, the balanced assignment of largest total score (BASE layers, Lewis et al. 2021).

    At evaluation each token takes its best expert. The gate is sigmoid(score), K = 1. The exact solver takes about N^3
    operations.
    """

    paper = "Lewis 2021"
    formula = "the balanced assignment of largest total x W while training, else the best expert; gate sigmoid(x W)"
    used_by = "BASE layers (Lewis 2021)"
    chooses = "neither"
    balanced = "while training"
    causal_training = False
    top_1_only = True
    cost = "2 N D E + an assignment, about N^3"

    def forward(self, x, context):
        logits = self.scores(x)
        balanced = context.training and not context.causal
        chosen = balanced_assignment(logits.data) if balanced else largest(logits.data, 1)
        return from_mask(chosen, F.sigmoid(logits), logits, F.softmax(logits))


def sinkhorn_plan(scores: np.ndarray, iterations: int = 20) -> np.ndarray:
    """(N, E) float64: exp(scores) with its rows scaled to sum 1 and its columns to sum N / E, in turn; columns last.

    From Sinkhorn 1967. Each row's largest score is subtracted first.
    """
    scores = scores.astype(float)
    plan = np.exp(scores - scores.max(axis=1, keepdims=True))
    n, n_experts = plan.shape
    for _ in range(iterations):
        plan /= plan.sum(axis=1, keepdims=True)
        total = plan.sum(axis=0, keepdims=True)
        plan *= np.divide(n / n_experts, total, out=np.zeros_like(total), where=total > 1e-300)
    return plan


def balanced_assignment(scores: np.ndarray) -> np.ndarray:
    """(N, E) bool: one expert a token, at most ceil(N / E) tokens an expert, of the largest total score."""
    n, n_experts = scores.shape
    room = capacity(n, n_experts, 1)
    finite = np.nan_to_num(scores, nan=0.0, posinf=1e30, neginf=-1e30)  # training stops at a loss that is not finite
    _, place = linear_sum_assignment(np.repeat(finite, room, axis=1), maximize=True)
    return np.eye(n_experts, dtype=bool)[place // room]


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
