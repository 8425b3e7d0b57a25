"""One training run: the loop, its log, its checkpoints, and how it goes on after a kill.

A run is a folder: config.json first, log.jsonl and checkpoint.npz at every evaluation, summary.json
last, so that its presence says that the run is complete. The state between two evaluations is
a function of the checkpoint alone; a resumed run therefore ends with the same bits.
"""

import contextlib
import dataclasses
import json
import math
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # not a POSIX system: runs are not locked against a second process
    fcntl = None

from . import kernels, metrics
from .evaluation import Validation, evaluate
from .files import CheckpointError, load_arrays, read_rows, save_arrays, write_json, write_rows
from .model import ModelConfig, Transformer, finite, whole_number
from .optim import AdamW, clip_gradients, learning_rate, no_decay_names


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

    steps: int = 2000
    batch_size: int = 8  # windows of seq_len bytes
    learning_rate: float = 1e-3  # the peak
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.1  # of weight matrices only
    max_norm: float = 1.0  # of the gradient
    n_evaluations: int = 20  # besides the one before training
    eval_windows: int = 8  # of each domain at each evaluation
    final_windows: int = 64  # of each domain at the end

    def __post_init__(self):
        for name in ("steps", "batch_size", "n_evaluations", "eval_windows", "final_windows"):
            if not whole_number(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)!r} must be a whole number of at least 1")
        for name in ("learning_rate", "max_norm"):
            if not finite(getattr(self, name)) or getattr(self, name) == 0:
                raise ValueError(f"{name} {getattr(self, name)!r} must be a finite number above 0")
        for name, most in (("weight_decay", math.inf), ("warmup", 1)):
            if not finite(getattr(self, name), most):
                raise ValueError(f"{name} {getattr(self, name)!r} must be a finite number from 0 to {most}")

    def evaluation_steps(self):
        """The steps after which the model is evaluated and saved; the last is always among them."""
        n = min(self.n_evaluations, self.steps)
        return {round(self.steps * (i + 1) / n) for i in range(n)}


@dataclass(frozen=True)
class Run:
    """One run as data: what to train, on what, with which seed."""

    config_id: str
    purpose: str
    seed: int
    model: ModelConfig
    training: TrainConfig

    @property
    def run_id(self):
        return f"{self.config_id}-seed{self.seed}"


def describe(run, corpus, model):
    """config.json: everything that makes the run."""
    sizes = model.count_parameters()
    return {"run_id": run.run_id, "config_id": run.config_id, "purpose": run.purpose, "seed": run.seed,
            "model": run.model.to_dict(), "training": dataclasses.asdict(run.training),
            "corpus": corpus.describe(), "domains": list(corpus.names), "parameters": sizes,
            "threads": kernels.get_threads(), "thread_info": kernels.thread_info(),
            "versions": {"python": platform.python_version(), **{p: version(p) for p in ("numpy", "numba", "scipy")}},
            "processor": platform.processor() or platform.machine()}


FILES = ("summary.json", "checkpoint.npz", "log.jsonl", "failure.json", "config.json")
SAME = ("model", "training", "corpus")  # what must agree for a folder to be this run


def finite_json(value):
    """Whether a row holds finite numbers only: JSON knows no others."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


class Trainer:
    """The state of a run: model, optimizer, generators and log; `advance` takes one step."""

    def __init__(self, run, corpus):
        seed = run.seed
        self.run, self.corpus = run, corpus
        self.model = Transformer(run.model, seed=seed)
        self.parameters = self.model.parameters()
        self.optimizer = AdamW(self.parameters, weight_decay=run.training.weight_decay,
                               no_decay=no_decay_names(self.parameters))
        self.generators = {"data": np.random.default_rng([seed, 1]), "noise": np.random.default_rng([seed, 2])}
        self.step, self.seconds, self.rows, self.sums = 0, 0.0, [], []
        self.initial_divergence = list(map(metrics.weight_divergence, self.model.expert_banks()))

    def advance(self):
        """One step of training; returns the cross-entropy. Raises NonFiniteLoss."""
        started, c = time.perf_counter(), self.run.training
        self.step += 1
        self.optimizer.lr = learning_rate(self.step, c.steps, c.learning_rate, c.warmup)
        ids, targets = self.corpus.batch(self.generators["data"], c.batch_size, self.run.model.seq_len)
        terms = self.model.loss(ids, targets, training=True, rng=self.generators["noise"])
        if not np.isfinite(terms.total.data):
            raise NonFiniteLoss(self.step, self.model.first_nonfinite(ids) or "the loss", "the loss is not finite")
        self.optimizer.zero_grad()
        terms.total.backward()
        norm = clip_gradients(self.parameters, c.max_norm)
        if not math.isfinite(norm):
            bad = [name for name, p in self.parameters.items() if p.grad is not None and not np.isfinite(p.grad).all()]
            raise NonFiniteLoss(self.step, (bad or ["the norm"])[-1], "the gradient is not finite")
        self.optimizer.step()
        value = terms.cross_entropy.item()
        self.sums.append([terms.total.item(), value, *(0.0 if t is None else t.item() for t in (terms.balance, terms.z)), norm])
        self.seconds += time.perf_counter() - started
        return value

    def evaluate(self, windows):
        """The validation part of a row, on so many windows of each domain."""
        c, length = self.run.training, self.run.model.seq_len
        ids, targets, domain = self.corpus.validation(windows, length)
        valid = Validation(ids, targets, domain, self.corpus.names, c.batch_size)
        with np.errstate(all="ignore"):
            row = evaluate(self.model, valid, self.initial_divergence)
        if not finite_json(row):
            raise NonFiniteLoss(self.step, self.model.first_nonfinite(ids) or "the loss", "the validation loss is not finite")
        return row

    def log_row(self):
        """Evaluate, and add a row to the log: training means since the last row, then validation."""
        means = np.mean(self.sums, axis=0).tolist() if self.sums else [None] * 5
        training = dict(zip(("train_loss", "cross_entropy", "balance", "z", "gradient_norm"), means))
        self.sums = []
        self.rows.append({"step": self.step, "seconds": round(self.seconds, 3), "learning_rate": self.optimizer.lr if self.step else None,
                          **training, **self.evaluate(self.run.training.eval_windows)})

    def save(self, path):
        """Write the whole state to a checkpoint."""
        arrays = {f"{part}/{name}": array for part, of in (("m", self.optimizer.m), ("v", self.optimizer.v)) for name, array in of.items()}
        arrays |= {f"p/{name}": p.data for name, p in self.parameters.items()}
        save_arrays(path, arrays, {
            "kind": "checkpoint", "run_id": self.run.run_id, "model": self.run.model.to_dict(), "step": self.step,
            "seconds": self.seconds, "n_rows": len(self.rows), "optimizer_steps": self.optimizer.steps,
            "generators": {name: g.bit_generator.state for name, g in self.generators.items()}})

    def restore(self, folder):
        """Take up the state of folder/checkpoint.npz. Raises CheckpointError where it does not belong to this run."""
        path = folder / "checkpoint.npz"
        arrays, header = load_arrays(path, "checkpoint")
        rows = read_rows(folder / "log.jsonl")
        if header.get("run_id") != self.run.run_id or header.get("model") != self.run.model.to_dict() or len(rows) < header.get("n_rows", math.inf):
            raise CheckpointError(f"{path} belongs to another run, or its log.jsonl is incomplete: start again with --fresh")
        missing = [key for key in ("step", "seconds", "optimizer_steps", "generators") if key not in header]
        parts = {part: {n[2:]: a for n, a in arrays.items() if n[:2] == part + "/"} for part in "pmv"}
        shapes = {part: {n: a.shape for n, a in of.items()} for part, of in parts.items()}
        if missing or shapes["m"] != shapes["p"] or shapes["v"] != shapes["p"]:
            raise CheckpointError(f"{path} is not a whole checkpoint ({', '.join(missing) or 'moments'} missing): start again with --fresh")
        self.model.set_weights(parts["p"], path)
        self.optimizer.m, self.optimizer.v = parts["m"], parts["v"]
        self.optimizer.steps = header["optimizer_steps"]
        self.step, self.seconds, self.rows = header["step"], header["seconds"], rows[:header["n_rows"]]
        for name, generator in self.generators.items():
            generator.bit_generator.state = header["generators"][name]


@contextlib.contextmanager
def locked(folder):
    """Hold the folder's lock, so that two processes never write one run; it ends with the process."""
    with open(folder / ".lock", "w") as lock:
        for _ in range(100 if fcntl else 0):  # a killed study's worker needs a moment to notice
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        else:
            if fcntl:
                raise RunError(f"{folder} is being written by another process: wait for it, or choose another --out")
        yield


def train(run, corpus, folder, on_step=lambda step, loss: None, fresh=False):
    """Train `run` in `folder`, from its checkpoint if there is one; a complete run is left as it is.

    on_step(step, cross_entropy) is called after every step. fresh: throw away what the folder holds. Returns the summary, a dict.
    Raises NonFiniteLoss (recorded in failure.json), RunError, files.CheckpointError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        trainer = Trainer(run, corpus)
        for name in FILES if fresh else ():  # summary.json first, so that a kill leaves no run that looks complete
            (folder / name).unlink(missing_ok=True)
        for temporary in folder.glob(".*.*"):  # of a process that was killed while it wrote
            temporary.unlink(missing_ok=True)
        _claim(folder, describe(run, corpus, trainer.model))
        if (folder / "summary.json").exists() and (folder / "log.jsonl").exists():
            return _read(folder / "summary.json")
        (folder / "failure.json").unlink(missing_ok=True)
        try:
            if (folder / "checkpoint.npz").exists():
                trainer.restore(folder)
            else:
                trainer.log_row()
            _loop(trainer, folder, on_step)
            final = {"step": trainer.step, **trainer.evaluate(run.training.final_windows)}
        except NonFiniteLoss as error:
            write_json(folder / "failure.json",
                       {"run_id": run.run_id, "step": error.step, "layer": error.layer, "reason": error.reason})
            raise
        summary = {"run_id": run.run_id, "config_id": run.config_id, "seed": run.seed, "steps": trainer.step,
                   "status": "complete", "seconds": round(trainer.seconds, 3), "final": final}
        write_json(folder / "summary.json", summary)
        return summary


def _loop(trainer, folder, on_step):
    evaluations = trainer.run.training.evaluation_steps()
    while trainer.step < trainer.run.training.steps:
        loss = trainer.advance()
        if trainer.step in evaluations:
            trainer.log_row()
            write_rows(folder / "log.jsonl", trainer.rows)
            trainer.save(folder / "checkpoint.npz")
        on_step(trainer.step, loss)


def _read(path):
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RunError(f"{path} is not a JSON object: move the folder away, or start again with --fresh")
    return value


def _claim(folder, config):
    """Write config.json, or check that the one there is of the same run."""
    path = folder / "config.json"
    if not path.exists():
        return write_json(path, config)
    there = _read(path)
    different = ["run_id"] if there.get("run_id") != config["run_id"] else []
    different += [f"{part} {name}" for part in SAME for name, value in config[part].items() if (there.get(part) or {}).get(name) != value]
    if different:
        raise RunError(f"{folder} holds a run with another {', '.join(different)}: choose another --out, or start again with --fresh")
