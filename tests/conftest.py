"""Tests use tiny arrays, for which a second thread only costs; test_kernels.py asks for more where it matters."""

import pytest

from tinymoe import kernels


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    kernels.set_threads(1)
