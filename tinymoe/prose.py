"""Numbers as text: intervals, differences, run ids and tables, as FINDINGS.md prints them."""

import math

from .analysis import LEAKY, LOSS, WORDS, states
from .rows import over_seeds

NAMES = {
    LOSS: "causal loss (nats)", "load_cv": "load CV", "load_entropy": "load entropy (/ ln E)",
    "mi_excess": "I(expert; domain) above null (nats)", "byte_excess": "I(expert; byte) above null (nats)",
    "repetition": "repetition", "weight_divergence": "weight divergence",
}


def plus_minus(interval, digits=3):
    """`mean ± half width`; the mean alone where one seed gives no interval, a dash where there is no number."""
    half = f" ± {interval.half:.{digits}f}" if math.isfinite(interval.half) else ""
    return f"{interval.mean:.{digits}f}{half}" if math.isfinite(interval.mean) else "–"


def signed(interval):
    """`+mean [low, high]`, for differences; more digits for small ones."""
    if not math.isfinite(interval.mean):
        return "–"
    digits = 3 if abs(interval.mean) >= 0.01 else 5
    ends = f" [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]" if math.isfinite(interval.half) else ""
    return f"{interval.mean:+.{digits}f}{ends}"


def percent(interval):
    """A difference of losses in nats as a change of perplexity."""
    if not math.isfinite(interval.mean):
        return "–"
    mean, low, high = (100 * math.expm1(min(x, 99.0)) for x in (interval.mean, interval.low, interval.high))
    return f"{mean:+.1f}%" + (f" [{low:+.1f}, {high:+.1f}]" if math.isfinite(low) else "")


def run_ids(runs):
    """Run ids, with the seeds of a config in braces: `A-seed{0,1,2}`."""
    seeds = {}
    for run in runs:
        seeds.setdefault(run.config_id, []).append(str(run.seed))
    return ", ".join(f"`{name}-seed{n[0] if len(n) == 1 else '{' + ','.join(n) + '}'}`" for name, n in seeds.items())


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def exponentiated(runs, name):
    """Perplexity: exp of a mean loss, with the ends of its interval."""
    interval = over_seeds(runs, name)
    ends = f" [{math.exp(interval.low):.2f}, {math.exp(interval.high):.2f}]" if math.isfinite(interval.half) else ""
    return f"{math.exp(interval.mean):.2f}{ends}"


def perplexity(runs):
    """Causal perplexity, with the leaky one beside it where they differ."""
    return exponentiated(runs, LOSS) + (f" (leaky {exponentiated(runs, LEAKY)})" if runs[0].leaky else "")


def with_leaky(runs, causal, leaky):
    """A causal number, with the leaky one beside it where they differ."""
    text = plus_minus(over_seeds(runs, causal))
    return text + (f" (leaky {plus_minus(over_seeds(runs, leaky))})" if runs[0].leaky else "")


def bits(runs):
    return with_leaky(runs, "causal_bits_per_byte", "val_bits_per_byte")


def pairs(comparisons):
    """Comparisons in a row of prose: pair, difference, in perplexity too where it is a loss, verdict."""
    texts = []
    for one in comparisons:
        loss = f" nats ({percent(one.interval)} perplexity)" if one.metric == LOSS else ""
        texts.append(f"{one.first} - {one.second} {signed(one.interval)}{loss}, {one.word}")
    return "; ".join(texts)


def comparison_table(comparisons):
    rows = [[NAMES[one.metric], f"{one.first} - {one.second}", one.interval.n, signed(one.interval),
             percent(one.interval) if one.metric == LOSS else "", one.word] for one in comparisons]
    return table(["number", "difference", "seeds", "mean [95%]", "perplexity", "verdict"], rows)


def told_apart(comparisons):
    """Which pairs differ in which number, clearly or suggestively, and in which direction."""
    found = {}
    for one in comparisons:
        if one.word in ("clear", "suggestive"):
            sign = ">" if one.interval.mean > 0 else "<"
            found.setdefault(NAMES[one.metric], []).append(f"{one.first} {sign} {one.second} ({one.word})")
    return "; ".join(f"{name}: {', '.join(texts)}" for name, texts in found.items()) or "none"


def counted(comparisons):
    counts = {word: sum(one.word == word for one in comparisons) for word in WORDS}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "none"


def ends(runs):
    """In what state the layers of a config ended, over its runs: `2 of 9 layers collapsed, 7 of 9 layers in use`."""
    counts = states(runs)
    return ", ".join(f"{count} of {sum(counts.values())} layers {state}" for state, count in counts.items())


def describe(run):
    """A config as prose names it: its id and what makes it."""
    if not run.is_moe:
        return f"{run.config_id} (dense)"
    return f"{run.config_id} ({run.model['router']}, K = {run.model['top_k']:g}, coefficient {run.model['aux_coef']:g})"


def source(study, names):
    """The line that says which runs a section was computed from."""
    return "Runs: " + run_ids([run for name in names for run in study.groups[name]]) + "."


def figures(*names):
    return "Figures: " + ", ".join(f"[{name.replace('_', ' ')}](figures/{name}.png)" for name in names) + "."
