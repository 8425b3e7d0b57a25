"""FINDINGS.md and summary.csv of a study, from its result rows alone.

No outcome is written here: numbers are computed, and words of judgement follow from criteria the document states.
"""

import csv
import io
import math
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path

import numpy as np

from ..files import write_whole
from .results import (
    TOKEN_BYTES, Interval, coefficient_sweep, complete_runs, excess, gap, load_runs, measure, over_seeds,
    t_interval)

LOSS = "causal_cross_entropy"
NAMES = {
    # losses
    LOSS: "causal loss (nats)", "causal_perplexity": "causal perplexity",
    "val_cross_entropy": "loss routed as in training (nats)", "leak": "causal less leaky loss (nats)",
    "cross_entropy": "training loss (nats)", "train_cross_entropy": "training loss at the end (nats)",
    "token_perplexity": f"perplexity over {TOKEN_BYTES} bytes", "excess": "loss above the entropy of the text (nats)",
    # load
    "load_cv": "load CV", "worst_cv": "largest load CV while training",
    "max_violation": "MaxVio, validation set", "max_violation_batch": "MaxVio, mean over batches",
    "dead_experts": "dead experts a layer", "worst_dead": "most dead experts a layer while training",
    "drop_rate": "share of assignments dropped", "padding": "padding", "token_coverage": "coverage",
    "lost_all": "share of bytes without any expert", "router_entropy": "router entropy (nats)",
    # what experts know
    "mi_excess": "domain information (nats)", "byte_excess": "byte information (nats)",
    "byte_over_domain": "byte less domain information (nats)",
    "domain_given_byte": "domain information beyond the byte (nats)",
    "class_information_excess": "byte class information (nats)",
    "position_information_excess": "position information (nats)", "repetition": "repetition",
    "weight_divergence": "weight divergence", "function_divergence": "function divergence",
    "drop_cost": "loss without an expert (+ nats)", "swap_cost": "if swapped (+ nats)",
    "force_cost": "if forced (+ nats)", "noise_share": "noise in a batch's router gradient (share)",
    # what others change
    "mates_rerouted": "share of bytes rerouted by other mates",
    "mates_logits": "largest change of a logit by other mates",
    "later_rerouted": "share of bytes rerouted by later bytes",
    "later_logits": "largest change of a logit by later bytes",
    # what it takes
    "parameters": "parameters (millions)", "megaflops": "MFLOP a byte", "seconds": "seconds of training",
    **{f"{number}_{n}": f"{what}, {n} devices" for n in (4, 16) for number, what in (
        ("reach", "devices a byte reaches"), ("sent", "bytes sent a byte"), ("link", "bytes a byte, busiest link"),
        ("slowest", "slowest device / mean load"), ("path", "microseconds a batch and layer"))}}
CSV_NUMBERS = """val_cross_entropy val_perplexity val_bits_per_byte causal_cross_entropy causal_perplexity
    causal_bits_per_byte load_cv max_violation max_violation_batch load_entropy dead_experts router_entropy
    marginal_entropy drop_rate token_coverage weight_divergence repetition mutual_information
    mutual_information_null byte_information byte_information_null""".split()
HOW_TO_READ = """**How to read.** Loss is validation cross-entropy in nats per byte, perplexity its exponential; \
both are causal (each byte routed on its prefix alone) unless called leaky. ± and brackets are 95% t-intervals \
over seeds (no ±: one seed, or all alike); differences are paired by seed. A difference is *clear* when its \
interval excludes 0 after Holm's correction over the {n} comparisons made here, *suggestive* when it excludes 0 \
before it only, otherwise *undecided*, which does not mean equal. A layer is *collapsed* when its load is as \
uneven as if fewer than half of its experts shared it (exp of its entropy), else *starved* with a dead expert \
(under 1% of its fair share), else *in use*."""
METHODS = """Load CV: std / mean of the experts' assignments over the validation set. MaxVio: max / mean - 1, \
over the set and as a mean over batches. Repetition: share of assignments whose expert also serves the next byte \
(chance: about K/E). Weight divergence: mean pairwise 1 - cosine of the experts' weights, over its value at \
initialisation. Coverage: share of bytes with an expert. Information: plug-in mutual information with the expert \
minus its mean under shuffled labels (domains over windows, bytes over positions). Numbers about experts: means over \
MoE layers, routed by the rule of training (expert choice over the whole batch, so its load and coverage are not those \
of its causal loss) but without router noise. A seed sets weights, data order (the same for every config of one seed) \
and noise; intervals cover the seed, not the choice of text."""
QUESTIONS = {  # title: (numbers compared, figures, caution)
    "Which balance coefficient, and what does it do?": (
        (LOSS, "load_cv", "mi_excess"), ("imbalance", "expert_load"),
        "Information cannot exceed the entropy of the load, and an uneven load may carry much of it: more information "
        "is not better routing."),
    "Do the routers lead to different specialisation?": (
        ("mi_excess", "byte_excess", "repetition", "weight_divergence"),
        ("domain_by_expert", "router_entropy", "weight_divergence"),
        "A byte often gives its domain away, so domain information does not show that experts follow topics. The "
        "configs have equal K but other balance losses too: a difference belongs to the config, not to its router "
        "alone."),
    "What does guaranteed balance cost?": (
        (LOSS,), ("final_perplexity", "coverage_and_drops"),
        "Compared at equal K; differences between routers without that guarantee stand beside it, for scale. The leaky "
        "loss is routed over the whole batch, later bytes included, as in training; the causal one must change the "
        "rule as well, so the gap between them is the leak and that change together. The causal rule balances nothing: "
        "neither loss is the price of balance alone."),
}


@dataclass(frozen=True)
class Comparison:
    """A difference first - second, paired by seed, that a section of the report asks for."""

    section: str
    metric: str
    first: str
    second: str
    interval: Interval
    survives: bool = False  # Holm's correction over all comparisons of the study

    @property
    def word(self):
        """The verdict, by the criteria of HOW_TO_READ; "not tested" without two common seeds."""
        if not math.isfinite(self.interval.half):
            return "not tested"
        if self.interval.low <= 0 <= self.interval.high:
            return "undecided"
        return "clear" if self.survives else "suggestive"

    def __str__(self):
        """`A` - `B` +0.367 [+0.223, +0.510], clear; with as many digits as keep an end from looking like 0."""
        numbers = self.interval.mean, self.interval.low, self.interval.high
        size = abs(self.interval.mean)
        digits = enough_digits(numbers, 0 if size >= 100 else 1 if size >= 10 else 3 if size >= 0.01 else 4)
        mean, low, high = (f"{x:+,.{digits}f}" for x in numbers)
        ends = "" if self.word == "not tested" else f" [{low}, {high}]"
        return f"`{self.first}` - `{self.second}` " + (f"{mean}{ends}, {self.word}" if self.interval.n else
                                                       "has no common seed")


def enough_digits(numbers, digits, bound=0.0):
    """So many digits after the point, or more, that no number looks like the bound which differs from it in 6 digits."""
    while any(round(x, digits) == round(bound, digits) and round(x, 6) != round(bound, 6) for x in numbers):
        digits += 1
    return digits


def holm(comparisons, level=0.05):
    """The same comparisons, each told whether it survives Holm's (1979) step-down correction for their number."""
    tested = sorted((one for one in comparisons if one.word != "not tested"), key=lambda one: one.interval.p)
    surviving = set()
    for rank, one in enumerate(tested):
        if one.interval.p > level / (len(tested) - rank):
            break
        surviving.add(id(one))
    return [replace(one, survives=id(one) in surviving) for one in comparisons]


class Study:
    """The runs of a study and every comparison made of them. ValueError where no run is finished.

    What is compared follows from the configs, before any result is looked at.
    """

    def __init__(self, study_dir):
        self.folder = Path(study_dir)
        self.runs, self.groups = load_runs(study_dir), complete_runs(study_dir)
        models, by_k = {name: runs[0].model for name, runs in self.groups.items() if runs[0].is_moe}, {}
        for name, model in models.items():
            by_k.setdefault(model["top_k"], {}).setdefault(model["router"], name)
        self.moe, self.sweep = list(models), coefficient_sweep(self.groups)
        self.balanced = [name for name, model in models.items() if model["router"] == "expert_choice"]
        rivals = [(one, other) for one, other in product(self.balanced, self.moe)
                  if other not in self.balanced and models[one]["top_k"] == models[other]["top_k"]]
        routers = max(by_k.values(), key=len, default={}).values()  # different routers at equal K
        for_scale = list(combinations((name for name in routers if name not in self.balanced), 2)) if rivals else []
        pairs = dict(zip(QUESTIONS, (
            list(combinations(self.sweep, 2)), list(combinations(routers, 2)), rivals + for_scale)))
        self.tests = holm([*(self.compare(title, metric, *pair) for title, (metrics, *_) in QUESTIONS.items()
                             for metric, pair in product(metrics, pairs[title])), *self.claims()])

    def compare(self, section, metric, first, second, factor=1):
        interval = gap(self.groups, metric, first, second, factor)
        return Comparison(section, metric, first, f"{factor} · " * (factor > 1) + second, interval)

    def claims(self):
        """Published claims, each that a difference is above 0."""
        for name in self.balanced:
            claim = ("Loss is lower routed over the batch, as trained, than on the prefix alone (leak and change of "
                     "rule)")
            yield Comparison(claim, LOSS, f"causal {name}", f"leaky {name}", over_seeds(self.groups[name], "leak"))
        if self.sweep and self.groups[self.sweep[0]][0].model["aux_coef"] == 0:
            yield self.compare("Without a balance loss the load CV is over 3 times that of light balancing", "load_cv",
                               *self.sweep[:2], factor=3)
        gaps = {}
        for run in self.finished(self.moe):
            gaps.setdefault(run.seed, []).append(measure(run.final, "byte_over_domain"))
        if gaps:
            yield Comparison("In every config experts tell more of the byte than of the domain (least of any config, "
                             "by seed)", "byte_excess", "byte", "domain", t_interval(list(map(min, gaps.values()))))

    def image(self, name):
        """The figure of this name, as Markdown, where it has been drawn."""
        place = f"figures/{name}.png"
        return f"![{name.replace('_', ' ')}]({place})" if (self.folder / place).exists() else ""

    def finished(self, names):
        return [run for name in names for run in self.groups[name]]


def text(runs, metric, leaky=True):
    """`mean ± half width` over seeds, a dash for none; leaky: that number beside a causal one where they differ."""
    one = over_seeds(runs, metric)
    if not math.isfinite(one.mean):
        return "–"
    digits = 2 if metric.endswith("perplexity") else 4 if metric == "token_coverage" else 3
    digits = enough_digits([one.half], 0 if abs(one.mean) >= 100 else digits)
    scatter = f" ± {one.half:,.{digits}f}" if round(one.half, 6) > 0 else ""  # nan, of one seed, is not above 0
    number = f"{round(one.mean, digits) + 0.0:,.{digits}f}" + scatter
    if leaky and metric.startswith("causal_") and runs[0].leaky:
        number += f" (leaky {text(runs, metric.replace('causal', 'val'))})"
    return number


def label(metric):
    """What a metric is called in tables and at axes."""
    return NAMES.get(metric, metric.replace("_", " "))


def run_ids(runs):
    """Run ids, with the seeds of a config in braces: `A-seed{0,1,2}`."""
    seeds = {run.config_id: [] for run in runs}
    for run in runs:
        seeds[run.config_id].append(str(run.seed))
    return ", ".join(f"`{name}-seed{n[0] if len(n) == 1 else '{' + ','.join(n) + '}'}`" for name, n in seeds.items())


def table(header, rows):
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def told_apart(tests):
    """The differences whose interval excludes 0."""
    found = "; ".join(str(one) for one in tests if one.word in ("clear", "suggestive"))
    return found or ("not tested" if all(one.word == "not tested" for one in tests) else "no planned pair told apart")


def layer_states(runs):
    """{state: how many layers, over the runs of a config, ended in it}, by the criteria of HOW_TO_READ."""
    counts = {"collapsed": 0, "starved": 0, "in use": 0}
    for layer in (layer for run in runs for layer in run.final["layers"]):
        collapsed = len(layer["load"]) ** layer["load_entropy"] < len(layer["load"]) / 2
        counts["collapsed" if collapsed else "starved" if layer["dead_experts"] else "in use"] += 1
    return {state: n for state, n in counts.items() if n}


def first_in_use(groups, names):
    """The first of these configs of which every layer of every run ended in use; None if there is none."""
    return next((name for name in names if set(layer_states(groups[name])) == {"in use"}), None)


def question(study, title):
    """(the answer in short, the paragraphs of the section) of one of QUESTIONS."""
    metrics, figures, caution = QUESTIONS[title]
    tests = [one for one in study.tests if one.section == title]
    names = list(dict.fromkeys(name for one in tests for name in (one.first, one.second)))
    images = "\n".join(map(study.image, figures)).strip()
    if not tests:
        return ("Not answered: these configs hold nothing to compare for it.",
                ["Nothing to compare.", *[images] * bool(images)])

    def listed(metric):
        return ", ".join(f"{name} {text(study.groups[name], metric)}" for name in names)

    of = {metric: [one for one in tests if one.metric == metric] for metric in metrics}
    rows = [[NAMES[metric], *(text(study.groups[name], metric) for name in names), "<br>".join(map(str, of[metric]))]
            for metric in metrics]
    first, *rest = (f"{NAMES[metric]}: {told_apart(of[metric])}" for metric in metrics)
    source = run_ids(study.finished(names))
    if title == list(QUESTIONS)[0]:
        alive = first_in_use(study.groups, names)
        least = f"{study.groups[alive][0].model['aux_coef']:g} ({alive})" if alive else "none of these"
        rest.append(f"smallest coefficient with every layer of every run in use: {least}")
    elif LOSS in metrics:
        caution += "".join(f" Here {one}." for one in study.tests if one.first.startswith("causal"))
        rest.append("coverage " + listed("token_coverage"))
    if LOSS in metrics:
        rest += ["perplexity " + listed("causal_perplexity"), "load CV " + listed("load_cv")]
    return (f"**{first}** ({listed(metrics[0])}). {'; '.join(rest)}. From {source}.",
            [table(["", *names, "difference [95%], verdict"], rows), caution, images, f"Runs: {source}."])


def configs(study):
    """The table of all configs: means over seeds with their intervals, as Markdown."""
    rows, excesses = [], [excess(run) for run in study.finished(study.groups)]
    above = [NAMES["excess"]] * math.isfinite(max(excesses))  # only where the entropy of the text is known
    for runs in study.groups.values():
        cells = [text(runs, one) for one in (
            LOSS, "causal_perplexity", "causal_bits_per_byte", "load_cv", "max_violation", "max_violation_batch",
            "dead_experts", "mi_excess", "token_coverage", "drop_rate", *["excess"] * len(above))]
        states = ", ".join(f"{n} {state}" for state, n in layer_states(runs).items()) or "–"
        rows.append([runs[0].label, *cells[:4], " / ".join(cells[4:6]), cells[6], states, *cells[7:]])
    return table(["config", "loss (nats)", "perplexity", "bits per byte", "load CV", "MaxVio, set / per batch",
                  "dead a layer", "layers of all runs", NAMES["mi_excess"], "coverage", "dropped", *above], rows)


def claims(study):
    """The table of published claims and what became of them here, as Markdown."""
    rows = [[one.section, one.word if one.word in ("undecided", "not tested") else
             f"{'held' if one.interval.mean > 0 else 'did not hold'} ({one.word})", str(one)]
            for one in study.tests if one.section not in QUESTIONS]
    for name in study.balanced:
        held = sum(measure(run.final, "load_cv") < 0.01 and measure(run.final, "token_coverage") < 1
                   for run in study.groups[name])
        rows.append([f"{name} has load CV 0 (below 0.01) and leaves bytes uncovered", f"held in {held} of "
                     f"{len(study.groups[name])} runs", f"coverage {text(study.groups[name], 'token_coverage')}"])
    if not rows:
        return "None."
    return table(["claim", "outcome", "number"], rows) + f"\n\nRuns: {run_ids(study.finished(study.moe))}."


def limits(study):
    """What the runs were too short or too small to show, what they do not share, and those left out."""
    def slope(log):  # nats in 100 steps: a straight line through the last third
        points = [(row["step"], row[LOSS]) for row in log if row["step"] >= log[-1]["step"] * 2 / 3]
        return 100 * float(np.polyfit(*zip(*points), 1)[0]) if len(points) > 1 else math.nan

    runs, tested = study.finished(study.groups), sum(one.word != "not tested" for one in study.tests)
    config, steps = runs[0].config, runs[0].summary["steps"]
    seen = steps * config["training"]["batch_size"] * config["model"]["seq_len"]
    corpus = sum(part["train_bytes"] for part in config["corpus"].values())
    slopes = [t_interval([slope(run.log) for run in group]) for group in study.groups.values()]
    falling = [one.mean for one in slopes if (one.high if one.n > 1 else one.mean) < 0]
    lines = [
        f"{steps:,} steps saw {seen:,} bytes, {seen / corpus:.2f} times the {corpus:,} bytes of training text "
        f"(domains: {', '.join(config['domains'])}).",
        f"Over the last third of the steps the loss was still falling in {len(falling)} of {len(slopes)} configs "
        f"(steepest: {min(falling, default=0):.3f} nats in 100 steps): a longer run may shrink, widen or "
        "reverse any difference.",
        f"{len(study.tests)} comparisons, {tested} of them tested: if nothing differed, about {0.05 * tested:.1f} "
        "intervals would exclude 0 by chance, so a *suggestive* difference may be luck.",
        f"Seeds a config: {', '.join(map(str, sorted({len(group) for group in study.groups.values()})))}. "
        "A t-interval assumes normal scatter, which few seeds cannot check, and may cross a bound (coverage 1, "
        "dead experts 0).",
        f"Learning rate {config['training']['learning_rate']:g}, one corpus, one size: configs may prefer other "
        "rates, above all those with another K, which have other active parameters too."]
    if config["corpus"].get("tables", {}).get("matches") is not None:  # None for a user's own text
        lines.append("In the default corpus the domain `tables` is partly memorisable: font files are near duplicates, "
                     "and about half of its validation lines also stand in the training text.")
    lines += [f"**The runs do not share the same {key} (see their config.json): compare with care.**"
              for key in ("training", "corpus", "versions", "threads")
              if any(run.config[key] != config[key] for run in runs)]
    for run in (run for run in study.runs if run.state != "complete"):
        why = ", ".join(f"{key} {value}" for key, value in (run.failure or {}).items() if key != "run_id")
        lines.append(f"**`{run.run_id}` {f'failed ({why})' if why else 'is incomplete'} and is in no number above.**")
    return "\n".join(f"- {line}" for line in lines)


def settings(run):
    """What the configs share, as a sentence: the sizes of model and training."""
    model, training = run.model, run.config["training"]
    names = ("n_layers", "moe_layers", "n_experts", "d_model", "d_ff", "seq_len")
    return (f"Settings: steps {training['steps']}, batch_size {training['batch_size']}, "
            + ", ".join(f"{name} {model[name]}" for name in names if name in model) + ".")


def write_findings(study_dir):
    """Write STUDY/FINDINGS.md from the study's result rows; returns its path. ValueError without a finished run."""
    study, path = Study(study_dir), Path(study_dir, "FINDINGS.md")
    runs, found = study.finished(study.groups), {title: question(study, title) for title in QUESTIONS}
    alone = ", ".join(name for name, group in study.groups.items() if len(group) == 1)
    versions = ", ".join(f"{name} {number}" for name, number in runs[0].config["versions"].items())
    parts = [f"# Findings of the study `{path.resolve().parent.name}`",
             f"Computed from the rows in `runs/` alone; finished: {run_ids(runs)}. {settings(runs[0])}",
             HOW_TO_READ.format(n=len(study.tests)),
             *[f"**One seed, so no interval and no test: {alone}. Such numbers describe single runs.**"] * bool(alone),
             "## In short", "\n".join(f"- *{title}* {answer}" for title, (answer, _) in found.items()),
             "## All configs", configs(study),
             study.image("perplexity_over_steps") or "No figures yet: `study --plot-only` draws them."]
    for number, (title, (_, section)) in enumerate(found.items(), 1):
        parts += [f"## {number}. {title}", *section]
    parts += ["## Published claims that these configs can test", claims(study),
              "## What this was too short or too small to show", limits(study), "## Methods",
              f"{METHODS} Tables: {runs[0].final['validation_tokens']:,} validation bytes. Curves over steps, and the "
              f"slope above: {runs[0].log[-1]['validation_tokens']:,}, so the two differ at the last step; {versions}."]
    write_whole(path, "\n\n".join(parts) + "\n")
    return path


def write_summary_csv(study_dir):
    """Write STUDY/summary.csv, a line a run whatever its state, layer numbers as means; returns its path."""
    out, path, settings = io.StringIO(), Path(study_dir, "summary.csv"), ("router", "top_k", "aux_coef")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run_id", "config_id", "seed", "state", *settings, "steps", "seconds", "parameters_total",
                     "parameters_active", *CSV_NUMBERS])
    for run in load_runs(study_dir):
        summary, sizes = run.summary or {"final": {"layers": []}}, run.config.get("parameters", {})
        numbers = (measure(summary["final"], name) for name in CSV_NUMBERS)
        writer.writerow([run.run_id, run.config_id, run.seed, run.state, *map(run.model.get, settings),
                         summary.get("steps"), summary.get("seconds"), sizes.get("total"), sizes.get("active"),
                         *("" if math.isnan(number) else f"{number:.6g}" for number in numbers)])
    write_whole(path, out.getvalue())
    return path
