"""Tools around the model: what commands beside the study show, measure and check."""

import importlib
import importlib.util


def __getattr__(name):
    """A file of this folder, such as tm.tools.bench, imported when it is first used."""
    if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"{__name__} has no {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
