"""Result rows: what a study left on disk, read back, and the statistics over its seeds, for plots.py and report.py."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import t as student_t

from ..files import read_rows
from ..model.counting import architecture, count
from ..moe.routing import capacity

# Numbers of one MoE layer that its row does not hold as they are.
DERIVED = {
    "mi_excess": lambda layer: layer["mutual_information"] - layer["mutual_information_null"],
    "byte_excess": lambda layer: layer["byte_information"] - layer["byte_information_null"],
    "byte_over_domain": lambda layer: DERIVED["byte_excess"](layer) - DERIVED["mi_excess"](layer),
    "router_entropy_share": lambda layer: layer["router_entropy"] / math.log(max(2, len(layer["load"]))),
    "marginal_entropy_share": lambda layer: layer["marginal_entropy"] / math.log(max(2, len(layer["load"]))),
}
CONFIG_KEYS = {"run_id", "config_id", "seed", "model", "training", "corpus", "domains", "parameters", "versions",
               "threads"}  # what is read of a config.json


@dataclass(frozen=True)
class RunRecord:
    """One training run: its settings, its log rows by step, and how it ended."""

    run_id: str
    config: dict
    log: list
    summary: dict | None = None
    failure: dict | None = None

    config_id = property(lambda self: self.config["config_id"])
    seed = property(lambda self: self.config["seed"])
    model = property(lambda self: self.config["model"])
    final = property(lambda self: self.summary["final"])  # the last measurement, on the larger validation set
    measured = property(lambda self: self.summary.get("measured", {}))  # what an experiment asked of the trained model
    is_moe = property(lambda self: bool(self.final["layers"]))

    @property
    def state(self):
        """"complete", "failed" (its loss was not finite) or "incomplete" (stopped, or still running)."""
        return "complete" if self.summary else "failed" if self.failure else "incomplete"

    @property
    def leaky(self):
        """Whether routing on the prefix alone gives another loss: read off the rows, not off the router's name."""
        return any(row["val_cross_entropy"] != row["causal_cross_entropy"] for row in [*self.log, self.final])

    @property
    def label(self):
        """The config's name: its id, router, experts per token and balance coefficient."""
        made_of = "{router}, K={top_k}, aux {aux_coef:g}".format_map(self.model) if self.is_moe else "dense"
        return f"{self.config_id} {made_of}"


def load_runs(study_dir):
    """Every run under `study_dir/runs`, whatever its state, by config and seed. Without a config: incomplete.

    Raises ValueError for a finished run that is damaged: numbers of a part of it would pass for those of the whole.
    """
    runs = []
    for folder in sorted(path for path in Path(study_dir, "runs").glob("*") if path.is_dir()):
        config, summary, failure = (_read_json(folder / f"{name}.json") for name in ("config", "summary", "failure"))
        rows = [row for row in read_rows(folder / "log.jsonl") if isinstance(row.get("step"), int)]
        log = {row["step"]: row for row in rows}  # a step written twice: the later row
        if (folder / "summary.json").exists() and not _whole(folder, config, summary, log):
            raise ValueError(f"{folder} is a finished run with damaged files: move it away, or fetch it again")
        known = config or {"config_id": folder.name, "seed": -1, "model": {}}
        runs.append(RunRecord(folder.name, known, [log[step] for step in sorted(log)], summary, failure))
    return sorted(runs, key=lambda run: (run.config_id, run.seed))


def _whole(folder, config, summary, log):
    """Whether the files of a finished run are all there, and of one run."""
    if not CONFIG_KEYS <= (config or {}).keys() or not {"run_id", "steps", "final"} <= (summary or {}).keys():
        return False
    whole_log = max(log, default=None) == summary["steps"]
    return config["run_id"] == summary["run_id"] == folder.name and whole_log


def _read_json(path):
    """The JSON object in a file, None where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def complete_runs(study_dir):
    """The finished runs, grouped: {config id: [RunRecord by seed]}. ValueError where there is none."""
    groups = {}
    for run in load_runs(study_dir):
        if run.state == "complete":
            groups.setdefault(run.config_id, []).append(run)
    if not groups:
        raise ValueError(f"{study_dir}: no finished run to read: train some first")
    return groups


def coefficient_sweep(groups):
    """Ids of the configs that are one model but for the balance coefficient, by rising coefficient; [] for none."""
    families = {}
    for name, runs in groups.items():
        rest = {key: value for key, value in runs[0].model.items() if key != "aux_coef"}
        if runs[0].is_moe:
            families.setdefault(json.dumps(rest, sort_keys=True), {}).setdefault(runs[0].model["aux_coef"], name)
    largest = max(families.values(), key=len, default={})
    return [largest[coefficient] for coefficient in sorted(largest)] if len(largest) > 1 else []


def measure(row, name, layer=None):
    """A field of a row, or of its MoE layers (their mean, or the one at index `layer`); nan for a dense model's."""
    if name in row:
        return math.nan if row[name] is None else float(row[name])
    layers = row["layers"] if layer is None else row["layers"][layer : layer + 1]
    if layers and name not in DERIVED and name not in layers[0]:
        raise ValueError(f"no metric {name}: it stands in no row, and is neither derived from one (rows.py) nor "
                         "measured")
    numbers = [DERIVED[name](one) if name in DERIVED else one[name] for one in layers]
    return float(np.mean(numbers)) if numbers else math.nan


@dataclass(frozen=True)
class Interval:
    """Mean of n values and the half width of its interval; the half width is nan where n is 1."""

    mean: float
    half: float
    n: int
    p: float = math.nan  # two-sided, against a mean of zero

    low = property(lambda self: self.mean - self.half)
    high = property(lambda self: self.mean + self.half)


def t_interval(values, level=0.95):
    """Student's t interval of a mean, n - 1 degrees of freedom. One value gives no interval, and no value nan."""
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    if n < 2 or not np.isfinite(values).all():
        return Interval(mean, math.nan, n)
    if np.ptp(values) == 0.0:  # not by their standard deviation, which rounding can raise above 0
        return Interval(mean, 0.0, n, float(mean == 0.0))
    error = float(values.std(ddof=1)) / math.sqrt(n)
    half = float(student_t.ppf(0.5 + level / 2, n - 1)) * error
    return Interval(mean, half, n, float(2 * student_t.sf(abs(mean) / error, n - 1)))


def excess(run):
    """Causal loss above the entropy rate of the text, in nats a byte; nan where nobody knows it."""
    rates = [part.get("entropy_rate") for part in run.config["corpus"].values()]
    return math.nan if None in rates else measure(run.final, "causal_cross_entropy") - float(np.mean(rates))


def padding(run):
    """Share of the places that a capacity limit keeps in the experts and that no token takes; nan without a limit."""
    model, n = run.config["model"], run.config["training"]["batch_size"] * run.config["model"]["seq_len"]
    if model["capacity_factor"] is None:
        return math.nan
    places = model["n_experts"] * capacity(n, model["n_experts"], model["top_k"], model["capacity_factor"]) / n
    taken = np.mean([sum(layer["load"]) for layer in run.final["layers"]])
    return 1 - taken / (places * run.final["validation_tokens"])


def megaflops(run):
    """Forward operations for one byte, in millions, with attention over half of the window."""
    model = run.config["model"]
    return count(architecture(model), context=model["seq_len"] / 2)[-1].flops / 1e6


TOKEN_BYTES = 4  # of English, in the vocabularies of 50,000 tokens that papers use

# Numbers of a run that no row holds as they are.
OF_RUN = {
    "padding": padding,
    "megaflops": megaflops,
    "parameters": lambda run: run.config["parameters"]["total"] / 1e6,
    "excess": excess,
    "seconds": lambda run: run.summary["seconds"],
    "train_cross_entropy": lambda run: run.log[-1]["cross_entropy"],  # the mean over the steps since the row before
    "worst_cv": lambda run: max(measure(row, "load_cv") for row in run.log if row["step"]),
    "worst_dead": lambda run: max(measure(row, "dead_experts") for row in run.log if row["step"]),
    "token_perplexity": lambda run: math.exp(TOKEN_BYTES * measure(run.final, "causal_cross_entropy")),
    "lost_all": lambda run: 1 - measure(run.final, "token_coverage"),
    "leak": lambda run: measure(run.final, "causal_cross_entropy") - measure(run.final, "val_cross_entropy"),
}


def value(run, name):
    """A number of a finished run: of the run, of what was measured at its end, or of its final row."""
    if name in OF_RUN:
        return float(OF_RUN[name](run))
    if name in run.measured:
        return math.nan if run.measured[name] is None else float(run.measured[name])
    return measure(run.final, name)


def over_seeds(runs, name):
    """Interval over the seeds of one config of a number of the finished runs."""
    return t_interval([value(run, name) for run in runs])


def gap(groups, name, first, second, factor=1):
    """Interval of the differences first - factor * second of a number of two configs, paired by seed."""
    ours, theirs = ({run.seed: value(run, name) for run in groups[config]} for config in (first, second))
    return t_interval([ours[seed] - factor * theirs[seed] for seed in ours if seed in theirs])
