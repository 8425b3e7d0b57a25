"""What an experiment is: a question, settings as data, differences planned beforehand, and claims of the literature."""

import operator
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field

import numpy as np

from ..model.config import ModelConfig
from ..training.plan import RunPlan, TrainConfig
from .statistics import Contrast, t_interval


@dataclass(frozen=True)
class Scale:
    """How large an experiment is: fields of ModelConfig that all its settings share, training steps, and seeds."""

    model: dict
    steps: int
    seeds: int


SMALL = {"n_layers": 4, "d_model": 64, "d_ff": 256, "moe_layers": (1, 3)}
SCALES = {"quick": Scale(SMALL, 60, 2), "default": Scale(SMALL, 500, 3), "full": Scale({}, 2000, 3)}


@dataclass(frozen=True)
class Setting:
    """One thing that is compared: an id, what it is in words, and the fields of ModelConfig and TrainConfig it changes.

    width: of an expert, in units of d_ff. length: of the run, in units of the scale's steps. start: id of the setting
    whose trained model it starts from.
    """

    id: str
    what: str
    _: KW_ONLY
    model: dict = field(default_factory=dict)
    width: float = 1
    training: dict = field(default_factory=dict)
    length: float = 1
    start: str | None = None

    @property
    def changed(self) -> dict:
        """{"model": names of the fields that it changes, "training": names}."""
        return {"model": {*self.model, *(["d_expert"] if self.width != 1 else [])},
                "training": {*self.training, *(["steps"] if self.length != 1 else [])}}


RELATIONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


@dataclass(frozen=True)
class Effect(Contrast):
    """What a claim needs: a Contrast whose relation (one of RELATIONS) to a bound holds.

    every_run: judge every run instead of the interval over seeds. Use it for a number that cannot pass its bound, such
    as a share, and for a change that is either rounding or not.
    """

    relation: str
    bound: float
    _: KW_ONLY
    every_run: bool = False

    def ends(self, numbers: np.ndarray) -> tuple[float, float]:
        """(low, high) of the interval over seeds, or of the runs; infinite where nothing is decided: one seed, nan."""
        interval = t_interval(numbers)
        ends = (min(numbers), max(numbers)) if self.every_run and len(numbers) else (interval.low, interval.high)
        return ends if np.isfinite(ends).all() else (-np.inf, np.inf)

    def word(self, numbers: np.ndarray) -> str:
        """"held" where both ends are beyond the bound, "did not hold" where neither is, else "undecided"."""
        beyond = {RELATIONS[self.relation](end, self.bound) for end in self.ends(numbers)}
        return "undecided" if len(beyond) == 2 else "held" if True in beyond else "did not hold"


@dataclass(frozen=True)
class Claim:
    """A published claim: what it says, who says so, and the Effects that it needs; all of them must hold."""

    number: int | None  # its place among the ten that FINDINGS.md gathers, if it is one of them
    text: str
    published: str
    effects: tuple


@dataclass(frozen=True)
class Dispute:
    """A question on which published results disagree, who says what, and the planned pairs whose losses matter."""

    question: str
    published: str
    pairs: tuple


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A question and how it is answered.

    adjustable: settings may be missing, and --set may change them, as in `cli.py study`. Then figures and findings are
    made of what there is, and labels are read from the runs.
    """

    name: str
    question: str
    settings: tuple
    metrics: tuple  # the columns of its table: names of quantities.py, or of what `measure` returns
    planned: tuple  # the Contrasts that are tested, fixed before any result is looked at
    figures: dict  # {name: function of Results -> Figure}, see figures.py
    say: Callable | None = None  # Results -> sentences of the finding; None: a verdict for each planned metric
    caution: str = ""  # what it cannot show
    claims: tuple = ()
    disputes: tuple = ()
    model: dict = field(default_factory=dict)  # fields of ModelConfig, and of TrainConfig, for all settings
    training: dict = field(default_factory=lambda: {"n_evaluations": 10, "eval_windows": 16})
    scales: dict = field(default_factory=lambda: SCALES)
    text: str | None = None  # the corpus, None for the default
    measure: Callable | None = None  # measure(trainer) -> {name: number}, asked of every trained model
    adjustable: bool = False

    def __post_init__(self):
        contrasts = (*self.planned, *(effect for claim in self.claims for effect in claim.effects))
        needed = [*(one.settings for one in contrasts), *(pair for one in self.disputes for pair in one.pairs),
                  [s.start for s in self.settings if s.start]]
        known = {s.id for s in self.settings}
        if unknown := {name for names in needed for name in names} - known:
            raise ValueError(f"experiment {self.name}: no setting is called {min(unknown)}: use one of {sorted(known)}")
        if len(known) < len(self.settings):
            raise ValueError(f"experiment {self.name}: two settings have one id: rename one")

    def runs(self, scale: Scale, seeds: int, only=None, model: dict | None = None,
             training: dict | None = None) -> list[RunPlan]:
        """The RunPlans at a Scale with seeds 0 to seeds - 1, seed by seed.

        only: ids of some settings, in order. model, training: fields that win over those of the settings.
        Raises ValueError where ModelConfig or TrainConfig does, and for a vocabulary that does not hold every byte.
        """
        settings = {s.id: s for s in self.settings}
        return [self._run(settings[name], seed, scale, model or {}, training or {})
                for seed in range(seeds) for name in only or settings]

    def _run(self, setting, seed, scale, model, training):
        fields = _merged(scale.model, self.model, setting.model, model)
        if setting.width != 1:
            fields = {"d_expert": round(setting.width * ModelConfig(**fields).d_ff)} | fields
        config = ModelConfig(**fields)
        if config.vocab_size < 256:
            raise ValueError(f"vocab_size {config.vocab_size} must be at least 256: the tokens of a study are bytes")
        plan = {"steps": round(setting.length * scale.steps)} | self.training | setting.training | training
        return RunPlan(config_id=setting.id, purpose=setting.what, seed=seed, model=config,
                       training=TrainConfig(**plan), start=setting.start, measure=self.measure)


def _merged(*parts):
    """One dict of several: later values win, and dicts in them (router_options, losses) are merged too."""
    whole = {}
    for part in parts:
        for name, new in part.items():
            both = isinstance(new, dict) and isinstance(whole.get(name), dict)
            whole[name] = whole[name] | new if both else new
    return whole


def planned(metrics, pairs) -> tuple[Contrast, ...]:
    """A Contrast first - second for each metric and each pair (first, second)."""
    pairs = tuple(pairs)
    return tuple(Contrast(metric, first, minus=second) for metric in metrics for first, second in pairs)


def against(reference: str, others) -> tuple:
    """Pairs (other, reference)."""
    return tuple((other, reference) for other in others)
