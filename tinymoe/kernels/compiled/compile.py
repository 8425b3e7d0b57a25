"""Compile all kernels once on this machine, and keep the code."""
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numba
import numpy as np

from . import attention, runtime


def _mark(dtype):
    """The file which says that all kernels are kept for a dtype on this machine; None where nothing can be kept."""
    if runtime.CACHE and not numba.config.DISABLE_JIT:
        return Path(runtime.CACHE) / f"{np.dtype(dtype).name}-{numba.__version__}-{platform.node()}"


def is_compiled(dtype) -> bool:
    """Whether `compile_all` has nothing to compile for this dtype."""
    return bool((mark := _mark(dtype)) and mark.exists())


def compile_all(dtype) -> float:
    """Compile every kernel for a dtype ("float32" or "float64"), and load it -> seconds

    Two other processes compile, and this one reads what they keep, so that all runs have the same bits: a process that
    compiles can differ in the last bit from one that reads, because numba optimises a function again in each caller.
    Where nothing can be kept, this process compiles.
    """
    started, mark = time.perf_counter(), _mark(dtype)
    if mark and not mark.exists():
        path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
        code = ("from tinymoe import kernels; kernels.use('numba'); from tinymoe.kernels.compiled import compile; "
                "compile.call_examples({!r}, of_attention={})").format
        halves = [subprocess.Popen([sys.executable, "-c", code(np.dtype(dtype).name, half)],
                                   env=os.environ | {"PYTHONPATH": path}) for half in (True, False)]
        if [half.wait() for half in halves] == [0, 0]:
            mark.touch()
    call_examples(dtype, of_attention=True)
    call_examples(dtype, of_attention=False)
    return time.perf_counter() - started


def call_examples(dtype, of_attention: bool) -> None:
    """Call each kernel once: those of attention, which take a third of the time to compile, or all others."""
    for kernel, call in runtime.EXAMPLES.items():
        if (kernel.__module__ == attention.__name__) == of_attention:
            call(lambda *shape: np.ones(shape, dtype))
