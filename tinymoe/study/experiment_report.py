"""FINDINGS.md and the figures of one experiment, from its rows, and the document that gathers the study and all."""

from pathlib import Path

import matplotlib
import numpy as np

from ..files import write_whole
from .figures import STYLE, save
from .report import LOSS, METHODS, QUESTIONS, Study, enough_digits, label, question, run_ids, settings, table, text
from .results import load_runs, over_seeds, value
from .experiment import SCALES, Results

HOW_TO_READ = """**How to read.** Loss is causal validation cross-entropy in nats a byte unless said otherwise (each \
byte routed on its prefix alone); *leaky*: routed by the rule of training, which may see later bytes, or drop some. ± \
and brackets are 95% t-intervals over seeds (no ±: one seed, or all alike), differences paired by seed. A difference \
is *clear* when its interval excludes 0 after Holm's correction over the differences planned in its experiment, \
*suggestive* when it excludes 0 before it only, otherwise *undecided*, which does not mean equal. A layer is \
*collapsed* when its load is as uneven as if fewer than half of its experts shared it (exp of its entropy), else \
*starved* with a dead expert (under 1% of its fair share), else *in use*. Padding: the share of the places kept for \
tokens that stay empty. Curves over steps are of fewer validation windows than the tables; their bands are the range \
of the seeds. An interval may cross a bound that its number cannot."""
VERDICTS = """A claim *held* where all that it needs is so over the whole 95% interval, paired by seed, *did not \
hold* where one thing is not so anywhere in its interval, and is *undecided* otherwise. Numbers that cannot pass their \
bound (dead experts, coverage), and changes that are rounding or not, are judged in every run instead. No correction \
is made for the number of claims and of what they need."""
CLAIM_COLUMNS = [
    "claim", "what it says (published by)", "measured here, and what the claim needs", "verdict", "experiment"]
DISPUTE_COLUMNS = ["open question", "published answers", "difference in loss here (nats) [95%], verdict", "experiment"]


def draw(experiment, folder):
    """Draw the figures of an experiment into folder/figures; returns the paths, none while a setting has no run."""
    results, paths = Results(experiment, folder), []
    if not results.whole:
        return paths
    with matplotlib.rc_context(STYLE):
        for name, figure in experiment.figures.items():
            paths.append(Path(folder, "figures", f"{name}.png"))
            save(figure(results), paths[-1])
    return paths


def settings_table(results):
    """Every setting with its numbers, as Markdown."""
    metrics, settings = results.experiment.metrics, {s.id: s.what for s in results.experiment.settings}
    leaky = not {"val_cross_entropy", "leak"} & set(metrics)  # which have a column of their own
    rows = [[name, settings[name], *(text(runs, metric, leaky) for metric in metrics)]
            for name, runs in results.groups.items()]
    return table(["setting", "what", *map(label, metrics)], rows)


def about(results):
    """What the runs share: their number, length and size, as a sentence."""
    run, seeds = results.runs[0], sorted({run.seed for run in results.runs})
    model, steps = run.model, sorted({run.summary["steps"] for run in results.runs})
    return (f"{len(results.groups)} settings, seeds {', '.join(map(str, seeds))}; "
            f"{' or '.join(f'{n:,}' for n in steps)} steps of {run.config['training']['batch_size']} windows of "
            f"{model['seq_len']} bytes; d_model {model['d_model']}, d_ff {model['d_ff']}, {model['n_layers']} layers; "
            f"text: {', '.join(run.config['domains'])}.")


def missing(results):
    """Warnings: runs too short, settings or seeds that are not finished, runs that failed; empty where all is well."""
    seeds = {s.id: {run.seed for run in results.groups.get(s.id, [])} for s in results.experiment.settings}
    ids = [name for name, own in seeds.items() if own < set.union(*seeds.values())]
    failed = [run.run_id for run in load_runs(results.folder) if run.state == "failed"]
    said = [f"**Not finished, and so not in all numbers: {', '.join(ids)}.**"] * bool(ids)
    steps = max(run.summary["steps"] for run in results.runs)
    few = steps < SCALES["default"].steps
    said += [f"**{steps} steps show that the experiment runs: draw no conclusion.**"] * few
    said += [f"**Loss not finite, so that numbers are of the other runs: {', '.join(failed)}.**"] * bool(failed)
    return " ".join(said)


def finding(results):
    """The sentences of the experiment, as a Markdown list."""
    if not results.whole:
        return "No finding: a setting has no finished run, or no seed is common to all."
    return "\n".join(f"- {sentence}" for sentence in results.experiment.say(results))


def claim_rows(results):
    """Rows for the table of claims: number, claim, numbers beside what is needed, verdict, experiment."""
    rows = []
    for claim in results.experiment.claims:
        verdict, found = results.outcome(claim) if results.whole else ("not tested", [])
        numbers = "<br>".join(measured(effect, numbers) for effect, numbers in found)
        rows.append([str(claim.number), f"{claim.text} ({claim.published})", numbers, f"**{verdict}**",
                     results.experiment.name])
    return rows


def measured(effect, numbers):
    """`load CV, a / b: 2.905 [2.411, 3.399], needs > 3`; for what is judged in every run the range of the runs."""
    shown = np.mean(numbers), *effect.ends(numbers)
    digits = enough_digits(shown, 3, effect.bound)
    mean, low, high = (f"{x:{'+' if effect.minus else ''}.{digits}f}" for x in shown)
    ends = f" (runs: {low} to {high})" if effect.every_run else f" [{low}, {high}]" if np.isfinite(shown).all() else ""
    return f"{effect}: {mean}{ends}, needs {effect.relation} {effect.bound:g}"


def dispute_rows(results):
    """Rows for the table of open questions: question, published answers, differences of the loss, experiment."""
    return [[one.question, one.published, results.differences(LOSS, one.pairs).replace("; ", "<br>"),
             results.experiment.name] for one in results.experiment.disputes]


def write_findings(experiment, folder):
    """Write folder/FINDINGS.md of one experiment; returns its path. ValueError without a finished run."""
    results, path = Results(experiment, folder), Path(folder, "FINDINGS.md")
    images = [f"![{name.replace('_', ' ')}](figures/{name}.png)" for name in experiment.figures
              if Path(folder, "figures", f"{name}.png").exists()]
    claims = claim_rows(results)
    parts = [f"# {experiment.name}: {experiment.question}", about(results), missing(results), finding(results),
             f"What it cannot show: {experiment.caution}" * bool(experiment.caution), settings_table(results), *images,
             *(["## Claims", VERDICTS, table(CLAIM_COLUMNS, claims)] if claims else []),
             "## Planned differences", "\n".join(f"- {label(one.metric)}: {one}" for one in results.tests),
             HOW_TO_READ, METHODS, f"Runs: {run_ids(results.runs)}."]
    write_whole(path, "\n\n".join(filter(None, parts)) + "\n")
    return path


# -- the whole ----------------------------------------------------------------------------------

ORIGIN = """Generated from the rows of the study (`full/`) and of the experiments (`experiments/`), each of which has \
a document of its own with its tables, figures and planned differences."""
OPEN = """Published results disagree on these: an interval is what a few seeds of a small model say, no more. A \
negative difference is in favour of the first."""
CANNOT = """All but `rate` train at one learning rate, which need not be the best of any setting: compare their \
differences with those that another rate makes there. Speed-ups of training by factors, the stability that the z-loss \
gives at low precision, and the crossover of upcycling cannot be seen at this scale. A t-interval of few seeds assumes \
normal scatter, which few seeds cannot check. Within an experiment Holm's correction holds over its planned \
differences; over all experiments together nothing corrects, and ten claims are ten looks. The same runs (top-1 or \
top-2 with coefficient 0.01) are the reference of several experiments: these are not independent evidence."""


def scale(found):
    """How small the experiments are, as a sentence."""
    def ends(numbers):
        return " to ".join(f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in sorted({min(numbers), max(numbers)}))

    runs = [run for results in found for run in results.runs]
    scatter = [over_seeds(group, "causal_perplexity") for results in found for group in results.groups.values()]
    shares = sorted(100 * one.half / one.mean for one in scatter if one.n > 1)
    said = (f"Without pairing by seed, the perplexity of one setting is known to {shares[0]:.1f} to {shares[-1]:.1f}% "
            f"(95%, median {np.median(shares):.1f}%). ") if shares else ""
    return (f"The experiments train models of {ends([value(run, 'parameters') for run in runs])} million parameters "
            f"for {ends([run.summary['steps'] for run in runs])} steps, with "
            f"{ends([len(group) for results in found for group in results.groups.values()])} seeds a setting and peak "
            f"rates of {ends([run.config['training']['learning_rate'] for run in runs])}. {said}") if runs else ""


def gather(published, experiments):
    """Write published/FINDINGS.md from published/full and published/experiments/NAME; returns its path.

    Raises ValueError where the study has no finished run, or a run is damaged; experiments without a finished run are
    named as missing.
    """
    study, found, absent = Study(Path(published, "full")), [], []
    for experiment in experiments.values():
        folder = Path(published, "experiments", experiment.name)
        if any(folder.glob("runs/*/summary.json")):
            found.append(Results(experiment, folder))
        else:
            absent.append(experiment.name)
    claims = sorted(linked(claim_rows, found), key=lambda row: int(row[0]))
    parts = ["# Findings", ORIGIN, HOW_TO_READ,
             f"**Without finished runs, and so not here: {', '.join(absent)}.**" if absent else "",
             "## The three questions of the study", legend(study),
             "\n".join(f"- *{title}* {question(study, title)[0]} {QUESTIONS[title][-1]}" for title in QUESTIONS),
             "## Ten claims of the literature", VERDICTS, table(CLAIM_COLUMNS, claims),
             "## Open questions", OPEN, table(DISPUTE_COLUMNS, linked(dispute_rows, found)),
             "## The laboratory, experiment by experiment", *map(section, found),
             "## What this scale cannot show", scale(found) + CANNOT, "## Methods", METHODS]
    path = Path(published, "FINDINGS.md")
    write_whole(path, "\n\n".join(filter(None, parts)) + "\n")
    return path


def linked(rows_of, found):
    """The rows of all experiments, whose last cell, a name, becomes a link to the document that has the run ids."""
    return [[*row, f"[{name}](experiments/{name}/FINDINGS.md)"] for results in found for *row, name in rows_of(results)]


def legend(study):
    """What the letters of the study's configs stand for, and how large it was."""
    runs = [runs[0] for runs in study.groups.values()]
    labels = "; ".join(run.label for run in runs)
    return (f"{labels} (K: experts a byte, aux: balance coefficient). {settings(runs[0])} Holm's correction over "
            f"{len(study.tests)} comparisons.")


def section(results):
    """One experiment in the gathered document."""
    e = results.experiment
    compared = "; ".join(f"`{s.id}` {s.what}" for s in e.settings if s.id in results.groups)
    source = f"Runs: {run_ids(results.runs)}, in [experiments/{e.name}](experiments/{e.name}/FINDINGS.md)."
    return "\n\n".join(filter(None, [f"### {e.question} (`{e.name}`)", f"Compared: {compared}.", missing(results),
                                     finding(results), f"{e.caution} {source}"]))
