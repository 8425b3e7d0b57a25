"""Matrix products by BLAS inside compiled code. Unlike np.dot they add, and read and write views where they lie."""
import numba
import numpy as np
from numba.core.registry import cpu_target
from numba.extending import overload
from numba.np.linalg import _BLAS, ensure_blas, get_blas_kind

from .compile import loop

# Where the CPU has AVX-512, OpenBLAS multiplies small matrices without packing them, if M N K is at most a million and
# b is not transposed. Such tiles run at up to 190 GFLOP/s a core, large products at 150. Elsewhere tiles are slower.
TILED = "+avx512f" in str(cpu_target.target_context.codegen().magic_tuple())
ROWS, DEPTH, COLUMNS = 128, 64, 64
SMALL = 10**6


def multiply(a, b, out, add):
    """out (M,N) = a (M,K) b (K,N), or out += a b where `add`.

    a and b: views of C-contiguous arrays, or transposes of such. out: a view whose rows are contiguous.
    """
    out[...] = out + a @ b if add else a @ b


@loop
def _layout(x):
    """(n, or t for a transpose; elements from one row of the untransposed matrix to the next)"""
    if x.strides[1] == x.itemsize or x.size == 0:                           # empty arrays have strides of 0
        return ord("n"), max(x.strides[0] // x.itemsize, x.shape[1], 1)
    return ord("t"), max(x.strides[1] // x.itemsize, x.shape[0], 1)


@overload(multiply)
def _multiply_compiled(a, b, out, add):
    """BLAS counts columns first, so it computes out^T = b^T a^T."""
    ensure_blas()
    gemm, kind = _BLAS().numba_xxgemm(out.dtype), ord(get_blas_kind(out.dtype))
    factors = np.array([0, 1], str(out.dtype))

    def call(a, b, out, add):
        (a_form, a_step), (b_form, b_step), (_, step) = _layout(a), _layout(b), _layout(out)
        gemm(numba.int8(kind), numba.int8(b_form), numba.int8(a_form), out.shape[1], out.shape[0], a.shape[1],
             factors[1:].ctypes, b.ctypes, b_step, a.ctypes, a_step, factors[int(add):].ctypes, out.ctypes, step)
    return call


@loop
def product(a, b, out):
    """out = a b, in tiles where those are faster; the arguments are those of `multiply`"""
    if not TILED or a.shape[1] == 0:
        multiply(a, b, out, False)
        return
    for k in range(0, b.shape[0], DEPTH):
        for j in range(0, b.shape[1], COLUMNS):
            tile = b[k:k + DEPTH, j:j + COLUMNS].copy()                     # contiguous and not transposed
            for i in range(0, a.shape[0], ROWS):
                multiply(a[i:i + ROWS, k:k + DEPTH], tile, out[i:i + ROWS, j:j + COLUMNS], k > 0)


@loop
def multiply_in_parts(a, b, out, add):
    """The same as `multiply`, in 1, 2, 4, ... parts along the longest axis, so that M N K is small in each

    Unlike `product` it can add, and copies nothing.
    """
    rows, columns, inner = slice(0, out.shape[0]), slice(0, out.shape[1]), slice(0, a.shape[1])
    longest, parts = max(rows.stop, columns.stop, inner.stop), 1
    while TILED and rows.stop * columns.stop * inner.stop > SMALL * parts:
        parts *= 2
    for i in range(parts):
        part = slice(longest * i // parts, longest * (i + 1) // parts)
        if longest == out.shape[0]:
            rows = part
        elif longest == out.shape[1]:
            columns = part
        else:
            inner = part
        multiply(a[rows, inner], b[inner, columns], out[rows, columns], add or inner.start > 0)
