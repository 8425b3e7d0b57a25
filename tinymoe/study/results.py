"""What an experiment makes of its runs: settings with their numbers, comparisons, and the rates of a sweep."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..files import printable
from ..training.identity import imports_of
from ..training.run_folder import ROUTINGS, saved_routings
from . import statistics
from .experiment import SWEEP_SEEDS, Claim, Experiment, sweep_id
from .quantities import LOSS, collapsed, crossing, quantity, value
from .rows import RunRecord, load_runs, made_of
from .statistics import Comparison, Contrast, Interval, corrected, enough_digits, t_interval

STATES = ("collapsed", "starved", "in use")  # of an MoE layer


def sweep_losses(experiment: Experiment, runs) -> dict[str, dict[float, float]]:
    """{setting id: {rate: mean causal loss over the seeds of the sweep}}, of what is finished; infinite for a run
    whose loss did not stay finite."""
    ended = {run.run_id: run.final[LOSS] if run.summary else np.inf for run in runs if run.state != "unfinished"}
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
            rates[setting.id] = chosen(experiment, losses.get(chooser, {}))
            if rates[setting.id] is None:
                raise ValueError(f"the sweep of {chooser} gives no learning rate: its runs are missing, or all failed")
    return rates


def chosen(experiment: Experiment, losses: dict[float, float]) -> float | None:
    """The rate that a sweep with these losses chooses; None where a rate is not finished, or all failed."""
    if len(losses) < len(experiment.rates) or not np.isfinite(min(losses.values())):
        return None
    return lowest(losses)


def lowest(losses: dict[float, float]) -> float:
    """The rate with the lowest loss; of equal ones the smaller."""
    return min(losses, key=lambda rate: (losses[rate], rate))


class NothingFinished(ValueError):
    """A folder without a finished run of an experiment."""


class Results:
    """The finished runs of an experiment under `folder`, by setting, and its comparisons.

    primary: a Comparison for each Primary of the experiment, in their order. exploratory: Comparisons of those that
    have runs. sweep: see `sweep_losses`; its runs are in `sweep_runs`.

    Raises ValueError where runs that would be averaged differ in more than the seed, and where a sweep was of another
    model or text, and its subclass NothingFinished where no run is finished.
    """

    def __init__(self, experiment: Experiment, folder):
        self.experiment, self.folder, self.all_runs = experiment, Path(folder), load_runs(folder)
        found = {s.id: [run for run in self.all_runs if run.config_id == s.id and run.state == "finished"]
                 for s in experiment.settings}
        self.groups = {name: runs for name, runs in found.items() if runs}
        self.with_experts = [name for name, runs in self.groups.items() if runs[0].is_moe]
        self.runs = [run for runs in self.groups.values() for run in runs]
        if not self.runs:
            others = ", ".join(sorted({run.config_id for run in self.all_runs if run.state == "finished"}))
            raise NothingFinished(f"{folder}: no finished run of the experiment {experiment.name}: " + (
                f"its runs are of {others}, so name their experiment (report --experiment)" if others else
                "train some first"))
        for runs in self.groups.values():
            _require_equal(runs, "model", "training", "start", "imports")
        _require_equal(self.runs, "corpus", "measured")
        if taken := [name for name in self.runs[0].measured if quantity(name).of]:
            raise ValueError(f"the `measure` of {experiment.name} returns {taken[0]}, a number that every run has "
                             "already: rename it")
        self.primary = corrected([self.compared(one.contrast, one.margin) for one in experiment.primary],
                                 statistics.holm)
        self.exploratory = corrected([self.compared(one, statistics.MARGIN if quantity(one.metric).is_loss else None)
                                      for one in experiment.exploratory if self.has(one)],
                                     statistics.benjamini_hochberg)
        ids = {sweep_id(name, rate): name for name in experiment.choosers for rate in experiment.rates}
        self.sweep_runs = [run for run in self.all_runs if run.config_id in ids]
        for name, runs in self.groups.items():
            ended = [run for run in self.sweep_runs if run.state != "unfinished" and ids[run.config_id] == name]
            _require_equal([runs[0], *ended], "model", "corpus", "imports")
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
        if contrast.metric != LOSS or not contrast.minus or not self.has(contrast):
            return None
        parts = {name: {run.seed: run.summary.get("causal_by_part", {}) for run in self.groups[name]}
                 for name in contrast.settings}
        domains = self.runs[0].config["domains"]
        if len({tuple(len(part.get(domain, ())) for domain in domains)
                for of_seeds in parts.values() for part in of_seeds.values()}) > 1:
            return None

        def in_parts(domain, setting):
            return {seed: part.get(domain, []) for seed, part in parts[setting].items()}

        return statistics.text_uncertainty([replace(contrast, metric=domain).of(in_parts) for domain in domains])

    def crossing(self, metric: str, first: str, second: str) -> dict[int, float]:
        """{seed: the last step at which the curves of a metric of two settings cross}; nan where they do not."""
        logs = [{run.seed: run.log for run in self.groups.get(name, ())} for name in (first, second)]
        return {seed: crossing(logs[0][seed], logs[1][seed], metric) for seed in logs[0] if seed in logs[1]}

    def routings(self, run: RunRecord) -> Path | None:
        """The file of a run's last saved routings: in its folder, or FOLDER/routings/RUN.npz of published results."""
        paths = saved_routings(self.folder / "runs" / run.run_id)
        return next((path for path in (*paths[-1:], self.folder / ROUTINGS / f"{run.run_id}.npz") if path.exists()),
                    None)

    @property
    def ready(self) -> bool:
        """Whether figures and sentences can be made: every setting has a run, and all have a seed in common."""
        seeds = [{run.seed for run in runs} for runs in self.groups.values()]
        complete = len(self.groups) == len(self.experiment.settings) and bool(set.intersection(*seeds))
        return complete or self.experiment.adjustable

    @property
    def several(self) -> bool:
        """Whether any setting has two seeds."""
        return any(len(runs) > 1 for runs in self.groups.values())

    def has(self, contrast: Contrast) -> bool:
        """Whether there are runs of all settings of a Contrast."""
        return all(name in self.groups for name in contrast.settings)

    def numbers(self, metric: str, setting: str) -> dict[int, float]:
        """{seed: number} of a setting."""
        return {run.seed: value(run, metric) for run in self.groups[setting]}

    def interval(self, metric: str, setting: str) -> Interval:
        """The mean of a setting over its seeds, with its 95% interval."""
        return t_interval(list(self.numbers(metric, setting).values()))

    def mean(self, metric: str, setting: str) -> float:
        """The mean of a setting over its seeds."""
        return self.interval(metric, setting).mean

    def learning_rate(self, name: str) -> float:
        """The peak learning rate of a setting's runs."""
        return self.groups[name][0].config["training"]["learning_rate"]

    def ranked(self, metric: str) -> list[str]:
        """Setting ids by the mean of a metric, smallest first."""
        return sorted(self.groups, key=lambda name: self.mean(metric, name))

    def label(self, name: str) -> str:
        """The name of a setting in figures; where --set may change settings, with what its runs really were."""
        return f"{name} {made_of(self.groups[name])}" if self.experiment.adjustable else name

    def cell(self, metric: str, name: str, leaky: bool = True) -> str:
        """`mean ± half width` over seeds, a dash for no number; of an event the median, and in how many seeds it is.

        leaky: add the leaky number to a causal one.
        """
        if quantity(metric).event:
            return self._event(metric, name)
        one, digits = self.interval(metric, name), quantity(metric).digits
        if not np.isfinite(one.mean):
            return "–"
        digits = enough_digits([one.half], 0 if abs(one.mean) >= 100 else digits)
        shown = f"{round(one.mean, digits) + 0.0:,.{digits}f}"
        if round(one.half, 6) > 0:  # nan, of one seed, is not above 0
            shown += f" ± {one.half:,.{digits}f}"
        if leaky and metric.startswith("causal_") and self.groups[name][0].leaky:
            shown += f" (leaky {self.cell(metric.replace('causal', 'val'), name)})"
        return shown

    def _event(self, metric, name):
        numbers = list(self.numbers(metric, name).values())
        there = [x for x in numbers if np.isfinite(x)]
        if not there:
            return "never"
        ends = dict.fromkeys(f"{x:,.{quantity(metric).digits}f}" for x in (min(there), max(there)))
        return " to ".join(ends) + (f" in {len(there)} of {len(numbers)} seeds" if len(there) < len(numbers) else "")

    def layers_at_the_end(self, names) -> str:
        """A paragraph: how the layers of these settings ended, and the first setting with all of them in use."""
        states = {name: Counter(_state(layer) for run in self.groups[name] for layer in run.final["layers"])
                  for name in names}
        said = [f"`{name}` " + ", ".join(f"{counts[state]} {state}" for state in STATES if state in counts)
                for name, counts in states.items()]
        alive = next((f"`{name}`" for name in names if set(states[name]) == {"in use"}), "none")
        return (f"**MoE layers at the end, of all seeds.** {'; '.join(said)}. The first of these with every layer "
                f"in use: {alive}.")

    def outcome(self, claim: Claim) -> tuple[str, list]:
        """(verdict, [(Effect, (seeds,) array)]) of a Claim: it held where all its effects did."""
        found = [(effect, effect.of(self.numbers)) for effect in claim.effects]
        words = {effect.word(numbers) for effect, numbers in found}
        return next(word for word in ("did not hold", "undecided", "held") if word in words), found


def _state(layer):
    """One of STATES, which the glossary in wording.py defines."""
    return "collapsed" if collapsed(layer) else "starved" if layer["dead_experts"] else "in use"


def _require_equal(runs, *parts):
    """ValueError where runs that are averaged or compared differ in a part of config.json, or in what is measured."""
    configs = [run.config | {"measured": dict.fromkeys(run.measured, "yes"), "imports": imports_of(run.config)}
               for run in runs]
    for part in parts:
        first, *others = (found if isinstance(found := config.get(part), dict) else {part: found} for config in configs)
        for run, other in zip(runs[1:], others):
            different = [f"{name}: {first.get(name)}, {other.get(name)}" for name in first | other
                         if first.get(name) != other.get(name)]
            if different:
                raise ValueError(printable(f"{runs[0].run_id} and {run.run_id} differ in their {part} "
                                           f"({'; '.join(different)}), so they are not averaged or compared: move one "
                                           "away"))
