"""A choice by a mean state, instead of by the token's own."""

from typing import Literal

import numpy as np

from ...autograd.tensor import primitive
from .top_k import TopK


class Sequence(TopK, name="sequence"):
    """Top-K of the mean state of each token's prefix, or of its whole sequence (Fan et al. 2024, arXiv 2402.13089).

    With "mean", the paper's form, all tokens of a sequence share their experts, unless second_expert is "random".
    "prefix" is our causal form of it, in which the experts may change from token to token.

    sequence_pool: "prefix" chooses at each token by the mean state of its prefix, and is causal; "mean" chooses once,
        by the mean state of the whole sequence, later tokens included.
    sequence_scope: "layer" chooses in each layer; "global" uses the first MoE layer's choice and gates in every
        layer; the weights of the other layers' routers are not used.
    Raises ValueError without RouteContext.ids, which say where sequences begin.
    """

    paper = "Fan 2024"
    formula = "as top_k, of the mean state of the prefix or of the whole sequence"
    used_by = "studies: Fan 2024"
    chooses = "sequence"
    sequence_pool: Literal["prefix", "mean"] = "prefix"
    sequence_scope: Literal["layer", "global"] = "layer"

    @classmethod
    def causal_with(cls, options):
        return (options.get("sequence_pool", cls.sequence_pool) == "prefix",) * 2

    def forward(self, x, context):
        first, routing = context.carried.get("sequence", (self, None))
        if self.sequence_scope == "global" and first is not self:  # else this is the first MoE layer
            return routing
        ids = context.need("ids", self)
        states = self._jittered(x, context).reshape(*ids.shape, x.shape[1])  # (B, T, D)
        if self.sequence_pool == "prefix" or context.causal:
            pooled = prefix_mean(states)
        else:
            pooled = states.mean(axis=1, keepdims=True)[:, np.zeros(ids.shape[1], int)]  # the same for all T
        routing = self._choose(self.scores(pooled.reshape(x.shape)), context)
        if self.sequence_scope == "global":
            context.carried["sequence"] = self, routing
        return routing


def prefix_mean(x):
    """out[:, t] = the mean of x[:, :t + 1], for x (B, T, D)."""
    count = np.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]

    def vjp(g):
        return (g / count)[:, ::-1].cumsum(axis=1)[:, ::-1]

    return primitive(x.data.cumsum(axis=1) / count, (x, vjp))
