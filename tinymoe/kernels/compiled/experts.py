"""The experts: each assigned row through its expert, and back."""
import numpy as np
from numba import prange

from ..reference import GATED
from .activations import activate, activate_backward, kind_of
from .compile import example, loop, pool
from .dense import add_bias, add_column_sums
from .product import ROWS, multiply
from .runtime import PIECE, SLICE, blocks, contiguous, get_threads, require
from .updates import is_below, scatter_add

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
SEGMENT = 256                               # rows of one partial weight gradient, at least
EXPERT, START, STOP, SLOT = range(4)        # columns of pieces (P,4): the expert, its rows start:stop, the slot
NO_SLOT = -1
PART = PIECE                                # rows that go through all products together, at most
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


@loop
def _part_rows(rows):
    """The rows of a part: a piece of so many rows is cut into nearly equal parts, of whole tiles."""
    return min(PART, ROWS * blocks(rows, ROWS * blocks(rows, PART)))


@loop
def _block(x, i, n, columns):
    """Block i of x, where blocks (n, columns) lie one after the other"""
    return x[n * columns * i:n * columns * (i + 1)].reshape(n, columns)


@loop
def _gather(x, index, rows):
    """rows = x[index]; faster than that, and than a copy of whole rows"""
    for i in range(index.size):
        source = index[i]
        for j in range(x.shape[1]):
            rows[i, j] = x[source, j]


@pool
def _experts_forward(x, token, plan, weights, kind, saved):
    """rows = x[token], before = rows w1 + b1, after = f(before), out = after w2 + b2

    `before` is flat. Of each part it has a block (rows, F), and where f is gated another one, of the factors.
    """
    (pieces, first_piece), (w1, b1, w2, b2), (rows, before, out) = plan, weights, saved
    wide, narrow = w1.shape[2], w2.shape[1]
    n_blocks = 2 if wide > narrow else 1
    for thread in prange(first_piece.size - 1):
        memory = np.empty(PART * narrow, x.dtype)
        for p in range(first_piece[thread], first_piece[thread + 1]):
            e, first, last, _ = pieces[p]
            step = _part_rows(last - first)
            for start in range(first, last, step):
                stop = min(start + step, last)
                part, n = slice(start, stop), stop - start
                hidden, after = before[start * wide:stop * wide], memory[:n * narrow]
                _gather(x, token[part], rows[part])
                for i in range(n_blocks):
                    block, columns = _block(hidden, i, n, narrow), slice(narrow * i, narrow * (i + 1))
                    multiply(rows[part], w1[e][:, columns], block, False)
                    add_bias(block, b1[e][columns])
                activate(hidden, after, kind)
                multiply(after.reshape(n, narrow), w2[e], out[part], False)
                add_bias(out[part], b2[e])


@loop
def _gate_backward(dy, token, gate, out, dout, dgate):
    """dout = gate dy[token], the gradient of an expert's output; dgate = dy[token] . out"""
    for i in range(token.size):
        n, inner = token[i], gate[i] - gate[i]
        for j in range(dy.shape[1]):
            dout[i, j] = gate[i] * dy[n, j]
            inner += dy[n, j] * out[i, j]
        dgate[i] = inner


@pool
def _experts_backward(dy, token, gate, plan, weights, kind, saved, d_rows, dgate, dw, partial):
    """dw: dw1, db1, dw2, db2, each (E,...); partial: the same for the slots, each (S,...)"""
    (pieces, first_piece), (w1, _, w2, _), (rows, before, out) = plan, weights, saved
    (width, wide), narrow = w1.shape[1:], w2.shape[1]
    n_blocks = 2 if wide > narrow else 1
    for thread in prange(first_piece.size - 1):
        memory = np.empty((4, PART * max(wide, width)), dy.dtype)
        for p in range(first_piece[thread], first_piece[thread + 1]):
            e, first, last, slot = pieces[p]
            step = _part_rows(last - first)
            dw1, db1, dw2, db2 = dw if slot == NO_SLOT else partial
            to = e if slot == NO_SLOT else slot
            db1[to] = 0
            db2[to] = 0
            for start in range(first, last, step):
                stop = min(start + step, last)
                part, n, later = slice(start, stop), stop - start, start > first
                dout, after = memory[0, :n * width].reshape(n, width), memory[1, :n * narrow]
                d_before = memory[2, :n * wide]
                d_after = memory[3 if wide > narrow else 2, :n * narrow]           # not gated: changed in place
                _gate_backward(dy, token[part], gate[part], out[part], dout, dgate[part])
                multiply(dout, w2[e].T, d_after.reshape(n, narrow), False)
                activate_backward(before[start * wide:stop * wide], after, d_after, d_before, kind)
                multiply(after.reshape(n, narrow).T, dout, dw2[to], later)
                add_column_sums(dout, db2[to])
                for i in range(n_blocks):
                    block, columns = _block(d_before, i, n, narrow), slice(narrow * i, narrow * (i + 1))
                    multiply(rows[part].T, block, dw1[to][:, columns], later)
                    multiply(block, w1[e][:, columns].T, d_rows[part], i > 0)
                    add_column_sums(block, db1[to][columns])


@loop
def _add_slots(total, slots, lo, hi, empty):
    """total[lo:hi] += the same elements of each slot, in order; `empty`: nothing was written there, so start at 0"""
    if empty:
        total[lo:hi] = 0
    for s in range(slots.shape[0]):
        for j in range(lo, hi):
            total[j] += slots[s, j]


@pool
def _add_partials(total, slots, first, empty):
    """A job is a slice of one expert's weights, so that threads share the work where one expert has all slots."""
    jobs = blocks(total.shape[1], SLICE)
    for job in prange(empty.size * jobs):
        e, lo = job // jobs, job % jobs * SLICE
        _add_slots(total[e], slots[first[e]:first[e + 1]], lo, min(lo + SLICE, total.shape[1]), empty[e])


def _add_all_partials(totals, slots, first, empty):
    """total[e] += the sum of slots[first[e]:first[e+1]] for each total (E,...); it starts at 0 where `empty` (E,)"""
    for total, partial in zip(totals, slots):
        size = total[0].size
        _add_partials(total.reshape(len(total), size), partial.reshape(len(partial), size), first, empty)


def _segment_rows(n):
    """Rows in a partial weight gradient. They grow beyond 32 segments, so that there are at most 32 partial sums."""
    return max(SEGMENT, blocks(n, 32))


def _require_fit(x, token, offsets, gate, weights, name):
    """Refuse weights of other shapes, and assignments beyond x."""
    w1, b1, w2, b2 = weights
    (E, D, wide), narrow = w1.shape, w2.shape[1]
    require(x.shape[1:] == (D,) and w2.shape == (E, narrow, D) and (b1.shape, b2.shape) == ((E, wide), (E, D))
            and wide == narrow * (2 if name in GATED else 1), x, gate, *weights)
    require(token.shape == gate.shape == offsets[-1:] and len(offsets) == E + 1 and is_below(token, len(x))
            and offsets[0] == 0 and (np.diff(offsets) >= 0).all(), token, offsets)


def _routed(ones):
    """Two rows, both at the first of two experts: the arguments of experts_forward."""
    weights = ones(2, 2, 2), ones(2, 2), ones(2, 2, 2), ones(2, 2)
    return ones(2, 2), np.array([0, 1]), np.array([0, 2, 2]), ones(2), weights, "gelu"


@example(lambda ones: experts_forward(*_routed(ones)))
def experts_forward(x, token, offsets, gate, weights, name):
    x, gate, *weights = map(contiguous, (x, gate, *weights))
    token, offsets = np.array(token, np.int64), np.array(offsets, np.int64)
    _require_fit(x, token, offsets, gate, weights, name)
    (D, F), A = weights[0].shape[1:], len(token)
    saved = *_, out = tuple(np.empty(shape, x.dtype) for shape in ((A, D), A * F, (A, D)))
    pieces, _, first_piece = _plan(offsets, _segment_rows(A), get_threads())
    _experts_forward(x, token, (pieces, first_piece), tuple(weights), kind_of(name), saved)
    y = np.zeros_like(x)
    scatter_add(y, token, gate, out)
    return y, saved


@example(lambda ones: experts_backward(ones(2, 2), *_routed(ones), (ones(2, 2), ones(4), ones(2, 2))))
def experts_backward(dy, x, token, offsets, gate, weights, name, saved):
    dy, gate, *weights = map(contiguous, (dy, gate, *weights))
    token, offsets = np.array(token, np.int64), np.array(offsets, np.int64)
    _require_fit(dy, token, offsets, gate, weights, name)
    saved, A, (D, wide) = tuple(map(contiguous, saved)), len(token), weights[0].shape[1:]
    require(tuple(z.shape for z in saved) == ((A, D), (A * wide,), (A, D)), dy, *saved)
    E, empty = len(offsets) - 1, np.diff(offsets) == 0
    pieces, first_slot, first_piece = _plan(offsets, _segment_rows(A), get_threads())
    dw, partial = (tuple(np.empty((n, *w.shape[1:]), dy.dtype) for w in weights) for n in (E, first_slot[-1]))
    d_rows, dgate = np.empty_like(saved[0]), np.empty_like(gate)
    _experts_backward(dy, token, gate, (pieces, first_piece), tuple(weights), kind_of(name), saved, d_rows, dgate,
                      dw, partial)
    if first_slot[-1] or empty.any():
        _add_all_partials(dw, partial, first_slot, empty)
    dx = np.zeros_like(dy)
    scatter_add(dx, token, np.ones_like(gate), d_rows)
    return dx, dgate, *dw
