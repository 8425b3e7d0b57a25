"""What an experiment is: a question, settings as data, comparisons planned beforehand, and claims of the literature."""

import hashlib
import json
import math
import operator
from collections.abc import Callable
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from functools import cached_property

import numpy as np

from ..model.config import ModelConfig
from ..training.plan import RunPlan, TrainConfig
from .experiment_checks import check_different, check_names, check_plan, check_references
from .statistics import MARGIN, Comparison, Contrast, t_interval


@dataclass(frozen=True)
class Scale:
    """How large a series of runs is: fields of ModelConfig that all settings share, training steps, seeds, and fields
    of TrainConfig that win over those of the experiment."""

    model: dict
    steps: int
    seeds: int
    training: dict = field(default_factory=dict)


SMALL = {"n_layers": 4, "d_model": 64, "d_ff": 256, "moe_layers": (1, 3)}
FEW = {"final_windows": 64}  # where all validation windows would take as long as the training
EVALUATIONS = {"n_evaluations": 10, "eval_windows": 16}  # of an experiment
ALL_WINDOWS = EVALUATIONS | {"final_windows": 1000}  # all validation windows are scored at the end
SCALES = {"quick": Scale(SMALL, 60, 2, FEW), "default": Scale(SMALL, 500, 3, FEW)}
CANDIDATES = (1e-3, 2e-3, 4e-3, 8e-3)  # peak learning rates of a sweep
SWEEP_SEEDS = (100, 101)  # they choose the learning rates, and are in no other number


@dataclass(frozen=True)
class Setting:
    """One thing that is compared: an id, what it is in words, and the fields of ModelConfig and TrainConfig it changes.

    width: of an expert, in units of d_ff. length: of the run, in units of the scale's steps. start: id of the setting
    whose trained model it starts from. rate_of: id of the setting whose chosen learning rate it shares; None: its own.
    """

    id: str
    what: str
    _: KW_ONLY
    model: dict = field(default_factory=dict)
    width: float = 1
    training: dict = field(default_factory=dict)
    length: float = 1
    start: str | None = None
    rate_of: str | None = None

    @property
    def changed(self) -> dict:
        """{"model": names of the fields that it changes, "training": names}."""
        return {"model": {*self.model, *(["d_expert"] if self.width != 1 else [])},
                "training": {*self.training, *(["steps"] if self.length != 1 else [])}}


RELATIONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


@dataclass(frozen=True)
class Effect(Contrast):
    """What a claim needs: a Contrast whose relation (one of RELATIONS) to a bound holds.

    Each is tested one-sided at 5%, so the interval over seeds is a 90% interval: where all of several needs are
    required, no correction is due (an intersection-union test).

    every_run: judge every run instead of the interval. Use it for a number that cannot pass its bound, such
    as a share, and for a change that is either rounding or not.
    """

    relation: str
    bound: float
    _: KW_ONLY
    every_run: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.relation not in RELATIONS:
            raise ValueError(f"{self}: unknown relation {self.relation!r}: choose one of {', '.join(RELATIONS)}")

    def ends(self, numbers: np.ndarray) -> tuple[float, float]:
        """(low, high) of the interval over seeds, or of the runs, on the scale of `of`; infinite where nothing is
        decided: one seed, nan."""
        interval = t_interval(numbers, 0.9)
        ends = (min(numbers), max(numbers)) if self.every_run and len(numbers) else (interval.low, interval.high)
        return ends if np.isfinite(ends).all() else (-np.inf, np.inf)

    def word(self, numbers: np.ndarray) -> str:
        """"held" where both ends are beyond the bound, "did not hold" where neither is, else "undecided"."""
        bound = np.log(self.bound) if self.over else self.bound
        beyond = {RELATIONS[self.relation](end, bound) for end in self.ends(numbers)}
        return "undecided" if len(beyond) == 2 else "held" if True in beyond else "did not hold"


@dataclass(frozen=True)
class Claim:
    """A published claim: what it says, who says so, and the Effects that it needs; all of them must hold."""

    number: int | None  # its place among the ten that FINDINGS.md gathers, if it is one of them
    text: str
    published: str
    effects: tuple


@dataclass(frozen=True, kw_only=True)
class Primary:
    """A comparison that answers a question of an experiment, with what each outcome means, written before the runs.

    lower, higher: a sentence for a difference below 0, and above. margin: below it, differences are the same.
    published: who says what, where published results disagree.
    """

    question: str
    contrast: Contrast
    lower: str
    higher: str
    same: str
    not_known: str = "These runs do not decide it."
    margin: float = MARGIN
    published: str = ""

    def __post_init__(self):
        if self.contrast.over:
            raise ValueError(f"{self.contrast}: a question is about a difference: use minus in place of over")
        if not (isinstance(self.margin, (int, float)) and 0 < self.margin < math.inf):
            raise ValueError(f"{self.contrast}: margin {self.margin!r} must be a number above 0")

    def sentence(self, found: Comparison) -> str:
        """The sentence of the outcome."""
        different = self.lower if found.mean < 0 else self.higher
        but = f" But the difference is smaller than the margin of {self.margin:g}." if found.within else \
            f" The difference may be smaller than the margin of {self.margin:g}." if found.overlaps else ""
        return {"different": different + but, "same": self.same, "not known": self.not_known,
                "not tested": "Not tested: there are fewer than two common seeds, or a run lacks the number.",
                }[found.verdict]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question and how it is answered. Its plan is fixed before the first run, and every run records `plan_hash`.

    seeds, steps: of the scale "full", the plan. first_seed: the first of all seeds. It is above 0 where questions of an
    earlier experiment are asked again, whose answers then take the place of the earlier ones. rates: candidate peak
    learning rates, of which each setting takes the one with the lowest mean loss over SWEEP_SEEDS; empty: the rate of
    `training`, or the default. adjustable: settings may be missing, and --set may change them, as in `cli.py study`.
    Then figures and findings are made of what there is, and labels are read from the runs.
    """

    name: str
    question: str
    settings: tuple
    metrics: tuple  # the columns of its table: names of quantities.py, or of what `measure` returns
    figures: dict  # {name: function of Results -> Figure}, see figures.py; the first opens the document
    primary: tuple = ()  # the Primary comparisons, corrected by Holm
    exploratory: tuple = ()  # other Contrasts that are tested, corrected by Benjamini and Hochberg
    crossings: tuple = ()  # (metric, first setting, second): the step where their curves cross is told
    seeds: int = 3
    first_seed: int = 0
    steps: int = 500
    rates: tuple = ()
    say: Callable | None = None  # Results -> sentences that its tables do not say
    caution: str = ""  # what it cannot show
    claims: tuple = ()
    model: dict = field(default_factory=dict)  # fields of ModelConfig, and of TrainConfig, for all settings
    training: dict = field(default_factory=EVALUATIONS.copy)
    scales: dict = field(default_factory=lambda: SCALES)
    text: str | None = None  # the corpus, None for the default
    measure: Callable | None = None  # measure(trainer) -> {name: number}, asked of every trained model
    adjustable: bool = False

    def __post_init__(self):
        check_plan(self, SWEEP_SEEDS)
        check_names(self)
        check_references(self)

    def scale(self, name: str) -> Scale:
        """The Scale "quick", "default" or "full": the plan. Raises ValueError for another name."""
        plan = replace(self.scales["default"], steps=self.steps, seeds=self.seeds, training={})
        known = {**self.scales, "full": self.scales.get("full", plan)}
        if name not in known:
            raise ValueError(f"unknown scale {name!r}: choose one of {', '.join(known)}")
        return known[name]

    @cached_property
    def plan_hash(self) -> str:
        """The sha256 of the plan as JSON, without the words: any change of it shows in the document."""
        names = ("seeds", "steps", "rates", "model", "training", "text")
        plan = {name: getattr(self, name) for name in (*names, *(["first_seed"] if self.first_seed else []))} | {
            "primary": [(asdict(one.contrast), one.margin) for one in self.primary],
            "exploratory": [asdict(one) for one in self.exploratory],
            "claims": [(claim.number, *map(asdict, claim.effects)) for claim in self.claims],
            "settings": [asdict(replace(setting, what="")) for setting in self.settings]}
        return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()

    @property
    def choosers(self) -> list[str]:
        """The ids of the settings that choose their own learning rate."""
        return [s.id for s in self.settings if not (s.rate_of or s.start or "learning_rate" in s.training)]

    def sweep(self, scale: Scale | str, only=None, model: dict | None = None,
              training: dict | None = None) -> list[RunPlan]:
        """The RunPlans that choose the learning rates, such as `top-2@0.002-seed100`; arguments as those of `runs`."""
        settings = {s.id: s for s in self.settings}
        wanted = {settings[name].rate_of or name for name in only or settings}
        return [replace(self._run(settings[name], seed, scale, model or {}, (training or {}) | {"learning_rate": rate}),
                        config_id=sweep_id(name, rate), measure=None)
                for seed in SWEEP_SEEDS for name in self.choosers if name in wanted for rate in self.rates]

    def runs(self, scale: Scale | str, seeds: int, only=None, model: dict | None = None,
             training: dict | None = None, rates: dict | None = None) -> list[RunPlan]:
        """The RunPlans at a Scale, or its name, with so many seeds from first_seed on, seed by seed.

        only: ids of some settings, in order. model, training: fields that win over those of the settings. rates:
        {setting id: learning rate} that a sweep chose.
        Raises ValueError where ModelConfig or TrainConfig does, for a vocabulary that does not hold every byte, and for
        two settings that would be the same run.
        """
        settings = {s.id: s for s in self.settings}
        chosen = {name: {"learning_rate": rate} for name, rate in (rates or {}).items()}
        if not (self.adjustable or rates):  # a sweep may choose what another setting has
            check_different(self, [self._run(s, 0, scale, {}, {}) for s in self.settings])
        return [self._run(settings[name], seed, scale, model or {}, chosen.get(name, {}) | (training or {}))
                for seed in range(self.first_seed, self.first_seed + seeds) for name in only or settings]

    def _run(self, setting, seed, scale, model, training):
        scale, own = self.scale(scale) if isinstance(scale, str) else scale, dict(setting.model)
        if model.get("router", own.get("router")) != own.get("router"):
            own.pop("router_options", None)  # another router has others
        fields = _merged(scale.model, self.model, own, model)
        if setting.width != 1:
            fields = {"d_expert": round(setting.width * ModelConfig(**fields).d_ff)} | fields
        config = ModelConfig(**fields)
        if config.vocab_size < 256:
            raise ValueError(f"vocab_size {config.vocab_size} must be at least 256: the tokens of a study are bytes")
        plan = {"steps": round(setting.length * scale.steps)} | self.training | scale.training
        plan |= setting.training | training
        return RunPlan(config_id=setting.id, purpose=setting.what, seed=seed, model=config,
                       training=TrainConfig(**plan), start=setting.start, measure=self.measure,
                       plan_hash=self.plan_hash)


def _merged(*parts):
    """One dict of several: later values win, and dicts in them (router_options, losses) are merged too."""
    whole = {}
    for part in parts:
        for name, new in part.items():
            both = isinstance(new, dict) and isinstance(whole.get(name), dict)
            whole[name] = whole[name] | new if both else new
    return whole


def sweep_id(name: str, rate: float) -> str:
    """The config id of a setting's runs at a candidate learning rate."""
    return f"{name}@{rate:g}"


def contrasts(metrics, pairs) -> tuple[Contrast, ...]:
    """A Contrast first - second for each metric and each pair (first, second)."""
    pairs = tuple(pairs)
    return tuple(Contrast(metric, first, minus=second) for metric in metrics for first, second in pairs)


def against(reference: str, others) -> tuple:
    """Pairs (other, reference)."""
    return tuple((other, reference) for other in others)
