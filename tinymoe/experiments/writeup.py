"""FINDINGS.md and the figures of one experiment, from its rows, and the document that gathers the study and all of them."""

import math
from pathlib import Path

import matplotlib

from ..files import write_whole
from ..plots import STYLE, save
from ..report import NAMES, QUESTIONS, Study, question, run_ids, table, text
from .base import Results

HOW_TO_READ = """Loss is causal validation cross-entropy in nats a byte unless said otherwise (each byte routed on its \
prefix alone). ± and brackets are 95% t-intervals over seeds, differences paired by seed. A difference is *clear* \
when its interval excludes 0 after Holm's correction over the {n} planned here, *suggestive* when it excludes 0 \
before it only, otherwise *undecided*, which does not mean equal."""


def draw(experiment, folder):
    """Draw the figures of an experiment's finished runs into folder/figures; returns the paths."""
    results, paths = Results(experiment, folder), []
    with matplotlib.rc_context(STYLE):
        for name, figure in experiment.figures.items():
            paths.append(Path(folder, "figures", f"{name}.png"))
            save(figure(results), paths[-1])
    return paths


def settings_table(results):
    """Every setting with its numbers, as Markdown."""
    metrics = results.experiment.metrics
    what = {setting.id: setting.what for setting in results.experiment.settings}
    return table(["setting", "what", *(NAMES.get(m, m.replace("_", " ")) for m in metrics)],
                 [[name, what[name], *(text(runs, metric) for metric in metrics)] for name, runs in results.groups.items()])


def about(results):
    """What the runs share: their number, length and size, as a sentence."""
    run, seeds = results.runs[0], sorted({run.seed for run in results.runs})
    model, steps = run.model, sorted({run.summary["steps"] for run in results.runs})
    return (f"{len(results.groups)} settings, seeds {', '.join(map(str, seeds))}; {' and '.join(f'{n:,}' for n in steps)} steps of "
            f"{run.config['training']['batch_size']} windows of {model['seq_len']} bytes; d_model {model['d_model']}, "
            f"d_ff {model['d_ff']}, {model['n_layers']} layers; text: {', '.join(run.config['domains'])}.")


def missing(experiment, results):
    """A warning about settings or seeds that are not finished; empty where all are there."""
    ids = [s.id for s in experiment.settings if s.id not in results.groups or
           len(results.groups[s.id]) < max(map(len, results.groups.values()))]
    return f"**Not finished, and so not in all numbers: {', '.join(ids)}.**" if ids else ""


def paragraph(experiment, results):
    """What the experiment says: only where every setting has a run."""
    if any(s.id not in results.groups for s in experiment.settings):
        return "No finding: a setting has no finished run."
    return experiment.say(results)


def claim_rows(results):
    """Rows for the table of claims: number, claim, published, effects with intervals, verdict, runs."""
    rows = []
    for claim in results.experiment.claims:
        try:
            verdict, found = results.outcome(claim)
        except KeyError:  # a setting without a finished run
            verdict, found = "not tested", []
        numbers = "<br>".join(f"{what} = {signed(one.mean)}" + (f" [{signed(one.low)}, {signed(one.high)}]" if math.isfinite(one.half)
                                                               else "") for what, one in found)
        rows.append([str(claim.number), f"{claim.text} ({claim.published})", numbers, verdict, results.experiment.name])
    return sorted(rows, key=lambda row: int(row[0]))


def signed(x):
    return f"{x:+.2e}" if 0 < abs(x) < 1e-3 else f"{x:+.3f}"


CLAIMS_HEADER = ["claim", "what it says (published by)", "effects, each above 0 where it is right [95%]", "here", "experiment"]


def write_findings(experiment, folder):
    """Write folder/FINDINGS.md of one experiment; returns its path. ValueError without a finished run."""
    results, path = Results(experiment, folder), Path(folder, "FINDINGS.md")
    images = [f"![{name.replace('_', ' ')}](figures/{name}.png)" for name in experiment.figures
              if Path(folder, "figures", f"{name}.png").exists()]
    claims = claim_rows(results)
    parts = [f"# {experiment.name}: {experiment.question}", about(results), missing(experiment, results),
             paragraph(experiment, results), settings_table(results), *images,
             *(["## Claims", table(CLAIMS_HEADER, claims)] if claims else []),
             "## Planned differences", "\n".join(f"- {NAMES.get(one.metric, one.metric)}: {one}" for one in results.tests),
             HOW_TO_READ.format(n=len(results.tests)), f"What it cannot show: {experiment.caution}",
             f"Runs: {run_ids(results.runs)}."]
    write_whole(path, "\n\n".join(filter(None, parts)) + "\n")
    return path


OPEN = """Published signs disagree on these, so they are questions here and not claims: the interval is what three seeds of a small \
model say, no more."""
CANNOT = """A few hundred steps of a model of about a million parameters on three megabytes of bytes, three seeds, one learning rate (but for \
`rate`): differences of 1 to 3% in perplexity are within the scatter of seeds. Speed-ups of training by factors, the stability that the z-loss \
gives at low precision, and the crossover of upcycling are not to be seen at this scale. A t-interval of three seeds assumes normal scatter. \
Within an experiment Holm's correction holds over its planned differences; over all experiments together nothing corrects, and the ten claims \
are ten looks."""


def gather(published, experiments):
    """Write published/FINDINGS.md from published/full and published/experiments/NAME; returns its path.

    Raises ValueError where the study has no finished run; experiments without one are named as missing.
    """
    study, found, absent = Study(Path(published, "full")), {}, []
    for experiment in experiments.values():
        try:
            found[experiment.name] = Results(experiment, Path(published, "experiments", experiment.name))
        except ValueError:
            absent.append(experiment.name)
    claims = [row for results in found.values() for row in claim_rows(results)]
    parts = ["# Findings", "Generated from the rows of the study (`full/`) and of the experiments (`experiments/`), each of which has a "
             "document of its own with its tables, figures and planned differences.",
             *[f"**Without finished runs, and so not here: {', '.join(absent)}.**"] * bool(absent),
             "## The three questions of the study", "\n".join(f"- *{title}* {question(study, title)[0]}" for title in QUESTIONS),
             "## Ten claims of the literature",
             "A claim *held* where every effect that it needs is above 0 with its whole 95% interval over paired seeds, *did not hold* where one is "
             "below with its whole interval, and is *undecided* otherwise.",
             table(CLAIMS_HEADER, sorted(claims, key=lambda row: int(row[0]))),
             "## Open questions, experiment by experiment", OPEN,
             *(section(results) for results in found.values()), "## What this scale cannot show", CANNOT]
    path = Path(published, "FINDINGS.md")
    write_whole(path, "\n\n".join(parts) + "\n")
    return path


def section(results):
    """One experiment in the gathered document."""
    e = results.experiment
    return (f"### {e.question} (`{e.name}`)\n\n{paragraph(e, results)} {e.caution}\n\n"
            f"Runs: {run_ids(results.runs)}, in [experiments/{e.name}](experiments/{e.name}/FINDINGS.md).")
