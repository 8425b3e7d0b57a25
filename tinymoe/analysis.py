"""What a study tests, and the criteria that turn numbers into words: between the rows and the sentences.

The comparisons follow from the configs alone, before any result is looked at, and are corrected together.
Losses are compared in nats per byte with routing decided on the prefix alone (causal).
"""

import math
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path

import numpy as np

from .rows import Interval, coefficient_sweep, complete_runs, load_runs, measure, over_seeds, t_interval

LOSS, LEAKY = "causal_cross_entropy", "val_cross_entropy"
WORDS = ("clear", "suggestive", "undecided", "not tested")
SPECIALISATION = ("mi_excess", "byte_excess", "load_entropy", "repetition", "weight_divergence")


@dataclass(frozen=True)
class Comparison:
    """A difference first - second, paired by seed, that a question of the report asks for."""

    question: str
    metric: str
    first: str
    second: str
    interval: Interval
    survives: bool = False  # Holm's correction over all comparisons of the study

    @property
    def tested(self):
        return math.isfinite(self.interval.half)

    @property
    def word(self):
        """One of WORDS: not tested with one seed, undecided if the interval includes zero, clear if it survives Holm."""
        if not self.tested:
            return "not tested"
        if self.interval.low <= 0 <= self.interval.high:
            return "undecided"
        return "clear" if self.survives else "suggestive"


def paired(question, name, first_runs, second_runs):
    """Compare one number of two configs over the seeds they share."""
    second = {run.seed: measure(run.final, name) for run in second_runs}
    values = [measure(run.final, name) - second[run.seed] for run in first_runs if run.seed in second]
    return Comparison(question, name, first_runs[0].config_id, second_runs[0].config_id, t_interval(values))


def holm(comparisons, level=0.05):
    """The same comparisons, each told whether it survives Holm's (1979) step-down correction for their number."""
    tested = sorted((one for one in comparisons if one.tested), key=lambda one: one.interval.p)
    surviving = set()
    for rank, one in enumerate(tested):
        if one.interval.p > level / (len(tested) - rank):
            break
        surviving.add(id(one))
    return [replace(one, survives=id(one) in surviving) for one in comparisons]


@dataclass(frozen=True)
class Study:
    """The finished runs by config, the roles the configs play in the three questions, and all that was tested."""

    name: str
    runs: list  # all, finished or not
    groups: dict  # config id -> finished runs by seed
    sweep: list  # configs that differ in the balance coefficient alone
    routers: list  # configs with different routers and equally many experts per token
    balanced: list  # configs whose router guarantees balance
    comparisons: list

    @property
    def finished(self):
        return [run for runs in self.groups.values() for run in runs]

    @property
    def moe(self):
        """The configs that have experts."""
        return {name: runs for name, runs in self.groups.items() if runs[0].is_moe}

    def find(self, question, metric=None):
        """The comparisons made for a question, or those of them in one number."""
        return [one for one in self.comparisons if one.question == question and metric in (None, one.metric)]


def read_study(study_dir):
    """Load a study and make all of its comparisons. ValueError where no run is finished."""
    groups = complete_runs(study_dir)
    sweep, routers = coefficient_sweep(groups), _routers(groups)
    balanced = [name for name, runs in groups.items() if runs[0].is_moe and runs[0].model["router"] == "expert_choice"]
    comparisons = holm(_plan(groups, sweep, routers, balanced))
    return Study(Path(study_dir).resolve().name, load_runs(study_dir), groups, sweep, routers, balanced, comparisons)


def _routers(groups):
    """Configs of one top_k with the most different routers; [] where no two routers can be compared at equal K."""
    by_k = {}
    for name, runs in groups.items():
        if runs[0].is_moe:
            by_k.setdefault(runs[0].model["top_k"], {}).setdefault(runs[0].model["router"], name)
    largest = max(by_k.values(), key=len, default={})
    return list(largest.values()) if len(largest) > 1 else []


def _plan(groups, sweep, routers, balanced):
    """Every comparison the report makes, decided by the configs before any result is looked at."""
    made = []
    for first, second in combinations(sweep, 2):
        made += [paired("balance", name, groups[first], groups[second]) for name in (LOSS, "load_cv", "mi_excess")]
    for first, second in combinations(routers, 2):
        made += [paired("routers", name, groups[first], groups[second]) for name in SPECIALISATION]
    for first, second in product(balanced, [name for name in groups if name not in balanced]):
        names = (LOSS, "load_cv") if groups[second][0].is_moe else (LOSS,)
        made += [paired("cost", name, groups[first], groups[second]) for name in names]
    return made + _claims(groups, sweep)


def _claims(groups, sweep):
    """Tests of published claims that are not differences of one number between two configs."""
    made = []
    if sweep and groups[sweep[0]][0].model["aux_coef"] == 0:
        none, light = ({run.seed: measure(run.final, "load_cv") for run in groups[name]} for name in sweep[:2])
        excess = t_interval([none[seed] - 3 * light[seed] for seed in none if seed in light])
        made.append(Comparison("cv_ratio", "load_cv", *sweep[:2], excess))
    for name, runs in groups.items():
        if runs[0].leaky:
            gap = t_interval([measure(run.final, LEAKY) - measure(run.final, LOSS) for run in runs])
            made.append(Comparison("leak", LEAKY, name, "causal", gap))
        if runs[0].is_moe:
            more = t_interval([measure(run.final, "byte_excess") - measure(run.final, "mi_excess") for run in runs])
            made.append(Comparison("null", "mi_excess", name, "null", over_seeds(runs, "mi_excess")))
            made.append(Comparison("token_over_topic", "byte_excess", name, "domain", more))
    return made


def layer_state(layer):
    """collapsed: fewer than E/2 effective experts (exp of the load's entropy); starved: a dead expert; else in use."""
    n_experts = len(layer["load"])
    if n_experts ** layer["load_entropy"] < n_experts / 2:
        return "collapsed"
    return "starved" if layer["dead_experts"] else "in use"


def states(runs):
    """How many layers, over the runs of a config, ended in each state: {state: count}, the states that occur."""
    ends = [layer_state(layer) for run in runs for layer in run.final["layers"]]
    return {state: ends.count(state) for state in ("collapsed", "starved", "in use") if state in ends}


def closest_domains(runs):
    """The pairs of domains that are routed most and least alike: total variation, mean over layers and seeds."""
    domains = runs[0].config["domains"]
    distance = {}
    for first, second in combinations(range(len(domains)), 2):
        found = []
        for layer in (layer for run in runs for layer in run.final["layers"]):
            share = np.array(layer["domain_load"], dtype=float)
            share /= np.maximum(share.sum(axis=1, keepdims=True), 1)
            found.append(np.abs(share[first] - share[second]).sum() / 2)
        distance[f"{domains[first]}, {domains[second]}"] = float(np.mean(found))
    ordered = sorted(distance, key=distance.get)
    return [f"{pair}: {distance[pair]:.3f}" for pair in (ordered[:1] + ordered[-1:])] if ordered else ["–", "–"]


def slope(run):
    """Change of the causal validation loss, nats in 100 steps: a straight line through the last third of the log."""
    rows = [row for row in run.log if row["step"] >= run.log[-1]["step"] * 2 / 3]
    if len(rows) < 2:
        return math.nan
    return 100 * float(np.polyfit([row["step"] for row in rows], [row[LOSS] for row in rows], 1)[0])
