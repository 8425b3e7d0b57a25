"""The benchmark counts, compares and draws what it says; how fast anything is, no test can know."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import cli
from tinymoe import kernels
from tinymoe.model.transformer import ModelConfig
from tinymoe.study import figures
from tinymoe.tools import bench

SMALL = ModelConfig(vocab_size=11, n_layers=2, d_model=8, n_heads=2, d_ff=16, seq_len=4, moe_layers=(1,), n_experts=4)


def test_the_profile_counts_the_floating_point_work_of_a_step():
    """N = 2 * 4 tokens, multiply and add: forward 2 N in out, backward twice that; attention over half the pairs."""
    rows = {row["operation"]: row for row in bench.step_profile(SMALL, batch_size=2, repeats=2)}
    n, d, f, v, t = 8, 8, 16, 11, 4
    linear = 2 * n * (2 * 4 * d * d + 2 * d * f + d * 4 + d * v)  # two attentions, one dense layer, router, head
    experts, attention = 2 * (2 * n) * 2 * d * f, 2 * 2 * n * t * d  # K = 2; two layers, scores and values, halved
    work = {name: row["gflops"] * row["ms"] * 1e6 for name, row in rows.items()}
    assert work["linear"] == pytest.approx(linear) and work["linear_backward"] == pytest.approx(2 * linear)
    assert work["experts_forward"] == pytest.approx(experts)
    assert work["experts_backward"] == pytest.approx(2 * experts)
    assert work["causal_attention"] == pytest.approx(attention)
    assert work["causal_attention_backward"] == pytest.approx(2 * attention)
    assert work["whole step"] == pytest.approx(3 * (linear + experts + attention))
    shares = [row["share"] for name, row in rows.items() if name != "whole step"]
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
    assert rows["adamw"]["calls"] > 0  # the optimizer's step is part of it


def test_a_median_leaves_out_the_first_round(monkeypatch):
    """Rounds of 100, 1, 3 and 2 seconds."""
    times = iter((0, 100, 0, 1, 0, 3, 0, 2))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(times))
    assert bench._medians({"": lambda: None}, repeats=3) == {"": 2000}


def test_a_product_of_matrices_counts_a_multiplication_and_an_addition(monkeypatch):
    monkeypatch.setattr(bench, "_medians", lambda *_, **__: {"": 1000.0})
    assert bench.sgemm_gflops() == pytest.approx(2 * 1024**3 / 1e9)


def test_the_time_of_a_backend_is_relative_to_the_naive_one(monkeypatch):
    rows = [{"backend": name, "pass": "forward", "ms": ms} for name, ms in (("naive", 8.0), ("numpy", 2.0))]
    monkeypatch.setattr(bench.ExpertBank, "benchmark", lambda **_: rows)
    monkeypatch.setattr(bench, "pytorch", lambda *_, **__: [])
    assert [row["relative"] for row in bench.ladder([{}])] == [1, 0.25]


def test_timing_leaves_the_kernels_as_they_were():
    before, kernel = vars(kernels).copy(), kernels.linear
    with pytest.raises(KeyError), kernels.timed():
        raise KeyError
    assert vars(kernels) == before and kernels.linear is kernel


def test_a_step_is_timed_with_naive_experts_in_numpy_and_in_numba():
    before = kernels.active()
    rows = bench.three_ways(SMALL, batch_size=2, repeats=1)
    ways = [("naive experts", "numpy", "naive"), ("NumPy kernels", "numpy", "numpy")]
    ways += [("numba kernels", "numba", "numba")] if before == "numba" else []
    assert [(row["step"], row["kernels"], row["expert_backend"]) for row in rows] == ways
    assert rows[0]["relative"] == 1 and all(row["relative"] == row["ms"] / rows[0]["ms"] for row in rows)
    assert kernels.active() == before


@pytest.mark.parametrize("share", [0, 0.5, 0.8, 1])
def test_a_skewed_layer_has_the_imbalance_that_was_asked_for(share, monkeypatch):
    seen = []
    monkeypatch.setattr(bench.ExpertBank, "forward", lambda bank, x, routing: seen.append(routing) or x)
    bench.skewed_layer(share, n_tokens=40, d_model=4)()
    assert seen[0].load[0] == round(40 * share) and (seen[0].coverage == 2).all()


@pytest.mark.slow
def test_scaling_is_relative_to_the_first_of_each_scan(tmp_path):
    rows = bench.scaling(experts=(2, 4), tokens=(128, 256), shares=(0.25, 1.0), repeats=1)
    assert [(row["against"], row["value"]) for row in rows] == [
        ("experts", 2), ("experts", 4), ("tokens", 128), ("tokens", 256), ("imbalance", 0.25), ("imbalance", 1.0)]
    assert [row["relative"] for row in rows[::2]] == [1, 1, 1]
    assert all(row["relative"] == row["ms"] / first["ms"] for first, row in zip(rows[::2], rows[1::2]))
    bench.draw_scaling(rows, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_rows_say_where_they_were_measured(tmp_path):
    rows = bench.write(tmp_path, "profile", [{"ms": 1.0}])
    row = json.loads((tmp_path / "profile.jsonl").read_text())
    assert rows == [row] and row["threads"] == kernels.get_threads() and row["load"] >= 0
    assert row["processor"] and row["versions"]["numpy"] == np.__version__


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(bench.os, "getloadavg", lambda: (0.5, 0, 0))


def run(*arguments):
    return CliRunner().invoke(cli.main, ["bench", "--repeats", "1", *map(str, arguments)])


def test_the_command_times_the_sizes_that_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "pytorch", lambda repeats, layers=(), **_: [5.0] * len(layers))  # as if it were there
    shown = run("--sizes", "16,4,2,1", "--sizes", "24,4,3,2", "--out", tmp_path)
    assert shown.exit_code == 0, shown.output
    assert "PyTorch" in shown.output and (tmp_path / "ladder.png").exists() and not (tmp_path / "step.jsonl").exists()
    rows = [json.loads(line) for line in (tmp_path / "ladder.jsonl").read_text().splitlines()]
    assert {(row["n_tokens"], row["n_experts"]) for row in rows} == {(16, 2), (24, 3)}
    assert {row["relative"] for row in rows if row["backend"] == "naive"} == {1}
    printed = run("--sizes", "16,4,2,1", "--json", "--out", tmp_path).output.splitlines()
    assert [json.loads(line)["table"] for line in printed] == ["ladder"] * len(printed)


def test_the_step_of_another_model_is_timed_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "pytorch", lambda *_, **asked: [])
    small = ("n_layers=1", "moe_layers=[0]", "d_model=8", "n_heads=2", "d_ff=8", "seq_len=8", "batch_size=2")
    shown = run(*(word for setting in small for word in ("--set", setting)), "--out", tmp_path)
    assert shown.exit_code == 0, shown.output
    assert {path.name for path in tmp_path.iterdir()} == {"step.jsonl", "profile.jsonl", "profile.png"}
    calls = {row["operation"]: row["calls"] for row in map(json.loads, (tmp_path / "profile.jsonl").open())}
    assert calls["causal_attention"] == 1
    alone = ("--sizes", "16,4,2,1")
    for typed in (("--set", "steps=3"), (*alone, "--profile"), (*alone, "--set", small[0])):
        assert run(*typed, "--out", tmp_path / "none").exit_code == 2 and not (tmp_path / "none").exists()


def test_the_step_of_a_model_that_pytorch_does_not_have_is_timed_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "pytorch", lambda *_, steps=(), **asked: [5.0] * len(steps))
    small = ("n_layers=1", "moe_layers=[0]", "d_model=8", "n_heads=2", "d_ff=8", "seq_len=8", "expert_backend=numpy")
    for further, beyond in (((), []), (("activation=swiglu", "d_expert=4"), ["activation", "d_expert"])):
        shown = run(*(word for setting in small + further for word in ("--set", setting)), "--out", tmp_path)
        assert shown.exit_code == 0, shown.output
        steps = [json.loads(line)["step"] for line in (tmp_path / "step.jsonl").read_text().splitlines()]
        line = f"No row for PyTorch: the model in bench_pytorch.py has no {', '.join(beyond)}"
        assert (bench.PYTORCH in steps) == (not beyond) and (line in shown.output.splitlines()) == bool(beyond)


def test_the_axis_of_milliseconds_has_numbers(tmp_path, monkeypatch):
    """Would have caught: labels such as $\\mathdefault{10^{2}}$, a formula that is not parsed."""
    drawn, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda fig, path: (save(fig, path), drawn.append(fig)))
    rows = [dict(n_tokens=n, d_model=4, n_experts=2, top_k=1, backend="naive", ms=ms) | {"pass": "forward + backward"}
            for n, ms in ((16, 0.5), (32, 500.0))]
    bench.draw_ladder(rows, tmp_path / "ladder.png")
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert "10" in labels and not any("$" in label for label in labels)


@pytest.mark.parametrize("setting, code, message", [
    ("batch_size=abc", 2, "batch_size 'abc' must be"), ("batch_size=0", 2, "batch_size 0 must be"),
    ("batch_size=1.5", 2, "batch_size 1.5 must be"), ('freeze=[""]', 1, "leaves nothing to train"),
    ('freeze=["nothing"]', 1, "no parameter has 'nothing'"), ("d_model=2147483644", 1, "not enough memory")])
def test_a_setting_of_the_step_that_cannot_be_is_one_line(setting, code, message, tmp_path):
    shown = run("--set", setting, "--out", tmp_path)
    assert shown.exit_code == code and message in shown.output.splitlines()[-1] and "Error: " in shown.output


@pytest.mark.parametrize("size", ["16,4,2", "16,4,2,3", "0,4,2,1", "a,b,c,d", f"{10**22},1,1,1"])
def test_an_impossible_size_is_wrong_usage(tmp_path, size):
    shown = run("--sizes", size, "--out", tmp_path)
    assert shown.exit_code == 2 and f"'{size}' is not N,D,E,K" in shown.output


def test_the_number_of_threads_is_checked(tmp_path):
    shown = run("--sizes", "16,4,2,1", "--threads", 10**6, "--out", tmp_path)
    assert shown.exit_code == 2 and "--threads: " in shown.output and "threads must be" in shown.output


def test_a_busy_machine_is_said(monkeypatch):
    monkeypatch.setattr(bench.os, "getloadavg", lambda: (9.5, 0, 0))
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 8)
    assert bench.busy().startswith("load 9.5 on 8 cores")
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 10)
    assert bench.busy() == ""


def test_pytorch_is_asked_in_a_process_of_its_own(tmp_path, monkeypatch):
    """A stand-in for the program and for PyTorch: it answers with the number of cases that it reads."""
    program = tmp_path / "bench_pytorch.py"
    program.write_text("import json, sys; c = json.load(sys.stdin); print([len(c['layers']), c['steps'][0]['d_ff']])")
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert bench.pytorch(1) == []
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: name)
    assert bench.pytorch(1, layers=[{}, {}], steps=[SMALL]) == [2, 16]
    program.write_text("raise SystemExit(1)")
    assert bench.pytorch(1) == []
