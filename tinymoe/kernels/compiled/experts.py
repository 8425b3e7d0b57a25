"""The experts: each assigned row through its expert, and back."""
import numpy as np
from numba import prange

from ..reference import GATED
from .activations import KINDS, activate, activate_backward
from .compile import example, loop, pool
from .dense import add_bias, add_partials, column_sums, segment_rows
from .runtime import PIECE, blocks, contiguous, get_threads
from .updates import scatter_add

# The plan cuts each expert's assignments into pieces, here of at most 4 rows and for 2 threads:
#
#   expert        0                     1        2        3
#   rows          0 1 2 3 4 5 6 7 8 9   10 11    (none)   12 13 14 15 16
#   pieces        |0----|1----|2------| |3---|            |4---|5-------|
#   slot          -1    0     1         -1                -1   2
#   first_slot    0                     2        2        2                     3
#   first_piece   0 (thread 0)          3 (thread 1)                            6
#
# The first piece of an expert writes its weight gradient to its place (NO_SLOT). Each other piece writes a partial sum
# to a slot. The slots first_slot[e]:first_slot[e+1] are added to expert e later.
# Thread t takes the pieces first_piece[t]:first_piece[t+1], so that all threads finish at nearly the same time.
EXPERT, START, STOP, SLOT = range(4)        # columns of pieces (P,4): the expert, its rows start:stop, the slot
NO_SLOT = -1
FIXED_ROWS = 16                             # a piece costs the time of its rows and of this many more


@loop
def _plan(offsets, limit, n_threads):
    """offsets (E+1,) -> pieces (P,4) of at most `limit` rows, first_slot (E+1,), first_piece (threads+1,): see above"""
    E, P = offsets.size - 1, 0
    first_slot, first_piece = np.zeros(E + 1, np.int64), np.zeros(n_threads + 1, np.int64)
    pieces = np.empty((blocks(offsets[E], limit) + E, 4), np.int64)      # at most so many
    for e in range(E):
        start, count = offsets[e], offsets[e + 1] - offsets[e]
        n = blocks(count, limit)
        for i in range(n):
            pieces[P, EXPERT], pieces[P, SLOT] = e, first_slot[e] + i - 1 if i > 0 else NO_SLOT
            pieces[P, START], pieces[P, STOP] = start + count * i // n, start + count * (i + 1) // n
            P += 1
        first_slot[e + 1] = first_slot[e] + max(n - 1, 0)
    cost, done, t = offsets[E] + FIXED_ROWS * P, 0, 1
    for p in range(P):
        own = pieces[p, STOP] - pieces[p, START] + FIXED_ROWS
        while t < n_threads and (2 * done + own) * n_threads > 2 * cost * t:     # its middle is past the thread's end
            first_piece[t] = p
            t += 1
        done += own
    first_piece[t:] = P
    return pieces[:P], first_slot, first_piece


@pool
def _experts_forward(x, token, pieces, first_piece, w1, b1, w2, b2, kind, rows, before, out):
    """A piece: rows = x[token], before = rows w1 + b1, after = f(before), out = after w2 + b2"""
    for thread in prange(first_piece.size - 1):
        after = np.empty((PIECE, w2.shape[1]), x.dtype)
        for p in range(first_piece[thread], first_piece[thread + 1]):
            e, start, stop, _ = pieces[p]
            part, n = slice(start, stop), stop - start
            rows[part] = x[token[part]]
            np.dot(rows[part], w1[e], before[part])
            add_bias(before[part], b1[e])
            for i in range(n):
                activate(before[start + i], after[i], kind)
            np.dot(after[:n], w2[e], out[part])
            add_bias(out[part], b2[e])


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
    """From the gradient of a piece's output to all other gradients, while its rows are in cache.

    An activation without a gate is differentiated in place: d_after is then the same array as d_before.
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
def _experts_backward(dy, token, gate, pieces, limit, first_piece, w1, w2, kind, gated, rows, before, out,
                      d_rows, dgate, dw, partial):
    """dw: dw1, db1, dw2, db2, each (E,...); partial: the same for the slots, each (S,...)"""
    for thread in prange(first_piece.size - 1):
        dout, after = np.empty((limit, dy.shape[1]), dy.dtype), np.empty((limit, w2.shape[1]), dy.dtype)
        d_before = np.empty((limit, before.shape[1]), dy.dtype)
        d_after = np.empty_like(after) if gated else d_before
        for p in range(first_piece[thread], first_piece[thread + 1]):
            e, start, stop, slot = pieces[p]
            part, n = slice(start, stop), stop - start
            dw1, db1, dw2, db2 = dw if slot == NO_SLOT else partial
            to = e if slot == NO_SLOT else slot
            _gate_backward(dy, token[part], gate[part], out[part], dout[:n], dgate[part])
            _expert_piece_backward(dout[:n], w1[e], w2[e], kind, rows[part], before[part], after[:n],
                                   d_after[:n], d_before[:n], d_rows[part], dw1[to], db1[to], dw2[to], db2[to])


def _routed(ones):
    """Two rows, both at the first of two experts: the arguments of experts_forward."""
    weights = ones(2, 2, 2), ones(2, 2), ones(2, 2, 2), ones(2, 2)
    return ones(2, 2), np.array([0, 1]), np.array([0, 2, 2]), ones(2), weights, "gelu"


@example(lambda ones: experts_forward(*_routed(ones)))
def experts_forward(x, token, offsets, gate, weights, name):
    x, gate, w1, b1, w2, b2 = map(contiguous, (x, gate, *weights))
    token, offsets = np.array(token, np.int64), np.asarray(offsets, np.int64)
    rows, before, out = (np.empty((len(token), n), x.dtype) for n in (x.shape[1], w1.shape[2], x.shape[1]))
    pieces, _, first_piece = _plan(offsets, PIECE, get_threads())
    _experts_forward(x, token, pieces, first_piece, w1, b1, w2, b2, KINDS[name], rows, before, out)
    y = np.zeros_like(x)
    scatter_add(y, token, gate, out)
    return y, (rows, before, out)


@example(lambda ones: experts_backward(ones(2, 2), *_routed(ones), (ones(2, 2), ones(2, 2), ones(2, 2))))
def experts_backward(dy, x, token, offsets, gate, weights, name, saved):
    (w1, b1, w2, b2), (rows, before, out) = weights, saved
    dy, gate, w1, w2 = map(contiguous, (dy, gate, w1, w2))
    token, offsets = np.array(token, np.int64), np.asarray(offsets, np.int64)
    E, empty = len(w1), np.diff(offsets) == 0
    limit = segment_rows(len(token))
    pieces, first_slot, first_piece = _plan(offsets, limit, get_threads())
    dw, partial = (tuple(np.empty((n, *w.shape[1:]), dy.dtype) for w in (w1, b1, w2, b2)) for n in (E, first_slot[-1]))
    d_rows, dgate = np.empty_like(rows), np.empty_like(gate)
    _experts_backward(dy, token, gate, pieces, limit, first_piece, w1, w2, KINDS[name], name in GATED,
                      rows, before, out, d_rows, dgate, dw, partial)
    if first_slot[-1] or empty.any():
        add_partials(dw, partial, first_slot, empty)
    dx = np.zeros_like(dy)
    scatter_add(dx, token, np.ones_like(gate), d_rows)
    return dx, dgate, *dw
