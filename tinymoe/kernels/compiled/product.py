"""The matrix product inside compiled code: np.dot with strides, a scale, and a sum that goes on."""
import numpy as np
from numba import types
from numba.extending import overload

AS_IT_IS, TRANSPOSED = ord("n"), ord("t")


def multiply(a, b, out, scale, keep):
    """out (M,N) = scale a (M,K) b (K,N) + keep out.  Compiled code alone calls it.

    Views of any distance between rows, and their transposes, are read where they lie; np.dot would first copy them.
    Rows of `out` must be contiguous.
    """
    raise NotImplementedError


def _layout(x):
    """How BLAS sees x, which it takes column by column: (letter, entries between columns) of the transposed matrix."""
    raise NotImplementedError


@overload(_layout)
def _layout_compiled(x):
    def of(x):
        if x.strides[1] == x.itemsize:
            return AS_IT_IS, max(x.strides[0] // x.itemsize, x.shape[1], 1)
        return TRANSPOSED, max(x.strides[1] // x.itemsize, x.shape[0], 1)
    return of


@overload(multiply)
def _multiply_compiled(a, b, out, scale, keep):
    real, size, letter = types.CPointer(out.dtype), types.intp, types.char
    gemm = types.ExternalFunction("numba_xxgemm", types.intc(               # as np.dot calls it
        letter, letter, letter, size, size, size, real, real, size, real, size, real, real, size))
    kind = ord("s" if out.dtype == types.float32 else "d")

    def call(a, b, out, scale, keep):
        (a_form, a_step), (b_form, b_step), (_, step) = _layout(a), _layout(b), _layout(out)
        factors = np.empty(2, out.dtype)
        factors[0], factors[1] = scale, keep
        gemm(kind, b_form, a_form, out.shape[1], out.shape[0], a.shape[1], factors.ctypes, b.ctypes, b_step,
             a.ctypes, a_step, factors[1:].ctypes, out.ctypes, step)        # out^T = b^T a^T
    return call
