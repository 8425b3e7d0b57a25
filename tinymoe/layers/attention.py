"""Causal self-attention: multi-head, and grouped-query."""

import numpy as np
from numpy.typing import DTypeLike

from ..autograd import functional as F
from ..autograd.tensor import Tensor
from .attention_checks import check_attention
from .nn import INIT_STD, Linear, Module, RMSNorm


class CausalSelfAttention(Module):
    """x (B, T, D) -> (B, T, D). Position t sees positions 0 to t (Vaswani et al. 2017).

    n_kv_heads: heads of keys and values (None: n_heads). Each serves n_heads / n_kv_heads query heads (grouped-query
        attention, Ainslie et al. 2023). head_dim: None for d_model / n_heads. out_std: standard deviation of
        the initial output weights.
    rotary: rotate queries and keys by their position; rope_theta is the base of the angles.
    qk_norm: first RMS-normalise the queries, and the keys, of a token: True, all heads as one vector (OLMoE,
        Muennighoff et al. 2024); "head", each head by itself, with one scale (Qwen3, Yang et al. 2025).
    biases: which linear layers have one: "all", "qkv" (all but the output), or "none".
    Raises ValueError for other words, and unless n_kv_heads divides n_heads and, without head_dim, n_heads d_model.
    """

    def __init__(self, d_model: int, n_heads: int, rng: np.random.Generator | int, *, out_std: float = INIT_STD,
                 dtype: DTypeLike = np.float32, n_kv_heads: int | None = None, head_dim: int | None = None,
                 biases: str = "all", rotary: bool = False, qk_norm: bool | str = False,
                 rope_theta: float = 10_000.0, norm_eps: float = 1e-5):
        n_kv_heads, rng = n_kv_heads or n_heads, np.random.default_rng(rng)
        check_attention(d_model, n_heads, head_dim, n_kv_heads, biases, qk_norm)
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.head_dim, self.rotary, self.rope_theta = head_dim or d_model // n_heads, rotary, rope_theta
        q_width, kv_width = n_heads * self.head_dim, n_kv_heads * self.head_dim
        self.query, self.key, self.value = (Linear(d_model, width, rng, biases != "none", dtype=dtype)
                                            for width in (q_width, kv_width, kv_width))
        self.out = Linear(q_width, d_model, rng, biases == "all", std=out_std, dtype=dtype)
        self.by_head = qk_norm == "head"
        widths = (self.head_dim, self.head_dim) if self.by_head else (q_width, kv_width)
        self.query_norm, self.key_norm = (RMSNorm(width, dtype, norm_eps) if qk_norm else None for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and not self.by_head:
            q, k = self.query_norm(q), self.key_norm(k)
        q = q.reshape(*x.shape[:2], self.n_heads, self.head_dim)
        k, v = (z.reshape(*x.shape[:2], self.n_kv_heads, self.head_dim) for z in (k, v))
        if self.by_head:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rotary:
            q, k = F.rotary(q, self.rope_theta), F.rotary(k, self.rope_theta)
        return self.out(self.attend(q, k, v).reshape(*x.shape[:2], self.n_heads * self.head_dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, T, H, d), k and v (B, T, G, d) -> (B, T, H, d)."""
        return F.causal_attention(q, k, v)
