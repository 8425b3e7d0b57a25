"""How kernels are compiled, kept and spread over threads."""
import contextlib
import ctypes
import hashlib
import tempfile
from pathlib import Path

import numba
import numpy as np

from .. import blas

PIECE = 192             # rows in a piece: their hidden activations fit in the second-level cache
SLICE = 1 << 13         # elements in a piece of an elementwise pass


def _cache_folder():
    """A writable folder for compiled code, or None: then every process compiles again.

    Its name holds a hash of this folder's sources, because numba compares only the kernel's own file.
    """
    here = Path(__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))
    name = "numba-" + hashlib.sha256(sources).hexdigest()[:12]
    asked = numba.config.CACHE_DIR
    for place in [Path(asked)] if asked else [here / "__pycache__", Path("~/.cache/tinymoe").expanduser()]:
        try:
            (place / name).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place / name).close()
            return str(place / name)
        except OSError:
            continue
    return None


CACHE = _cache_folder()


def _compiled(**options):
    """A decorator: numba's njit with these options, which keeps the code in our folder."""
    def decorate(function):
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, CACHE or ""
        try:
            return numba.njit(cache=CACHE is not None, error_model="numpy", **options)(function)
        finally:
            numba.config.CACHE_DIR = before
    return decorate


# 'reassoc' lets sums vectorise. 'nnan' and 'ninf' are left out, because a NaN must stay a NaN.
loop = _compiled(fastmath={"contract", "nsz", "reassoc"})
# Only explicit prange loops become parallel: the search for others takes time to compile and finds nothing.
pool = _compiled(parallel={"prange": True} | dict.fromkeys(
    ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion"), False))


def _keep_freed_memory():
    """Ask glibc to keep the memory of freed arrays: the next step needs it again, and fresh pages are slow."""
    trim_threshold, mmap_threshold = -1, -3                 # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):            # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 1 << 30)


if not blas.KEEP_THREADS:
    _keep_freed_memory()


# set_threads(n): ValueError for n below 1, or above the number that numba was started with.
set_threads, get_threads = numba.set_num_threads, numba.get_num_threads


def thread_info() -> dict:
    """What a timing depends on: threads, threading layer (None before the first kernel), each BLAS, numba."""
    layer = None
    with contextlib.suppress(ValueError):
        layer = numba.threading_layer()
    return {"threads": get_threads(), "threading_layer": layer, "blas": blas.libraries(), "numba": numba.__version__}


EXAMPLES = {}           # kernel -> a function that calls it once on small arrays, made by ones(*shape)


def example(call):
    """A decorator of kernels: `compile_all` runs call(ones), and so compiles the kernel."""
    def keep(kernel):
        EXAMPLES[kernel] = call
        return kernel
    return keep


def contiguous(x):
    """x as a C-contiguous, writeable array. A read-only one has another type in numba, which would compile again."""
    x = np.asarray(x, order="C")
    return x if x.flags.writeable else x.copy()


@loop
def blocks(n, size):
    """How many blocks of at most `size` cover n."""
    return (n + size - 1) // size
