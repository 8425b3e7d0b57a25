"""The report and the figures, on small made-up studies: everything must follow from the rows alone."""

import csv
import dataclasses
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from click.testing import CliRunner

import cli
from test_train import forget
from tinymoe.experiments import STUDY
from tinymoe.files import read_rows, save_arrays, write_rows
from tinymoe.model.config import ModelConfig
from tinymoe.model.counting import architecture, count
from tinymoe.moe.routers import ROUTERS, user_files
from tinymoe.study import caveats, compare, figures, gathered, maps, markdown, palette, quantities, report, rows, tables
from tinymoe.study.experiment import Claim, Effect
from tinymoe.study.results import Results
from tinymoe.study.rows import RunRecord, compact, load_runs, made_of
from tinymoe.study.statistics import Comparison, Contrast, Interval, corrected, holm
from tinymoe.training import identity

CONFIGS = {"A": ("top_k", 1, 0.0), "B": ("top_k", 1, 0.01), "C": ("top_k", 1, 0.1), "D": ("top_k", 2, 0.01),
           "E": ("expert_choice", 2, 0.0), "F": ("noisy_top_k", 2, 0.01),
           "G": ("top_k", 2, 0.01)}
LOSSES = {"A": (1.9, 2.0, 2.1), "B": (1.5, 1.6, 1.8), "C": (1.6, 1.6, 1.7), "D": (1.4, 1.5, 1.6),
          "E": (1.7, 1.8, 1.9), "F": (1.4, 1.5, 1.7), "G": (1.4, 1.5, 1.6)}
ROOT = Path(__file__).resolve().parent.parent
EVEN, COLLAPSED = [25, 25, 25, 25], [100, 0, 0, 0]


def layer_row(load, coverage):
    mean, total = sum(load) / 4, sum(load)
    entropy = -sum(n / total * math.log(n / total) for n in load if n) / math.log(4)
    return {"layer": 1, "load": load, "load_cv": math.sqrt(sum((n - mean) ** 2 for n in load) / 4) / mean,
            "max_violation": max(load) / mean - 1, "max_violation_batch": max(load) / mean - 0.9,
            "load_entropy": entropy,
            "dead_experts": load.count(0), "router_entropy": 1.0, "marginal_entropy": 1.2, "drop_rate": 0.0,
            "token_coverage": coverage, "weight_divergence": 0.9, "repetition": 0.3, "domain_load": [load, load],
            "mutual_information": 0.05, "mutual_information_null": 0.01, "byte_information": 0.3,
            "byte_information_null": 0.02}


def row(step, loss, leaky_loss, layers, tokens=512):
    numbers = {"val": leaky_loss, "causal": loss}
    return {"step": step, "seconds": float(step), **{f"{k}_cross_entropy": v for k, v in numbers.items()},
            "causal_by_domain": {"prose": loss - 0.25, "verse": loss + 0.25},
            **{f"{k}_perplexity": math.exp(v) for k, v in numbers.items()},
            **{f"{k}_bits_per_byte": v / math.log(2) for k, v in numbers.items()}, "layers": layers,
            "validation_tokens": tokens}


def write_run(study, name, seed, loss, dense=False):
    router, top_k, coefficient = CONFIGS[name]
    folder = study / "runs" / f"{name}-seed{seed}"
    folder.mkdir(parents=True)
    layers = [] if dense else [layer_row(COLLAPSED if name == "A" else EVEN, 0.9 if name == "E" else 1.0)]
    leaky = loss - 0.25 if name == "E" else loss
    model = {"router": router, "top_k": top_k, "aux_coef": coefficient, "seq_len": 16, "dense": dense}
    text = {"bytes": 1000, "train_bytes": 800}
    (folder / "config.json").write_text(json.dumps({
        "run_id": folder.name, "config_id": name, "seed": seed, "model": model, "domains": ["prose", "verse"],
        "training": {"steps": 20, "batch_size": 4, "learning_rate": 1e-3}, "corpus": {"prose": text, "verse": text},
        "versions": {"python": "3.11"}, "threads": 1, "parameters": {"total": 200, "active": 100}}))
    tokens = 512 if dense else 100 // top_k  # 100 assignments
    rows = [row(step, loss + 0.1 - step / 200, leaky + 0.1 - step / 200, layers, tokens) for step in (0, 10, 20)]
    (folder / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (folder / "summary.json").write_text(json.dumps({"run_id": folder.name, "steps": 20, "seconds": 20.0,
                                                     "final": row(20, loss, leaky, layers, tokens),
                                                     "causal_by_part": {"prose": [loss - 0.5, loss],
                                                                        "verse": [loss, loss + 0.5]}}))
    return folder


def write_study(study, n_seeds=3, losses=LOSSES):
    for name, values in losses.items():
        for seed, loss in enumerate(values[:n_seeds]):
            write_run(study, name, seed, loss)
    return study


def findings(study):
    return report.write_findings(Results(STUDY, study)).read_text(encoding="utf-8")


def draw_all(study):
    return figures.draw_all(Results(STUDY, study))


def test_findings_hold_the_numbers_worked_out_by_hand(tmp_path):
    text = findings(write_study(tmp_path))
    # A: 1.9, 2.0, 2.1: s = 0.1, half width 4.3027 * 0.1 / sqrt(3) = 0.2484; 2 / ln 2 = 2.885, 0.2484 / ln 2 = 0.358.
    # exp: 6.6859, 7.3891, 8.1662: mean 7.4137, s = 0.74046, half width 1.8394.
    assert "| A top_k, K=1, aux 0 | no load balancing | 2.000 ± 0.248 | 7.41 ± 1.84 | 2.885 ± 0.358 |" in text
    # A - B: 0.4, 0.4, 0.3: mean 0.36667, s = 0.057735, half width 4.3027 * 0.033333 = 0.14342.
    # t = 0.36667 / 0.033333 = 11, p = 1 - 11 / sqrt(11^2 + 2) = 0.0082. C - A has the same numbers with another sign;
    # E - G is 0.3 in every seed, so its p is 0, and Holm takes twice the other: 0.016.
    assert re.search(r"\| `A` - `B` \| \+0\.367 \| \[\+0\.223, \+0\.510\] \| 0\.0\d+ \| different \|", text)
    assert "**Heavy balancing lowers the loss.** Causal loss (nats), `C` - `A`: -0.367. *Different*" in text
    # E: leaky loss 0.25 below the causal one; exp: 5.4739, 6.0496, 6.6859 and exp(-0.25) = 0.7788 of that.
    assert "6.07 ± 1.51 (leaky 4.73 ± 1.17)" in text
    # 20 steps of 4 * 16 bytes, over 1,600 bytes of training text.
    assert "20 steps saw 1,280 bytes, 0.80 times the 1,600 bytes" in text
    assert "Function divergence, `E` - `D`: –.\n" in text
    assert "`A` 3 collapsed" in text and "The first of these with every layer in use: `B`." in text
    assert "effective experts, `A`: 1.000 [1.000, 1.000]; needs < 4" in text


def test_findings_regenerate_byte_for_byte(tmp_path):
    assert findings(write_study(tmp_path)) == findings(tmp_path)


def test_a_flipped_outcome_flips_the_sentence(tmp_path):
    worse = findings(write_study(tmp_path / "worse"))
    better = findings(write_study(tmp_path / "better", losses=LOSSES | {"E": (1.0, 1.1, 1.2), "A": (1.2, 1.2, 1.3)}))
    assert "is worse than top-2 with the same kind of gates.** Causal loss (nats), `E` - `G`: +0.300" in worse
    assert "is better than top-2 with the same kind of gates.** Causal loss (nats), `E` - `G`: -0.400" in better
    assert "**Heavy balancing lowers the loss.**" in worse and "**Heavy balancing raises the loss.**" in better


def test_one_seed_gives_no_interval_and_no_verdict(tmp_path):
    text = findings(write_study(tmp_path, n_seeds=1))
    assert "**One seed, so no interval and no test: A, B, C, D, E, F, G." in text
    assert text.count("**Not tested: there are fewer than two common seeds, or a run lacks the number.**") == 3
    assert text.index("| setting |") < text.index("**Not tested:") and "*Not tested*." not in text
    assert not any(word in text for word in ("Sign flips", "Smallest effect", "corrected p", "95% interval |"))
    numbers = [line for line in text.splitlines() if line.startswith("|")]
    assert numbers and not any("±" in line or "[+" in line or "[-" in line for line in numbers)
    assert not any(word in line for line in numbers for word in ("different", "**same**", "not known", "undecided"))


@pytest.mark.parametrize("setting, pair", [("A", "`C` - `A`"), ("C", "`C` - `A`"), ("G", "`E` - `G`")])
def test_a_setting_whose_runs_all_failed_is_named_and_not_tested(tmp_path, setting, pair):
    write_study(tmp_path)
    for run in (tmp_path / "runs").glob(f"{setting}-seed*"):
        (run / "summary.json").unlink()
        (run / "failure.json").write_text(json.dumps({"run_id": run.name, "step": 7, "layer": "layer 1",
                                                        "reason": "the loss is not finite"}))
    text = findings(tmp_path)
    assert (f"**`{setting}-seed{{0,1,2}}` failed (the loss is not finite at step 7, beginning in layer 1) and is in no "
            "number.**") in text
    assert ("**Not tested: there are fewer than two common seeds, or a run lacks the number.** Causal loss (nats), "
            f"{pair}: –.") in text
    assert f"\n| {setting} " not in text and "nan |" not in text


def test_failed_unfinished_and_torn_runs_are_named(tmp_path):
    write_study(tmp_path)
    failed, stopped = (tmp_path / "runs" / name for name in ("C-seed2", "D-seed1"))
    (failed / "summary.json").unlink()
    (failed / "failure.json").write_text(
        '{"run_id": "C-seed2", "step": 7, "layer": "block 3", "reason": "loss is nan"}')
    (stopped / "summary.json").unlink()
    with open(tmp_path / "runs" / "A-seed0" / "log.jsonl", "a") as file:
        file.write('{"step": 30, "val_cro')
    (tmp_path / "runs" / "Z-seed0").mkdir()
    text = findings(tmp_path)
    assert "`C-seed2` failed (loss is nan at step 7, beginning in block 3)" in text and "`C-seed{0,1}`" in text
    assert "`D-seed1` is not finished" in text and "`Z-seed0` is not finished" in text
    assert [len(run.log) for run in load_runs(tmp_path) if run.run_id == "A-seed0"] == [3]
    with open(report.write_summary_csv(Results(STUDY, tmp_path))) as file:
        states = {line["run_id"]: line["state"] for line in csv.DictReader(file)}
    assert len(states) == 22 and states["C-seed2"] == "failed" and states["Z-seed0"] == "unfinished"


@pytest.mark.parametrize("name, content", [
    ("log.jsonl", ""), ("log.jsonl", '{"step": 10}\n'), ("log.jsonl", "[]\n"), ("log.jsonl", None),
    ("summary.json", "{}"),
    ("summary.json", "[1]"), ("summary.json", b"\xff\xfe"), ("config.json", "5"), ("config.json", '{"seed": 0}'),
    ("config.json", None)])
def test_a_finished_run_with_a_damaged_file_is_in_no_mean(tmp_path, name, content):
    path = write_run(tmp_path, "A", 0, 2.0) / name
    path.unlink() if content is None else path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="A-seed0 is a finished run with damaged files"):
        load_runs(tmp_path)


def test_a_finished_run_with_a_truncated_log_is_shown_as_damaged(tmp_path):
    path = write_run(tmp_path, "A", 0, 2.0) / "log.jsonl"
    path.write_text(path.read_text().rsplit("\n", 2)[0])
    (run,) = rows.overview(tmp_path)
    assert run["state"] == "failed" and run["where"].startswith("damaged files")


def test_of_two_rows_of_a_step_the_later_one_counts(tmp_path):
    path = write_run(tmp_path, "A", 0, 2.0) / "log.jsonl"
    logged = read_rows(path)
    write_rows(path, [*logged, logged[-1] | {"causal_cross_entropy": 7.0}])
    (run,) = load_runs(tmp_path)
    assert len(run.log) == len(logged) and run.log[-1]["causal_cross_entropy"] == 7


def test_a_copy_of_a_run_is_not_counted_twice(tmp_path):
    folder = write_run(tmp_path, "A", 0, 2.0)
    shutil.copytree(folder, folder.with_name("A-seed0 copy"))
    with pytest.raises(ValueError, match="copy is a finished run with damaged files"):
        load_runs(tmp_path)


@pytest.mark.slow
def test_a_dense_control_has_no_experts_to_report(tmp_path):
    write_run(tmp_path, "D", 0, 2.0, dense=True)
    assert findings(tmp_path).count("**Not tested:") == 3 and "MoE layers at the end" not in findings(tmp_path)
    assert [path.name for path in draw_all(tmp_path)] == ["at_the_end.png", "over_steps.png"]
    write_run(tmp_path, "E", 0, 1.5)
    assert "routed as in training (nats), `E`: 0.250; needs > 0" in findings(tmp_path) and len(draw_all(tmp_path)) == 6
    assert "D,0,finished" in report.write_summary_csv(Results(STUDY, tmp_path)).read_text()


def test_where_the_entropy_of_the_text_is_known_the_loss_above_it_is_told(tmp_path):
    """Rates 1.0 and 1.2, mean 1.1: C, at 1.6, 1.6 and 1.7, is 0.533 above. Without rates there is no such column."""
    write_study(tmp_path, losses={"C": LOSSES["C"]})
    assert "above the entropy" not in findings(tmp_path)
    for path in tmp_path.glob("runs/*/config.json"):
        config = json.loads(path.read_text())
        config["corpus"]["prose"]["entropy_rate"], config["corpus"]["verse"] = 1.0, {**config["corpus"]["verse"],
                                                                                     "entropy_rate": 1.2}
        path.write_text(json.dumps(config))
    text = findings(tmp_path)
    assert "loss above the entropy of the text (nats)" in text and "| 0.533 ± 0.143 |" in text


def test_a_study_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        findings(tmp_path)


@pytest.mark.slow
def test_every_figure_is_written_whole(tmp_path):
    paths = draw_all(write_study(tmp_path, n_seeds=2))
    assert sorted(paths) == sorted((tmp_path / "figures").iterdir()) and len(paths) == 6  # no routings were kept
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in paths)
    assert all(f"(figures/{path.name})" in findings(tmp_path) for path in paths)


# -- damaged and hostile rows --

def shape(x):
    """Names and types of a JSON value; the names of versions are values."""
    if isinstance(x, dict):
        return {name: None if name == "versions" else shape(each) for name, each in x.items()}
    return [shape(each) for each in x] if isinstance(x, list) else float if isinstance(x, int) else type(x)


@pytest.mark.parametrize("name", ["runs.jsonl", "config.json", "log.jsonl", "summary.json"])
def test_flipped_bits_of_rows_change_nothing_or_are_refused_in_one_line(tmp_path, name):
    """A flip that leaves other names or types never changes the findings; one that leaves another value may."""
    write_study(tmp_path, n_seeds=2, losses={one: LOSSES[one] for one in "AE"})
    path = tmp_path / "runs/E-seed1" / name
    if name == "runs.jsonl":
        path, _ = compact(tmp_path)
        shutil.rmtree(tmp_path / "runs")
    raw, before, rng, refused = path.read_bytes(), findings(tmp_path), np.random.default_rng(0), 0
    for at, bit in zip(rng.integers(0, len(raw), 150), rng.integers(0, 8, 150)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1:])
        try:
            after = findings(tmp_path)
            report.write_summary_csv(Results(STUDY, tmp_path))
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and re.search(r"-seed\d|runs.jsonl: line", str(error)), (at, bit)
        else:
            same = [shape(json.loads(line)) for text in (raw, path.read_text(errors="replace"))
                    for line in (text.splitlines() if name.endswith("l") else [text])]
            half = len(same) // 2
            assert after == before or same[:half] == same[half:], (at, bit)
    assert refused > 50


@pytest.mark.parametrize("name, place, value", [
    ("config", ["training"], 5), ("config", ["training", "batch_size"], "8"), ("config", ["domains"], None),
    ("config", ["domains"], [1]), ("config", ["corpus", "prose"], []), ("config", ["seed"], "0"),
    ("config", ["corpus", "prose", "entropy_rate"], "high"), ("config", ["model", "router"], None),
    ("config", ["model", "aux_coef"], "0"), ("config", ["parameters"], None), ("config", ["versions"], "3.11"),
    ("config", ["versions"], None), ("summary", ["seconds"], "a"), ("summary", ["measured"], [1]),
    ("summary", ["measured"], {"noise_share": "a"}),
    ("summary", ["final", "layers"], None), ("summary", ["final", "layers"], [1]), ("summary", ["final", "layers"], []),
    ("summary", ["final", "layers", 0, "load"], "25"), ("summary", ["final", "layers", 0, "load"], [25, 25]),
    ("summary", ["final", "layers", 0, "load_cv"], "0"), ("summary", ["final", "layers", 0, "domain_load"], [25]),
    ("summary", ["final", "causal_perplexity"], [1]), ("summary", ["final", "validation_tokens"], None),
    ("config", ["extended"], 5), ("config", ["extended"], [{"step": 1}]), ("config", ["imports"], 5),
    ("config", ["imports"], [{}]), ("config", ["rules"], 5), ("config", ["training", "steps"], None),
    ("config", ["corpus"], {}), ("config", ["corpus", "prose", "train_bytes"], 0), ("config", ["threads"], 0),
    ("config", ["corpus", "prose", "sha256"], 5), ("config", ["model", "capacity_factor"], 0),
    ("summary", ["final", "causal_cross_entropy"], math.nan), ("summary", ["measured"], {"table": [math.inf]}),
    ("summary", ["final", "layers", 0, "load"], [-1, 1, 1, 1]), ("summary", ["final", "step"], 10**40),
    ("summary", ["final", "layers", 0, "load"], [10**40] * 4), ("summary", ["final", "layers", 0, "domain_load"], []),
    ("summary", ["final", "layers", 0, "load_cv"], 1e308), ("summary", ["final", "validation_tokens"], 0)])
def test_a_value_of_another_type_is_refused_by_the_name_of_the_run(tmp_path, name, place, value):
    path = write_run(tmp_path, "A", 0, 2.0) / f"{name}.json"
    whole = part = json.loads(path.read_text())
    for step in place[:-1]:
        part = part[step]
    part[place[-1]] = value
    path.write_text(json.dumps(whole))
    refused = CliRunner().invoke(cli.main, ["study", "--plot-only", "--out", str(tmp_path)])
    assert refused.exit_code == 1 and "A-seed0 is a finished run with damaged files" in refused.output
    assert refused.output.count("\n") == 1


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_no_result(tmp_path, number):
    """Would have caught: `report` and `compare` of a finished run whose loss is NaN, and `finished nan` in `runs`."""
    folder = write_run(tmp_path, "A", 0, 2.0)
    compact(tmp_path)
    for path in (tmp_path / "runs.jsonl", folder / "log.jsonl", folder / "summary.json"):
        path.write_text(re.sub('"causal_cross_entropy": [^,]+', f'"causal_cross_entropy": {json.dumps(number)}',
                               path.read_text()))
    assert rows.overview(tmp_path)[0]["loss"] is None
    for damaged in ("runs.jsonl: line 1 is damaged", "A-seed0 is a finished run with damaged files"):
        for command in ("study --plot-only --out", "compact", "compare", "report", "rows"):
            refused = CliRunner().invoke(cli.main, [*command.split(), str(tmp_path)])
            assert refused.exit_code == 1 and damaged in refused.output and refused.output.count("\n") == 1
        (tmp_path / "runs.jsonl").unlink(missing_ok=True)
    (folder / "summary.json").unlink()
    assert load_runs(tmp_path)[0].log == []  # it is not finished: such rows are left out


def test_runs_that_measured_other_numbers_are_refused(tmp_path):
    for seed in (0, 1):
        path = write_run(tmp_path, "A", seed, 2.0) / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"measured": {f"drop_cost{'x' * seed}": 0.5}}))
    with pytest.raises(ValueError, match="A-seed0 and A-seed1 differ in their measured"):
        findings(tmp_path)


def test_rows_of_before_a_metric_existed_lack_its_numbers(tmp_path):
    """As in a run that was resumed by a newer version."""
    path = write_run(tmp_path, "A", 0, 2.0) / "log.jsonl"
    first, *others = read_rows(path)
    del first["layers"][0]["drop_rate"], first["causal_by_domain"]
    write_rows(path, [first, *others])
    (run,) = load_runs(tmp_path)
    assert [quantities.in_row(one, "drop_rate") for one in run.log] == pytest.approx([math.nan, 0, 0], nan_ok=True)
    assert "A-seed0" in findings(tmp_path)
    for one in (rows := read_rows(path)):  # it was stopped after its last row
        one.pop("causal_by_domain", None)
    write_rows(path, rows)
    assert "A-seed0" in findings(tmp_path)
    rows[-1]["causal_by_Domain"] = {}
    write_rows(path, rows)
    with pytest.raises(ValueError, match="A-seed0 is a finished run with damaged files"):
        findings(tmp_path)


def test_a_loss_that_only_some_settings_have_is_a_dash_for_the_others(tmp_path):
    results = Results(STUDY, write_study(tmp_path, n_seeds=1, losses={"A": (1.9,)}))
    assert results.cell("importance", "A") == results.cell("multi_token", "A") == "–"


def test_the_loss_of_a_domain_has_a_leaky_twin(tmp_path):
    """E: 1.45, 1.55 and 1.65 in prose, half width as in the first test; routed as in training 1 in each seed."""
    results = Results(STUDY, write_study(tmp_path, losses={"E": LOSSES["E"]}))
    assert results.cell("causal_cross_entropy:prose", "E") == "1.550 ± 0.248 (leaky –)"
    for run in results.runs:
        run.final["val_by_domain"] = {"prose": 1.0}
    assert results.cell("causal_cross_entropy:prose", "E") == "1.550 ± 0.248 (leaky 1.000)"


def test_the_rate_that_was_taken_is_that_of_the_runs(tmp_path):
    """All runs have 0.001. The sweep chose it for A, and 0.002 for B; C has no run."""
    results = Results(STUDY, write_study(tmp_path, n_seeds=1, losses={"A": (1.9,), "B": (1.5,)}))
    assert "sweep chose" not in "".join(caveats.warnings(results))
    results.sweep = {"A": {0.001: 1.0, 0.002: 2.0}, "B": {0.001: 2.0, 0.002: 1.0}, "C": {0.001: 2.0, 0.002: 1.0}}
    taken = [line.split(" | ")[-2].split(",")[0] for line in tables.sweep_table(results).splitlines()[2:]]
    assert taken == ["0.001", "0.001", "0.002"]
    results.experiment = dataclasses.replace(STUDY, rates=(0.001, 0.002))
    assert "The learning rate is not the one that the sweep chose (B 0.001, not 0.002)." in caveats.warnings(results)
    for chose_nothing in ({0.002: 1.0}, {0.001: math.inf, 0.002: math.inf}):
        results.sweep = {"B": chose_nothing}
        assert "sweep chose" not in "".join(caveats.warnings(results))


def test_a_p_value_never_looks_like_the_level():
    assert [tables.two_digits(p) for p in (0.0503, 0.0497, 0.051, 0.5)] == ["0.0503", "0.0497", "0.051", "0.5"]
    assert [tables.two_digits(p) for p in (0.04997, 0.05002, 0.05, math.nan)] == ["0.04997", "0.05002", "0.05", "nan"]


def test_a_loss_that_falls_nowhere_has_no_steepest_slope(tmp_path):
    results = Results(STUDY, write_study(tmp_path, n_seeds=1, losses={"A": (1.9,)}))
    results.runs[0].log[1]["step"] = 15  # with 1.95; and 1.9 at step 20
    assert "falling in 1 of 1 settings (steepest: -1.000 nats in 100 steps). A" in " ".join(caveats.limits(results))
    for one in results.runs[0].log:
        one["causal_cross_entropy"] = one["step"]
    assert "falling in 0 of 1 settings. A longer run" in " ".join(caveats.limits(results))


def test_a_claim_without_a_number_is_in_no_gathered_table(tmp_path):
    claim = Claim(None, "mine", "me", (Effect("load_cv", "A", ">", 1),))
    own = dataclasses.replace(STUDY, adjustable=False, claims=(claim,))
    results = Results(own, write_study(tmp_path))
    assert tables.claim_rows(results)[0][0] == "–"
    assert "mine (me)" not in "".join(gathered.document([results], [], tmp_path))


def test_what_decides_all_is_a_lower_bound_where_a_number_of_seeds_is_unknown():
    """One comparison is not known in 3 seeds; 100 seeds would decide it, or over 1,000, or an unknown number."""
    run = types.SimpleNamespace(config={}, wall_seconds=36.0, state="finished", summary={})  # 0.01 core-hours
    def said(needed, between=False):
        one, other = (types.SimpleNamespace(verdict="not known", needed=n, between=between and n == needed, tested=True,
                                            contrast=Contrast("load_cv", "A")) for n in (needed, 100))
        questions = [types.SimpleNamespace(question=text) for text in ("one?", "other?")]
        experiment = types.SimpleNamespace(settings=[types.SimpleNamespace(id="A", start=None)], primary=questions,
                                           first_seed=0)
        return gathered.cost([types.SimpleNamespace(primary=[one, other], experiment=experiment, groups={"A": [run]},
                                                    runs=[run], sweep_runs=[], all_runs=[run])])

    assert "would take about 2 core-hours" in said(100)
    assert "would take at least 11 core-hours" in said(None) and "would take at least 1 core-hours" in said(2, True)


def test_nothing_measured_may_be_written_as_null(tmp_path):
    path = write_run(tmp_path, "A", 0, 2.0) / "summary.json"
    before = findings(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"measured": None}))
    assert findings(tmp_path) == before


def test_places_are_counted_in_the_loads(tmp_path):
    """Would have caught: a model whose n_copy is null. 100 assignments of 50 bytes: K = 2, in 2.5 places a byte."""
    change(write_run(tmp_path, "E", 0, 2.0), "model", capacity_factor=1.25, n_copy=None)
    assert quantities.value(load_runs(tmp_path)[0], "padding") == pytest.approx(1 - 2 / 2.5) and findings(tmp_path)
    assert markdown.enumerated([0, 1, 10**15]) == "0, 1, 1,000,000,000,000,000"


@pytest.mark.filterwarnings("ignore:Glyph")
def test_text_of_rows_is_escaped_in_the_findings(tmp_path):
    bad = "a|b <img src=x> `c` **d** [e](f) $g$\n\n# h \x1b[31m"
    write_study(tmp_path, n_seeds=1, losses={"A": (2.0,), "B": (1.5,), "D": (1.7,)})
    for name in "AB":
        folder = tmp_path / f"runs/{name}-seed0"
        change(folder, "model", router=bad, **{bad: name})
        change(folder, None, domains=[bad, "verse"])
        for path in (folder / "log.jsonl", folder / "summary.json"):
            path.write_text(path.read_text().replace('"prose"', json.dumps(bad)))
    change(tmp_path / "runs/A-seed0", "versions", **{bad: bad})
    (tmp_path / "runs/D-seed0/summary.json").rename(tmp_path / "runs/D-seed0/failure.json")
    (tmp_path / "runs/D-seed0/failure.json").write_text(json.dumps({"reason": bad}))
    (tmp_path / "runs" / bad.replace("/", "")).mkdir()
    text = findings(tmp_path)
    assert draw_all(tmp_path)  # dollar signs are no formula
    for markup in ("<img", "**d**", "`c`", "](f)", "$g", "\n# h", "\x1b"):
        assert markup not in text
    assert len({line.count("|") for line in text.split("\n\n| setting |")[1].split("\n\n")[0].splitlines()[1:]}) == 1


# -- compact results --

def test_compact_results_are_read_as_the_folders_are(tmp_path):
    write_study(tmp_path)
    (tmp_path / "runs/C-seed2/summary.json").rename(tmp_path / "runs/C-seed2/failure.json")
    (tmp_path / "runs/D-seed1/summary.json").unlink()
    before, runs = findings(tmp_path), [run for run in load_runs(tmp_path) if run.run_id != "D-seed1"]
    assert compact(tmp_path) == (tmp_path / "runs.jsonl", 20) and findings(tmp_path) == before  # both: nothing twice
    shutil.rmtree(tmp_path / "runs")
    assert load_runs(tmp_path) == runs
    assert findings(tmp_path) == before.replace("**`D-seed1` is not finished and is in no number.**\n\n", "")


def test_a_run_that_went_on_after_it_was_made_compact_is_refused(tmp_path):
    folder = write_run(tmp_path, "A", 0, 2.0)
    compact(tmp_path)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"threads": 1', '"threads": 2'))
    with pytest.raises(ValueError, match="A-seed0 is in runs.jsonl and in runs/, and they differ"):
        load_runs(tmp_path)


def test_rules_that_can_no_longer_be_said_make_no_other_run(tmp_path):
    """runs.jsonl keeps the rules as they were; the folder says them by the file of its router as it is now."""
    folder = write_run(tmp_path, "E", 0, 2.0)
    path, _ = compact(tmp_path)
    text = path.read_text()
    path.write_text(re.sub('"rules": "[^"]+"', '"rules": ""', text))
    assert path.read_text() != text
    assert [run.run_id for run in load_runs(tmp_path)] == [folder.name]


@pytest.mark.parametrize("damage", [lambda text: text[:-20], lambda text: text + "[]\n", lambda text: text + "{}\n",
                                    lambda text: text.replace('"log": [', '"log": [5, '),
                                    lambda text: text.replace('"summary": {', '"summary": [{').replace('}, "failure"',
                                                                                                       '}], "failure"'),
                                    lambda text: text.replace('"step": 20', '"step": 19')])
def test_a_damaged_compact_file_is_in_no_mean(tmp_path, damage):
    write_study(tmp_path, n_seeds=1)
    path, _ = compact(tmp_path)
    shutil.rmtree(tmp_path / "runs")
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match="damaged"):
        load_runs(tmp_path)


def test_the_command_makes_compact_results_or_says_why_not(tmp_path):
    refused = CliRunner().invoke(cli.main, ["compact", str(tmp_path)])
    assert refused.exit_code == 1 and "no finished run" in refused.output
    write_run(tmp_path, "A", 0, 2.0)
    made = CliRunner().invoke(cli.main, ["compact", str(tmp_path)])
    assert made.exit_code == 0 and "1 runs in" in made.output
    failed = write_run(tmp_path, "B", 1, 2.0)  # and its config.json is cut
    (failed / "summary.json").unlink()
    (failed / "failure.json").write_text("{}")
    (failed / "config.json").write_text("{")
    for _ in "twice":
        CliRunner().invoke(cli.main, ["compact", str(tmp_path)])
        assert [run.run_id for run in load_runs(tmp_path)] == ["A-seed0", "B-seed1"]


# -- what is averaged and compared is comparable --

def change(path, part, **fields):
    config = json.loads((path / "config.json").read_text())
    config |= {part: config[part] | fields} if part else fields
    (path / "config.json").write_text(json.dumps(config))


def test_runs_of_one_letter_with_other_models_are_refused(tmp_path):
    write_study(tmp_path)
    change(tmp_path / "runs/D-seed1", "model", seq_len=32)
    with pytest.raises(ValueError, match=r"D-seed0 and D-seed1 differ in their model \(seq_len: 16, 32\)"):
        findings(tmp_path)
    refused = CliRunner().invoke(cli.main, ["study", "--plot-only", "--out", str(tmp_path)])
    assert refused.exit_code == 1 and "differ in their model" in refused.output


def test_seeds_of_two_versions_of_a_users_file_are_refused(tmp_path):
    write_study(tmp_path, losses={"B": LOSSES["B"]})
    for seed in range(3):
        change(tmp_path / f"runs/B-seed{seed}", None, imports=[{"path": f"/{seed}/own.py", "sha256": "a" * 64}])
    Results(STUDY, tmp_path)
    change(tmp_path / "runs/B-seed1", None, imports=[{"path": "/1/own.py", "sha256": "b" * 64}])
    with pytest.raises(ValueError, match=r"B-seed0 and B-seed1 differ in their imports \(own.py: a{12}, b{12}\)"):
        Results(STUDY, tmp_path)


@pytest.mark.parametrize("name, other", [
    ("corpus", dict.fromkeys(("prose", "verse"), {"bytes": 1000, "train_bytes": 800, "sha256": "0"})), ("start", "A")])
def test_runs_of_another_text_or_start_are_refused(tmp_path, name, other):
    write_study(tmp_path, losses={"B": LOSSES["B"]})
    change(tmp_path / "runs/B-seed1", None, **{name: other})
    with pytest.raises(ValueError, match=f"differ in their {name}"):
        Results(STUDY, tmp_path)


def test_settings_that_differ_between_letters_are_said(tmp_path):
    write_study(tmp_path, losses={name: LOSSES[name] for name in "BCD"})
    assert "compare with care" not in findings(tmp_path)
    for seed in range(3):
        change(tmp_path / f"runs/C-seed{seed}", "model", seq_len=32)
        change(tmp_path / f"runs/C-seed{seed}", "training", learning_rate=2e-3)
        change(tmp_path / f"runs/D-seed{seed}", "model", router="hash")
    change(tmp_path / "runs/B-seed1", None, all_versions=[{"python": "3.11"}, {"python": "3.12"}])  # when it resumed
    change(tmp_path / "runs/B-seed1", None, kernels="numpy", threads=2)
    for run, kinds in (("B-seed0", {"processor": "one"}), ("B-seed1", {"processors": ["one", "two"]})):
        path = tmp_path / "runs" / run / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | kinds))
    text = findings(tmp_path)
    assert "The runs used 2 kinds of processor, so last bits can differ (one; two)." in text
    assert "seq_len differs between settings (B 16, C 32, D 16): compare with care." in text
    assert "learning_rate differs between settings (B 0.001, C 0.002, D 0.001): compare with care." in text
    assert "D was changed: router is hash, not top_k" in text
    assert all(f"do not share the same {name}" in text for name in ("versions", "kernels", "threads"))


def test_what_set_and_import_added_is_said(tmp_path):
    """Of all settings in one sentence, of one setting beside it; imported files stand by the versions."""
    write_study(tmp_path, losses={name: LOSSES[name] for name in "AB"})
    assert "A was changed" not in findings(tmp_path)
    for seed in range(3):
        for name in "AB":
            change(tmp_path / f"runs/{name}-seed{seed}", "model", d_model=48)
        change(tmp_path / f"runs/A-seed{seed}", "model", router="near_best", losses={"kl_balance": 0.02})
        change(tmp_path / f"runs/A-seed{seed}", None,
               imports=[{"path": "/there/near_best.py", "sha256": "0123456789abcdef"}])
    text = findings(tmp_path)
    assert "**All settings were changed: seq_len is 16, not 128; d_model is 48, not 128; " in text
    assert "**A was changed: router is near_best, not top_k; losses are {'kl_balance': 0.02}, not {}.**" in text
    assert "| A near_best, K=1, aux 0, kl_balance 0.02 | no load balancing (but changed, see above) |" in text
    assert "| B top_k, K=1, aux 0.01 | light balancing |" in text
    assert " Imports: near_best.py (sha256 0123456789ab)." in text


ROUTER = """from tinymoe.moe.routers import LinearRouter
class OfAFile(LinearRouter, name="of_a_file"):
    pass
"""


def test_a_router_of_a_file_is_loaded_again_or_said_to_be_unknown(tmp_path, monkeypatch):
    """As long as the file is as it was, and was imported here before: a folder from elsewhere brings no code along."""
    monkeypatch.setattr(user_files, "IMPORTED", set())
    monkeypatch.setattr(user_files, "LIST", tmp_path / "imports")
    user_files.LIST.write_text(hashlib.sha256(ROUTER.encode()).hexdigest())
    path, study = tmp_path / "of_a_file.py", tmp_path / "study"
    folder = write_run(study, "A", 0, 2.0)
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {
        "model": ModelConfig(top_k=1, aux_coef=0.0).to_dict() | {"router": "of_a_file"},
        "imports": [{"path": str(path), "sha256": hashlib.sha256(ROUTER.encode()).hexdigest()}]}))
    compact(study)
    said = "The router of_a_file is unknown, so parameters and FLOPs of its model are not counted: name its file with"
    try:
        for text in ("1", None, ROUTER):
            path.unlink(missing_ok=True)
            if text:
                path.write_text(text)
            assert (said in findings(study)) is (text != ROUTER)
            assert (said in " ".join(compare.cautions(compare.groups([study])))) is (text != ROUTER)
        assert math.isfinite(quantities.value(load_runs(study)[0], "megaflops"))
        assert "A was changed: router is of_a_file, not top_k" in findings(study)
        forget("of_a_file")
        shutil.rmtree(study / "runs")
        assert said not in findings(study)  # from runs.jsonl alone
        forget("of_a_file")
        user_files.LIST.unlink()
        assert said in findings(study) and "of_a_file" not in ROUTERS
    finally:
        ROUTERS.pop("of_a_file", None)
        identity.execute_files.cache_clear()


def test_runs_beside_the_plan_are_told_with_the_command_that_works(tmp_path):
    """Steps and seeds of the plan without its sweep: `--full` in the same folder would refuse the rates of the runs."""
    write_study(tmp_path)

    def said(**changed):
        results = Results(dataclasses.replace(STUDY, **{"steps": 20, "seeds": 3, "rates": ()} | changed), tmp_path)
        return [one for one in caveats.beside_the_plan(results) if not one.startswith("No plan")]

    assert said() == []
    assert said(rates=(1e-3, 2e-3)) == ["The plan has 3 seeds of 20 steps, with a learning rate chosen for each "
                                        "setting: `--full` runs it in a folder of its own."]
    assert said(steps=40) == ["The plan has 3 seeds of 40 steps: `--full` runs it in a folder of its own."]
    assert said(seeds=5) == ["The plan has 5 seeds of 20 steps: `--full` runs it.",
                             "3 seeds ran, the plan has 5: the p values do not allow for a look in between."]
    assert said(seeds=2) == ["3 seeds ran, the plan has 2: the p values do not allow for a look in between."]
    longer = [dataclasses.replace(s, length=2) if s.id == "C" else s for s in STUDY.settings]
    assert said(settings=tuple(longer)) == [
        "The plan has 3 seeds of 20 steps: `--full` runs it in a folder of its own."]  # C has 20 steps instead of 40


def test_not_known_says_what_would_be_seen():
    def said(*values):
        (one,) = corrected([Comparison(Contrast("loss", "a", minus="b"), values, 0.01)], holm)
        return one, tables.how_sure(one)

    one, text = said(0.01, 0.03, -0.02)
    assert text == f" (an effect of {one.smallest:.3f} would be seen; 3 seeds)"


def test_a_difference_smaller_than_the_margin_is_said_to_be_so():
    one = STUDY.primary[0]
    (found,) = corrected([Comparison(one.contrast, (0.004, 0.005, 0.006), 0.01)], holm)
    assert one.sentence(found) == ("Heavy balancing raises the loss. "
                                   "But the difference is smaller than the margin of 0.01.")
    (found,) = corrected([Comparison(one.contrast, (0.011, 0.012, 0.013), 0.01)], holm)  # the interval begins at 0.0095
    assert one.sentence(found) == ("Heavy balancing raises the loss. "
                                   "The difference may be smaller than the margin of 0.01.")
    (found,) = corrected([Comparison(one.contrast, (0.111, 0.112, 0.113), 0.01)], holm)
    assert one.sentence(found) == "Heavy balancing raises the loss."


def test_settings_are_ranked_from_the_smallest_mean(tmp_path):
    results = Results(STUDY, write_study(tmp_path, losses={name: LOSSES[name] for name in "ABD"}))
    assert results.ranked("causal_cross_entropy") == ["D", "B", "A"]


def test_runs_of_no_setting_are_named_and_in_no_number(tmp_path):
    write_study(tmp_path, losses={"B": LOSSES["B"]})
    before = findings(tmp_path)
    shutil.copytree(tmp_path / "runs/B-seed0", tmp_path / "runs/Q-seed0")
    for name in ("config.json", "summary.json"):
        path = tmp_path / "runs/Q-seed0" / name
        path.write_text(path.read_text().replace('"B-seed0"', '"Q-seed0"').replace('"config_id": "B"',
                                                                                   '"config_id": "Q"'))
    assert [line for line in findings(tmp_path).splitlines() if line not in before.splitlines()] == [
        "**`Q-seed0` is no setting of this experiment and is in no number.**"]


# -- figures --

@pytest.mark.slow
def test_the_users_matplotlibrc_does_not_reach_the_figures(tmp_path):
    """draw_all sets the style once for all figures, so two of them show it: lines, and a map of colours."""
    few = dataclasses.replace(STUDY, figures={name: STUDY.figures[name] for name in ("over_steps", "expert_load")})
    results = Results(few, write_study(tmp_path, n_seeds=1, losses={name: LOSSES[name] for name in "AD"}))
    drawn = {path.name: path.read_bytes() for path in figures.draw_all(results)}
    assert len(drawn) == 2
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "lines.linewidth": 9, "axes.facecolor": "red"}):
        assert {path.name: path.read_bytes() for path in figures.draw_all(results)} == drawn
        assert matplotlib.rcParams["font.size"] == 30  # and it stays as it was


def test_ratios_by_hand():
    """Shares (1/2, 1/2) and (1, 0), a row without counts: their mean is (1/2, 1/6), the ratios (1, 3) and (2, 0)."""
    np.testing.assert_allclose(maps.over_column_means([[5, 5], [3, 0], [0, 0]]), [[1, 3], [2, 0], [0, 0]])


def test_the_load_is_drawn_as_log2_of_its_ratio_to_the_fair_share_with_expert_0_on_top(tmp_path):
    """A sends all to expert 0 of 4, at each of three steps: log2 4."""
    results = Results(STUDY, write_study(tmp_path, n_seeds=1, losses={"A": (2.0,)}))
    with figures.default_style():
        axes = maps.expert_load(results).axes[0]
    assert np.reshape(axes.collections[0].get_array(), (4, 3))[0].tolist() == [2, 2, 2]
    bottom, top = axes.get_ylim()
    assert bottom > top


def test_a_setting_may_be_drawn_less_a_reference_of_its_own(tmp_path):
    """B less A is -0.367 and D less C its own difference; A and C are their own references."""
    results = Results(STUDY, write_study(tmp_path))
    partner = {"A": "A", "B": "A", "C": "C", "D": "C"} | {name: name for name in results.groups if name > "D"}
    draw = figures.at_the_end(quantities.LOSS, reference="its partner", reference_of=partner.get)
    with figures.default_style():
        axes = draw(results).axes[0]
    def loss(name):
        return results.mean(quantities.LOSS, name)

    means = [np.ravel(line.get_xdata())[0] for line in axes.lines if line.get_markersize() == 5]
    assert means[:4] == pytest.approx([loss(name) - loss(partner[name]) for name in "ABCD"])
    assert axes.get_xlabel().replace("\n", " ") == "causal loss (nats) minus that of its partner"
    assert draw.caption(results).startswith("Causal loss (nats) minus that of its partner, at the end")


def test_a_layer_of_one_expert_has_no_numbers():
    """A dense layer: its load would look perfectly balanced."""
    one, two = ({"load": load, "load_cv": 0.0, "load_entropy": 1.0} for load in ([8], [4, 4]))
    names = ("load_cv", "effective_experts", "load_entropy")
    assert all(math.isnan(quantities.in_row({"layers": [one]}, name)) for name in names)
    assert [quantities.in_row({"layers": [two]}, name) for name in names] == pytest.approx([0, 2, 1])


def test_a_phase_diagram_has_shares_of_the_experts_and_marks_intervals_that_hold_the_half():
    """Settings a, b, c, d of 4 experts: x is 10, 20, 10, 20 and y is 1, 1, 2, 2."""
    effective = {"a": (1.0, 0.1), "b": (2.5, 1.0), "c": (3.0, 0.1), "d": (3.5, 2.0)}  # mean, half of the interval
    results = types.SimpleNamespace(interval=lambda metric, name: Interval(*effective[name], 4))
    draw = maps.diagram({"a": (4, 10, 1), "b": (4, 20, 1), "c": (4, 10, 2), "d": (4, 20, 2)}, "x", "y")
    with figures.default_style():
        axes = draw(results).axes[0]
    assert np.reshape(axes.collections[0].get_array(), (2, 2)).tolist() == [[0.25, 0.625], [0.75, 0.875]]
    assert [text.get_text() for text in axes.texts] == ["1.0", "2.5?", "3.0", "3.5?"]


def test_names_beside_points_do_not_overlap_and_keep_their_order(tmp_path):
    results = Results(STUDY, write_study(tmp_path, n_seeds=1))
    with figures.default_style():
        _, ((axes,),) = figures.panel_grid(1, 1, 3)
        axes.set_ylim(0, 1)
        figures.name_points(axes, results, {"A": (0, .99), "B": (0, .985), "C": (0, .5), "D": (0, .5), "E": (0, .5)})
        figures.name_points(axes, results, {"F": (0, np.nan)})
        figures.name_points(axes, results, {})
    places = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert len(places) == 5 and places["A"] == 1 and places["C"] == .5  # the highest stays within the panel
    gaps = np.diff([places[name] for name in "CDEBA"])
    assert (gaps > 0.04).all() and places["A"] - places["B"] == pytest.approx(places["E"] - places["D"])


def test_a_legend_of_long_labels_stays_within_the_figure(tmp_path):
    results = Results(STUDY, write_study(tmp_path, n_seeds=1))
    results.label = lambda name: f"{name} top_k, K=2, renormalise=false, one option more"
    with figures.default_style():
        fig = STUDY.figures["over_steps"](results)
        fig.canvas.draw()
    (legend,), width = fig.legends, fig.bbox.width
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= width


def test_text_is_drawn_on_the_colours_of_its_experts(tmp_path):
    """Expert 1 has the larger gate of 'a', 0 alone is chosen for 'b', and 'c' has none."""
    write_study(tmp_path, n_seeds=2, losses={"D": (1.5, 1.5)})
    draw, arrays = maps.routes("D"), {
        "ids": np.frombuffer(b"abc", np.uint8)[None], "domain": np.zeros(1, np.int32),
        "chosen": np.array([[[1, 1], [1, 0], [0, 0]]], bool),
        "gates": np.array([[[.4, .6], [.2, .9], [0, 0]]], np.float16)}
    assert draw(Results(STUDY, tmp_path)) is None
    for path in (tmp_path / "routings/D-seed1.npz", tmp_path / "runs/D-seed1/routings/000020.npz"):
        path.parent.mkdir()
        save_arrays(path, arrays, {"kind": "routings", "names": ["prose"], "model": {"moe_layers": [1]}})
        with figures.default_style():
            (axes,) = draw(Results(STUDY, tmp_path)).axes
        assert axes.get_title("right") == "D-seed1"
        assert [text.get_text() for text in axes.texts] == ["a", "1", "b", "0", "c", "–"]
        assert [matplotlib.colors.to_hex(box.get_facecolor()).upper() for box in axes.patches] == [
            palette.EXPERTS[1], palette.EXPERTS[0], "#FFFFFF"]
        path.unlink()


def test_curves_say_on_how_much_text_they_were_measured(tmp_path):
    results = Results(STUDY, write_study(tmp_path, n_seeds=2))
    said = ("Causal loss (nats) minus that of D, over the training steps: lines are means over the seeds, "
            "coloured bands go from the lowest seed to the highest.")
    outside = " The first evaluations may lie outside the frame."
    assert report.caption(results, "over_steps") == said + outside
    for run in results.runs:
        run.final["validation_tokens"] = 4096
    assert report.caption(results, "over_steps").endswith(
        " A point is measured on 100 validation bytes, a number of the tables on 4,096." + outside)
    assert figures.measured_on(results, ["cross_entropy"]) == (
        " A point of the training loss is the mean over the steps since the point before. "
        "Another point is measured on 100 validation bytes, a number of the tables on 4,096.")


def test_the_frame_of_a_loss_holds_the_ends_of_all_curves(tmp_path):
    """Would have caught: the hollow curve of expert choice, the leaky loss, lay below the frame."""
    with figures.default_style():
        (axes,) = STUDY.figures["over_steps"](Results(STUDY, write_study(tmp_path, n_seeds=1))).axes
    low, high = axes.get_ylim()
    assert len(axes.lines) > len(LOSSES)  # the causal curves, and a hollow one
    assert all(low < line.get_ydata()[-1] < high for line in axes.lines if len(line.get_ydata()) == 3)


def test_captions_say_what_one_seed_cannot_have_and_what_lies_outside(tmp_path):
    results = Results(STUDY, write_study(tmp_path, n_seeds=1))
    assert report.caption(results, "over_steps") == ("Causal loss (nats) minus that of D, over the training steps. The "
                                                     "first evaluations may lie outside the frame.")
    assert figures.over_steps("D", "load_cv").caption(results) == "Load CV, over the training steps."
    del results.groups["D"]  # as in a study of some configs
    assert report.caption(results, "over_steps").startswith("Causal loss (nats), over the training steps.")
    results.groups["D"] = [run for run in results.all_runs if run.config_id == "D"]
    assert report.caption(results, "router_entropy").endswith(", for each MoE layer over the training steps.")
    with figures.default_style():
        fig = STUDY.figures["at_the_end"](results)
    assert not fig.legends or "hollow" in fig.legends[0].get_texts()[0].get_text()


def test_a_figure_and_its_caption_have_the_metrics_that_some_setting_has(tmp_path):
    """All loads are equal, so the load CV is 0; nothing measured the function divergence."""
    results = Results(STUDY, write_study(tmp_path, n_seeds=1, losses={"B": (1.5,)}))
    draw = figures.at_the_end("load_cv", "function_divergence")
    assert draw.caption(results) == "Load CV, at the end of training, for each setting."
    draw = figures.by_layer("load_cv", "router_entropy")
    assert draw.caption(results) == "Router entropy (nats), for each MoE layer over the training steps."
    draw = figures.at_the_end("function_divergence")
    assert draw(results) is None and draw.caption(results).startswith("Function divergence, at the end")


def test_figures_of_other_runs_are_left_out_and_that_is_said(tmp_path):
    """Whatever the times of files are."""
    write_study(tmp_path, n_seeds=2, losses={name: LOSSES[name] for name in "AD"})
    name, draw = next(iter(STUDY.figures.items()))
    few = dataclasses.replace(STUDY, figures={name: draw})
    figures.draw_all(Results(few, tmp_path))
    image = f"(figures/{name}.png)"
    assert image in findings(tmp_path)
    other = dataclasses.replace(few, figures={name: figures.over_steps("A", "load_cv")})
    assert report.drawn(Results(other, tmp_path)) == {name: False}
    compact(tmp_path)
    shutil.rmtree(tmp_path / "runs")
    assert image in findings(tmp_path)
    write_run(tmp_path, "A", 2, 2.1)
    text = findings(tmp_path)
    assert image not in text and "No figures yet" not in text
    assert text.splitlines()[2] == ("Figures without the mark of these runs and captions are left out: `--plot-only` "
                                     "draws them again.")


def test_the_margin_that_is_shaded_is_that_of_the_comparison(tmp_path):
    """C - A has a margin of 0.02 and E - G one of 0.03: the smaller; 0.01 without one; none with one seed."""
    def shaded(n_seeds, *margins):
        primary = [dataclasses.replace(one, margin=margin) for one, margin in zip(STUDY.primary[::2], margins)]
        experiment = dataclasses.replace(STUDY, primary=tuple(primary))
        folder = tmp_path / str(n_seeds)
        with figures.default_style():
            axes = STUDY.figures["at_the_end"](Results(experiment, folder)).axes[0]
        return [tuple(patch.get_extents().transformed(axes.transData.inverted()).intervalx) for patch in axes.patches]

    for n_seeds in (1, 2):
        write_study(tmp_path / str(n_seeds), n_seeds)
    assert shaded(2, 0.02, 0.03) == [pytest.approx((-0.02, 0.02))]
    assert shaded(2) == [pytest.approx((-0.01, 0.01))] and shaded(1, 0.02) == []


def test_findings_and_summary_do_not_wait_for_figures(tmp_path, monkeypatch):
    write_study(tmp_path, n_seeds=1)

    def broken(*_):
        raise OSError("no room for figures")

    monkeypatch.setattr(figures, "save", broken)
    failed = CliRunner().invoke(cli.main, ["study", "--plot-only", "--out", str(tmp_path)])
    assert failed.exit_code == 1 and "no room for figures" in failed.output
    assert (tmp_path / "FINDINGS.md").exists() and (tmp_path / "summary.csv").exists()


def test_a_colour_costs_no_matplotlib():
    code = "import sys, tinymoe.study.palette as p; assert p.COLOURS and 'matplotlib' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_quantity_is_added_in_one_place(tmp_path, monkeypatch):
    """The largest share of the load: C has 25 of 100, A all. It is read by tables, figures and summary.csv alike."""
    write_study(tmp_path)
    new = quantities.Quantity("top_share", "largest share of the load", digits=2,
                              of=lambda layer: max(layer["load"]) / sum(layer["load"]))
    monkeypatch.setitem(quantities.QUANTITIES, "top_share", new)
    results = Results(STUDY, tmp_path)
    assert results.cell("top_share", "A") == "1.00" and results.cell("top_share", "C") == "0.25"
    with open(report.write_summary_csv(Results(STUDY, tmp_path))) as file:
        assert {line["config_id"]: line["top_share"] for line in csv.DictReader(file)}["C"] == "0.25"
    with figures.default_style():
        assert figures.over_steps("A", "top_share")(results).axes[0].get_ylabel() == "largest share of the load"


def test_the_rules_of_expert_choice_stand_beside_its_numbers(tmp_path):
    """Causal numbers of before there were thresholds are those of the prefix rule."""
    new = ModelConfig(router="expert_choice", top_k=2, aux_coef=0).to_dict()
    old = {name: value for name, value in new.items() if name != "shared_gate"}
    for i, (model, rules) in enumerate((
            (new, "by batch, causal by threshold"), (old, "by batch, causal by prefix"),
            (new | {"router_options": {"causal_rule": "prefix"}}, "by batch, causal by prefix"),
            (new | {"router_options": {"rule": "threshold"}}, "by threshold"))):
        folder = write_run(tmp_path / str(i), "E", 0, 1.5)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model": model}))
        assert [made_of([run]) for run in load_runs(tmp_path / str(i))] == [f"expert_choice {rules}, K=2, aux 0"]
        compact(tmp_path / str(i))
        shutil.rmtree(tmp_path / str(i) / "runs")
        assert [run.rules for run in load_runs(tmp_path / str(i))] == [rules]
        assert f"E expert_choice {rules}" in findings(tmp_path / str(i))


def test_settings_that_differ_in_an_option_of_their_router_have_different_labels():
    models = [ModelConfig(router_options=options).to_dict() for options in ({}, {"renormalise": False})]
    final = {"layers": [{"load": [2]}], "validation_tokens": 1}
    labels = [made_of([RunRecord("A-seed0", {"model": model}, [], {"final": final})]) for model in models]
    assert labels == ["top_k, K=2, aux 0.01", "top_k, K=2, renormalise=false, aux 0.01"]


def test_a_router_that_does_not_fix_k_is_reported_with_its_measured_experts(tmp_path):
    """README's router in ten lines takes every expert above 1 / E: K is what its rows say, not top_k."""
    folder = write_run(tmp_path, "A", 0, 1.5)
    for name in ("summary.json", "log.jsonl"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace('"validation_tokens": 100', '"validation_tokens": 25'))
    run = load_runs(tmp_path)[0]
    assert made_of([run]) == "top_k, K=4.00 measured, aux 0" and quantities.value(run, "experts_per_token") == 4
    full = RunRecord(run.run_id, run.config | {"model": ModelConfig(n_experts=4, top_k=1).to_dict()},
                     run.log, run.summary)
    counted = {k: count(architecture(full.model), experts_per_token=k)[-1].active for k in (1, 4)}
    assert quantities.value(full, "active_parameters") == counted[4] / 1e6 > counted[1] / 1e6


def test_choices_of_a_copy_expert_are_no_active_parameters():
    """2 of 8 columns a byte, half of which copy: one expert is active."""
    model = ModelConfig(n_experts=4, top_k=2, n_copy=4)
    final = {"layers": [{"load": [10] * 8}] * len(model.moe_layers), "validation_tokens": 40}
    run = RunRecord("a", {"model": model.to_dict()}, [], {"final": final})
    assert quantities.value(run, "active_parameters") == count(model, experts_per_token=1)[-1].active / 1e6


@pytest.mark.parametrize("name", ["FINDINGS.md", "summary.csv", "report.html"])
def test_a_file_of_the_user_is_not_replaced(tmp_path, name):
    write_study(tmp_path)
    (tmp_path / name).write_text("my own notes")
    command = ["report", str(tmp_path)] if name == "report.html" else ["study", "--plot-only", "--out", str(tmp_path)]
    code = CliRunner().invoke(cli.main, command)
    assert code.exit_code == 1 and f"{name} was not made by this program: move it away" in code.output
    assert (tmp_path / name).read_text() == "my own notes"
