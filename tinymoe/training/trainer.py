"""One training run: the loop, its log, its checkpoints, and how it goes on after a kill.

A run is a folder: config.json first, log.jsonl, checkpoint.npz and routings/STEP.npz at every evaluation,
summary.json last, so that its presence says that the run is complete. The state between two evaluations is
a function of the checkpoint alone; a resumed run therefore ends with the same bits.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # not a POSIX system: runs are not locked against a second process
    fcntl = None

from .. import kernels
from ..moe import metrics
from ..model.config import ModelConfig
from ..moe.settings import NOT_NEGATIVE, POSITIVE, SHARE, WHOLE, check_fields, setting
from .evaluation import Validation, evaluate, snapshot
from ..files import CheckpointError, load_arrays, read_rows, save_arrays, write_json, write_rows
from ..model.transformer import Transformer
from .optim import AdamW, clip_gradients, learning_rate, no_decay_names


FILES = ("summary.json", "checkpoint.npz", "log.jsonl", "failure.json", "config.json")
ROUTINGS = "routings"  # the folder of what the routers did to a few validation windows, a file an evaluation
AGAIN = "move this run's folder away and run the same command again"
RECORDED = 2  # of these windows, in each domain


class RunError(Exception):
    """A run that cannot start: its folder is in use or holds a run with other settings."""


class NonFiniteLoss(Exception):
    """The loss or a gradient stopped being finite. step: when; layer: where it began."""

    def __init__(self, step, layer, reason):
        super().__init__(f"{reason} at step {step}, beginning in {layer}; lower the learning rate")
        self.step, self.layer, self.reason = step, layer, reason


@dataclass(frozen=True)
class TrainConfig:
    """How a run trains and how often it looks. Raises ValueError for numbers that make no run."""

    steps: int = setting(2000, "training steps", WHOLE)
    batch_size: int = setting(8, "windows of seq_len bytes in a batch", WHOLE)
    learning_rate: float = setting(1e-3, "the largest rate, after the warm-up", POSITIVE)
    warmup: float = setting(0.05, "share of the steps in which the rate rises", SHARE)
    weight_decay: float = setting(0.1, "of weight matrices only", NOT_NEGATIVE)
    max_norm: float = setting(1.0, "the gradient is scaled down to this norm", POSITIVE)
    n_evaluations: int = setting(20, "evaluations after the one before training", WHOLE)
    eval_windows: int = setting(8, "windows of each domain at each evaluation", WHOLE)
    final_windows: int = setting(64, "windows of each domain at the end", WHOLE)

    def __post_init__(self):
        check_fields(self)

    def evaluation_steps(self):
        """The steps after which the model is evaluated and saved; the last is always among them."""
        n = min(self.n_evaluations, self.steps)
        return {round(self.steps * (i + 1) / n) for i in range(n)}


@dataclass(frozen=True)
class RunPlan:
    """One run as data: what to train, on what, with which seed.

    start: a config id of the same study whose finished run of this seed gives the first weights; a mixture is
        upcycled from a dense one.
    measure: measure(trainer) -> JSON-able dict, kept in the summary of the trained model.
    """

    config_id: str
    purpose: str
    seed: int
    model: ModelConfig
    training: TrainConfig
    start: str | None = None
    measure: Callable | None = None

    @property
    def run_id(self):
        return f"{self.config_id}-seed{self.seed}"


def machine():
    """What a timing depends on, and in the last bits a result: processor, threads, versions. Ready for JSON."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        name = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    return {"processor": name, "cores": os.cpu_count(), "threads": kernels.get_threads(),
            "thread_info": kernels.thread_info(),
            "versions": {"python": platform.python_version(),
                         **{p: version(p) for p in ("numpy", "numba", "scipy") if find_spec(p)}}}


def describe(run, corpus):
    """Everything that makes the run, ready for JSON; config.json adds the model's size and the machine."""
    return {"run_id": run.run_id, "config_id": run.config_id, "purpose": run.purpose, "seed": run.seed,
            "model": run.model.to_dict(), "training": dataclasses.asdict(run.training), "start": run.start,
            "corpus": corpus.describe(), "domains": corpus.names}


def load_model(folder):
    """The model of a run's last checkpoint, a Transformer. Raises files.CheckpointError where there is none."""
    path = Path(folder, "checkpoint.npz")
    if Path(folder, "log.jsonl").exists() and not path.exists():
        raise CheckpointError(f"{folder} has rows but no checkpoint (published runs have none): train it first")
    arrays, header = load_arrays(path, "checkpoint")
    try:
        model = Transformer(ModelConfig.from_dict(header["model"]))
        for name, p in model.parameters().items():
            stored = arrays[f"p/{name}"]
            if stored.shape != p.shape or not np.isfinite(stored).all():
                raise ValueError(f"{name} has another shape, or is not finite")
            p.data[...] = stored
    except (KeyError, ValueError, TypeError, MemoryError) as error:
        raise CheckpointError(f"{path} does not describe a model of this version ({error}): train it again") from None
    return model


def first_model(run, folder):
    """The model that a run starts with: drawn anew, or from the run in the folder beside its own that `start` names.

    Raises RunError where that run is not finished, ValueError where it cannot be upcycled.
    """
    if run.start is None:
        return Transformer(run.model, seed=run.seed)
    other = Path(folder).parent / dataclasses.replace(run, config_id=run.start).run_id
    if not (other / "summary.json").exists():
        raise RunError(f"{run.run_id} starts from {other}, which is not finished: run the same command again")
    trained = load_model(other)
    if run.model == trained.config:
        return trained
    return Transformer.upcycle(trained, run.model, run.seed)


class Trainer:
    """The state of a run: model, optimizer, generators and log; `advance` takes one step."""

    def __init__(self, run, corpus, folder=None):
        seed = run.seed
        self.run, self.corpus = run, corpus
        self.model = first_model(run, folder)
        self.parameters = self.model.parameters()
        if not any(p.requires_grad for p in self.parameters.values()):
            raise ValueError(f"freeze {list(run.model.freeze)} leaves nothing to train")
        self.optimizer = AdamW(self.parameters, weight_decay=run.training.weight_decay,
                               no_decay=no_decay_names(self.parameters))
        on = [1] if run.start else []  # what goes on from another run reads on: not the same batches again
        self.generators = {name: np.random.default_rng([seed, i, *on]) for i, name in ((1, "data"), (2, "noise"))}
        self.step, self.seconds, self.rows = 0, 0.0, []
        self.since = []  # numbers of each step since the last row
        self.recorded = None  # of the last evaluation: evaluation.snapshot
        self.initial_divergence = list(map(metrics.weight_divergence, self.model.expert_banks()))

    def advance(self):
        """One step of training; returns the cross-entropy. Raises NonFiniteLoss."""
        started, c = time.perf_counter(), self.run.training
        self.step += 1
        self.optimizer.lr = learning_rate(self.step, c.steps, c.learning_rate, c.warmup)
        ids, targets = self.corpus.batch(self.generators["data"], c.batch_size, self.run.model.seq_len)
        output = self.model.forward(ids, training=True, rng=self.generators["noise"])
        terms = self.model.loss_terms(output, targets)
        if not np.isfinite(terms.total.data):
            raise NonFiniteLoss(self.step, self.model.first_nonfinite(ids) or "the loss", "the loss is not finite")
        self.optimizer.zero_grad()
        terms.total.backward(retain_graph=False)
        norm = clip_gradients(self.parameters, c.max_norm)
        if not math.isfinite(norm):
            bad = [name for name, p in self.parameters.items() if p.grad is not None and not np.isfinite(p.grad).all()]
            # the last by name is the first in the backward pass
            raise NonFiniteLoss(self.step, (bad or ["the norm"])[-1], "the gradient is not finite")
        self.optimizer.step()
        self.model.after_step(output.routings)
        value = terms.cross_entropy.item()
        routers = [math.nan if term is None else term.item() for term in (terms.balance, terms.z)]
        self.since.append([terms.total.item(), value, *routers, norm])
        self.seconds += time.perf_counter() - started
        return value

    def evaluate(self, windows):
        """The validation part of a row, on so many windows of each domain."""
        c, length = self.run.training, self.run.model.seq_len
        ids, targets, domain = self.corpus.validation(windows, length)
        valid = Validation(ids, targets, domain, self.corpus.names, c.batch_size)
        with np.errstate(all="ignore"):
            row = evaluate(self.model, valid, self.initial_divergence, lambda by_layer: self._keep(valid, by_layer))
        try:
            json.dumps(row, allow_nan=False)
        except ValueError:
            layer = self.model.first_nonfinite(ids) or "the loss"
            raise NonFiniteLoss(self.step, layer, "the validation loss is not finite") from None
        return row

    def _keep(self, valid, by_layer):
        """Keep what the routers did to the first windows of each domain, which stand first and are always the same."""
        shown = min(RECORDED * len(valid.names), len(valid.ids))
        batches = math.ceil(shown / valid.batch_size)
        first = [routings[:batches] for routings in by_layer]
        self.recorded = snapshot(valid.ids[:shown], valid.domain[:shown], first) if first else None

    def save_routings(self, folder):
        """Write what the last evaluation kept, under its step; a dense model has nothing to write."""
        if self.recorded:
            header = {"kind": "routings", "run_id": self.run.run_id, "model": self.run.model.to_dict(),
                      "step": self.step, "names": self.corpus.names}
            save_arrays(folder / ROUTINGS / f"{self.step:06}.npz", self.recorded, header, compress=True)

    def log_row(self):
        """Evaluate, and add a row to the log: training means since the last row, then validation."""
        means = np.mean(self.since, axis=0).tolist() if self.since else [None] * 5
        # a dense model has no balance and no z; one that is not finite has a coefficient of 0, or the run had ended
        means = [None if m is None or not math.isfinite(m) else m for m in means]
        training = dict(zip(("train_loss", "cross_entropy", "balance", "z", "gradient_norm"), means))
        self.since, row = [], self.evaluate(self.run.training.eval_windows)
        warnings = [warning for part, numbers in zip(self.model.moe_parts(), row["layers"]) for warning in
                    metrics.alarms(numbers["layer"], numbers["load"], row["validation_tokens"],
                                   part.router if self.step else None)]
        self.rows.append({"step": self.step, "seconds": round(self.seconds, 3),
                          "learning_rate": self.optimizer.lr if self.step else None,
                          **training, **row, "warnings": warnings})

    def arrays(self):
        """Every array of the state, by name: parameters p/..., and the optimizer's moments m/... and v/..."""
        weights = {name: p.data for name, p in self.parameters.items()}
        parts = {"p": weights, "m": self.optimizer.m, "v": self.optimizer.v}
        return {f"{part}/{name}": array for part, of in parts.items() for name, array in of.items()}

    def save(self, path):
        """Write the whole state to a checkpoint."""
        save_arrays(path, self.arrays(), {
            "kind": "checkpoint", "run_id": self.run.run_id, "model": self.run.model.to_dict(), "step": self.step,
            "seconds": self.seconds, "n_rows": len(self.rows), "optimizer_steps": self.optimizer.steps,
            "generators": {name: g.bit_generator.state for name, g in self.generators.items()}})

    def restore(self, folder):
        """Take up the state of folder/checkpoint.npz. Raises CheckpointError where it does not belong to this run."""
        path, rows, own = folder / "checkpoint.npz", read_rows(folder / "log.jsonl"), self.arrays()
        stored, header = load_arrays(path, "checkpoint")
        complete = {"step", "seconds", "n_rows", "optimizer_steps", "generators"} <= header.keys()
        if not complete or {n: a.shape for n, a in stored.items()} != {n: a.shape for n, a in own.items()}:
            raise CheckpointError(f"{path} lacks a part of this run's state: {AGAIN}")
        same = (header.get("run_id"), with_defaults(header.get("model"))) == (self.run.run_id, self.run.model.to_dict())
        if not same or len(rows) < header["n_rows"]:
            raise CheckpointError(f"{path} is of another run, or its log.jsonl is incomplete: {AGAIN}")
        for name, array in own.items():
            array[...] = stored[name]
        self.optimizer.steps = header["optimizer_steps"]
        self.step, self.seconds, self.rows = header["step"], header["seconds"], rows[:header["n_rows"]]
        for name, generator in self.generators.items():
            generator.bit_generator.state = header["generators"][name]


@contextlib.contextmanager
def locked(folder):
    """Hold the folder's lock, so that two processes never write one run; it ends with the process."""
    with open(folder / ".lock", "w") as lock:
        for _ in range(100):  # ten seconds: a killed study's worker needs a moment to notice
            try:
                if fcntl:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        else:
            raise RunError(f"{folder} is being written by another process: wait for it, or choose another --out")
        yield


def train(run, corpus, folder, on_step=lambda step, loss: None, fresh=False):
    """Train `run` in `folder`, from its checkpoint if there is one; a complete run is left as it is.

    on_step(step, cross_entropy) is called after every step. fresh: throw away what the folder holds.
    Returns the summary, a dict.
    Raises NonFiniteLoss (recorded in failure.json), RunError, files.CheckpointError.
    """
    folder, config = Path(folder), describe(run, corpus)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not fresh and finished(folder):
            _require_same(folder, config)
            return _read(folder / "summary.json")
        try:  # before anything is thrown away: memory may not hold it
            trainer = Trainer(run, corpus, folder)
        except (ValueError, TypeError) as error:  # `freeze` names nothing, or a size that no array has
            raise RunError(str(error)) from None
        for name in FILES if fresh else ():  # summary.json first, so that a kill leaves no run that looks complete
            (folder / name).unlink(missing_ok=True)
        for temporary in [*folder.glob(".*.*"), *folder.glob(f"{ROUTINGS}/.*.*")]:  # of a process killed while it wrote
            temporary.unlink(missing_ok=True)
        if (folder / "config.json").exists():
            _require_same(folder, config)
        else:
            sizes = {"parameters": trainer.model.count_parameters()}
            write_json(folder / "config.json", config | sizes | machine())
        (folder / "failure.json").unlink(missing_ok=True)
        kernels.compile_all(np.float32)  # read back, never compiled here: so that every process has the same bits
        try:
            if (folder / "checkpoint.npz").exists():
                trainer.restore(folder)
            else:
                shutil.rmtree(folder / ROUTINGS, ignore_errors=True)  # of a run that was there before
                trainer.log_row()
                trainer.save_routings(folder)
            _loop(trainer, folder, on_step)
            final = {"step": trainer.step, **trainer.evaluate(run.training.final_windows)}
        except NonFiniteLoss as error:
            write_json(folder / "failure.json",
                       {"run_id": run.run_id, "step": error.step, "layer": error.layer, "reason": error.reason})
            raise
        summary = {"run_id": run.run_id, "config_id": run.config_id, "seed": run.seed, "steps": trainer.step,
                   "status": "complete", "seconds": round(trainer.seconds, 3), "final": final}
        if run.measure:
            summary["measured"] = run.measure(trainer)
        write_json(folder / "summary.json", summary)
        return summary


def finished(folder):
    """Whether the folder holds a finished run, with its log to the last row. A torn summary is written again."""
    try:
        summary, last = json.loads((folder / "summary.json").read_bytes()), read_rows(folder / "log.jsonl")[-1]
        whole = summary["status"] == "complete" and last["step"] == summary["steps"]
        return whole and (folder / "config.json").exists()
    except (OSError, ValueError, TypeError, LookupError):
        return False


def _loop(trainer, folder, on_step):
    evaluations = trainer.run.training.evaluation_steps()
    while trainer.step < trainer.run.training.steps:
        loss = trainer.advance()
        if trainer.step in evaluations:
            trainer.log_row()
            write_rows(folder / "log.jsonl", trainer.rows)
            trainer.save_routings(folder)
            trainer.save(folder / "checkpoint.npz")
        on_step(trainer.step, loss)


def _read(path):
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RunError(f"{path} is not a JSON object: {AGAIN}")
    return value


def _require_same(folder, config):
    """RunError where the folder's config.json is of another run than this description."""
    wanted, found = _identity(config), _identity(_read(folder / "config.json"))
    different = [f"{name} is {found.get(name)}, not {value}"
                 for name, value in wanted.items() if found.get(name) != value]
    if different:
        raise RunError(f"{folder} holds a run with other settings ({'; '.join(different)}): choose another --out, "
                       "or start again with --fresh")


def _identity(config):
    """What makes a run itself, as a flat dict: its id, its settings, and the hashes of its texts."""
    texts = {f"corpus {name}": text.get("sha256", "")[:12] for name, text in config.get("corpus", {}).items()}
    parts = {"model": with_defaults(config.get("model", {})), "training": config.get("training", {})}
    return {"run_id": config.get("run_id"), "start": config.get("start")} | texts | {
        f"{part} {name}": value for part, values in parts.items() for name, value in values.items()}


def with_defaults(model):
    """A stored ModelConfig, with the default of every setting that is newer than the file; as it is, if it is none."""
    try:
        return ModelConfig.from_dict(model).to_dict()
    except (ValueError, TypeError):
        return model
