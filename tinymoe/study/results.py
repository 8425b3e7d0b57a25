"""Result rows: the runs that a study left on disk, read back, and what an experiment makes of them."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..files import read_json, read_rows, write_rows
from ..training.run_folder import with_defaults
from .experiment import Claim, Experiment
from .quantities import experts_per_token, quantity, value
from .statistics import Comparison, Contrast, Interval, enough_digits, holm, t_interval

COMPACT = "runs.jsonl"  # all runs of a study in one file, as it is published
PARTS = ("config", "log", "summary", "failure")  # of a line of it
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
    def state(self) -> str:
        """"complete", "failed" (its loss was not finite) or "incomplete" (stopped, or still running)."""
        return "complete" if self.summary else "failed" if self.failure else "incomplete"

    @property
    def leaky(self) -> bool:
        """Whether routing on the prefix alone gives another loss, in any row."""
        return any(row["val_cross_entropy"] != row["causal_cross_entropy"] for row in [*self.log, self.final])

    @property
    def made_of(self) -> str:
        """Router, experts per byte and balance coefficient, in a few words; K as measured where it is not top_k."""
        if not self.is_moe:
            return "dense"
        router, top_k, k = self.model["router"], self.model["top_k"], experts_per_token(self.final)
        router = router if isinstance(router, str) else "+".join(router)
        limited = self.model.get("capacity_factor") is not None
        shown = f"{top_k}" if limited or abs(k - top_k) < 0.005 else f"{k:.2f} measured"
        return f"{router}, K={shown}, aux {self.model['aux_coef']:g}"


# -- reading and writing ------------------------------------------------------------------------

def load_runs(study_dir) -> list[RunRecord]:
    """Every run of `study_dir`, by config and seed: those of its file runs.jsonl, and the folders in its `runs`.

    A run is incomplete without a config. Raises ValueError for a finished run that is damaged, because a part of its
    numbers would pass for the whole, and for two different runs of one name.
    """
    runs = {}
    for run in (*_compact_runs(Path(study_dir, COMPACT)), *_folder_runs(Path(study_dir, "runs"))):
        if runs.setdefault(run.run_id, run) != run:
            raise ValueError(f"{study_dir}: {run.run_id} is in {COMPACT} and in runs/, and they differ: move one away")
    return sorted(runs.values(), key=lambda run: (run.config_id, run.seed))


def compact(study_dir) -> tuple[Path, int]:
    """Write study_dir/runs.jsonl: one line for each finished or failed run, with its config, log, summary and failure.

    Returns (path, number of runs). The folders in `runs` stay. Raises ValueError where no run is finished.
    """
    runs = [run for run in load_runs(study_dir) if run.state != "incomplete"]
    if not runs:
        raise ValueError(f"{study_dir}: no finished run to write: train some first")
    path = Path(study_dir, COMPACT)
    write_rows(path, [{key: getattr(run, key) for key in PARTS} for run in runs])
    return path, len(runs)


def _folder_runs(folder):
    for place in sorted(path for path in folder.glob("*") if path.is_dir()):
        parts = (_json_or_none(place / f"{name}.json") for name in ("config", "summary", "failure"))
        yield _record(place, *parts, read_rows(place / "log.jsonl"), (place / "summary.json").exists())


def _compact_runs(path):
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            config, log, summary, failure = (json.loads(line)[key] for key in PARTS)
            if not all(isinstance(part, dict) for part in (config, *log, summary or {}, failure or {})):
                raise TypeError
            place = path.parent / "runs" / config["run_id"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: line {number} is damaged: fetch the file again") from None
        yield _record(place, config, summary, failure, log, summary is not None)


def _record(place, config, summary, failure, rows, finished):
    """The RunRecord of what was read; `place` is its folder, or would be."""
    log = {row["step"]: row for row in rows if isinstance(row.get("step"), int)}  # a step written twice: the later row
    if finished and not _is_whole(place.name, config, summary, log):
        raise ValueError(f"{place} is a finished run with damaged files: move it away, or fetch it again")
    if not (config or {}).keys() >= CONFIG_KEYS:
        config = {"config_id": place.name, "seed": -1, "model": {}}
    config = config | {"model": with_defaults(config["model"])}
    return RunRecord(place.name, config, [log[step] for step in sorted(log)], summary, failure)


def _is_whole(name, config, summary, log):
    """Whether the parts of a finished run are all there, and of one run."""
    if not (config or {}).keys() >= CONFIG_KEYS or not (summary or {}).keys() >= {"run_id", "steps", "final"}:
        return False
    return config["run_id"] == summary["run_id"] == name and max(log, default=None) == summary["steps"]


def _json_or_none(path):
    """The JSON object in a file; None where there is none."""
    try:
        return read_json(path)
    except (FileNotFoundError, ValueError):
        return None


# -- an experiment's results --------------------------------------------------------------------

class Results:
    """The finished runs of an experiment under `folder`, by setting, and its planned comparisons.

    Raises ValueError where no run is finished, and where runs that would be averaged differ in more than the seed.
    """

    def __init__(self, experiment: Experiment, folder):
        self.experiment, self.folder, self.all_runs = experiment, Path(folder), load_runs(folder)
        found = {s.id: [run for run in self.all_runs if run.config_id == s.id and run.state == "complete"]
                 for s in experiment.settings}
        self.groups = {name: runs for name, runs in found.items() if runs}
        if not self.groups:
            raise ValueError(f"{folder}: no finished run of the experiment {experiment.name}: train some first")
        for runs in self.groups.values():
            for part in ("model", "training", "start"):
                _require_equal(runs, part)
        _require_equal(self.runs, "corpus")
        self.tests = holm([Comparison(contrast, t_interval(contrast.of(self.numbers)))
                           for contrast in experiment.planned if self.has(contrast)])

    @cached_property
    def runs(self) -> list[RunRecord]:
        """The finished runs of all settings."""
        return [run for runs in self.groups.values() for run in runs]

    @cached_property
    def complete(self) -> bool:
        """Whether every setting has a run and all have a seed in common: figures, sentences and claims need that."""
        seeds = [{run.seed for run in runs} for runs in self.groups.values()]
        return len(self.groups) == len(self.experiment.settings) and bool(set.intersection(*seeds))

    @property
    def ready(self) -> bool:
        """Whether figures and sentences can be made."""
        return self.complete or self.experiment.adjustable

    def has(self, contrast: Contrast) -> bool:
        """Whether there are runs of all settings of a Contrast, with experts if it asks for the smallest of several."""
        if isinstance(contrast.setting, tuple):
            return any(name in self.with_experts for name in contrast.setting)
        return all(name in self.groups for name in contrast.settings)

    @property
    def with_experts(self) -> list[str]:
        """Ids of the settings whose models have experts."""
        return [name for name, runs in self.groups.items() if runs[0].is_moe]

    def numbers(self, metric: str, setting: str | tuple) -> dict[int, float]:
        """{seed: number} of a setting, or the smallest of several settings with experts."""
        if not isinstance(setting, tuple):
            return {run.seed: value(run, metric) for run in self.groups[setting]}
        parts = [self.numbers(metric, name) for name in setting if name in self.with_experts]
        return {seed: min(part[seed] for part in parts if seed in part) for seed in sorted(set().union(*parts))}

    def interval(self, metric: str, setting: str) -> Interval:
        """Interval over the seeds of a setting."""
        return t_interval(list(self.numbers(metric, setting).values()))

    def mean(self, metric: str, setting: str) -> float:
        """Mean over the seeds of a setting."""
        return self.interval(metric, setting).mean

    def ranked(self, metric: str, names=None) -> list[str]:
        """Setting ids by the mean of a metric, smallest first."""
        return sorted(names or self.groups, key=lambda name: self.mean(metric, name))

    # -- as text --

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

    def means(self, metric: str, *names: str) -> str:
        """"`a` 1.234, `b` 1.250": the means of settings, all if none is named."""
        shown = {name: self.cell(metric, name, half=False, leaky=False) for name in names or self.groups}
        return ", ".join(f"`{name}` {cell}" for name, cell in shown.items())

    def listed(self, metric: str, *names: str) -> str:
        """A paragraph with the means of settings."""
        return f"{quantity(metric).heading} {self.means(metric, *names)}."

    def range_and_verdicts(self, metric: str, among=None) -> str:
        """A paragraph about a planned metric: lowest and highest mean, and its verdicts, among these settings."""
        names = [name for name in self.ranked(metric, among) if np.isfinite(self.mean(metric, name))]
        ends = self.means(metric, *dict.fromkeys((names[0], names[-1]))) if names else "no number"
        return f"{quantity(metric).heading} Lowest and highest: {ends}. {self.verdicts(metric, among)}"

    def verdicts(self, metric: str, among=None) -> str:
        """A sentence for each clear or suggestive difference, and one about all that are undecided or not tested."""
        tests = self.tests_of(metric, among)
        words = [one.word for one in tests]
        said = [f"{one.contrast} is {one.numbers[0]} ({one.word})." for one in tests
                if one.word in ("clear", "suggestive")]
        undecided, untested = words.count("undecided"), words.count("not tested")
        if undecided == len(tests) > 0:
            said.append("No difference could be shown.")
        elif undecided:
            said.append(f"{undecided} other{'s are' if undecided > 1 else ' is'} undecided.")
        if untested:
            said.append(f"{untested} not tested: too few common seeds.")
        return " ".join(said) or "Nothing to compare."

    def tests_of(self, metric: str, among=None) -> list[Comparison]:
        """The Comparisons of a metric without a factor, among these settings alone if some are named."""
        return [one for one in self.tests if one.metric == metric and one.contrast.times == 1
                and (among is None or set(one.contrast.settings) <= set(among))]

    # -- layers and claims --

    def layer_states(self, name: str) -> dict[str, int]:
        """{state: how many layers, over the runs of a setting, ended in it}; report.py defines the states."""
        counts = {"collapsed": 0, "starved": 0, "in use": 0}
        for layer in (layer for run in self.groups[name] for layer in run.final["layers"]):
            collapsed = len(layer["load"]) ** layer["load_entropy"] < len(layer["load"]) / 2
            counts["collapsed" if collapsed else "starved" if layer["dead_experts"] else "in use"] += 1
        return {state: n for state, n in counts.items() if n}

    def layers_at_the_end(self, names) -> str:
        """A paragraph: how the layers of these settings ended, and the first setting with all of them in use."""
        states = {name: self.layer_states(name) for name in names}
        said = [f"`{name}` " + ", ".join(f"{n} {state}" for state, n in of.items()) for name, of in states.items()]
        alive = next((f"`{name}`" for name in names if set(states[name]) == {"in use"}), "none")
        return (f"**Layers at the end of all runs.** {'; '.join(said)}. The first setting with every layer in use: "
                f"{alive}.")

    def outcome(self, claim: Claim) -> tuple[str, list]:
        """(verdict, [(Effect, (seeds,) array)]) of a Claim: it held where all its effects did."""
        found = [(effect, effect.of(self.numbers)) for effect in claim.effects]
        words = {effect.word(numbers) for effect, numbers in found}
        return next(word for word in ("did not hold", "undecided", "held") if word in words), found


def _require_equal(runs, part):
    """ValueError where runs that are averaged or compared differ in a part of their config.json."""
    for run in runs[1:]:
        one, other = (found if isinstance(found := each.config.get(part), dict) else {part: found}
                      for each in (runs[0], run))
        different = [f"{name}: {one.get(name)}, {other.get(name)}" for name in {**one, **other}
                     if one.get(name) != other.get(name)]
        if different:
            raise ValueError(f"{runs[0].run_id} and {run.run_id} differ in their {part} ({'; '.join(different)}), so "
                             "they are not averaged or compared: move one away")
