"""Check gradients against central differences: f'(x) ~ (f(x + h) - f(x - h)) / 2h, in float64.

The output is first reduced to one number by fixed random weights, so that every output entry
counts. A small input is checked entry by entry, a large one along random directions. The error is
relative to the gradient itself, never absolute, so that a gradient of 1e-9 is checked as strictly
as one of 1; only what rounding alone can cause in the difference is forgiven.
"""

from dataclasses import dataclass

import numpy as np

from .tensor import Tensor

MAX_ENTRIES = 64  # an input with more entries is checked along random directions
N_DIRECTIONS = 8
ROUNDING = 16  # units in the last place by which an evaluated function may be off


@dataclass(frozen=True)
class GradcheckResult:
    """ok: max_error <= rtol. max_error: the largest relative error. where: its place and both values."""

    ok: bool
    max_error: float
    where: str

    def __bool__(self):
        return self.ok


def gradcheck(function, *inputs, eps=1e-6, rtol=1e-5):
    """Compare the gradients of function(*inputs) with central differences in float64.

    function: takes the inputs as Tensors and returns a Tensor of any shape. It may also read other
        tensors; give those among `inputs` whose gradients are to be checked (a model's parameters, say).
    inputs: Tensors, of which those with requires_grad are checked (all floating ones if none has it),
        or NumPy arrays, which are checked if floating. Floating data become float64 for the check and
        are put back afterwards, gradients too.
    eps: the step, relative to entries larger than 1. rtol: the largest relative error that passes.

    Raises TypeError if the function returns no Tensor, ValueError if two calls differ: random
    functions need their generator made anew inside.
    """
    tensors = [x if isinstance(x, Tensor) else Tensor(x, np.asarray(x).dtype.kind == "f") for x in inputs]
    floating = [t for t in tensors if t.dtype.kind == "f"]
    checked = [t for t in floating if t.requires_grad] or floating
    if not checked:
        raise ValueError("gradcheck has nothing to check: give it at least one input of a floating dtype")
    saved = [(t.data, t.grad, t.requires_grad) for t in floating]
    try:
        for t in floating:
            t.data, t.grad = np.array(t.data, dtype=np.float64, order="C"), None
        for t in checked:
            t.requires_grad = True
        return _compare(function, tensors, checked, eps, rtol)
    finally:
        for t, before in zip(floating, saved):
            t.data, t.grad, t.requires_grad = before


def _compare(function, tensors, checked, eps, rtol):
    output = function(*tensors)
    if not isinstance(output, Tensor):
        raise TypeError(f"gradcheck needs a function that returns a Tensor, not {type(output).__name__}")
    if not np.array_equal(output.data, function(*tensors).data, equal_nan=True):
        raise ValueError("two calls of the function gave different outputs: make its random generator anew inside it")
    weights = np.random.default_rng(0).standard_normal(output.shape)
    if output.requires_grad:
        output.backward(weights)

    def weighted():
        return weights * function(*tensors).data

    worst, where = 0.0, "every gradient is exact"
    for tensor in checked:
        gradient = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad
        rows = [(place, (gradient * direction).sum(), *_difference(weighted, tensor, direction, eps))
                for place, direction in _directions(tensor)]
        largest = max((max(abs(a), abs(n)) for _, a, n, _ in rows), default=0.0)
        for place, analytic, numeric, noise in rows:
            error = _relative_error(analytic, numeric, floor=max(0.01 * largest, noise / rtol))
            if error > worst:
                worst = error
                position = next(i for i, t in enumerate(tensors) if t is tensor)
                where = f"input {position} {place}: backward gives {analytic:.6g}, differences give {numeric:.6g}"
    return GradcheckResult(bool(worst <= rtol), float(worst), where)


def _directions(tensor):
    """(place, direction) pairs: unit vectors of a small tensor, random directions of a large one."""
    if tensor.size <= MAX_ENTRIES:
        for index in np.ndindex(tensor.shape):
            unit = np.zeros(tensor.shape)
            unit[index] = max(1.0, abs(tensor.data[index]))
            yield f"at {tuple(map(int, index))}", unit
    else:
        rng = np.random.default_rng(1)
        for i in range(N_DIRECTIONS):
            yield f"along random direction {i}", rng.standard_normal(tensor.shape)


def _difference(weighted, tensor, direction, eps):
    """(central difference along the direction, the part of it that rounding of the outputs alone can cause)."""
    original = tensor.data
    try:
        tensor.data = original + eps * direction
        above = weighted()
        tensor.data = original - eps * direction
        change = above - weighted()
    finally:
        tensor.data = original
    moved = np.abs(above[change != 0]).sum() or np.abs(above).max(initial=0)  # nothing moved: the step was below a unit
    rounding = ROUNDING * np.finfo(np.float64).eps * moved
    return change.sum() / (2 * eps), rounding / eps


def _relative_error(analytic, numeric, floor):
    """|a - n| / max(|a|, |n|, floor). The floor keeps a gap that rounding alone can cause below rtol."""
    gap = abs(analytic - numeric)
    if not np.isfinite(gap):
        return np.inf
    return gap / max(abs(analytic), abs(numeric), floor) if gap else 0.0
