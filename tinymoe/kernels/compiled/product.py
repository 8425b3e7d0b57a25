"""Matrix products inside compiled code. Unlike np.dot they add, and read and write views where they lie.

`out` is computed in tiles of ROWS rows and VECTORS vectors, whose sums stay in registers while a panel of `b`, DEPTH
rows of as many columns, stays in the first-level cache (Goto 2008). The panel is a copy: rows that lie 2 kB apart would
push each other out of the cache. BLAS copies `a` too, which takes long where the matrices are small.
"""
import numba
import numpy as np
from llvmlite import ir
from numba.core.cgutils import alloca_once_value, for_range, raw_memcpy
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload

from .compile import loop

# AVX-512 has 32 registers of 512 bits, AVX2 16 of 256: for the sums, the vectors of b, and one number of a.
AVX512 = "+avx512f" in str(cpu_target.target_context.codegen().magic_tuple())
BITS, ROWS, VECTORS = (512, 12, 1) if AVX512 else (256, 6, 2)
WIDTH, DEPTH = VECTORS * BITS // 8, 64        # bytes of a row of the panel, and its rows


def multiply(a, b, out, add):
    """out (M,N) = a (M,K) b (K,N), or out += a b where `add`

    a and b: views with any strides. out: a view whose rows are contiguous, and which shares no memory with a and b.
    """
    out[...] = out + a @ b if add else a @ b


@intrinsic
def _tile(typing, rows, a, a_row, a_column, panel, out, out_row, depth, add, like):
    """out = a panel, or out += a panel, for at most ROWS rows and the columns of VECTORS vectors

    Addresses and strides are in bytes; `like` is an array of their dtype. It is made of LLVM's instructions, which have
    vectors: numba would keep the sums in memory.
    """
    def generate(context, build, signature, arguments):
        rows, a, a_row, a_column, panel, out, out_row, depth, add, _ = arguments
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
                    ys = [load(pointer(vector, panel, (whole(WIDTH), step.index), column)) for column in columns]
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
    return numba.void(*[numba.intp] * 8, numba.boolean, like), generate


@intrinsic
def _copy_row(typing, to, start):
    """Copy WIDTH bytes from an address to another."""
    def generate(context, build, signature, arguments):
        to, start = (build.inttoptr(place, ir.IntType(8).as_pointer()) for place in arguments)
        raw_memcpy(build, to, start, ir.Constant(arguments[0].type, WIDTH), 1)
        return context.get_dummy_value()
    return numba.void(numba.intp, numba.intp), generate


@loop
def _multiply_panel(a, panel, out, add):
    """out (M,n) = a (M,K) panel, or out += a panel, for the n columns of a tile and the first K rows of the panel"""
    (a_row, a_column), out_row = a.strides, out.strides[0]
    for i in range(0, a.shape[0], ROWS):
        _tile(min(ROWS, a.shape[0] - i), a.ctypes.data + i * a_row, a_row, a_column, panel.ctypes.data,
              out.ctypes.data + i * out_row, out_row, a.shape[1], add, out)


@loop
def _multiply(a, b, out, add):
    """`multiply` for arrays of one type"""
    (M, K), N, size = a.shape, b.shape[1], out.itemsize
    width = WIDTH // size
    panel, edge = np.zeros((DEPTH, width), out.dtype), np.empty((M if N % width else 0, width), out.dtype)
    for j in range(0, N, width):
        n = min(width, N - j)
        for k in range(0, max(K, 1), DEPTH):
            rows, more = min(DEPTH, K - k), add or k > 0
            part, to = a[:, k:k + rows], out[:, j:j + n]
            if n == width and b.strides[1] == size:
                for row in range(rows):
                    _copy_row(panel.ctypes.data + row * WIDTH, b.ctypes.data + (k + row) * b.strides[0] + j * size)
            else:
                for column in range(n):                 # a transposed b is read as it lies in memory
                    for row in range(rows):
                        panel[row, column] = b[k + row, j + column]
            if n == width:
                _multiply_panel(part, panel, to, more)
                continue
            _multiply_panel(part, panel, edge, False)
            for row in range(M):
                for column in range(n):
                    if more:
                        to[row, column] += edge[row, column]
                    else:
                        to[row, column] = edge[row, column]


@overload(multiply)
def _multiply_compiled(a, b, out, add):
    return lambda a, b, out, add: _multiply(a[::1, ::1], b[::1, ::1], out[::1, ::1], add)   # any layout has one type
