"""FINDINGS.md of an experiment, and summary.csv; from result rows alone.

No outcome is written here: numbers are computed, and words of judgement follow from criteria that the document states.
"""

import hashlib
import json
import math
from pathlib import Path

from ..files import as_csv, require_ours, write_atomically
from ..training.identity import imports_of
from .caveats import limits, warnings
from .markdown import WORDS, bold, bullets, chapter, enumerated, escaped, run_ids, table, write_paragraphs
from .quantities import QUANTITIES, value
from .results import Results
from .rows import RunRecord, router_names
from .tables import (
    CLAIM_COLUMNS,
    COMPUTE,
    answers,
    claim_rows,
    compute_row,
    crossing_table,
    domain_table,
    exploratory_table,
    primary_table,
    settings_table,
    sweep_table,
)
from .wording import (
    CLAIMS,
    CROSSINGS,
    DOMAINS,
    EVERY_RUN,
    EXPLORATORY,
    GLOSSARY,
    METHODS,
    PRIMARY,
    SWEEP,
)


def write_findings(results: Results) -> Path:
    """Write FINDINGS.md into the folder of the results, showing the figures that are there; returns its path."""
    return write_paragraphs(results.folder / "FINDINGS.md", document(results))


def document(results: Results) -> list[str]:
    """The document of one experiment, as paragraphs of Markdown."""
    stale = not all(drawn(results).values())
    first, *others = images(results) or ["" if stale else "No figures yet: `--plot-only` draws them."]
    run, claims, experiment = results.runs[0], claim_rows(results), results.experiment
    versions = ", ".join(f"{name} {number}" for name, number in run.config["versions"].items())
    n, said = len(experiment.primary) or 1, finding(results)
    answered, made, weak, numbers = said[:n], about(results), bold(warnings(results)), settings_table(results)
    opening = ([*answered, made, weak, first, numbers] if results.several  # else there is no test: numbers come first
               else [made, weak, numbers, *answered, first])
    ids = ", ".join(f"`{each}`" for each in run_ids(results.runs))
    return [
        f"# {experiment.name}: {experiment.question}",
        "Figures without the mark of these runs and captions are left out: `--plot-only` draws them again."
        if stale else "",
        *opening, bullets(said[n:]),
        *chapter("Primary comparisons", PRIMARY if any(one.tested for one in results.primary) else "",
                 primary_table(results)),
        *chapter("By domain", DOMAINS, domain_table(results)),
        *chapter("Exploratory comparisons", EXPLORATORY if any(one.tested for one in results.exploratory) else "",
                 exploratory_table(results)),
        *chapter("Learning rates", SWEEP, sweep_table(results)),
        *chapter("Where curves cross", CROSSINGS, crossing_table(results)),
        *chapter("Claims", verdicts([results]), table(CLAIM_COLUMNS, claims)),
        *chapter("More figures", "\n\n".join(others)),
        "## What these runs cannot show", experiment.caution, bullets(limits(results)),
        WORDS, GLOSSARY, "## Methods", METHODS, table(COMPUTE, [compute_row(results)]),
        f"Tables: {run.final['validation_tokens']:,} validation bytes; curves over steps: "
        f"{run.log[-1]['validation_tokens']:,}. Runs: {ids}. Plan: `{experiment.plan_hash[:12]}`. "
        f"Versions: {escaped(versions)}.{imports(results.runs)}"]


def about(results):
    """What was trained, and how, in two sentences."""
    run, seeds = results.runs[0], sorted({run.seed for run in results.runs})
    steps = sorted({run.summary["steps"] for run in results.runs})
    models = [runs[0].model for runs in results.groups.values()]
    sizes = ", ".join(f"{name} {max(values, key=values.count)}"  # of most settings
                      for name in ("n_layers", "moe_layers", "n_experts", "d_model", "d_ff")
                      if (values := [model[name] for model in models if name in model]))
    settings = "1 setting" if len(results.groups) == 1 else f"{len(results.groups)} settings"
    return (f"{settings}, {'seed' if len(seeds) == 1 else 'seeds'} {enumerated(seeds)}, trained for "
            f"{' or '.join(f'{n:,}' for n in steps)} steps of {run.config['training']['batch_size']} windows of "
            f"{run.model['seq_len']} bytes ({escaped(', '.join(run.config['domains']))}). Unless a setting says "
            f"otherwise: {escaped(sizes)}. Words such as *different*, *causal* and *load* are explained "
            "[below](#words-used-here).")


def finding(results: Results) -> list[str]:
    """The answers, and what else the experiment says."""
    if not results.ready:
        return ["No finding: a setting has no finished run, or no seed is common to all."]
    said = results.experiment.say(results) if results.experiment.say else []
    return [*(answers(results) or ["No primary comparison was planned."]), *([said] if isinstance(said, str) else said)]


def verdicts(found) -> str:
    """What the verdicts of claims mean, for the claims of some Results."""
    effects = [effect for results in found for claim in results.experiment.claims for effect in claim.effects]
    return CLAIMS + (f" {EVERY_RUN}" if any(effect.every_run for effect in effects) else "")


def images(results, place="") -> list[str]:
    """The figures of an experiment that were drawn, with captions, as Markdown; place: the folder of its document."""
    return [f"![{name.replace('_', ' ')}]({place}figures/{name}.png)\n\n*{caption(results, name)}*"
            for name, fresh in drawn(results).items() if fresh]


def drawn(results) -> dict[str, bool]:
    """{name: whether it was drawn from these runs with this caption} of the figures that are there."""
    paths = {name: results.folder / "figures" / f"{name}.png" for name in results.experiment.figures}
    heads = {name: path.read_bytes()[:1000] for name, path in paths.items() if path.exists()}
    return {name: f"Description\0{mark(results, name)}".encode() in head for name, head in heads.items()}


def caption(results, name) -> str:
    """The caption of a figure, or its name where the function that draws it has none."""
    draw = results.experiment.figures[name]
    return draw.caption(results) if hasattr(draw, "caption") else f"{name.replace('_', ' ')}."


def mark(results, name) -> str:
    """A hash of the runs and of the caption of a figure. The figure carries it, so that one of other runs, or with
    another caption, is recognised."""
    said = json.dumps([caption(results, name), [(run.run_id, run.summary) for run in results.runs]], sort_keys=True)
    return f"rows {hashlib.sha256(said.encode()).hexdigest()[:16]}"


def imports(runs) -> str:
    """A sentence: the files that the runs imported, with the beginnings of their hashes; empty without any."""
    files = dict.fromkeys(file for run in runs for file in imports_of(run.config).items())
    return f" Imports: {escaped(', '.join(f'{name} (sha256 {sha256})' for name, sha256 in files))}." if files else ""


def write_summary_csv(results: Results) -> Path:
    """Write summary.csv beside the findings: a line for each run whatever its state, a column for each number that any
    run has."""
    rows = []
    for run in results.all_runs:
        sizes, numbers = run.config.get("parameters", {}), all_numbers(run)
        rows.append({"run_id": run.run_id, "config_id": run.config_id, "seed": run.seed, "state": run.state}
                    | {"router": "+".join(router_names(run.model)) or None}
                    | {name: run.model.get(name) for name in ("top_k", "aux_coef")}
                    | {"steps": (run.summary or {}).get("steps")}
                    | {f"parameters_{part}": sizes.get(part) for part in ("total", "active")}
                    | {name: f"{number:.6g}" for name, number in numbers.items()})
    path = results.folder / "summary.csv"
    require_ours(path, "run_id,config_id")
    write_atomically(path, as_csv(rows))
    return path


def all_numbers(run: RunRecord) -> dict[str, float]:
    """{name: number} of every quantity that a finished run has, and of the fields of its rows that have no entry."""
    if run.state != "finished":
        return {}
    rows = (run.log[-1], *run.final["layers"])
    fields = [name for row in rows for name, number in row.items() if isinstance(number, float)]
    counted = [name for name, number in run.measured.items() if type(number) in (int, float)]
    names = dict.fromkeys((*QUANTITIES, *fields, *counted))
    return {name: number for name in names if math.isfinite(number := value(run, name))}
