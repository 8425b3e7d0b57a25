"""The document that gathers the study and all experiments; from result rows alone, as that of each experiment."""

import math
import re
from pathlib import Path

from .caveats import is_falling, slopes, warnings
from .experiment import Experiment
from .markdown import WORDS, bold, chapter, enumerated, joined, table, write_paragraphs
from .quantities import LOSS, quantity
from .report import about, images, verdicts
from .results import NothingFinished, Results
from .statistics import LEVEL, MARGIN, VERDICTS, Contrast, holm
from .tables import (
    CLAIM_COLUMNS,
    COMPUTE,
    answers,
    at_an_end,
    claim_rows,
    compute_row,
    deciding_hours,
    how_sure,
    numbers_of,
    p_value,
    rates_of,
    settings_table,
    to_decide,
    total_hours,
)
from .wording import GLOSSARY, METHODS, TO_DECIDE

ORIGIN = """This document is made from the rows of the study (`full/`) and of the experiments (`experiments/`). Each \
has a document of its own with all its tables, figures and run ids."""
CANNOT = """Most settings take the learning rate that another setting chose, which may not be their best; the tables \
of learning rates say which. Two things cannot be seen at this scale: training that is several times faster, and the \
stability that the z-loss gives at low precision."""
YARDSTICKS = {  # experiment: a change of the routing, and the difference of losses that says what it is worth
    "dense": ("A mixture in place of a dense model of equal active size, for as many steps,",
              Contrast(LOSS, "mixture", minus="dense-active")),
    "capacity": ("Dropping half of all choices of top-1, in training and validation alike,",
                 Contrast("val_cross_entropy", "0.5-order", minus="none"))}
OPENING = """Small language models of bytes, with mixtures of experts in every second layer, were trained to answer \
questions about routing and to test claims of the literature. Their loss is in nats a byte; lower is better."""
SURE = """*Different*: the difference is shown not to be 0. *Same*: it is shown to be smaller than the margin. *Not \
known*: neither is shown. Brackets are 95% intervals over seeds, in the table of claims 90% intervals. Verdicts allow \
for the other questions of their experiment, intervals do not. Several experiments train the same runs again, such as \
top-1 or top-2 with coefficient 0.01, so they are not independent evidence."""
BY_CONSTRUCTION = """Claims 1 and 7 are true by construction, so a run can only check the code: they are not here. A \
claim is judged by its own experiment alone, even where a question of that experiment was asked again."""
FOREST = """*All primary differences, the first setting minus the second, in units of their margins; beyond 2 the axis \
is logarithmic. Orange: different; blue: the same; grey: not known. The intervals are not corrected.*"""


def published_results(published, study: Experiment, experiments) -> tuple[list[Results], list[Experiment]]:
    """(Results of the study and of the experiments that have a finished run, the Experiments without).

    Raises ValueError where there is no finished run at all, or a run is damaged.
    """
    found, absent = [], []
    for experiment in (study, *experiments):
        folder = Path(published, place_of(experiment))
        try:
            found.append(Results(experiment, folder))
        except NothingFinished:
            absent.append(experiment)
    if not found:
        raise ValueError(f"{published}: no finished run in full/ and experiments/: train some first")
    return found, absent


def gather(published, found: list[Results], absent: list[Experiment]) -> Path:
    """Write published/FINDINGS.md, and return its path; found, absent: as `published_results` gives."""
    return write_paragraphs(Path(published, "FINDINGS.md"), document(found, absent, published))


def document(found, absent, published, section=None) -> list[str]:
    """The document that gathers all experiments, as paragraphs of Markdown; arguments as `published_results` gives.

    section: (Results, found) -> the section of an experiment.
    """
    study, others = ([r for r in found if r.experiment.adjustable is its] for its in (True, False))
    claims = sorted(([number, text, numbers, verdict, link(results)] for results in others
                     for number, text, numbers, verdict, _ in claim_rows(results) if number.isdigit()),
                    key=lambda row: int(row[0]))
    waiting = sorted({claim.number for each in absent for claim in each.claims if claim.number})
    forest = Path(published, "figures", "primary.png").exists()
    answers_of_others = [f"![all primary comparisons](figures/primary.png)\n\n{FOREST}" if forest else "",
                         *questions(found, others), cost(found)]
    first, then = (["## The questions", *answers_of_others], []) if not study else (
        ["## The three questions of the study", *questions(found, study)],
        ["## The other questions", *answers_of_others])
    return [
        "# Findings", f"{OPENING} {scale(found)}", yardstick(found), counted(found),
        f"{SURE} {over_all(found)}".strip(), *first,
        *chapter("Claims of the literature",
                 BY_CONSTRUCTION + (f" Not tested yet: {enumerated(waiting)}." if waiting else ""),
                 table(CLAIM_COLUMNS, claims)),
        "## The surprise", surprise(found), *then,
        ORIGIN, f"Without finished runs, so not here: {', '.join(each.name for each in absent)}." if absent else "",
        *((section or summary)(results, found) for results in found),
        "## What this scale cannot show", CANNOT,
        WORDS, GLOSSARY, verdicts(found), "## Methods", METHODS,
        "## Compute", table(COMPUTE, map(compute_row, found))]


def place_of(experiment):
    """The folder of an experiment in what is published."""
    return "full" if experiment.adjustable else f"experiments/{experiment.name}"


def over_all(found):
    """What a correction over the primary comparisons of all experiments would change; empty if none is decided."""
    tested = [(results, one) for results in found for one in results.primary if one.tested]
    said = []
    for verdict, p_of in (("different", lambda one: one.interval.p), ("same", lambda one: one.p_same)):
        strict = holm([p_of(one) for _, one in tested])
        those = [(results, one, p) for (results, one), p in zip(tested, strict) if one.verdict == verdict]
        lost = [f"{one.contrast} of `{results.experiment.name}` ({p_value(p)})" for results, one, p in those
                if p >= LEVEL]
        if those:
            said.append(f"{len(those) - len(lost)} of the {len(those)} that are *{verdict}* would stay so"
                        f"{f', not {joined(lost)}' if lost else ''}")
    return f"With Holm's correction over all {len(tested)} primary comparisons, {'; '.join(said)}." if said else ""


def link(results):
    return f"[{results.experiment.name}]({place_of(results.experiment)}/FINDINGS.md)"


def scale(found):
    """How large the models are, how long they were trained, and whether they had learned all they could."""
    sizes = [run.config["parameters"]["total"] / 1e6 for results in found for run in results.runs]
    steps = [run.summary["steps"] for results in found for run in results.runs]
    falling = [is_falling(one) for results in found for one in slopes(results)]
    rates = [[at_an_end(results, results.learning_rate(name)) for name in one.contrast.settings]
             for results, _, one in asked(found) if one.tested]
    return (f"The models have {min(sizes):.1g} to {max(sizes):.1g} million parameters and {min(steps):,} to "
            f"{max(steps):,} training steps. In {sum(falling)} of {len(falling)} settings the loss was still falling "
            f"at the end, and in {sum(map(any, rates))} of {len(rates)} questions a setting has the largest or the "
            "smallest learning rate that a sweep tried. So longer training and other rates may change any answer.")


def yardstick(found):
    """What a margin is, and what routing is worth, in a few sentences."""
    experiments = {results.experiment.name: results for results in found}
    worth = [(what, experiments[name].compared(contrast)) for name, (what, contrast) in YARDSTICKS.items()
             if name in experiments]
    said = [f"{what} changes the loss by {' '.join(numbers_of(one))} nats"
            f"{', perhaps not at all' if one.interval.low <= 0 <= one.interval.high else ''}."
            for what, one in worth if one.tested]
    return " ".join([f"**The yardstick.** Differences of loss below {MARGIN:g} nats "
                     f"({math.expm1(MARGIN):.0%} of perplexity) count as none.", *said])


def counted(found):
    """How many questions have each verdict, in a sentence."""
    verdicts = [each.verdict for _, _, each in asked(found)]
    said = ", ".join(f"{verdicts.count(word)} {word}" for word in VERDICTS if word in verdicts)
    twice = sum(len(later(results, found)) for results in found)
    again = (f" {twice} of them were asked again on other seeds, because the first answer was not known. The later one "
             "counts; the figure, and what is said of all primary comparisons, have both.") if twice else ""
    return f"**Questions, planned before the runs: {len(verdicts)}; {said}.**{again}" if said else ""


def asked(found):
    """(Results, Primary, Comparison) of each question; of one that was asked again on other seeds, the last."""
    rows = [(results, one, each) for results in found for one, each in zip(results.experiment.primary, results.primary)]
    last = {}
    for results, one, each in rows:
        if each.tested:
            last[one.question] = max(results.experiment.first_seed, last.get(one.question, 0))
    return [(results, one, each) for results, one, each in rows
            if results.experiment.first_seed == last.get(one.question, results.experiment.first_seed)]


def later(results, found):
    """Sentences that say where the questions of an experiment were asked again."""
    own = {one.question for one in results.experiment.primary}
    return [f"Asked again on other seeds: {one.question} The answer is in {link(other)}."
            for other, one, _ in asked(found)
            if one.question in own and other.experiment.first_seed > results.experiment.first_seed]


def questions(found, shown) -> list[str]:
    """The questions of the experiments that are shown, those that are decided first: question, answer, number, how
    sure. Those that are not known have a table of their own, which says what would decide them."""
    rows = [(each, results, [one.question, f"**{one.sentence(each)}**{rates_of(results, each, ' The {} differ.')}",
                             f"{named(each, results)}: {' '.join(numbers_of(each))} {unit(each)}".strip(),
                             f"{each.verdict}{how_sure(each)}", link(results)])
            for results, one, each in asked(found) if results in shown]
    rows.sort(key=lambda row: VERDICTS.index(row[0].verdict))
    decided = [row for each, _, row in rows if each.verdict != "not known"]
    others = [[row[0], f"{row[2]}{rates_of(results, each, '; {}')}", how_sure(each).strip(" ()"),
               to_decide(results, each), row[4]]
              for each, results, row in rows if each.verdict == "not known"]
    names = (["question", "answer", "difference", "how sure", "experiment"],
             ["question, not known", "difference", "with 80% power", "to decide it", "experiment"])
    return [table(head, those) for head, those in zip(names, (decided, others))]


def named(one, results):
    """The contrast of a Comparison, with what its settings are."""
    what = {s.id: s.what for s in results.experiment.settings}
    return re.sub(r"`(.+?)`", lambda found: f"{found[0]} ({what[found[1]]})", str(one.contrast))


def cost(found):
    """What would decide all that is not known, why it was not run, and its core-hours; empty if all is decided."""
    needed = sum(deciding_hours(results, each) for results, _, each in asked(found))
    spent = sum(map(total_hours, found))
    bound = any(not each.needed or each.between for _, _, each in asked(found) if each.verdict == "not known")
    return (f"{TO_DECIDE} To decide all of it would take {'at least' if bound else 'about'} {needed:,.0f} core-hours; "
            f"all runs here took {spent:,.1f}." if needed else "")


def unit(found):
    """What the difference of a Comparison is in: the unit, and in brackets the quantity if it is no loss."""
    one = quantity(found.contrast.metric)
    return one.unit if one.is_loss else f"{one.unit} ({one.words})".strip()


def surprise(found):
    """The largest exploratory difference of the causal loss that survives its correction, in a sentence."""
    fair = [(one, results) for results in found for one in results.exploratory if is_fair(one, results)]
    different = [(one, results) for one, results in fair if one.verdict == "different"]
    if not different:
        return "No exploratory difference of the loss survives its correction."
    one, results = max(different, key=lambda pair: abs(pair[0].mean))
    what = {s.id: s.what for s in results.experiment.settings}
    first, second = one.contrast.settings
    better = "better" if one.mean < 0 else "worse"
    sizes = dict.fromkeys(f"{results.groups[name][0].config['parameters']['total'] / 1e6:.2g}"
                          for name in one.contrast.settings)  # each text once
    rates = dict.fromkeys(f"{rate:.2g}{at_an_end(results, rate)}"
                          for rate in map(results.learning_rate, one.contrast.settings))
    return (f"**Of {len(fair)} differences that no question asked for, the largest that is shown: {first} "
            f"({what[first]}) is {abs(one.mean):.3f} nats {better} than {second} ({what[second]}).** The interval is "
            f"{numbers_of(one)[1]}{how_sure(one)}; {link(results)}. As the largest of many, it is probably smaller in "
            f"truth. The two have {joined(sizes)} million parameters in all, and learning rates of {joined(rates)}. "
            f"The {len(fair)} are of the causal loss on the default text, between models of equal active size that "
            "were trained for as many steps and that no claim compares. The p value allows for all exploratory "
            "comparisons of the experiment, the interval does not.")


def is_fair(one, results):
    """Whether a comparison can be the surprise: of the causal loss, on the default text, of two models of equal active
    size, trained from scratch for equally many steps, that no claim compares."""
    e, pair = results.experiment, one.contrast.settings
    if one.contrast.metric != LOSS or not one.contrast.minus or e.text or not one.tested:
        return False
    settings = [s for s in e.settings if s.id in pair]
    sizes = [results.mean("active_parameters", name) for name in pair]
    asked = [set(effect.settings) for claim in e.claims for effect in claim.effects if effect.metric == LOSS]
    return (not any(s.start for s in settings) and len({s.length for s in settings}) == 1 and set(pair) not in asked
            and not max(sizes) > 1.05 * min(sizes))


def summary(results, found):
    """One experiment in the gathered document: its answers, one figure, one table."""
    e, place = results.experiment, place_of(results.experiment)
    return "\n\n".join(filter(None, [
        f"## {e.question} (`{e.name}`)", *answers(results), *later(results, found), about(results),
        bold(warnings(results)),
        *images(results, f"{place}/")[:1], settings_table(results),
        f"Tables, figures, limits and run ids: {link(results)}."]))
