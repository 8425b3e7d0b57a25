"""The document that gathers the study and all experiments; from result rows alone, as that of each experiment."""

import math
from pathlib import Path

from .experiment import Experiment
from .quantities import LOSS, quantity
from .report import (
    CLAIM_COLUMNS,
    COMPUTE,
    about,
    answers,
    bold,
    cells,
    chapter,
    claim_rows,
    compute_row,
    how_sure,
    images,
    p_value,
    settings_table,
    table,
    warnings,
    write_paragraphs,
)
from .results import Results
from .rows import COMPACT
from .statistics import MARGIN
from .wording import GLOSSARY, METHODS, VERDICTS

ORIGIN = """This document is made from the rows of the study (`full/`) and of the experiments (`experiments/`). Each \
has a document of its own with all its tables, figures and run ids."""
CANNOT = """Experiments without a table of learning rates train all settings at one rate, which may not be the best \
for a setting. Two things cannot be seen at this scale: training that is several times faster, and the stability that \
the z-loss gives at low precision. Corrections are made within each experiment. There is none over all experiments, \
so one of many verdicts may be wrong by chance. The same runs (top-1 or top-2 with coefficient 0.01) are the reference \
of several experiments, so these are not independent evidence."""
YARDSTICK = "dense"  # the experiment whose first primary comparison says what a mixture gains
HEADING = "# Findings"
OPENING = """Small language models of bytes, with mixtures of experts in every second layer, were trained to answer \
three questions and to test claims of the literature. Their loss is in nats a byte; lower is better."""
SURE = """*Different*: the difference is not 0. *Same*: the difference is shown to be smaller than the margin. The p \
values of both are corrected for the primary comparisons of the experiment. *Not known*: these runs do not decide."""
BY_CONSTRUCTION = "Claims 1 and 7 are true by construction, so a run can only check the code: they are not here."
FOREST = """*All primary differences, the first setting minus the second, in units of their margins; beyond 2 the axis \
is logarithmic.*"""


def published_results(published, study: Experiment, experiments) -> tuple[list[Results], list[str]]:
    """(Results of the study and of the experiments that have a finished run, names of those without).

    Raises ValueError where there is no finished run at all, or a run is damaged.
    """
    found, absent = [], []
    for experiment in (study, *experiments):
        folder = Path(published, place_of(experiment))
        if Path(folder, COMPACT).exists() or any(folder.glob("runs/*/summary.json")):
            found.append(Results(experiment, folder))
        else:
            absent.append(experiment.name)
    if not found:
        raise ValueError(f"{published}: no finished run in full/ and experiments/: train some first")
    return found, absent


def require_ours(published):
    """Raise ValueError if there is a FINDINGS.md that `gather` did not write."""
    path = Path(published, "FINDINGS.md")
    if path.exists() and not path.read_text(encoding="utf-8").startswith(f"{HEADING}\n"):
        raise ValueError(f"{path} was not made by this program: move it away, or give another folder")


def gather(published, found: list[Results], absent: list[str]) -> Path:
    """Write published/FINDINGS.md, and return its path; found, absent: as `published_results` gives."""
    return write_paragraphs(Path(published, "FINDINGS.md"), document(found, absent, published))


def document(found, absent, published, section=None) -> list[str]:
    """The document that gathers all experiments, as paragraphs of Markdown; arguments as `published_results` gives.

    section: Results -> the section of an experiment.
    """
    study, others = ([r for r in found if r.experiment.adjustable is its] for its in (True, False))
    claims = sorted(([number, text, verdict, link(results)] for results in others
                     for number, text, _, verdict, _ in claim_rows(results)), key=lambda row: int(row[0]))
    forest = Path(published, "figures", "primary.png").exists()
    return [
        HEADING, OPENING, yardstick(found), "## The three questions", question_table(study), SURE,
        *(chapter("Claims of the literature", table([*CLAIM_COLUMNS[:2], *CLAIM_COLUMNS[3:]], claims), BY_CONSTRUCTION)
          if claims else []),
        "## The surprise", surprise(found), "## All primary comparisons",
        f"![all primary comparisons](figures/primary.png)\n\n{FOREST}" if forest else "", question_table(others),
        ORIGIN, bold([f"Without finished runs, so not here: {', '.join(absent)}."] if absent else []),
        "## Words used here", GLOSSARY, VERDICTS, *map(section or summary, found),
        "## What this scale cannot show", CANNOT,
        "## Compute", table(COMPUTE, map(compute_row, found)), "## Methods", METHODS]


def place_of(experiment):
    """The folder of an experiment in what is published."""
    return "full" if experiment.adjustable else f"experiments/{experiment.name}"


def link(results):
    return f"[{results.experiment.name}]({place_of(results.experiment)}/FINDINGS.md)"


def yardstick(found):
    """What a margin is, and what a mixture gains, in a sentence."""
    gains = [results.primary[0] for results in found if results.experiment.name == YARDSTICK and results.primary]
    gain = f" A mixture gains {-gains[0].mean:.3f} nats over a dense model of equal active size." if gains else ""
    return (f"**The yardstick.** Losses count as the same within {MARGIN:g} nats, which is {math.expm1(MARGIN):.0%} of "
            f"perplexity.{gain}")


def question_table(found):
    """The primary comparisons of several experiments: question, answer, number, how sure."""
    if not found:
        return "No runs are finished yet."
    rows = [[one.question, f"**{one.sentence(each)}**", f"{each.contrast}: {cells(each)[0]} {unit(each)}".strip(),
             f"{cells(each)[2]}{how_sure(each)}", link(results)]
            for results in found for one, each in zip(results.experiment.primary, results.primary)]
    return table(["question", "answer", "difference", "how sure", "experiment"], rows)


def unit(found):
    """What the difference of a Comparison is in: a unit, or the name of a quantity without one."""
    one = quantity(found.contrast.metric)
    return one.unit or f"in {one.label}"


def surprise(found):
    """The largest exploratory difference of the causal loss that survives its correction, in a sentence; between
    settings that were trained from scratch for as many steps."""
    def fair(one, settings):
        pair = [settings[name] for name in one.contrast.settings]
        return not any(s.start for s in pair) and len({s.length for s in pair}) == 1

    settings_of = [(results, {s.id: s for s in results.experiment.settings}) for results in found]
    differences = [(one, settings, results) for results, settings in settings_of for one in results.exploratory
                   if one.contrast.metric == LOSS and one.contrast.minus and one.verdict == "different"
                   and fair(one, settings)]
    if not differences:
        return "No exploratory difference of the loss survives its correction."
    one, settings, results = max(differences, key=lambda found: abs(found[0].mean))
    first, second = (settings[name] for name in one.contrast.settings)
    better = "better" if one.mean < 0 else "worse"
    said = f"{first.id} ({first.what}) is {abs(one.mean):.3f} nats {better} than {second.id} ({second.what})."
    return (f"**{said}** No question asked for it. It is the largest exploratory difference of the causal loss that "
            "survives the correction of its experiment, between settings trained from scratch for as many steps "
            f"({p_value(one.corrected)}; {one.n} seeds; {link(results)}).")


def summary(results):
    """One experiment in the gathered document: its answers, one figure, one table."""
    e, place = results.experiment, place_of(results.experiment)
    return "\n\n".join(filter(None, [
        f"## {e.question} (`{e.name}`)", *answers(results), about(results), bold(warnings(results)),
        *images(results, f"{place}/")[:1], settings_table(results),
        f"Tables, figures, limits and run ids: {link(results)}."]))
