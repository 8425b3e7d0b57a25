"""FINDINGS.md and summary.csv of a study, from its result rows alone.

No outcome is written here: every number is computed, and every word of judgement follows from a criterion of
analysis.py that the document states. The leaky loss of a router that sees later tokens is printed beside the causal
one and ranks nothing.
"""

import csv
import io
import math
from pathlib import Path

import numpy as np

from .analysis import LEAKY, LOSS, closest_domains, read_study, slope, states
from .files import write_whole
from .prose import (NAMES, bits, comparison_table, counted, describe, ends, exponentiated, figures, pairs, perplexity,
                    plus_minus, run_ids, signed, source, table, told_apart, with_leaky)
from .rows import load_runs, measure, over_seeds, t_interval

CSV_NUMBERS = (
    "val_cross_entropy", "val_perplexity", "val_bits_per_byte", "causal_cross_entropy", "causal_perplexity",
    "causal_bits_per_byte", "load_cv", "max_violation", "max_violation_batch", "load_entropy", "effective_experts",
    "dead_experts", "router_entropy", "marginal_entropy", "drop_rate", "token_coverage", "weight_divergence",
    "repetition", "mutual_information", "mutual_information_null", "byte_information", "byte_information_null",
)
DEFINITIONS = """**How to read this.** A difference is *clear* where its 95% interval excludes zero and it survives Holm's \
correction over all comparisons of this document, *suggestive* where only the first is true, *undecided* where the interval \
includes zero, *not tested* with fewer than two common seeds. A layer is *collapsed* where its effective experts (exp of \
the load's entropy) are fewer than half of its experts, otherwise *starved* where an expert is dead (under 1% of its \
fair share), otherwise *in use*. Loss is validation cross-entropy in nats per byte, causal (routing decided on the prefix \
alone) unless called leaky. ± and brackets are 95% Student t intervals over seeds. Perplexity is per byte: exp of the mean \
loss, with the ends of its interval. Numbers about experts are means over the MoE layers."""
METHODS = """- Load CV: std / mean of the experts' assignments over the validation set. MaxVio: max / mean - 1, over the set, and \
as a mean over its batches. Repetition: share of assignments whose expert also serves the next token; chance is about K/E \
under a balanced load, more otherwise. Weight divergence: mean pairwise 1 - cosine of the experts' weights, relative \
to initialisation. Coverage: share of tokens with an expert. All with routing as in training, whichever loss stands beside them.
- I(expert; domain), I(expert; byte): plug-in mutual information, in nats, between the expert of an assignment and the domain \
or the input byte, minus its mean under shuffled labels (domains over windows, bytes over tokens), since the plug-in \
estimate is biased upwards. A byte often tells the domain, so information about the domain does not show that experts \
follow topics. Neither can exceed the entropy of the load.
- Intervals: mean ± t(0.975, n - 1) · s / √n over n seeds. Differences are paired by seed. The seed of a run sets its weights, \
its data order (a generator of its own: configs of one seed see the same batches) and its routing noise. All runs are \
judged on the same validation windows, so an interval covers the choice of seed and not the choice of text.
- Slope: a straight line through the causal validation loss over the last third of the steps."""


# ---- the three questions ----


def introduction(study):
    """What the document is, what it was computed from, and how to read it."""
    alone = [name for name, runs in study.groups.items() if len(runs) == 1]
    lines = [f"# Findings of the study `{study.name}`",
             "Computed by `tinymoe/report.py` from the result rows in `runs/` and nothing else. "
             f"{len(study.finished)} finished runs: {run_ids(study.finished)}."]
    if len(alone) == len(study.groups):
        lines.append("**One seed: there is no interval, no difference is tested, and nothing here says that two configs "
                     "differ. The numbers describe these runs.**")
    elif alone:
        lines.append(f"**One seed only, so no interval and no test: {', '.join(alone)}.**")
    return [*lines, DEFINITIONS]


def answer_balance(study):
    """Question 1: how the layers ended, the lowest loss, and whether it was told apart from the others."""
    if not study.sweep:
        return "**Which balance coefficient?** Not answered: no two configs differ in the balance coefficient alone."
    coefficient = {name: f"{name} (coefficient {study.groups[name][0].model['aux_coef']:g})" for name in study.sweep}
    ended = "; ".join(f"{coefficient[name]}: {ends(study.groups[name])}" for name in study.sweep)
    healthy = [name for name in study.sweep if set(states(study.groups[name])) == {"in use"}]
    smallest = f"The smallest that left every layer of every run in use is {coefficient[healthy[0]]}." if healthy else (
        "None left every layer of every run in use.")
    best = min(study.sweep, key=lambda name: over_seeds(study.groups[name], LOSS).mean)
    runs = study.groups[best]
    tests = [one for one in study.find("balance", LOSS) if best in (one.first, one.second)]
    return (f"**Which balance coefficient?** At the end, {ended}. {smallest} The lowest mean loss is that of "
            f"{coefficient[best]}: {plus_minus(over_seeds(runs, LOSS))} nats, perplexity {perplexity(runs)}, {bits(runs)} "
            f"bits per byte; {pairs(tests)}. **{preference(best, tests)}** Information between expert and domain above "
            f"its null, in nats: {pairs(study.find('balance', 'mi_excess'))}.")


def preference(best, tests):
    """The lowest loss is called the best only if it was told apart from every other coefficient."""
    if not all(one.tested for one in tests):
        return "One seed: by loss no coefficient is preferred."
    rivals = sorted(({one.first, one.second} - {best}).pop() for one in tests if one.word == "undecided")
    if rivals:
        return f"By loss the choice between {' and '.join([best, *rivals])} is undecided."
    return f"By loss {best} is ahead of every other coefficient ({counted(tests)})."


def section_balance(study):
    lines = ["## 1. Which balance coefficient, and what does it do?"]
    if not study.sweep:
        return [*lines, "No two configs differ in the balance coefficient alone."]
    numbers = ("load_cv", "max_violation", "max_violation_batch", "dead_experts", "effective_experts", "mi_excess")
    rows = [[name, f"{runs[0].model['aux_coef']:g}", ends(runs), *(plus_minus(over_seeds(runs, one)) for one in numbers),
             perplexity(runs), bits(runs)] for name, runs in ((name, study.groups[name]) for name in study.sweep)]
    lines += [table(["config", "coefficient", "at the end", "load CV", "MaxVio, set", "MaxVio, batch", "dead a layer",
                     "effective experts", NAMES["mi_excess"], "perplexity", "bits per byte"], rows),
              comparison_table(study.find("balance"))]
    for name in study.sweep:
        counts = states(study.groups[name])
        if max(counts, key=counts.get) != "collapsed":
            continue
        experts = over_seeds(study.groups[name], "effective_experts").mean
        lines.append(f"With {experts:.2f} effective experts, an expert of {name} can tell at most about {math.log(experts):.3f} "
                     "nats of anything: low information under collapse is part of the collapse.")
    return [*lines, figures("imbalance", "expert_load"), source(study, study.sweep)]


def answer_routers(study):
    """Question 2: information about the domain, and how many of the differences in specialisation hold up."""
    if not study.routers:
        return "**Do routers specialise differently?** Not answered: no two routers with equally many experts per token."
    tests = study.find("routers")
    found = (f"{describe(study.groups[name][0])} {plus_minus(over_seeds(study.groups[name], 'mi_excess'))}"
             for name in study.routers)
    return (f"**Do routers specialise differently?** Information between expert and domain above its null, in nats: "
            f"{'; '.join(found)}. Of {len(tests)} comparisons of these routers in {len({one.metric for one in tests})} "
            f"numbers: {counted(tests)}. **Told apart: {told_apart(tests)}.**")


def section_routers(study):
    lines = ["## 2. Do the routers lead to different specialisation?"]
    if not study.moe:
        return [*lines, "No config has experts."]
    numbers = ("mi_excess", "byte_excess", "load_entropy", "repetition", "weight_divergence", "router_entropy")
    rows = [[name, *(plus_minus(over_seeds(runs, one)) for one in numbers), *closest_domains(runs)]
            for name, runs in study.moe.items()]
    lines.append(table(["config", NAMES["mi_excess"], NAMES["byte_excess"], NAMES["load_entropy"], "repetition",
                        "weight divergence", "router entropy (nats)", "domains most alike", "domains least alike"], rows))
    n_domains = len(next(iter(study.moe.values()))[0].config["domains"])
    null = "; ".join(f"{one.first} {'above' if one.interval.mean > 0 else 'below'}, {one.word}" for one in study.find("null"))
    lines.append(f"Information about {n_domains} domains cannot exceed ln {n_domains} = {math.log(n_domains):.3f} nats. Against "
                 f"its null it is: {null}. Domains are alike by the total variation between their loads: 0 for the same "
                 "experts, 1 for none in common, no null taken off.")
    if study.routers:
        lines.append(f"Compared at equal K: {', '.join(study.routers)}. Their balance losses differ too, so a difference "
                     "belongs to the config and not to its router alone.")
        lines.append(comparison_table(study.find("routers")))
    return [*lines, figures("domain_by_expert", "router_entropy", "weight_divergence"), source(study, study.moe)]


def answer_cost(study):
    """Question 3: what expert choice gets and pays, both losses side by side, judged by the causal one."""
    if not study.balanced:
        return "**What does guaranteed balance cost?** Not answered: no config has a router that guarantees balance."
    texts = []
    for name in study.balanced:
        runs = study.groups[name]
        tests = [one for one in study.find("cost", LOSS) if one.first == name]
        equal = [one for one in tests if study.groups[one.second][0].model.get("top_k") == runs[0].model["top_k"]] or tests
        texts.append(f"{describe(runs[0])} has load CV {plus_minus(over_seeds(runs, 'load_cv'))} and gives an expert to "
                     f"{plus_minus(over_seeds(runs, 'token_coverage'))} of the tokens. Its perplexity is "
                     f"{perplexity(runs)}, {bits(runs)} bits per byte. By causal loss, against equal K where there is one: "
                     f"{pairs(equal) or 'nothing to compare with'}. **{cost(equal)}**")
    return "**What does guaranteed balance cost?** " + " ".join(texts)


def cost(tests):
    """A cost or a gain only where every comparison says so."""
    if not all(one.tested for one in tests) or not tests:
        return "Not tested: no two common seeds."
    if all(one.interval.low > 0 for one in tests):
        return f"Guaranteed balance raised the loss here ({counted(tests)})."
    if all(one.interval.high < 0 for one in tests):
        return f"Guaranteed balance lowered the loss here ({counted(tests)})."
    return f"Whether guaranteed balance raises the loss is undecided or depends on the rival ({counted(tests)})."


def section_cost(study):
    lines = ["## 3. What does guaranteed balance cost?"]
    if not study.balanced:
        return [*lines, "No config has a router that guarantees balance."]
    rows = []
    for name, runs in study.groups.items():
        numbers = (over_seeds(runs, one) for one in ("token_coverage", "drop_rate", "load_cv"))
        rows.append([name, f"{runs[0].config['parameters']['active']:,}", exponentiated(runs, LEAKY), exponentiated(runs, LOSS),
                     *map(plus_minus, numbers)])
    lines += [table(["config", "active parameters", "perplexity, routed as in training (leaky if it differs)",
                     "perplexity, causal", "coverage", "dropped", "load CV"], rows), comparison_table(study.find("cost"))]
    for one in study.find("leak"):
        lines.append(f"Leaky minus causal loss of {one.first}: {signed(one.interval)} nats, {one.word}. This gap holds the leak "
                     "and also a change of rule, since a capacity on the prefix is not the capacity over the batch that "
                     "was trained; the two parts are not told apart here. Only the causal number is compared.")
    return [*lines, figures("final_perplexity", "coverage_and_drops"), source(study, study.groups)]


# ---- claims, table, limits, methods ----


def outcome(one, sign=1):
    """Of a claim that a difference has this sign: held, did not hold, undecided or not tested."""
    if one.word in ("not tested", "undecided"):
        return one.word
    return f"{'held' if one.interval.mean * sign > 0 else 'did not hold'} ({one.word})"


def claim_rows(study):
    """Published claims that these configs can test: claim, outcome, number, runs."""
    rows, groups = [], study.groups
    for name in study.balanced:
        worst = [(max(layer["load_cv"] for layer in run.final["layers"]), measure(run.final, "token_coverage"))
                for run in groups[name]]
        held = sum(cv <= 0.01 and coverage < 1 for cv, coverage in worst)
        rows.append([f"{name} has load CV 0 (at most 0.01 in every layer) and leaves tokens uncovered",
                     f"held in {held} of {len(worst)} runs", f"largest CV {max(worst)[0]:.3f}, coverage "
                     f"{plus_minus(over_seeds(groups[name], 'token_coverage'))}", run_ids(groups[name])])
    for one in study.find("cv_ratio"):
        first, second, last = groups[one.first], groups[one.second], groups[study.sweep[-1]]
        low, high = (f"{runs[0].model['aux_coef']:g}" for runs in (second, last))
        rows.append([f"Without a balance loss the load CV is over 3 times that at {low}", outcome(one),
                     f"CV({one.first}) - 3 · CV({one.second}) = {signed(one.interval)}", run_ids(first + second)])
        dead, alive = (sum(measure(run.final, "dead_experts") > 0 for run in runs) for runs in (first, last))
        rows.append([f"Experts die at 0 and none at {high}", "held in these runs" if dead == len(first) and not alive else
                     "did not hold in these runs", f"runs with a dead expert: {dead} of {len(first)} at 0, {alive} of "
                     f"{len(last)} at {high}", run_ids(first + last)])
    for one in study.find("leak"):
        rows.append([f"The loss of {one.first} is lower where routes may see later tokens", outcome(one, sign=-1),
                     f"{signed(one.interval)} nats (leak and change of rule)", run_ids(groups[one.first])])
    for one in study.find("token_over_topic"):
        rows.append([f"Experts of {one.first} follow the byte more than the domain, nulls taken off", outcome(one),
                     f"{signed(one.interval)} nats", run_ids(groups[one.first])])
    return rows


def section_claims(study):
    rows = claim_rows(study)
    trained = ", ".join(sorted({runs[0].model["router"] for runs in study.moe.values()})) or "none"
    return ["## 4. Published claims that these configs can test",
            table(["claim", "outcome", "number", "runs"], rows) if rows else "None.",
            f"Routers trained here: {trained}; claims about others are open. A byte takes more values than a domain and "
            "has more to tell, so the last claim is about how much an expert reveals and not about why."]


def section_configs(study):
    numbers = ("load_cv", "dead_experts", "mi_excess", "token_coverage", "drop_rate")
    rows = [[describe(runs[0]), len(runs), with_leaky(runs, LOSS, LEAKY), perplexity(runs), bits(runs),
             *(plus_minus(over_seeds(runs, one)) for one in numbers)] for runs in study.groups.values()]
    return ["## 5. All configs", table(["config", "seeds", "loss (nats)", "perplexity", "bits per byte", "load CV",
                                        "dead a layer", NAMES["mi_excess"], "coverage", "dropped"], rows),
            figures("perplexity_over_steps", "final_perplexity"), source(study, study.groups)]


def limit_length(study):
    """Bytes seen against the corpus, and whether the loss was still falling."""
    lines = []
    for steps, run in sorted({run.summary["steps"]: run for run in study.finished}.items()):
        seen = steps * run.config["training"]["batch_size"] * run.model["seq_len"]
        text = sum(part.get("train_bytes", part["bytes"]) for part in run.config["corpus"].values())
        lines.append(f"- {steps:,} steps of {seen // steps:,} bytes: {seen:,} bytes seen, {seen / text:.2f} times the "
                     f"{text:,} bytes of training text.")
    slopes = {name: t_interval([slope(run) for run in runs]) for name, runs in study.groups.items()}
    falling = [name for name, one in slopes.items() if (one.high if one.n > 1 else one.mean) < 0]
    listed = "; ".join(f"{name} {signed(one)}" for name, one in slopes.items())
    return [*lines, f"- Over the last third the validation loss was still falling (interval below zero, or one seed's slope) in "
            f"{len(falling)} of {len(slopes)} configs; nats in 100 steps: {listed}. The learning rate was falling too and "
            "flattens the end. A longer run may shrink, widen or reverse any difference above."]


def limit_tests(study):
    """How many comparisons, how many of them may be chance, and what could not have been seen."""
    tested = [one for one in study.comparisons if one.tested]
    halves = [one.interval.half for one in tested if one.metric == LOSS]
    lines = [f"- {len(study.comparisons)} comparisons follow from the configs, decided before any result: "
             f"{counted(study.comparisons)}."]
    if tested:
        lines[0] += (f" If nothing differed, about {0.05 * len(tested):.1f} of {len(tested)} intervals would exclude zero by "
                     "chance: read *suggestive* with that in mind.")
    if halves:
        lines.append(f"- Half of the paired loss intervals are wider than ± {np.median(halves):.3f} nats; smaller differences "
                     "mostly stay undecided, which does not mean equal.")
    seeds = ", ".join(map(str, sorted({len(runs) for runs in study.groups.values()})))
    return [*lines, f"- Seeds a config: {seeds}. A t interval assumes that seeds scatter normally, which few seeds cannot check."]


def limit_settings(study):
    """What all runs share and so cannot be a finding, what they should share and do not, and the runs left out."""
    rates = ", ".join(f"{rate:g}" for rate in sorted({run.config["training"]["learning_rate"] for run in study.finished}))
    lines = [f"- Learning rate {rates}, one corpus, one size of model: configs may prefer other rates, and those "
             "with another K above all."]
    for key in ("training", "corpus", "versions", "threads"):
        if len({repr(run.config.get(key)) for run in study.finished}) > 1:
            lines.append(f"- **The runs do not share the same {key} (see their config.json): compare with care.**")
    for run in study.runs:
        if run.state == "failed":
            why = ", ".join(f"{key} {run.failure.get(key)}" for key in ("step", "layer", "reason"))
            lines.append(f"- **`{run.run_id}` failed ({why}) and is in no number above**; the seeds that finished may flatter "
                         "its config.")
        elif run.state == "incomplete":
            lines.append(f"- **`{run.run_id}` is incomplete and in no number above.**")
    return lines


def section_limits(study):
    return ["## 6. What this study was too short or too small to show",
            "\n".join(limit_length(study) + limit_tests(study) + limit_settings(study))]


def section_methods(study):
    first = study.finished[0].config
    tokens = ", ".join(f"{n:,}" for n in sorted({run.final["validation_tokens"] for run in study.finished}))
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    minutes = sum(run.summary["seconds"] for run in study.finished) / 60
    return ["## 7. Methods", f"{METHODS}\n- Final numbers are over {tokens} validation bytes. Training took {minutes:.1f} minutes "
            f"in all, threads a run {first['threads']}, {versions}."]


# ---- files ----


def write_findings(study_dir):
    """Write STUDY/FINDINGS.md from the study's result rows; returns its path. ValueError without a finished run."""
    study = read_study(study_dir)
    answers = (answer_balance, answer_routers, answer_cost)
    parts = [*introduction(study), "## In short", "\n".join(f"- {answer(study)}" for answer in answers)]
    for section in (section_balance, section_routers, section_cost, section_claims, section_configs, section_limits,
                    section_methods):
        parts += section(study)
    path = Path(study_dir, "FINDINGS.md")
    write_whole(path, "\n\n".join(parts) + "\n")
    return path


def write_summary_csv(study_dir):
    """Write STUDY/summary.csv, a line a run whatever its state, layer numbers as means; returns its path."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    settings = ("router", "top_k", "aux_coef")
    writer.writerow(["run_id", "config_id", "seed", "state", *settings, "steps", "seconds", "validation_tokens",
                     "parameters_total", "parameters_active", *CSV_NUMBERS])
    for run in load_runs(study_dir):
        summary, sizes = run.summary or {"final": {"layers": []}}, run.config.get("parameters", {})
        numbers = (measure(summary["final"], name) for name in CSV_NUMBERS)
        writer.writerow([run.run_id, run.config_id, run.seed, run.state, *map(run.model.get, settings),
                         summary.get("steps"), summary.get("seconds"), summary["final"].get("validation_tokens"),
                         sizes.get("total"), sizes.get("active"),
                         *("" if math.isnan(number) else f"{number:.6g}" for number in numbers)])
    path = Path(study_dir, "summary.csv")
    write_whole(path, text.getvalue())
    return path
