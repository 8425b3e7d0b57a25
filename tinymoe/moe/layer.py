"""The mixture-of-experts layer: route, limit, run the experts, add those that are shared."""

from . import routers
from .experts import ExpertBank
from ..layers.nn import FeedForward, Module
from .routing import limit_capacity


class MoELayer(Module):
    """x (B, T, D) -> (y (B, T, D), Routing). `config` is a ModelConfig, `rng` draws the initial weights."""

    def __init__(self, config, rng, out_std, dtype):
        self.router = routers.make(config.router, config.d_model, config.n_experts, config.top_k, rng, dtype,
                                   **config.router_options())
        self.experts = ExpertBank(config.n_experts, config.d_model, config.expert_width, config.activation,
                                  config.expert_backend, rng, dtype, out_std, config.bias)
        # always on and ungated (DeepSeekMoE, Dai et al. 2024, eq. 9): side by side they are one wider layer
        self.shared = FeedForward(config.d_model, config.n_shared * config.expert_width, rng, config.activation,
                                  out_std, dtype, config.bias) if config.n_shared else None
        self.capacity_factor, self.drop_policy, self.top_k = config.capacity_factor, config.drop_policy, config.top_k

    @property
    def causal(self):
        """Whether the layer routes by the prefix alone even where nobody asks it to."""
        return self.router.causal and self.capacity_factor is None

    def forward(self, x, context):
        rows = x.reshape(-1, x.shape[-1])  # (N, D)
        routing = self.router(rows, context)
        if self.capacity_factor is not None and not context.causal:  # who is dropped depends on the whole batch
            routing = limit_capacity(routing, self.capacity_factor, self.top_k, self.drop_policy)
        y = self.experts(rows, routing).reshape(x.shape)
        return (y if self.shared is None else y + self.shared(x)), routing
