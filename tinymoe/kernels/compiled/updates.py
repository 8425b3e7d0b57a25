"""What ends a backward pass: scatter-add of rows, the norm's sum of squares, and AdamW."""
import numpy as np
from numba import prange

from .runtime import SLICE, blocks, loop, plain, pool

COLUMNS = 32            # columns one thread owns in a scatter-add: two cache lines of float32
ALONE = 4 * SLICE       # so many elements are not worth waking other threads for


@loop
def _add_scaled(row, scale, out):
    for j in range(out.size):
        out[j] += scale * row[j]


@pool
def scatter_add(out, index, scale, rows):
    """out[index[i]] += scale[i] rows[i]; a thread owns columns and takes the rows in order."""
    for block in prange(blocks(rows.shape[1], COLUMNS)):
        part = slice(block * COLUMNS, min(rows.shape[1], (block + 1) * COLUMNS))
        for i in range(index.size):
            _add_scaled(rows[i, part], scale[i], out[index[i], part])


def add_rows(out_rows, index, rows):
    """Zeros (out_rows, D) with rows (M,D) added at index (M,), which may repeat: the gradient of a lookup."""
    index, rows = np.array(index, np.int64), plain(rows)
    out = np.zeros((out_rows, rows.shape[1]), rows.dtype)
    scatter_add(out, index, np.ones(len(index), rows.dtype), rows)
    return out


@loop
def _adamw_slice(parameter, gradient, m, v, decay, beta1, beta2, rate, root, eps):
    one = type(decay)(1)
    for i in range(parameter.size):
        g = gradient[i]
        m[i] = beta1 * m[i] + (one - beta1) * g
        v[i] = beta2 * v[i] + (one - beta2) * g * g
        parameter[i] = decay * parameter[i] - rate * m[i] / (np.sqrt(v[i]) * root + eps)


@pool
def _adamw(parameter, gradient, m, v, decay, beta1, beta2, rate, root, eps):
    for block in prange(blocks(parameter.size, SLICE)):
        part = slice(block * SLICE, min(parameter.size, (block + 1) * SLICE))
        _adamw_slice(parameter[part], gradient[part], m[part], v[part], decay, beta1, beta2, rate, root, eps)


def adamw(parameter, gradient, m, v, lr, beta1, beta2, eps, weight_decay, step):
    """One step (the first is 1) of AdamW, in place: Loshchilov & Hutter 2019, algorithm 2; contiguous."""
    flat = [z.reshape(-1) for z in (parameter, plain(gradient), m, v)]
    rate, root = lr / (1 - beta1**step), (1 - beta2**step)**-0.5         # corrected for the zero start
    scalars = map(parameter.dtype.type, (1 - lr * weight_decay, beta1, beta2, rate, root, eps))
    kernel = _adamw if parameter.size > ALONE else _adamw_slice
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


def sum_of_squares(x):
    """Summed in float64 over fixed slices, which are then added."""
    x = plain(x).reshape(-1)
    if x.size <= ALONE:
        return _square_slice(x)
    partial = np.empty(blocks(x.size, SLICE))
    _sum_of_squares(x, partial)
    return float(partial.sum())
