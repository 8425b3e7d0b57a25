"""Result rows: the runs that a study left on disk, read back and checked, and how far runs are that still train."""

import json
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import numpy as np

from ..files import from_json, printable, read_json, read_rows, write_json, write_rows
from ..moe.losses import LOSSES
from ..moe.routers import ROUTERS
from ..training.data import corpora_of
from ..training.identity import describe, differing, with_defaults
from ..training.lease import holder
from ..training.loading import UNUSABLE, execute_recorded
from ..training.run_folder import RunFolder
from .quantities import LOSS, QUANTITIES, experts_per_token

COMPACT = "runs.jsonl"  # all runs of a study in one file, as it is published
ANEW = "fresh.json"  # {run id: name of the command --fresh that is to throw the old run away, once}
DAMAGED = "damaged files: move it away, and train or fetch it again"  # said of a finished run


def between(low, high):
    """A shape for `_fits`: the numbers of a range, so neither NaN nor infinity."""
    return lambda found: type(found) in (int, float) and low <= found <= high


# What tables and figures read of a run, see `_fits`. None: null, or no such field; ...: no such field
COUNT, SIZE, NUMBER, POSITIVE = range(10**12), range(1, 10**12), between(-1e12, 1e12), between(1e-12, 1e12)
PARTS = {"config": dict, "log": [dict], "summary": (dict, None), "failure": (dict, None)}
CONFIG = {"run_id": str, "config_id": str, "seed": range(2**64), "threads": SIZE, "versions": dict, "domains": [str],
          "model": {"router": (str, list), "router_options": (dict, None), "losses": (dict, None), "top_k": POSITIVE,
                    "capacity_factor": (POSITIVE, None), "aux_coef": NUMBER, "seq_len": SIZE},
          "training": {"steps": SIZE, "batch_size": SIZE, "learning_rate": NUMBER},
          "parameters": {"total": SIZE, "active": SIZE},
          "corpus": {...: {"train_bytes": SIZE, "entropy_rate": (NUMBER, None), "sha256": (str, ...)}},
          "rules": (str, ...), "imports": ([{"path": str, "sha256": str}], ...),
          "extended": ([{"step": COUNT, "from": COUNT, "to": COUNT}], ...)}
LAYER = {"layer": COUNT, "load": [COUNT], "domain_load": [[COUNT]], "dead_experts": COUNT} | dict.fromkeys((
    "token_coverage", "load_entropy", "router_entropy", "marginal_entropy", "mutual_information",
    "mutual_information_null", "byte_information", "byte_information_null"), NUMBER)
ROW = {"step": COUNT, "validation_tokens": SIZE, LOSS: NUMBER, "val_cross_entropy": NUMBER, "layers": [LAYER]}
LOGGED = ROW | {"seconds": NUMBER}
SUMMARY = {"run_id": str, "steps": SIZE, "seconds": NUMBER, "wall_seconds": (NUMBER, None), "final": ROW,
           "measured": (dict, None)}
# of each domain, where newer rows have them
DOMAIN_SHAPES = {"val_by_domain": NUMBER, "causal_by_domain": NUMBER, "causal_by_part": [NUMBER]}


class Damaged(ValueError):
    """A file of rows that cannot be read."""


@dataclass(frozen=True)
class RunRecord:
    """One training run: its settings, its log rows by step, and how it ended."""

    run_id: str
    config: dict
    log: list
    summary: dict | None = None
    failure: dict | None = None

    config_id = property(lambda self: self.config["config_id"])
    seed = property(lambda self: self.config["seed"])
    model = property(lambda self: self.config["model"])
    final = property(lambda self: self.summary["final"])  # the last measurement, on the larger validation set
    measured = property(lambda self: (self.summary or {}).get("measured") or {})  # what its experiment asked for
    rules = property(lambda self: self.config.get("rules", ""))  # by which its routers choose, see Router.rules
    is_moe = property(lambda self: bool(self.final["layers"]))

    plan_hash = property(lambda self: self.config.get("plan_hash"))
    wall_seconds = property(lambda self: self.summary.get("wall_seconds") or self.summary["seconds"])  # newer rows

    # whether routing on the prefix alone gives another loss, in any row
    leaky = property(lambda self: any(row["val_cross_entropy"] != row[LOSS] for row in [*self.log, self.final]))

    # failed: the loss was not finite; unfinished: stopped, or still running
    state = property(lambda self: "finished" if self.summary else "failed" if self.failure else "unfinished")


def router_names(model: dict) -> list[str]:
    """The routers of a stored ModelConfig, one or one for each layer."""
    found = model.get("router") or ()
    return [found] if isinstance(found, str) else list(map(str, found))


def made_of(runs) -> str:
    """What the runs of one setting are made of, in a few words: router, experts per byte, the router's options and
    coefficients of losses.

    The experts are the measured ones, a mean over the runs, where they are not top_k.
    """
    model, rules = runs[0].model, runs[0].rules
    if not runs[0].is_moe:
        return "dense"
    top_k, k = model["top_k"], np.mean([experts_per_token(run.final) for run in runs])
    router = " ".join(filter(None, ("+".join(router_names(model)), rules)))
    limited = model.get("capacity_factor") is not None
    shown = f"{top_k}" if limited or abs(k - top_k) < 0.005 else f"{k:.2f} measured"
    given, said = model.get("router_options") or {}, _rules(model)  # options that the rules say are left out
    options = [f"{name}={json.dumps(value)}" for name, value in given.items()
               if _rules(model | {"router_options": {one: given[one] for one in given if one != name}}) == said]
    losses = [f"{name} {coefficient}" for name, coefficient in (model.get("losses") or {}).items() if coefficient]
    return ", ".join([f"{router}, K={shown}", *options, f"aux {model['aux_coef']:g}", *losses])


def load_runs(study_dir) -> list[RunRecord]:
    """Every run of `study_dir`, by config and seed: those of its file runs.jsonl, and the folders in its `runs`.

    A folder without a config.json is an unfinished run, or nothing where runs.jsonl holds that run. Raises ValueError
    for a damaged finished run, which a report would otherwise leave out without a word, and for two different runs of
    one name.
    """
    runs, rows = {}, list(_compact_runs(Path(study_dir, COMPACT)))
    held = {run.run_id for run in rows}
    folders = sorted(path for path in Path(study_dir, "runs").glob("*")
                     if path.is_dir() and (path.name not in held or (path / "config.json").exists()))
    for run in (*rows, *map(_folder_run, folders)):
        if run.run_id in runs and runs[run.run_id].state == "failed":  # its folder tries again
            del runs[run.run_id]
        if _apart_from_rules(runs.setdefault(run.run_id, run)) != _apart_from_rules(run):
            raise ValueError(f"{study_dir}: {run.run_id} is in {COMPACT} and in runs/, and they differ: move one away")
    return sorted(runs.values(), key=lambda run: (run.config_id, run.seed))


def load_run(folder) -> RunRecord:
    """The run of one folder, wherever it lies. Raises ValueError for a finished run that is damaged."""
    return _folder_run(Path(folder).resolve())


def _apart_from_rules(run):
    """A copy without `rules`, which cannot be read again once the router's file has changed."""
    return replace(run, config={name: part for name, part in run.config.items() if name != "rules"})


def compact(study_dir) -> tuple[Path, int]:
    """Write study_dir/runs.jsonl, one line for each finished or failed run: (path, number of runs). The folders stay.

    Raises ValueError where no run is finished.
    """
    runs = [run for run in load_runs(study_dir) if run.state != "unfinished"]
    if not runs:
        raise ValueError(f"{study_dir}: no finished run to write: train some first")
    return _write_compact(study_dir, runs), len(runs)


def _write_compact(study_dir, runs):
    path = Path(study_dir, COMPACT)
    write_rows(path, [{part: getattr(run, part) for part in PARTS} for run in runs])
    return path


def overview(study_dir) -> list[dict]:
    """How far each run in the folders of a study is, by name; the runs may be in training.

    Each dict has `run`, `state` ("finished", "running", "failed" or "waiting"), `step`, `steps`, `loss` (the causal
    one: of the last evaluation, and of a finished run that of the tables; None before the first), `left` (seconds, of a
    running one; None if unknown) and `where` (the host of a running one, or why it failed).
    """
    return [_progress(place) for place in sorted(Path(study_dir, "runs").glob("*")) if place.is_dir()]


def _progress(place):
    config, failure = (_json(place / f"{name}.json") for name in ("config", "failure"))
    read = {"step": COUNT, LOSS: NUMBER, "seconds": NUMBER}
    rows = [row for row in read_rows(place / "log.jsonl") if _fits(row, read)]
    row, process = (rows or [{"step": 0, LOSS: None, "seconds": 0.0}])[-1], holder(place)
    steps = config["training"]["steps"] if _fits(config, {"training": {"steps": SIZE}}) else None
    ended, summary = (place / "summary.json").exists(), RunFolder(place).summary()  # in this order: it may end now
    found = {"run": place.name, "state": "waiting", "step": row["step"], "steps": steps, "loss": row[LOSS],
             "left": None, "where": ""}
    if summary:
        loss = summary["final"][LOSS] if _fits(summary, {"final": {LOSS: NUMBER}}) else None
        return found | {"state": "finished", "loss": loss}
    if process:
        left = row["seconds"] / row["step"] * (steps - row["step"]) if steps and row["step"] else None
        return found | {"state": "running", "left": left, "where": f"{process['host']}, process {process['pid']}"}
    if ended:
        return found | {"state": "failed", "where": DAMAGED}
    if failure is not None:
        return found | {"state": "failed", "where": f"{failure.get('reason')} at step {failure.get('step')}"}
    return found


def remaining(plans, out, text=None, extend=False) -> list:
    """The RunPlans that are to be trained, or looked at: all but those that out/runs.jsonl holds as finished.

    A sweep run that failed counts as finished: at its rate training does not stay finite. One that is `to_begin_anew`
    does not. extend: leave out no run that has its folder. Raises ValueError where a row is of other settings, and for
    a run that starts from one whose folder is gone; CorpusError for a text that cannot be read.
    """
    runs = Path(out, "runs")
    rows = [run for run in _compact_runs(Path(out, COMPACT))
            if not (extend and (runs / run.run_id / "config.json").exists())]
    failed = [_folder_run(runs / plan.run_id) for plan in plans
              if "@" in plan.config_id and (runs / plan.run_id / "failure.json").exists()]
    anew = to_begin_anew(out)
    stand = {run.run_id: run for run in (*rows, *failed) if run.run_id not in anew
             and (run.state == "finished" or run.state == "failed" and "@" in run.config_id)}
    todo = [plan for plan in plans if plan.run_id not in stand]
    for plan in todo:
        if plan.start_id in stand and not (runs / plan.start_id).exists():
            raise ValueError(f"{plan.run_id} starts from {plan.start_id}, of which only the row in {COMPACT} is left: "
                             "put its folder back, or start again with --fresh")
    corpora = corpora_of(text)
    for plan in plans:
        if plan.run_id not in stand:
            continue
        if wrong := differing(stand[plan.run_id].config, describe(plan, corpora(plan.model.seq_len))):
            raise ValueError(f"{out} holds the run {plan.run_id} with other settings ({'; '.join(wrong)}): choose "
                             "another --out, or start again with --fresh")
    return todo


def to_begin_anew(out) -> dict[str, str]:
    """{run id: name of a command --fresh} of the runs that it throws away once: see `RunFolder.discards`."""
    found = _json(Path(out, ANEW))
    return found if isinstance(found, dict) else {}


def begin_anew(out, run_ids):
    """Note that these runs are to be thrown away once, by a command that gets a name here."""
    write_json(Path(out, ANEW), to_begin_anew(out) | dict.fromkeys(run_ids, uuid.uuid4().hex[:8]))


def forget_begun(out):
    """Remove from runs.jsonl each run whose folder holds a newer one, and from fresh.json each command that is done.

    A command is done when all of its runs have begun, or none has: then their old results stay.
    Raises Damaged, before anything is changed, where runs.jsonl is.
    """
    rows, anew = list(_compact_runs(Path(out, COMPACT))), to_begin_anew(out)
    kept = [run for run in rows if not _begun_again(out, run)]
    if len(kept) < len(rows):
        _write_compact(out, kept)
    begun = {run_id for run_id, name in anew.items() if not RunFolder(Path(out, "runs", run_id)).discards(name)}
    halfway = {anew[run_id] for run_id in begun} & {anew[run_id] for run_id in anew.keys() - begun}
    left = {run_id: name for run_id, name in anew.items() if name in halfway}
    if left != anew:
        write_json(Path(out, ANEW), left)
    if not left:
        Path(out, ANEW).unlink(missing_ok=True)


def _begun_again(out, run):
    """Whether the folder of a run of runs.jsonl holds another one of its id: by --fresh, or longer by --extend."""
    config = _json(Path(out, "runs", run.run_id, "config.json"))
    return bool(config) and any(config.get(name) != run.config.get(name) for name in ("fresh", "extended"))


def _unknown_names(model):
    """`router x` or `loss x` for each of a stored ModelConfig that is not known in this process."""
    return [*(f"router {name}" for name in dict.fromkeys(router_names(model)) if name not in ROUTERS),
            *(f"loss {name}" for name in model.get("losses") or () if name not in LOSSES)]


def _execute_imports(config):
    """Execute what a run with an unknown router or loss imported: no file that has changed, or is new to this machine.
    """
    if _fits(config, CONFIG) and _unknown_names(config["model"]):
        with suppress(*UNUSABLE):
            execute_recorded(config)


def unknown(runs) -> list[str]:
    """A sentence for each router and loss of these runs that is not known, also not from the files of its run."""
    names = dict.fromkeys(name for run in runs for name in _unknown_names(run.model))
    return [f"The {name} is unknown, so parameters and FLOPs of its model are not counted: name its file with "
            "--import, or restore the file." for name in names]


def _folder_run(place):
    config, summary, failure = (_json(place / f"{name}.json") for name in ("config", "summary", "failure"))
    _execute_imports(config)
    return _record(place, config, read_rows(place / "log.jsonl"), summary, failure)


def _json(path):
    """The JSON object in a file: None where there is no file, {} where it is damaged."""
    try:
        return read_json(path) if path.exists() else None
    except ValueError:
        return {}


def _compact_runs(path):
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            parts = from_json(line)
            if not _fits(parts, PARTS):
                raise ValueError
            _execute_imports(parts["config"])
            yield _record(Path(str(parts["config"].get("run_id"))), **{part: parts[part] for part in PARTS})
        except (ValueError, KeyError, RecursionError):
            raise Damaged(f"{path}: line {number} is damaged: fetch the file again") from None


def _record(place, config, log, summary, failure):
    """The RunRecord of what was read. The name of `place`, its folder, is the run id."""
    if summary is not None and not _is_whole(place.name, config, log, summary):
        raise ValueError(f"{printable(place)} is a finished run with {DAMAGED}")
    rows = {row["step"]: row for row in log if _fits(row, {"step": COUNT})}
    log = [rows[step] for step in sorted(rows)]  # a step written twice: the later row
    if not _fits(config, CONFIG):
        config = {"run_id": place.name, "config_id": place.name, "seed": -1, "model": {}, "training": {}}
    config = {"rules": _rules(config["model"])} | config | with_defaults(config)
    return RunRecord(place.name, config, log, summary, failure)


def _rules(model):
    """The rules of a stored ModelConfig's routers; expert choice had one causal rule before it had thresholds."""
    options = model.get("router_options") or {}
    options = options if "shared_gate" in model else {"causal_rule": "prefix"} | options
    known = (ROUTERS.get(name) for name in dict.fromkeys(router_names(model)))
    return "; ".join(filter(None, (cls.rules(options) for cls in known if cls)))


def _is_whole(name, config, log, summary):
    """Whether the parts of a finished run are all there, are of one run, and have the names and types that are read."""
    if not (_fits(config, CONFIG) and _fits(log, [LOGGED]) and _fits(summary, SUMMARY) and log
            and config["domains"]):
        return False

    def layers(row):
        return [(layer["layer"], len(layer["load"])) for layer in row["layers"]]

    final = summary["final"]
    rows = final, *log

    def within(row):  # rows of before a newer version resumed the run lack the newer numbers
        numbers = {name for name in row if name.startswith(("val", "causal"))}
        return row.keys() <= log[-1].keys() and numbers <= final.keys() and layers(row) == layers(final) and all(
            layer.keys() <= last.keys() for layer, last in zip(row["layers"], final["layers"]))

    those = [layer for row in rows for layer in row["layers"]]
    alike = all(map(within, log))
    loads = all(layer["load"] and [len(one) for one in layer["domain_load"]] == [len(layer["load"])] * len(
        config["domains"]) for layer in those)
    numbers = all(_fits(part[metric], (float if metric.endswith("perplexity") else NUMBER, None))  # exp(700) is 1e304
                  for part in (*rows, *those, summary.get("measured") or {}) for metric in QUANTITIES.keys() & part)
    possible = all(0 <= layer["load_entropy"] < 1.001 for layer in those)
    by_domain = all(_fits(part[name], {...: of}) and part[name].keys() == set(config["domains"])
                    for part in (summary, *rows) for name, of in DOMAIN_SHAPES.items() if name in part)
    of_one_run = config["run_id"] == summary["run_id"] == name and max(row["step"] for row in log) == summary["steps"]
    return of_one_run and alike and loads and numbers and possible and by_domain


def _fits(found, shape) -> bool:
    """Whether a JSON value has a shape.

    A shape is a type, a range of whole numbers, a test such as `between`, a tuple of shapes (one must fit), [shape of
    each item], or {name: shape}. The name ... stands for all names, of which there must be at least one.
    """
    if isinstance(shape, range):
        return type(found) is int and found in shape
    if isinstance(shape, list):
        return isinstance(found, list) and all(map(_fits, found, repeat(shape[0])))
    if isinstance(shape, dict):
        if not isinstance(found, dict):
            return False
        if ... in shape:
            return found != {} and all(map(_fits, found.values(), repeat(shape[...])))
        return all(map(_fits, map(found.get, shape, repeat(...)), shape.values()))
    if isinstance(shape, tuple):
        return any(_fits(found, each) for each in shape)
    if shape in (None, ...):
        return found is ... or found is shape
    return isinstance(found, shape) if isinstance(shape, type) else shape(found)
