"""Causal attention with grouped queries. A task is one group of heads in one sequence, which share dk and dv."""
import numpy as np
from numba import prange

from .activations import exp
from .compile import example, loop, pool
from .product import multiply
from .runtime import contiguous, require

# Queries in a block. Within a block the masked half is computed too, and later values are multiplied by 0: a NaN in v
# can reach earlier rows of its block.
QUERIES = 32


@loop
def _block(saved, n, keys, done):
    """The weights of n queries over `keys` keys, in `saved` after `done` others: (keys,n), a column for each query"""
    return saved[done:done + keys * n].reshape(keys, n)


@loop
def _softmax(scores, start):
    """scores (keys,n) become the softmax of each column, in place; query i sees the keys up to start + i.

    Each inner loop is elementwise over the queries of the block.
    """
    keys, n = scores.shape
    highest, total = np.full(n, -np.inf, scores.dtype), np.zeros(n, scores.dtype)
    for j in range(keys):
        scores[j, :max(0, j - start)] = -np.inf
        for i in range(n):
            highest[i] = np.maximum(highest[i], scores[j, i])
    for j in range(keys):
        for i in range(n):
            scores[j, i] = exp(scores[j, i] - highest[i])
            total[i] += scores[j, i]
    for i in range(n):
        total[i] = 1 / total[i]
    for j in range(keys):
        for i in range(n):
            scores[j, i] *= total[i]


@loop
def _softmax_backward(probs, scale, d):
    """d (keys,n), the gradient of probs, becomes that of q . k, in place: scale p (d - sum of p d over the column)"""
    keys, n = probs.shape
    inner = np.zeros(n, probs.dtype)
    for j in range(keys):
        for i in range(n):
            inner[i] += probs[j, i] * d[j, i]
    for j in range(keys):
        for i in range(n):
            d[j, i] = scale * probs[j, i] * (d[j, i] - inner[i])


@loop
def _attend(q, k, v, scale, out, saved):
    """One head of q (T,d) with k (T,d) and v (T,dv): each block of queries reads the keys up to its end."""
    T, done = len(k), 0
    for start in range(0, T, QUERIES):
        stop = min(T, start + QUERIES)
        weights = _block(saved, stop - start, stop, done)
        multiply(k[:stop], scale * q[start:stop].T, weights, False)
        _softmax(weights, start)
        multiply(weights.T, v[:stop], out[start:stop], False)
        done += weights.size


@loop
def _attend_backward(dout, q, k, v, saved, scale, dq, dk, dv):
    """One head adds to dk (T,d) and dv (T,dv), because the heads of a group share them."""
    T, done = len(k), 0
    for start in range(0, T, QUERIES):
        stop = min(T, start + QUERIES)
        weights = _block(saved, stop - start, stop, done)
        d = np.empty_like(weights)
        multiply(v[:stop], dout[start:stop].T.copy(), d, False)
        _softmax_backward(weights, scale, d)
        multiply(weights, dout[start:stop], dv[:stop], True)
        multiply(d, q[start:stop], dk[:stop], True)
        multiply(d.T, k[:stop], dq[start:stop], False)
        done += weights.size


@pool
def _attention(q, k, v, scale, out, saved):
    G, heads = k.shape[2], q.shape[2] // k.shape[2]
    for task in prange(q.shape[0] * G):
        b, g = task // G, task % G
        for h in range(g * heads, (g + 1) * heads):
            _attend(q[b, :, h], k[b, :, g], v[b, :, g], scale, out[b, :, h], saved[b, h])


@pool
def _attention_backward(dout, q, k, v, saved, scale, dq, dk, dv):
    G, heads = k.shape[2], q.shape[2] // k.shape[2]
    for task in prange(q.shape[0] * G):
        b, g = task // G, task % G
        for h in range(g * heads, (g + 1) * heads):
            _attend_backward(dout[b, :, h], q[b, :, h], k[b, :, g], v[b, :, g], saved[b, h], scale, dq[b, :, h],
                             dk[b, :, g], dv[b, :, g])


def _shapes(q, k, v):
    """Shapes of the output and of what is saved."""
    (B, T, H, d), (G, dv) = q.shape, v.shape[2:]
    require(k.shape == (B, T, G, d) and v.shape[:2] == (B, T) and G > 0 and H % G == 0, q, k, v)
    return (B, T, H, dv), (B, H, sum(min(QUERIES, T - i) * min(i + QUERIES, T) for i in range(0, T, QUERIES)))


@example(lambda ones: causal_attention(*[ones(1, 2, 1, 2)] * 3))
def causal_attention(q, k, v):
    q, k, v = map(contiguous, (q, k, v))
    out, saved = (np.empty(shape, q.dtype) for shape in _shapes(q, k, v))
    _attention(q, k, v, q.dtype.type(q.shape[3]**-0.5), out, saved)
    return out, saved


@example(lambda ones: causal_attention_backward(*[ones(1, 2, 1, 2)] * 4, ones(1, 1, 4)))
def causal_attention_backward(dy, q, k, v, p):
    dy, q, k, v, p = map(contiguous, (dy, q, k, v, p))
    require((dy.shape, p.shape) == _shapes(q, k, v), dy, q, k, v, p)
    dq, dk, dv = np.empty_like(q), np.zeros_like(k), np.zeros_like(v)
    _attention_backward(dy, q, k, v, p, q.dtype.type(q.shape[3]**-0.5), dq, dk, dv)
    return dq, dk, dv
