"""Each expert chooses its tokens."""

from typing import Literal

import numpy as np

from ...autograd import functional as F
from ...autograd.tensor import Tensor, primitive
from ..routing import capacity, from_mask, largest
from .base import LinearRouter


class ExpertChoice(LinearRouter, name="expert_choice"):
    """Each expert takes the C = N * K / E tokens of largest probability (Zhou et al. 2022, eq. 1 to 3).

    K is the mean number of experts of a token (the paper's c) and may be a fraction; a token may have none. Gates are
    the softmax over experts, not renormalised. The load is equal by construction, but a token's route depends on later
    tokens and on its neighbours in the batch. With context.causal an expert takes a token if it is among the best
    ceil(n * K / E) of the n tokens of its own sequence so far.

    softmax_over: "experts", as in the paper, or "tokens". With "tokens" an expert ranks tokens by its logit, and its
        gates are the softmax over all tokens of the batch (with context.causal, over the sequence so far), times their
        number, so that the mean gate is 1 for any number of tokens.
    Raises ValueError for context.causal without ids.
    """

    paper = "Zhou 2022"
    chooses = "expert"
    balanced = "yes"
    causal = causal_training = False
    mean_k = True
    softmax_over: Literal["experts", "tokens"] = "experts"

    def forward(self, x, context):
        logits = self.scores(x)
        probs, over_tokens = F.softmax(logits), self.softmax_over == "tokens"
        gates = self._softmax_over_tokens(logits, context) if over_tokens else probs
        scores = logits.data if over_tokens else probs.data
        if context.causal:
            chosen = self._prefix_choice(scores, context)
        else:
            chosen = largest(scores, capacity(*scores.shape, self.top_k), axis=0)
        return from_mask(chosen, gates, logits, probs)

    def _softmax_over_tokens(self, logits, context):
        if not context.causal:
            return F.softmax(logits, axis=0) * len(logits)
        length = context.need("ids", self).shape[1]
        sequences = logits.reshape(-1, length, logits.shape[1])  # (B, T, E)
        return prefix_softmax(sequences).reshape(logits.shape)

    def _prefix_choice(self, p, context):
        length, n_experts = context.need("ids", self).shape[1], p.shape[1]
        room = np.array([capacity(t + 1, n_experts, self.top_k) for t in range(length)])
        chosen = np.empty((len(p) // length, length, n_experts), bool)
        for sequence, scores in zip(chosen, p.reshape(chosen.shape)):
            for t in range(length):  # an earlier token wins a tie, as in the batch form
                sequence[t] = (scores[:t] >= scores[t]).sum(axis=0) < room[t]
        return chosen.reshape(-1, n_experts)


def prefix_softmax(x: Tensor) -> Tensor:
    """out[:, t] = exp(x[:, t]) / (mean of exp(x[:, s]) over s <= t), for x (B, T, E); no later entry takes part."""
    T, total = x.shape[1], np.logaddexp.accumulate(x.data, axis=1)
    value = np.arange(1, T + 1, dtype=x.dtype)[:, None] * np.exp(x.data - total)

    def vjp(g):
        h, past = g * value, np.tri(T, dtype=bool)[:, :, None]
        share = np.exp(np.where(past, x.data[:, None] - total[:, :, None], -np.inf))  # (B, t, s, E)
        return h - (share * h[:, :, None]).sum(axis=1)

    return primitive(value, (x, vjp))
