"""Result rows: the runs that a study left on disk, read back, and what an experiment makes of them."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files import printable, read_json, read_rows, write_rows
from ..moe.routers import ROUTERS
from ..training.lease import holder
from ..training.run_folder import RunFolder, with_defaults
from .experiment import Claim, Experiment
from .quantities import LOSS, QUANTITIES, experts_per_token, quantity, value
from .statistics import Comparison, Contrast, Interval, enough_digits, holm, t_interval

COMPACT = "runs.jsonl"  # all runs of a study in one file, as it is published
# What tables and figures read of a run, see `_fits`. None stands for a field that is not there.
NUMBER, OPTIONAL = (int, float), (int, float, type(None))
PARTS = {"config": dict, "log": [dict], "summary": (dict, type(None)), "failure": (dict, type(None))}
CONFIG = {"run_id": str, "config_id": str, "seed": int, "threads": int, "versions": dict, "domains": [str],
          "model": {"router": (str, list), "top_k": NUMBER, "aux_coef": NUMBER, "seq_len": int},
          "training": {"batch_size": int, "learning_rate": NUMBER}, "parameters": {"total": int, "active": int},
          "corpus": {...: {"train_bytes": int, "entropy_rate": OPTIONAL}}}
LAYER = {"layer": int, "load": [int], "domain_load": [[int]], "dead_experts": int} | dict.fromkeys((
    "token_coverage", "load_entropy", "router_entropy", "marginal_entropy", "mutual_information",
    "mutual_information_null", "byte_information", "byte_information_null"), NUMBER)
ROW = {"step": int, "validation_tokens": int, LOSS: NUMBER, "val_cross_entropy": NUMBER, "layers": [LAYER]}
SUMMARY = {"run_id": str, "steps": int, "seconds": NUMBER, "final": ROW, "measured": (dict, type(None))}
STATES = ("collapsed", "starved", "in use")  # of an MoE layer


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
    measured = property(lambda self: self.summary.get("measured") or {})  # what an experiment asked of the model
    rules = property(lambda self: self.config.get("rules", ""))  # by which its routers choose, see Router.rules
    is_moe = property(lambda self: bool(self.final["layers"]))

    # whether routing on the prefix alone gives another loss, in any row
    leaky = property(lambda self: any(row["val_cross_entropy"] != row[LOSS] for row in [*self.log, self.final]))

    # failed: the loss was not finite; incomplete: stopped, or still running
    state = property(lambda self: "complete" if self.summary else "failed" if self.failure else "incomplete")

    @property
    def made_of(self) -> str:
        """Router, experts per byte and balance coefficient, in a few words; K as measured where it is not top_k."""
        if not self.is_moe:
            return "dense"
        router, top_k, k = self.model["router"], self.model["top_k"], experts_per_token(self.final)
        router = " ".join(filter(None, (router if isinstance(router, str) else "+".join(map(str, router)), self.rules)))
        limited = self.model.get("capacity_factor") is not None
        shown = f"{top_k}" if limited or abs(k - top_k) < 0.005 else f"{k:.2f} measured"
        return f"{router}, K={shown}, aux {self.model['aux_coef']:g}"


def load_runs(study_dir) -> list[RunRecord]:
    """Every run of `study_dir`, by config and seed: those of its file runs.jsonl, and the folders in its `runs`.

    A run is incomplete without a config. Raises ValueError for a finished run that is damaged, because
    the numbers that are left would be taken for all, and for two different runs of one name.
    """
    runs = {}
    for run in (*_compact_runs(Path(study_dir, COMPACT)), *_folder_runs(Path(study_dir, "runs"))):
        if runs.setdefault(run.run_id, run) != run:
            raise ValueError(f"{study_dir}: {run.run_id} is in {COMPACT} and in runs/, and they differ: move one away")
    return sorted(runs.values(), key=lambda run: (run.config_id, run.seed))


def compact(study_dir) -> tuple[Path, int]:
    """Write study_dir/runs.jsonl, one line for each finished or failed run: (path, number of runs). The folders stay.

    Raises ValueError where no run is finished.
    """
    runs = [run for run in load_runs(study_dir) if run.state != "incomplete"]
    if not runs:
        raise ValueError(f"{study_dir}: no finished run to write: train some first")
    path = Path(study_dir, COMPACT)
    write_rows(path, [{part: getattr(run, part) for part in PARTS} for run in runs])
    return path, len(runs)


def overview(study_dir) -> list[dict]:
    """How far each run in the folders of a study is, by name; the runs may be in training.

    Each dict has `run`, `state` ("finished", "running", "failed" or "waiting"), `step`, `steps`, `loss` (validation;
    None before the first), `left` (seconds, of a running one; None if unknown) and `where` (the host of a running one,
    or why it failed). Raises ValueError if there are no runs.
    """
    found = [_progress(place) for place in sorted(Path(study_dir, "runs").glob("*")) if place.is_dir()]
    if not found:
        raise ValueError(f"{study_dir}: no runs in it: give the --out of a study or experiment")
    return found


def _progress(place):
    config, failure = (_json(place / f"{name}.json") for name in ("config", "failure"))
    rows = [row for row in read_rows(place / "log.jsonl") if _fits(row, {"step": int, LOSS: NUMBER, "seconds": NUMBER})]
    row, process = (rows or [{"step": 0, LOSS: None, "seconds": 0.0}])[-1], holder(place)
    steps = config["training"]["steps"] if _fits(config, {"training": {"steps": int}}) else None
    state = ("finished" if RunFolder(place).summary() else "running" if process else "failed" if failure is not None
             else "waiting")
    left, where = None, ""
    if state == "running":
        left = row["seconds"] / row["step"] * (steps - row["step"]) if steps and row["step"] else None
        where = f"{process['host']}, process {process['pid']}"
    elif state == "failed":
        where = f"{failure.get('reason')} at step {failure.get('step')}"
    return {"run": place.name, "state": state, "step": row["step"], "steps": steps, "loss": row[LOSS], "left": left,
            "where": where}


def _folder_runs(folder):
    for place in sorted(path for path in folder.glob("*") if path.is_dir()):
        config, summary, failure = (_json(place / f"{name}.json") for name in ("config", "summary", "failure"))
        yield _record(place, config, read_rows(place / "log.jsonl"), summary, failure)


def _json(path):
    """The JSON object in a file: None where there is no file, {} where it is damaged."""
    try:
        return read_json(path) if path.exists() else None
    except ValueError:
        return {}


def _compact_runs(path):
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            parts = json.loads(line)
            if not _fits(parts, PARTS):
                raise ValueError
            yield _record(Path(str(parts["config"].get("run_id"))), **{part: parts[part] for part in PARTS})
        except (ValueError, KeyError, RecursionError):
            raise ValueError(f"{path}: line {number} is damaged: fetch the file again") from None


def _record(place, config, log, summary, failure):
    """The RunRecord of what was read. The name of `place`, its folder, is the run id."""
    rows = {row["step"]: row for row in log if isinstance(row.get("step"), int)}  # a step written twice: the later row
    log = [rows[step] for step in sorted(rows)]
    if summary is not None and not _is_whole(place.name, config, log, summary):
        raise ValueError(f"{printable(place)} is a finished run with damaged files: move it away, or fetch it again")
    if not _fits(config, CONFIG):
        config = {"config_id": place.name, "seed": -1, "model": {}}
    config = {"rules": _rules(config["model"])} | config | {"model": with_defaults(config["model"])}
    return RunRecord(place.name, config, log, summary, failure)


def _rules(model):
    """The rules of a stored ModelConfig's routers; expert choice had one causal rule before it had thresholds."""
    router, options = model.get("router") or (), model.get("router_options") or {}
    options = options if "shared_gate" in model else {"causal_rule": "prefix"} | options
    known = (ROUTERS.get(name) for name in dict.fromkeys([router] if isinstance(router, str) else router))
    return "; ".join(filter(None, (cls.rules(options) for cls in known if cls)))


def _is_whole(name, config, log, summary):
    """Whether the parts of a finished run are all there, are of one run, and have the names and types that are read."""
    if not (_fits(config, CONFIG) and _fits(log, [ROW]) and _fits(summary, SUMMARY)) or not log:
        return False

    def layers(row):
        return [(layer["layer"], len(layer["load"]), layer.keys()) for layer in row["layers"]]

    final = summary["final"]
    alike = all(row.keys() >= final.keys() and layers(row) == layers(final) for row in log)
    parts = (final, *log, *(layer for row in (final, *log) for layer in row["layers"]), summary.get("measured") or {})
    numbers = all(isinstance(part.get(metric), OPTIONAL) for part in parts for metric in QUANTITIES)
    return config["run_id"] == summary["run_id"] == name and log[-1]["step"] == summary["steps"] and alike and numbers


def _fits(found, shape) -> bool:
    """Whether a JSON value has a shape: a type or several, [shape of each item], or {name: shape}, ... for any name."""
    if isinstance(shape, list):
        return isinstance(found, list) and all(_fits(each, shape[0]) for each in found)
    if isinstance(shape, dict):
        return isinstance(found, dict) and all(
            _fits(each, of) for name, of in shape.items()
            for each in (found.values() if name is ... else [found.get(name)]))
    return isinstance(found, shape) and not isinstance(found, bool)


class Results:
    """The finished runs of an experiment under `folder`, by setting, and its planned comparisons.

    Raises ValueError where no run is finished, and where runs that would be averaged differ in more than the seed.
    """

    def __init__(self, experiment: Experiment, folder):
        self.experiment, self.folder, self.all_runs = experiment, Path(folder), load_runs(folder)
        found = {s.id: [run for run in self.all_runs if run.config_id == s.id and run.state == "complete"]
                 for s in experiment.settings}
        self.groups = {name: runs for name, runs in found.items() if runs}
        self.with_experts = [name for name, runs in self.groups.items() if runs[0].is_moe]
        self.runs = [run for runs in self.groups.values() for run in runs]
        if not self.runs:
            raise ValueError(f"{folder}: no finished run of the experiment {experiment.name}: train some first")
        for runs in self.groups.values():
            _require_equal(runs, "model", "training", "start")
        _require_equal(self.runs, "corpus", "measured")
        self.tests = holm([Comparison(contrast, t_interval(contrast.of(self.numbers)))
                           for contrast in experiment.planned if self.has(contrast)])

    @property
    def ready(self) -> bool:
        """Whether figures and sentences can be made: every setting has a run, and all have a seed in common."""
        seeds = [{run.seed for run in runs} for runs in self.groups.values()]
        complete = len(self.groups) == len(self.experiment.settings) and bool(set.intersection(*seeds))
        return complete or self.experiment.adjustable

    def has(self, contrast: Contrast) -> bool:
        """Whether there are runs of all settings of a Contrast, with experts if it asks for the smallest of several."""
        if isinstance(contrast.setting, tuple):
            return any(name in self.with_experts for name in contrast.setting)
        return all(name in self.groups for name in contrast.settings)

    def numbers(self, metric: str, setting: str | tuple) -> dict[int, float]:
        """{seed: number} of a setting, or the smallest of several settings with experts."""
        if not isinstance(setting, tuple):
            return {run.seed: value(run, metric) for run in self.groups[setting]}
        parts = [self.numbers(metric, name) for name in setting if name in self.with_experts]
        return {seed: min(part[seed] for part in parts if seed in part) for seed in sorted(set().union(*parts))}

    def interval(self, metric: str, setting: str) -> Interval:
        return t_interval(list(self.numbers(metric, setting).values()))

    def mean(self, metric: str, setting: str) -> float:
        return self.interval(metric, setting).mean

    def ranked(self, metric: str, names=None) -> list[str]:
        """Setting ids by the mean of a metric, smallest first."""
        return sorted(names or self.groups, key=lambda name: self.mean(metric, name))

    def label(self, name: str) -> str:
        """The name of a setting in figures; where --set may change settings, with what its runs really were."""
        return f"{name} {self.groups[name][0].made_of}" if self.experiment.adjustable else name

    def cell(self, metric: str, name: str, half: bool = True, leaky: bool = True) -> str:
        """`mean ± half width` over seeds, a dash for no number; leaky: add the leaky number to a causal one."""
        one, digits = self.interval(metric, name), quantity(metric).digits
        if not np.isfinite(one.mean):
            return "–"
        digits = enough_digits([one.half], 0 if abs(one.mean) >= 100 else digits)
        shown = f"{round(one.mean, digits) + 0.0:,.{digits}f}"
        if half and round(one.half, 6) > 0:  # nan, of one seed, is not above 0
            shown += f" ± {one.half:,.{digits}f}"
        if leaky and metric.startswith("causal_") and self.groups[name][0].leaky:
            shown += f" (leaky {self.cell(metric.replace('causal', 'val'), name, half)})"
        return shown

    def range_and_verdicts(self, metric: str, among=None) -> str:
        """A paragraph about a planned metric among these settings: lowest and highest mean, and its verdicts.

        Each clear or suggestive difference has a sentence; those that are undecided or not tested are counted.
        """
        names = [name for name in self.ranked(metric, among) if np.isfinite(self.mean(metric, name))]
        ends = ", ".join(f"`{name}` {self.cell(metric, name, half=False, leaky=False)}"
                         for name in dict.fromkeys((*names[:1], *names[-1:]))) or "no number"
        tests = self.tests_of(metric, among)
        counts = Counter(one.word for one in tests)
        said = [f"{one.contrast} is {one.cells[0]} ({one.word})." for one in tests
                if one.word in ("clear", "suggestive")]
        if undecided := counts["undecided"]:
            said.append("No difference could be shown." if undecided == len(tests) else
                        f"{undecided} other{'s are' if undecided > 1 else ' is'} undecided.")
        if untested := counts["not tested"]:
            said.append(f"{untested} not tested: too few common seeds.")
        verdicts = " ".join(said) or "Nothing to compare."
        return f"{quantity(metric).heading} Lowest and highest: {ends}. {verdicts}"

    def tests_of(self, metric: str, among=None) -> list[Comparison]:
        """The Comparisons of a metric without a factor, among these settings alone if some are named."""
        return [one for one in self.tests if one.contrast.metric == metric and one.contrast.times == 1
                and (among is None or set(one.contrast.settings) <= set(among))]

    def layers_at_the_end(self, names) -> str:
        """A paragraph: how the layers of these settings ended, and the first setting with all of them in use."""
        states = {name: Counter(_state(layer) for run in self.groups[name] for layer in run.final["layers"])
                  for name in names}
        said = [f"`{name}` " + ", ".join(f"{of[state]} {state}" for state in STATES if state in of)
                for name, of in states.items()]
        alive = next((f"`{name}`" for name in names if set(states[name]) == {"in use"}), "none")
        return (f"**MoE layers at the end, of all seeds.** {'; '.join(said)}. The first setting with every layer in "
                f"use: {alive}.")

    def outcome(self, claim: Claim) -> tuple[str, list]:
        """(verdict, [(Effect, (seeds,) array)]) of a Claim: it held where all its effects did."""
        found = [(effect, effect.of(self.numbers)) for effect in claim.effects]
        words = {effect.word(numbers) for effect, numbers in found}
        return next(word for word in ("did not hold", "undecided", "held") if word in words), found


def _state(layer):
    """One of STATES, which report.py defines."""
    n_experts = len(layer["load"])
    if n_experts ** layer["load_entropy"] < n_experts / 2:
        return "collapsed"
    return "starved" if layer["dead_experts"] else "in use"


def _require_equal(runs, *parts):
    """ValueError where runs that are averaged or compared differ in a part of config.json, or in what is measured."""
    configs = [run.config | {"measured": dict.fromkeys(run.measured, "yes")} for run in runs]
    for part in parts:
        first, *others = (found if isinstance(found := config.get(part), dict) else {part: found} for config in configs)
        for run, other in zip(runs[1:], others):
            different = [f"{name}: {first.get(name)}, {other.get(name)}" for name in first | other
                         if first.get(name) != other.get(name)]
            if different:
                raise ValueError(printable(f"{runs[0].run_id} and {run.run_id} differ in their {part} "
                                           f"({'; '.join(different)}), so they are not averaged or compared: move one "
                                           "away"))
