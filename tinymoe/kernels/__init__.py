"""Every kernel twice: in NumPy to be read (reference.py), and in numba to be fast (compiled/). This file chooses.

`kernels.use("numpy")` or "numba" chooses, or TINYMOE_KERNELS in the environment; else it is numba where that is
installed. The two agree to rounding, not to the bit. A kernel is a public function of reference.py, and one of the same
name and arguments in compiled/. It is looked up at each call. Callers check what a user gives. The compiled kernels
check again what would let them read or write beyond an array.
"""
import contextlib
import functools
import inspect
import os
import time
from importlib.util import find_spec

from . import blas, reference
from .reference import ACTIVATIONS, GATED  # noqa: F401

KERNELS = [name for name, _ in inspect.getmembers(reference, inspect.isfunction) if name[0] != "_"]
RUNTIME = ["compile_all", "is_compiled", "get_threads", "set_threads", "thread_info"]  # both choices have these too
_active, _functions, _timer = None, {}, None


class KernelsError(ValueError):
    """The chosen kernels do not exist, are not installed, do not start, or cannot store their compiled code."""


def use(name: str) -> None:
    """Choose "numpy" or "numba" for this process and those that it starts."""
    global _active, _functions
    if name not in ("numpy", "numba"):
        raise KernelsError(f"unknown kernels {name!r}: set TINYMOE_KERNELS to numpy or numba")
    if name == "numba" and not find_spec("numba"):
        raise KernelsError("numba is not installed: run `pip install numba`, or set TINYMOE_KERNELS=numpy")
    modules = reference, blas
    if name == "numba":
        try:
            from .compiled import MODULES as modules
        except Exception as error:  # numba raises many types for a wrong setting or NumPy
            raise KernelsError(f"numba does not start: {' '.join(str(error).split()).rstrip('.')}: change that, or set "
                               "TINYMOE_KERNELS=numpy") from error
    blas.hold()
    _functions = {f: next(vars(m)[f] for m in modules if f in vars(m)) for f in KERNELS + RUNTIME}
    _active = os.environ["TINYMOE_KERNELS"] = name


def active() -> str:
    """The name of the chosen kernels. Raises KernelsError if TINYMOE_KERNELS is set to another name."""
    if _active is None:
        use(os.environ.get("TINYMOE_KERNELS") or ("numba" if find_spec("numba") else "numpy"))
    return _active


def __getattr__(name):
    if name not in KERNELS and name not in RUNTIME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    active()
    return functools.partial(_timer, name, _functions[name]) if _timer and name in KERNELS else _functions[name]


@contextlib.contextmanager
def timed(work=lambda name, *arguments, **options: 0):
    """Yield a dict, kernel name -> [calls, seconds, sum of work(name, *arguments, **options)], of the calls inside.

    Attention keeps its backward kernel in the graph: the one of a graph made inside counts here, also after the end.
    """
    global _timer
    spent, before = {}, _timer

    def call(name, function, *arguments, **options):
        start = time.perf_counter()
        result = function(*arguments, **options)
        row = 1, time.perf_counter() - start, work(name, *arguments, **options)
        spent[name] = [a + b for a, b in zip(spent.get(name, (0, 0, 0)), row)]
        return result

    _timer = call
    try:
        yield spent
    finally:
        _timer = before
