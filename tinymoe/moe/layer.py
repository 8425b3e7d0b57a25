"""The mixture-of-experts layer: route, apply the capacity limit, run the experts, add the shared expert."""

from collections.abc import Callable

import numpy as np

from ..autograd import functional as F
from ..autograd.tensor import Tensor
from ..layers.nn import INIT_STD, FeedForward, Linear, Module
from . import routers
from .experts import ExpertBank
from .losses import running_share
from .routers import RouteContext
from .routing import Routing, first_experts, limit_capacity


class MoELayer(Module):
    """x (B, T, D) -> (y (B, T, D), Routing).

    config: a ModelConfig. router: the name of this layer's router, by default the first of config.
    rng: a seed or Generator for the initial weights. out_std: the standard deviation of those of the output layers.
    Its attribute change_routing: a function (Routing, x (N, D)) -> Routing applied before the experts run, or None.
    """

    def __init__(self, config, router: str | None = None, rng: int | np.random.Generator = 0,
                 out_std: float = INIT_STD, dtype=np.float32):
        rng, router = np.random.default_rng(rng), router or config.routers[0]
        self.router = routers.make(router, config.d_model, config.n_columns, top_k=config.top_k, seed=rng, dtype=dtype,
                                   **config.options_of(router))
        self.experts = ExpertBank(config.n_experts, config.d_model, config.expert_width, activation=config.activation,
                                  backend=config.expert_backend, seed=rng, dtype=dtype, out_std=out_std,
                                  bias=config.bias)
        # n_shared experts side by side are one wider layer, always on (Dai et al. 2024, eq. 9)
        self.shared = self.shared_gate = None
        if config.n_shared:
            self.shared = FeedForward(config.d_model, config.shared_width, rng, bias=config.bias,
                                      activation=config.activation, out_std=out_std, dtype=dtype)
        if config.shared_gate:  # their sum times sigmoid(x w), w (D, 1) (Qwen2, Yang et al. 2024)
            self.shared_gate = Linear(config.d_model, 1, rng, bias=False, dtype=dtype)
        self.capacity_factor, self.drop_policy, self.top_k = config.capacity_factor, config.drop_policy, config.top_k
        self.n_copy = config.n_copy
        self.balance_batches, self.recent_share = config.balance_batches, None
        if config.losses.get("global_batch"):
            self.recent_share = Tensor(np.zeros(config.n_columns, dtype))  # no gradient, but saved with the model
        self.change_routing: Callable[[Routing, Tensor], Routing] | None = None

    @property
    def causal(self) -> bool:
        """Whether a token's route depends on its prefix alone, outside training, even where context.causal is False."""
        return self.router.causal and self.capacity_factor is None

    def forward(self, x: Tensor, context: RouteContext | None = None) -> tuple[Tensor, Routing]:
        """x (B, T, D) or (N, D) -> (y of its shape, the Routing of its N = B * T tokens after any capacity limit)."""
        context = RouteContext() if context is None else context
        rows = x.reshape(-1, x.shape[-1])  # (N, D)
        routing = self.router(rows, context)
        if self.capacity_factor is not None and not context.causal:  # it depends on the whole batch
            routing = limit_capacity(routing, self.capacity_factor, self.top_k, self.drop_policy)
        if self.change_routing is not None:
            routing = self.change_routing(routing, rows)
        y = self.weighted_sum(rows, routing).reshape(x.shape)
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if self.shared_gate is None else F.sigmoid(self.shared_gate(x)) * shared)
        return y, routing

    def weighted_sum(self, x: Tensor, routing: Routing) -> Tensor:
        """The experts' output (N, D) for x (N, D). The last columns are copy experts (output x), then zero experts (0).

        The router's gates count zero experts in their sum. MoE++'s code leaves them out (Jin et al. 2024, 2410.07348).
        """
        n = self.experts.n_experts
        if routing.n_experts == n:
            return self.experts(x, routing)
        start, end = routing.offsets[[n, n + self.n_copy]]
        copied = F.scatter_add(routing.gate[start:end], routing.token[start:end], len(x))  # (N,)
        return self.experts(x, first_experts(routing, n)) + copied.reshape(-1, 1) * x

    def after_step(self, routing: Routing) -> None:
        """Update what changes outside the gradient, after each training step with the step's Routing."""
        self.router.after_step(routing)
        if (recent := self.recent_share) is not None:
            recent.data = running_share(routing, recent.data, self.balance_batches).astype(recent.dtype)
