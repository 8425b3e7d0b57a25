"""Functions of Tensors: activations, softmax family, losses, normalisation, lookups.

Each is one node of the graph with its VJP beside it. The ones that a training step spends its
time in call a compiled kernel; tests/naive.py holds their plain forms.
"""

import numpy as np
from scipy.special import ndtr

from . import kernels
from .tensor import Tensor, primitive, record


def _flat(x):
    """(..., D) as contiguous rows (N, D)."""
    return np.ascontiguousarray(x.reshape(-1, x.shape[-1]))


# -- activations --------------------------------------------------------------------------------

def activation(x, name):
    """The named activation: "gelu", "silu" or "relu"."""
    return record(kernels.activation(x.data, name), (x,), lambda g: (kernels.activation_backward(g, x.data, name),))


def gelu(x):
    """Gaussian error linear unit in its tanh form, x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (Hendrycks & Gimpel 2016)."""
    return activation(x, "gelu")


def silu(x):
    """x * sigmoid(x), also called swish (Hendrycks & Gimpel 2016)."""
    return activation(x, "silu")


def relu(x):
    """max(x, 0); the gradient at 0 is 0."""
    return activation(x, "relu")


def sigmoid(x):
    """1 / (1 + exp(-x)), computed by tanh so that it cannot overflow."""
    value = 0.5 * (1 + np.tanh(0.5 * x.data))
    return primitive(value, (x, lambda g: g * value * (1 - value)))


def softplus(x):
    """log(1 + exp(x)), without overflow."""
    return primitive(np.logaddexp(x.data, 0).astype(x.dtype),
                     (x, lambda g: g * 0.5 * (1 + np.tanh(0.5 * x.data))))


def normal_cdf(x):
    """P(Z <= x) for a standard normal Z."""
    density = np.exp(-0.5 * x.data ** 2) / np.sqrt(2 * np.pi).astype(x.dtype)
    return primitive(ndtr(x.data), (x, lambda g: g * density))


# -- softmax family -----------------------------------------------------------------------------

def _softmax(x, axis):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def softmax(x, axis=-1):
    """exp(x) / sum exp(x) along an axis; -inf gives probability 0."""
    p = _softmax(x.data, axis)
    return primitive(p, (x, lambda g: p * (g - (g * p).sum(axis=axis, keepdims=True))))


def log_softmax(x, axis=-1):
    """x - logsumexp(x) along an axis."""
    value = x.data - _logsumexp(x.data, axis)
    return primitive(value, (x, lambda g: g - np.exp(value) * g.sum(axis=axis, keepdims=True)))


def logsumexp(x, axis=-1):
    """log sum exp(x) along an axis, which is removed."""
    value = _logsumexp(x.data, axis)
    return primitive(value.squeeze(axis),
                     (x, lambda g: np.expand_dims(g, axis) * np.exp(x.data - value)))


def _logsumexp(x, axis):
    top = x.max(axis=axis, keepdims=True)
    top = np.where(np.isinf(top), 0, top)  # a row of -inf has the sum 0, not NaN
    with np.errstate(divide="ignore"):
        return top + np.log(np.exp(x - top).sum(axis=axis, keepdims=True))


def cross_entropy(logits, targets):
    """Mean over rows of -log softmax(logits)[target], in nats.

    logits (N, V), targets (N,) integers in 0..V-1. Raises ValueError for other shapes or targets.
    """
    targets = np.asarray(targets)
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"cross_entropy takes logits (N, V) and targets (N,), not {logits.shape} and {targets.shape}")
    n, v = logits.shape
    if n == 0 or targets.dtype.kind not in "iu" or targets.min() < 0 or targets.max() >= v:
        raise ValueError(f"targets must be at least one integer, each from 0 to {v - 1}")
    rows = np.arange(n)
    value = (_logsumexp(logits.data, -1)[:, 0] - logits.data[rows, targets]).mean()

    def vjp(g):
        d = _softmax(logits.data, -1)
        d[rows, targets] -= 1
        return d * (g / n)

    return primitive(value, (logits, vjp))


# -- layers' arithmetic -------------------------------------------------------------------------

def linear(x, weight, bias=None):
    """x @ weight + bias for x (..., I), weight (I, O), bias (O,) or None -> (..., O)."""
    if x.shape[-1] != weight.shape[0]:
        raise ValueError(f"linear: x has {x.shape[-1]} features, but the weight takes {weight.shape[0]}")
    rows = _flat(x.data)
    value = kernels.linear(rows, weight.data, None if bias is None else bias.data)

    def vjp(g):
        dx, dw, db = kernels.linear_backward(_flat(g), rows, weight.data)
        return (dx.reshape(x.shape), dw, db)[:2 + (bias is not None)]

    return record(value.reshape(*x.shape[:-1], -1), (x, weight) + ((bias,) if bias is not None else ()), vjp)


def layer_norm(x, weight, bias, eps=1e-5):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis (Ba et al. 2016).

    x (..., D), weight (D,), bias (D,); the variance is the population's.
    """
    rows = _flat(x.data)
    value, mean, rstd = kernels.layer_norm(rows, weight.data, bias.data, eps)

    def vjp(g):
        dx, dweight, dbias = kernels.layer_norm_backward(_flat(g), rows, weight.data, mean, rstd)
        return dx.reshape(x.shape), dweight, dbias

    return record(value.reshape(x.shape), (x, weight, bias), vjp)


def rms_norm(x, weight, eps=1e-5):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019). x (..., D), weight (D,)."""
    rstd = 1 / np.sqrt((x.data * x.data).mean(axis=-1, keepdims=True) + eps)
    normed = x.data * rstd

    def vjp_x(g):
        h = g * weight.data
        return rstd * (h - normed * (h * normed).mean(axis=-1, keepdims=True))

    return primitive((normed * weight.data).astype(x.dtype), (x, vjp_x), (weight, lambda g: g * normed))


def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(d), over positions <= own) v for each head (Vaswani et al. 2017, eq. 1).

    q (B, T, H, d), k (B, T, G, d), v (B, T, G, dv), where G divides H and head h reads group
    h // (H // G) (grouped queries, Ainslie et al. 2023) -> (B, T, H, dv).
    """
    value, probs = kernels.causal_attention(q.data, k.data, v.data)
    return record(value, (q, k, v), lambda g: kernels.causal_attention_backward(g, q.data, k.data, v.data, probs))


# -- lookups and joins --------------------------------------------------------------------------

def embedding(table, ids):
    """Rows of a table (V, D) at integer ids of any shape -> (*ids.shape, D). Raises IndexError out of range."""
    ids = np.asarray(ids)
    if ids.size and (ids.min() < 0 or ids.max() >= table.shape[0]):
        raise IndexError(f"ids run from {ids.min()} to {ids.max()}, but the table has rows 0 to {table.shape[0] - 1}")
    return primitive(table.data[ids],
                     (table, lambda g: kernels.add_rows(table.shape[0], ids.reshape(-1), _flat(g))))


def gather(x, index, axis=-1):
    """out[..., i, ...] = x[..., index[..., i, ...], ...] along an axis: `np.take_along_axis`, repeats allowed."""
    def vjp(g):
        out = np.zeros(x.shape, x.dtype)
        places = list(np.ogrid[tuple(map(slice, index.shape))])
        places[axis] = index
        np.add.at(out, tuple(places), g)
        return out

    return primitive(np.take_along_axis(x.data, index, axis), (x, vjp))


def scatter_add(rows, index, n):
    """out[i] = sum of rows[j] over j with index[j] = i. rows (M, ...), index (M,) in 0..n-1 -> (n, ...)."""
    value = np.zeros((n, *rows.shape[1:]), rows.dtype)
    np.add.at(value, index, rows.data)
    return primitive(value, (rows, lambda g: g[index]))


def concatenate(tensors, axis=0):
    """Join tensors along an axis that exists."""
    ends = np.cumsum([t.shape[axis] for t in tensors])

    def part(end, size):
        return lambda g: g.swapaxes(0, axis)[end - size:end].swapaxes(0, axis)

    return primitive(np.concatenate([t.data for t in tensors], axis),
                     *((t, part(end, t.shape[axis])) for t, end in zip(tensors, ends)))


def where(condition, a, b):
    """a where the condition (a boolean array) holds, else b; a and b are Tensors, arrays or numbers."""
    a = b._operand(a) if isinstance(b, Tensor) else Tensor(a)
    b = a._operand(b)
    condition = np.asarray(condition)
    return primitive(np.where(condition, a.data, b.data),
                     (a, lambda g: np.where(condition, g, 0)), (b, lambda g: np.where(condition, 0, g)))
