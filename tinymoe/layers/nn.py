"""Layers: a Module is an object whose attributes hold parameters and other Modules."""

import numpy as np

from ..autograd import functional as F
from .. import kernels
from ..autograd.tensor import Tensor

INIT_STD = 0.02  # of every weight matrix, as in GPT-2


def normal(rng, shape, std, dtype):
    """A parameter drawn from N(0, std^2)."""
    return Tensor((std * rng.standard_normal(shape)).astype(dtype), requires_grad=True)


def zeros(shape, dtype):
    """A parameter of zeros."""
    return Tensor(np.zeros(shape, dtype), requires_grad=True)


def ones(shape, dtype):
    """A parameter of ones."""
    return Tensor(np.ones(shape, dtype), requires_grad=True)


class Module:
    """Collects the parameters of its attributes; calling it runs `forward`."""

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def parameters(self):
        """dict of dotted name -> Tensor, in the order in which the attributes were set."""
        found = {}
        for name, value in vars(self).items():
            for key, item in enumerate(value) if isinstance(value, list) else [(None, value)]:
                path = name if key is None else f"{name}.{key}"
                if isinstance(item, Tensor):
                    found[path] = item
                elif isinstance(item, Module):
                    found |= {f"{path}.{inner}": p for inner, p in item.parameters().items()}
        return found


def freeze(module, names=("",)):
    """Take the gradient from the parameters whose dotted name holds one of `names`; by default from all.

    Raises ValueError for a name that is in none.
    """
    parameters = module.parameters()
    for name in names:
        found = [p for path, p in parameters.items() if name in path]
        if not found:
            raise ValueError(f"freeze: no parameter has {name!r} in its name; they are {', '.join(parameters)}")
        for p in found:
            p.requires_grad = False


class Linear(Module):
    """x (..., n_in) -> x @ weight + bias (..., n_out)."""

    def __init__(self, n_in, n_out, rng, bias=True, std=INIT_STD, dtype=np.float32):
        self.weight = normal(rng, (n_in, n_out), std, dtype)
        self.bias = zeros(n_out, dtype) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class LayerNorm(Module):
    """Layer normalisation with a learned scale and shift (Ba et al. 2016)."""

    def __init__(self, d_model, dtype=np.float32, eps=1e-5):
        self.weight, self.bias, self.eps = ones(d_model, dtype), zeros(d_model, dtype), eps

    def forward(self, x):
        return F.layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(Module):
    """Root-mean-square normalisation with a learned scale (Zhang & Sennrich 2019)."""

    def __init__(self, d_model, dtype=np.float32, eps=1e-5):
        self.weight, self.eps = ones(d_model, dtype), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight, self.eps)


class Embedding(Module):
    """A table of vectors: integer ids of any shape -> (*ids.shape, d_model)."""

    def __init__(self, n, d_model, rng, dtype=np.float32):
        self.weight = normal(rng, (n, d_model), INIT_STD, dtype)

    def forward(self, ids):
        return F.embedding(self.weight, ids)


class FeedForward(Module):
    """The dense feed-forward layer: activation(x @ up) @ down, x (..., D), hidden width F; `up` is 2F wide if gated."""

    def __init__(self, d_model, d_ff, rng, activation="gelu", out_std=INIT_STD, dtype=np.float32, bias=True):
        self.activation = activation
        self.up = Linear(d_model, d_ff * (1 + (activation in kernels.GATED)), rng, bias, dtype=dtype)
        self.down = Linear(d_ff, d_model, rng, bias, std=out_std, dtype=dtype)

    def forward(self, x):
        return self.down(F.activation(self.up(x), self.activation))
