"""What a Transformer is given and what its losses return, checked, with messages that say what to do."""

import numpy as np

from ..autograd.tensor import Tensor
from ..moe.losses import LOSSES, Loss


def require_ids(ids, seq_len: int, vocab_size: int) -> np.ndarray:
    """ids as an array (B, T).

    Raises ValueError for no tokens, or sequences longer than seq_len; IndexError for an id that is not
    from 0 to vocab_size - 1.
    """
    ids = np.asarray(ids)
    if ids.ndim != 2 or not ids.size or ids.shape[1] > seq_len:
        raise ValueError(f"ids have shape {ids.shape}, but must be (B, T) with B at least 1 and T from 1 to "
                         f"seq_len {seq_len}")
    if ids.dtype.kind in "iu" and (ids.min() < 0 or ids.max() >= vocab_size):
        raise IndexError(f"ids run from {ids.min()} to {ids.max()}, but vocab_size is {vocab_size}: the model has the "
                         f"ids 0 to {vocab_size - 1}")
    return ids


def require_targets(targets, logits: Tensor) -> np.ndarray:
    """targets as an array (B, T). Raises ValueError for another shape than that of logits (B, T, V)."""
    targets = np.asarray(targets)
    if targets.shape != logits.shape[:2]:
        raise ValueError(f"targets have shape {targets.shape}, but the ids {logits.shape[:2]}: each id needs the token "
                         "that follows it")
    return targets


def require_losses(losses: dict) -> None:
    """Raise ValueError for an entry of LOSSES that is no Loss."""
    for name, loss in losses.items():
        if not isinstance(loss, Loss):
            raise ValueError(f"LOSSES[{name!r}] is a {type(loss).__name__}, but must be a Loss: write "
                             f"LOSSES[{name!r}] = Loss(\"its meaning\", lambda routing, context: ...)")


def require_terms(name: str, terms: list) -> None:
    """Raise ValueError unless each term of a loss is a scalar Tensor, or None."""
    for term in terms:
        if term is not None and not (isinstance(term, Tensor) and term.shape == ()):
            what = f"a Tensor {term.shape}" if isinstance(term, Tensor) else f"a {type(term).__name__}"
            raise ValueError(f"the loss {name} returned {what}, but must return a scalar Tensor, or None: use .sum() "
                             "or .mean() of Tensors")


def term_named(name: str, terms: dict) -> Tensor | None:
    """The term of a loss that has a name; None for one that was not computed. Raises AttributeError for other names."""
    if name in (*LOSSES, "penalty", "multi_token"):
        return terms.get(name)
    raise AttributeError(f"LossTerms has no {name!r}: it has {', '.join(('total', 'cross_entropy', *terms))}; for "
                         "gradients call .total.backward()")
