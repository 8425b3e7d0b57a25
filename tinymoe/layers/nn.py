"""Layers. A Module is an object whose attributes hold parameters (Tensors) and other Modules."""

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from ..autograd import functional as F
from ..autograd.inputs import as_tensor
from ..autograd.tensor import Tensor

INIT_STD = 0.02  # standard deviation of initial weights (GPT-2, Radford et al. 2019)


def normal(rng: np.random.Generator | int, shape: tuple, std: float, dtype: DTypeLike) -> Tensor:
    """A parameter drawn from N(0, std^2). rng: a Generator, or the seed of one."""
    return Tensor((std * np.random.default_rng(rng).standard_normal(shape)).astype(dtype), requires_grad=True)


def zeros(shape: int | tuple, dtype: DTypeLike) -> Tensor:
    """A parameter of zeros."""
    return Tensor(np.zeros(shape, dtype), requires_grad=True)


def ones(shape: int | tuple, dtype: DTypeLike) -> Tensor:
    """A parameter of ones."""
    return Tensor(np.ones(shape, dtype), requires_grad=True)


class Module:
    """Calling a Module runs its `forward`; positional NumPy arrays of floating dtype become Tensors.

    A Tensor attribute is a parameter, unless an operation in a graph made it. It is trained if it requires a gradient;
    else it is only saved (a hash table, a frozen weight). Lists, tuples and dicts may hold Tensors and Modules. Keep
    anything else as a NumPy array, which is not saved.
    """

    def __call__(self, *args, **kwargs):
        return self.forward(*map(as_tensor, args), **kwargs)

    def __repr__(self):
        return f"{type(self).__name__}({sum(p.size for p in self.parameters().values()):,} parameters)"

    def parameters(self) -> dict[str, Tensor]:
        """dict of dotted name -> Tensor, in the order in which the attributes were set.

        A Tensor that is there twice has its first name alone.
        """
        found = {}
        for name, tensor in _leaves(vars(self)):
            found.setdefault(id(tensor), (name, tensor))
        return dict(found.values())


def _leaves(part, path=""):
    """Yield (dotted name, Tensor) for each leaf in a Tensor, a Module, or in lists, tuples and dicts of them."""
    if isinstance(part, Tensor) and part._vjp is None:
        yield path, part
    part = part.parameters() if isinstance(part, Module) else part
    part = dict(enumerate(part)) if isinstance(part, (list, tuple)) else part
    for name, inner in part.items() if isinstance(part, dict) else ():
        yield from _leaves(inner, f"{path}.{name}" if path else f"{name}")


def freeze(module: Module, names: str | tuple[str, ...] = ("",)) -> None:
    """Stop the training of the parameters whose dotted name contains one of `names`; of all by default.

    Raises ValueError for a name that no parameter contains.
    """
    parameters = module.parameters()
    for name in (names,) if isinstance(names, str) else names:
        found = [p for path, p in parameters.items() if name in path]
        if not found:
            raise ValueError(f"freeze: no parameter has {name!r} in its name: choose from {', '.join(parameters)}")
        for p in found:
            p.requires_grad = False


class Linear(Module):
    """x (..., n_in) -> x @ weight + bias (..., n_out)."""

    def __init__(self, n_in: int, n_out: int, rng: np.random.Generator | int, bias: bool = True, std: float = INIT_STD,
                 dtype: DTypeLike = np.float32):
        self.weight = normal(rng, (n_in, n_out), std, dtype)
        self.bias = zeros(n_out, dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class LayerNorm(Module):
    """Layer normalisation of x (..., D) with a learned scale and shift (Ba et al. 2016)."""

    def __init__(self, d_model: int, dtype: DTypeLike = np.float32, eps: float = 1e-5):
        self.weight, self.bias, self.eps = ones(d_model, dtype), zeros(d_model, dtype), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(Module):
    """Root-mean-square normalisation of x (..., D) with a learned scale (Zhang & Sennrich 2019)."""

    def __init__(self, d_model: int, dtype: DTypeLike = np.float32, eps: float = 1e-5):
        self.weight, self.eps = ones(d_model, dtype), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight, self.eps)


NORMS = {"layer": LayerNorm, "rms": RMSNorm}


class Embedding(Module):
    """A table of n vectors: integer ids of any shape -> (*ids.shape, D)."""

    def __init__(self, n: int, d_model: int, rng: np.random.Generator | int, dtype: DTypeLike = np.float32):
        self.weight = normal(rng, (n, d_model), INIT_STD, dtype)

    def forward(self, ids: ArrayLike) -> Tensor:
        return F.embedding(self.weight, ids)


class FeedForward(Module):
    """The dense feed-forward layer, down(activation(up(x))), for x (..., D). The hidden width is d_ff.

    activation: a name in functional.ACTIVATIONS. A gated one takes two halves, so `up` is then 2 d_ff wide.
    """

    def __init__(self, d_model: int, d_ff: int, rng: np.random.Generator | int, activation: str = "gelu",
                 out_std: float = INIT_STD, dtype: DTypeLike = np.float32, bias: bool = True):
        self.activation, rng = activation, np.random.default_rng(rng)
        self.up = Linear(d_model, 2 * d_ff if activation in F.GATED else d_ff, rng, bias, dtype=dtype)
        self.down = Linear(d_ff, d_model, rng, bias, std=out_std, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.activation(self.up(x), self.activation))
