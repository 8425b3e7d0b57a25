"""Tests use tiny arrays, for which a second thread only costs time; test_kernels.py asks for more where it matters.

The fast tests (-m "not slow") run on the NumPy kernels unless TINYMOE_KERNELS says otherwise: nothing is compiled.
"""

import os

import matplotlib
import pytest

from tinymoe import kernels
from tinymoe.moe.routers import user_files


@pytest.fixture(autouse=True, scope="session")
def kernels_of_the_tests(request):
    if "not slow" in request.config.getoption("markexpr") and not os.environ.get("TINYMOE_KERNELS"):
        kernels.use("numpy")
    kernels.set_threads(1)


@pytest.fixture(autouse=True, scope="session")
def imports_of_the_tests(tmp_path_factory):
    """The list of the files that a user imported stays as it is, also in processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())  # else each of them would look for fonts again
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setattr(user_files, "LIST", cache / "tinymoe/imports")
        yield


@pytest.fixture(params=["numpy", pytest.param("numba", marks=pytest.mark.slow)])
def both_kernels(request):
    """Runs a test on the NumPy kernels, and on the numba kernels where numba is installed; gives their name."""
    if request.param == "numba":
        pytest.importorskip("numba")
    before = kernels.active()
    kernels.use(request.param)
    kernels.set_threads(1)
    yield request.param
    kernels.use(before)
