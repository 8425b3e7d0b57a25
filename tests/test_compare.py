"""Runs of several folders in one table and one figure, and flat rows: against the rows on disk."""

import csv
import dataclasses
import importlib.util
import io
import json
import shutil

import numpy as np
import pytest

from test_cli import invoke, study
from test_train import WORDS
from tinymoe import files
from tinymoe.files import as_csv
from tinymoe.study import compare as c
from tinymoe.study import quantities


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders: D and B with two seeds, and a dense A."""
    out = tmp_path_factory.mktemp("two")
    (out / "words.txt").write_text(WORDS)
    for name, args, more in (("one", ("--config", "D", "--config", "B", "--seeds", 2), {}),
                             ("two", ("--config", "A"), {"moe_layers": [], "steps": 4})):
        code, output = study(out / "words.txt", out / name, *args, **more)
        assert code == 0, output
    return out


def test_runs_of_two_folders_stand_in_one_table(folders):
    found = c.groups([folders / "one", folders / "two/runs/A-seed0"])
    assert {label: len(runs) for label, runs in found.items()} == {"one/B": 2, "one/D": 2, "two/A": 1}
    columns, rows = c.table(found)
    finals = [files.read_json(folders / f"one/runs/D-seed{seed}/summary.json")["final"] for seed in (0, 1)]
    d = dict(zip(columns, rows[1]))
    assert d["causal loss (nats)"] == pytest.approx(np.mean([f["causal_cross_entropy"] for f in finals]))
    assert d["made of"] == "top_k, K=2, aux 0.01" and rows[2][1] == "dense"
    assert rows[2][columns.index("load CV")] is None
    assert d["active parameters (millions)"] < d["parameters (millions)"]
    assert "The runs differ in their steps: 6; 4." in list(c.cautions(found))
    assert list(c.groups([folders / "one"])) == ["B", "D"]  # one folder needs no name


def test_the_command_prints_and_draws(folders, tmp_path):
    code, output = invoke("compare", folders / "one", folders / "two", "-o", tmp_path / "figure.png")
    assert code == 0, output
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    lines = output.splitlines()
    assert lines[0].split()[:3] == ["run", "made", "of"] and [line.split()[0] for line in lines[1:4]] == [
        "one/B", "one/D", "two/A"]
    assert "Careful: The runs differ in their steps" in output


def test_the_figure_shows_the_rows(folders):
    runs = c.groups([folders / "one"])["D"]
    fig = c.draw({"D": runs})
    curve = fig.axes[2].lines[0].get_xydata()
    for point, rows in zip(curve, zip(*(run.log for run in runs))):
        loads = [np.array(row["layers"][0]["load"]) for row in rows]
        assert point == pytest.approx([np.mean([row["causal_cross_entropy"] for row in rows]),
                                       np.mean([load.max() / load.mean() for load in loads])])


def test_seeds_give_the_mean_of_k_and_an_interval(folders):
    runs = c.groups([folders / "one"])["D"]
    columns, rows = c.table({"D": runs, "one": runs[:1]})
    losses = [run.final["causal_cross_entropy"] for run in runs]
    half = 12.7062 * abs(losses[0] - losses[1]) / 2
    assert [row[columns.index("± (95%)")] for row in rows] == [pytest.approx(half, rel=1e-4), None]
    assert "± (95%)" not in c.table({"one": runs[:1]})[0]
    final = runs[0].final | {"layers": [layer | {"load": [n // 4 for n in layer["load"]]}
                                        for layer in runs[0].final["layers"]]}
    less = dataclasses.replace(runs[0], summary=runs[0].summary | {"final": final})
    ks = [quantities.value(run, "experts_per_token") for run in (less, runs[1])]
    assert f"K={np.mean(ks):.2f} measured" in c.table({"D": [less, runs[1]]})[1][0][1]


def test_folders_of_one_name_are_told_apart_by_their_paths(folders, tmp_path):
    shutil.copytree(folders / "two", tmp_path / "one")
    assert list(c.groups([folders / "one", tmp_path / "one"])) == [
        f"{folders / 'one'}/B", f"{folders / 'one'}/D", f"{tmp_path / 'one'}/A"]
    (tmp_path / "link").symlink_to(folders / "one")
    assert list(c.groups([folders / "one", tmp_path / "link"])) == ["B", "D"]  # a link is the same folder


def test_flat_rows_hold_every_number_of_the_rows(folders):
    rows = list(csv.DictReader(io.StringIO(as_csv(c.flat_rows(folders / "one")))))
    log = files.read_rows(folders / "one/runs/D-seed1/log.jsonl")
    mine = [row for row in rows if row["run_id"] == "D-seed1"]
    assert [(int(row["step"]), row["at_end"]) for row in mine] == [(r["step"], "False") for r in log] + [(6, "True")]
    for row, logged in zip(mine, log):
        layer = logged["layers"][0]
        assert [int(row[f"load.{e}"]) for e in range(len(layer["load"]))] == layer["load"]
        assert int(row["layer"]) == layer["layer"] and float(row["load_cv"]) == layer["load_cv"]
        domain, number = next(iter(logged["causal_by_domain"].items()))
        assert float(row[f"causal_by_domain.{domain}"]) == number and row["router"] == "top_k"
    final = files.read_json(folders / "one/runs/D-seed1/summary.json")["final"]
    assert float(mine[-1]["causal_cross_entropy"]) == final["causal_cross_entropy"]
    dense = c.flat_rows(folders / "two")
    assert len(dense) == 1 + len(files.read_rows(folders / "two/runs/A-seed0/log.jsonl")) and "layer" not in dense[0]


def test_flat_rows_of_one_run_and_of_no_folder(folders, tmp_path):
    all_rows = c.flat_rows(folders / "one")
    assert c.flat_rows(folders / "one/runs/D-seed1") == [row for row in all_rows if row["run_id"] == "D-seed1"]
    (tmp_path / "runs.jsonl").touch()
    for place, message in (tmp_path / "nowhere", "nowhere does not exist: give a results"), (
            tmp_path / "runs.jsonl", "runs.jsonl is a file: give a results"), (tmp_path, "no run with rows"):
        with pytest.raises(ValueError, match=message):
            c.flat_rows(place)


def test_rows_writes_a_file_and_refuses_parquet_without_its_package(folders, tmp_path, monkeypatch):
    code, output = invoke("rows", folders / "one", "-o", tmp_path / "mine.csv")
    assert code == 0 and "columns in" in output
    n_rows, text = int(output.split()[0]), (tmp_path / "mine.csv").read_text()
    assert text.count("\n") == n_rows + 1
    monkeypatch.setattr(c, "as_parquet", lambda rows: (_ for _ in ()).throw(ImportError("pyarrow")))
    code, output = invoke("rows", folders / "one", "--parquet")
    assert code == 1 and output == "Error: --parquet needs the package pyarrow: pip install pyarrow, or use --csv\n"


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_parquet_holds_the_same(folders):
    import pyarrow.parquet as pq
    rows = c.flat_rows(folders / "one")
    again = pq.read_table(io.BytesIO(c.as_parquet(rows))).to_pylist()
    assert again == rows


def test_what_has_no_finished_run_is_refused_in_one_line(folders, tmp_path):
    for command in ("compare", "rows"):
        code, output = invoke(command, tmp_path)
        assert code == 1 and output.count("\n") == 1 and "no " in output
    assert invoke("compare", tmp_path / "nowhere")[0] == 2


def test_a_run_is_read_wherever_its_folder_lies(folders, tmp_path):
    shutil.copytree(folders / "two/runs/A-seed0", tmp_path / "A-seed0")
    found = c.groups([tmp_path / "A-seed0", folders / "one"])
    assert list(found) == [f"{tmp_path.name}/A", "one/B", "one/D"]
    assert found[f"{tmp_path.name}/A"] == c.groups([folders / "two"])["A"]


@pytest.mark.parametrize("odd", [{"layers": 5}, {"layers": [5]},
                                 {"new": json.loads('{"a":' * 600 + "1" + "}" * 600)}])
def test_odd_rows_of_an_unfinished_run_are_refused_in_one_line(folders, tmp_path, odd):
    run = shutil.copytree(folders / "two", tmp_path / "out") / "runs/A-seed0"
    (run / "summary.json").unlink()
    log = files.read_rows(run / "log.jsonl")
    files.write_rows(run / "log.jsonl", [*log[:-1], log[-1] | odd])
    code, output = invoke("rows", tmp_path / "out", "-o", tmp_path / "rows.csv")
    assert code == 1 and output.count("\n") == 1 and "A-seed0 has rows that no run writes" in output
