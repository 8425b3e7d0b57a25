"""What makes the numbers of an experiment weaker, or wrong to compare, and what its runs cannot show: sentences."""

import json
import math
from collections import Counter
from dataclasses import asdict

import numpy as np

from ..training.identity import noted
from .experiment import SCALES
from .markdown import escaped, run_ids
from .quantities import LOSS
from .results import Results, chosen
from .rows import unknown
from .statistics import Interval, t_interval


def warnings(results: Results) -> list[str]:
    """What makes the numbers weaker, or wrong to compare, as sentences; none where all is well."""
    e, groups, said = results.experiment, results.groups, []
    seeds = {s.id: {run.seed for run in groups.get(s.id, [])} for s in e.settings if s.id in groups or not e.adjustable}
    behind = [name for name, those in seeds.items() if those < set.union(*seeds.values())]
    single = [name for name in groups if len(seeds[name]) == 1]
    steps = max(run.summary["steps"] for run in results.runs)
    if behind:
        said.append(f"Not finished, so missing from some numbers: {', '.join(behind)}.")
    if single:
        said.append(f"One seed, so no interval and no test: {', '.join(single)}.")
    if steps < SCALES["default"].steps:
        said.append(f"{steps} steps show that the experiment runs. Draw no conclusion from them.")
    for (step, before, after), n in Counter((one["step"], one["from"], one["to"]) for run in results.runs
                                            for one in run.config.get("extended", ())).items():
        said.append(f"{n} run{'s were' if n > 1 else ' was'} lengthened at step {step} from {before} to {after} steps: "
                    "there the learning rate had fallen already, and rose again.")
    said += map(escaped, unknown(results.runs))
    for part in (beside_the_plan, changed_settings, differing_fields, other_rates, different_machines, left_out):
        said += part(results)
    return said


def beside_the_plan(results):
    """Sentences about steps, seeds, learning rates and hashes that are not those of the plan."""
    e, n = results.experiment, max(map(len, results.groups.values()))
    planned = {s.id: round(s.length * e.steps) for s in e.settings}
    other = (any(run.summary["steps"] != planned[run.config_id] for run in results.runs)
             or bool(e.rates and e.choosers and not results.sweep))
    if other or n < e.seeds:  # in a folder whose runs have other settings `--full` would be refused
        yield (f"The plan has {e.seeds} seeds of {e.steps:,} steps"
               f"{', with a learning rate chosen for each setting' if e.rates else ''}: `--full` runs it"
               f"{' in a folder of its own' if other else ''}.")
    if not other and n != e.seeds:
        yield (f"{n} seed{'s' if n > 1 else ''} ran, the plan has {e.seeds}: the p values do not allow for a look in "
               "between.")
    hashes = [run.plan_hash for run in results.runs]
    none = hashes.count(None)
    if others := len(hashes) - hashes.count(e.plan_hash) - none:
        yield f"The plan of {others} run{'s' if others > 1 else ''} is another one than today's."
    if none:
        yield f"No plan was recorded by {none} run{'s' if none > 1 else ''}."


def changes(results) -> tuple[list[str], dict[str, list[str]]]:
    """(of all settings, {setting id: its own}): what differs from the plan, such as `top_k is 1, not 2`.

    It is compared at the scale with the fewest differences, without steps, and without rates that a sweep chose.
    """
    e, aside = results.experiment, {"steps", *(["learning_rate"] if results.sweep else [])}
    configs = {name: runs[0].config for name, runs in results.groups.items()}

    def of(config, plan):
        wanted = json.loads(json.dumps({"model": plan.model.to_dict(), "training": asdict(plan.training)}))
        return [f"{field} {'are' if field.endswith('s') else 'is'} {found}, not {wanted[part][field]}"
                for part in wanted for field, found in config[part].items()
                if field in wanted[part].keys() - aside and found != wanted[part][field]]

    try:
        plans = [{plan.config_id: plan for plan in e.runs(e.scale(name), 1)} for name in ("full", *e.scales)]
    except ValueError:  # a router of a file that is not imported
        return [], {}
    found = min(({name: of(config, plan[name]) for name, config in configs.items()} for plan in plans),
                key=lambda found: sum(map(len, found.values())))
    first, *others = found.values()
    shared = [one for one in first if others and all(one in other for other in others)]
    return shared, {name: [one for one in those if one not in shared] for name, those in found.items()}


def changed_settings(results):
    """Sentences about settings that are not as the experiment says."""
    shared, own = changes(results)
    for name, those in {"All settings were": shared, **{f"{name} was": those for name, those in own.items()}}.items():
        if those:
            yield escaped(f"{name} changed: {'; '.join(those)}.")


def differing_fields(results):
    """Sentences about fields that differ between settings, of which none is meant to change them."""
    configs = {name: runs[0].config for name, runs in results.groups.items()}
    for part in ("model", "training"):
        swept = ["learning_rate"] if results.sweep else []
        intended = set().union(swept, *(s.changed[part] for s in results.experiment.settings))
        for field in sorted({field for config in configs.values() for field in config[part]} - intended):
            found = {name: json.dumps(config[part].get(field)) for name, config in configs.items()}
            if len(set(found.values())) > 1:
                those = ", ".join(f"{name} {shown}" for name, shown in found.items())
                verb = "differ" if field.endswith("s") else "differs"
                yield escaped(f"{field} {verb} between settings ({those}): compare with care.")


def other_rates(results):
    """A sentence about learning rates that are not those that the sweep chose."""
    chooser = {s.id: s.rate_of or s.id for s in results.experiment.settings}
    sweep = {name: chosen(results.experiment, losses) for name, losses in results.sweep.items()}
    rates = {name: (results.learning_rate(name), sweep[chooser[name]]) for name in results.groups
             if sweep.get(chooser[name])}
    if other := ", ".join(f"{name} {rate:g}, not {best:g}" for name, (rate, best) in rates.items() if rate != best):
        yield escaped(f"The learning rate is not the one that the sweep chose ({other}).")


def different_machines(results):
    """Sentences about versions, kernels, threads and processors that the runs do not share."""
    for key, old in (("versions", None), ("kernels", "numba"), ("threads", None)):  # old: where a run does not say
        found = {json.dumps(one): run.run_id for run in results.runs
                 for one in noted(run.config, key, old)}
        if len(found) > 1:
            those = "; ".join(f"{run_id}: {shown}" for shown, run_id in found.items())
            yield escaped(f"The runs do not share the same {key} ({those}).")
    kinds = sorted({str(kind) for run in results.runs for kind in noted(run.config, "processor")})
    if len(kinds) > 1:
        yield escaped(f"The runs used {len(kinds)} kinds of processor, so last bits can differ ({'; '.join(kinds)}).")


def left_out(results):
    """Sentences about runs that are in no number."""
    alike = {}
    for run in results.all_runs:
        found = run.failure or {}
        why = f"{found.get('reason')} at step {found.get('step')}, beginning in {found.get('layer')}"
        what = {"failed": f"failed ({escaped(why)})", "unfinished": "is not finished",
                "finished": "is no setting of this experiment"}
        if run not in results.runs and run not in results.sweep_runs:
            alike.setdefault(what[run.state], []).append(run)
    for what, runs in alike.items():
        for run_id in run_ids(runs):
            yield f"`{escaped(run_id)}` {what} and is in no number."


def limits(results: Results) -> list[str]:
    """What the runs were too short or too small to show, as sentences."""
    config = results.runs[0].config
    lengths = sorted({run.summary["steps"] for run in results.runs})
    window = config["training"]["batch_size"] * config["model"]["seq_len"]
    corpus = sum(part["train_bytes"] for part in config["corpus"].values())
    falling = [one.mean for one in slopes(results) if is_falling(one)]
    steepest = f" (steepest: {min(falling):.3f} nats in 100 steps)" if falling else ""
    rates = sorted({run.config["training"]["learning_rate"] for run in results.runs})
    said = [*(f"{steps:,} steps saw {steps * window:,} bytes, {steps * window / corpus:.2f} times the {corpus:,} bytes "
              "of training text." for steps in lengths),
            f"Over the last third of the steps the loss was still falling in {len(falling)} of {len(results.groups)} "
            f"settings{steepest}. A longer run may change any difference.",
            f"One text, learning rate {', '.join(map('{:g}'.format, rates))}" +
            (", chosen as the table of learning rates shows." if results.sweep else ": settings may prefer others.")]
    if config["corpus"].get("tables", {}).get("matches") is not None:  # None for a user's own text
        said.append("About half of the validation lines of the domain `tables` also stand in the training text.")
    return said


def slopes(results) -> list[Interval]:
    """For each setting the slope of the loss over the last third of the steps, nats in 100 steps."""
    return [t_interval([_slope(run.log) for run in runs]) for runs in results.groups.values()]


def is_falling(slope: Interval) -> bool:
    """Whether a slope is shown to be below 0; of one seed, whether it is."""
    return (slope.high if slope.n > 1 else slope.mean) < 0


def _slope(log):
    """Nats in 100 steps: a straight line through the last third."""
    points = [(row["step"], row[LOSS]) for row in log if row["step"] >= log[-1]["step"] * 2 / 3]
    return 100 * float(np.polyfit(*zip(*points), 1)[0]) if len(points) > 1 else math.nan
