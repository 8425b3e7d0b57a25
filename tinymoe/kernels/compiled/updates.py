"""The end of a training step: scatter-add of rows, AdamW, and the sum of squares for the gradient norm."""
import numpy as np
from numba import prange

from .compile import example, loop, pool
from .runtime import SLICE, blocks, contiguous, require

COLUMNS = 32            # columns of one thread in a scatter-add: two cache lines of float32
ONE_THREAD = 4 * SLICE  # up to so many elements, waking other threads costs more than it saves


@loop
def _add_scaled(row, scale, out):
    for j in range(out.size):
        out[j] += scale * row[j]


@pool
def scatter_add(out, index, scale, rows):
    """out[index[i]] += scale[i] rows[i]; each thread owns columns, and takes the rows in order"""
    for block in prange(blocks(rows.shape[1], COLUMNS)):
        part = slice(block * COLUMNS, min(rows.shape[1], (block + 1) * COLUMNS))
        for i in range(index.size):
            _add_scaled(rows[i, part], scale[i], out[index[i], part])


def is_below(index, n):
    """Whether all of an index are from 0 to n - 1."""
    return not index.size or index.min() >= 0 and index.max() < n


@example(lambda ones: add_rows(2, [0, 0], ones(2, 2)))
def add_rows(n, index, rows):
    index, rows = np.array(index, np.int64), contiguous(rows)
    require(index.shape == rows.shape[:1] and is_below(index, n), rows)
    y = np.zeros((n, rows.shape[1]), rows.dtype)
    scatter_add(y, index, np.ones(len(index), rows.dtype), rows)
    return y


@loop
def _adamw_slice(parameter, gradient, m, v, decay, beta1, beta2, rate, root, eps):
    one = type(decay)(1)
    for i in range(parameter.size):
        g = gradient[i]
        m[i] = beta1 * m[i] + (one - beta1) * g
        running = beta2 * v[i] + (one - beta2) * g * g
        v[i] = g * g if g * g == np.inf else running        # reassociated, `running` would be inf - inf
        parameter[i] = decay * parameter[i] - rate * m[i] / (np.sqrt(v[i]) * root + eps)


@pool
def _adamw(parameter, gradient, m, v, decay, beta1, beta2, rate, root, eps):
    for block in prange(blocks(parameter.size, SLICE)):
        part = slice(block * SLICE, min(parameter.size, (block + 1) * SLICE))
        _adamw_slice(parameter[part], gradient[part], m[part], v[part], decay, beta1, beta2, rate, root, eps)


@example(lambda ones: [adamw(*(ones(size) for _ in range(4)), lr=1, betas=(0.9, 0.9), eps=1, weight_decay=0, step=1)
                       for size in (ONE_THREAD, ONE_THREAD + 1)])
def adamw(p, g, m, v, *, lr, betas, eps, weight_decay, step):
    views = p.flags.c_contiguous and m.flags.c_contiguous and v.flags.c_contiguous
    require(views and p.shape == g.shape == m.shape == v.shape, p, g, m, v)
    flat = [z.reshape(-1) for z in (p, contiguous(g), m, v)]
    b1, b2 = betas
    rate, root = lr / (1 - b1**step), (1 - b2**step)**-0.5                # m and v start at zero: corrected here
    scalars = map(p.dtype.type, (1 - lr * weight_decay, b1, b2, rate, root, eps))
    kernel = _adamw if p.size > ONE_THREAD else _adamw_slice
    kernel(*flat, *scalars)


@loop
def _square_slice(x):
    total = 0.0
    for i in range(x.size):
        total += np.float64(x[i]) * np.float64(x[i])
    return total


@pool
def _sum_of_squares(x, partial):
    for block in prange(partial.size):
        partial[block] = _square_slice(x[block * SLICE:min(x.size, (block + 1) * SLICE)])


@example(lambda ones: [sum_of_squares(ones(size)) for size in (ONE_THREAD, ONE_THREAD + 1)])
def sum_of_squares(x):
    x = contiguous(x).reshape(-1)
    if x.size <= ONE_THREAD:
        return _square_slice(x)
    partial = np.empty(blocks(x.size, SLICE))
    _sum_of_squares(x, partial)
    return float(partial.sum())
