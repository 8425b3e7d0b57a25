"""What functions of Tensors take: arrays in place of Tensors, dtypes that agree, and widths that fit."""

import functools
import inspect
from typing import Any

import numpy as np

from .tensor import Tensor

FLOAT32, FLOAT64 = {np.dtype(np.float32)}, {np.dtype(np.float64)}


def as_tensor(x: Any) -> Any:
    """A Tensor of x where it is a NumPy array of floating dtype; x itself where it is anything else."""
    return Tensor(x) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x


def taking_arrays(namespace: dict[str, Any]) -> dict[str, Any]:
    """The public functions of a module's namespace that take Tensors, each of which then takes arrays in their place.

    Parameters annotated as Tensor, or Tensor | None, which come first, take anything that Tensor(...) takes.
    """
    own = {name: f for name, f in namespace.items() if inspect.isfunction(f) and name[0] != "_" and
           f.__module__ == namespace["__name__"]}
    return {name: _wrapping(f, taken) for name, f in own.items() if (taken := _tensors_of(f))}


def _tensors_of(function):
    """{name: Tensor, or Tensor | None} of the parameters that are Tensors."""
    return {name: parameter.annotation for name, parameter in inspect.signature(function).parameters.items()
            if parameter.annotation in (Tensor, Tensor | None)}


def _wrapping(function, taken):
    signature, n = inspect.signature(function), sum(expected is Tensor for expected in taken.values())
    usual = {Tensor} if n == len(taken) else {Tensor, type(None)}

    @functools.wraps(function)
    def call(*args, **options):
        if len(args) >= n and usual.issuperset(map(type, args[:len(taken)])) and taken.keys().isdisjoint(options):
            return function(*args, **options)
        given = signature.bind(*args, **options)
        for name, expected in taken.items():
            if name in given.arguments and not isinstance(given.arguments[name], expected):
                given.arguments[name] = Tensor(given.arguments[name])
        return function(*given.args, **given.kwargs)

    return call


def check_dtypes(name: str, *tensors: Tensor) -> None:
    """TypeError unless all tensors are float32, or all are float64: the kernels take nothing else."""
    found = {t.data.dtype for t in tensors}
    if found != FLOAT32 and found != FLOAT64:
        names = " and ".join(sorted(map(str, found)))
        raise TypeError(f"{name} got {names}, but all must be float32, or all float64: convert with "
                        "x.astype(np.float32), or make the layer with dtype=np.float64")


def check_widths(name: str, x: Tensor, *vectors: Tensor) -> None:
    """TypeError for dtypes as above; ValueError unless each vector has the width of x, which is not 0."""
    check_dtypes(name, x, *vectors)
    if x.shape[-1:] in ((), (0,)):
        raise ValueError(f"{name}: x has shape {x.shape}, so there is nothing to normalise along its last axis")
    for v in vectors:
        if v.shape != x.shape[-1:]:
            raise ValueError(f"{name}: x has shape {x.shape}, so weight and bias must be {x.shape[-1:]}, not {v.shape}")


def check_rows(index: np.ndarray, n: int) -> None:
    """IndexError unless each index is that of one of n rows."""
    if index.size and (index.min() < 0 or index.max() >= n):
        raise IndexError(f"indices run from {index.min()} to {index.max()}, but the rows from 0 to {n - 1}")
