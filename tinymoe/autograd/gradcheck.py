"""Check gradients against central differences, f'(x) ~ (f(x + h) - f(x - h)) / 2h, in float64.

Fixed random weights reduce the output to one number, so every output entry counts. A small input is checked entry by
entry, a large one along random directions. The error is relative to the gradient, or to 1% of the largest gradient of
the same input where that is more. So the scale of an input's gradients does not matter, but an entry far below the
largest is checked less strictly. The error that rounding can cause in the difference is forgiven.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .tensor import Tensor, _oldest_first

MAX_ENTRIES = 64  # an input with more entries is checked along random directions
N_DIRECTIONS = 8
ROUNDING = 16  # a value of the function may be wrong by this many units in the last place


@dataclass(frozen=True)
class GradcheckResult:
    """ok: max_error <= rtol. max_error: the largest relative error. where: its place and both values."""

    ok: bool
    max_error: float
    where: str

    def __bool__(self) -> bool:
        return self.ok


def gradcheck(function: Callable[..., Tensor], *inputs: Tensor | ArrayLike, eps: float = 1e-6,
              rtol: float = 1e-5) -> GradcheckResult:
    """Compare the gradients of function(*inputs) with central differences in float64.

    function: takes the inputs as Tensors and returns a Tensor of any shape. To check the gradient of another Tensor
        that it reads (a model's parameter, say), list it among the inputs.
    inputs: Tensors, computed ones too, or arrays. Those with requires_grad are checked, or every floating one if none
        has it. Floating data become float64 during the check. Afterwards data and gradients are as before.
    eps: the step, relative to entries larger than 1; in a large input to the median entry. rtol: the largest relative
        error that passes.

    Raises TypeError if the function returns no Tensor. Raises ValueError if no input is floating, or if two calls
    differ: a random function must make its generator anew in each call.
    """
    tensors = [x if isinstance(x, Tensor) else Tensor(x, np.asarray(x).dtype.kind == "f") for x in inputs]
    floating = [t for t in tensors if t.dtype.kind == "f"]
    checked = [t for t in floating if t.requires_grad] or floating
    if not checked:
        raise ValueError("gradcheck has nothing to check: give it at least one input of a floating dtype")
    saved = [(t.data, t.grad, t.requires_grad, t._parents, t._vjp) for t in floating]
    try:
        for t in floating:
            t.data, t.grad = np.array(t.data, dtype=np.float64, order="C"), None
            t._parents, t._vjp = (), None  # a leaf, also where it was computed
        for t in checked:
            t.requires_grad = True
        return _compare(function, tensors, checked, eps, rtol)
    finally:
        for t, before in zip(floating, saved):
            t.data, t.grad, t.requires_grad, t._parents, t._vjp = before


def _compare(function, tensors, checked, eps, rtol):
    output = function(*tensors)
    if not isinstance(output, Tensor):
        raise TypeError(f"gradcheck needs a function that returns a Tensor, not {type(output).__name__}")
    if not np.array_equal(output.data, function(*tensors).data, equal_nan=True):
        raise ValueError("two calls of the function gave different outputs: make its random generator anew inside it")
    weights = np.random.default_rng(0).standard_normal(output.shape)
    gradients = _gradients(output, weights, checked)

    worst, where = 0.0, "every gradient is exact"
    for tensor, gradient in zip(checked, gradients):
        rows = [(place, (gradient * direction).sum(),
                 *_difference(lambda: weights * function(*tensors).data, tensor, direction, eps))
                for place, direction in _directions(tensor)]
        largest = max((max(abs(a), abs(n)) for _, a, n, _ in rows), default=0.0)
        for place, analytic, numeric, noise in rows:
            error = _relative_error(analytic, numeric, floor=max(0.01 * largest, noise / rtol))
            if error > worst:
                worst = error
                position = next(i for i, t in enumerate(tensors) if t is tensor)
                where = f"input {position} {place}: backward gives {analytic:.6g}, differences give {numeric:.6g}"
    return GradcheckResult(bool(worst <= rtol), float(worst), where)


def _gradients(output, weights, tensors):
    """The gradient of each tensor. Afterwards `.grad` of everything in the graph, weights of a layer too, is as before.
    """
    before = [(node, node.grad) for node in _oldest_first(output)]
    try:
        if output.requires_grad:
            output.backward(weights)
        return [np.zeros(t.shape) if t.grad is None else t.grad for t in tensors]
    finally:
        for node, grad in before:
            node.grad = grad


def _directions(tensor):
    """(place, direction) pairs: axes of a small tensor, each scaled by its entry if that is larger than 1; random ones
    of a large, all scaled by the median entry, so that one far larger does not hide the errors of the others."""
    if tensor.size <= MAX_ENTRIES:
        scale = np.where(np.isfinite(tensor.data), np.maximum(1, np.abs(tensor.data)), 1)
        for index in np.ndindex(tensor.shape):
            unit = np.zeros(tensor.shape)
            unit[index] = scale[index]
            yield f"at {index}", unit
    else:
        finite = np.abs(tensor.data[np.isfinite(tensor.data)])
        scale, rng = max(1, np.median(finite)) if finite.size else 1, np.random.default_rng(1)
        for i in range(N_DIRECTIONS):
            yield f"along random direction {i}", rng.standard_normal(tensor.shape) * scale


def _difference(values, tensor, direction, eps):
    """(central difference of the sum of values() along the direction, how large an error rounding can cause in it)."""
    original = tensor.data
    try:
        tensor.data = original + eps * direction
        above = values()
        tensor.data = original - eps * direction
        change = above - values()
    finally:
        tensor.data = original
    # a step that changes nothing was below one unit in the last place
    moved = np.abs(above[change != 0]).sum() or np.abs(above).max(initial=0)
    return change.sum() / (2 * eps), ROUNDING * np.finfo(np.float64).eps * moved / eps


def _relative_error(analytic, numeric, floor):
    """|a - n| / max(|a|, |n|, floor). The floor keeps a difference that rounding alone can cause below rtol."""
    difference = abs(analytic - numeric)
    if not np.isfinite(difference):
        return np.inf
    return difference / max(abs(analytic), abs(numeric), floor) if difference else 0.0
