"""FINDINGS.md of an experiment, and summary.csv; from result rows alone.

No outcome is written here: numbers are computed, and words of judgement follow from criteria that the document states.
"""

import json
import math
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..files import as_csv, printable, require_ours, write_atomically
from ..training.identity import processors
from .experiment import SCALES, Experiment
from .quantities import LOSS, QUANTITIES, quantity, title, value
from .results import Results, lowest
from .rows import RunRecord, load_runs, unknown
from .statistics import MOST_SEEDS, enough_digits, t_interval
from .wording import (
    CROSSINGS,
    CURVES,
    DOMAINS,
    EVERY_RUN,
    EXPLORATORY,
    GLOSSARY,
    INTERVALS,
    METHODS,
    PRIMARY,
    SWEEP,
    VERDICTS,
)

WORDS = "## Words used here"  # a heading of all documents
CLAIM_COLUMNS = ["claim", "what it says (published by)", "measured here; condition", "verdict", "experiment"]


def escaped(text) -> str:
    """A text that comes from a file, on one line, for Markdown: it adds no markup, no HTML and no cell to a table."""
    return re.sub(r"[&<>|*~`$\\]|(?<=\])\(", lambda found: f"&#{ord(found[0])};", printable(text))


def table(header, rows):
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def bullets(lines):
    return "\n".join(f"- {line}" for line in lines)


def bold(sentences):
    return "\n\n".join(f"**{sentence}**" for sentence in sentences)


def write_paragraphs(path, paragraphs):
    """Write a document. Raises FileExistsError in place of one that this program did not make."""
    require_ours(path, WORDS)
    write_atomically(path, "\n\n".join(filter(None, paragraphs)) + "\n")
    return path


def run_ids(runs):
    """The ids of all runs, with the seeds of a setting in braces: A-seed{0,1,2}."""
    ids = {}
    for run in runs:
        before, mark, seed = run.run_id.rpartition("-seed")
        ids.setdefault(before + mark, []).append(seed)
    return [first + (n[0] if len(n) == 1 else "{" + ",".join(n) + "}") for first, n in ids.items()]


def enumerated(numbers):
    """`0 to 11` for whole numbers that follow each other, else `0, 2, 5`."""
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(f"{n:,}" for n in numbers)


def about(results):
    """What was trained, and how, in two sentences."""
    run, seeds = results.runs[0], sorted({run.seed for run in results.runs})
    steps = sorted({run.summary["steps"] for run in results.runs})
    sizes = ", ".join(f"{name} {run.model[name]}" for name in ("n_layers", "moe_layers", "n_experts", "d_model", "d_ff")
                      if name in run.model)
    settings = "1 setting" if len(results.groups) == 1 else f"{len(results.groups)} settings"
    return (f"{settings}, {'seed' if len(seeds) == 1 else 'seeds'} {enumerated(seeds)}, trained for "
            f"{' or '.join(f'{n:,}' for n in steps)} steps of {run.config['training']['batch_size']} windows of "
            f"{run.model['seq_len']} bytes ({escaped(', '.join(run.config['domains']))}). Unless a setting says "
            f"otherwise: {escaped(sizes)}. Words such as *different*, *causal* and *load* are explained "
            "[below](#words-used-here).")


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
    for (step, before, steps), n in Counter((one["step"], one["from"], one["to"]) for run in results.runs
                                            for one in run.config.get("extended", ())).items():
        said.append(f"{n} run{'s were' if n > 1 else ' was'} lengthened at step {step} from {before} to {steps} steps: "
                    "there the learning rate had fallen already, and rose again.")
    said += map(escaped, unknown(results.runs))
    return [*said, *beside_the_plan(results), *differing_settings(results), *left_out(results)]


def beside_the_plan(results):
    """Sentences about steps, seeds, learning rates and hashes that are not those of the plan."""
    e, n = results.experiment, max(map(len, results.groups.values()))
    other = (not {run.summary["steps"] for run in results.runs} <= {round(s.length * e.steps) for s in e.settings}
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
    if n := len(hashes) - hashes.count(e.plan_hash) - none:
        yield f"The plan of {n} run{'s' if n > 1 else ''} is another one than today's."
    if none:
        yield f"No plan was recorded by {none} run{'s' if none > 1 else ''}."


def changes(results) -> tuple[list[str], dict[str, list[str]]]:
    """(of all settings, {setting id: its own}): `top_k is 1, not 2` for each field of model and training that is not as
    the plan gives it at the scale that is most alike. Steps are left out, and rates where a sweep chose them.
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


def differing_settings(results):
    """Sentences about what differs between settings though it should not, and what is not as the experiment says."""
    settings = {s.id: s for s in results.experiment.settings}
    configs = {name: runs[0].config for name, runs in results.groups.items()}
    shared, own = changes(results)
    for name, those in {"All settings were": shared, **{f"{name} was": those for name, those in own.items()}}.items():
        if those:
            yield escaped(f"{name} changed: {'; '.join(those)}.")
    for part in ("model", "training"):
        chosen = ["learning_rate"] if results.sweep else []
        intended = set().union(chosen, *(s.changed[part] for s in settings.values()))
        for field in sorted({field for config in configs.values() for field in config[part]} - intended):
            found = {name: json.dumps(config[part].get(field)) for name, config in configs.items()}
            if len(set(found.values())) > 1:
                those = ", ".join(f"{name} {shown}" for name, shown in found.items())
                verb = "differ" if field.endswith("s") else "differs"
                yield escaped(f"{field} {verb} between settings ({those}): compare with care.")
    for key, old in (("versions", None), ("kernels", "numba"), ("threads", None)):  # old: where a run does not say
        found = {json.dumps(run.config.get(key, old)): run.run_id for run in results.runs}
        if len(found) > 1:
            those = "; ".join(f"{run_id}: {shown}" for shown, run_id in found.items())
            yield escaped(f"The runs do not share the same {key} ({those}).")
    kinds = sorted({kind for run in results.runs for kind in processors(run.config)})
    if len(kinds) > 1:
        yield escaped(f"The runs used {len(kinds)} kinds of processor, so last bits can differ ({'; '.join(kinds)}).")


def left_out(results):
    """Sentences about runs that are in no number."""
    alike = {}
    for run in results.all_runs:
        why = ", ".join(f"{key} {part}" for key, part in (run.failure or {}).items() if key != "run_id")
        what = {"failed": f"failed ({escaped(why)})", "unfinished": "is not finished",
                "finished": "is no setting of this experiment"}
        if run not in results.runs and run not in results.sweep_runs:
            alike.setdefault(what[run.state], []).append(run)
    for what, runs in alike.items():
        for run_id in run_ids(runs):
            yield f"`{escaped(run_id)}` {what} and is in no number."


def answers(results: Results) -> list[str]:
    """For each primary comparison its question and answer, the number, the verdict, how sure it is, and what would
    decide it."""
    return [f"{one.question} **{one.sentence(found)}** {quantity(found.contrast.metric).heading}, {found.contrast}: "
            f"{cells(found)[0]}." + (f" *{found.verdict.capitalize()}*{how_sure(found)}." if found.tested else "")
            + (f" To decide it: {to_decide(results, found)}." if found.verdict == "not known" else "")
            for one, found in zip(results.experiment.primary, results.primary)]


def how_sure(found) -> str:
    """What a verdict rests on, in brackets; empty for one that is not tested."""
    if not found.tested:
        return ""
    said = {"different": p_value(found.corrected), "same": f"within {found.margin:g}, {p_value(found.corrected_same)}",
            "not known": f"an effect of {found.smallest:.{enough_digits([found.smallest], 3)}f} would be seen"}
    return f" ({said[found.verdict]}; {found.n} seeds)"


def to_decide(results, found) -> str:
    """How many seeds would decide a comparison that is not known, the range that its SD leaves open, and their cost."""
    if found.needed and found.needed <= found.n:
        return "no number of seeds is known, as the difference seems to lie between 0 and the margin"
    needed, *ends = (f"{n:,}" if n else f"over {MOST_SEEDS:,}" for n in (found.needed, *found.needed_range))
    hours = f"{'' if found.needed else 'over '}{lacking_hours(results, found):,.1f} core-hours more"
    return f"{needed} seeds ({' to '.join(dict.fromkeys(ends))}), {hours}"


def p_value(p):
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def cells(found, interval=None):
    """[mean, interval, verdict] of a Comparison as text, so many digits that no end of the interval looks like 0."""
    interval, shown = interval or found.interval, found.contrast.shown
    numbers = tuple(map(shown, (interval.mean, interval.low, interval.high)))
    size, bound = abs(numbers[0]), 1 if found.contrast.over else 0
    digits = enough_digits(numbers, 0 if size >= 100 else 1 if size >= 10 else 3 if size >= 0.01 else 4, bound)
    mean, low, high = (f"{x:{'' if found.contrast.over else '+'},.{digits}f}" for x in numbers)
    return ["–" if math.isnan(numbers[0]) else mean, f"[{low}, {high}]" if found.tested else "–",
            found.verdict if found.n else "no common seed"]


def finding(results: Results) -> list[str]:
    """The answers, and what else the experiment says."""
    if not results.ready:
        return ["No finding: a setting has no finished run, or no seed is common to all."]
    said = results.experiment.say(results) if results.experiment.say else []
    return [*(answers(results) or ["No primary comparison was planned."]), *said]


def primary_table(results):
    """A column for each primary comparison with all that was tested."""
    columns = []
    for one, found in zip(results.experiment.primary, results.primary):
        mean, interval, verdict = cells(found)
        text = results.text_uncertainty(found.contrast) if found.tested else None
        tests = [f"{found.corrected:.2g}", f"{found.p_flip:.3g}", cells(found, found.interval90)[1],
                 f"{found.corrected_same:.2g}", f"{found.sd:.4f}", f"{found.smallest:.4f}",
                 to_decide(results, found) if verdict == "not known" else "–"] if found.tested else ["–"] * 7
        columns.append([one.published or "–", f"{title(found.contrast.metric)}, {found.contrast}", mean, interval,
                        f"**{verdict}**", *tests[:3], f"{found.margin:g}", *tests[3:5], str(found.n), *tests[5:],
                        *([f"[{text[0]:+.3f}, {text[1]:+.3f}]", f"{text[2]:.0%}"] if text else ["–", "–"])])
    names = ["published", "difference", "mean", "95% interval", "verdict", "corrected p", "sign flips", "90% interval",
             "margin", "same", "SD", "seeds", "smallest effect", "to decide it", "95% over seeds and text",
             "text's share of the variance"]
    questions = [one.question for one in results.experiment.primary]
    rows = [row for row in zip(names, *columns) if not set(row[1:]) <= {"–", "**not tested**", "**no common seed**"}]
    return table(["", *questions], rows) if columns else ""


def lacking_hours(results, found) -> float:
    """Core-hours of the seeds that a comparison lacks to be decided, at the median of each setting's runs and of those
    that it starts from; 0 where it is decided. Over 1,000 seeds count as 1,000."""
    if found.verdict != "not known":
        return 0.0
    starts = {s.id: s.start for s in results.experiment.settings}
    names = {each for name in found.contrast.settings for each in (name, starts.get(name)) if each in results.groups}
    seed = sum(np.median([core_hours(run, run.wall_seconds) for run in results.groups[name]]) for name in names)
    return max((found.needed or MOST_SEEDS) - found.n, 0) * float(seed)


def core_hours(run, seconds):
    return run.config.get("threads", 1) * seconds / 3600


def domain_table(results):
    """The difference of each primary comparison of the loss in each domain; "" without one."""
    rows = [[str(found.contrast), escaped(domain), *cells(each)[:2]] for found in results.primary
            for domain, each in results.by_domain(found.contrast).items()]
    kept = 4 if any(row[3] != "–" for row in rows) else 3
    return table(["difference", "domain", "mean", "95% interval"][:kept], [row[:kept] for row in rows]) if rows else ""


def exploratory_table(results):
    rows = [[title(one.contrast.metric), str(one.contrast), *cells(one)[:2],
             f"{one.corrected_same if one.verdict == 'same' else one.corrected:.2g}" if one.tested else "–",
             cells(one)[2]] for one in results.exploratory]
    kept = 6 if any(one.tested for one in results.exploratory) else 3  # no interval and no test of one seed
    names = ["quantity", "difference", "mean", "95% interval", "corrected p", "verdict"]
    return table(names[:kept], [row[:kept] for row in rows]) if rows else ""


def sweep_table(results):
    """The loss at each learning rate, the lowest in bold; says where the best is at an end of the range."""
    rates, rows = results.experiment.rates, []
    for name, losses in results.sweep.items():
        best = lowest(losses)
        shown = [f"{losses[rate]:.3f}" if math.isfinite(losses.get(rate, math.nan)) else
                 "not finite" if rate in losses else "–" for rate in rates]
        at_end = ", at the end of the range" if best in (min(rates), max(rates)) else ""
        rows.append([name, *(f"**{text}**" if rate == best else text for rate, text in zip(rates, shown)),
                     f"{best:g}{at_end}", ", ".join(s.id for s in results.experiment.settings if s.rate_of == name)])
    return table(["setting", *(f"{rate:g}" for rate in rates), "taken", "taken for it too"], rows) if rows else ""


def crossing_table(results):
    rows = [[title(metric), f"`{first}`, `{second}`", *(", ".join("–" if math.isnan(step) else f"{step:.0f}"
             for step in results.crossing(metric, first, second).values()),)]
            for metric, first, second in results.experiment.crossings]
    return table(["curve", "of", "step, seed by seed"], rows) if rows and results.ready else ""


COMPUTE = ["experiment", "runs finished", "of the sweep", "failed", "core-hours"]


def compute_row(results) -> list[str]:
    """The experiment, its finished, sweep and failed runs, and their core-hours, those of failed runs included."""
    done, failed = ended(results)
    return [results.experiment.name, *map(str, (len(results.runs), len(done) - len(results.runs), len(failed))),
            f"{total_hours(results):.2f}"]


def ended(results):
    """(finished runs with those of the sweep, failed runs)"""
    return ([*results.runs, *(run for run in results.sweep_runs if run.summary)],
            [run for run in results.all_runs if run.state == "failed"])


def total_hours(results) -> float:
    """Core-hours of all runs of an experiment, those of failed runs included."""
    done, failed = ended(results)
    seconds = [*((run, run.wall_seconds) for run in done),
               *((run, row["seconds"]) for run in failed for row in run.log[-1:]
                 if isinstance(row.get("seconds"), float))]
    return sum(core_hours(run, of) for run, of in seconds)


def settings_table(results):
    """Every setting with its numbers, as Markdown, without the columns that hold no number."""
    e = results.experiment
    leaky = not {"val_cross_entropy", "leak"} & set(e.metrics)  # which have a column of their own
    columns = {title(metric): [results.cell(metric, name, leaky=leaky) for name in results.groups]
               for metric in e.metrics}
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"–"}}
    own = changes(results)[1]
    what = {s.id: s.what + (" (but changed, see above)" if own.get(s.id) else "") for s in e.settings}
    if not e.adjustable:  # where labels have them already
        rules = {name: runs[0].rules for name, runs in results.groups.items() if runs[0].rules}
        what |= {name: f"{what[name]} (chosen {escaped(said)})" for name, said in rules.items()}
    rows = [[escaped(results.label(name)), what[name], *cells]
            for name, *cells in zip(results.groups, *columns.values())]
    return table(["setting", "what", *columns], rows)


def claim_rows(results: Results) -> list[list[str]]:
    """Rows of the table of claims: number, claim, numbers beside their conditions, verdict, experiment."""
    rows = []
    for claim in results.experiment.claims:
        there = results.ready and all(map(results.has, claim.effects))
        verdict, found = results.outcome(claim) if there else ("not tested", [])
        if any(len(numbers) < 2 and not effect.every_run for effect, numbers in found):
            verdict = "not tested"
        rows.append([str(claim.number or "–"), f"{claim.text} ({claim.published})",
                     "<br>".join(measured(effect, numbers) for effect, numbers in found), f"**{verdict}**",
                     results.experiment.name])
    return rows


def verdicts(found) -> str:
    """What the verdicts of claims mean, for the claims of some Results."""
    effects = [effect for results in found for claim in results.experiment.claims for effect in claim.effects]
    return VERDICTS + (f" {EVERY_RUN}" if any(effect.every_run for effect in effects) else "")


def measured(effect, numbers):
    """`load CV, a / b: 2.905 [2.411, 3.399]; > 3`; for what is judged in every run the range of the runs."""
    shown = tuple(map(effect.shown, (np.mean(numbers), *effect.ends(numbers))))
    digits = enough_digits(shown, 3, effect.bound)
    mean, low, high = (f"{x:{'+' if effect.minus else ''}.{digits}f}" for x in shown)
    ends = f" (runs: {low} to {high})" if effect.every_run else f" [{low}, {high}]" if np.isfinite(shown).all() else ""
    return f"{title(effect.metric)}, {effect}: {mean}{ends}; needs {effect.relation} {effect.bound:g}"


def limits(results: Results) -> list[str]:
    """What the runs were too short or too small to show, as sentences."""
    config = results.runs[0].config
    lengths = sorted({run.summary["steps"] for run in results.runs})
    window = config["training"]["batch_size"] * config["model"]["seq_len"]
    corpus = sum(part["train_bytes"] for part in config["corpus"].values())
    slopes = [t_interval([_slope(run.log) for run in runs]) for runs in results.groups.values()]
    falling = [one.mean for one in slopes if (one.high if one.n > 1 else one.mean) < 0]
    rates = sorted({run.config["training"]["learning_rate"] for run in results.runs})
    said = [*(f"{steps:,} steps saw {steps * window:,} bytes, {steps * window / corpus:.2f} times the {corpus:,} bytes "
              "of training text." for steps in lengths),
            f"Over the last third of the steps the loss was still falling in {len(falling)} of {len(slopes)} settings "
            f"(steepest: {min(falling, default=0):.3f} nats in 100 steps). A longer run may change any difference.",
            f"One text, learning rate {', '.join(map('{:g}'.format, rates))}" +
            (", chosen as the table of learning rates shows." if results.sweep else ": settings may prefer others.")]
    if config["corpus"].get("tables", {}).get("matches") is not None:  # None for a user's own text
        said.append("About half of the validation lines of the domain `tables` also stand in the training text.")
    return said


def _slope(log):
    """Nats in 100 steps: a straight line through the last third."""
    points = [(row["step"], row[LOSS]) for row in log if row["step"] >= log[-1]["step"] * 2 / 3]
    return 100 * float(np.polyfit(*zip(*points), 1)[0]) if len(points) > 1 else math.nan


def images(results, place="") -> list[str]:
    """The figures of an experiment that were drawn, with captions, as Markdown; place: the folder of its document."""
    return [f"![{name.replace('_', ' ')}]({place}figures/{name}.png)\n\n*{caption(results, name)}*"
            for name, fresh in drawn(results).items() if fresh]


def drawn(results) -> dict[str, bool]:
    """{name: whether it shows these runs, and not those of before} of the figures that are there.

    A figure that says nothing of its runs, of an earlier version, counts as one of these.
    """
    paths = {name: results.folder / "figures" / f"{name}.png" for name in results.experiment.figures}
    heads = {name: path.read_bytes()[:1000] for name, path in paths.items() if path.exists()}
    return {name: b"Description\0rows " not in head or f"Description\0{results.mark}".encode() in head
            for name, head in heads.items()}


def caption(results, name) -> str:
    """The caption of a figure; of curves also on how much text points and tables are measured, and what lies outside
    of the frame. With one seed there are no bands and intervals."""
    draw, run = results.experiment.figures[name], results.runs[0]
    said = draw.caption(results) if hasattr(draw, "caption") else f"{name.replace('_', ' ')}."
    few, many = run.log[-1]["validation_tokens"], run.final["validation_tokens"]
    over_steps = CURVES in said
    if not results.several:
        said = said.replace(f": {CURVES}", "").replace(f": {INTERVALS}", "")
    if over_steps and few != many:
        said += f" A point is measured on {few:,} validation bytes, a number of the tables on {many:,}."
    if hasattr(draw, "clips") and draw.clips(results):
        said += " The first evaluations may lie outside the frame."
    return said


def chapter(heading, *parts):
    """A heading and its paragraphs, none where the last of them is empty."""
    return [f"## {heading}", *parts] if parts[-1] else []


def write_findings(experiment: Experiment, folder) -> Path:
    """Write folder/FINDINGS.md of one experiment from its runs, showing the figures that are there; returns its path.

    Raises ValueError without a finished run, and where runs that would be averaged differ.
    """
    return write_paragraphs(Path(folder, "FINDINGS.md"), document(Results(experiment, folder)))


def document(results: Results) -> list[str]:
    """The document of one experiment, as paragraphs of Markdown."""
    stale = not all(drawn(results).values())
    first, *others = images(results) or ["" if stale else "No figures yet: `--plot-only` draws them."]
    run, claims, experiment = results.runs[0], claim_rows(results), results.experiment
    versions = ", ".join(f"{name} {number}" for name, number in run.config["versions"].items())
    said = finding(results)
    n, untested = len(experiment.primary) or 1, not results.several
    ids = ", ".join(f"`{each}`" for each in run_ids(results.runs))
    return [
        f"# {experiment.name}: {experiment.question}",
        "Figures drawn before the last runs are left out: `--plot-only` draws them again." if stale else "",
        *([] if untested else said[:n]), about(results), bold(warnings(results)), *([] if untested else [first]),
        settings_table(results), *([*said[:n], first] if untested else []), bullets(said[n:]),
        *chapter("Primary comparisons", PRIMARY if any(one.tested for one in results.primary) else "",
                 primary_table(results)),
        *chapter("By domain", DOMAINS, domain_table(results)),
        *chapter("Exploratory comparisons", EXPLORATORY if any(one.tested for one in results.exploratory) else "",
                 exploratory_table(results)),
        *chapter("Learning rates", SWEEP, sweep_table(results)),
        *chapter("Where curves cross", CROSSINGS, crossing_table(results)),
        *chapter("Claims", verdicts([results]), table(CLAIM_COLUMNS, claims) if claims else ""),
        *chapter("More figures", "\n\n".join(others)),
        "## What these runs cannot show", experiment.caution, bullets(limits(results)),
        WORDS, GLOSSARY, "## Methods", METHODS, table(COMPUTE, [compute_row(results)]),
        f"Tables: {run.final['validation_tokens']:,} validation bytes; curves over steps: "
        f"{run.log[-1]['validation_tokens']:,}. Runs: {ids}. Plan: `{experiment.plan_hash[:12]}`. "
        f"Versions: {escaped(versions)}.{imports(results.runs)}"]


def imports(runs) -> str:
    """A sentence: the files that the runs imported, with the beginnings of their hashes; empty without any."""
    files = dict.fromkeys((Path(str(file.get("path"))).name, str(file.get("sha256"))[:12]) for run in runs
                          for file in run.config.get("imports") or () if isinstance(file, dict))
    return f" Imports: {escaped(', '.join(f'{name} (sha256 {sha256})' for name, sha256 in files))}." if files else ""


def write_summary_csv(study_dir) -> Path:
    """Write STUDY/summary.csv: a line for each run whatever its state, a column for each number that any run has."""
    rows = []
    for run in load_runs(study_dir):
        sizes, numbers = run.config.get("parameters", {}), all_numbers(run)
        rows.append({"run_id": run.run_id, "config_id": run.config_id, "seed": run.seed, "state": run.state}
                    | {name: run.model.get(name) for name in ("router", "top_k", "aux_coef")}
                    | {"steps": (run.summary or {}).get("steps")}
                    | {f"parameters_{part}": sizes.get(part) for part in ("total", "active")}
                    | {name: f"{number:.6g}" for name, number in numbers.items()})
    path = Path(study_dir, "summary.csv")
    require_ours(path, "run_id,config_id")
    write_atomically(path, as_csv(rows))
    return path


def all_numbers(run: RunRecord) -> dict[str, float]:
    """{name: number} of every quantity that a finished run has, and of the fields of its rows that have no entry."""
    if run.state != "finished":
        return {}
    rows = (run.log[-1], run.measured, *run.final["layers"])
    fields = [name for row in rows for name, number in row.items() if isinstance(number, float)]
    names = dict.fromkeys((*QUANTITIES, *fields))
    return {name: number for name in names if math.isfinite(number := value(run, name))}
