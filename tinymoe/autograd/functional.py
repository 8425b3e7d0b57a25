"""Functions of Tensors: activations, the softmax family, losses, normalisation, lookups.

Each makes one node of the graph (except clamped SwiGLU and `gather` of all axes), with its VJP beside it. Those that
take most of a step call a kernel (reference.py). All take arrays for Tensors. Unless all inputs are float32, or all are
float64, activation, gelu, silu, relu, linear, the norms, causal_attention, rotary and embedding raise TypeError.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, ndtr

from .. import kernels
from .inputs import check_dtypes, check_rows, check_widths, taking_arrays
from .tensor import Axis, Tensor, primitive, record

CLAMPED = "clamped_swiglu"  # the activation without a kernel
ACTIVATIONS, GATED = (*kernels.ACTIVATIONS, CLAMPED), (*kernels.GATED, CLAMPED)


def _rows(x):
    """(..., D) as rows (N, D). NumPy cannot work out N from D = 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def activation(x: Tensor, name: str) -> Tensor:
    """An activation by name: "gelu", "silu", "relu", or a gated one.

    "geglu" and "swiglu" take x (..., 2F) to f(a) * b (..., F), where a and b are the halves of x (Shazeer 2020).
    "clamped_swiglu" takes x to a * sigmoid(1.702 a) * (1 + b), with a at most 7 and b from -7 to 7 (GPT-OSS, OpenAI
    2025). It is composed of other operations and has no kernel.
    Raises ValueError for another name, and for a gated one where the last axis of x is odd.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: choose one of {', '.join(ACTIVATIONS)}")
    if name in GATED and (x.ndim == 0 or x.shape[-1] % 2):
        raise ValueError(f"{name} takes the two halves of x (..., 2F), so its last axis must be even, not {x.shape}")
    check_dtypes(name, x)
    if name == CLAMPED:
        half = x.shape[-1] // 2
        a, b = x[..., :half], x[..., half:]
        a, b = where(a.data > 7, 7.0, a), where(np.abs(b.data) > 7, np.sign(b.data) * 7, b)
        return a * sigmoid(a * 1.702) * (b + 1)
    return record(kernels.activation(x.data, name), (x,), lambda g: (kernels.activation_backward(g, x.data, name),))


def gelu(x: Tensor) -> Tensor:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): the tanh form (Hendrycks & Gimpel 2016)."""
    return activation(x, "gelu")


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), also called swish (Hendrycks & Gimpel 2016)."""
    return activation(x, "silu")


def relu(x: Tensor) -> Tensor:
    """max(x, 0); the gradient at 0 is 0."""
    return activation(x, "relu")


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), without overflow and exact in both tails."""
    value = expit(x.data).astype(np.result_type(x.dtype, np.float16))  # SciPy widens float16
    return primitive(value, (x, lambda g: g * value * (1 - value)))


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), without overflow."""
    return primitive(np.logaddexp(x.data, np.zeros_like(x.data)), (x, lambda g: g * expit(x.data)))


def normal_cdf(x: Tensor) -> Tensor:
    """P(Z <= x) for a standard normal Z."""
    density = np.exp(-0.5 * x.data ** 2) / np.sqrt(2 * np.pi).astype(x.dtype)
    return primitive(ndtr(x.data).astype(density.dtype), (x, lambda g: g * density))


def _largest(x, axis):
    """x.max(axis, keepdims=True), in float64 for integers; -inf along an empty axis."""
    x = x if x.dtype.kind == "f" else x.astype(np.float64)  # so that x - largest is float64 too: in uint8 it would wrap
    if axis == -1 and x.ndim == 2 and x.shape[1] <= 64:  # NumPy is up to ten times faster on the transpose
        return np.ascontiguousarray(x.T).max(axis=0, initial=-np.inf)[:, None]
    return x.max(axis=axis, keepdims=True, initial=-np.inf)


def _exponentials(x, axis):
    """(top, exp(x - top)), where top is the largest entry."""
    top = _largest(x, axis)
    top = np.where(np.isinf(top), 0, top)  # a row of -inf has the sum 0, not NaN
    e = np.asarray(x - top)
    return top, np.exp(e, out=e)


def _shift(x, axis):
    """(top, rest): the largest entry and log sum exp(x - top). A large top + rest would round rest away."""
    top, e = _exponentials(x, axis)
    with np.errstate(divide="ignore"):
        return top, np.log(e.sum(axis=axis, keepdims=True))


def softmax(x: Tensor, axis: Axis = -1) -> Tensor:
    """exp(x) / sum exp(x) along an axis; -inf gives probability 0."""
    e = np.exp(x.data - _largest(x.data, axis))
    p = e / e.sum(axis=axis, keepdims=True)
    return primitive(p, (x, lambda g: p * (g - (g * p).sum(axis=axis, keepdims=True))))


def log_softmax(x: Tensor, axis: Axis = -1) -> Tensor:
    """x - logsumexp(x) along an axis."""
    top, rest = _shift(x.data, axis)
    value = x.data - top - rest
    return primitive(value, (x, lambda g: g - np.exp(value) * g.sum(axis=axis, keepdims=True)))


def logsumexp(x: Tensor, axis: Axis = -1) -> Tensor:
    """log sum exp(x) along an axis, which is removed."""
    top, rest = _shift(x.data, axis)
    value = top + rest
    return primitive(value.squeeze(axis), (x, lambda g: g.reshape(value.shape) * np.exp(x.data - top - rest)))


def cross_entropy(logits: Tensor, targets: ArrayLike) -> Tensor:
    """Mean over rows of -log softmax(logits)[target], in nats.

    logits (N, V), targets (N,) integers from 0 to V - 1. Raises ValueError for other shapes or targets.
    """
    targets = np.asarray(targets)
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"cross_entropy takes logits (N, V) and targets (N,), not {logits.shape} and {targets.shape}")
    n, v = logits.shape
    if n == 0 or targets.dtype.kind not in "iu" or targets.min() < 0 or targets.max() >= v:
        found = f"from {targets.min()} to {targets.max()}, {targets.dtype}" if n else "none"
        raise ValueError(f"targets must be at least one integer, each from 0 to {v - 1}; they are {found}")
    rows = np.arange(n)
    top, e = _exponentials(logits.data, -1)
    total = e.sum(axis=1, keepdims=True)
    nats = np.log(total[:, 0]) - (logits.data[rows, targets] - top[:, 0])  # -log softmax(logits)[target]

    def vjp(g):  # (softmax - one hot) g / n
        d = e * (g / n / total)
        d[rows, targets] -= g / n
        return d

    return primitive(nats.mean(), (logits, vjp))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight + bias for x (..., I), weight (I, O), bias (O,) or None -> (..., O). ValueError for other shapes."""
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[:1]:
        raise ValueError(f"linear takes x (..., I) and a weight (I, O), not {x.shape} and {weight.shape}")
    if bias is not None and bias.shape != weight.shape[1:]:
        raise ValueError(f"linear: the bias has shape {bias.shape}, but the weight gives {weight.shape[1]} features")
    parents = (x, weight) if bias is None else (x, weight, bias)
    check_dtypes("linear", *parents)
    rows = _rows(x.data)
    value = kernels.linear(rows, weight.data, None if bias is None else bias.data)

    def vjp(g):
        dx, dw, db = kernels.linear_backward(_rows(g), rows, weight.data)
        return (dx.reshape(x.shape), dw, db)[:len(parents)]

    return record(value.reshape(*x.shape[:-1], weight.shape[1]), parents, vjp)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis (Ba et al. 2016).

    x (..., D), weight (D,), bias (D,); the variance is the mean square of x - mean. ValueError for other shapes.
    """
    check_widths("layer_norm", x, weight, bias)
    rows = _rows(x.data)
    value, mean, rstd = kernels.layer_norm(rows, weight.data, bias.data, eps)

    def vjp(g):
        dx, dweight, dbias = kernels.layer_norm_backward(_rows(g), rows, weight.data, mean, rstd)
        return dx.reshape(x.shape), dweight, dbias

    return record(value.reshape(x.shape), (x, weight, bias), vjp)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019).

    x (..., D), weight (D,). ValueError for other shapes.
    """
    check_widths("rms_norm", x, weight)
    rstd = 1 / np.sqrt((x.data * x.data).mean(axis=-1, keepdims=True) + x.dtype.type(eps))
    normed = x.data * rstd

    def vjp_x(g):
        h = g * weight.data
        return rstd * (h - normed * (h * normed).mean(axis=-1, keepdims=True))

    return primitive(normed * weight.data, (x, vjp_x), (weight, lambda g: g * normed))


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for each head, over positions up to the query's own (Vaswani et al. 2017, eq. 1).

    q (B, T, H, d), k (B, T, G, d), v (B, T, G, dv) -> (B, T, H, dv). G divides H, and head h reads group h // (H // G)
    (grouped queries, Ainslie et al. 2023). Raises ValueError for shapes that do not fit together.
    """
    if not q.ndim == k.ndim == v.ndim == 4 or q.shape[:2] != v.shape[:2] or (
            k.shape != (*v.shape[:3], q.shape[3]) or 0 in k.shape[2:] or not q.shape[2] or q.shape[2] % k.shape[2]):
        raise ValueError(f"causal_attention takes q (B, T, H, d), k (B, T, G, d), v (B, T, G, dv), d > 0 and "
                         f"G dividing H, not {q.shape}, {k.shape}, {v.shape}")
    check_dtypes("causal_attention", q, k, v)
    # the backward pass of these kernels, also if `kernels.use` chooses others before it runs
    backward, heads = kernels.causal_attention_backward, (q.data, k.data, v.data)
    value, saved = kernels.causal_attention(*heads)
    return record(value, (q, k, v), lambda g: backward(g, *heads, saved))


def rotary(x: Tensor, base: float | np.ndarray = 10_000.0) -> Tensor:
    """Rotary positions (Su et al. 2021, eq. 34): x (B, T, H, d), d even -> the same shape. ValueError for others.

    Entries i and i + d/2 of a head at position t turn by the angle t base^(-2i/d). So positions enter the product of a
    query and a key through their distance alone. (The paper pairs 2i and 2i + 1: the same but for the entries' order.)
    base: the number in the formula; or an array (d/2,) that replaces base^(-2i/d).
    """
    if x.ndim != 4 or x.shape[-1] % 2 or np.shape(base) not in ((), (x.shape[-1] // 2,)):
        raise ValueError("rotary takes x (B, T, H, d), d even, and a base that is a number or (d/2,); not "
                         f"x {x.shape} and base {np.shape(base)}")
    check_dtypes("rotary", x)
    T, d = x.shape[1], x.shape[-1]
    angle = np.arange(T)[:, None] * (base if np.ndim(base) else base ** (-np.arange(0, d, 2) / d))  # (T, d/2)
    cos, sin = (f(angle)[:, None, :].astype(x.dtype) for f in (np.cos, np.sin))

    def turn(z, sin):
        a, b = z[..., :d // 2], z[..., d // 2:]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    return primitive(turn(x.data, sin), (x, lambda g: turn(g, -sin)))


def embedding(table: Tensor, ids: ArrayLike) -> Tensor:
    """Rows of a table (V, D) at integer ids of any shape -> (*ids.shape, D).

    Raises ValueError for a table of other axes, IndexError for ids that are not integers from 0 to V - 1.
    """
    ids = np.asarray(ids)
    check_dtypes("embedding", table)
    if table.ndim != 2:
        raise ValueError(f"embedding takes a table (V, D), not shape {table.shape}")
    if ids.dtype.kind not in "iu":
        raise IndexError(f"ids must be integers, not dtype {ids.dtype}")
    check_rows(ids, table.shape[0])
    return primitive(table.data[ids], (table, lambda g: kernels.add_rows(table.shape[0], ids.reshape(-1), _rows(g))))


def gather(x: Tensor, index: ArrayLike, axis: int | None = -1) -> Tensor:
    """out[..., i, ...] = x[..., index[..., i, ...], ...] along an axis, as `np.take_along_axis` does.

    The index may repeat entries, and it broadcasts with x along the other axes. axis None: x is flattened first.
    """
    if axis is None:
        return gather(x.reshape(-1), index, axis=0)
    index = np.asarray(index)

    def vjp(g):
        out = np.zeros(x.shape, x.dtype)
        places = list(np.ogrid[tuple(map(slice, x.shape))])
        places[axis] = index
        np.add.at(out, tuple(places), g)
        return out

    return primitive(np.take_along_axis(x.data, index, axis), (x, vjp))


def scatter_add(rows: Tensor, index: ArrayLike, n: int) -> Tensor:
    """out[i] = sum of rows[j] over j with index[j] = i. rows (M, ...), index (M,) integers in 0..n-1 -> (n, ...).

    Raises ValueError for other shapes, IndexError for an index out of range.
    """
    index = np.asarray(index)
    if rows.ndim == 0 or index.shape != rows.shape[:1] or index.dtype.kind not in "iu":
        raise ValueError(f"scatter_add takes rows (M, ...) and integers (M,), not {rows.shape} and {index.dtype} "
                         f"{index.shape}")
    check_rows(index, n)
    value = np.zeros((n, *rows.shape[1:]), rows.dtype)
    np.add.at(value, index, rows.data)
    return primitive(value, (rows, lambda g: g[index]))


def concatenate(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Join tensors along an existing axis. Arrays may be among them; integers take the dtype of the first Tensor."""
    tensors = _operands(tensors)
    ends = np.cumsum([t.shape[axis] for t in tensors])
    return record(np.concatenate([t.data for t in tensors], axis), tensors, lambda g: np.split(g, ends[:-1], axis))


def stack(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Join tensors (or arrays, as in `concatenate`) of one shape along a new axis. ValueError for others, or none."""
    tensors = _operands(tensors)
    if len(shapes := {t.shape for t in tensors}) != 1:
        raise ValueError(f"stack takes at least one tensor, all of one shape, not of the shapes {sorted(shapes)}")
    return record(np.stack([t.data for t in tensors], axis), tensors, lambda g: tuple(np.moveaxis(g, axis, 0)))


def _operands(tensors):
    tensors = tuple(tensors)
    first = next((t for t in tensors if isinstance(t, Tensor)), Tensor(0))
    return tuple(map(first._operand, tensors))


def where(condition: ArrayLike, a: Tensor | ArrayLike, b: Tensor | ArrayLike) -> Tensor:
    """a where the condition (booleans) holds, else b. The three broadcast; a and b may be arrays or numbers."""
    a = a if isinstance(a, Tensor) else b._operand(a) if isinstance(b, Tensor) else Tensor(a)
    b = a._operand(b)
    a = b._operand(a)
    condition = np.asarray(condition)
    return primitive(np.where(condition, a.data, b.data),
                     (a, lambda g: np.where(condition, g, 0)), (b, lambda g: np.where(condition, 0, g)))


# every function above takes arrays, too, where Tensors are due
globals().update(taking_arrays(globals()))
