"""Models and texts of runs that are there: the last checkpoint, the files and the text that a run was made with."""

import hashlib
import operator
from pathlib import Path

from .. import files
from ..files import CheckpointError
from ..model.transformer import Transformer
from ..model.upcycling import upcycle
from ..moe.routers import user_files
from .data import SYNTHETIC, Corpus, CorpusError, load_corpus
from .identity import RunError, execute_files

UNUSABLE = (RunError, OSError, KeyError, ValueError, TypeError)  # what a recorded file that cannot be used raises


def execute_recorded_of(folder: str | Path) -> None:
    """Execute the files that a run's config.json names, by `execute_recorded`. Raises CheckpointError for others."""
    place = Path(folder, "config.json")
    try:
        execute_recorded(files.read_json(place) if place.exists() else {})
    except UNUSABLE as error:
        raise CheckpointError(f"{place} names files to import that cannot be used: {error}") from None


def execute_recorded(config: dict) -> None:
    """Execute the files that a run's config names, so that its routers and losses are known.

    A file is executed if its hash is the recorded one and this user has imported a file of that hash on this machine:
    results from elsewhere cannot bring code with them. Raises one of UNUSABLE for any other file.
    """
    recorded = [file for file in config.get("imports", []) if file["sha256"] not in user_files.IMPORTED]
    for path, sha256 in [(Path(file["path"]), file["sha256"]) for file in recorded]:
        if not user_files.imported_before(sha256):
            raise ValueError(f"{path} is not in the list of imported files, {user_files.LIST}: read it, and give "
                             "it once by --import")
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise ValueError(f"{path} has changed since this run: put it back as it was")
    execute_files(tuple(file["path"] for file in recorded))


def load_model(folder: str | Path) -> Transformer:
    """The model of a run's last checkpoint, after `execute_recorded_of`. Raises CheckpointError if there is none."""
    return load_checkpoint(folder)[0]


def load_checkpoint(folder: str | Path) -> tuple[Transformer, int]:
    """(model, step) of a run's last checkpoint, as `load_model` reads it."""
    path = Path(folder, "checkpoint.npz")
    if Path(folder, "log.jsonl").exists() and not path.exists():
        raise CheckpointError(f"{folder} has rows but no checkpoint (published runs have none): train it first")
    if Path(folder).is_dir() and not path.exists():
        raise CheckpointError(f"{folder} holds no checkpoint: give the folder of one run, such as OUT/runs/D-seed0")
    arrays, header = files.load_arrays(path, "checkpoint")
    execute_recorded_of(folder)
    weights = {name.removeprefix("p/"): array for name, array in arrays.items() if name.startswith("p/")}
    try:
        return Transformer.from_arrays(header["model"], weights), operator.index(header["step"])
    except (KeyError, ValueError, TypeError, MemoryError) as error:
        raise CheckpointError(f"{path} does not describe a model of this version ({error}): train it again") from None


def corpus_of(folder: str | Path, seq_len: int) -> Corpus:
    """The Corpus that a run was trained on: the default one (also where config.json does not say) or the synthetic.

    Raises CorpusError for another text, which a run does not keep.
    """
    def hashes(described):
        return {name: text["sha256"] for name, text in described.items()}

    try:
        wanted = hashes(files.read_json(Path(folder, "config.json"))["corpus"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        wanted = None
    for text in (None, SYNTHETIC):
        corpus = load_corpus(text, seq_len)
        if wanted in (None, hashes(corpus.describe())):
            return corpus
    raise CorpusError(f"{folder} was trained on a text that is not here: give --text")


def first_model(plan, runs: Path) -> Transformer:
    """The model that a run starts with: new, or the finished run that plan.start names, upcycled if it was dense.

    runs: the folder of the study's runs. Raises RunError if the other run is not finished, ValueError if its model
    cannot be upcycled.
    """
    if plan.start is None:
        return Transformer(plan.model, seed=plan.seed)
    other = runs / plan.start_id
    if not (other / "summary.json").exists():
        raise RunError(f"{plan.run_id} starts from {other}, which is not finished: run the same command again")
    trained = load_model(other)
    return trained if plan.model == trained.config else upcycle(trained, plan.model, plan.seed)


def trainable(model: Transformer, plan) -> dict:
    """The parameters of a model by name. Raises ValueError for another config than the plan's, or if all is frozen."""
    if model.config != plan.model:
        one, other = model.config.to_dict(), plan.model.to_dict()
        name = next(name for name in one if one[name] != other[name])
        raise ValueError(f"the model has {name} {one[name]!r}, but the plan {other[name]!r}: make it of the plan's "
                         "config, Transformer(plan.model, plan.seed)")
    parameters = model.parameters()
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError(f"freeze {list(plan.model.freeze)} leaves nothing to train")
    return parameters
