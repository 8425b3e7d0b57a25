"""Causal self-attention: multi-head, grouped-query, and multi-head latent."""

import numpy as np

from ..autograd import functional as F
from .nn import INIT_STD, Linear, Module, RMSNorm


class CausalSelfAttention(Module):
    """x (B, T, D) -> (B, T, D); position t sees positions 0..t (Vaswani et al. 2017).

    n_kv_heads: groups of heads share keys and values (Ainslie et al. 2023); None for a pair for each head.
    head_dim: None for d_model / n_heads. rotary: turn queries and keys by their position, with the base rope_theta.
    qk_norm: RMS-normalise all queries, and all keys, of a token first (OLMoE, Muennighoff et al. 2024).
    Raises ValueError where n_heads does not divide d_model, or n_kv_heads does not divide n_heads.
    """

    def __init__(self, d_model, n_heads, rng, out_std=INIT_STD, dtype=np.float32, n_kv_heads=None, head_dim=None,
                 bias=True, rotary=False, qk_norm=False, rope_theta=10_000.0, norm_eps=1e-5):
        if head_dim is None and d_model % n_heads:
            raise ValueError(f"d_model {d_model} is not divisible by n_heads {n_heads}: change one of them")
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads or n_heads
        if n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {n_heads} is not divisible by n_kv_heads {n_kv_heads}: change one of them")
        self.head_dim, self.rotary, self.rope_theta = head_dim or d_model // n_heads, rotary, rope_theta
        q_width, kv_width = n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.query = Linear(d_model, q_width, rng, bias, dtype=dtype)
        self.key = Linear(d_model, kv_width, rng, bias, dtype=dtype)
        self.value = Linear(d_model, kv_width, rng, bias, dtype=dtype)
        self.out = Linear(q_width, d_model, rng, bias, std=out_std, dtype=dtype)
        self.query_norm = RMSNorm(q_width, dtype, norm_eps) if qk_norm else None
        self.key_norm = RMSNorm(kv_width, dtype, norm_eps) if qk_norm else None

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (z.reshape(*x.shape[:2], -1, self.head_dim) for z in (q, k, v))  # (B, T, heads, d)
        if self.rotary:
            q, k = F.rotary(q, self.rope_theta), F.rotary(k, self.rope_theta)
        return self.out(F.causal_attention(q, k, v).reshape(*x.shape[:2], -1))


class LatentAttention(Module):
    """Multi-head latent attention, x (B, T, D) -> (B, T, D) (DeepSeek-V2, DeepSeek-AI 2024, eq. 37 to 47).

    Keys and values of all heads come out of one latent of kv_rank numbers a token, which is all that a cache
    would hold besides one rotary key that all heads share. Queries come out of a latent of q_rank numbers, or
    out of x where q_rank is 0.
    A head has head_dim numbers without position, rope_dim with, and v_dim of values.
    """

    def __init__(self, d_model, n_heads, rng, out_std=INIT_STD, dtype=np.float32, head_dim=None, q_rank=0, kv_rank=64,
                 rope_dim=16, v_dim=None, rope_theta=10_000.0, norm_eps=1e-5):
        head_dim = head_dim or d_model // n_heads
        v_dim = v_dim or head_dim
        self.n_heads, self.head_dim, self.rope_dim, self.kv_rank = n_heads, head_dim, rope_dim, kv_rank
        self.rope_theta = rope_theta

        def linear(n_in, n_out, std=INIT_STD):
            return Linear(n_in, n_out, rng, bias=False, std=std, dtype=dtype)

        self.query_down = linear(d_model, q_rank) if q_rank else None
        self.query_norm = RMSNorm(q_rank, dtype, norm_eps) if q_rank else None
        self.query = linear(q_rank or d_model, n_heads * (head_dim + rope_dim))
        self.latent = linear(d_model, kv_rank + rope_dim)
        self.latent_norm = RMSNorm(kv_rank, dtype, norm_eps)
        self.key_value = linear(kv_rank, n_heads * (head_dim + v_dim))
        self.out = linear(n_heads * v_dim, d_model, out_std)

    def forward(self, x):
        heads = (*x.shape[:2], self.n_heads, -1)  # (B, T, H, ...)
        q = self.query(x if self.query_down is None else self.query_norm(self.query_down(x))).reshape(heads)
        latent = self.latent(x)
        kv = self.key_value(self.latent_norm(latent[..., :self.kv_rank])).reshape(heads)
        shared = F.rotary(latent[..., None, self.kv_rank:], self.rope_theta)  # (B, T, 1, rope_dim)
        d = self.head_dim
        q = F.concatenate([q[..., :d], F.rotary(q[..., d:], self.rope_theta)], axis=3)
        k = F.concatenate([kv[..., :d], F.concatenate([shared] * self.n_heads, axis=2)], axis=3)
        return self.out(F.causal_attention(q, k, kv[..., d:]).reshape(*x.shape[:2], -1))
