"""Multi-head latent attention."""

import numpy as np
from numpy.typing import DTypeLike

from ..autograd import functional as F
from ..autograd.tensor import Tensor
from .attention_checks import check_heads
from .nn import INIT_STD, Linear, Module, RMSNorm


class LatentAttention(Module):
    """Multi-head latent attention, x (B, T, D) -> (B, T, D) (DeepSeek-V2, DeepSeek-AI 2024, eq. 37 to 47).

    One latent of kv_rank numbers a token gives the keys and values of all heads. A cache would hold this latent and
    one rotary key, which all heads share, and nothing else. Latents are RMS-normalised, as section 3.1.2 says in words.
    q_rank: queries come from a latent of q_rank numbers; 0: from x itself. head_dim: entries of a head without
    position (None: d_model / n_heads). rope_dim: its entries with rotary position. v_dim: its values (None: head_dim).
    Raises ValueError without head_dim if n_heads does not divide d_model.
    """

    def __init__(self, d_model: int, n_heads: int, rng: np.random.Generator | int, *, out_std: float = INIT_STD,
                 dtype: DTypeLike = np.float32, head_dim: int | None = None, q_rank: int = 0, kv_rank: int = 64,
                 rope_dim: int = 16, v_dim: int | None = None, rope_theta: float = 10_000.0, norm_eps: float = 1e-5):
        check_heads(d_model, n_heads, head_dim)
        self.n_heads, self.head_dim, self.rope_dim = n_heads, head_dim or d_model // n_heads, rope_dim
        self.kv_rank, self.rope_theta, self.v_dim = kv_rank, rope_theta, v_dim or self.head_dim

        rng = np.random.default_rng(rng)

        def linear(n_in, n_out, std=INIT_STD):
            return Linear(n_in, n_out, rng, bias=False, std=std, dtype=dtype)

        self.query_down = linear(d_model, q_rank) if q_rank else None
        self.query_norm = RMSNorm(q_rank, dtype, norm_eps) if q_rank else None
        self.query = linear(q_rank or d_model, n_heads * (self.head_dim + rope_dim))
        self.latent = linear(d_model, kv_rank + rope_dim)
        self.latent_norm = RMSNorm(kv_rank, dtype, norm_eps)
        self.key_value = linear(kv_rank, n_heads * (self.head_dim + self.v_dim))
        self.out = linear(n_heads * self.v_dim, d_model, out_std)

    def forward(self, x: Tensor) -> Tensor:
        (B, T, _), H, d = x.shape, self.n_heads, self.head_dim
        q = x if self.query_down is None else self.query_norm(self.query_down(x))
        q = self.query(q).reshape(B, T, H, d + self.rope_dim)
        latent = self.latent(x)  # (B, T, kv_rank + rope_dim)
        kv = self.key_value(self.latent_norm(latent[..., :self.kv_rank])).reshape(B, T, H, d + self.v_dim)
        rotated = F.rotary(latent[..., None, self.kv_rank:], self.rope_theta)  # (B, T, 1, rope_dim)
        q = F.concatenate([q[..., :d], F.rotary(q[..., d:], self.rope_theta)], axis=3)
        k = F.concatenate([kv[..., :d], F.concatenate([rotated] * H, axis=2)], axis=3)
        return self.out(F.causal_attention(q, k, kv[..., d:]).reshape(B, T, H * self.v_dim))
