"""Result rows: the runs that a study left on disk, read back, and what an experiment makes of them."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..files import printable, read_json, read_rows, write_rows
from ..moe.routers import ROUTERS
from ..training.data import load_corpus
from ..training.lease import holder
from ..training.run_folder import ROUTINGS, RunFolder, describe, differing, with_defaults
from . import statistics
from .experiment import SWEEP_SEEDS, Claim, Experiment, sweep_id
from .quantities import LOSS, QUANTITIES, collapsed, crossing, experts_per_token, quantity, value
from .statistics import Comparison, Contrast, Interval, corrected, enough_digits, t_interval

COMPACT = "runs.jsonl"  # all runs of a study in one file, as it is published
# What tables and figures read of a run, see `_fits`. None stands for a field that is not there.
NUMBER, OPTIONAL = (int, float), (int, float, type(None))
PARTS = {"config": dict, "log": [dict], "summary": (dict, type(None)), "failure": (dict, type(None))}
CONFIG = {"run_id": str, "config_id": str, "seed": int, "threads": int, "versions": dict, "domains": [str],
          "model": {"router": (str, list), "router_options": (dict, type(None)), "top_k": NUMBER,
                    "capacity_factor": OPTIONAL, "aux_coef": NUMBER, "seq_len": int},
          "training": {"batch_size": int, "learning_rate": NUMBER}, "parameters": {"total": int, "active": int},
          "corpus": {...: {"train_bytes": int, "entropy_rate": OPTIONAL}}}
LAYER = {"layer": int, "load": [int], "domain_load": [[int]], "dead_experts": int} | dict.fromkeys((
    "token_coverage", "load_entropy", "router_entropy", "marginal_entropy", "mutual_information",
    "mutual_information_null", "byte_information", "byte_information_null"), NUMBER)
ROW = {"step": int, "validation_tokens": int, LOSS: NUMBER, "val_cross_entropy": NUMBER, "layers": [LAYER]}
SUMMARY = {"run_id": str, "steps": int, "seconds": NUMBER, "wall_seconds": OPTIONAL, "final": ROW,
           "measured": (dict, type(None))}
# of each domain, where newer rows have them
BY_DOMAIN = {"val_by_domain": NUMBER, "causal_by_domain": NUMBER, "causal_by_part": [NUMBER]}
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

    plan_hash = property(lambda self: self.config.get("plan_hash"))
    wall_seconds = property(lambda self: self.summary.get("wall_seconds") or self.summary["seconds"])  # newer rows

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
    folders = sorted(path for path in Path(study_dir, "runs").glob("*") if path.is_dir())
    for run in (*_compact_runs(Path(study_dir, COMPACT)), *map(_folder_run, folders)):
        if run.run_id in runs and runs[run.run_id].state == "failed":  # its folder tries again
            del runs[run.run_id]
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
    return _write_compact(study_dir, runs), len(runs)


def _write_compact(study_dir, runs):
    path = Path(study_dir, COMPACT)
    write_rows(path, [{part: getattr(run, part) for part in PARTS} for run in runs])
    return path


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


def remaining(plans, out, text=None, fresh: bool = False) -> list:
    """The RunPlans that are to be trained, or looked at: all but those that out/runs.jsonl holds as finished.

    A sweep run that failed counts as finished: at its rate training does not stay finite. fresh: all, and their rows
    are taken out of the file. Raises ValueError where a row is of other settings, and for a run that starts from one
    whose folder is gone.
    """
    rows, ids, runs = list(_compact_runs(Path(out, COMPACT))), {plan.run_id for plan in plans}, Path(out, "runs")
    if fresh:
        if any(run.run_id in ids for run in rows):
            _write_compact(out, [run for run in rows if run.run_id not in ids])
        return list(plans)
    failed = [_folder_run(runs / plan.run_id) for plan in plans
              if "@" in plan.config_id and (runs / plan.run_id / "failure.json").exists()]
    stand = {run.run_id: run for run in (*rows, *failed)
             if run.state == "complete" or run.state == "failed" and "@" in run.config_id}
    todo = [plan for plan in plans if plan.run_id not in stand]
    for plan in todo:
        start = replace(plan, config_id=plan.start or plan.config_id).run_id
        if start in stand and not (runs / start).exists():
            raise ValueError(f"{plan.run_id} starts from {start}, of which only the row in {COMPACT} is left: put its "
                             "folder back, or start again with --fresh")
    corpus = load_corpus(text, plans[0].model.seq_len) if len(todo) < len(plans) else None
    for plan in plans:
        if plan.run_id in stand and (wrong := differing(stand[plan.run_id].config, describe(plan, corpus))):
            raise ValueError(f"{out} holds the run {plan.run_id} with other settings ({'; '.join(wrong)}): choose "
                             "another --out, or start again with --fresh")
    return todo


def sweep_losses(experiment: Experiment, runs) -> dict[str, dict[float, float]]:
    """{setting id: {rate: mean causal loss over the seeds of the sweep}}, of what is finished; infinite for a run
    whose loss did not stay finite."""
    ended = {run.run_id: run.final[LOSS] if run.summary else np.inf for run in runs if run.state != "incomplete"}
    found = {}
    for name in experiment.choosers:
        for rate in experiment.rates:
            ids = [f"{sweep_id(name, rate)}-seed{seed}" for seed in SWEEP_SEEDS]
            if set(ids) <= ended.keys():
                found.setdefault(name, {})[rate] = float(np.mean([ended[each] for each in ids]))
    return found


def best_rates(experiment: Experiment, runs, only=None) -> dict[str, float]:
    """{setting id: learning rate} with the lowest loss of the sweep; of equal ones the smaller.

    only: ids of some settings. Raises ValueError where the sweep of a setting is not finished, or always failed.
    """
    losses, rates = sweep_losses(experiment, runs), {}
    for setting in experiment.settings:
        chooser = setting.rate_of or setting.id
        if chooser in experiment.choosers and (not only or setting.id in only):
            found = losses.get(chooser, {})
            if len(found) < len(experiment.rates) or not np.isfinite(min(found.values())):
                raise ValueError(f"the sweep of {chooser} gives no learning rate: its runs are missing, or all failed")
            rates[setting.id] = min(found, key=lambda rate: (found[rate], rate))
    return rates


def _folder_run(place):
    config, summary, failure = (_json(place / f"{name}.json") for name in ("config", "summary", "failure"))
    return _record(place, config, read_rows(place / "log.jsonl"), summary, failure)


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
    by_domain = all(_fits(part[name], {...: of}) and part[name].keys() == set(config["domains"])
                    for part in (summary, final, *log) for name, of in BY_DOMAIN.items() if name in part)
    alike = alike and log[-1]["step"] == summary["steps"]
    numbers = numbers and all(0 <= layer["load_entropy"] < 1.001 for row in (final, *log) for layer in row["layers"])
    return config["run_id"] == summary["run_id"] == name and alike and numbers and by_domain


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
    """The finished runs of an experiment under `folder`, by setting, and its comparisons.

    primary: a Comparison for each Primary of the experiment, in their order. exploratory: Comparisons of those that
    have runs. sweep: see `sweep_losses`; its runs are in `sweep_runs`.

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
        self.primary = corrected([self.compared(one.contrast, one.margin) for one in experiment.primary],
                                 statistics.holm)
        self.exploratory = corrected([self.compared(one, statistics.MARGIN if quantity(one.metric).is_loss else None)
                                      for one in experiment.exploratory if self.has(one)],
                                     statistics.benjamini_hochberg)
        ids = {sweep_id(name, rate) for name in experiment.choosers for rate in experiment.rates}
        self.sweep_runs = [run for run in self.all_runs if run.config_id in ids]
        self.sweep = sweep_losses(experiment, self.sweep_runs)

    def compared(self, contrast: Contrast, margin: float | None = None) -> Comparison:
        """A Comparison over the common seeds, without any where a setting has no run."""
        numbers = contrast.of(self.numbers) if self.has(contrast) else ()
        return Comparison(contrast, tuple(map(float, numbers)), margin)

    def by_domain(self, contrast: Contrast) -> dict[str, Comparison]:
        """{domain: Comparison} of a difference of the causal loss; {} for another, and where rows lack it."""
        if contrast.metric != LOSS or not self.has(contrast) or "causal_by_domain" not in self.runs[0].final:
            return {}
        return {domain: self.compared(replace(contrast, metric=f"{LOSS}:{domain}"), statistics.MARGIN)
                for domain in self.runs[0].config["domains"]}

    def text_uncertainty(self, contrast: Contrast):
        """What statistics.text_uncertainty finds for a difference of the causal loss; None where rows lack parts."""
        def in_parts(domain, setting):
            return {run.seed: run.summary.get("causal_by_part", {}).get(domain, []) for run in self.groups[setting]}

        wanted = [run for name in contrast.settings for run in self.groups.get(name, ())]
        domains = self.runs[0].config["domains"]
        if contrast.metric != LOSS or not contrast.minus or not self.has(contrast):
            return None
        parts = [run.summary.get("causal_by_part", {}) for run in wanted]
        if len({tuple(len(part.get(domain, ())) for domain in domains) for part in parts}) > 1:
            return None
        return statistics.text_uncertainty([replace(contrast, metric=domain).of(in_parts) for domain in domains])

    def crossing(self, metric: str, first: str, second: str) -> dict[int, float]:
        """{seed: the last step at which the curves of a metric of two settings cross}; nan where they do not."""
        logs = [{run.seed: run.log for run in self.groups.get(name, ())} for name in (first, second)]
        return {seed: crossing(logs[0][seed], logs[1][seed], metric) for seed in logs[0] if seed in logs[1]}

    def routings(self, run: RunRecord) -> Path | None:
        """The file of a run's last saved routings: in its folder, or FOLDER/routings/RUN.npz of published results."""
        paths = sorted((self.folder / "runs" / run.run_id / ROUTINGS).glob("[0-9]*.npz"))
        return next((path for path in (*paths[-1:], self.folder / ROUTINGS / f"{run.run_id}.npz") if path.exists()),
                    None)

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

    def ranked(self, metric: str) -> list[str]:
        """Setting ids by the mean of a metric, smallest first."""
        return sorted(self.groups, key=lambda name: self.mean(metric, name))

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
    return "collapsed" if collapsed(layer) else "starved" if layer["dead_experts"] else "in use"


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
