"""How kernels are compiled, kept and spread over threads."""

import ctypes
import hashlib
import platform
import tempfile
from pathlib import Path

import numba
import numpy as np
import threadpoolctl

PIECE = 192             # rows carried together: their hidden activations stay in the second-level cache
SLICE = 1 << 13         # elements in a piece of an elementwise pass


def _cache_folder():
    """A writable folder for compiled code, or None: then every process compiles anew.

    Its name holds a hash of this folder's sources, because numba compares only the file that a kernel stands
    in, and would not notice a change to a function that the kernel uses from another file.
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


_CACHE = _cache_folder()


def _compiled(**options):
    """A decorator: numba's njit with these options, its code kept in our folder."""
    def decorate(function):
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, _CACHE or ""
        try:
            return numba.njit(cache=_CACHE is not None, error_model="numpy", **options)(function)
        finally:
            numba.config.CACHE_DIR = before
    return decorate


# Fast arithmetic without 'nnan' and 'ninf': a NaN must stay a NaN. 'reassoc' lets sums vectorise.
loop = _compiled(fastmath={"contract", "nsz", "reassoc"})
# Only explicit prange loops become parallel: the search for others would cost compile time and find nothing.
pool = _compiled(parallel={"prange": True} | dict.fromkeys(
    ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion"), False))


def _keep_freed_memory():
    """Ask glibc to keep the memory of freed arrays: the next step wants it back, at a fault a page."""
    trim_threshold, mmap_threshold = -1, -3                 # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):            # another C library
        return
    mallopt(trim_threshold, 1 << 30)
    mallopt(mmap_threshold, 1 << 30)


_keep_freed_memory()


def compiled_mark(dtype):
    """The file that says that all kernels are kept for a dtype name on this machine; None where nothing is kept."""
    if _CACHE is None or numba.config.DISABLE_JIT:
        return None
    return Path(_CACHE) / f"{dtype}-{numba.__version__}-{platform.node()}"


def set_threads(n):
    """Use n threads from now on, at most the cores there were when numba was loaded (else ValueError)."""
    numba.set_num_threads(n)


def get_threads():
    """How many threads the kernels use now."""
    return numba.get_num_threads()


def thread_info():
    """What a timing depends on -> threads, threading layer (None before the first kernel), BLAS, numba"""
    try:
        layer = numba.threading_layer()
    except ValueError:
        layer = None
    blas = [{"name": pool["internal_api"], "version": pool["version"], "threads": pool["num_threads"]}
            for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    return {"threads": get_threads(), "threading_layer": layer, "blas": blas, "numba": numba.__version__}


def plain(x):
    """C-contiguous and writeable: a read-only array is another type to numba, and would compile all anew."""
    x = np.asarray(x, order="C")
    return x if x.flags.writeable else x.copy()


@loop
def blocks(n, size):
    """How many blocks of at most `size` cover n."""
    return (n + size - 1) // size
