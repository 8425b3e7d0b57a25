"""Nobody learns to choose: by a table of the token's id, or by chance. Baselines for the learned routers."""

import numpy as np

from ..routing import from_mask, largest
from ...autograd.tensor import Tensor
from .base import Router


class Hash(Router, name="hash"):
    """A token's K experts are read from a random table of its id, wherever it stands (Roller et al. 2021).

    Gates are 1 / K. The load is as even as the ids are: a byte that makes up a sixth of the text overloads its
    experts. Logits are 0 at the chosen experts and -30 elsewhere, so that probs, their softmax, say what it does.
    vocab_size: ids run from 0 to vocab_size - 1. Raises ValueError without RouteContext.ids.
    """

    paper = "Roller 2021"
    chooses = "neither"
    learned = False
    cost = "a lookup"
    options = ("vocab_size",)

    def __init__(self, d_model, n_experts, top_k, rng, dtype, vocab_size=256):
        chosen = largest(rng.random((vocab_size, n_experts)), top_k)
        self.top_k = top_k
        self.table = Tensor(chosen.astype(dtype))  # (V, E), 1 at each id's experts; saved with the model

    def forward(self, x, context):
        if context.ids is None:
            raise ValueError("hash routes by token id: give RouteContext the ids")
        return constant(self.table.data[context.ids.reshape(-1)] > 0, x.dtype)


class Random(Router, name="random"):
    """A fresh uniform choice of K experts for each token, in each call, with gates 1 / K: the null of every comparison.

    It draws from the context's generator; without one, from a generator that starts alike in each call.
    """

    chooses = "neither"
    balanced = "on average"
    learned = False
    cost = "N E random numbers"

    def __init__(self, d_model, n_experts, top_k, rng, dtype):
        self.n_experts, self.top_k = n_experts, top_k

    def forward(self, x, context):
        rng = np.random.default_rng(0) if context.rng is None else context.rng
        return constant(largest(rng.random((len(x), self.n_experts)), self.top_k), x.dtype)


def constant(chosen, dtype):
    """The Routing of a choice (N, E) that no score stands behind: gates 1 / K, without gradient."""
    probs = Tensor((chosen / chosen.sum(axis=1, keepdims=True)).astype(dtype))
    logits = Tensor(np.where(chosen, 0, -30).astype(dtype))
    return from_mask(chosen, probs, logits, probs)
