"""Compiled kernels: arrays in, arrays out. The only file that imports numba.

The plan, the same for every kernel:

- **One thread pool.** Threads are numba's; BLAS runs inside them at one thread (`tinymoe/__init__.py` sees to that), because two pools
  that spin starve each other. A matrix product is `np.dot(a, b, out)` on contiguous operands, as fast in a kernel as from NumPy.
- **Pieces.** Work is cut into pieces of rows that fit in cache, and a piece is carried through everything that can be done with it:
  for an expert, gather, multiply, add the bias, activate, multiply. A piece never crosses from one expert to the next, and an expert
  with many tokens is simply many pieces, so collapsed routing costs no more than balanced routing.
- **Ownership.** A piece's rows belong to one thread. Where many rows add into one place (weight gradients, the sum over a token's
  experts), either each thread owns columns of the result, or each piece writes a partial sum of its own.
- **Determinism.** Where pieces begin and end depends on sizes and routing, never on the number of threads, and partial sums are added in
  a fixed order: the same bits on every run and for every thread count.

A public function makes its inputs contiguous, allocates and plans; the private functions under it compute. Nothing is validated here.

Axes: N tokens, D width, F hidden width, E experts, A assignments, P pieces, B batch, T time, H heads, G key-value heads.
"""
import math
import time

import numba
import numpy as np
import threadpoolctl
from numba import njit, prange
from numba.extending import overload

PIECE = 128             # rows a piece carries through an expert: its hidden activations stay in the second-level cache
SEGMENT = 256           # rows summed into one partial weight gradient
SLICE = 1 << 13         # elements in a piece of an elementwise pass
COLUMNS = 32            # columns one thread owns in a scatter-add: two cache lines of float32
QUERIES = 32            # query rows in a block of attention: the part of the masked triangle that is computed anyway
GELU, SILU, RELU = range(3)
ACTIVATIONS = {"gelu": GELU, "silu": SILU, "relu": RELU}


def _cache_works():
    """numba looks for a folder to keep compiled code in when it decorates, and raises if none can be written."""
    try:
        njit(cache=True)(_cache_works)
    except RuntimeError:
        return False
    return True


# Fast arithmetic without 'nnan' and 'ninf': a NaN must stay a NaN. 'reassoc' lets sums vectorise.
_OPTIONS = dict(cache=_cache_works(), error_model="numpy")
_LOOP = dict(_OPTIONS, fastmath={"contract", "nsz", "reassoc"})
# Only explicit prange loops are made parallel: numba's search for more of them is most of its compile time.
_POOL = dict(_OPTIONS, parallel=dict.fromkeys(
    ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion"), False) | {"prange": True})


# ---- threads ----------------------------------------------------------------------------------------------------------------------

def set_threads(n):
    """Use n threads from now on, at most as many as the machine showed when numba was loaded (else ValueError)."""
    numba.set_num_threads(n)


def get_threads():
    return numba.get_num_threads()


def thread_info():
    """What a timing depends on: threads, threading layer (None before the first parallel kernel), BLAS libraries, numba version."""
    try:
        layer = numba.threading_layer()
    except ValueError:
        layer = None
    blas = [{"name": pool["internal_api"], "version": pool["version"], "threads": pool["num_threads"]}
            for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    return {"threads": get_threads(), "threading_layer": layer, "blas": blas, "numba": numba.__version__}


def _plain(x):
    """C-contiguous and writeable: a read-only array is another type to numba, and would compile everything again."""
    x = np.ascontiguousarray(x)
    return x if x.flags.writeable else x.copy()


@njit(**_LOOP)
def _blocks(n, size):
    return (n + size - 1) // size


# ---- exponential and activations --------------------------------------------------------------------------------------------------

def _exp(x):
    """e^x; in float32 a polynomial that vectorises, in float64 the exact function."""
    return np.exp(x)


LOG2E, ROUND = np.float32(1.4426950408889634), np.float32(1.5 * 2**23)          # adding ROUND rounds to an integer, in the low bits
LN2_HI, LN2_LO = np.float32(0.693359375), np.float32(-2.121944400546905e-4)     # the high part has few bits: n * LN2_HI is exact
C2, C3, C4, C5, C6 = map(np.float32, (0.49999994, 0.1666652, 0.041668393, 0.008368781, 0.0013814467))
ZERO, ONE, INFINITY, LOWEST, HIGHEST = map(np.float32, (0, 1, np.inf, -87.3, 88.3))
EXPONENT, ONE_BITS = np.int32(23), np.int32(0x3F800000)


# No 'reassoc' here: it would cancel ROUND.
@overload(_exp, jit_options=dict(fastmath={"contract"}, error_model="numpy"))
def _exp_compiled(x):
    if x != numba.float32:
        return lambda x: math.exp(x)

    def polynomial(x):
        """e^x = 2^n e^r, r = x - n ln 2. Minimax in |r| < ln 2 / 2: relative error 3e-9, float32 rounding apart."""
        shifted = x * LOG2E + ROUND
        n = shifted - ROUND
        r = x - n * LN2_HI - n * LN2_LO
        power = ONE + r * (ONE + r * (C2 + r * (C3 + r * (C4 + r * (C5 + r * C6)))))
        two_to_n = np.int32((np.float32(shifted).view(np.int32) << EXPONENT) + ONE_BITS).view(np.float32)
        y = power * two_to_n
        y = ZERO if x < LOWEST else y
        return INFINITY if x > HIGHEST else y       # a NaN fails both comparisons and stays
    return polynomial


@njit(**_LOOP)
def _gelu(x):
    """x s and its derivative, s = sigmoid(2u): the tanh form, since (1 + tanh u) / 2 = sigmoid(2u)."""
    real = type(x)
    one, c, a = real(1), real(2 * 0.7978845608028654), real(0.044715)       # 2 sqrt(2 / pi)
    s = one / (one + _exp(-c * (x + a * x * x * x)))
    return x * s, s + x * s * (one - s) * (c * (one + real(3) * a * x * x))


@njit(**_LOOP)
def _silu(x):
    one = type(x)(1)
    s = one / (one + _exp(-x))
    return x * s, s * (one + x * (one - s))


@njit(**_LOOP)
def _relu(x):
    zero, one = type(x)(0), type(x)(1)
    return (zero if x < zero else x), (one if x > zero else zero if x <= zero else x)      # NaN gives NaN in both


@njit(**_LOOP)
def _activate(x, y, kind):
    """y = f(x), in one dimension. The branch is outside the loops so that each of them vectorises."""
    if kind == GELU:
        for i in range(x.size):
            y[i] = _gelu(x[i])[0]
    elif kind == SILU:
        for i in range(x.size):
            y[i] = _silu(x[i])[0]
    else:
        for i in range(x.size):
            y[i] = _relu(x[i])[0]


@njit(**_LOOP)
def _activate_backward(dy, x, y, dx, kind):
    """y = f(x) again, and dx = dy f'(x); dx may be dy."""
    if kind == GELU:
        for i in range(x.size):
            y[i], slope = _gelu(x[i])
            dx[i] = dy[i] * slope
    elif kind == SILU:
        for i in range(x.size):
            y[i], slope = _silu(x[i])
            dx[i] = dy[i] * slope
    else:
        for i in range(x.size):
            y[i], slope = _relu(x[i])
            dx[i] = dy[i] * slope


@njit(**_POOL)
def _activation(x, y, kind):
    for block in prange(_blocks(x.size, SLICE)):
        part = slice(block * SLICE, min(x.size, (block + 1) * SLICE))
        _activate(x[part], y[part], kind)


@njit(**_POOL)
def _activation_backward(dy, x, dx, kind):
    for block in prange(_blocks(x.size, SLICE)):
        part = slice(block * SLICE, min(x.size, (block + 1) * SLICE))
        _activate_backward(dy[part], x[part], np.empty_like(x[part]), dx[part], kind)


# ---- dense layers -----------------------------------------------------------------------------------------------------------------

@njit(**_LOOP)
def _add_bias(rows, bias):
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            rows[i, j] += bias[j]


@njit(**_LOOP)
def _column_sums(rows, out):
    out[:] = 0
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            out[j] += rows[i, j]


@njit(**_POOL)
def _linear(x, w, b, y):
    for block in prange(_blocks(x.shape[0], PIECE)):
        part = slice(block * PIECE, min(x.shape[0], (block + 1) * PIECE))
        np.dot(x[part], w, y[part])
        if b.size > 0:
            _add_bias(y[part], b)


@njit(**_POOL)
def _linear_backward(dy, x, w, dx, dw, db):
    """dw (S,I,O) and db (S,O) hold one partial sum for each segment of rows."""
    for s in prange(dw.shape[0]):
        part = slice(x.shape[0] * s // dw.shape[0], x.shape[0] * (s + 1) // dw.shape[0])
        np.dot(x[part].T, dy[part], dw[s])
        np.dot(dy[part], w.T, dx[part])
        _column_sums(dy[part], db[s])


@njit(**_LOOP)
def _add_slots(total, slots, lo, hi, empty):
    """total[lo:hi] += the same elements of each slot, in order; zero first if nothing was written there."""
    if empty:
        total[lo:hi] = 0
    for s in range(slots.shape[0]):
        for j in range(lo, hi):
            total[j] += slots[s, j]


@njit(**_POOL)
def _sum_partials(dw, db, first, empty):
    """Add slots first[e]:first[e+1] of dw (S,W) and db (S,O) to slot e, for every e. A job is a slice of one expert's weights."""
    jobs = _blocks(dw.shape[1], SLICE)
    for job in prange(empty.size * jobs):
        e, lo = job // jobs, job % jobs * SLICE
        _add_slots(dw[e], dw[first[e]:first[e + 1]], lo, min(lo + SLICE, dw.shape[1]), empty[e])
        if lo == 0:
            _add_slots(db[e], db[first[e]:first[e + 1]], 0, db.shape[1], empty[e])


def linear(x, w, b):
    """x (N,I) @ w (I,O) + b (O,) or None -> (N,O)"""
    x, w, b = _plain(x), _plain(w), np.empty(0, x.dtype) if b is None else _plain(b)
    y = np.empty((len(x), w.shape[1]), x.dtype)
    _linear(x, w, b, y)
    return y


def linear_backward(dy, x, w):
    """-> dx (N,I), dw (I,O), db (O,)"""
    dy, x, w = _plain(dy), _plain(x), _plain(w)
    n_segments = _segments(len(x))
    dx, dw, db = np.empty_like(x), np.empty((n_segments, *w.shape), x.dtype), np.empty((n_segments, w.shape[1]), x.dtype)
    _linear_backward(dy, x, w, dx, dw, db)
    if n_segments > 1:
        _sum_partials(dw.reshape(n_segments, -1), db, np.array([1, n_segments]), np.array([False]))
    return dx, dw[0], db[0]


def _segment_rows(n):
    """Rows in a partial weight gradient: with many rows the segments grow, not the number (32) and so the memory of the partial sums."""
    return max(SEGMENT, _blocks(n, 32))


def _segments(n):
    return max(1, _blocks(n, _segment_rows(n)))


def activation(x, name):
    """f(x), any shape; f is "gelu" (the tanh form, Hendrycks & Gimpel 2016), "silu" or "relu"."""
    x = _plain(x)
    y = np.empty_like(x)
    _activation(x.reshape(-1), y.reshape(-1), ACTIVATIONS[name])
    return y


def activation_backward(dy, x, name):
    """dy f'(x), any shape"""
    dy, x = _plain(dy), _plain(x)
    dx = np.empty_like(x)
    _activation_backward(dy.reshape(-1), x.reshape(-1), dx.reshape(-1), ACTIVATIONS[name])
    return dx


# ---- layer norm -------------------------------------------------------------------------------------------------------------------

@njit(**_LOOP)
def _normalise(x, weight, bias, eps, y):
    """One row: y = (x - mean) rstd weight + bias, rstd = 1 / sqrt(variance + eps)."""
    zero, n = eps - eps, type(eps)(x.size)
    total, squares = zero, zero
    for j in range(x.size):
        total += x[j]
    mean = total / n
    for j in range(x.size):
        squares += (x[j] - mean) * (x[j] - mean)
    rstd = type(eps)(1) / np.sqrt(squares / n + eps)
    for j in range(x.size):
        y[j] = (x[j] - mean) * rstd * weight[j] + bias[j]
    return mean, rstd


@njit(**_LOOP)
def _normalise_backward(dy, x, weight, mean, rstd, dx, dweight, dbias):
    """One row, with z = (x - mean) rstd and g = dy weight: dx = rstd (g - average(g) - z average(g z))."""
    n = type(mean)(x.size)
    g_sum, gz_sum = mean - mean, mean - mean
    for j in range(x.size):
        z, g = (x[j] - mean) * rstd, dy[j] * weight[j]
        g_sum += g
        gz_sum += g * z
        dweight[j] += dy[j] * z
        dbias[j] += dy[j]
    g_sum, gz_sum = g_sum / n, gz_sum / n
    for j in range(x.size):
        dx[j] = rstd * (dy[j] * weight[j] - g_sum - (x[j] - mean) * rstd * gz_sum)


@njit(**_POOL)
def _layer_norm(x, weight, bias, eps, y, mean, rstd):
    for block in prange(_blocks(x.shape[0], PIECE)):
        for i in range(block * PIECE, min(x.shape[0], (block + 1) * PIECE)):
            mean[i], rstd[i] = _normalise(x[i], weight, bias, eps, y[i])


@njit(**_POOL)
def _layer_norm_backward(dy, x, weight, mean, rstd, dx, dweight, dbias):
    """dweight and dbias (blocks, D) hold one partial sum for each block of rows."""
    for block in prange(dweight.shape[0]):
        for i in range(block * PIECE, min(x.shape[0], (block + 1) * PIECE)):
            _normalise_backward(dy[i], x[i], weight, mean[i], rstd[i], dx[i], dweight[block], dbias[block])


def layer_norm(x, weight, bias, eps):
    """Rows of x (N,D) to mean 0 and variance 1, times weight plus bias (Ba et al. 2016) -> y, mean (N,), rstd (N,)"""
    x, weight, bias = _plain(x), _plain(weight), _plain(bias)
    y, mean, rstd = np.empty_like(x), np.empty(len(x), x.dtype), np.empty(len(x), x.dtype)
    _layer_norm(x, weight, bias, x.dtype.type(eps), y, mean, rstd)
    return y, mean, rstd


def layer_norm_backward(dy, x, weight, mean, rstd):
    """-> dx (N,D), dweight (D,), dbias (D,)"""
    dy, x, weight, mean, rstd = map(_plain, (dy, x, weight, mean, rstd))
    dx, partial = np.empty_like(x), np.zeros((2, _blocks(len(x), PIECE), x.shape[1]), x.dtype)
    _layer_norm_backward(dy, x, weight, mean, rstd, dx, partial[0], partial[1])
    return dx, partial[0].sum(axis=0), partial[1].sum(axis=0)


# ---- causal attention -------------------------------------------------------------------------------------------------------------

@njit(**_LOOP)
def _copy_rows(source, out):
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = source[i, j]


@njit(**_LOOP)
def _accumulate(rows, out):
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            out[i, j] += rows[i, j]


@njit(**_LOOP)
def _softmax(row, n):
    """Softmax of the first n elements, in place; the rest, which lies in the future, becomes zero."""
    highest = row[0]
    for j in range(1, n):
        highest = row[j] if row[j] > highest else highest
    total = highest - highest
    for j in range(n):
        row[j] = _exp(row[j] - highest)
        total += row[j]
    for j in range(n):
        row[j] /= total
    row[n:] = 0


@njit(**_LOOP)
def _softmax_backward(p, dp, scale):
    """dp becomes the gradient of the unscaled scores: scale p (dp - sum(p dp))."""
    inner = scale - scale
    for j in range(p.size):
        inner += p[j] * dp[j]
    for j in range(p.size):
        dp[j] = scale * p[j] * (dp[j] - inner)


@njit(**_LOOP)
def _attend(q, k, v, scale, out, probs):
    """One head: q (T,d) a strided view, k (T,d) and v (T,dv) contiguous. A block of queries sees the keys up to its last row."""
    T, d, dv = q.shape[0], k.shape[1], v.shape[1]
    q_block, out_block, scores = np.empty((QUERIES, d), k.dtype), np.empty((QUERIES, dv), k.dtype), np.empty(QUERIES * T, k.dtype)
    for start in range(0, T, QUERIES):
        stop = min(T, start + QUERIES)
        n = stop - start
        s = scores[:n * stop].reshape(n, stop)
        for i in range(n):
            for j in range(d):
                q_block[i, j] = scale * q[start + i, j]
        np.dot(q_block[:n], k[:stop].T, s)
        for i in range(n):
            _softmax(s[i], start + i + 1)
        np.dot(s, v[:stop], out_block[:n])
        _copy_rows(out_block, out[start:stop])
        _copy_rows(s, probs[start:stop, :stop])
        probs[start:stop, stop:] = 0


@njit(**_LOOP)
def _attend_backward(dout, q, k, v, probs, scale, dq, dk, dv):
    """One head; dk (T,d) and dv (T,dv) are added to, because the heads of a group share them."""
    T, d, d_value = q.shape[0], k.shape[1], v.shape[1]
    q_block, dq_block, dout_block = np.empty((QUERIES, d), k.dtype), np.empty((QUERIES, d), k.dtype), np.empty((QUERIES, d_value), k.dtype)
    p_space, dp_space = np.empty(QUERIES * T, k.dtype), np.empty(QUERIES * T, k.dtype)
    dk_part, dv_part = np.empty((T, d), k.dtype), np.empty((T, d_value), k.dtype)
    for start in range(0, T, QUERIES):
        stop = min(T, start + QUERIES)
        n = stop - start
        p, dp = p_space[:n * stop].reshape(n, stop), dp_space[:n * stop].reshape(n, stop)
        _copy_rows(q[start:stop], q_block[:n])
        _copy_rows(dout[start:stop], dout_block[:n])
        _copy_rows(probs[start:stop], p)
        np.dot(dout_block[:n], v[:stop].T, dp)
        for i in range(n):
            _softmax_backward(p[i], dp[i], scale)
        np.dot(p.T, dout_block[:n], dv_part[:stop])
        np.dot(dp.T, q_block[:n], dk_part[:stop])
        np.dot(dp, k[:stop], dq_block[:n])
        _accumulate(dv_part[:stop], dv)
        _accumulate(dk_part[:stop], dk)
        _copy_rows(dq_block, dq[start:stop])


@njit(**_POOL)
def _attention(q, k, v, scale, out, probs):
    B, T, G, heads = q.shape[0], q.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    for task in prange(B * G):
        b, g = task // G, task % G
        k_panel, v_panel = np.empty((T, k.shape[3]), k.dtype), np.empty((T, v.shape[3]), k.dtype)
        _copy_rows(k[b, :, g], k_panel)
        _copy_rows(v[b, :, g], v_panel)
        for h in range(g * heads, (g + 1) * heads):
            _attend(q[b, :, h], k_panel, v_panel, scale, out[b, :, h], probs[b, h])


@njit(**_POOL)
def _attention_backward(dout, q, k, v, probs, scale, dq, dk, dv):
    B, T, G, heads = q.shape[0], q.shape[1], k.shape[2], q.shape[2] // k.shape[2]
    for task in prange(B * G):
        b, g = task // G, task % G
        k_panel, v_panel = np.empty((T, k.shape[3]), k.dtype), np.empty((T, v.shape[3]), k.dtype)
        dk_panel, dv_panel = np.zeros((T, k.shape[3]), k.dtype), np.zeros((T, v.shape[3]), k.dtype)
        _copy_rows(k[b, :, g], k_panel)
        _copy_rows(v[b, :, g], v_panel)
        for h in range(g * heads, (g + 1) * heads):
            _attend_backward(dout[b, :, h], q[b, :, h], k_panel, v_panel, probs[b, h], scale, dq[b, :, h], dk_panel, dv_panel)
        _copy_rows(dk_panel, dk[b, :, g])
        _copy_rows(dv_panel, dv[b, :, g])


def causal_attention(q, k, v):
    """Softmax attention to the past, scores over sqrt(d) (Vaswani et al. 2017): q (B,T,H,d), k (B,T,G,d), v (B,T,G,dv) ->
    out (B,T,H,dv), probs (B,H,T,T). Head h reads group h // (H / G): grouped queries (Ainslie et al. 2023).

    Work with the future is skipped in blocks, and weighs zero: a NaN in v can therefore show up to a block early.
    """
    q, k, v = _plain(q), _plain(k), _plain(v)
    B, T, H, d = q.shape
    out, probs = np.empty((B, T, H, v.shape[3]), q.dtype), np.empty((B, H, T, T), q.dtype)
    _attention(q, k, v, q.dtype.type(d**-0.5), out, probs)
    return out, probs


def causal_attention_backward(dout, q, k, v, probs):
    """-> dq, dk, dv"""
    dout, q, k, v, probs = map(_plain, (dout, q, k, v, probs))
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    _attention_backward(dout, q, k, v, probs, q.dtype.type(q.shape[3]**-0.5), dq, dk, dv)
    return dq, dk, dv


# ---- experts ----------------------------------------------------------------------------------------------------------------------

def _pieces(offsets, limit):
    """Cut each expert's assignments into equal pieces of at most `limit` -> (P, 4): expert, start, stop, number within the expert"""
    count = np.diff(offsets)
    pieces = -(-count // limit)
    expert = np.repeat(np.arange(len(count)), pieces)
    number = np.arange(len(expert)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = offsets[expert] + count[expert] * number // pieces[expert]
    stop = offsets[expert] + count[expert] * (number + 1) // pieces[expert]
    return np.stack([expert, start, stop, number], axis=1)


def _shares(pieces):
    """Contiguous ranges of pieces, one for each thread, with near equal numbers of rows. A piece has a cost besides its rows."""
    n = get_threads()
    cost = np.concatenate([[0], np.cumsum(pieces[:, 2] - pieces[:, 1] + 16)])
    return np.searchsorted(cost[:-1] + cost[1:], 2 * cost[-1] * np.arange(n + 1) // n)


@njit(**_LOOP)
def _gather(x, token, out):
    for i in range(token.size):
        for j in range(out.shape[1]):
            out[i, j] = x[token[i], j]


@njit(**_LOOP)
def _expert_piece(x, token, w1, b1, w2, b2, kind, rows, before, after, out):
    """One piece: rows = x[token], before = rows w1 + b1, after = f(before), out = after w2 + b2."""
    _gather(x, token, rows)
    np.dot(rows, w1, before)
    for i in range(token.size):
        for j in range(before.shape[1]):
            before[i, j] += b1[j]
        _activate(before[i], after[i], kind)
    np.dot(after, w2, out)
    _add_bias(out, b2)


@njit(**_POOL)
def _experts_forward(x, token, pieces, shares, w1, b1, w2, b2, kind, rows, before, out):
    for thread in prange(shares.size - 1):
        after = np.empty((PIECE, before.shape[1]), x.dtype)
        for p in range(shares[thread], shares[thread + 1]):
            e, start, stop, _ = pieces[p]
            _expert_piece(x, token[start:stop], w1[e], b1[e], w2[e], b2[e], kind,
                          rows[start:stop], before[start:stop], after[:stop - start], out[start:stop])


@njit(**_LOOP)
def _gate_backward(dy, token, gate, out, dout, dgate):
    """dout = gate dy[token], the gradient of an expert's output; dgate = dy[token] . out."""
    for i in range(token.size):
        inner = gate[i] - gate[i]
        for j in range(out.shape[1]):
            g = dy[token[i], j]
            inner += g * out[i, j]
            dout[i, j] = gate[i] * g
        dgate[i] = inner


@njit(**_LOOP)
def _expert_piece_backward(dout, w1, w2, kind, rows, before, after, d_before, d_rows, dw1, db1, dw2, db2):
    """One piece, from the gradient of its output; everything it needs is in cache by then."""
    np.dot(dout, w2.T, d_before)
    for i in range(before.shape[0]):
        _activate_backward(d_before[i], before[i], after[i], d_before[i], kind)
    np.dot(after.T, dout, dw2)
    np.dot(rows.T, d_before, dw1)
    np.dot(d_before, w1.T, d_rows)
    _column_sums(dout, db2)
    _column_sums(d_before, db1)


@njit(**_POOL)
def _experts_backward(dy, token, gate, pieces, shares, w1, w2, kind, rows, before, out, d_rows, dgate, dw1, db1, dw2, db2):
    """A piece writes its weight gradients to its own slot."""
    for thread in prange(shares.size - 1):
        first, last = shares[thread], shares[thread + 1]
        most = 0
        for p in range(first, last):
            most = max(most, pieces[p, 2] - pieces[p, 1])
        dout, after = np.empty((most, dy.shape[1]), dy.dtype), np.empty((most, before.shape[1]), dy.dtype)
        d_before = np.empty((most, before.shape[1]), dy.dtype)
        for p in range(first, last):
            e, start, stop, slot = pieces[p]
            n = stop - start
            _gate_backward(dy, token[start:stop], gate[start:stop], out[start:stop], dout[:n], dgate[start:stop])
            _expert_piece_backward(dout[:n], w1[e], w2[e], kind, rows[start:stop], before[start:stop], after[:n], d_before[:n],
                                   d_rows[start:stop], dw1[slot], db1[slot], dw2[slot], db2[slot])


def experts_forward(x, token, offsets, gate, w1, b1, w2, b2, name):
    """y[n] = sum over the assignments a of token n, to expert e, of gate[a] (f(x[n] w1[e] + b1[e]) w2[e] + b2[e])

    x (N,D); token (A,) sorted by expert, then by token; offsets (E+1,); gate (A,); w1 (E,D,F), b1 (E,F), w2 (E,F,D), b2 (E,D).
    Returns y (N,D), a row of zeros for a token without an assignment, and what experts_backward needs.
    """
    x, gate, w1, b1, w2, b2 = map(_plain, (x, gate, w1, b1, w2, b2))
    token, offsets = np.array(token, np.int64), np.asarray(offsets, np.int64)
    A, D, F = len(token), x.shape[1], w1.shape[2]
    rows, before, out = np.empty((A, D), x.dtype), np.empty((A, F), x.dtype), np.empty((A, D), x.dtype)
    pieces = _pieces(offsets, PIECE)
    _experts_forward(x, token, pieces, _shares(pieces), w1, b1, w2, b2, ACTIVATIONS[name], rows, before, out)
    y = np.zeros_like(x)
    _add_rows(y, token, gate, out)
    return y, (rows, before, out)


def experts_backward(dy, x, token, offsets, gate, w1, b1, w2, b2, name, saved):
    """-> dx, dgate, dw1, db1, dw2, db2; the weights of an expert without assignments get zeros."""
    dy, gate, w1, w2 = map(_plain, (dy, gate, w1, w2))
    token, offsets = np.array(token, np.int64), np.asarray(offsets, np.int64)
    rows, before, out = saved
    E, A = len(w1), len(token)
    pieces = _pieces(offsets, _segment_rows(A))
    # An expert's first piece writes straight to its gradient, slot e; the others to slots from E on, which are added to it afterwards.
    expert, number = pieces[:, 0], pieces[:, 3]
    extra = number > 0
    slots = E + np.cumsum(extra)
    first = E + np.concatenate([[0], np.cumsum(np.bincount(expert[extra], minlength=E))])
    pieces[:, 3] = np.where(extra, slots - 1, expert)
    dw1, db1, dw2, db2 = (np.empty((first[-1], *w.shape[1:]), dy.dtype) for w in (w1, b1, w2, b2))
    d_rows, dgate = np.empty_like(rows), np.empty_like(gate)
    _experts_backward(dy, token, gate, pieces, _shares(pieces), w1, w2, ACTIVATIONS[name], rows, before, out,
                      d_rows, dgate, dw1, db1, dw2, db2)
    empty = np.diff(offsets) == 0
    if extra.any() or empty.any():
        _sum_partials(dw1.reshape(len(dw1), -1), db1, first, empty)
        _sum_partials(dw2.reshape(len(dw2), -1), db2, first, empty)
    dx = np.zeros_like(dy)
    _add_rows(dx, token, np.ones_like(gate), d_rows)
    return dx, dgate, dw1[:E], db1[:E], dw2[:E], db2[:E]


# ---- scatter-add, optimiser, norm -------------------------------------------------------------------------------------------------

@njit(**_POOL)
def _add_rows(out, index, scale, rows):
    """out[index[i]] += scale[i] rows[i]. Each thread owns columns and takes all the rows in order, so repeats are no conflict."""
    for block in prange(_blocks(rows.shape[1], COLUMNS)):
        stop = min(rows.shape[1], (block + 1) * COLUMNS)
        for i in range(index.size):
            n, s = index[i], scale[i]
            for j in range(block * COLUMNS, stop):
                out[n, j] += s * rows[i, j]


def add_rows(out_rows, index, rows):
    """Zeros (out_rows, D) with rows (M,D) added at index (M,), which may repeat: the gradient of a lookup."""
    index, rows = np.array(index, np.int64), _plain(rows)
    out = np.zeros((out_rows, rows.shape[1]), rows.dtype)
    _add_rows(out, index, np.ones(len(index), rows.dtype), rows)
    return out


@njit(**_LOOP)
def _adamw_slice(parameter, gradient, m, v, decay, beta1, beta2, rate, root, eps):
    one = type(decay)(1)
    for i in range(parameter.size):
        g = gradient[i]
        m[i] = beta1 * m[i] + (one - beta1) * g
        v[i] = beta2 * v[i] + (one - beta2) * g * g
        parameter[i] = decay * parameter[i] - rate * m[i] / (np.sqrt(v[i]) * root + eps)


@njit(**_POOL)
def _adamw(parameter, gradient, m, v, decay, beta1, beta2, rate, root, eps):
    for block in prange(_blocks(parameter.size, SLICE)):
        part = slice(block * SLICE, min(parameter.size, (block + 1) * SLICE))
        _adamw_slice(parameter[part], gradient[part], m[part], v[part], decay, beta1, beta2, rate, root, eps)


def adamw(parameter, gradient, m, v, lr, beta1, beta2, eps, weight_decay, step):
    """One step (from 1) of AdamW in place, with the decay decoupled from the gradient (Loshchilov & Hutter 2019, algorithm 2)."""
    flat = [z.reshape(-1) for z in (parameter, _plain(gradient), m, v)]
    scalars = (1 - lr * weight_decay, beta1, beta2, lr / (1 - beta1**step), (1 - beta2**step)**-0.5, eps)
    kernel = _adamw if parameter.size > 4 * SLICE else _adamw_slice     # waking the threads costs more than a small array
    kernel(*flat, *map(parameter.dtype.type, scalars))


@njit(**_POOL)
def _sum_of_squares(x, partial):
    for block in prange(partial.size):
        total = 0.0
        for i in range(block * SLICE, min(x.size, (block + 1) * SLICE)):
            total += np.float64(x[i]) * np.float64(x[i])
        partial[block] = total


def sum_of_squares(x):
    """Summed in float64 over fixed slices, which are then added in order."""
    x = _plain(x).reshape(-1)
    partial = np.empty(_blocks(x.size, SLICE))
    _sum_of_squares(x, partial)
    return float(np.add.accumulate(partial)[-1]) if x.size else 0.0


def compile_all(dtype):
    """Call every kernel once on tiny arrays, so that all is compiled (or read from the cache) -> seconds"""
    started = time.perf_counter()
    x, w, b = np.ones((2, 2), dtype), np.ones((2, 2), dtype), np.ones(2, dtype)
    wide = np.ones((SEGMENT + 1, 2), dtype)
    linear_backward(linear(wide, w, b), wide, w)
    activation_backward(activation(x, "gelu"), x, "gelu")
    y, mean, rstd = layer_norm(x, b, b, 1e-5)
    layer_norm_backward(y, x, b, mean, rstd)
    heads = np.ones((1, 2, 1, 2), dtype)
    out, probs = causal_attention(heads, heads, heads)
    causal_attention_backward(out, heads, heads, heads, probs)
    routed = x, np.array([0, 1]), np.array([0, 2, 2]), b, np.ones((2, 2, 2), dtype), x, np.ones((2, 2, 2), dtype), x, "gelu"
    y, saved = experts_forward(*routed)
    experts_backward(y, *routed, saved)
    add_rows(2, np.array([0, 0]), x)
    for size in (1, 4 * SLICE + 1):
        adamw(*(np.ones(size, dtype) for _ in range(4)), 0.1, 0.9, 0.95, 1e-8, 0.1, 1)
    sum_of_squares(x)
    return time.perf_counter() - started
