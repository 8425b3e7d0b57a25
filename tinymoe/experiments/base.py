"""What an experiment is: a question, settings as data, differences planned beforehand, and what is said of the rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..config import ModelConfig
from ..report import LOSS, Comparison, holm, text, told_apart
from ..rows import complete_runs, gap, t_interval, value
from ..train import Run, TrainConfig

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
        """The Run of this setting with a seed; common: fields of ModelConfig that the experiment changes for all."""
        model = scale.model | common | self.model
        if self.width != 1:
            model["d_expert"] = round(self.width * ModelConfig(**model).d_ff)
        training = {"steps": round(self.length * scale.steps), "n_evaluations": 10, "eval_windows": 16} | self.training
        return Run(self.id, self.what, seed, ModelConfig(**model), TrainConfig(**training), self.start, measure)


@dataclass(frozen=True)
class Effect:
    """A number above 0 where a claim is right: of(numbers) -> (seeds,), with numbers(metric, setting id) -> (seeds,).

    or_zero: 0 will do. every_run: for a number with a bound, such as a share: judged in every run instead of by an
    interval, which knows no bound and would doubt what every run shows.
    """

    what: str
    of: Callable
    or_zero: bool = False
    every_run: bool = False


@dataclass(frozen=True)
class Claim:
    """A published claim: its number in the list of ten, what it says, who says so, and what must be above 0 for it."""

    number: int
    text: str
    published: str
    effects: tuple


@dataclass(frozen=True)
class Experiment:
    """A question and how it is answered.

    planned: (metric, first, second) whose differences are tested, fixed before any result is looked at.
    say: Results -> the sentences of its finding, made from numbers; figures: {name: Results -> Figure}.
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
    model: dict = field(default_factory=dict)
    text: str | None = None
    measure: Callable | None = None

    def runs(self, scale, seeds):
        """The runs at a Scale with seeds 0 to seeds - 1, seed by seed."""
        return [setting.run(scale, seed, self.model, self.measure)
                for seed in range(seeds) for setting in self.settings]


class Results:
    """The finished runs of an experiment under `folder`, by setting, and its planned differences.

    Raises ValueError where no run is finished.
    """

    def __init__(self, experiment, folder):
        self.experiment, self.folder, found = experiment, folder, complete_runs(folder)
        self.groups = {s.id: found[s.id] for s in experiment.settings if s.id in found}
        if not self.groups:
            raise ValueError(f"{folder}: no finished run of the experiment {experiment.name}")
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
        """`a 1.234 ± 0.012, b ...` for the settings, all if none is named."""
        return ", ".join(f"{name} {text(self.groups[name], metric)}" for name in settings or self.groups
                         if name in self.groups)

    def differences(self, metric, *firsts):
        """The planned differences of a metric, as text; firsts: only those that begin with one of these."""
        tests = [one for one in self.tests if one.metric == metric and (not firsts or one.first in firsts)]
        return "; ".join(map(str, tests)) or "nothing to compare"

    def told_apart(self, metric):
        """Of the planned differences of a metric those whose interval excludes 0, or that there is none."""
        return told_apart([one for one in self.tests if one.metric == metric])

    def ranked(self, metric):
        """Setting ids by the mean of a metric, smallest first."""
        return sorted(self.groups, key=lambda name: self.mean(metric, name))

    def outcome(self, claim):
        """(verdict, [(what, Interval)]) of a Claim: it held where every effect is above 0 with its interval."""
        found, words = [], set()
        for effect in claim.effects:
            gaps = effect.of(self.numbers)
            interval = t_interval(gaps)
            low, high = (interval.low, interval.high) if interval.n > 1 else (-np.inf, np.inf)
            if effect.every_run:
                low, high = min(gaps), max(gaps)
            held, failed = (low >= 0, high < 0) if effect.or_zero else (low > 0, high <= 0)
            words.add("held" if held else "did not hold" if failed else "undecided")
            found.append((effect.what, interval))
        verdict = next(word for word in ("did not hold", "undecided", "held") if word in words)
        return verdict, found


def planned(metrics, pairs):
    """(metric, first, second) for each metric and each pair."""
    return tuple((metric, first, second) for metric in metrics for first, second in pairs)


def against(reference, others):
    """Pairs (other, reference)."""
    return tuple((other, reference) for other in others)


__all__ = ["LOSS", "Claim", "Effect", "Experiment", "Results", "SCALES", "Scale", "Setting", "against", "planned"]
