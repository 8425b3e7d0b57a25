"""What an experiment is: a question, settings as data, differences planned beforehand, and what is said of the rows."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..model.config import ModelConfig
from .report import LOSS, Comparison, holm, label, text, told_apart
from .results import complete_runs, gap, t_interval, value
from ..training.run_folder import with_defaults
from ..training.trainer import RunPlan, TrainConfig


@dataclass(frozen=True)
class Scale:
    """How large an experiment is: the model that its settings change, the steps, and the seeds."""

    model: dict
    steps: int
    seeds: int


SMALL = {"n_layers": 4, "d_model": 64, "d_ff": 256, "moe_layers": (1, 3)}
SCALES = {"quick": Scale(SMALL, 60, 2), "default": Scale(SMALL, 500, 3), "full": Scale({}, 2000, 3)}


@dataclass(frozen=True)
class Setting:
    """One thing that is compared: an id, what it is in words, and what it changes.

    model: fields of ModelConfig. width: of an expert, in units of d_ff. training: fields of TrainConfig. length: of the
    run, in units of the scale's steps. start: the setting whose trained model it goes on from.
    """

    id: str
    what: str
    model: dict = field(default_factory=dict)
    width: float = 1
    training: dict = field(default_factory=dict)
    length: float = 1
    start: str | None = None

    def run(self, scale, seed, common, measure):
        """The RunPlan of this setting with a seed; common: fields of ModelConfig that the experiment changes for all."""
        model = scale.model | common | self.model
        if self.width != 1:
            model["d_expert"] = round(self.width * ModelConfig(**model).d_ff)
        training = {"steps": round(self.length * scale.steps), "n_evaluations": 10, "eval_windows": 16} | self.training
        return RunPlan(self.id, self.what, seed, ModelConfig(**model), TrainConfig(**training), self.start, measure)


RELATIONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


@dataclass(frozen=True)
class Effect:
    """What a claim needs: a metric of a setting, or its difference from or ratio to another's, beyond a bound.

    relation: of the number to the bound, one of RELATIONS. every_run: for a number that cannot pass its bound, such as
    a share, or a change that is either rounding or not: judged in every run instead of by an interval, which would
    doubt what every run shows.
    """

    metric: str
    setting: str
    relation: str
    bound: float
    minus: str | None = None
    over: str | None = None
    every_run: bool = False

    def of(self, numbers):
        """(seeds,) array, of numbers(metric, setting) -> (seeds,)."""
        first = numbers(self.metric, self.setting)
        if self.minus:
            return first - numbers(self.metric, self.minus)
        return first / numbers(self.metric, self.over) if self.over else first

    def ends(self, numbers):
        """(low, high) of the interval over seeds, or of the runs; infinite where nothing is decided: one seed, nan."""
        interval = t_interval(numbers)
        low, high = (min(numbers), max(numbers)) if self.every_run else (interval.low, interval.high)
        return (low, high) if np.isfinite([low, high]).all() else (-np.inf, np.inf)

    def word(self, numbers):
        """"held" where both ends are beyond the bound, "did not hold" where neither is, else "undecided"."""
        beyond = {RELATIONS[self.relation](end, self.bound) for end in self.ends(numbers)}
        return "undecided" if len(beyond) == 2 else "held" if True in beyond else "did not hold"

    def __str__(self):
        other = f" - {self.minus}" if self.minus else f" / {self.over}" if self.over else ""
        return f"{label(self.metric)}, {self.setting}{other}"


@dataclass(frozen=True)
class Claim:
    """A published claim: its number in the list of ten, what it says, who says so, and all that it needs."""

    number: int
    text: str
    published: str
    effects: tuple


@dataclass(frozen=True)
class Dispute:
    """A question on which published results disagree, who says what, and the planned pairs whose losses speak to it."""

    question: str
    published: str
    pairs: tuple


@dataclass(frozen=True)
class Experiment:
    """A question and how it is answered.

    metrics: what its table shows: fields of a run's final row or of the rows of its layers, names in rows.OF_RUN and
        rows.DERIVED, or what `measure` returns. Any can be planned, claimed, or drawn at the end; over the steps only
        what the rows of a log hold.
    planned: (metric, first, second) whose differences are tested, fixed before any result is looked at.
    say: Results -> the sentences of its finding, made from numbers; figures: {name: Results -> Figure} (figures.py).
    model: fields of ModelConfig for all settings; text: the corpus, None for the default.
    measure: asked of every trained model, with the Trainer; its numbers are metrics too.
    caution: what it cannot show.
    """

    name: str
    question: str
    settings: tuple
    metrics: tuple
    planned: tuple
    say: Callable
    figures: dict
    caution: str = ""
    claims: tuple = ()
    disputes: tuple = ()
    model: dict = field(default_factory=dict)
    text: str | None = None
    measure: Callable | None = None

    def __post_init__(self):
        pairs = [pair for _, *pair in self.planned] + [pair for one in self.disputes for pair in one.pairs]
        claimed = [(e.setting, e.minus, e.over) for claim in self.claims for e in claim.effects]
        started = [(s.start,) for s in self.settings]
        known = {None, *(s.id for s in self.settings)}
        unknown = {name for names in (*pairs, *claimed, *started) for name in names} - known
        if unknown or len(known) <= len(self.settings):
            why = f"no setting is called {min(unknown)}" if unknown else "two settings have one id"
            raise ValueError(f"experiment {self.name}: {why}")

    def runs(self, scale, seeds):
        """The runs at a Scale with seeds 0 to seeds - 1, seed by seed."""
        return [setting.run(scale, seed, self.model, self.measure)
                for seed in range(seeds) for setting in self.settings]


class Results:
    """The finished runs of an experiment under `folder`, by setting, and its planned differences.

    Raises ValueError where no run is finished, or where runs that would be averaged differ in more than the seed.
    """

    def __init__(self, experiment, folder):
        self.experiment, self.folder, found = experiment, folder, complete_runs(folder)
        self.groups = {s.id: found[s.id] for s in experiment.settings if s.id in found}
        if not self.groups:
            raise ValueError(f"{folder}: no finished run of the experiment {experiment.name}")
        for runs in self.groups.values():
            _require_equal(runs, "model", lambda run: with_defaults(run.model))
            _require_equal(runs, "training")
            _require_equal(runs, "start")
        _require_equal(self.runs, "corpus")
        self.tests = holm([
            Comparison(experiment.name, metric, first, second, gap(self.groups, metric, first, second))
            for metric, first, second in experiment.planned if first in self.groups and second in self.groups])

    @cached_property
    def runs(self):
        return [run for runs in self.groups.values() for run in runs]

    @cached_property
    def seeds(self):
        """Those that all settings finished."""
        return sorted(set.intersection(*({run.seed for run in runs} for runs in self.groups.values())))

    @property
    def whole(self):
        """Whether every setting has a run, and all have one seed in common: what figures, sentences and claims need."""
        return len(self.groups) == len(self.experiment.settings) and bool(self.seeds)

    def numbers(self, metric, setting):
        """(seeds,) array of a number of a setting, over the seeds that all settings finished."""
        return np.array([value(run, metric) for run in self.groups[setting] if run.seed in self.seeds])

    def mean(self, metric, setting):
        return float(np.mean([value(run, metric) for run in self.groups[setting]]))

    def show(self, metric, *settings):
        """"`a` 1.234 ± 0.012, `b` ..." for the settings, all if none is named."""
        return ", ".join(f"`{name}` {text(self.groups[name], metric)}" for name in settings or self.groups)

    def differences(self, metric, pairs=None):
        """The planned differences of a metric, as text; pairs: only these, as (first, second)."""
        tests = [one for one in self.tests if one.metric == metric and (not pairs or (one.first, one.second) in pairs)]
        return "; ".join(map(str, tests)) or "nothing to compare"

    def told_apart(self, metric):
        """Of the planned differences of a metric those whose interval excludes 0, or that there is none."""
        return told_apart([one for one in self.tests if one.metric == metric])

    def ranked(self, metric):
        """Setting ids by the mean of a metric, smallest first."""
        return sorted(self.groups, key=lambda name: self.mean(metric, name))

    def outcome(self, claim):
        """(verdict, [(Effect, (seeds,) array)]) of a Claim: it held where all its effects did."""
        found = [(effect, effect.of(self.numbers)) for effect in claim.effects]
        words = {effect.word(numbers) for effect, numbers in found}
        return next(word for word in ("did not hold", "undecided", "held") if word in words), found


def _require_equal(runs, key, of=None):
    """ValueError where runs that are averaged or compared differ in a part of their config.json."""
    for run in runs[1:]:
        one, other = map(of or (lambda run: run.config.get(key)), (runs[0], run))
        if one != other:
            raise ValueError(f"{run.run_id} and {runs[0].run_id} differ in their {key}, see config.json: move one "
                             "away, so that nothing is made of both")


def planned(metrics, pairs):
    """(metric, first, second) for each metric and each pair."""
    return tuple((metric, first, second) for metric in metrics for first, second in pairs)


def against(reference, others):
    """Pairs (other, reference)."""
    return tuple((other, reference) for other in others)


__all__ = ["LOSS", "SCALES", "Claim", "Dispute", "Effect", "Experiment", "Results", "Scale", "Setting", "against",
           "planned"]
