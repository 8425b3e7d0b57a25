"""Text from a model, byte by byte, every route decided on what stands before it."""

import numpy as np

from ..autograd.tensor import no_grad
from ..moe.routing import largest


def generate(model, prompt, length, temperature=1.0, rng=None, top=None):
    """Yield `length` bytes, integers, that continue prompt (bytes); the model sees the last seq_len of all so far.

    A byte is drawn from softmax(logits / temperature), among the `top` likeliest where top is given; temperature 0
    takes the likeliest, the lowest of equals. rng: the Generator that draws, default_rng(0) by default.
    Routing is causal, so the bytes that follow depend on nothing but these.
    Raises ValueError for an empty prompt or a temperature that is negative or not finite.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give at least one byte to continue")
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature {temperature} must be 0 or more, and finite")
    return _generate(model, list(prompt), length, temperature, rng or np.random.default_rng(0), top)


def _generate(model, ids, length, temperature, rng, top):
    for _ in range(length):
        p = next_probabilities(model, ids[-model.config.seq_len:], temperature, top)
        ids.append(int(rng.choice(len(p), p=p)))
        yield ids[-1]


def next_probabilities(model, ids, temperature=1.0, top=None):
    """(V,) float64: the distribution that the byte after ids, a list, is drawn from; a byte is below 256."""
    with no_grad():
        output = model.forward(np.array([ids]), rng=np.random.default_rng(0), causal=True)
    logits = output.logits.data[0, -1, :256].astype(float)
    if temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    kept = largest(logits, min(top or len(logits), len(logits)))
    p = np.where(kept, np.exp((logits - logits.max()) / temperature), 0)
    return p / p.sum()
