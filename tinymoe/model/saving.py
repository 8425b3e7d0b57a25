"""Saving a model to one file, and loading it. These functions are methods of Transformer."""

from pathlib import Path

import numpy as np

from ..files import CheckpointError, load_arrays, load_arrays_into, save_arrays
from .config import ModelConfig
from .counting import require_size
from .former import with_thresholds


def save(self, path: str | Path) -> None:
    """Write the weights and the config to an .npz file, atomically."""
    save_arrays(path, {name: p.data for name, p in self.parameters().items()},
                {"kind": "model", "config": self.config.to_dict()}, follow=True)


def load(cls, path: str | Path):
    """The Transformer that `save` wrote. Raises files.CheckpointError for a truncated file or one of another program.
    """
    arrays, header = load_arrays(path, "model")
    try:
        return cls.from_arrays(header["config"], arrays)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} does not describe a tinymoe model: {error}") from None


def from_arrays(cls, config: ModelConfig | dict, arrays: dict[str, np.ndarray]):
    """The Transformer of a config, or of its dict, with these weights.

    Raises ValueError where they do not fit, are not finite, or are neither float32 nor float64.
    """
    if bad := [name for name, array in arrays.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]:
        raise ValueError(f"{bad[0]} is not finite")
    dtype = next(iter(arrays.values())).dtype
    if dtype not in (np.float32, np.float64):
        raise ValueError(f"its weights are {dtype}: they must be float32 or float64")
    config = config if isinstance(config, ModelConfig) else ModelConfig.from_dict(config)
    require_size(config, sum(array.size for array in arrays.values()))
    model = cls(config, dtype=dtype)
    targets = {name: p.data for name, p in model.parameters().items()}
    load_arrays_into(targets, with_thresholds(arrays, targets))
    return model
