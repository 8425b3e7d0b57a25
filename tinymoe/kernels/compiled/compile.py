"""How kernels are compiled, and where the code is kept.

It is kept in the `__pycache__` of a checkout, else in ~/.cache/tinymoe; XDG_CACHE_HOME and NUMBA_CACHE_DIR name other
places. numba unpickles what lies there, so the folder must be the user's own: it is made with mode 0700. Without a
writable folder every process compiles again.
"""
import contextlib
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numba
import numpy as np
from numba.core.caching import FunctionCache
from numba.core.registry import cpu_target

from ...files import cache_folder
from .. import KernelsError, reference

ROOT = Path(__file__).parents[3]                            # tinymoe is imported from here
SETTINGS = "OPT", "BOUNDSCHECK", "LOOP_VECTORIZE", "SLP_VECTORIZE", "DEBUGINFO_DEFAULT"     # of numba, by NUMBA_...


def _cache_folder():
    """The folder, or None. Its name has a hash of all that the code depends on; numba compares less."""
    here = Path(__file__).parent
    hashed = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(here.glob("*.py"))))
    cpu = cpu_target.target_context.codegen().magic_tuple()             # NUMBA_CPU_NAME counts
    settings = [getattr(numba.config, name, None) for name in SETTINGS]
    hashed.update(repr((sys.implementation.cache_tag, numba.__version__, cpu, settings)).encode())
    places = [cache] if (cache := cache_folder()) else []
    if numba.config.CACHE_DIR:
        places = [Path(numba.config.CACHE_DIR)]
    elif (ROOT / "pyproject.toml").exists():                            # in an installed package, pip would leave it
        places.insert(0, here / "__pycache__")
    for place in places:
        folder = place / f"numba-{hashed.hexdigest()[:12]}"
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
    return None


CACHE = _cache_folder()
KEPT = bool(CACHE) and not numba.config.DISABLE_JIT


class _Cache(FunctionCache):
    """numba's cache of one function. Damaged files are thrown away; a file that cannot be written names its folder."""

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception:                                   # unpickling a damaged file raises nearly anything
            _start_again()
            return super().load_overload(sig, target_context)

    def save_overload(self, sig, data):
        try:
            super().save_overload(sig, data)
        except OSError as error:
            raise KernelsError(f"cannot keep compiled kernels in {CACHE}: {error.strerror or error}: make room there, "
                               "or set NUMBA_CACHE_DIR to another folder") from None


def _start_again():
    """Throw away all code that is kept, and compile again for each dtype that was complete."""
    print(f"The compiled kernels in {CACHE} are damaged: they are compiled again.", file=sys.stderr)
    complete = [dtype for dtype in ("float32", "float64") if is_compiled(dtype)]
    for path in [*CACHE.rglob("*.nb?"), *map(_mark, complete)]:         # numba's index and code
        path.unlink(missing_ok=True)
    for dtype in complete:
        _compile_apart(dtype)


def _compiled(function, **options):
    kernel = numba.njit(error_model="numpy", **options)(function)
    if KEPT:
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(CACHE)
        kernel._cache = _Cache(function)
        numba.config.CACHE_DIR = before
    return kernel


# Decorators. 'reassoc' lets sums vectorise. 'nnan' and 'ninf' are left out, because a NaN must stay a NaN.
loop = functools.partial(_compiled, fastmath={"contract", "nsz", "reassoc"})
# Only explicit prange loops become parallel: the search for others takes time to compile and finds nothing.
pool = functools.partial(_compiled, parallel={"prange": True} | dict.fromkeys(
    ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion"), False))

EXAMPLES = {}           # kernel -> a function that calls it once on small arrays, made by ones(*shape)
HALVES = "attention", "rest"                                # of the kernels; attention takes a third of the time


def example(call):
    """A decorator of kernels, which say what they do in reference.py: `compile_all` compiles one by call(ones)."""
    def keep(kernel):
        kernel.__doc__, EXAMPLES[kernel] = getattr(reference, kernel.__name__).__doc__, call
        return kernel
    return keep


def _mark(dtype):
    return CACHE / np.dtype(dtype).name


def is_compiled(dtype) -> bool:
    """Whether `compile_all` has nothing to compile for this dtype: it leaves a mark when all is kept."""
    return KEPT and _mark(dtype).exists()


def compile_all(dtype) -> float:
    """Compile every kernel for a dtype ("float32" or "float64"), and load it -> seconds

    Two other processes compile, and this one reads what they keep, so that all runs have the same bits: a process that
    compiles can differ in the last bit from one that reads, because numba optimises a function again in each caller.
    Where nothing can be kept, this process compiles. Raises KernelsError where the disk is full.
    """
    started = time.perf_counter()
    if KEPT and not is_compiled(dtype):
        with _alone():
            if not is_compiled(dtype):
                _compile_apart(dtype)
    for half in HALVES:
        _call_examples(dtype, half)
    return time.perf_counter() - started


@contextlib.contextmanager
def _alone():
    """Wait until no other process of this machine compiles, where files can be locked."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl
            fcntl.flock(stack.enter_context(open(CACHE / "lock", "w")), fcntl.LOCK_EX)
        yield


def _compile_apart(dtype):
    """Compile in two processes. In a session of their own Ctrl-C does not reach them: they exit with this process."""
    code = "import sys; sys.path[:] = sys.argv[3:]; from tinymoe.kernels.compiled import compile; compile._half()"
    path = [*filter(None, sys.path), str(ROOT)]             # not the current folder, which `python -c` puts first
    with contextlib.ExitStack() as stack:
        halves = [stack.enter_context(subprocess.Popen(
            [sys.executable, "-c", code, np.dtype(dtype).name, half, *path],
            stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)) for half in HALVES]
        if [half.wait() for half in halves] == [0, 0]:      # else this process meets the error too, and says it
            _mark(dtype).touch()


def _half():
    """The body of such a process. Its stdin ends when its parent ends, however that happens."""
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    _call_examples(*sys.argv[1:3])


def _call_examples(dtype, half):
    for kernel, call in EXAMPLES.items():
        if ("attention" in kernel.__name__) == (half == "attention"):
            call(lambda *shape: np.ones(shape, dtype))
