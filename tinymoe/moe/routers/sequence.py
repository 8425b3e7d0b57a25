"""One decision for a whole sequence instead of one for each token."""

import numpy as np

from ...autograd.tensor import primitive
from .token_choice import TopK

POOLS, SCOPES = ("prefix", "mean"), ("layer", "global")


class Sequence(TopK, name="sequence"):
    """Top-K of a pooled state: all tokens of a sequence share their experts (Fan et al. 2024, arXiv 2402.13089).

    sequence_pool: "mean" decides once, on the mean over the sequence, which later tokens take part in; "prefix" decides
        at each token on the mean over its prefix, and is causal.
    sequence_scope: "layer" decides in each layer; "global" takes the first layer's decision, gates and all, in
        every layer; the routers of the others are never used.
    Raises ValueError without RouteContext.ids, which say where sequences begin.
    """

    paper = "Fan 2024"
    chooses = "sequence"
    options = (*TopK.options, "sequence_pool", "sequence_scope")

    def __init__(self, *args, sequence_pool="prefix", sequence_scope="layer", **options):
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
        pooled = prefix_mean(states) if self.pool == "prefix" or context.causal else \
            states.mean(axis=1, keepdims=True) + 0 * states
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
