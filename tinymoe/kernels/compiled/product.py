"""Matrix products inside compiled code. Unlike np.dot they add, and read and write views where they lie.

`out` is computed in tiles of ROWS rows and VECTORS vectors, whose sums stay in registers while a panel of `b`, DEPTH
rows of as many columns, stays in the first-level cache (Goto 2008). BLAS packs both matrices before it multiplies.
Here only columns that are not contiguous are copied, because the matrices are small.
"""
import numba
import numpy as np
from llvmlite import ir
from numba.core.cgutils import alloca_once_value, for_range
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload

from .compile import loop

# AVX-512 has 32 registers of 512 bits, AVX2 16 of 256: for the sums, the vectors of b, and one number of a.
AVX512 = "+avx512f" in str(cpu_target.target_context.codegen().magic_tuple())
BITS, ROWS, VECTORS = (512, 12, 1) if AVX512 else (256, 6, 2)
DEPTH = 64


def multiply(a, b, out, add):
    """out (M,N) = a (M,K) b (K,N), or out += a b where `add`

    a and b: views with any strides. out: a view whose rows are contiguous, and which shares no memory with a and b.
    """
    out[...] = out + a @ b if add else a @ b


@intrinsic
def _tile(typing, rows, a, a_row, a_column, b, b_row, out, out_row, depth, add, like):
    """out = a b, or out += a b, for at most ROWS rows and the columns of VECTORS vectors

    Addresses and strides are in bytes; `like` is an array of their dtype. It is made of LLVM's instructions, which have
    vectors: numba would keep the sums in memory.
    """
    def generate(context, build, signature, arguments):
        rows, a, a_row, a_column, b, b_row, out, out_row, depth, add, _ = arguments
        number, bits = context.get_value_type(like.dtype), like.dtype.bitwidth
        vector, index = ir.VectorType(number, BITS // bits), ir.IntType(32)
        fused = build.module.declare_intrinsic(     # x y + z, rounded once where the processor can
            f"llvm.fmuladd.v{vector.count}f{bits}", (), ir.FunctionType(vector, [vector] * 3))

        def pointer(kind, start, *steps):
            """to the place after `start` and n times each stride of `steps`"""
            for stride, n in steps:
                start = build.add(start, build.mul(stride, n))
            return build.inttoptr(start, kind.as_pointer())

        def whole(n):
            return ir.Constant(rows.type, n)

        def load(place):
            return build.load(place, align=bits // 8)

        def everywhere(x):
            """a vector of equal numbers"""
            x = build.insert_element(vector(ir.Undefined), x, index(0))
            return build.shuffle_vector(x, x, ir.VectorType(index, vector.count)([0] * vector.count))

        columns = [(whole(BITS // 8), whole(j)) for j in range(VECTORS)]
        for n in range(1, ROWS + 1):
            with build.if_then(build.icmp_signed("==", rows, whole(n))):
                sums = [[alloca_once_value(build, vector([0.0] * vector.count)) for _ in columns] for _ in range(n)]
                with for_range(build, depth) as step:
                    ys = [load(pointer(vector, b, (b_row, step.index), column)) for column in columns]
                    for i, row in enumerate(sums):
                        x = everywhere(load(pointer(number, a, (a_row, whole(i)), (a_column, step.index))))
                        for y, total in zip(ys, row):
                            build.store(build.call(fused, [x, y, build.load(total)]), total)
                for i, row in enumerate(sums):
                    for column, total in zip(columns, row):
                        place = pointer(vector, out, (out_row, whole(i)), column)
                        with build.if_then(add):
                            build.store(build.fadd(load(place), build.load(total)), total)
                        build.store(build.load(total), place, align=bits // 8)
        return context.get_dummy_value()
    return numba.void(*[numba.intp] * 9, numba.boolean, like), generate


@loop
def _multiply_panel(a, b, b_row, out, add):
    """out (M,n) = a (M,K) b (K,n), or out += a b, for the n columns of a tile; b: an address, b_row: bytes to a row"""
    (a_row, a_column), out_row = a.strides, out.strides[0]
    for i in range(0, a.shape[0], ROWS):
        _tile(min(ROWS, a.shape[0] - i), a.ctypes.data + i * a_row, a_row, a_column, b, b_row,
              out.ctypes.data + i * out_row, out_row, a.shape[1], add, out)


@loop
def _multiply(a, b, out, add):
    """`multiply` for arrays of one type. Columns of b that are not contiguous, or fewer than a tile has, are copied."""
    (M, K), N, size = a.shape, b.shape[1], out.itemsize
    width = VECTORS * BITS // 8 // size
    panel, edge = np.zeros((DEPTH, width), out.dtype), np.empty((M if N % width else 0, width), out.dtype)
    for j in range(0, N, width):
        n = min(width, N - j)
        for k in range(0, max(K, 1), DEPTH):
            rows, more = min(DEPTH, K - k), add or k > 0
            part, to = a[:, k:k + rows], out[:, j:j + n]
            start, step = b.ctypes.data + k * b.strides[0] + j * b.strides[1], b.strides[0]
            if n < width or b.strides[1] != size:
                for row in range(rows):
                    for column in range(n):
                        panel[row, column] = b[k + row, j + column]
                start, step = panel.ctypes.data, panel.strides[0]
            if n == width:
                _multiply_panel(part, start, step, to, more)
                continue
            _multiply_panel(part, start, step, edge, False)
            for row in range(M):
                for column in range(n):
                    if more:
                        to[row, column] += edge[row, column]
                    else:
                        to[row, column] = edge[row, column]


@overload(multiply)
def _multiply_compiled(a, b, out, add):
    return lambda a, b, out, add: _multiply(a[::1, ::1], b[::1, ::1], out[::1, ::1], add)   # any layout has one type
