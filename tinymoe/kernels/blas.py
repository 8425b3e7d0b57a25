"""Threads of BLAS, the library behind matrix products, and what the NumPy kernels have in place of a compiler.

Both kinds of kernels hold BLAS at one thread. With numba, matrix products run inside numba's threads, and more threads
would compete with them for the cores. With NumPy, the number of threads would change the last bits of a result.
"""
import os

import scipy.linalg  # noqa: F401  (it brings a BLAS of its own, which numba's np.dot calls)
import threadpoolctl

KEEP_THREADS = os.environ.get("TINYMOE_KEEP_THREADS", "0") != "0"


def hold() -> None:
    """One thread for BLAS, here and in processes that this one starts, unless TINYMOE_KEEP_THREADS=1."""
    if not KEEP_THREADS:
        for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
            os.environ[name] = "1"
        threadpoolctl.threadpool_limits(1, user_api="blas")


def libraries() -> list[dict]:
    """Each BLAS that is loaded: name, version, threads."""
    return [{"name": found["internal_api"], "version": found["version"], "threads": found["num_threads"]}
            for found in threadpoolctl.threadpool_info() if found["user_api"] == "blas"]


def get_threads() -> int:
    """How many threads a matrix product uses now."""
    return max((found["threads"] for found in libraries()), default=1)


def set_threads(n: int) -> None:
    """Use at most n threads: one, unless TINYMOE_KEEP_THREADS=1. Raises ValueError for n below 1 or above the cores."""
    if not 1 <= n <= os.cpu_count():
        raise ValueError(f"threads must be from 1 to {os.cpu_count()}, the number of cores, not {n}")
    if KEEP_THREADS:
        threadpoolctl.threadpool_limits(n, user_api="blas")


def thread_info() -> dict:
    """What a timing depends on: threads, each BLAS; numba and its threading layer are None."""
    return {"threads": get_threads(), "threading_layer": None, "blas": libraries(), "numba": None}


def compile_all(dtype) -> float:
    """0.0, the seconds it takes to compile nothing."""
    return 0.0


def is_compiled(dtype) -> bool:
    """True: there is nothing to compile."""
    return True
