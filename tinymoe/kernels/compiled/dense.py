"""Linear layers and layer norm."""
import numpy as np
from numba import prange

from .compile import example, loop, pool
from .product import multiply
from .runtime import PIECE, blocks, contiguous, require

LINEAR_ROWS, LINEAR_COLUMNS = 512, 256      # in a piece of a linear layer


@loop
def add_bias(rows, bias):
    """rows (N,O) += bias (O,), in place"""
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            rows[i, j] += bias[j]


@loop
def add_column_sums(rows, out):
    """out (O,) += the sum of rows (N,O) over N"""
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            out[j] += rows[i, j]


@pool
def _linear(x, w, b, y):
    for block in prange(blocks(x.shape[0], LINEAR_ROWS)):
        part = slice(block * LINEAR_ROWS, min(x.shape[0], (block + 1) * LINEAR_ROWS))
        multiply(x[part], w, y[part], False)
        if b.size > 0:
            add_bias(y[part], b)


@pool
def _linear_backward(dy, x, w, dx, dw, db):
    """Two kinds of task: some rows of dx, or some columns of dw and db."""
    by_row = blocks(x.shape[0], LINEAR_ROWS)
    for task in prange(by_row + blocks(w.shape[1], LINEAR_COLUMNS)):
        if task < by_row:
            part = slice(task * LINEAR_ROWS, min(x.shape[0], (task + 1) * LINEAR_ROWS))
            multiply(dy[part], w.T, dx[part], False)
        else:
            start = (task - by_row) * LINEAR_COLUMNS
            part = slice(start, min(w.shape[1], start + LINEAR_COLUMNS))
            multiply(x.T, dy[:, part], dw[:, part], False)
            add_column_sums(dy[:, part], db[part])


@example(lambda ones: linear(ones(2, 2), ones(2, 2), ones(2)))
def linear(x, w, b):
    require(x.shape[1:] == w.shape[:1] and (b is None or b.shape == w.shape[1:]), x, w, *[] if b is None else [b])
    x, w, b = map(contiguous, (x, w, np.empty(0, x.dtype) if b is None else b))
    y = np.empty((len(x), w.shape[1]), x.dtype)
    _linear(x, w, b, y)
    return y


@example(lambda ones: linear_backward(ones(2, 2), ones(2, 2), ones(2, 2)))
def linear_backward(dy, x, w):
    dy, x, w = map(contiguous, (dy, x, w))
    require(x.shape[1:] == w.shape[:1] and dy.shape == (*x.shape[:1], *w.shape[1:]), dy, x, w)
    dx, dw, db = np.empty_like(x), np.empty_like(w), np.zeros(w.shape[1], x.dtype)
    _linear_backward(dy, x, w, dx, dw, db)
    return dx, dw, db


@loop
def _normalise(x, weight, bias, eps, y):
    """One row: y = (x - mean) rstd weight + bias, with rstd = 1 / sqrt(variance + eps)"""
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


@loop
def _normalise_backward(dy, x, weight, mean, rstd, dx, dweight, dbias):
    """One row: dx = rstd (g - average(g) - z average(g z)), with z = (x - mean) rstd and g = dy weight"""
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


@pool
def _layer_norm(x, weight, bias, eps, y, mean, rstd):
    for block in prange(blocks(x.shape[0], PIECE)):
        for i in range(block * PIECE, min(x.shape[0], (block + 1) * PIECE)):
            mean[i], rstd[i] = _normalise(x[i], weight, bias, eps, y[i])


@pool
def _layer_norm_backward(dy, x, weight, mean, rstd, dx, dweight, dbias):
    """dweight and dbias (blocks, D) hold one partial sum for each block of rows."""
    for block in prange(dweight.shape[0]):
        for i in range(block * PIECE, min(x.shape[0], (block + 1) * PIECE)):
            _normalise_backward(dy[i], x[i], weight, mean[i], rstd[i], dx[i], dweight[block], dbias[block])


@example(lambda ones: layer_norm(ones(2, 2), ones(2), ones(2), 1e-5))
def layer_norm(x, weight, bias, eps):
    x, weight, bias = map(contiguous, (x, weight, bias))
    require(x.shape[1:] == weight.shape == bias.shape, x, weight, bias)
    y, mean, rstd = np.empty_like(x), np.empty(len(x), x.dtype), np.empty(len(x), x.dtype)
    _layer_norm(x, weight, bias, x.dtype.type(eps), y, mean, rstd)
    return y, mean, rstd


@example(lambda ones: layer_norm_backward(ones(2, 2), ones(2, 2), ones(2), ones(2), ones(2)))
def layer_norm_backward(dy, x, weight, mean, rstd):
    dy, x, weight, mean, rstd = map(contiguous, (dy, x, weight, mean, rstd))
    require(dy.shape == x.shape == (*mean.shape, *weight.shape) and mean.shape == rstd.shape, dy, x, weight, mean, rstd)
    dx, partial = np.empty_like(x), np.zeros((2, blocks(len(x), PIECE), x.shape[1]), x.dtype)
    _layer_norm_backward(dy, x, weight, mean, rstd, dx, partial[0], partial[1])
    return dx, partial[0].sum(axis=0), partial[1].sum(axis=0)
