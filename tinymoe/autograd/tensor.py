"""Reverse-mode automatic differentiation over NumPy arrays.

A Tensor is an array that remembers how it was made: from which parents, and by which
vector-Jacobian product (VJP), the function that turns the gradient of the output into the
gradients of the parents. `backward` walks the tensors from the newest to the oldest, so each
one has its whole gradient before it passes it on.

Every operation is written once, with its VJPs beside it:

    def exp(self):
        value = np.exp(self.data)
        return primitive(value, (self, lambda g: g * value))

A gradient array that was handed on is never changed in place, so it may be shared freely.
"""

import contextlib
import itertools
import operator

import numpy as np

_recording = True
_order = itertools.count()


@contextlib.contextmanager
def no_grad():
    """Inside this context no graph is recorded: results do not require gradients."""
    global _recording
    before, _recording = _recording, False
    try:
        yield
    finally:
        _recording = before


def _reflected(operation):
    """The method for an array or a number on the left: x + tensor, where x knows nothing of tensors."""
    return lambda self, other: operation(self._operand(other), self)


class Tensor:
    """An array of real numbers, with the gradient that `backward` leaves in it where it is a leaf.

    array: anything `np.asarray` takes; it is not copied and its dtype is kept.
    requires_grad: makes it a leaf whose `.grad` (same shape and dtype) accumulates over calls of
        `backward` until it is set to None. Only floating dtypes can have gradients.

    Tensors mix with Python numbers and NumPy arrays on either side of an operator. A Python
    number takes the tensor's dtype; arrays follow NumPy's promotion.
    """

    __slots__ = ("data", "grad", "requires_grad", "_retains_grad", "_parents", "_vjp", "_order", "__weakref__")
    __array_ufunc__ = None  # array + tensor calls Tensor.__radd__ instead of looping over entries

    def __init__(self, array, requires_grad=False):
        self.data = np.asarray(array.data if isinstance(array, Tensor) else array)
        if self.data.dtype.kind not in "fiub":
            raise TypeError(f"a Tensor holds real numbers, not dtype {self.data.dtype}")
        if requires_grad and self.data.dtype.kind != "f":
            raise TypeError(f"dtype {self.data.dtype} has no gradient: convert with .astype(np.float32) first")
        self.grad = None
        self.requires_grad = requires_grad
        self._retains_grad = False
        self._parents = ()
        self._vjp = None
        self._order = next(_order)

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    T = property(lambda self: self.transpose())

    def __repr__(self):
        return f"Tensor({self.data}{', requires_grad=True' if self.requires_grad else ''})"

    def __len__(self):
        return len(self.data)

    def __bool__(self):
        return bool(self.data)

    def __float__(self):
        return float(self.data)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.data, dtype=dtype, copy=True) if copy else np.asarray(self.data, dtype=dtype)

    def numpy(self):
        """The values as a NumPy array, not copied and outside any graph."""
        return self.data

    def item(self):
        """The value of a tensor of one element, as a Python number."""
        return self.data.item()

    def detach(self):
        """The same values, cut off from the graph."""
        return Tensor(self.data)

    # -- the backward pass ---------------------------------------------------------------------

    def backward(self, gradient=None, retain_graph=True):
        """Add d(self)/d(leaf), weighted by `gradient`, to `.grad` of every leaf below.

        gradient: same shape as self; may be left out for a tensor of one element (it is 1 then).
        retain_graph: then a second call is exact, and adds the same amount to the leaves again. Without it,
            what an operation saved is freed as soon as it is used: memory that the next gradient takes.
        Other tensors than leaves have no `.grad`, unless `retain_grad` asked for it.
        Raises ValueError for a missing or misshapen gradient, RuntimeError if nothing is recorded or a part is freed.
        """
        if not self.requires_grad:
            raise RuntimeError("nothing to differentiate: no input has requires_grad=True, or it was made under "
                               "no_grad()")
        gradients, owned, summed = {self: _seed(self, gradient)}, set(), set()
        nodes = sorted(_reachable(self), key=lambda t: t._order)
        if any(node._vjp is _freed for node in nodes):
            _freed(None)  # before any leaf has changed
        while nodes:
            node = nodes.pop()  # the newest, so nothing that is left depends on it
            g = gradients.pop(node, None)
            if g is None:
                continue
            if node._vjp is None:
                node.grad = _own(g, owned) if node.grad is None else np.asarray(node.grad + g)
                continue
            if node._retains_grad:
                node.grad = np.array(g)
            for parent, share in zip(node._parents, node._vjp(g)):
                if share is None or not parent.requires_grad:
                    continue
                share = np.asarray(share, dtype=parent.dtype)
                if share.shape != parent.shape:
                    raise ValueError(f"a VJP gave shape {share.shape} for an input of shape {parent.shape}")
                if parent in summed:
                    gradients[parent] += share  # the array is nobody else's
                elif parent in gradients:
                    gradients[parent] = np.asarray(gradients[parent] + share)
                    summed.add(parent)
                else:
                    gradients[parent] = share
            if not retain_graph:
                node._parents, node._vjp = (), _freed

    def retain_grad(self):
        """Have every `backward` leave this tensor's gradient in `.grad`, though it is no leaf; returns self.

        Raises RuntimeError for a tensor that has no gradient.
        """
        if not self.requires_grad:
            raise RuntimeError("no gradient to retain: this tensor depends on nothing that requires one")
        self._retains_grad = True
        return self

    # -- elementwise arithmetic ----------------------------------------------------------------

    def __add__(self, other):
        other = self._operand(other)
        return primitive(_broadcast(np.add, self, other), (self, lambda g: g), (other, lambda g: g))

    def __sub__(self, other):
        other = self._operand(other)
        return primitive(_broadcast(np.subtract, self, other), (self, lambda g: g), (other, lambda g: -g))

    def __mul__(self, other):
        other = self._operand(other)
        return primitive(_broadcast(np.multiply, self, other),
                         (self, lambda g: g * other.data), (other, lambda g: g * self.data))

    def __truediv__(self, other):
        other = self._operand(other)
        value = _broadcast(np.divide, self, other)
        return primitive(value, (self, lambda g: g / other.data), (other, lambda g: -g * value / other.data))

    def __pow__(self, other):
        """x ** y. The gradient for y at x = 0 is 0; at x < 0 it is NaN, as log x is."""
        other = self._operand(other)
        x, y = self.data, other.data
        value = _broadcast(np.power, self, other)

        def vjp_base(g):
            with np.errstate(divide="ignore", invalid="ignore"):
                return g * np.where(y == 0, 0, y * np.power(x, y - 1))

        def vjp_exponent(g):
            with np.errstate(divide="ignore", invalid="ignore"):
                return g * np.where(x == 0, 0, value * np.log(x))

        return primitive(value, (self, vjp_base), (other, vjp_exponent))

    def __neg__(self):
        return primitive(-self.data, (self, lambda g: -g))

    __radd__, __rsub__, __rmul__, __rtruediv__, __rpow__, __rmatmul__ = map(_reflected, (
        operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.matmul))

    def exp(self):
        value = np.exp(self.data)
        return primitive(value, (self, lambda g: g * value))

    def log(self):
        return primitive(np.log(self.data), (self, lambda g: g / self.data))

    def sqrt(self):
        value = np.sqrt(self.data)
        return primitive(value, (self, lambda g: g / (2 * value)))

    def tanh(self):
        value = np.tanh(self.data)
        return primitive(value, (self, lambda g: g * (1 - value * value)))

    # -- matrix product ------------------------------------------------------------------------

    def __matmul__(self, other):
        """Matrix product with NumPy's rules: batch dimensions broadcast, vectors are rows or columns."""
        other = self._operand(other)
        a, b = self.data, other.data
        if a.ndim == 0 or b.ndim == 0 or a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
            raise ValueError(f"cannot multiply matrices of shapes {a.shape} and {b.shape}: "
                             "the last axis of the left must equal the second to last of the right")
        rows = a[None, :] if a.ndim == 1 else a
        columns = b[:, None] if b.ndim == 1 else b

        def restore(g):  # the axes that the vectors took away
            g = np.expand_dims(g, -1) if b.ndim == 1 else g
            return np.expand_dims(g, -2) if a.ndim == 1 else g

        def vjp_a(g):
            return _unbroadcast(restore(g) @ columns.swapaxes(-1, -2), rows.shape).reshape(a.shape)

        def vjp_b(g):
            return _unbroadcast(rows.swapaxes(-1, -2) @ restore(g), columns.shape).reshape(b.shape)

        return primitive(_broadcast(np.matmul, self, other), (self, vjp_a), (other, vjp_b))

    # -- reductions ----------------------------------------------------------------------------

    def sum(self, axis=None, keepdims=False):
        """Sum over one axis, several (a tuple) or all (None)."""
        value = self.data.sum(axis=axis, keepdims=keepdims)
        return primitive(value, (self, lambda g: np.broadcast_to(_keep(g, axis, keepdims, self.ndim), self.shape)))

    def mean(self, axis=None, keepdims=False):
        """Mean over one axis, several (a tuple) or all (None)."""
        value = self.data.mean(axis=axis, keepdims=keepdims)
        n = self.size // max(value.size, 1)
        return primitive(value, (self, lambda g: np.broadcast_to(_keep(g, axis, keepdims, self.ndim) / n, self.shape)))

    def max(self, axis=None, keepdims=False):
        """Maximum over one axis, several or all. Entries that tie share the gradient equally."""
        value = self.data.max(axis=axis, keepdims=True)

        def vjp(g):
            ties = self.data == value
            return ties / ties.sum(axis=axis, keepdims=True) * _keep(g, axis, keepdims, self.ndim)

        return primitive(value if keepdims else value.squeeze(axis), (self, vjp))

    # -- shape and indexing --------------------------------------------------------------------

    def reshape(self, *shape):
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        return primitive(self.data.reshape(shape), (self, lambda g: g.reshape(self.shape)))

    def transpose(self, *axes):
        """Permute the axes; without arguments, reverse them."""
        axes = axes[0] if len(axes) == 1 and isinstance(axes[0], (tuple, list)) else axes
        value = self.data.transpose(axes or None)
        order = [a % self.ndim for a in axes] or range(self.ndim)[::-1]
        return primitive(value, (self, lambda g: g.transpose(np.argsort(order))))

    def __getitem__(self, index):
        """Slices, integers, None, ..., masks and integer arrays. Where an index repeats, gradients add up."""
        index = tuple(map(_raw, index)) if isinstance(index, tuple) else _raw(index)

        def vjp(g):
            out = np.zeros(self.shape, self.dtype)
            if _is_basic(index):
                out[index] = g
            else:
                np.add.at(out, index, g)
            return out

        return primitive(self.data[index], (self, vjp))

    def __setitem__(self, index, value):
        raise TypeError("a Tensor cannot be assigned in place, since the graph may need its old values: "
                        "build a new one with functional.where or functional.concatenate, "
                        "or write to tensor.data before the tensor is used")

    def _operand(self, other):
        """`other` as a Tensor; a plain number takes the dtype of self, so that float32 stays float32."""
        if isinstance(other, Tensor):
            return other
        if isinstance(other, (int, float, np.number)) and self.dtype.kind == "f":
            return Tensor(np.asarray(other, dtype=self.dtype))
        return Tensor(other)


def record(value, parents, vjp):
    """A Tensor of `value` made from `parents`: how fused operations enter the graph.

    vjp(g): g has the shape of value; returns one gradient for each parent, or None for none. Each is an array that
    nothing else keeps, or g itself, or a view of it: a leaf takes it as its `.grad`.
    """
    out = Tensor(value)
    if _recording and any(p.requires_grad for p in parents):
        out.requires_grad, out._parents, out._vjp = True, parents, vjp
    return out


def primitive(value, *inputs):
    """A Tensor of `value` made from (tensor, vjp) pairs, where vjp(g) is that tensor's gradient.

    A VJP may return the gradient before the sum over broadcast axes; only those needed are run.
    """
    needed = [(t, vjp) for t, vjp in inputs if t.requires_grad]
    return record(value, tuple(t for t, _ in needed),
                  lambda g: [_unbroadcast(vjp(g), t.shape) for t, vjp in needed])


def _reachable(root):
    """Every tensor that root depends on and that requires a gradient, root included."""
    found, stack = {root}, [root]
    while stack:
        for parent in stack.pop()._parents:
            if parent.requires_grad and parent not in found:
                found.add(parent)
                stack.append(parent)
    return found


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


def _own(g, owned):
    """g itself for a leaf to keep, or a copy where other tensors may share it. owned: ids of those given away."""
    g = g if g.flags.owndata and g.flags.writeable and id(g) not in owned else np.array(g)
    owned.add(id(g))
    return g


def _broadcast(ufunc, a, b):
    try:
        return ufunc(a.data, b.data)
    except ValueError as error:
        if "broadcast" not in str(error):  # integers to a negative power
            raise
        raise ValueError(f"cannot {ufunc.__name__} shapes {a.shape} and {b.shape}: counted from the right, sizes must "
                         "be equal or 1; line them up with .reshape or by indexing with None") from None


def _unbroadcast(gradient, shape):
    """Sum a gradient over the axes along which its tensor was stretched."""
    if gradient.shape == shape:
        return gradient
    gradient = gradient.sum(axis=tuple(range(gradient.ndim - len(shape))))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1 and gradient.shape[i] != 1)
    return gradient.sum(axis=stretched, keepdims=True).reshape(shape)


def _keep(g, axis, keepdims, ndim):
    """Give back to a reduced gradient the axes of size 1 that the reduction removed."""
    if keepdims:
        return g
    return np.expand_dims(g, tuple(range(ndim)) if axis is None else axis)


def _raw(x):
    return x.data if isinstance(x, Tensor) else x


def _is_basic(index):
    """Slices and single integers pick each entry at most once."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(p is None or p is Ellipsis or isinstance(p, (slice, int, np.integer)) for p in parts)
