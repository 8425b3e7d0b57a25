"""A mixture's experts: each assigned row through its expert, and back."""
import numpy as np
from numba import prange

from .activations import ACTIVATIONS, activate, activate_backward
from .dense import add_bias, add_partials, column_sums, segment_rows
from .runtime import PIECE, blocks, get_threads, loop, plain, pool
from .updates import scatter_add


@loop
def _plan(offsets, limit, n_threads):
    """Cut each expert's assignments into equal pieces of at most `limit` -> pieces (P,4), first (E+1,), shares

    A piece is expert, start, stop, slot. An expert's first piece writes its weight gradient straight to where
    it belongs, with slot -1; the others to the partial sums first[e]:first[e+1], which are added later.
    Thread t takes pieces shares[t]:shares[t+1], near equal in rows; a piece costs 16 rows more than it has.
    """
    E, P, cost = offsets.size - 1, 0, 0
    first, shares = np.empty(E + 1, np.int64), np.zeros(n_threads + 1, np.int64)
    pieces = np.empty((blocks(offsets[E], limit) + E, 4), np.int64)      # at most so many
    first[0] = 0
    for e in range(E):
        start, count = offsets[e], offsets[e + 1] - offsets[e]
        n = blocks(count, limit)
        for i in range(n):
            pieces[P, 0], pieces[P, 1], pieces[P, 2] = e, start + count * i // n, start + count * (i + 1) // n
            pieces[P, 3] = first[e] + i - 1 if i > 0 else -1
            cost += pieces[P, 2] - pieces[P, 1] + 16
            P += 1
        first[e + 1] = first[e] + max(n - 1, 0)
    done, t = 0, 1
    for p in range(P):
        rows = pieces[p, 2] - pieces[p, 1] + 16
        while t < n_threads and (2 * done + rows) * n_threads > 2 * cost * t:    # its middle is past the bound
            shares[t] = p
            t += 1
        done += rows
    shares[t:] = P
    return pieces[:P], first, shares


@loop
def _gather(x, token, out):
    for i in range(token.size):
        for j in range(out.shape[1]):
            out[i, j] = x[token[i], j]


@loop
def _expert_piece(x, token, w1, b1, w2, b2, kind, rows, before, after, out):
    """rows = x[token], before = rows w1 + b1, after = f(before), out = after w2 + b2"""
    _gather(x, token, rows)
    np.dot(rows, w1, before)
    for i in range(token.size):
        for j in range(before.shape[1]):
            before[i, j] += b1[j]
        activate(before[i], after[i], kind)
    np.dot(after, w2, out)
    add_bias(out, b2)


@pool
def _experts_forward(x, token, pieces, shares, w1, b1, w2, b2, kind, rows, before, out):
    for thread in prange(shares.size - 1):
        after = np.empty((PIECE, w2.shape[1]), x.dtype)
        for p in range(shares[thread], shares[thread + 1]):
            e, start, stop, _ = pieces[p]
            part = slice(start, stop)
            _expert_piece(x, token[part], w1[e], b1[e], w2[e], b2[e], kind,
                          rows[part], before[part], after[:stop - start], out[part])


@loop
def _gate_backward(dy, token, gate, out, dout, dgate):
    """dout = gate dy[token], the gradient of an expert's output; dgate = dy[token] . out"""
    for i in range(token.size):
        inner = gate[i] - gate[i]
        for j in range(out.shape[1]):
            g = dy[token[i], j]
            inner += g * out[i, j]
            dout[i, j] = gate[i] * g
        dgate[i] = inner


@loop
def _expert_piece_backward(dout, w1, w2, kind, rows, before, after, d_after, d_before, d_rows, dw1, db1, dw2, db2):
    """From the gradient of a piece's output to everything else, while its rows are in cache.

    Where the activation is not gated, d_after becomes d_before in place: they are the same array.
    """
    np.dot(dout, w2.T, d_after)
    for i in range(before.shape[0]):
        activate_backward(before[i], after[i], d_after[i], d_before[i], kind)
    np.dot(after.T, dout, dw2)
    np.dot(rows.T, d_before, dw1)
    np.dot(d_before, w1.T, d_rows)
    column_sums(dout, db2)
    column_sums(d_before, db1)


@pool
def _experts_backward(dy, token, gate, pieces, shares, w1, w2, kind, rows, before, out, d_rows, dgate, dw, partial):
    for thread in prange(shares.size - 1):
        first, last, most = shares[thread], shares[thread + 1], 0
        for p in range(first, last):
            most = max(most, pieces[p, 2] - pieces[p, 1])
        dout, after = np.empty((most, dy.shape[1]), dy.dtype), np.empty((most, w2.shape[1]), dy.dtype)
        d_before = np.empty((most, before.shape[1]), dy.dtype)
        d_after = d_before if after.shape == d_before.shape else np.empty_like(after)
        for p in range(first, last):
            e, start, stop, slot = pieces[p]
            part, n = slice(start, stop), stop - start
            dw1, db1, dw2, db2 = dw if slot < 0 else partial
            to = e if slot < 0 else slot
            _gate_backward(dy, token[part], gate[part], out[part], dout[:n], dgate[part])
            _expert_piece_backward(dout[:n], w1[e], w2[e], kind, rows[part], before[part], after[:n],
                                   d_after[:n], d_before[:n], d_rows[part], dw1[to], db1[to], dw2[to], db2[to])


def experts_forward(x, token, offsets, gate, w1, b1, w2, b2, name):
    """y[n] = the sum of gate[a] (f(x[n] w1[e] + b1[e]) w2[e] + b2[e]) over the assignments a of token n

    x (N,D); token (A,) sorted by expert, then by token; expert e has offsets[e]:offsets[e+1]; gate (A,);
    w1 (E,D,F), b1 (E,F), w2 (E,F,D), b2 (E,D); w1 and b1 are twice as wide for "geglu" and "swiglu". Returns
    y (N,D), zero for a token without assignment, and what experts_backward needs.
    """
    x, gate, w1, b1, w2, b2 = map(plain, (x, gate, w1, b1, w2, b2))
    token, offsets = np.array(token, np.int64), np.asarray(offsets, np.int64)
    rows, before = np.empty((len(token), x.shape[1]), x.dtype), np.empty((len(token), w1.shape[2]), x.dtype)
    out = np.empty_like(rows)
    pieces, _, shares = _plan(offsets, PIECE, get_threads())
    _experts_forward(x, token, pieces, shares, w1, b1, w2, b2, ACTIVATIONS[name], rows, before, out)
    y = np.zeros_like(x)
    scatter_add(y, token, gate, out)
    return y, (rows, before, out)


def experts_backward(dy, x, token, offsets, gate, w1, b1, w2, b2, name, saved):
    """-> dx, dgate, dw1, db1, dw2, db2; zeros for the weights of an expert without assignments"""
    dy, gate, w1, w2 = map(plain, (dy, gate, w1, w2))
    token, offsets = np.array(token, np.int64), np.asarray(offsets, np.int64)
    rows, before, out = saved
    E, empty = len(w1), np.diff(offsets) == 0
    pieces, first, shares = _plan(offsets, segment_rows(len(token)), get_threads())
    dw, partial = (tuple(np.empty((n, *w.shape[1:]), dy.dtype) for w in (w1, b1, w2, b2)) for n in (E, first[-1]))
    d_rows, dgate = np.empty_like(rows), np.empty_like(gate)
    _experts_backward(dy, token, gate, pieces, shares, w1, w2, ACTIVATIONS[name], rows, before, out,
                      d_rows, dgate, dw, partial)
    if len(partial[0]) or empty.any():
        add_partials(*dw[:2], *partial[:2], first, empty)
        add_partials(*dw[2:], *partial[2:], first, empty)
    dx = np.zeros_like(dy)
    scatter_add(dx, token, np.ones_like(gate), d_rows)
    return dx, dgate, *dw
