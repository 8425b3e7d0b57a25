"""One block of the transformer: attention, then experts or a dense layer, each with a norm before and x added after."""

import numpy as np

from ..autograd.tensor import Tensor
from ..layers.attention import CausalSelfAttention
from ..layers.latent_attention import LatentAttention
from ..layers.nn import INIT_STD, NORMS, FeedForward, Module
from ..layers.windowed_attention import WindowedAttention
from ..moe.layer import MoELayer
from ..moe.routers import RouteContext
from ..moe.routing import Routing
from .config import ModelConfig


class Block(Module):
    """Attention, then experts behind the named router (None: a dense layer). x = x + layer(norm(x)) for both."""

    def __init__(self, config: ModelConfig, router: str | None, rng: np.random.Generator, dtype, window: int = 0):
        out_std = INIT_STD / np.sqrt(2 * config.n_layers)  # 2L branches add up (GPT-2, Radford et al. 2019)
        self.is_moe = router is not None
        self.norm1, self.norm2 = make_norm(config, dtype), make_norm(config, dtype)
        self.attention = make_attention(config, rng, out_std, dtype, window)
        self.feed_forward = (MoELayer(config, router, rng, out_std, dtype) if self.is_moe else FeedForward(
            config.d_model, config.d_ff, rng, activation=config.activation, out_std=out_std, dtype=dtype,
            bias=config.bias))
        self.post1, self.post2 = (make_norm(config, dtype) if config.post_norm else unchanged for _ in range(2))

    def forward(self, x: Tensor, context: RouteContext) -> tuple[Tensor, Routing | None]:
        """(B, T, D) -> ((B, T, D), Routing, or None from a dense layer)."""
        x = x + self.post1(self.attention(self.norm1(x)))
        z = self.norm2(x)
        y, routing = self.feed_forward(z, context) if self.is_moe else (self.feed_forward(z), None)
        return x + self.post2(y), routing


def make_attention(config: ModelConfig, rng: np.random.Generator, out_std: float, dtype, window: int = 0) -> Module:
    """The attention layer that a config describes, with this window."""
    c = config
    common = dict(out_std=out_std, dtype=dtype, head_dim=c.head_dim, rope_theta=c.rope_theta)
    if c.attention == "latent":
        return LatentAttention(c.d_model, c.n_heads, rng, **common, q_rank=c.q_rank, kv_rank=c.kv_rank,
                               rope_dim=c.rope_dim, v_dim=c.v_dim, norm_eps=c.latent_eps or c.norm_eps)
    common |= dict(n_kv_heads=c.n_kv_heads, biases=c.attention_biases, rotary=c.positions == "rotary",
                   qk_norm=c.qk_norm, norm_eps=c.norm_eps)
    if window or c.sinks or c.yarn:
        return WindowedAttention(c.d_model, c.n_heads, rng, **common, window=window, sinks=c.sinks, yarn=c.yarn)
    return CausalSelfAttention(c.d_model, c.n_heads, rng, **common)


def make_norm(config: ModelConfig, dtype) -> Module:
    """The norm over the width D that a config describes."""
    return NORMS[config.norm](config.d_model, dtype, config.norm_eps)


def unchanged(x: Tensor) -> Tensor:
    """x, in place of a norm that a config leaves out."""
    return x
