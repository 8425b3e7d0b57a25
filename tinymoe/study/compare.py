"""Runs of any folders side by side: one table, one figure, and the flat rows of a folder for other programs."""

import math
from collections.abc import Iterator
from pathlib import Path

from ..files import printable
from .quantities import LOSS, in_row, title, value
from .rows import RunRecord, load_run, load_runs, made_of, router_names, unknown
from .statistics import t_interval

COLUMNS = (LOSS, "parameters", "active_parameters", "load_cv", "dead_experts", "drop_rate",
           "token_coverage", "experts_per_token", "seconds")
ALWAYS = COLUMNS[:3]  # shown though all numbers are the same
RUN_FIELDS = ("top_k", "n_experts", "aux_coef")  # of the model, in each flat row


def groups(paths) -> dict[str, list[RunRecord]]:
    """The finished runs of run folders and results folders: {label: runs that differ in the seed}.

    A label is the config id, with the folder's name where several folders are given. Raises ValueError for a path
    without a finished run.
    """
    found = {}
    for path in map(Path, dict.fromkeys(paths)):
        single = (path / "config.json").exists()
        parent = path.resolve().parent
        folder = path if not single else parent.parent if parent.name == "runs" else parent
        runs = [run for run in ([load_run(path)] if single else load_runs(path)) if run.state == "finished"]
        if not runs:
            raise ValueError(f"{path}: no finished run: train it first, or give a run's folder or a results folder")
        for run in runs:
            found.setdefault((folder.resolve(), run.config_id), {})[run.run_id] = run
    alike = len({folder.name for folder, _ in found}) < len({folder for folder, _ in found})
    several = len({folder for folder, _ in found}) > 1
    return {(f"{folder if alike else folder.name}/{name}" if several else name): list(runs.values())
            for (folder, name), runs in found.items()}


def table(found) -> tuple[list, list]:
    """(columns, rows): a label, what it is made of, its seeds, and the mean of each of COLUMNS, None without a number.

    After the loss half the width of its 95% interval over seeds, if any has one. Other columns whose numbers are all
    the same, or missing, are left out, but for those of ALWAYS.
    """
    columns = [("run", list(found)), ("made of", list(map(made_of, found.values()))),
               ("seeds", list(map(len, found.values())))]
    for name in COLUMNS:
        intervals = [t_interval([value(run, name) for run in runs]) for runs in found.values()]
        means = [_number(one.mean) for one in intervals]
        if name in ALWAYS or len(set(means)) > 1:
            columns.append((title(name), means))
        if name == LOSS and any(math.isfinite(one.half) for one in intervals):
            columns.append(("± (95%)", [_number(one.half) for one in intervals]))
    return [name for name, _ in columns], [list(row) for row in zip(*(cells for _, cells in columns))]


def _number(x):
    return x if math.isfinite(x) else None


def cautions(found) -> Iterator[str]:
    """Sentences about what makes runs of different folders hard to compare."""
    runs = [run for those in found.values() for run in those]
    parts = {"steps": lambda run: run.summary["steps"], "windows in a batch": lambda run:
             run.config["training"]["batch_size"], "bytes in a window": lambda run: run.model["seq_len"],
             "learning rates": lambda run: run.config["training"]["learning_rate"],
             "texts": lambda run: ", ".join(f"{n} ({str(t.get('sha256'))[:8]})" for n, t in
                                            sorted(run.config["corpus"].items()))}
    for what, of in parts.items():
        different = list(dict.fromkeys(map(of, runs)))
        if len(different) > 1:
            yield printable(f"The runs differ in their {what}: {'; '.join(map(str, different))}.")
    yield from map(printable, unknown(runs))


def draw(found):
    """A Figure: the causal loss over the steps, the busiest expert's load over them, and that load against the loss.

    Lines are means over seeds at the steps that they share. The last panel shows the path of a run: at each evaluation
    a point, from the left, where the loss is high, to a large mark at the end.
    """
    from .figures import default_style, panel_grid, style_at
    with default_style():
        fig, (axes_of,) = panel_grid(1, 3, 2.8)
        for place, (label, runs) in enumerate(found.items()):
            logs = [{row["step"]: row for row in run.log} for run in runs]
            steps = sorted(set.intersection(*map(set, logs)))
            loss, busiest = ([sum(of(log[step]) for log in logs) / len(logs) for step in steps] for of in (
                lambda row: row[LOSS], lambda row: 1 + in_row(row, "max_violation")))
            style = style_at(place) | {"markevery": max(1, len(steps) // 8)}
            for axes, x, y in zip(axes_of, (steps, steps, loss), (loss, busiest, busiest)):
                axes.plot(x, y, label=label, **style)
            axes_of[2].plot(loss[-1:], busiest[-1:], color=style["color"], marker=style["marker"], markersize=7)
        for axes, x, y in zip(axes_of, ("training step", "training step", title(LOSS)),
                              (title(LOSS), "largest load / mean load", "largest load / mean load")):
            axes.set(xlabel=x, ylabel=y)
        axes_of[2].invert_xaxis()
        fig.legend(*axes_of[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


def flat_rows(folder) -> list[dict]:
    """Every row of every run, flat: one for each evaluation and MoE layer (one for a dense model), and one at the end.

    folder: a results folder, or that of one run. A column of a list or an object has a dot: load.0,
    causal_by_domain.poetry. at_end: whether the row is the last measurement, on the larger validation set.
    Raises ValueError where there is no folder or no row.
    """
    folder, rows = Path(folder), []
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}: give a results folder, or the folder of one run")
    for run in [load_run(folder)] if (folder / "config.json").exists() else load_runs(folder):
        head = {"run_id": run.run_id, "config_id": run.config_id, "seed": run.seed, "state": run.state,
                "router": "+".join(router_names(run.model)) or None,
                **{name: run.model.get(name) for name in RUN_FIELDS}}
        ends = [run.final] if run.summary else []
        for row, at_end in [*((row, False) for row in run.log), *((row, True) for row in ends)]:
            shared = {name: cell for name, cell in row.items() if name not in ("layers", "warnings")}
            try:
                rows += [head | {"at_end": at_end} | _flat(shared) | _flat({**layer})
                         for layer in row.get("layers") or [{}]]
            except (RecursionError, TypeError):
                raise ValueError(f"{folder}: {run.run_id} has rows that no run writes: move it away") from None
    if not rows:
        raise ValueError(f"{folder}: no run with rows: train some first")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def _flat(found, prefix=""):
    """A nested JSON value as one dict of numbers and texts; the parts of a name are joined by dots."""
    if not isinstance(found, (dict, list)):
        return {prefix[:-1]: found}
    parts = found.items() if isinstance(found, dict) else enumerate(found)
    return {name: one for key, part in parts for name, one in _flat(part, f"{prefix}{key}.").items()}


def as_parquet(rows) -> bytes:
    """The rows as a Parquet file. Raises ImportError without the package pyarrow."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()
