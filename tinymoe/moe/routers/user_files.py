"""Files of the user's that define routers, losses or experiments."""

import hashlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType

from ..losses import LOSSES, Loss


def load_file(path: str | Path) -> str:
    """Run a Python file of the user's, so that the routers and losses it defines are known; returns its sha256.

    Raises ValueError where the file cannot be read or run.
    """
    return run_file(path)[1]


def run_file(path: str | Path) -> tuple[ModuleType, str]:
    """(module, sha256) of a Python file of the user's, which is run. Raises ValueError as `load_file` does."""
    path = Path(path)
    if not os.path.exists(path):
        raise ValueError(f"cannot import {path}: there is no such file: check the path")
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        spec = importlib.util.spec_from_file_location(f"imported_{path.stem}", path)
        if spec is None:
            raise ImportError("its name must end in .py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, entry in LOSSES.items():
            if not isinstance(entry, Loss):
                raise TypeError(f'LOSSES["{name}"] must be a Loss, such as Loss("what it means", lambda r, c: mine(r))')
    except Exception as error:
        raise ValueError(f"cannot import {path} ({type(error).__name__}: {error}): correct it") from None
    return module, digest
