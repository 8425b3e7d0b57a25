"""Files of the user's that define routers, losses or experiments."""

import contextlib
import hashlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from ...files import cache_folder
from ..losses import LOSSES, Loss
from .base import ROUTERS, Router

OWN_LOSSES = dict(LOSSES)
IMPORTED = set()  # hashes of what this process has run
LIST = (cache_folder() or Path(os.devnull)) / "imports"  # hashes of what this user's other processes have run


def imported_before(sha256: str) -> bool:
    """Whether this user has run a file of this hash by `run_file`, in this process or another of this machine."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return sha256 in IMPORTED or sha256 in LIST.read_text().split()
    return False


def _remember(sha256):
    """Let `imported_before` know of a file that was run. A list that cannot be written counts in this process alone."""
    with contextlib.suppress(OSError):
        if not imported_before(sha256):
            LIST.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(LIST, "a") as file:
                file.write(f"{sha256}\n")
    IMPORTED.add(sha256)


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
        module, before = importlib.util.module_from_spec(spec), dict(ROUTERS)
        sys.modules[spec.name] = module  # dataclasses, and annotations that are text, look for their names there
        try:
            spec.loader.exec_module(module)
            _require_tables(before)
        finally:
            sys.modules.pop(spec.name, None)  # another process cannot import it, so nothing of it can be pickled
        _remember(digest)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a file that ends the program has not said what it defines
        raise ValueError(f"cannot import {path} ({type(error).__name__}: {error}): correct it") from None
    return module, digest


def _require_tables(before):
    """Raise TypeError or ValueError where a file put another thing into a table, or in the place of one of ours.

    before: the routers before the file was run.
    """
    for name, entry in LOSSES.items():
        if not isinstance(entry, Loss):
            raise TypeError(f'LOSSES["{name}"] must be a Loss, such as Loss("what it means", lambda r, c: mine(r))')
    for name in [name for name, entry in ROUTERS.items() if entry is not before.get(name)]:
        if not (isinstance(ROUTERS[name], type) and issubclass(ROUTERS[name], Router)):
            raise TypeError(f'ROUTERS["{name}"] must be a Router: derive a class with name="{name}" instead')
        ROUTERS[name].options()  # evaluated while the module is known; ValueError where they cannot be
    ours = {name: entry for name, entry in before.items() if getattr(entry, "__module__", "").startswith("tinymoe.")}
    for table, own in ((ROUTERS, ours), (LOSSES, OWN_LOSSES)):
        for name, entry in own.items():
            if table.get(name) is not entry:
                table[name] = entry
                raise ValueError(f"tinymoe has a router or loss named {name!r} already: give yours another name")
