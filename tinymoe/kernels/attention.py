"""Causal attention with grouped queries. A task is one group of heads in one sequence: it owns dk and dv."""
import numpy as np
from numba import prange

from .activations import exp
from .threads import loop, plain, pool

QUERIES = 32            # query rows in a block: the part of the masked triangle that is computed anyway


@loop
def _read_head(x, h, start, out):
    """Rows from `start` on of head h of x (T,H,d), side by side."""
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
    """out += weights^T rows, in the first rows of out"""
    product = _space(weights.shape[1], rows.shape[1], rows)
    np.dot(weights.T, rows, product)
    for i in range(product.shape[0]):
        for j in range(product.shape[1]):
            out[i, j] += product[i, j]


@loop
def _softmax(scores, scale, n, probs):
    """The softmax of the first n scaled scores, in place and in probs; the future beyond them becomes zero."""
    highest = scores[0]
    for j in range(1, n):
        highest = scores[j] if scores[j] > highest else highest
    total = highest - highest
    for j in range(n):
        scores[j] = exp(scale * (scores[j] - highest))
        total += scores[j]
    for j in range(n):
        scores[j] /= total
        probs[j] = scores[j]
    scores[n:] = 0
    probs[n:] = 0


@loop
def _softmax_backward(probs, scale, p, dp):
    """p = probs up to the block's last key; dp becomes the gradient of q . k, scale p (dp - sum(p dp))."""
    inner = scale - scale
    for j in range(p.size):
        p[j] = probs[j]
        inner += p[j] * dp[j]
    for j in range(p.size):
        dp[j] = scale * p[j] * (dp[j] - inner)


@loop
def _attend(q, k, v, scale, out, probs, h):
    """Head h of q (T,H,d) with keys k (T,d), values v (T,dv): a block of queries sees keys up to its end."""
    T = len(k)
    for start in range(0, T, QUERIES):
        stop = min(T, start + QUERIES)
        n = stop - start
        q_block, scores, out_block = _space(n, q.shape[2], q), _space(n, stop, q), _space(n, v.shape[1], q)
        _read_head(q, h, start, q_block)
        np.dot(q_block, k[:stop].T, scores)
        for i in range(n):
            _softmax(scores[i], scale, start + i + 1, probs[h, start + i])
        np.dot(scores, v[:stop], out_block)
        _write_head(out_block, h, start, out)


@loop
def _attend_backward(dout, q, k, v, probs, scale, dq, dk, dv, h):
    """Head h; dk (T,d) and dv (T,dv) are added to, because the heads of a group share them."""
    T = len(k)
    for start in range(0, T, QUERIES):
        stop = min(T, start + QUERIES)
        n = stop - start
        q_block, dout_block = _space(n, q.shape[2], q), _space(n, v.shape[1], q)
        p, dp = _space(n, stop, q), _space(n, stop, q)
        _read_head(q, h, start, q_block)
        _read_head(dout, h, start, dout_block)
        np.dot(dout_block, v[:stop].T, dp)
        for i in range(n):
            _softmax_backward(probs[h, start + i], scale, p[i], dp[i])
        _add_product(p, dout_block, dv)
        _add_product(dp, q_block, dk)
        np.dot(dp, k[:stop], q_block)
        _write_head(q_block, h, start, dq)


@loop
def _panel(x, g):
    """Group g of x (T,G,d), its rows side by side."""
    panel = _space(x.shape[0], x.shape[2], x)
    _read_head(x, g, 0, panel)
    return panel


@loop
def _attend_group(q, k, v, scale, out, probs, g):
    """All heads of group g in one sequence."""
    heads = q.shape[1] // k.shape[1]
    k_panel, v_panel = _panel(k, g), _panel(v, g)
    for h in range(g * heads, (g + 1) * heads):
        _attend(q, k_panel, v_panel, scale, out, probs, h)


@loop
def _attend_group_backward(dout, q, k, v, probs, scale, dq, dk, dv, g):
    heads = q.shape[1] // k.shape[1]
    k_panel, v_panel = _panel(k, g), _panel(v, g)
    dk_panel, dv_panel = np.zeros_like(k_panel), np.zeros_like(v_panel)
    for h in range(g * heads, (g + 1) * heads):
        _attend_backward(dout, q, k_panel, v_panel, probs, scale, dq, dk_panel, dv_panel, h)
    _write_head(dk_panel, g, 0, dk)
    _write_head(dv_panel, g, 0, dv)


@pool
def _attention(q, k, v, scale, out, probs):
    G = k.shape[2]
    for task in prange(q.shape[0] * G):
        b = task // G
        _attend_group(q[b], k[b], v[b], scale, out[b], probs[b], task % G)


@pool
def _attention_backward(dout, q, k, v, probs, scale, dq, dk, dv):
    G = k.shape[2]
    for task in prange(q.shape[0] * G):
        b = task // G
        _attend_group_backward(dout[b], q[b], k[b], v[b], probs[b], scale, dq[b], dk[b], dv[b], task % G)


def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v over the past (Vaswani et al. 2017), H a multiple of G (Ainslie et al. 2023):
    head h of q (B,T,H,d) reads group h // (H / G) of k (B,T,G,d) and v (B,T,G,dv).

    Returns out (B,T,H,dv) and probs (B,H,T,T). Within a block of queries the future weighs zero, but is
    multiplied: a NaN in v can reach earlier rows of its own block.
    """
    q, k, v = plain(q), plain(k), plain(v)
    B, T, H, d = q.shape
    out, probs = np.empty((B, T, H, v.shape[3]), q.dtype), np.empty((B, H, T, T), q.dtype)
    _attention(q, k, v, q.dtype.type(d**-0.5), out, probs)
    return out, probs


def causal_attention_backward(dout, q, k, v, probs):
    """-> dq, dk, dv"""
    dout, q, k, v, probs = map(plain, (dout, q, k, v, probs))
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    _attention_backward(dout, q, k, v, probs, q.dtype.type(q.shape[3]**-0.5), dq, dk, dv)
    return dq, dk, dv
