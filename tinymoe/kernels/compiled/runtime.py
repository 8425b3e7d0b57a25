"""Sizes of pieces, threads, and the memory of arrays."""
import contextlib
import ctypes

import numba
import numpy as np

from .. import blas
from .compile import loop

PIECE = 192             # rows in a piece: their hidden activations fit in the second-level cache
SLICE = 1 << 13         # elements in a piece of an elementwise pass


HUGE_PAGE, RESERVED = 1 << 21, 1 << 28


def _keep_memory():
    """Ask glibc to keep the memory of freed arrays, since the next step needs it again and fresh pages are slow.

    Ask Linux for huge pages in the first 256 MB, which are reserved here but not used: they are quicker to find.
    """
    c = ctypes.CDLL(None)
    c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    c.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for option in (-1, -3):                                 # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        c.mallopt(option, 1 << 30)
    if start := c.malloc(RESERVED):
        c.madvise(-(-start // HUGE_PAGE) * HUGE_PAGE, RESERVED - HUGE_PAGE, 14)     # MADV_HUGEPAGE of mman.h
        c.free(start)


if not blas.KEEP_THREADS:
    with contextlib.suppress(AttributeError, OSError, TypeError):           # another C library
        _keep_memory()

# set_threads(n), for the calling thread: ValueError for n below 1, or above the number that numba was started with.
set_threads, get_threads = numba.set_num_threads, numba.get_num_threads
get_threads()           # starts the threads, so that settings that numba refuses are an error at once


def thread_info() -> dict:
    """What a timing depends on: threads, threading layer, each BLAS, numba."""
    return blas.thread_info() | {"threads": get_threads(), "threading_layer": numba.threading_layer(),
                                 "numba": numba.__version__}


def contiguous(x):
    """x as a C-contiguous, writeable array. A read-only one has another type in numba, which would compile again."""
    x = np.asarray(x, order="C")
    return x if x.flags.writeable else x.copy()


def require(fits, *arrays):
    """Raise ValueError unless `fits`, and all arrays have one dtype: compiled code would go beyond them."""
    if not fits or any([x.dtype != arrays[0].dtype for x in arrays]):
        said = ", ".join(f"{x.shape} {x.dtype}" for x in arrays)
        raise ValueError(f"these arrays do not fit together in one kernel: {said}")


@loop
def blocks(n, size):
    """How many blocks of at most `size` cover n."""
    return (n + size - 1) // size
