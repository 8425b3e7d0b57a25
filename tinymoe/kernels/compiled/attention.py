"""Causal attention with grouped queries. A task is one group of heads in one sequence, which share dk and dv."""
import numpy as np
from numba import prange

from .activations import exp
from .compile import example, loop, pool
from .runtime import contiguous

QUERIES = 64            # queries in a block: within a block, the masked half is computed too


@loop
def _read_head(x, h, start, out):
    """out (n,d) = rows start to start + n of head h of x (T,H,d)"""
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = x[start + i, h, j]


@loop
def _write_head(rows, h, start, out):
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            out[start + i, h, j] = rows[i, j]


@loop
def _space(n, m, like):
    return np.empty((n, m), like.dtype)


@loop
def _add_product(weights, rows, out):
    """out += weights rows, in the first rows of out"""
    product = _space(weights.shape[0], rows.shape[1], rows)
    np.dot(weights, rows, product)
    for i in range(product.shape[0]):
        for j in range(product.shape[1]):
            out[i, j] += product[i, j]


@loop
def _block(saved, n, keys, done):
    """The weights of n queries over `keys` keys, in `saved` after `done` others: (keys,n), a column for each query"""
    return saved[done:done + keys * n].reshape(keys, n)


@loop
def _softmax(scores, scale, start):
    """scores (keys,n) become softmax(scale scores) of each column, in place; query i sees the keys up to start + i.

    Each inner loop is elementwise over the queries of the block.
    """
    keys, n = scores.shape
    highest, total = np.full(n, -np.inf, scores.dtype), np.zeros(n, scores.dtype)
    for j in range(keys):
        scores[j, :max(0, j - start)] = -np.inf
        for i in range(n):
            highest[i] = scores[j, i] if scores[j, i] > highest[i] else highest[i]
    for j in range(keys):
        for i in range(n):
            scores[j, i] = exp(scale * (scores[j, i] - highest[i]))
            total[i] += scores[j, i]
    for j in range(keys):
        for i in range(n):
            scores[j, i] /= total[i]


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
def _attend(q, k, v, scale, out, saved, h):
    """Head h of q (T,H,d) with k (T,d) and v (T,dv): each block of queries reads the keys up to its end."""
    T, done = len(k), 0
    for start in range(0, T, QUERIES):
        stop = min(T, start + QUERIES)
        n = stop - start
        q_block, out_block, weights = _space(n, q.shape[2], q), _space(n, v.shape[1], q), _block(saved, n, stop, done)
        _read_head(q, h, start, q_block)
        np.dot(k[:stop], q_block.T, weights)
        _softmax(weights, scale, start)
        np.dot(weights.T, v[:stop], out_block)
        _write_head(out_block, h, start, out)
        done += weights.size


@loop
def _attend_backward(dout, q, k, v, saved, scale, dq, dk, dv, h):
    """Head h adds to dk (T,d) and dv (T,dv), because the heads of a group share them."""
    T, done = len(k), 0
    for start in range(0, T, QUERIES):
        stop = min(T, start + QUERIES)
        n = stop - start
        q_block, dout_block, weights = _space(n, q.shape[2], q), _space(n, v.shape[1], q), _block(saved, n, stop, done)
        d = _space(stop, n, q)
        _read_head(q, h, start, q_block)
        _read_head(dout, h, start, dout_block)
        np.dot(v[:stop], dout_block.T, d)
        _softmax_backward(weights, scale, d)
        _add_product(weights, dout_block, dv)
        _add_product(d, q_block, dk)
        np.dot(d.T, k[:stop], q_block)
        _write_head(q_block, h, start, dq)
        done += weights.size


@loop
def _panel(x, g):
    """Group g of x (T,G,d) as a contiguous (T,d)"""
    panel = _space(x.shape[0], x.shape[2], x)
    _read_head(x, g, 0, panel)
    return panel


@pool
def _attention(q, k, v, scale, out, saved):
    G, heads = k.shape[2], q.shape[2] // k.shape[2]
    for task in prange(q.shape[0] * G):
        b, g = task // G, task % G
        k_panel, v_panel = _panel(k[b], g), _panel(v[b], g)
        for h in range(g * heads, (g + 1) * heads):
            _attend(q[b], k_panel, v_panel, scale, out[b], saved[b, h], h)


@pool
def _attention_backward(dout, q, k, v, saved, scale, dq, dk, dv):
    G, heads = k.shape[2], q.shape[2] // k.shape[2]
    for task in prange(q.shape[0] * G):
        b, g = task // G, task % G
        k_panel, v_panel = _panel(k[b], g), _panel(v[b], g)
        dk_panel, dv_panel = np.zeros_like(k_panel), np.zeros_like(v_panel)
        for h in range(g * heads, (g + 1) * heads):
            _attend_backward(dout[b], q[b], k_panel, v_panel, saved[b, h], scale, dq[b], dk_panel, dv_panel, h)
        _write_head(dk_panel, g, 0, dk[b])
        _write_head(dv_panel, g, 0, dv[b])


@example(lambda ones: causal_attention(*[ones(1, 2, 1, 2)] * 3))
def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v over the positions up to the query's own (Vaswani et al. 2017). Head h of q (B,T,H,d)
    reads group h // (H/G) of k (B,T,G,d), v (B,T,G,dv) (Ainslie et al. 2023) -> (B,T,H,dv), the softmax block by block

    Within a block of queries, later values are multiplied by 0. So a NaN in v can reach earlier rows of its block.
    """
    q, k, v = map(contiguous, (q, k, v))
    B, T, H, d = q.shape
    out = np.empty((B, T, H, v.shape[3]), q.dtype)
    saved = np.empty((B, H, sum(min(QUERIES, T - i) * min(i + QUERIES, T) for i in range(0, T, QUERIES))), q.dtype)
    _attention(q, k, v, q.dtype.type(d**-0.5), out, saved)
    return out, saved


@example(lambda ones: causal_attention_backward(*[ones(1, 2, 1, 2)] * 4, ones(1, 1, 4)))
def causal_attention_backward(dy, q, k, v, p):
    """-> dq, dk, dv; p is the second result of causal_attention"""
    dy, q, k, v, p = map(contiguous, (dy, q, k, v, p))
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    _attention_backward(dy, q, k, v, p, q.dtype.type(q.shape[3]**-0.5), dq, dk, dv)
    return dq, dk, dv
