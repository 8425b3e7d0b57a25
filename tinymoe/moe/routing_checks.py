"""What a Routing must hold, and the sizes that its functions take. Each check raises a ValueError."""

import numpy as np

from ..autograd.tensor import Tensor


def check_routing(r) -> None:
    """The fields of a Routing fit together, and its assignments are sorted, without repeats."""
    _require_tensors(gate=r.gate, logits=r.logits, probs=r.probs)
    _require_integers(token=r.token, offsets=r.offsets)
    if r.probs.ndim != 2 or r.logits.shape != r.probs.shape:
        raise ValueError(f"logits {r.logits.shape} and probs {r.probs.shape} must both be (N, E)")
    n_assignments, (n_tokens, n_experts) = len(r.token), r.probs.shape
    if r.gate.shape != (n_assignments,) or r.offsets.shape != (n_experts + 1,):
        raise ValueError(f"{n_assignments} assignments to {n_experts} experts need gates ({n_assignments},) and "
                         f"offsets ({n_experts + 1},), not {r.gate.shape} and {r.offsets.shape}")
    if r.offsets[0] != 0 or r.offsets[-1] != n_assignments or (np.diff(r.offsets) < 0).any():
        raise ValueError(f"offsets must rise from 0 to the {n_assignments} assignments, not {r.offsets}")
    if n_assignments and not (r.token.min() >= 0 and r.token.max() < n_tokens):
        raise ValueError(f"token {r.token.min()} or {r.token.max()} is not one of 0 to {n_tokens - 1}")
    if (np.diff(r.expert * n_tokens + r.token) <= 0).any():
        raise ValueError("the tokens of each expert must rise, and a token can have an expert only once")


def check_mask(chosen, gates, logits, probs) -> None:
    """A choice and the Tensors that belong to it are all (N, E)."""
    _require_tensors(gates=gates, logits=logits, probs=probs)
    if not isinstance(chosen, np.ndarray) or chosen.ndim != 2:
        raise ValueError(f"chosen must be an array (N, E) of booleans, not a {type(chosen).__name__} of shape "
                         f"{np.shape(chosen)}")
    if not chosen.shape == gates.shape == logits.shape == probs.shape:
        raise ValueError(f"chosen, gates, logits and probs must all be (N, E), not {chosen.shape}, {gates.shape}, "
                         f"{logits.shape} and {probs.shape}")


def check_limit(n_tokens: int, n_experts: int, per_token: float, factor: float) -> None:
    """The arguments of `capacity`."""
    if not factor > 0:
        raise ValueError(f"capacity factor {factor} must be above 0")
    if n_tokens < 0 or n_experts < 1 or not per_token > 0:
        raise ValueError(f"a capacity needs at least 0 tokens, 1 expert, and experts per token above 0, not {n_tokens} "
                         f"tokens, {n_experts} experts and {per_token} per token")


def _require_tensors(**fields):
    for name, value in fields.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}, but must be a Tensor: write tm.Tensor({name})")


def _require_integers(**fields):
    for name, value in fields.items():
        if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind != "i":
            found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
            raise ValueError(f"{name} must be a one-dimensional array of signed integers, not {found}")
