"""FINDINGS.md of an experiment, the document that gathers all of them, and summary.csv; from result rows alone.

No outcome is written here: numbers are computed, and words of judgement follow from criteria that the document states.
"""

import csv
import io
import json
import math
import re
from pathlib import Path

import numpy as np

from ..files import printable, write_atomically
from ..training.run_folder import processors
from .experiment import SCALES, Experiment
from .quantities import LOSS, QUANTITIES, title, value
from .results import COMPACT, Results, RunRecord, load_runs
from .statistics import enough_digits, t_interval

GLOSSARY = """- A *router* chooses K of E *experts* for each byte: its route. The *gate* is the weight with which a \
chosen expert's output is added.
- *Loss* is the mean cross-entropy of the validation text in nats per byte; lower is better. *Perplexity* is \
exp(loss).
- *Causal*: each byte is routed by the bytes before it alone. Only a causal loss may be quoted for a language model. \
*Leaky*: routed as in training, where the route of a byte may depend on later bytes, or a byte may be dropped.
- The *load* of an expert is the number of bytes that it serves. *Load CV* is the standard deviation of the load over \
its mean, *MaxVio* its maximum over its mean, minus 1; both are 0 where all loads are equal. A *dead* expert has less \
than 1% of the mean load. *Coverage* is the share of bytes that have at least one expert. With a capacity limit each \
expert has a fixed number of places for bytes; *padding* is the share of places that stay empty.
- A layer is *collapsed* if the effective number of its experts, exp(entropy of the load), is below half of them. It \
is *starved* if it is not collapsed but has a dead expert. Otherwise it is *in use*.
- *Domain information* says how well the expert of a byte predicts the domain of the text, in nats; 0 is chance. *Byte \
information* says the same of the byte. *Repetition*: the share of choices whose expert also serves the next byte; \
chance is about K / E.
- ± and brackets are 95% intervals over seeds (Student's t). There is no ± for one seed, or where all seeds agree. \
Differences are paired by seed.
- A difference is *clear* when its interval excludes 0 even after Holm's correction for the number of planned \
differences, and *suggestive* when it excludes 0 only before the correction. Otherwise it is *undecided*, which does \
not mean that the two are equal."""
METHODS = """Information is the mutual information of expert and label, estimated from counts, minus its mean under \
shuffled labels. Domains are shuffled over windows, bytes over positions. Weight divergence is the mean of 1 - cosine \
over pairs of experts' weights, divided by its value at initialisation. Numbers about experts are means over MoE \
layers, measured with the routing of training, without router noise. For expert choice this routes a whole batch, so \
its load and coverage do not belong to its causal loss. A seed sets the weights, the noise and the order of the data, \
which is the same for all settings. Intervals cover the seed, not the choice of text. They assume that seeds scatter \
normally, which so few seeds cannot check. They may pass a bound that a number cannot, such as a coverage of 1. Curves \
over steps use fewer validation windows than the tables; their bands show the range of the seeds."""
VERDICTS = """A claim *held* where every condition holds across its 95% interval, paired by seed. It *did not hold* \
where one condition fails across its interval. Otherwise it is *undecided*. Two kinds of numbers are judged in every \
run instead: those that cannot pass their bound (dead experts, coverage), and changes that are either rounding or not. \
There is no correction for the number of claims."""
ORIGIN = """This document is made from the rows of the study (`full/`) and of the experiments (`experiments/`). Each \
has a document of its own with its tables, figures and planned differences."""
OPEN = """Published results disagree on these questions. A negative difference is in favour of the first setting."""
CANNOT = """All experiments but `rate` train at one learning rate, which may not be the best for a setting. Compare \
their differences with those that another rate makes in `rate`. Two things cannot be seen at this scale: training that \
is several times faster, and the stability that the z-loss gives at low precision. Holm's correction is made within \
each experiment. There is none over all experiments, so one of the ten verdicts may be wrong by chance. The same runs \
(top-1 or top-2 with coefficient 0.01) are the reference of several experiments, so these are not independent \
evidence."""
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
    write_atomically(path, "\n\n".join(filter(None, paragraphs)) + "\n")
    return path


def run_ids(results):
    """The ids of all runs, with the seeds of a setting in braces: `A-seed{0,1,2}`."""
    seeds = {name: [str(run.seed) for run in runs] for name, runs in results.groups.items()}
    return ", ".join(f"`{name}-seed{n[0] if len(n) == 1 else '{' + ','.join(n) + '}'}`" for name, n in seeds.items())


def about(results):
    """What the runs share: their number, length and size, in a sentence."""
    run, seeds = results.runs[0], sorted({run.seed for run in results.runs})
    steps = sorted({run.summary["steps"] for run in results.runs})
    sizes = ", ".join(f"{name} {run.model[name]}" for name in ("n_layers", "moe_layers", "n_experts", "d_model", "d_ff")
                      if name in run.model)
    settings = "1 setting" if len(results.groups) == 1 else f"{len(results.groups)} settings"
    return (f"{settings} with {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}. "
            f"{' or '.join(f'{n:,}' for n in steps)} steps of {run.config['training']['batch_size']} windows of "
            f"{run.model['seq_len']} bytes. Unless a setting says otherwise: {escaped(sizes)}. "
            f"Text: {escaped(', '.join(run.config['domains']))}. Words such as *causal*, *load* and *suggestive* are "
            "explained [below](#words-used-here).")


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
    return [*said, *differing_settings(results), *left_out(results)]


def differing_settings(results):
    """Sentences about what differs between settings though it should not, and what is not as the experiment says."""
    settings = {s.id: s for s in results.experiment.settings}
    configs = {name: runs[0].config for name, runs in results.groups.items()}
    for part in ("model", "training"):
        intended = set().union(*(s.changed[part] for s in settings.values()))
        for field in sorted({field for config in configs.values() for field in config[part]} - intended):
            found = {name: json.dumps(config[part].get(field)) for name, config in configs.items()}
            if len(set(found.values())) > 1:
                those = ", ".join(f"{name} {shown}" for name, shown in found.items())
                yield escaped(f"{field} differs between settings ({those}): compare with care.")
        for name, config in configs.items():
            for field, wanted in getattr(settings[name], part).items():
                found = config[part].get(field)
                if found != (list(wanted) if isinstance(wanted, tuple) else wanted):
                    yield escaped(f"{name} was changed: its {field} is {found}, not {wanted}.")
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
    for run in results.all_runs:
        why = ", ".join(f"{key} {part}" for key, part in (run.failure or {}).items() if key != "run_id")
        what = {"failed": f"failed ({escaped(why)})", "incomplete": "is incomplete",
                "complete": "is no setting of this experiment"}
        if run not in results.runs:
            yield f"`{escaped(run.run_id)}` {what[run.state]} and is in no number."


def finding(results: Results) -> list[str]:
    """The sentences of the experiment."""
    if not results.ready:
        return ["No finding: a setting has no finished run, or no seed is common to all."]
    if results.experiment.say:
        return results.experiment.say(results)
    return list(map(results.range_and_verdicts, dict.fromkeys(one.metric for one in results.experiment.planned)))


def settings_table(results):
    """Every setting with its numbers, as Markdown, without the columns that hold no number."""
    e = results.experiment
    leaky = not {"val_cross_entropy", "leak"} & set(e.metrics)  # which have a column of their own
    columns = {title(metric): [results.cell(metric, name, leaky=leaky) for name in results.groups]
               for metric in e.metrics}
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"–"}}
    what = {s.id: s.what for s in e.settings}
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
    shown = np.mean(numbers), *effect.ends(numbers)
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
    tested = sum(one.word != "not tested" for one in results.tests)
    rates = sorted({run.config["training"]["learning_rate"] for run in results.runs})
    said = [*(f"{steps:,} steps saw {steps * window:,} bytes, {steps * window / corpus:.2f} times the {corpus:,} bytes "
              "of training text." for steps in lengths),
            f"Over the last third of the steps the loss was still falling in {len(falling)} of {len(slopes)} settings "
            f"(steepest: {min(falling, default=0):.3f} nats in 100 steps). A longer run may change any difference.",
            f"{tested} of {len(results.tests)} planned differences were tested. If nothing differed, about "
            f"{0.05 * tested:.1f} intervals would exclude 0 by chance.",
            f"One text, learning rate {', '.join(map('{:g}'.format, rates))}: settings may prefer others."]
    if config["corpus"].get("tables", {}).get("matches") is not None:  # None for a user's own text
        said.append("About half of the validation lines of the domain `tables` also stand in the training text.")
    return said


def _slope(log):
    """Nats in 100 steps: a straight line through the last third."""
    points = [(row["step"], row[LOSS]) for row in log if row["step"] >= log[-1]["step"] * 2 / 3]
    return 100 * float(np.polyfit(*zip(*points), 1)[0]) if len(points) > 1 else math.nan


def write_findings(experiment: Experiment, folder) -> Path:
    """Write folder/FINDINGS.md of one experiment from its runs, showing the figures that are there; returns its path.

    Raises ValueError without a finished run, and where runs that would be averaged differ.
    """
    results = Results(experiment, folder)
    images = [f"![{name.replace('_', ' ')}](figures/{name}.png)" for name in experiment.figures
              if Path(folder, "figures", f"{name}.png").exists()]
    claims, run = claim_rows(results), results.runs[0]
    versions = ", ".join(f"{name} {number}" for name, number in run.config["versions"].items())
    planned = [[title(one.contrast.metric), str(one.contrast), *one.cells] for one in results.tests]
    return write_paragraphs(Path(folder, "FINDINGS.md"), [
        f"# {experiment.name}: {experiment.question}", about(results), bold(warnings(results)),
        "## Findings", bullets(finding(results)), f"Caution. {experiment.caution}",
        "## Settings", settings_table(results), "\n\n".join(images) or "No figures yet: `--plot-only` draws them.",
        *(["## Claims", VERDICTS, table(CLAIM_COLUMNS, claims)] if claims else []), "## Planned differences",
        table(["quantity", "difference", "mean", "95% interval", "verdict"], planned) if planned
        else "Nothing to compare.", "## What these runs cannot show", bullets(limits(results)),
        "## Words used here", GLOSSARY, "## Methods", METHODS,
        f"Tables: {run.final['validation_tokens']:,} validation bytes; curves over steps: "
        f"{run.log[-1]['validation_tokens']:,}. Runs: {run_ids(results)}. Versions: {escaped(versions)}."])


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
    path, out = Path(study_dir, "summary.csv"), io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, out.getvalue())
    return path


def all_numbers(run: RunRecord) -> dict[str, float]:
    """{name: number} of every quantity that a finished run has, and of the fields of its rows that have no entry."""
    if run.state != "complete":
        return {}
    rows = (run.log[-1], run.measured, *run.final["layers"])
    fields = [name for row in rows for name, number in row.items() if isinstance(number, float)]
    names = dict.fromkeys((*QUANTITIES, *fields))
    return {name: number for name in names if math.isfinite(number := value(run, name))}


def gather(published, study: Experiment, experiments) -> Path:
    """Write published/FINDINGS.md from published/full and published/experiments/NAME; returns its path.

    Raises ValueError where the study has no finished run, or a run is damaged. Experiments without a finished run are
    named as missing.
    """
    main, found, absent = Results(study, Path(published, "full")), [], []
    for experiment in experiments:
        folder = Path(published, "experiments", experiment.name)
        if Path(folder, COMPACT).exists() or any(folder.glob("runs/*/summary.json")):
            found.append(Results(experiment, folder))
        else:
            absent.append(experiment.name)
    disputed = ["open question", "published answers", "difference in loss here (nats)", "experiment"]
    return write_paragraphs(Path(published, "FINDINGS.md"), [
        "# Findings", ORIGIN, bold([f"Without finished runs, so not here: {', '.join(absent)}."] if absent else []),
        "## Words used here", GLOSSARY, "## The study", section(main, "full"), "## Ten claims of the literature",
        VERDICTS, table(CLAIM_COLUMNS, sorted(linked(claim_rows, found), key=lambda row: int(row[0]))),
        "## Open questions", OPEN, table(disputed, linked(dispute_rows, found)),
        "## The laboratory, experiment by experiment",
        *(section(results, f"experiments/{results.experiment.name}") for results in found),
        "## What this scale cannot show", scale(found) + CANNOT, "## Methods", METHODS])


def dispute_rows(results: Results) -> list[list[str]]:
    """Rows of the table of open questions: question, published answers, differences of the loss, experiment."""
    def differences(pairs):
        return "<br>".join(f"{one.contrast}: {' '.join(one.cells)}" for one in results.tests_of(LOSS)
                           if (one.contrast.setting, one.contrast.minus) in pairs)

    return [[one.question, one.published, differences(one.pairs) or "not tested", results.experiment.name]
            for one in results.experiment.disputes]


def linked(rows_of, found):
    """The rows of all experiments; the last cell, a name, becomes a link to the document that has the run ids."""
    return [[*row, f"[{name}](experiments/{name}/FINDINGS.md)"] for results in found for *row, name in rows_of(results)]


def section(results, place):
    """One experiment in the gathered document."""
    e = results.experiment
    compared = "; ".join(f"`{escaped(results.label(s.id))}` {s.what}" for s in e.settings if s.id in results.groups)
    return "\n\n".join(filter(None, [
        f"### {e.question} (`{e.name}`)", f"Compared: {compared}.", bold(warnings(results)), bullets(finding(results)),
        f"{e.caution} Tables, figures and {len(results.tests)} planned differences: [{place}]({place}/FINDINGS.md). "
        f"Runs: {run_ids(results)}."]))


def scale(found):
    """How small the experiments are, in sentences."""
    def ends(numbers):
        return " to ".join(f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in sorted({min(numbers), max(numbers)}))

    runs = [run for results in found for run in results.runs]
    if not runs:
        return ""
    scatter = [results.interval("causal_perplexity", name) for results in found for name in results.groups]
    shares = sorted(100 * one.half / one.mean for one in scatter if one.n > 1)
    said = (f"Without pairing by seed, the perplexity of one setting is known to {shares[0]:.1f} to {shares[-1]:.1f}% "
            f"(95%, median {np.median(shares):.1f}%). ") if shares else ""
    return (f"The experiments train models of {ends([value(run, 'parameters') for run in runs])} million parameters "
            f"for {ends([run.summary['steps'] for run in runs])} steps, with "
            f"{ends([len(runs) for results in found for runs in results.groups.values()])} seeds for a setting. "
            f"Peak learning rates: {ends([run.config['training']['learning_rate'] for run in runs])}. {said}")
