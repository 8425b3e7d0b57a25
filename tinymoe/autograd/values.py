"""What a Tensor is to Python and NumPy: its values printed, compared, converted and copied, outside any graph."""

import operator

import numpy as np

_OPERATORS = {np.add: operator.add, np.subtract: operator.sub, np.multiply: operator.mul, np.divide: operator.truediv,
              np.power: operator.pow, np.matmul: operator.matmul}
_WITHOUT_GRADIENT = {np.shape, np.ndim, np.size, np.argmax, np.argmin, np.argsort, np.array_equal, np.allclose,
                     np.isclose, np.zeros_like, np.ones_like}
_NAMES = {"absolute": "abs", "amax": "max"}  # NumPy's names of methods of Tensor


def require_floating(dtype: np.dtype) -> None:
    """TypeError for a dtype without gradients: whole numbers and booleans."""
    if dtype.kind != "f":
        raise TypeError(f"dtype {dtype} has no gradient: convert with .astype(np.float32) first")


def _comparison(compare):
    """The method that compares entry by entry, as NumPy does, and returns booleans outside any graph."""
    def method(self, other):
        other = other.data if isinstance(other, Values) else other
        if np.asarray(other).dtype.kind not in "fiub":  # None or a string
            return NotImplemented
        return compare(self.data, other)
    return method


class Values:
    """What Python and NumPy ask of a Tensor: printing, comparing, copying, converting.

    Comparisons (== too), `np.isfinite` and `np.argmax` have no gradient, so they always return arrays. `array + tensor`
    is passed on to Tensor's operators. Any other function of NumPy returns an array, or raises TypeError if a graph
    would be lost.
    """

    __slots__ = ()
    __lt__, __le__, __gt__, __ge__, __eq__, __ne__ = map(_comparison, (
        operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne))
    __hash__ = object.__hash__  # a dict or a set finds a Tensor by its identity

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array, not copied and outside any graph."""
        return self.data

    def item(self) -> float | int | bool:
        """The value of a tensor of one element, as a Python number. ValueError for more elements or none."""
        if self.data.size != 1:
            raise ValueError(f"a Tensor of shape {self.data.shape} is not a single number: reduce it with .sum() or "
                             ".mean(), index it, or take the array x.data")
        return self.data.item()

    def __bool__(self):
        if self.data.size != 1:
            raise ValueError(f"a Tensor of shape {self.data.shape} is neither true nor false: use x.data.any() or "
                             "x.data.all()")
        return bool(self.data)

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

    def __round__(self, digits=None):
        return round(self.item(), digits)

    def __format__(self, spec):
        return format(self.item(), spec) if spec else repr(self)

    def __repr__(self):
        return f"Tensor({self.data}{', requires_grad=True' if self.requires_grad else ''})"

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        if self.data.ndim == 0:
            raise TypeError("cannot iterate over a Tensor of shape (): use .item() for its value")
        return (self[i] for i in range(len(self)))

    def __setitem__(self, index, value):
        raise TypeError("a Tensor cannot be assigned in place, because the graph may need its old values: "
                        "build a new one with functional.where or functional.concatenate, "
                        "or write to tensor.data before the tensor is used")

    def __reduce__(self):
        """A copy, or a pickle, is a new leaf with copies of the values and the gradient."""
        if self._vjp is not None:
            raise TypeError(f"a Tensor of shape {self.data.shape} that was computed in a graph cannot be copied or "
                            "pickled: take x.detach(), or keep the array x.data instead")
        return _rebuilt, (type(self), self.data, self.requires_grad, self.grad)

    def __array__(self, dtype=None, copy=None):
        if self._in_graph:
            raise TypeError("NumPy would drop the graph of this Tensor: join Tensors with functional.concatenate, "
                            "or take the values alone with .numpy()")
        return np.array(self.data, dtype=dtype, copy=True) if copy else np.asarray(self.data, dtype=dtype)

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        """NumPy calls this for array + tensor, which is Tensor.__radd__, and for its own functions of entries."""
        if ufunc in _OPERATORS and method == "__call__" and not options and not isinstance(inputs[0], Values):
            return _OPERATORS[ufunc](inputs[1]._operand(inputs[0]), inputs[1])
        if any(isinstance(out, Values) for out in options.get("out", ())):
            raise TypeError(f"np.{ufunc.__name__} cannot write into a Tensor: give the array x.data as out")
        boolean = all(types[-1] == "?" for types in ufunc.types if types[0] == "d")  # such a result has no gradient
        return getattr(ufunc, method)(*_arrays(inputs, ufunc, boolean), **_arrays(options, ufunc, boolean))

    def __array_function__(self, function, types, inputs, options):
        """NumPy calls this for its functions that are no ufunc."""
        allowed = function in _WITHOUT_GRADIENT
        return function(*_arrays(inputs, function, allowed), **_arrays(options, function, allowed))


def _rebuilt(cls, data, requires_grad, grad):
    tensor = cls(data, requires_grad)
    tensor.grad = None if grad is None else np.array(grad)
    return tensor


def _arrays(x, function, allowed):
    """x with arrays in place of the Tensors in it. TypeError if a graph would be lost, unless `allowed`."""
    if isinstance(x, (tuple, list)):
        parts = (_arrays(part, function, allowed) for part in x)
        return tuple(parts) if isinstance(x, tuple) else list(parts)
    if isinstance(x, dict):
        return {name: _arrays(part, function, allowed) for name, part in x.items()}
    if not isinstance(x, Values):
        return x
    if x._in_graph and not allowed:
        name = _NAMES.get(function.__name__, function.__name__)
        instead = (f"functional.{name}, or " if name in ("concatenate", "stack", "where") else
                   f"x.{name}(), or " if hasattr(x, name) else "")
        raise TypeError(f"np.{name} would drop the graph of a Tensor x: use {instead}np.{name} of x.data outside the "
                        "graph")
    return x.data
