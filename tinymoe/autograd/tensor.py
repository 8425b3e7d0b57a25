"""Reverse-mode automatic differentiation over NumPy arrays.

A Tensor is an array that remembers how it was computed: its parents, and a vector-Jacobian product (VJP). The VJP
is the function that turns the gradient of the result into the gradients of the parents. `backward` visits the
tensors from the newest to the oldest, so each gradient is complete before it is passed on.

Every operation is written once, with its VJPs beside it; see `Tensor.exp`. Gradient arrays are shared without a copy.
So a VJP must not change the array it was given.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import operator

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .values import Values, require_floating

_no_grad_depth = contextvars.ContextVar("no_grad_depth", default=0)  # open no_grad blocks of this thread and context
_clock = itertools.count()

Axis = int | tuple[int, ...] | None


@contextlib.contextmanager
def no_grad():
    """Record no graph inside this block, so results need no gradients. Other threads and tasks are not affected."""
    _no_grad_depth.set(_no_grad_depth.get() + 1)
    try:
        yield
    finally:
        _no_grad_depth.set(_no_grad_depth.get() - 1)


def _reflected(operation):
    """The method for an array or a number on the left, as in 2 * tensor."""
    return lambda self, other: operation(self._operand(other), self)


class Tensor(Values):
    """An array of real numbers. A leaf is a Tensor that no operation made; `backward` leaves its gradient in `.grad`.

    array: anything that `np.asarray` takes; the dtype is kept. TypeError unless it holds real numbers.
    requires_grad: whether `backward` computes its gradient. If so the array must be floating, else TypeError, and is
        copied, because an optimiser changes it. `.grad` (same shape and dtype) adds up over calls until set to None.

    Operators take Python numbers and NumPy arrays on either side; scalars and integers get the tensor's dtype.
    Operations keep references to `.data` and to arrays of indices. Do not change these before the backward pass, or
    gradients are wrong: `backward` raises an error if an optimiser did (`mark_changed`), and notices no other change.
    """

    __slots__ = ("data", "grad", "requires_grad", "_retains_grad", "_parents", "_vjp", "_time", "__weakref__")
    def __init__(self, array: ArrayLike | Tensor, requires_grad: bool = False):
        self.data = np.array(array) if requires_grad else np.asarray(array)
        if self.data.dtype.kind not in "fiub":
            raise TypeError(f"a Tensor holds real numbers, not dtype {self.data.dtype}")
        if requires_grad:
            require_floating(self.data.dtype)
        self.grad, self.requires_grad, self._retains_grad = None, requires_grad, False
        self._parents, self._vjp = (), None
        self._time = next(_clock)  # a result is newer than its parents

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    T = property(lambda self: self.transpose())
    _in_graph = property(lambda self: self.requires_grad and not _no_grad_depth.get())  # for Values

    def detach(self) -> Tensor:
        """The same values without the graph."""
        return Tensor(self.data)

    def backward(self, gradient: ArrayLike | Tensor | None = None, retain_graph: bool = True) -> None:
        """Add d(self)/d(leaf), weighted by `gradient`, to `.grad` of every leaf that self depends on.

        gradient: same shape as self; 1 if it is left out, which only a tensor of one element allows (ValueError).
        retain_graph: True keeps the graph, so a second call is exact and adds the same amount again. False frees
            what each operation saved as soon as it is used, so the next gradients can reuse the memory.
        Raises RuntimeError, before any leaf changes, if nothing was recorded, a part of the graph was freed, or an
        optimiser changed a leaf since; TypeError if a leaf has whole numbers.
        """
        if not self.requires_grad:
            raise RuntimeError("nothing to differentiate: no input has requires_grad=True, or no_grad() was on")
        gradients = _Gradients()
        gradients.add(self, _seed(self, gradient))
        nodes = _oldest_first(self)
        while nodes:
            node = nodes.pop()  # the newest: no other node depends on it, so its gradient is complete
            g = gradients.pop(node, None)
            if g is None:  # a VJP gave None: nothing to pass on
                continue
            if node._vjp is None:
                gradients.give(node, g)
                continue
            if node._retains_grad:
                node.grad = np.array(g if node.grad is None else node.grad + g)
            for parent, share in zip(node._parents, node._vjp(g), strict=True):
                gradients.add(parent, share)
            if not retain_graph:
                node._parents, node._vjp = (), _freed

    def retain_grad(self) -> Tensor:
        """Make `backward` keep the gradient of this tensor in `.grad`, as it does for a leaf. Returns self."""
        if not self.requires_grad:
            raise RuntimeError("no gradient to retain: this tensor depends on nothing that requires one")
        self._retains_grad = True
        return self

    def mark_changed(self) -> None:
        """Record that `.data` of this leaf changed: `backward` of a graph that used the old values then fails."""
        self._time = next(_clock)

    def __add__(self, other: ArrayLike | Tensor) -> Tensor:
        other = self._operand(other)
        return primitive(_apply(np.add, self, other), (self, lambda g: g), (other, lambda g: g))

    def __sub__(self, other: ArrayLike | Tensor) -> Tensor:
        other = self._operand(other)
        return primitive(_apply(np.subtract, self, other), (self, lambda g: g), (other, lambda g: -g))

    def __mul__(self, other: ArrayLike | Tensor) -> Tensor:
        other = self._operand(other)
        return primitive(_apply(np.multiply, self, other),
                         (self, lambda g: g * other.data), (other, lambda g: g * self.data))

    def __truediv__(self, other: ArrayLike | Tensor) -> Tensor:
        other = self._operand(other)
        value = _apply(np.divide, self, other)
        return primitive(value, (self, lambda g: g / other.data), (other, lambda g: -g * value / other.data))

    def __pow__(self, other: ArrayLike | Tensor) -> Tensor:
        """x ** y. The gradient for y at x = 0 is 0, also where y < 0; at x < 0 it is NaN, as log x is."""
        other = self._operand(other)
        x, y = self.data, other.data
        value = _apply(np.power, self, other)
        quiet = np.errstate(divide="ignore", invalid="ignore")
        return primitive(value, (self, quiet(lambda g: g * np.where(y == 0, 0, y * np.power(x, y - 1)))),
                         (other, quiet(lambda g: g * np.where(x == 0, 0, value * np.log(x)))))

    def __neg__(self) -> Tensor:
        return primitive(-self.data, (self, lambda g: -g))

    __radd__, __rsub__, __rmul__, __rtruediv__, __rpow__, __rmatmul__ = map(_reflected, (
        operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.matmul))

    def exp(self) -> Tensor:
        """e^x of each entry."""
        value = np.exp(self.data)
        return primitive(value, (self, lambda g: g * value))

    def log(self) -> Tensor:
        """The natural logarithm of each entry: -inf at 0, and NaN below, where NumPy warns."""
        return primitive(np.log(self.data), (self, lambda g: g / self.data))

    def sqrt(self) -> Tensor:
        """The square root of each entry; its gradient at 0 is infinite."""
        value = np.sqrt(self.data)
        return primitive(value, (self, lambda g: g / (2 * value)))

    def tanh(self) -> Tensor:
        """The hyperbolic tangent of each entry."""
        value = np.tanh(self.data)
        return primitive(value, (self, lambda g: g * (1 - value * value)))

    def __abs__(self) -> Tensor:
        """The absolute value of each entry; the gradient at 0 is 0."""
        return primitive(np.abs(self.data), (self, lambda g: g * np.sign(self.data)))

    abs = __abs__

    def astype(self, dtype: DTypeLike) -> Tensor:
        """The values in another dtype. The gradient has the dtype of self; whole numbers and booleans have none."""
        value = self.data.astype(dtype)
        return primitive(value, (self, lambda g: g)) if value.dtype.kind == "f" else Tensor(value)

    def __matmul__(self, other: ArrayLike | Tensor) -> Tensor:
        """Matrix product with NumPy's rules: batch dimensions broadcast, vectors are rows or columns."""
        other = self._operand(other)
        a, b = self.data, other.data
        if a.ndim == 0 or b.ndim == 0 or a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
            raise ValueError(f"cannot multiply matrices of shapes {a.shape} and {b.shape}: "
                             "the last axis of the left must equal the second to last of the right")
        rows = a[None, :] if a.ndim == 1 else a
        columns = b[:, None] if b.ndim == 1 else b

        def restore(g):  # give g back the axes that a vector operand removed
            g = np.expand_dims(g, -1) if b.ndim == 1 else g
            return np.expand_dims(g, -2) if a.ndim == 1 else g

        def vjp_a(g):
            return _unbroadcast(restore(g) @ columns.swapaxes(-1, -2), rows.shape).reshape(a.shape)

        def vjp_b(g):
            return _unbroadcast(rows.swapaxes(-1, -2) @ restore(g), columns.shape).reshape(b.shape)

        return primitive(_apply(np.matmul, self, other), (self, vjp_a), (other, vjp_b))

    def sum(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """Sum over one axis, several (a tuple) or all (None), in its dtype; `mean` keeps more digits of float32."""
        value = self.data.sum(axis=axis, keepdims=True)
        return primitive(value if keepdims else value.squeeze(axis),
                         (self, lambda g: np.broadcast_to(g.reshape(value.shape), self.shape)))

    def mean(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """Mean over one axis, several or all, summed in float64: NumPy adds float32 rows one by one and loses bits."""
        dtype = self.dtype if self.dtype.kind == "f" else np.float64
        value = self.data.mean(axis=axis, keepdims=True, dtype=np.promote_types(dtype, np.float64)).astype(dtype)
        n = self.size // max(value.size, 1)
        return primitive(value if keepdims else value.squeeze(axis),
                         (self, lambda g: np.broadcast_to(g.reshape(value.shape) / n, self.shape)))

    def max(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """Maximum over one axis, several or all. Entries that tie share the gradient equally."""
        value = self.data.max(axis=axis, keepdims=True)

        def vjp(g):
            ties = self.data == value
            return ties / ties.sum(axis=axis, keepdims=True) * g.reshape(value.shape)

        return primitive(value if keepdims else value.squeeze(axis), (self, vjp))

    def reshape(self, *shape: int) -> Tensor:
        """The same entries in another shape, given as numbers or as one tuple."""
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        return primitive(self.data.reshape(shape), (self, lambda g: g.reshape(self.shape)))

    def transpose(self, *axes: int) -> Tensor:
        """Permute the axes; without arguments, reverse them."""
        axes = axes[0] if len(axes) == 1 and isinstance(axes[0], (tuple, list)) else axes
        value = self.data.transpose(axes or None)
        order = [a % self.ndim for a in axes] or range(self.ndim)[::-1]
        return primitive(value, (self, lambda g: g.transpose(np.argsort(order))))

    def __getitem__(self, index) -> Tensor:
        """Index by slices, integers, None, ..., masks and integer arrays. Gradients of a repeated index add up."""
        index = tuple(map(_raw, index)) if isinstance(index, tuple) else _raw(index)

        def vjp(g):
            out = np.zeros(self.shape, self.dtype)
            if _is_basic(index):
                out[index] = g
            else:
                np.add.at(out, index, g)
            return out

        return primitive(self.data[index], (self, vjp))

    def _operand(self, other):
        """`other` as a Tensor. Scalars and integer arrays take the dtype of self, so float32 stays float32."""
        value = np.asarray(_raw(other))
        if self.dtype.kind == "f" and (value.dtype.kind in "iu" or value.dtype.kind == "f" and value.ndim == 0):
            if getattr(other, "requires_grad", False):
                return other if value.dtype == self.dtype else other.astype(self.dtype)
            return Tensor(value.astype(self.dtype))
        return other if isinstance(other, Tensor) else Tensor(value)


class _Gradients(dict):
    """Tensor -> its gradient so far, which `backward` has not yet passed on.

    Tensors may share an array without a copy: both terms of a + b receive the same one. A shared array is never
    changed. The first sum makes a new array, and later shares are added to that one in place.
    """

    def __init__(self):
        self._summed = set()  # tensors whose array was made by a sum here
        self._kept = set()  # ids of arrays that leaves keep as their .grad

    def add(self, tensor, share):
        """Add one share of the tensor's gradient; None adds nothing."""
        if share is None or not tensor.requires_grad:
            return
        share = np.asarray(share, dtype=tensor.dtype)
        if share.shape != tensor.shape:
            raise ValueError(f"a VJP gave shape {share.shape} for an input of shape {tensor.shape}")
        if tensor in self._summed:
            self[tensor] += share
        elif tensor in self:
            self[tensor] = np.asarray(self[tensor] + share)
            self._summed.add(tensor)
        else:
            self[tensor] = share

    def give(self, leaf, g):
        """Add g to the leaf's `.grad`. No two leaves keep the same array, so g is copied if another may hold it."""
        if leaf.grad is not None:
            g = np.asarray(leaf.grad + g)
        elif id(g) in self._kept or not (g.flags.owndata and g.flags.writeable):
            g = np.array(g)
        leaf.grad = g
        self._kept.add(id(g))


def record(value: np.ndarray, parents: tuple, vjp) -> Tensor:
    """A Tensor of `value` computed from the Tensors `parents`. Fused operations enter the graph this way.

    vjp(g), g of the shape of value, returns one gradient for each parent, or None for none. Each must be a new array,
    g itself or a view of g, because a leaf keeps it as its `.grad`.
    """
    out = Tensor(value)
    if not _no_grad_depth.get() and any(p.requires_grad for p in parents):
        out.requires_grad, out._parents, out._vjp = True, parents, vjp
    return out


def primitive(value: np.ndarray, *inputs: tuple) -> Tensor:
    """A Tensor of `value` computed from (tensor, vjp) pairs, where vjp(g) is the gradient of that tensor.

    A VJP may return the gradient before the sum over broadcast axes. Only the VJPs that are needed are run.
    """
    needed = [(t, vjp) for t, vjp in inputs if t.requires_grad]
    return record(value, tuple(t for t, _ in needed),
                  lambda g: [_unbroadcast(vjp(g), t.shape) for t, vjp in needed])


def _oldest_first(root):
    """Every tensor that root depends on and that requires a gradient, root included and last."""
    found, stack = {root}, [root]
    while stack:
        node = stack.pop()
        if node._vjp is _freed:
            _freed(None)
        if node._vjp is None:
            require_floating(node.dtype)  # requires_grad may have been set later
        for parent in node._parents:
            if not parent.requires_grad:
                continue
            if parent._time > node._time:
                raise RuntimeError(f"a leaf of shape {parent.shape} changed after the forward pass that used it: "
                                   "call backward before the optimiser's step")
            if parent not in found:
                found.add(parent)
                stack.append(parent)
    return sorted(found, key=lambda node: node._time)


def _seed(tensor, gradient):
    if gradient is None:
        if tensor.size != 1:
            raise ValueError(f"backward() needs a scalar, but this tensor has shape {tensor.shape}: "
                             "call .sum().backward(), or pass backward(gradient) with that shape")
        return np.ones(tensor.shape, tensor.dtype)
    gradient = np.array(_raw(gradient), dtype=tensor.dtype)
    if gradient.shape != tensor.shape:
        raise ValueError(f"the gradient has shape {gradient.shape}, but must have the tensor's, {tensor.shape}")
    return gradient


def _freed(g):
    raise RuntimeError("this graph was freed by backward(retain_graph=False): run the forward pass again")


def _apply(ufunc, a, b):
    """ufunc of the values of two Tensors. ValueError where their shapes do not broadcast."""
    a = b._operand(a)  # as b was made an operand of a
    try:
        return ufunc(a.data, b.data)
    except ValueError as error:
        if "broadcast" not in str(error):  # integers to a negative power
            raise
        raise ValueError(f"cannot {ufunc.__name__} shapes {a.shape} and {b.shape}: counted from the right, sizes must "
                         "be equal or 1; line them up with .reshape or by indexing with None") from None


def _unbroadcast(gradient, shape):
    """Sum a gradient down to `shape`, over the axes that broadcasting stretched or added."""
    if gradient.shape == shape:
        return gradient
    gradient = gradient.sum(axis=tuple(range(gradient.ndim - len(shape))))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and gradient.shape[i] != 1)
    return gradient.sum(axis=stretched, keepdims=True).reshape(shape)


def _raw(x):
    return x.data if isinstance(x, Tensor) else x


def _is_basic(index):
    """Whether the index is made of slices and single integers, which pick each entry at most once."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(p is None or p is Ellipsis or isinstance(p, (slice, int, np.integer)) for p in parts)
