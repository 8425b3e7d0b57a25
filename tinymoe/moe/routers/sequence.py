"""One choice for a sequence instead of one for each token."""

import numpy as np

from ...autograd.tensor import primitive
from .top_k import TopK

POOLS, SCOPES = ("prefix", "mean"), ("layer", "global")


class Sequence(TopK, name="sequence"):
    """Top-K of a pooled state: all tokens of a sequence share their experts (Fan et al. 2024, arXiv 2402.13089).

    sequence_pool: "prefix" chooses at each token by the mean state of its prefix, and is causal; "mean" chooses once,
        by the mean state of the whole sequence, later tokens included.
    sequence_scope: "layer" chooses in each layer; "global" uses the first MoE layer's choice and gates in every
        layer, and the other routers are never called.
    Raises ValueError without RouteContext.ids, which say where sequences begin.
    """

    paper = "Fan 2024"
    chooses = "sequence"

    def __init__(self, *args, sequence_pool: str = "prefix", sequence_scope: str = "layer", **options):
        super().__init__(*args, **options)
        if sequence_pool not in POOLS or sequence_scope not in SCOPES:
            raise ValueError(f"sequence_pool {sequence_pool!r} must be one of {', '.join(POOLS)}, "
                             f"sequence_scope {sequence_scope!r} one of {', '.join(SCOPES)}")
        self.pool, self.scope = sequence_pool, sequence_scope
        self.causal = self.causal_training = sequence_pool == "prefix"

    def forward(self, x, context):
        if self.scope == "global" and "sequence" in context.shared:
            return context.shared["sequence"]
        if context.ids is None:
            raise ValueError("sequence routing needs RouteContext.ids to know where sequences begin")
        states = self._jittered(x, context).reshape(*context.ids.shape, -1)  # (B, T, D)
        if self.pool == "prefix" or context.causal:
            pooled = prefix_mean(states)
        else:
            pooled = broadcast(states.mean(axis=1, keepdims=True), states.shape)
        routing = self._choose(self.scores(pooled.reshape(x.shape)), context)
        if self.scope == "global":
            context.shared["sequence"] = routing
        return routing


def prefix_mean(x):
    """out[:, t] = the mean of x[:, :t + 1], for x (B, T, D)."""
    count = np.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]

    def vjp(g):
        return (g / count)[:, ::-1].cumsum(axis=1)[:, ::-1]

    return primitive((x.data.cumsum(axis=1) / count).astype(x.dtype), (x, vjp))


def broadcast(x, shape):
    """x repeated along its axes of size 1 to a shape with as many axes."""
    return primitive(np.ascontiguousarray(np.broadcast_to(x.data, shape)), (x, lambda g: g))
