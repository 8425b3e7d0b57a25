"""The report and the figures, on small studies made up here: what they say must follow from the rows alone."""

import csv
import json
import math
import shutil

import pytest

from tinymoe.study import figures as plots, report
from tinymoe.study.report import Comparison, holm
from tinymoe.study.results import Interval, load_runs, t_interval

CONFIGS = {"A": ("top_k", 1, 0.0), "B": ("top_k", 1, 0.01), "C": ("top_k", 1, 0.1), "D": ("top_k", 2, 0.01),
           "E": ("expert_choice", 2, 0.0), "F": ("noisy_top_k", 2, 0.01)}
LOSSES = {"A": (1.9, 2.0, 2.1), "B": (1.5, 1.6, 1.8), "C": (1.6, 1.6, 1.7), "D": (1.4, 1.5, 1.6),
          "E": (1.7, 1.8, 1.9), "F": (1.4, 1.5, 1.7)}
EVEN, COLLAPSED = [25, 25, 25, 25], [100, 0, 0, 0]


def layer_row(load, coverage):
    mean, total = sum(load) / 4, sum(load)
    entropy = -sum(n / total * math.log(n / total) for n in load if n) / math.log(4)
    return {"layer": 1, "load": load, "load_cv": math.sqrt(sum((n - mean) ** 2 for n in load) / 4) / mean,
            "max_violation": max(load) / mean - 1, "max_violation_batch": max(load) / mean - 0.9, "load_entropy": entropy,
            "dead_experts": load.count(0), "router_entropy": 1.0, "marginal_entropy": 1.2, "drop_rate": 0.0,
            "token_coverage": coverage, "weight_divergence": 0.9, "repetition": 0.3, "domain_load": [load, load],
            "mutual_information": 0.05, "mutual_information_null": 0.01, "byte_information": 0.3,
            "byte_information_null": 0.02}


def row(step, loss, leaky_loss, layers):
    numbers = {"val": leaky_loss, "causal": loss}
    return {"step": step, "seconds": float(step), **{f"{k}_cross_entropy": v for k, v in numbers.items()},
            **{f"{k}_perplexity": math.exp(v) for k, v in numbers.items()},
            **{f"{k}_bits_per_byte": v / math.log(2) for k, v in numbers.items()}, "layers": layers,
            "validation_tokens": 512}


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
    rows = [row(step, loss + 0.1 - step / 200, leaky + 0.1 - step / 200, layers) for step in (0, 10, 20)]
    (folder / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (folder / "summary.json").write_text(json.dumps({"run_id": folder.name, "steps": 20, "seconds": 20.0,
                                                     "final": row(20, loss, leaky, layers)}))
    return folder


def write_study(study, n_seeds=3, losses=LOSSES):
    for name, values in losses.items():
        for seed, loss in enumerate(values[:n_seeds]):
            write_run(study, name, seed, loss)
    return study


def findings(study):
    return report.write_findings(study).read_text(encoding="utf-8")


def test_t_interval_by_hand():
    # 1, 2, 6: mean 3; squares 4 + 1 + 9 = 14, variance 14 / 2 = 7, standard error sqrt(7 / 3) = 1.5275;
    # t(0.975, 2) = 4.3027, half width 6.5724. t = 3 / 1.5275 = 1.9640 with 2 degrees of freedom:
    # p = 1 - t / sqrt(t^2 + 2) = 1 - 1.9640 / 2.4202 = 0.1885.
    interval = t_interval([1.0, 2.0, 6.0])
    assert interval.mean == pytest.approx(3.0)
    assert interval.half == pytest.approx(6.5724, abs=1e-4)
    assert interval.p == pytest.approx(0.1885, abs=1e-4)
    assert math.isnan(t_interval([1.0]).half)


def test_holm_by_hand():
    # p sorted .01, .02, .04 against .05/3, .05/2, .05/1: all below; with .03 for .02 the second fails, and so do the rest.
    def survivors(*p_values):
        return [one.survives for one in holm([Comparison("q", "m", "x", "y", Interval(1.0, 0.5, 3, p)) for p in p_values])]

    assert survivors(0.04, 0.01, 0.02) == [True, True, True]
    assert survivors(0.04, 0.01, 0.03) == [False, True, False]


def test_findings_hold_the_numbers_worked_out_by_hand(tmp_path):
    text = findings(write_study(tmp_path))
    # A: 1.9, 2.0, 2.1: s = 0.1, half width 4.3027 * 0.1 / sqrt(3) = 0.2484; 2 / ln 2 = 2.885, 0.2484 / ln 2 = 0.358.
    # exp: 6.6859, 7.3891, 8.1662: mean 7.4137, s = 0.74046, half width 1.8394.
    assert "| A top_k, K=1, aux 0 | 2.000 ± 0.248 | 7.41 ± 1.84 | 2.885 ± 0.358 |" in text
    # A - B: 0.4, 0.4, 0.3: mean 0.36667, s = 0.057735, half width 4.3027 * 0.033333 = 0.14342.
    assert "`A` - `B` +0.367 [+0.223, +0.510], suggestive" in text
    # E: leaky loss 0.25 below the causal one; exp: 5.4739, 6.0496, 6.6859 and exp(-0.25) = 0.7788 of that.
    assert "6.07 ± 1.51 (leaky 4.73 ± 1.17)" in text
    # 20 steps of 4 * 16 bytes, over 1,600 bytes of training text.
    assert "20 steps saw 1,280 bytes, 0.80 times the 1,600 bytes" in text
    assert "3 collapsed" in text and "smallest coefficient with every layer of every run in use: 0.01 (B)" in text
    assert "E has load CV 0 (below 0.01) and leaves bytes uncovered | held in 3 of 3 runs" in text


def test_findings_regenerate_byte_for_byte(tmp_path):
    assert findings(write_study(tmp_path)) == findings(tmp_path)


def test_a_flipped_outcome_flips_the_sentence(tmp_path):
    worse = findings(write_study(tmp_path / "worse"))
    better = findings(write_study(tmp_path / "better", losses=LOSSES | {"E": (1.0, 1.1, 1.2), "A": (1.2, 1.2, 1.3)}))
    assert "causal loss (nats): `E` - `D` +0.300" in worse and "causal loss (nats): `E` - `D` -0.400" in better
    assert "**causal loss (nats): `A` - `B` +0.367" in worse and "**causal loss (nats): `A` - `B` -0.400" in better


def test_one_seed_gives_no_interval_and_no_verdict(tmp_path):
    text = findings(write_study(tmp_path, n_seeds=1))
    assert "**One seed, so no interval and no test: A, B, C, D, E, F." in text and "causal loss (nats): not tested" in text
    numbers = [line for line in text.splitlines() if line.startswith("|")]
    assert numbers and not any("±" in line or "[+" in line or "[-" in line for line in numbers)
    assert not any(word in line for line in numbers for word in ("clear", "suggestive", "undecided"))


def test_failed_incomplete_and_torn_runs_are_named(tmp_path):
    write_study(tmp_path)
    failed, stopped = (tmp_path / "runs" / name for name in ("C-seed2", "D-seed1"))
    (failed / "summary.json").unlink()
    (failed / "failure.json").write_text('{"run_id": "C-seed2", "step": 7, "layer": "block 3", "reason": "loss is nan"}')
    (stopped / "summary.json").unlink()
    with open(tmp_path / "runs" / "A-seed0" / "log.jsonl", "a") as file:
        file.write('{"step": 30, "val_cro')
    (tmp_path / "runs" / "Z-seed0").mkdir()
    text = findings(tmp_path)
    assert "`C-seed2` failed (step 7, layer block 3, reason loss is nan)" in text and "`C-seed{0,1}`" in text
    assert "`D-seed1` is incomplete" in text and "`Z-seed0` is incomplete" in text
    assert [len(run.log) for run in load_runs(tmp_path) if run.run_id == "A-seed0"] == [3]
    with open(report.write_summary_csv(tmp_path)) as file:
        states = {line["run_id"]: line["state"] for line in csv.DictReader(file)}
    assert len(states) == 19 and states["C-seed2"] == "failed" and states["Z-seed0"] == "incomplete"


@pytest.mark.parametrize("name, content", [
    ("log.jsonl", ""), ("log.jsonl", '{"step": 10}\n'), ("log.jsonl", "[]\n"), ("log.jsonl", None), ("summary.json", "{}"),
    ("summary.json", "[1]"), ("summary.json", b"\xff\xfe"), ("config.json", "5"), ("config.json", '{"seed": 0}'),
    ("config.json", None)])
def test_a_finished_run_with_a_damaged_file_is_in_no_mean(tmp_path, name, content):
    path = write_run(tmp_path, "A", 0, 2.0) / name
    path.unlink() if content is None else path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="A-seed0 is a finished run with damaged files"):
        load_runs(tmp_path)


def test_a_copy_of_a_run_is_not_counted_twice(tmp_path):
    folder = write_run(tmp_path, "A", 0, 2.0)
    shutil.copytree(folder, folder.with_name("A-seed0 copy"))
    with pytest.raises(ValueError, match="copy is a finished run with damaged files"):
        load_runs(tmp_path)


def test_a_dense_control_has_no_experts_to_report(tmp_path):
    write_run(tmp_path, "D", 0, 2.0, dense=True)
    assert findings(tmp_path).count("Not answered") == 3
    assert [path.name for path in plots.draw_all(tmp_path)] == ["perplexity_over_steps.png", "final_perplexity.png"]
    write_run(tmp_path, "E", 0, 1.5)
    assert "E has load CV 0" in findings(tmp_path) and len(plots.draw_all(tmp_path)) == 8
    assert "D,0,complete" in report.write_summary_csv(tmp_path).read_text()


def test_where_the_entropy_of_the_text_is_known_the_loss_above_it_is_told(tmp_path):
    """Rates 1.0 and 1.2, mean 1.1: C, at 1.6, 1.6 and 1.7, is 0.533 above. Without rates there is no such column."""
    write_study(tmp_path, losses={"C": LOSSES["C"]})
    assert "above the entropy" not in report.write_findings(tmp_path).read_text()
    for path in tmp_path.glob("runs/*/config.json"):
        config = json.loads(path.read_text())
        config["corpus"]["prose"]["entropy_rate"], config["corpus"]["verse"] = 1.0, {**config["corpus"]["verse"], "entropy_rate": 1.2}
        path.write_text(json.dumps(config))
    text = report.write_findings(tmp_path).read_text()
    assert "loss above the entropy of the text (nats)" in text and "| 0.533 ± 0.143 |" in text


def test_a_study_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        report.write_findings(tmp_path)


def test_every_figure_is_written_whole(tmp_path):
    paths = plots.draw_all(write_study(tmp_path, n_seeds=2))
    assert sorted(paths) == sorted((tmp_path / "figures").iterdir()) and len(paths) == 8
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in paths)
    assert all(f"(figures/{path.name})" in findings(tmp_path) for path in paths)
