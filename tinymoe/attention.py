"""Causal multi-head self-attention (Vaswani et al. 2017)."""

import numpy as np

from . import functional as F
from .nn import INIT_STD, Linear, Module


class CausalSelfAttention(Module):
    """x (B, T, D) -> (B, T, D); position t sees positions 0..t.

    Raises ValueError where n_heads does not divide d_model.
    """

    def __init__(self, d_model, n_heads, rng, out_std=INIT_STD, dtype=np.float32):
        if d_model % n_heads:
            raise ValueError(f"d_model {d_model} is not divisible by n_heads {n_heads}: change one of them")
        self.n_heads = n_heads
        self.query = Linear(d_model, d_model, rng, dtype=dtype)
        self.key = Linear(d_model, d_model, rng, dtype=dtype)
        self.value = Linear(d_model, d_model, rng, dtype=dtype)
        self.out = Linear(d_model, d_model, rng, std=out_std, dtype=dtype)

    def forward(self, x):
        heads = (*x.shape[:2], self.n_heads, -1)  # (B, T, H, D / H)
        q, k, v = self.query(x).reshape(heads), self.key(x).reshape(heads), self.value(x).reshape(heads)
        return self.out(F.causal_attention(q, k, v).reshape(x.shape))
