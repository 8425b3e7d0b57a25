"""Time the expert backends against each other on one random routing."""

import time

import numpy as np

from ..autograd.tensor import Tensor
from .routing import from_mask, largest


def benchmark(bank_class, n_tokens=1024, d_model=128, n_experts=8, top_k=2, d_ff=None,
              backends=("loop", "naive", "numpy", "numba"), repeats=5, seed=0) -> list[dict]:
    """Time the backends in float32, forward and forward + backward, in turn so that a noisy moment hits all of them.

    d_ff defaults to 4 d_model. Returns a row for each backend and pass: the sizes, "first_ms" (the first call, which
    may compile), "ms" (the median of `repeats` calls), "min_ms", "repeats", and "difference": the largest difference of
    the output and all gradients from those of naive, or of the last backend without it, relative to the largest entry.
    """
    d_ff = d_ff or 4 * d_model
    rng = np.random.default_rng(seed)
    x = Tensor(rng.standard_normal((n_tokens, d_model)).astype(np.float32), requires_grad=True)
    scores = rng.random((n_tokens, n_experts), dtype=np.float32)
    gates, chosen = Tensor(scores, requires_grad=True), largest(scores, top_k)
    routing, dy = from_mask(chosen, gates, gates, gates), rng.standard_normal(x.shape).astype(np.float32)
    banks = {name: bank_class(n_experts, d_model, d_ff, backend=name, seed=seed) for name in backends}

    def forward(name):
        return banks[name](x, routing)

    def both(name):
        leaves = [x, gates, *banks[name].parameters().values()]
        for leaf in leaves:
            leaf.grad = None
        y = forward(name)
        y.backward(dy)
        return [y.data, *(leaf.grad for leaf in leaves)]

    first = {name: _timed(both, name) for name in backends}
    expected, rows = first["naive" if "naive" in backends else backends[-1]][1], []
    for label, function in (("forward", forward), ("forward + backward", both)):
        rounds = [{name: _timed(function, name)[0] for name in backends} for _ in range(repeats)]
        for name, (first_ms, results) in first.items():
            times = [times[name] for times in rounds]
            rows.append({"backend": name, "pass": label, "n_tokens": n_tokens, "d_model": d_model, "d_ff": d_ff,
                         "n_experts": n_experts, "top_k": top_k, "first_ms": first_ms, "ms": float(np.median(times)),
                         "min_ms": min(times), "repeats": repeats, "difference": float(max(
                             np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in zip(results, expected)))})
    return rows


def _timed(function, *arguments):
    """(milliseconds, result) of one call."""
    start = time.perf_counter()
    result = function(*arguments)
    return 1e3 * (time.perf_counter() - start), result
