"""Threads of BLAS, which multiplies matrices, and the runtime functions of the NumPy kernels.

BLAS has one thread with both kinds of kernels: more would compete with numba's threads for cores, and their number
would change the last bits of a result.
"""
import os

import threadpoolctl

KEEP_THREADS = os.environ.get("TINYMOE_KEEP_THREADS", "0") != "0"


def hold() -> None:
    """One thread for BLAS, here and in processes that this one starts, unless TINYMOE_KEEP_THREADS=1."""
    if not KEEP_THREADS:
        for name in ("OPENBLAS", "MKL", "BLIS"):
            os.environ[f"{name}_NUM_THREADS"] = "1"
        os.environ["VECLIB_MAXIMUM_THREADS"] = "1"
        threadpoolctl.threadpool_limits(1, user_api="blas")


def get_threads() -> int:
    """How many threads a matrix product uses now."""
    return thread_info()["threads"]


def set_threads(n: int) -> None:
    """Use at most n threads: one, unless TINYMOE_KEEP_THREADS=1. Raises ValueError for n below 1 or above the cores."""
    if not 1 <= n <= os.cpu_count():
        raise ValueError(f"threads must be from 1 to {os.cpu_count()}, the number of cores, not {n}")
    if KEEP_THREADS:
        threadpoolctl.threadpool_limits(n, user_api="blas")


def thread_info() -> dict:
    """What a timing depends on: threads, each BLAS; numba and its threading layer are None."""
    blas = [{"name": found["internal_api"], "version": found["version"], "threads": found["num_threads"]}
            for found in threadpoolctl.threadpool_info() if found["user_api"] == "blas"]
    return {"threads": max((found["threads"] for found in blas), default=1), "threading_layer": None, "blas": blas,
            "numba": None}


def compile_all(dtype) -> float:
    """Return 0 seconds: the NumPy kernels need no compiling."""
    return 0.0


def is_compiled(dtype) -> bool:
    """Always True, for the same reason."""
    return True
