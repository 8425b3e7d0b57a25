"""The exponential and the activations: exact in float64, fast in float32."""
import math

import numba
import numpy as np
from numba import prange
from numba.extending import overload

from .. import KernelsError
from ..reference import GATED
from .compile import example, loop, pool
from .runtime import SLICE, blocks, contiguous, require

GELU, SILU, RELU, GEGLU, SWIGLU = range(5)
KINDS = {"gelu": GELU, "silu": SILU, "relu": RELU, "geglu": GEGLU, "swiglu": SWIGLU}


def kind_of(name):
    """The number of an activation's branch in `activate`. Raises KernelsError for an activation without one."""
    if name not in KINDS:
        raise KernelsError(f"compiled/activations.py has no loop for {name}: add one, or set TINYMOE_KERNELS=numpy")
    return KINDS[name]


def exp(x):
    """e^x. The compiled form takes a polynomial in float32, because that vectorises."""
    return np.exp(x)


LOG2E = np.float32(1.4426950408889634)
ROUND = np.float32(1.5 * 2**23)                     # the low bits of z + ROUND are z, rounded to an integer
LN2_HI = np.float32(0.693359375)                    # few bits, so that n LN2_HI is exact
LN2_LO = np.float32(-2.121944400546905e-4)          # ln 2 - LN2_HI
C2, C3, C4, C5, C6 = map(np.float32, (0.49999994, 0.1666652, 0.041668393, 0.008368781, 0.0013814467))
ZERO, ONE, INFINITY, LOWEST, HIGHEST = map(np.float32, (0, 1, np.inf, -87.3, 88.3))
EXPONENT, ONE_BITS = np.int32(23), np.int32(0x3F800000)     # where a float32 keeps its exponent; the bits of 1


# Without 'reassoc', which would cancel ROUND.
@overload(exp, jit_options={"fastmath": {"contract"}, "error_model": "numpy"})
def _exp_compiled(x):
    if x != numba.float32:
        return lambda x: math.exp(x)

    def polynomial(x):
        """e^x = 2^n e^r, r = x - n ln 2; minimax for |r| < ln 2 / 2, relative error 3e-9 before rounding."""
        shifted = x * LOG2E + ROUND
        n = shifted - ROUND
        r = x - n * LN2_HI - n * LN2_LO
        power = ONE + r * (ONE + r * (C2 + r * (C3 + r * (C4 + r * (C5 + r * C6)))))
        y = power * np.int32((np.float32(shifted).view(np.int32) << EXPONENT) + ONE_BITS).view(np.float32)
        y = ZERO if x < LOWEST else y
        return INFINITY if x > HIGHEST else y       # a NaN fails both comparisons and stays
    return polynomial


@loop
def _gelu(x):
    """f(x) = x s and f'(x), with s = sigmoid(2u) = (1 + tanh u) / 2"""
    real = type(x)
    one, c, a = real(1), real(2 * 0.7978845608028654), real(0.044715)       # 2 sqrt(2 / pi)
    s = one / (one + exp(-c * (x + a * x * x * x)))
    return x * s, s + x * s * (one - s) * (c * (one + real(3) * a * x * x))


@loop
def _silu(x):
    one = type(x)(1)
    s = one / (one + exp(-x))
    return x * s, s * (one + x * (one - s))


@loop
def _relu(x):
    zero, one = type(x)(0), type(x)(1)
    return (zero if x < zero else x), (one if x > zero else zero if x <= zero else x)     # NaN gives NaN twice


@loop
def activate(x, y, kind):
    """y = f(x) in one dimension; gated: y = f(a) b of the halves a, b of x. Loops without a branch vectorise."""
    n = y.size
    if kind == GELU:
        for i in range(x.size):
            y[i] = _gelu(x[i])[0]
    elif kind == SILU:
        for i in range(x.size):
            y[i] = _silu(x[i])[0]
    elif kind == GEGLU:
        for i in range(n):
            y[i] = _gelu(x[i])[0] * x[n + i]
    elif kind == SWIGLU:
        for i in range(n):
            y[i] = _silu(x[i])[0] * x[n + i]
    else:
        for i in range(x.size):
            y[i] = _relu(x[i])[0]


@loop
def activate_backward(x, y, d, dx, kind):
    """y = f(x) again, and the gradient d of y becomes that of x: in place, d *= f'(x); gated: it is written to dx."""
    n = y.size
    if kind == GELU:
        for i in range(x.size):
            y[i], slope = _gelu(x[i])
            d[i] *= slope
    elif kind == SILU:
        for i in range(x.size):
            y[i], slope = _silu(x[i])
            d[i] *= slope
    elif kind == GEGLU:
        for i in range(n):
            value, slope = _gelu(x[i])
            y[i], dx[i], dx[n + i] = value * x[n + i], d[i] * x[n + i] * slope, d[i] * value
    elif kind == SWIGLU:
        for i in range(n):
            value, slope = _silu(x[i])
            y[i], dx[i], dx[n + i] = value * x[n + i], d[i] * x[n + i] * slope, d[i] * value
    else:
        for i in range(x.size):
            y[i], slope = _relu(x[i])
            d[i] *= slope


@pool
def _activation(x, y, kind):
    for block in prange(blocks(x.size, SLICE)):
        part = slice(block * SLICE, min(x.size, (block + 1) * SLICE))
        activate(x[part], y[part], kind)


@pool
def _activation_backward(dy, x, dx, kind):
    for block in prange(blocks(x.size, SLICE)):
        part = slice(block * SLICE, min(x.size, (block + 1) * SLICE))
        dx[part] = dy[part]
        activate_backward(x[part], np.empty_like(x[part]), dx[part], dx[part], kind)


@example(lambda ones: activation(ones(2, 2), "gelu"))
def activation(x, name):
    if name in GATED:
        a, b = np.split(x, 2, axis=-1)
        return activation(a, GATED[name]) * b
    x = contiguous(x)
    y = np.empty_like(x)
    _activation(x.reshape(-1), y.reshape(-1), kind_of(name))
    return y


@example(lambda ones: activation_backward(ones(2, 2), ones(2, 2), "gelu"))
def activation_backward(dy, x, name):
    if name in GATED:
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([activation_backward(dy * b, a, GATED[name]), dy * activation(a, GATED[name])], axis=-1)
    dy, x = contiguous(dy), contiguous(x)
    require(dy.shape == x.shape, dy, x)
    dx = np.empty_like(x)
    _activation_backward(dy.reshape(-1), x.reshape(-1), dx.reshape(-1), kind_of(name))
    return dx
