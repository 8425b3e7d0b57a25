"""What defines a run, and on which machine it was trained: what config.json records, and what a resume compares."""

import collections
import contextlib
import dataclasses
import functools
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import kernels
from ..model.config import ModelConfig
from ..moe import routers
from .plan import TrainConfig


class RunError(Exception):
    """A run that cannot continue, for example because its folder holds a run with other settings."""


def describe(plan, corpus) -> dict:
    """Everything that defines the run, ready for JSON. Executes the files that plan.imports names."""
    return {"run_id": plan.run_id, "config_id": plan.config_id, "purpose": plan.purpose, "seed": plan.seed,
            "model": plan.model.to_dict(), "training": dataclasses.asdict(plan.training), "start": plan.start,
            "corpus": corpus.describe(), "domains": corpus.names, "kernels": kernels.active(),
            "plan_hash": plan.plan_hash, "imports": execute_files(tuple(plan.imports))}


def _identity(config):
    """What distinguishes a run, as a flat dict: its id, its settings, its kernels, and the hashes of what it reads."""
    parts = with_defaults(config) | {
        "corpus": {name: text.get("sha256", "")[:12] for name, text in config.get("corpus", {}).items()},
        "training bytes of": {name: text.get("train_bytes") for name, text in config.get("corpus", {}).items()},
        "import": imports_of(config)}
    return {"run_id": config.get("run_id"), "start": config.get("start"), "kernels": config.get("kernels", "numba"),
            "order of the domains": config.get("domains")} | {
        f"{part} {name}": value for part, values in parts.items() for name, value in values.items()}


def imports_of(config: dict) -> dict[str, str]:
    """{name: beginning of its sha256} of the user's files that a run imported, from its config.json.

    Of files with one name in several folders it has all hashes, whatever their order.
    """
    hashes = collections.defaultdict(list)
    for file in config.get("imports", ()):
        hashes[Path(file["path"]).name].append(file["sha256"][:12])
    return {name: " and ".join(sorted(those)) for name, those in hashes.items()}


def differing(found: dict, wanted: dict) -> list[str]:
    """What distinguishes two runs, from the contents of their config.json: `steps is 5, not 6`; [] for one run."""
    found, wanted = _identity({"domains": wanted.get("domains")} | found), _identity(wanted)
    return [f"{name} is {found.get(name)}, not {wanted.get(name)}"
            for name in dict.fromkeys([*wanted, *found]) if found.get(name) != wanted.get(name)]


def with_defaults(config: dict) -> dict:
    """{"model", "training"} of a config.json, with the defaults of fields that are newer than the file.

    A part that is not valid is unchanged.
    """
    parts = {name: config.get(name, {}) for name in ("model", "training")}
    with contextlib.suppress(ValueError, TypeError):
        parts["model"] = ModelConfig.from_dict(parts["model"]).to_dict()
    with contextlib.suppress(ValueError, TypeError):
        parts["training"] = dataclasses.asdict(TrainConfig(**parts["training"]))
    return parts


def machine() -> dict:
    """The processor, threads and versions, ready for JSON. Timings depend on them, and so may the last bits."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    versions = {"python": platform.python_version()}
    for package in ("numpy", "numba", "scipy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"processor": name, "cores": os.cpu_count(), "threads": kernels.get_threads(),
            "thread_info": kernels.thread_info(), "versions": versions}


# key of the first value: key of the list, which is there if a resume had another
NOTED = {"processor": "processors", "versions": "all_versions"}


def noted(config: dict, name: str, old=None) -> list:
    """The values of `name`, such as its processor, that a run was trained with: several if it was resumed elsewhere.

    old: for a run that does not say.
    """
    found = config.get(NOTED.get(name)) or [config.get(name, old)]
    return [one for one in found if one] if isinstance(found, list) else []


@functools.cache
def execute_files(paths: tuple) -> list[dict]:
    """Execute the user's files that define routers or losses, once in this process for each tuple of paths.

    Returns what config.json records: [{"path": absolute path, "sha256": hash}]. Raises RunError if a file fails.
    """
    try:
        return [{"path": path, "sha256": routers.load_file(path)} for path in map(os.path.abspath, paths)]
    except (ValueError, OSError) as error:
        raise RunError(str(error)) from None
