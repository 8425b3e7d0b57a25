"""ExpertBank: E feed-forward networks that run on a Routing, by any of four backends.

    y[n] = sum over the experts e of token n of  G[n, e] * FFN_e(x[n]), G the gate matrix of the Routing
    FFN_e(x) = activation(x @ w1[e] + b1[e]) @ w2[e] + b2[e]

For finite numbers all backends give the same output and gradients, up to rounding. They differ in speed.
"""

import numpy as np

from .. import kernels
from ..autograd import functional as F
from ..autograd.inputs import check_dtypes
from ..autograd.tensor import Tensor, record
from ..kernels import reference
from ..layers.nn import INIT_STD, Module, normal, zeros
from .benchmark import benchmark
from .routing import Routing


def loop(bank, x, routing):
    """One assignment at a time, in Python: the formula, written out."""
    weights = [(bank.w1[e], bank.b1[e], bank.w2[e], bank.b2[e]) for e in range(bank.n_experts)]
    rows = []
    for a, (n, e) in enumerate(zip(routing.token, routing.expert)):
        w1, b1, w2, b2 = weights[e]
        hidden = F.activation(x[n:n + 1] @ w1 + b1, bank.activation)
        rows.append(routing.gate[a] * (hidden @ w2 + b2))
    return F.scatter_add(F.concatenate(rows), routing.token, len(x)) if rows else grouped(bank, x, routing)


def naive(bank, x, routing):
    """Every expert on every token, times the gate matrix (0 inf is NaN): E / K times the work (Grok-1's own code)."""
    return (routing.to_dense().T[:, :, None] * bank.each(x)).sum(axis=0)


def grouped(bank, x, routing):
    """Each expert on its own tokens, one after the other: for an activation without a kernel."""
    rows = []
    for e, s in enumerate(map(slice, routing.offsets, routing.offsets[1:])):
        hidden = F.activation(x[routing.token[s]] @ bank.w1[e] + bank.b1[e], bank.activation)
        rows.append(routing.gate[s].reshape(-1, 1) * (hidden @ bank.w2[e] + bank.b2[e]))
    return F.scatter_add(F.concatenate(rows), routing.token, len(x))


def sparse(module):
    """A backend that runs each expert on its own tokens, by the kernels of a module."""
    def backend(bank, x, routing):
        if bank.activation == F.CLAMPED:
            return grouped(bank, x, routing)
        parents = (x, routing.gate, bank.w1, bank.b1, bank.w2, bank.b2)
        rows, gate, *weights = (t.data for t in parents)
        inputs = (rows, routing.token, routing.offsets, gate, weights, bank.activation)
        (y, saved), backward = module.experts_forward(*inputs), module.experts_backward
        return record(y, parents, lambda g: backward(g, *inputs, saved))
    return backend


# "numba" runs the kernels that `kernels.use` chose. They are NumPy's where numba is not installed.
BACKENDS = {"loop": loop, "naive": naive, "numpy": sparse(reference), "numba": sparse(kernels)}


class ExpertBank(Module):
    """E experts, each a feed-forward network D -> F -> D. bank(x (N, D), routing) -> (N, D).

    activation: gelu, silu, relu, or gated, geglu, swiglu or clamped_swiglu: then w1 and b1 are 2F wide.
    backend: a name in BACKENDS. seed: an integer or a NumPy Generator; not the router's integer, see routers.make.
    out_std: standard deviation of the initial w2. bias: False for experts without b1 and b2.
    Parameters: w1 (E, D, F), b1 (E, F), w2 (E, F, D), b2 (E, D).
    Raises ValueError for an unknown backend or activation, and where x, gates or routing do not fit.
    """

    benchmark = classmethod(benchmark)  # ExpertBank.benchmark(...) times the backends, see benchmark.py

    def __init__(self, n_experts: int, d_model: int, d_ff: int, activation="gelu", backend="numba", seed=0,
                 dtype=np.float32, out_std=INIT_STD, bias=True):
        for what, name, known in ("expert backend", backend, BACKENDS), ("activation", activation, F.ACTIVATIONS):
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(known)}")
        rng = np.random.default_rng(seed)
        self.n_experts, self.activation, self.backend = n_experts, activation, backend
        up = 2 * d_ff if activation in F.GATED else d_ff
        self.w1, self.b1 = normal(rng, (n_experts, d_model, up), INIT_STD, dtype), zeros((n_experts, up), dtype)
        self.w2, self.b2 = normal(rng, (n_experts, d_ff, d_model), out_std, dtype), zeros((n_experts, d_model), dtype)
        self.bias = self.b1.requires_grad = self.b2.requires_grad = bias

    def parameters(self) -> dict[str, Tensor]:
        """As of any Module. Without bias, b1 and b2 stay zero and are not parameters."""
        found = super().parameters()
        return found if self.bias else {name: p for name, p in found.items() if name not in ("b1", "b2")}

    def each(self, x: Tensor) -> Tensor:
        """(E, N, D): every expert's output for every token of x (N, D)."""
        hidden = F.activation(x @ self.w1 + self.b1[:, None], self.activation)  # (E, N, F)
        return hidden @ self.w2 + self.b2[:, None]

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (N, D) -> (N, D): the sum of each token's experts, weighted by their gates. Its routing has N tokens."""
        width, dtype = self.w1.shape[1], self.w1.dtype
        if x.shape[1:] != (width,) or not x.dtype == routing.gate.dtype == dtype:
            raise ValueError(f"experts of width {width} and {dtype} take x (N, {width}) and gates of that dtype, not "
                             f"{x.shape} {x.dtype} and {routing.gate.dtype}")
        check_dtypes("ExpertBank", x)
        if routing.n_experts != self.n_experts or routing.n_tokens != len(x):
            raise ValueError(f"a routing of {routing.n_tokens} tokens to {routing.n_experts} experts does not fit "
                             f"{len(x)} tokens and {self.n_experts} experts")
        return BACKENDS[self.backend](self, x, routing)
