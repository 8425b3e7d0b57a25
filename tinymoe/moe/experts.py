"""ExpertBank: E feed-forward networks run on a Routing, by any of four backends.

    y[n] = sum over assignments a of token n of  gate[a] * FFN_e(a)(x[n])
    FFN_e(x) = activation(x @ w1[e] + b1[e]) @ w2[e] + b2[e]

All backends give the same output and the same gradients; they differ in what they waste.
"""

import time

import numpy as np

from .. import kernels
from ..autograd import functional as F
from ..autograd.tensor import Tensor, record
from ..layers.nn import INIT_STD, Module, normal, zeros
from .routing import from_mask, largest


def loop(bank, x, routing):
    """One assignment at a time, in Python: what the formula says, word for word."""
    weights = [(bank.w1[e], bank.b1[e], bank.w2[e], bank.b2[e]) for e in range(bank.n_experts)]
    rows = []
    for a, (n, e) in enumerate(zip(routing.token, routing.expert)):
        w1, b1, w2, b2 = weights[e]
        hidden = F.activation(x[n:n + 1] @ w1 + b1, bank.activation)
        rows.append(routing.gate[a] * (hidden @ w2 + b2))
    return F.scatter_add(F.concatenate(rows), routing.token, len(x)) if rows else x * 0


def naive(bank, x, routing):
    """Every expert on every token, masked by the gate matrix: E / K times the work (Grok-1's published code)."""
    hidden = F.activation(x @ bank.w1 + bank.b1[:, None], bank.activation)  # (E, N, F)
    outputs = hidden @ bank.w2 + bank.b2[:, None]  # (E, N, D)
    return (routing.to_dense().T[:, :, None] * outputs).sum(axis=0)


def sorted_numpy(bank, x, routing):
    """One pair of matrix products an expert, on the rows assigned to it: the kernels' algorithm in NumPy."""
    w1, b1, w2, b2, gate = (t.data for t in (bank.w1, bank.b1, bank.w2, bank.b2, routing.gate))
    token, name = routing.token, bank.activation
    slices = [slice(*routing.offsets[e:e + 2]) for e in range(bank.n_experts)]
    inputs = x.data[token]
    before = np.concatenate([inputs[s] @ w1[e] + b1[e] for e, s in enumerate(slices)])  # (A, F)
    after = kernels.activation(before, name)
    outputs = np.concatenate([after[s] @ w2[e] + b2[e] for e, s in enumerate(slices)])  # (A, D)
    y = np.zeros_like(x.data)
    np.add.at(y, token, gate[:, None] * outputs)

    def vjp(g):
        d_outputs = gate[:, None] * g[token]
        d_after = np.concatenate([d_outputs[s] @ w2[e].T for e, s in enumerate(slices)])
        d_before = kernels.activation_backward(d_after, before, name)
        d_inputs = np.concatenate([d_before[s] @ w1[e].T for e, s in enumerate(slices)])
        dx = np.zeros_like(x.data)
        np.add.at(dx, token, d_inputs)
        dw1, dw2 = ([a[s].T @ d[s] for s in slices] for a, d in ((inputs, d_before), (after, d_outputs)))
        db1, db2 = ([d[s].sum(axis=0) for s in slices] for d in (d_before, d_outputs))
        return dx, (g[token] * outputs).sum(axis=1), *map(np.stack, (dw1, db1, dw2, db2))

    return record(y, (x, routing.gate, bank.w1, bank.b1, bank.w2, bank.b2), vjp)


def compiled(bank, x, routing):
    """Compiled dispatch in pieces of rows, so that threads stay busy however the load is spread (kernels/)."""
    parents = (x, routing.gate, bank.w1, bank.b1, bank.w2, bank.b2)
    gate, *weights = (t.data for t in parents[1:])
    inputs = (x.data, routing.token, routing.offsets, gate, *weights, bank.activation)
    y, saved = kernels.experts_forward(*inputs)
    return record(y, parents, lambda g: kernels.experts_backward(g, *inputs, saved))


ACTIVATIONS = tuple(kernels.ACTIVATIONS)
BACKENDS = {"loop": loop, "naive": naive, "numpy": sorted_numpy, "numba": compiled}


class ExpertBank(Module):
    """E experts, each a feed-forward network D -> F -> D. bank(x (N, D), routing) -> (N, D).

    activation: gelu, silu, relu, or gated, geglu or swiglu: then w1 and b1 are 2F wide.
    backend: a name in BACKENDS; numba is the fast one.
    seed: an integer or a NumPy Generator. out_std: standard deviation of the initial w2. bias: False for none.
    Parameters: w1 (E, D, F), b1 (E, F), w2 (E, F, D), b2 (E, D).
    Raises ValueError for an unknown backend.
    """

    def __init__(self, n_experts, d_model, d_ff, activation="gelu", backend="numba", seed=0, dtype=np.float32,
                 out_std=INIT_STD, bias=True):
        if backend not in BACKENDS:
            raise ValueError(f"unknown expert backend {backend!r}: choose one of {', '.join(BACKENDS)}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        rng = np.random.default_rng(seed)
        self.n_experts, self.activation, self.backend = n_experts, activation, backend
        up = d_ff * (1 + (activation in kernels.GATED))
        self.w1, self.b1 = normal(rng, (n_experts, d_model, up), INIT_STD, dtype), zeros((n_experts, up), dtype)
        self.w2, self.b2 = normal(rng, (n_experts, d_ff, d_model), out_std, dtype), zeros((n_experts, d_model), dtype)
        self.bias = self.b1.requires_grad = self.b2.requires_grad = bias

    def parameters(self):
        """As of any Module; without bias, b1 and b2 stay zero and are none."""
        found = super().parameters()
        return found if self.bias else {name: p for name, p in found.items() if name not in ("b1", "b2")}

    def forward(self, x, routing):
        if routing.n_experts != self.n_experts or routing.n_tokens != len(x):
            raise ValueError(f"a routing of {routing.n_tokens} tokens to {routing.n_experts} experts does not fit "
                             f"{len(x)} tokens and {self.n_experts} experts")
        return BACKENDS[self.backend](self, x, routing)

    @staticmethod
    def benchmark(n_tokens=1024, d_model=128, n_experts=8, top_k=2, d_ff=None, backends=tuple(BACKENDS), repeats=5,
                  seed=0):
        """Time the backends on one random routing in float32, in turn, forward and forward + backward.

        d_ff defaults to 4 d_model. Returns a list of dicts, one for each backend and pass: the sizes,
        "first_ms" (the first call: with compilation, where there is any), "ms" (median), "min_ms", "repeats",
        and "difference": of the output and all gradients from the last backend's, relative to their largest entry.
        """
        d_ff = d_ff or 4 * d_model
        rng = np.random.default_rng(seed)
        x = Tensor(rng.standard_normal((n_tokens, d_model)).astype(np.float32), requires_grad=True)
        scores = rng.random((n_tokens, n_experts), dtype=np.float32)
        gates, chosen = Tensor(scores, requires_grad=True), largest(scores, top_k)
        routing, y_gradient = from_mask(chosen, gates, gates, gates), rng.standard_normal(x.shape).astype(np.float32)
        banks = {name: ExpertBank(n_experts, d_model, d_ff, backend=name, seed=seed) for name in backends}

        def forward(name):
            return banks[name](x, routing)

        def both(name):
            leaves = [x, gates, *banks[name].parameters().values()]
            for leaf in leaves:
                leaf.grad = None
            y = forward(name)
            y.backward(y_gradient)
            return [y.data, *(leaf.grad for leaf in leaves)]

        results = {name: _timed(both, name) for name in backends}
        rows = []
        for label, function in (("forward", forward), ("forward + backward", both)):
            times = {name: [] for name in backends}
            for _ in range(repeats):
                for name in backends:  # in turn, so that a noisy moment hits all
                    times[name].append(_timed(function, name)[0])
            rows += [{"backend": name, "pass": label, "n_tokens": n_tokens, "d_model": d_model, "d_ff": d_ff,
                      "n_experts": n_experts, "top_k": top_k, "first_ms": results[name][0],
                      "ms": float(np.median(times[name])), "min_ms": min(times[name]), "repeats": repeats,
                      "difference": _difference(results[name][1], results[backends[-1]][1])} for name in backends]
        return rows


def _timed(function, *args):
    """(milliseconds, result) of one call."""
    start = time.perf_counter()
    result = function(*args)
    return 1e3 * (time.perf_counter() - start), result


def _difference(arrays, reference):
    return float(max(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in zip(arrays, reference)))
