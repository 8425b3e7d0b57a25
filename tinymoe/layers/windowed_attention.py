"""Attention within a window, with a sink, and with stretched rotary positions, as GPT-OSS has it."""

import math

import numpy as np
from numpy.typing import DTypeLike

from ..autograd import functional as F
from ..autograd.tensor import Tensor
from .attention import CausalSelfAttention
from .nn import zeros


class WindowedAttention(CausalSelfAttention):
    """x (B, T, D) -> (B, T, D): grouped-query attention whose parts are differentiated one by one, without a kernel.

    window: positions that a query sees, its own included; 0 for all before it (Mistral, Jiang et al. 2023).
    sinks: each head has a learned logit s, and p = exp(z) / (exp(s) + sum of exp(z)): its weights may sum to less than
        1 (GPT-OSS, OpenAI 2025). s starts at 0.
    yarn: None, or the keyword arguments of `stretched`. The others: as in CausalSelfAttention.
    """

    def __init__(self, d_model: int, n_heads: int, rng: np.random.Generator | int, *, window: int = 0,
                 sinks: bool = False, yarn: dict | None = None, dtype: DTypeLike = np.float32, **options):
        super().__init__(d_model, n_heads, rng, dtype=dtype, **options)
        self.window, self.scale, self.sinks = window, self.head_dim**-0.5, zeros(n_heads, dtype) if sinks else None
        if yarn is not None:
            self.rope_theta, factor = stretched(self.head_dim, self.rope_theta, **yarn)
            self.scale *= factor**2  # of queries times that of keys

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (B, T, H, _), age = q.shape, np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])
        group = np.arange(H) // (H // self.n_kv_heads)
        q, k, v = (z.transpose(0, 2, 1, 3) for z in (q, k[:, :, group], v[:, :, group]))  # (B, H, T, d)
        seen = (age >= 0) & (age < self.window if self.window else True)
        scores = F.where(seen, q @ k.transpose(0, 1, 3, 2) * self.scale, -np.inf)
        if self.sinks is not None:
            column = self.sinks.reshape(1, H, 1, 1) + np.zeros((B, H, T, 1), q.dtype)
            scores = F.concatenate([scores, column], axis=3)
        return (F.softmax(scores)[..., :T] @ v).transpose(0, 2, 1, 3)


def stretched(d: int, base: float, *, factor: float, original_length: int, beta_fast: float = 32.0,
              beta_slow: float = 1.0, truncate: bool = True, attention_factor: float | None = None):
    """(frequencies (d/2,), factor of queries and of keys) of rotary positions (YaRN, Peng et al. 2023, section 3).

    Pair i turns by base^(-2i/d) a position. Over original_length positions it makes so many turns: pairs with over
    beta_fast turns keep their frequency, those with under beta_slow are slowed down by `factor`, and between them the
    mixture is linear in i. truncate: whether these bounds of i are rounded outwards.
    attention_factor: None for 0.1 ln(factor) + 1.
    """
    bounds = [d * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(base))
              for turns in (beta_fast, beta_slow)]
    if truncate:
        bounds = math.floor(bounds[0]), math.ceil(bounds[1])
    low, high = max(bounds[0], 0), min(bounds[1], d - 1)
    slow = np.clip((np.arange(d // 2) - low) / (high - low or 0.001), 0, 1)
    scale = (0.1 * math.log(max(factor, 1)) + 1) if attention_factor is None else attention_factor
    return base ** (-np.arange(0, d, 2) / d) * (slow / factor + 1 - slow), scale
