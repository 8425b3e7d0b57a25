"""What must be true of an Experiment, checked before anything is trained. Every error says what to change."""

import re
from dataclasses import fields
from itertools import combinations

from ..model.config import ModelConfig
from ..training.plan import TrainConfig
from .quantities import require_known

OWN = {"model": {one.name for one in fields(ModelConfig)}, "training": {one.name for one in fields(TrainConfig)}}


def check_names(e):
    """Raise ValueError for an id, text, quantity or field of a setting that cannot be one."""
    ids = [s.id for s in e.settings]
    for name in (e.name, *ids, *e.figures):
        if not (isinstance(name, str) and re.fullmatch(r"[\w+][\w.+-]*", name)):
            raise ValueError(f"experiment {e.name!r}: {name!r} names a folder or a figure, so it must be text of "
                             "letters, digits and the signs . _ + -")
    texts = [e.question, *(s.what for s in e.settings),
             *(text for one in e.primary for text in (one.question, one.lower, one.higher, one.same, one.not_known))]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"experiment {e.name}: {wrong[0]!r:.80} stands where a text must be")
    if len(set(ids)) < len(ids):
        raise ValueError(f"experiment {e.name}: two settings have one id: rename one")
    drawn = [name for draw in e.figures.values() for name in getattr(draw, "metrics", ())]
    if not e.measure:  # which may give any name
        require_known([*e.metrics, *(one.metric for one in compared(e)), *(name for name, *_ in e.crossings), *drawn])
    for who, part in (("all settings", e), *((s.id, s) for s in e.settings)):
        if unknown := [name for known, given in (("model", part.model), ("training", part.training))
                       for name in given if name not in OWN[known]]:
            raise ValueError(f"experiment {e.name}, {who}: no field is called {unknown[0]}: `options` lists them")


def compared(e):
    """Every Contrast of an experiment: of its questions, exploratory ones, and those that claims need."""
    return (*(one.contrast for one in e.primary), *e.exploratory,
            *(effect for claim in e.claims for effect in claim.effects))


def check_references(e):
    """Raise ValueError for the id of a setting that is not there, or cannot be the start or the chooser of another."""
    known = {s.id for s in e.settings}
    needed = [*(one.settings for one in compared(e)), *(pair for _, *pair in e.crossings),
              *(getattr(draw, "settings", ()) for draw in e.figures.values()),
              [name for s in e.settings for name in (s.start, s.rate_of) if name]]
    if unknown := {name for names in needed for name in names} - known:
        raise ValueError(f"experiment {e.name}: no setting is called {min(unknown)}: use one of {sorted(known)}")
    if alone := [one for one in compared(e) if one.setting in (one.minus, one.over)]:
        raise ValueError(f"experiment {e.name}: {alone[0]} compares a setting with itself: name another one")
    starts = {s.id: s.start for s in e.settings}
    if bad := [s for s in e.settings if starts.get(s.start)]:
        raise ValueError(f"experiment {e.name}: {bad[0].id} starts from {bad[0].start}, which has a start of its own: "
                         "name a setting without one")
    bad = [s.id for s in e.settings if s.rate_of and s.rate_of not in e.choosers or s.start and not s.rate_of]
    if e.rates and bad:
        raise ValueError(f"experiment {e.name}: {bad[0]} needs rate_of, the id of a setting that has no rate_of, no "
                         "start and no learning_rate of its own")


def check_plan(e, sweep_seeds):
    """Raise ValueError for seeds, steps, rates or scales that cannot be run."""
    if not e.settings or e.seeds < 1:
        raise ValueError(f"experiment {e.name}: it needs a setting and a seed")
    if e.rates and {*sweep_seeds} & {*range(e.first_seed, e.first_seed + e.seeds)}:
        raise ValueError(f"experiment {e.name}: seeds {sweep_seeds} choose the rates: start beyond them")
    if len({f"{rate:g}" for rate in e.rates}) < len(e.rates):
        raise ValueError(f"experiment {e.name}: two of the rates {e.rates} are one: leave one out")
    if any("steps" in training for training in (e.training, *(s.training for s in e.settings))):
        raise ValueError(f"experiment {e.name}: `training` has no steps: give `steps`, and `length`")
    if "default" not in e.scales:
        raise ValueError(f"experiment {e.name}: `scales` has no \"default\", the scale without --quick and --full")


def check_different(e, plans):
    """Raise ValueError where two settings, each with its RunPlan, would train the same model in the same way."""
    lengths = {s.id: s.length for s in e.settings}  # which a few steps may round to the same

    def what(plan):
        return plan.model, plan.training, plan.start, lengths[plan.config_id]

    for one, other in combinations(plans, 2):
        if what(one) == what(other):
            raise ValueError(f"experiment {e.name}: {one.config_id} and {other.config_id} are the same model, trained "
                             "in the same way: change a field to another value than its default")
