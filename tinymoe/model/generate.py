"""Text from a model, byte by byte, with causal routing."""

from collections.abc import Iterator

import numpy as np

from ..autograd.tensor import no_grad
from ..files import CheckpointError
from ..moe.routing import largest
from ..moe.settings import COUNT, WHOLE
from .transformer import Transformer


def generate(model: Transformer, prompt: bytes | str, length: int, temperature: float = 1.0,
             rng: np.random.Generator | int | None = None, top: int | None = None) -> Iterator[int]:
    """Yield `length` bytes, as integers, that continue prompt. The model sees the last seq_len bytes.

    prompt: bytes, or a str, which is encoded in UTF-8. rng: a Generator or a seed, 0 by default.

    Each byte is drawn from softmax(logits / temperature), among the `top` most probable ones if top is given.
    Temperature 0 takes the most probable byte, the lowest of equals.
    Raises ValueError for an empty prompt, a byte that the model has no token for, a temperature that is negative or not
    finite, a length below 0, and a top that is no whole number of at least 1.
    While it yields, it raises CheckpointError where the model computes numbers that are not finite.
    """
    prompt = prompt.encode() if isinstance(prompt, str) else prompt
    if not prompt:
        raise ValueError("the prompt is empty: give at least one byte to continue")
    if max(prompt) >= model.config.vocab_size:
        raise ValueError(f"the prompt has the byte {max(prompt)}, but the tokens of this model are below "
                         f"{model.config.vocab_size}")
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature {temperature} must be 0 or more, and finite")
    COUNT.require("length", length)
    WHOLE.or_none().require("top", top)
    return _generate(model, list(prompt), length, temperature, np.random.default_rng(0 if rng is None else rng), top)


def _generate(model, ids, length, temperature, rng, top):
    for _ in range(length):
        p = next_probabilities(model, ids[-model.config.seq_len:], temperature, top)
        ids.append(int(rng.choice(len(p), p=p)))
        yield ids[-1]


def require_finite(values: np.ndarray) -> None:
    """Raise CheckpointError where numbers that a model computed are not finite."""
    if not np.isfinite(values).all():
        raise CheckpointError("the model computes numbers that are not finite, because its weights are too large: "
                              "train it again, with a lower learning_rate")


@np.errstate(all="ignore")  # a small temperature makes odds that are 0; other overflow is found below
def next_probabilities(model: Transformer, ids: list[int], temperature: float = 1.0,
                       top: int | None = None) -> np.ndarray:
    """(V,) float64: the distribution of the byte after ids; entries from 256 on are left out."""
    with no_grad():
        output = model.forward(np.array([ids]), rng=np.random.default_rng(0), causal=True)
    logits = output.logits.data[0, -1, :256].astype(float)
    require_finite(logits)
    if temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    kept = largest(logits, min(top or len(logits), len(logits)))
    p = np.where(kept, np.exp((logits - logits.max()) / temperature), 0)
    return p / p.sum()
