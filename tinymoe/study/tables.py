"""The answers and tables of an experiment, as Markdown: what was compared, how sure it is, and what it cost."""

import math

import numpy as np

from .caveats import changes
from .experiment import CANDIDATES
from .markdown import escaped, joined, table
from .quantities import quantity, title
from .results import Results, lowest
from .statistics import LEVEL, MOST_SEEDS, enough_digits

CLAIM_COLUMNS = ["claim", "what it says (published by)", "measured here; condition", "verdict", "experiment"]
COMPUTE = ["experiment", "runs finished", "sweep runs besides", "failed", "core-hours"]


def answers(results: Results) -> list[str]:
    """For each primary comparison its question and answer, the number, the verdict, how sure it is, and what would
    decide it."""
    return [f"{one.question} **{one.sentence(found)}** {quantity(found.contrast.metric).heading}, {found.contrast}: "
            f"{numbers_of(found)[0]}{rates_of(results, found, ' ({})')}."
            + (f" *{found.verdict.capitalize()}*{how_sure(found)}." if found.tested else "")
            + (f" To decide it: {to_decide(results, found)}." if found.verdict == "not known" else "")
            for one, found in zip(results.experiment.primary, results.primary)]


def how_sure(found) -> str:
    """What a verdict rests on, in brackets; empty for one that is not tested."""
    if not found.tested:
        return ""
    said = {"different": p_value(found.corrected), "same": f"within {found.margin:g}, {p_value(found.corrected_same)}",
            "not known": f"an effect of {found.smallest:.{enough_digits([found.smallest], 3)}f} would be seen"}
    return f" ({said[found.verdict]}; {found.n} seeds)"


def rates_of(results, found, form) -> str:
    """`learning rates 0.004 and 0.002` put into a form, where the settings of a Comparison have different ones; else
    empty."""
    rates = [results.learning_rate(name) for name in found.contrast.settings if name in results.groups]
    return form.format(f"learning rates {joined([f'{rate:g}' for rate in rates])}") if len(set(rates)) > 1 else ""


def at_an_end(results, rate) -> str:
    """Words where a learning rate is the first or last of those that were tried; else empty.

    An experiment without a sweep that asks questions again has a rate of the earlier sweeps.
    """
    e = results.experiment
    rates = e.rates or (CANDIDATES if e.first_seed else ())
    return ", at the end of the range" if rates and rate in (min(rates), max(rates)) else ""


def to_decide(results, found) -> str:
    """How many seeds would decide a comparison that is not known, the range that its SD leaves open, and their cost."""
    if found.between:
        return "no number of seeds is known, as the difference seems to lie between 0 and the margin"
    needed, *ends = (f"{n:,}" if n else f"over {MOST_SEEDS:,}" for n in (found.needed, *found.needed_range))
    hours = f"{'' if found.needed else 'over '}{deciding_hours(results, found):,.1f} core-hours"
    return f"{needed} seeds ({' to '.join(dict.fromkeys(ends))}), {hours}"


def deciding_hours(results, found) -> float:
    """Core-hours of the seeds that would decide a comparison, at the median of each setting's runs and of those that
    it starts from; 0 where it is decided or no number of seeds is known. Over 1,000 seeds count as 1,000."""
    if found.verdict != "not known" or found.between:
        return 0.0
    starts = {s.id: s.start for s in results.experiment.settings}
    names = {each for name in found.contrast.settings for each in (name, starts.get(name)) if each in results.groups}
    seed = sum(np.median([core_hours(run, run.wall_seconds) for run in results.groups[name]]) for name in names)
    return (found.needed or MOST_SEEDS) * float(seed)


def p_value(p):
    return "p < 0.001" if p < 0.001 else f"p = {two_digits(p)}"


def two_digits(p):
    """A p value with two digits, or as many more as tell it from the level of 0.05."""
    return next(said for n in range(2, 18) if float(said := f"{p:.{n}g}") != LEVEL or p == LEVEL)


def numbers_of(found, interval=None):
    """(mean, interval) of a Comparison as text, with so many digits that no end of the interval looks like 0."""
    interval, shown = interval or found.interval, found.contrast.shown
    numbers = tuple(map(shown, (interval.mean, interval.low, interval.high)))
    size, bound = abs(numbers[0]), 1 if found.contrast.over else 0
    digits = enough_digits(numbers, 0 if size >= 100 else 1 if size >= 10 else 3 if size >= 0.01 else 4, bound)
    mean, low, high = (f"{x:{'' if found.contrast.over else '+'},.{digits}f}" for x in numbers)
    return "–" if math.isnan(numbers[0]) else mean, f"[{low}, {high}]" if found.tested else "–"


def primary_table(results):
    """A column for each primary comparison with all that was tested."""
    columns = []
    for one, found in zip(results.experiment.primary, results.primary):
        mean, interval = numbers_of(found)
        column = {"published": one.published or "–", "difference": f"{title(found.contrast.metric)}, {found.contrast}",
                  "mean": mean, "95% interval": interval, "verdict": f"**{found.verdict}**",
                  "margin": f"{found.margin:g}", "seeds": str(found.n)}
        if found.tested:
            column |= {"corrected p": two_digits(found.corrected), "sign flips": f"{found.p_flip:.3g}",
                       "90% interval": numbers_of(found, found.interval90)[1], "same": two_digits(found.corrected_same),
                       "SD": f"{found.sd:.4f}", "smallest effect": f"{found.smallest:.4f}"}
            if found.verdict == "not known":
                column["to decide it"] = to_decide(results, found)
            if text := results.text_uncertainty(found.contrast):
                low, high, share = text
                column |= {"95% over seeds and text": f"[{low:+.3f}, {high:+.3f}]",
                           "text's share of the variance": f"{share:.0%}"}
        columns.append(column)
    names = ("published", "difference", "mean", "95% interval", "verdict", "corrected p", "sign flips", "90% interval",
             "margin", "same", "SD", "seeds", "smallest effect", "to decide it", "95% over seeds and text",
             "text's share of the variance")
    rows = [[name, *(column.get(name, "–") for column in columns)] for name in names]
    rows = [row for row in rows if not set(row[1:]) <= {"–", "**not tested**"}]
    return table(["", *(one.question for one in results.experiment.primary)], rows) if columns else ""


def domain_table(results):
    """The difference of each primary comparison of the loss in each domain; "" without one."""
    rows = [[str(found.contrast), escaped(domain), *numbers_of(each)] for found in results.primary
            for domain, each in results.by_domain(found.contrast).items()]
    kept = 4 if any(row[3] != "–" for row in rows) else 3
    return table(["difference", "domain", "mean", "95% interval"][:kept], [row[:kept] for row in rows])


def exploratory_table(results):
    rows = [[title(one.contrast.metric), str(one.contrast), *numbers_of(one),
             two_digits(one.corrected_same if one.verdict == "same" else one.corrected) if one.tested else "–",
             one.verdict] for one in results.exploratory]
    kept = 6 if any(one.tested for one in results.exploratory) else 3  # no interval and no test of one seed
    names = ["quantity", "difference", "mean", "95% interval", "corrected p", "verdict"]
    return table(names[:kept], [row[:kept] for row in rows])


def sweep_table(results):
    """The loss at each learning rate, the lowest in bold; says where the chosen rate is at an end of the range."""
    rates, rows = results.experiment.rates, []
    for name, losses in results.sweep.items():
        best = lowest(losses)
        taken = results.learning_rate(name) if name in results.groups else best
        shown = [f"{losses[rate]:.3f}" if math.isfinite(losses.get(rate, math.nan)) else
                 "not finite" if rate in losses else "–" for rate in rates]
        rows.append([name, *(f"**{text}**" if rate == best else text for rate, text in zip(rates, shown)),
                     f"{taken:g}{at_an_end(results, taken)}",
                     ", ".join(s.id for s in results.experiment.settings if s.rate_of == name)])
    return table(["setting", *(f"{rate:g}" for rate in rates), "chosen rate", "also used for"], rows)


def crossing_table(results):
    rows = [[title(metric), f"`{first}`, `{second}`",
             ", ".join("–" if math.isnan(step) else f"{step:.0f}"
                       for step in results.crossing(metric, first, second).values())]
            for metric, first, second in results.experiment.crossings]
    return table(["curve", "of", "step, seed by seed"], rows) if rows and results.ready else ""


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


def measured(effect, numbers):
    """`load CV, a / b: 2.905 [2.411, 3.399]; > 3`; for what is judged in every run the range of the runs."""
    shown = tuple(map(effect.shown, (np.mean(numbers), *effect.ends(numbers))))
    digits = enough_digits(shown, 3, effect.bound)
    mean, low, high = (f"{x:{'+' if effect.minus else ''}.{digits}f}" for x in shown)
    ends = f" (runs: {low} to {high})" if effect.every_run else f" [{low}, {high}]" if np.isfinite(shown).all() else ""
    return f"{title(effect.metric)}, {effect}: {mean}{ends}; needs {effect.relation} {effect.bound:g}"


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
    seconds_of = [*((run, run.wall_seconds) for run in done),
                  *((run, row["seconds"]) for run in failed for row in run.log[-1:]
                    if isinstance(row.get("seconds"), float))]
    return sum(core_hours(run, seconds) for run, seconds in seconds_of)


def core_hours(run, seconds):
    return run.config.get("threads", 1) * seconds / 3600
