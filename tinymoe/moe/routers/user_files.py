"""Files of the user's that define routers or losses."""

import hashlib
import importlib.util
from pathlib import Path


def load_file(path: str | Path) -> str:
    """Run a Python file of the user's, so that the routers and losses it defines are known; returns its sha256.

    Raises ValueError where the file cannot be read or run.
    """
    path = Path(path)
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        spec = importlib.util.spec_from_file_location(f"imported_{path.stem}", path)
        if spec is None:
            raise ImportError("its name must end in .py")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except Exception as error:
        raise ValueError(f"cannot import {path} ({type(error).__name__}: {error}): correct it") from None
    return digest
