"""The command line: fast help, one clear line for each mistake, and the smallest study from end to end."""

import csv
import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import cli
import tinymoe
from test_train import MODEL, TRAINING, WORDS, results, snapshot, tiny
from tinymoe import ModelConfig, files
from tinymoe.model.counting import PRESETS
from tinymoe.moe.losses import LOSSES
from tinymoe.moe.routers import ROUTERS
from tinymoe.moe.routers.options import OF_THE_MODEL
from tinymoe.study import caveats, report
from tinymoe.study import figures as plots
from tinymoe.study.experiment import Experiment, Scale, Setting
from tinymoe.study.results import Results
from tinymoe.study.runner import Event
from tinymoe.tools.progress import Progress, duration
from tinymoe.training import trainer as train
from tinymoe.training.plan import TrainConfig
from tinymoe.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
FIGURES = "at_the_end over_steps expert_load imbalance domain_by_expert router_entropy".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS)
    return path


def invoke(*args):
    """(exit code, output) of a command; anything but an orderly exit fails."""
    result = CliRunner().invoke(cli.main, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def study(text, out, *args, **settings):
    settings = MODEL | TRAINING | settings
    sets = [arg for name, value in settings.items() for arg in ("--set", f"{name}={value}")]
    return invoke("study", "--jobs", 1, "--text", text, "--out", out, *sets, *args)


# -- help --


def test_help_imports_nothing_heavy():
    shown = subprocess.run([sys.executable, "-X", "importtime", ROOT / "cli.py", "--help"], capture_output=True,
                           text=True).stderr
    imported = {line.split("|")[-1].strip().split(".")[0] for line in shown.splitlines()}
    assert "click" in imported and not imported & {"numba", "numpy", "scipy", "matplotlib", "tinymoe"}


@pytest.mark.parametrize("command", cli.main.commands)
def test_every_command_has_help(command):
    code, output = invoke(command, "--help")
    assert code == 0 and output.startswith("Usage:")
    assert cli.main.commands[command].help.split("\n")[0] in " ".join(output.split())


def test_the_summary_of_every_command_is_one_whole_line():
    shown = subprocess.run([sys.executable, ROOT / "cli.py", "--help"], capture_output=True, text=True).stdout
    lines = shown.split("Commands:\n")[1].split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == list(cli.main.commands)
    assert all(line.endswith(".") and "..." not in line for line in lines)


@pytest.mark.parametrize("words, found", [
    ("tinymoe exp", {"experiment", "explain"}), ("tinymoe experiment ca", {"capacity"}),
    ("tinymoe study --o", {"--out"}),
    ("tinymoe params mixtral-8", {"mixtral-8x7b"}), ("tinymoe explain --router sink", {"sinkhorn"})])
def test_the_shell_completes_commands_options_and_names(words, found):
    typed = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1), "_TINYMOE_COMPLETE": "bash_complete"}
    code = "import sys; sys.argv = ['tinymoe']; import cli; cli.run()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | typed, stdout=subprocess.PIPE,
                          text=True)
    assert {line.removeprefix("plain,") for line in done.stdout.splitlines()} == found


def test_the_version_is_that_of_the_package():
    assert invoke("--version") == (0, f"tinymoe {tinymoe.__version__}\n")


def test_the_help_of_params_names_every_preset():
    output = invoke("params", "--help")[1]
    assert all(name in output for name in PRESETS)


# -- from end to end --


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A study of three routers, with figures."""
    out = tmp_path_factory.mktemp("finished study")  # a space in its name
    code, output = study(text, out, "--config", "b", "--config", "C", "--config", "E", "--config", "F", "--plot")
    assert code == 0, output
    return out


def test_the_smallest_study_leaves_figures_findings_and_rows(finished):
    assert sorted(path.stem for path in finished.glob("figures/*.png")) == sorted(FIGURES)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in finished.glob("figures/*"))
    findings = (finished / "FINDINGS.md").read_text(encoding="utf-8")
    assert all(f"{c}-seed0" in findings for c in "BCEF") and "leaky" in findings
    with open(finished / "summary.csv", newline="") as f:
        assert sorted(row["run_id"] for row in csv.DictReader(f)) == ["B-seed0", "C-seed0", "E-seed0", "F-seed0"]


def test_the_same_command_trains_nothing_again(finished, text, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("runs/*/*.json*")}
    monkeypatch.setattr(train.Trainer, "learn", lambda self, *batch: pytest.fail("it trained"))
    assert study(text, finished, "--config", "B", "--config", "C")[0] == 0
    assert before == {path: path.stat().st_mtime_ns for path in finished.glob("runs/*/*.json*")}


@pytest.mark.slow
def test_plot_only_draws_the_same_again_from_the_rows_alone(finished):
    before = snapshot(finished)
    for path in [*finished.glob("figures/*"), finished / "FINDINGS.md", finished / "summary.csv"]:
        path.unlink()
    assert invoke("study", "--plot-only", "--out", finished)[0] == 0
    assert snapshot(finished) == before


def test_a_dense_control_goes_from_end_to_end(text, tmp_path):
    code, output = study(text, tmp_path, "--config", "A", "--plot", moe_layers=[])
    assert code == 0, output
    assert (tmp_path / "FINDINGS.md").exists() and list(tmp_path.glob("figures/*.png"))
    assert invoke("study", "--plot-only", "--out", tmp_path)[0] == 0


@pytest.mark.slow
def test_odd_names_of_domains_reach_figures_and_findings(text, tmp_path):
    folder = tmp_path / "domains"
    folder.mkdir()
    for name in ("a|b.txt", "x$\\frac$.txt", "new\nline.txt", os.fsdecode(b"byte\xff.txt"), "plain"):
        (folder / name).write_text(WORDS)
    code, output = study(folder, tmp_path / "out", "--config", "D", "--plot")
    assert code == 0, output
    assert "plain" in (tmp_path / "out/FINDINGS.md").read_text(encoding="utf-8")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_what_is_no_file_in_a_folder_of_texts_is_passed_over(text, tmp_path):
    (tmp_path / "plain.txt").write_text(WORDS)
    os.mkfifo(tmp_path / "pipe")
    names = f"from tinymoe.training.data import load_corpus; print(load_corpus({str(tmp_path)!r}, 16).names)"
    done = subprocess.run([sys.executable, "-c", names],
                          capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout == "['plain']\n"


def test_seeds_and_steps_make_the_runs(text, tmp_path):
    assert study(text, tmp_path, "--config", "D", "--seeds", 2, "--steps", 2)[0] == 0
    assert sorted(path.name for path in tmp_path.glob("runs/*")) == ["D-seed0", "D-seed1"]
    assert results(tmp_path / "runs/D-seed1")[1][0]["step"] == 6  # --set steps wins over --steps


@pytest.mark.parametrize("command", ["study", "experiment"])
def test_what_contradicts_plot_only_is_wrong_usage(command, tmp_path):
    name = ["dense"] if command == "experiment" else []
    code, output = invoke(command, *name, "--plot-only", "--fresh", "--out", tmp_path)
    assert code == 2 and "--plot-only trains nothing" in output


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(text, tmp_path, monkeypatch):
    """Would have caught: a traceback of a SystemError."""
    real = train.Trainer.learn
    monkeypatch.setattr(train.Trainer, "learn", lambda self, *batch: real(self, *batch) if self.step < 3
                        else in_compiled_code())
    code, output = study(text, tmp_path / "torn", "--config", "F")
    assert code == 130 and "Interrupted. The same command resumes from the last checkpoints." in output
    code, output = study(text, tmp_path / "fresh", "--config", "F", "--fresh")
    assert code == 130 and "Interrupted. Leave --fresh out to resume. Runs" in output
    monkeypatch.undo()
    for out in ("torn", "whole"):
        assert study(text, tmp_path / out, "--config", "F")[0] == 0
    assert results(tmp_path / "torn/runs/F-seed0") == results(tmp_path / "whole/runs/F-seed0")


# -- a longer study --


def test_a_finished_study_is_lengthened_from_its_checkpoint(text, tmp_path, monkeypatch):
    """The rows of before stay; the rate follows the longer schedule from there on; an interruption changes no bit."""
    from tinymoe.training.optim import learning_rate
    real = train.Trainer.learn
    for out in ("torn", "whole"):
        assert study(text, tmp_path / out, "--config", "F")[0] == 0
        before = files.read_rows(tmp_path / out / "runs/F-seed0/log.jsonl")
        if out == "torn":
            monkeypatch.setattr(train.Trainer, "learn", lambda self, *batch: real(self, *batch) if self.step < 9
                                else (_ for _ in ()).throw(KeyboardInterrupt))
            assert study(text, tmp_path / out, "--config", "F", "--extend", steps=12)[0] == 130
            monkeypatch.undo()
        code, output = study(text, tmp_path / out, "--config", "F", "--extend", steps=12)
        assert code == 0, output
    assert results(tmp_path / "torn/runs/F-seed0") == results(tmp_path / "whole/runs/F-seed0")
    run = tmp_path / "whole/runs/F-seed0"
    log, config = files.read_rows(run / "log.jsonl"), files.read_json(run / "config.json")
    assert log[:len(before)] == before
    assert log[-1]["step"] == 12 and config["extended"] == [{"step": 6, "from": 6, "to": 12}]
    later = next(row for row in log if row["step"] > 6)
    c = config["training"]
    assert later["learning_rate"] == learning_rate(later["step"], 12, c["learning_rate"], c["warmup"])
    assert "1 run was lengthened at step 6 from 6 to 12 steps" in (tmp_path / "whole/FINDINGS.md").read_text()
    monkeypatch.setattr(train.Trainer, "learn", lambda self, *batch: pytest.fail("it trained"))
    assert study(text, tmp_path / "whole", "--config", "F", steps=12)[0] == 0  # afterwards it is a study like any other


def test_a_compact_study_is_lengthened_where_its_folders_are_there(text, tmp_path):
    """Its old row goes; a row without a folder has no checkpoint to go on from."""
    assert study(text, tmp_path, "--config", "F")[0] == 0
    assert CliRunner().invoke(cli.main, ["compact", str(tmp_path)]).exit_code == 0
    rows, folder = (tmp_path / "runs.jsonl").read_bytes(), tmp_path / "runs/F-seed0"
    folder.rename(tmp_path / "elsewhere")
    code, output = study(text, tmp_path, "--config", "F", "--extend", steps=12)
    assert code == 1 and "with other settings (training steps is 6, not 12)" in output
    assert (tmp_path / "runs.jsonl").read_bytes() == rows
    shutil.rmtree(folder, ignore_errors=True)
    (tmp_path / "elsewhere").rename(folder)
    code, output = study(text, tmp_path, "--config", "F", "--extend", steps=12)
    assert code == 0 and files.read_json(folder / "summary.json")["steps"] == 12, output
    assert files.read_rows(tmp_path / "runs.jsonl") == []
    assert "1 run was lengthened" in (tmp_path / "FINDINGS.md").read_text()


@pytest.mark.parametrize("compact", [False, True])
def test_fresh_that_was_interrupted_goes_on_without_it(text, tmp_path, monkeypatch, compact):
    """Also after a kill, which cleans nothing up. Would have caught: settings of before and after side by side."""
    real, two = train.Trainer.learn, ("--config", "F", "--config", "D")
    assert study(text, tmp_path, *two)[0] == 0
    if compact:
        assert CliRunner().invoke(cli.main, ["compact", str(tmp_path)]).exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "learn", lambda self, *batch: real(self, *batch) if self.step < 3
                      else (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr("tinymoe.study.rows.forget_begun", lambda out: None)
        code, output = study(text, tmp_path, *two, "--fresh", learning_rate=0.001)
    assert code == 130 and "Leave --fresh out to resume" in output
    code, output = study(text, tmp_path, *two, learning_rate=0.001)
    assert code == 0 and "2 run(s) of 6 steps" in output, output
    configs = [files.read_json(tmp_path / f"runs/{name}-seed0/config.json") for name in "FD"]
    assert [config["training"]["learning_rate"] for config in configs] == [0.001] * 2
    assert not (tmp_path / "fresh.json").exists()
    assert not compact or files.read_rows(tmp_path / "runs.jsonl") == []
    assert invoke("study", "--plot-only", "--out", tmp_path)[0] == 0
    monkeypatch.setattr(train.Trainer, "learn", lambda self, *batch: pytest.fail("it trained"))
    assert study(text, tmp_path, *two, learning_rate=0.001)[0] == 0


def test_fresh_that_begins_no_run_leaves_the_old_results(text, tmp_path, monkeypatch):
    assert study(text, tmp_path, "--config", "F")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("tinymoe.study.runner._attempt", lambda *task, **how: (_ for _ in ()).throw(KeyboardInterrupt))
        assert study(text, tmp_path, "--config", "F", "--fresh")[0] == 130
    monkeypatch.setattr(train.Trainer, "learn", lambda self, *batch: pytest.fail("it trained"))
    assert study(text, tmp_path, "--config", "F")[0] == 0 and not (tmp_path / "fresh.json").exists()


def test_a_loop_of_links_is_no_traceback(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    out = ["--out", tmp_path / "out"]
    for typed in (["study", "--text", "{}", *out], ["study", "--out", "{}"], ["explain", "--figure", "{}"]):
        code, output = invoke(*(str(part).format(tmp_path / "loop") for part in typed))
        last = output.splitlines()[-1]
        assert code in (1, 2) and last.startswith("Error: ") and "/loop" in last, output


def test_only_the_steps_may_differ_in_what_is_extended(text, tmp_path):
    assert study(text, tmp_path, "--config", "F")[0] == 0
    before = snapshot(tmp_path)
    code, output = study(text, tmp_path, "--config", "F", "--extend", steps=12, learning_rate=0.5)
    assert code == 1 and "differs in more than its steps (training learning_rate is" in output
    assert study(text, tmp_path, "--config", "F", "--extend", "--fresh", steps=12)[0] == 2
    assert study(text, tmp_path, "--config", "F", "--extend")[0] == 0 and snapshot(tmp_path) == before
    (tmp_path / "runs/F-seed0/checkpoint.npz").unlink()
    code, output = study(text, tmp_path, "--config", "F", "--extend", steps=12)
    assert code == 1 and "checkpoint.npz does not exist" in output
    assert (tmp_path / "runs/F-seed0/summary.json").exists()


def test_nothing_is_extended_unless_all_can_be(text, tmp_path):
    """Not for a text that is missing or another, and not for one of two runs."""
    assert study(text, tmp_path, "--config", "F", "--seeds", 2)[0] == 0
    (tmp_path / "other.txt").write_text(" ".join(map(str, range(3000))))
    config = tmp_path / "runs/F-seed1/config.json"
    good, before = config.read_text(), snapshot(tmp_path / "runs")
    for where in (tmp_path / "nowhere", tmp_path / "other.txt"):
        code, output = study(where, tmp_path, "--config", "F", "--seeds", 2, "--extend", steps=12)
        assert code == 1 and output.count("\n") == 1 and snapshot(tmp_path / "runs") == before
    for damaged in ("{", good.replace('"steps": 6', '"steps": "6"'), good[:-2] + ', "extended": 5}'):
        config.write_text(damaged)
        code, output = study(text, tmp_path, "--config", "F", "--seeds", 2, "--extend", steps=12)
        assert code == 1 and "is not the JSON object that a run writes" in output
        assert snapshot(tmp_path / "runs/F-seed0") == {
            name[len("F-seed0/"):]: content for name, content in before.items() if name.startswith("F-seed0/")}


def test_fresh_drops_no_row_before_its_run_begins(text, tmp_path, monkeypatch):
    assert study(text, tmp_path, "--config", "F")[0] == 0
    assert CliRunner().invoke(cli.main, ["compact", str(tmp_path)]).exit_code == 0
    before = (tmp_path / "runs.jsonl").read_text()
    assert study(tmp_path / "nowhere", tmp_path, "--config", "F", "--fresh")[0] == 1
    assert (tmp_path / "runs.jsonl").read_text() == before  # the folder of the old run is not that of a new one
    shutil.rmtree(tmp_path / "runs")
    code, output = invoke("runs", tmp_path)
    assert code == 1 and "its finished runs are in runs.jsonl: `rows` or `compare`" in output
    assert study(tmp_path / "nowhere", tmp_path, "--config", "F", "--fresh")[0] == 1
    (tmp_path / "runs").write_text("a file")
    assert study(text, tmp_path, "--config", "F", "--fresh")[0] == 1
    assert (tmp_path / "runs.jsonl").read_text() == before
    (tmp_path / "runs").unlink()
    monkeypatch.setitem(sys.modules, "tinymoe.study.cluster", None)  # Dask is missing
    assert study(text, tmp_path, "--config", "F", "--fresh", "--scheduler", "tcp://127.0.0.1:9")[0] == 1
    assert (tmp_path / "runs.jsonl").read_text() == before
    real = train.Trainer.learn
    monkeypatch.setattr(train.Trainer, "learn", lambda self, *batch: real(self, *batch) if before == (
        tmp_path / "runs.jsonl").read_text() else None)  # a process that is killed while it trains leaves the row
    assert study(text, tmp_path, "--config", "F", "--fresh")[0] == 0
    assert (tmp_path / "runs.jsonl").read_text() == "" and (tmp_path / "runs/F-seed0/summary.json").exists()


def test_no_rate_is_chosen_after_a_sweep_that_failed(text, tmp_path, capsys):
    """As one of other settings, where an earlier sweep lies. One whose loss does not stay finite has failed rightly."""
    training = {name: value for name, value in TRAINING.items() if name != "steps"}
    question = Experiment(name="q", question="?", settings=(Setting("a", "a"),), metrics=("causal_cross_entropy",),
                          figures={}, seeds=1, steps=2, rates=(1e-3, 1e11), training=training, adjustable=True,
                          scales={"default": Scale(MODEL, 2, 1)})
    how = {"text": str(text), "jobs": 1, "fresh": False, "imports": (), "scheduler": None}
    assert cli._train_all(question, "full", None, tmp_path, fields={}, **how) == {}
    assert "learning rates: a 0.001" in capsys.readouterr().out
    other = {"model": {"d_ff": 64}}
    assert cli._train_all(question, "full", None, tmp_path / "no", fields=other, **how) == {}
    for run in (tmp_path / "no/runs").glob("a@1e+11-*"):
        shutil.move(tmp_path / "runs" / run.name, tmp_path / run.name)
        shutil.copytree(run, tmp_path / "runs" / run.name)
    with pytest.raises(ValueError, match=r"a-seed0 and a@1e\+11-seed100 differ in their model \(d_ff: 32, 64\)"):
        Results(question, tmp_path)
    for run in (tmp_path / "no/runs").glob("a@*"):
        shutil.rmtree(tmp_path / "runs" / run.name)
        shutil.copytree(run if "@0.001" in run.name else tmp_path / run.name, tmp_path / "runs" / run.name)
    with pytest.raises(ValueError, match=r"a-seed0 and a@0.001-seed100 differ in their model \(d_ff: 32, 64\)"):
        Results(question, tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli._train_all(question, "full", None, tmp_path, fields={}, **how)
    said = capsys.readouterr()
    assert "learning rates" not in said.out and "No learning rate was chosen, so nothing else" in said.err
    (tmp_path / "no/runs/a@1e+11-seed101/log.jsonl").unlink()
    (tmp_path / "no/runs/a@1e+11-seed101/log.jsonl").symlink_to(tmp_path)
    with pytest.raises(SystemExit):
        cli._train_all(question, "full", None, tmp_path / "no", fields=other, **how | {"fresh": True})
    assert (tmp_path / "no/runs/a@1e+11-seed101/failure.json").exists()  # of before


def in_compiled_code(*args):
    """What Python makes of a Ctrl-C that comes in compiled code."""
    raise SystemError("returned a result with an exception set") from KeyboardInterrupt()


@pytest.mark.parametrize("end", [lambda *args: (_ for _ in ()).throw(KeyboardInterrupt), in_compiled_code])
def test_ctrl_c_while_figures_are_drawn_is_orderly_too(finished, monkeypatch, end):
    monkeypatch.setattr(files, "write_atomically", end)
    for module in (plots, report):
        monkeypatch.setattr(module, "write_atomically", files.write_atomically)
    code, output = invoke("study", "--plot-only", "--out", finished)
    assert code == 130 and output.strip().startswith("Interrupted")


def test_a_loss_that_is_not_finite_exits_1_after_the_others(text, tmp_path):
    assert study(text, tmp_path, "--config", "A", learning_rate=1e30)[0] == 1
    code, output = study(text, tmp_path, "--config", "A", "--config", "B", learning_rate=1e30)
    errors = [line for line in output.splitlines() if line.startswith("Error:")]
    assert code == 1 and errors[1:] == ["Error: B-seed0 failed likewise"]
    assert errors[0].startswith("Error: A-seed0 failed") and "at step 2, beginning in" in errors[0]


# -- progress --


class Watch:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self):
        return self.now


def test_without_a_terminal_progress_is_a_line_every_half_minute(capsys):
    clock, runs = Watch(), [tiny("A", steps=100), tiny("B", steps=100)]
    progress = Progress(runs, clock)
    with progress.bar:
        progress.note(Event("resumed", "B-seed0", 60))
        for step in range(1, 31):  # a step of each run in two seconds
            clock.now += 2
            progress.note(Event("step", "A-seed0", step, 3 - step / 100))
            progress.note(Event("step", "B-seed0", 60 + step, 2.5))
        progress.note(Event("done", "B-seed0"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [line for line in lines if "left" in line] == [  # 30 steps in 30 s after the first, 109 to go
        "46%, 2 min left: A-seed0 step 16, loss 2.840; B-seed0 step 75, loss 2.500"]
    assert "B-seed0: resumed from step 60" in lines and "B-seed0: done" in lines


@pytest.mark.parametrize("seconds, said", [(40, "40 s"), (700, "12 min"), (12_240, "3.4 h")])
def test_a_duration_has_the_unit_that_suits_it(seconds, said):
    assert duration(seconds) == said


def test_runs_shows_what_is_finished_running_failed_and_waiting(text, tmp_path):
    """Of a study of five runs: one finished, one failed at step 2, one in training by this process, two waiting."""
    assert study(text, tmp_path, "--config", "D", "--seeds", 2)[0] == 0
    assert study(text, tmp_path, "--config", "A", learning_rate=1e30)[0] == 1
    second, third = tmp_path / "runs/D-seed1", tmp_path / "runs/\x1b[2J"
    for name in ("summary.json", "checkpoint.npz"):
        (second / name).unlink()
    rows = files.read_rows(second / "log.jsonl")
    files.write_rows(second / "log.jsonl", [row | {"seconds": 10.0 * row["step"]} for row in rows[:3]])
    third.mkdir()
    with RunFolder(second).locked():
        code, output = invoke("runs", tmp_path)
    lines = output.splitlines()
    assert code == 0 and lines[-1] == "1 finished, 1 running, 1 failed, 1 waiting" and r"\x1b[2J" in lines[1]
    found = {line.split()[0]: line.split()[1:] for line in lines[1:-1]}
    loss = f"{rows[2]['causal_cross_entropy']:.3f}"
    assert found["D-seed0"][:2] == ["finished", "6/6"] and found["A-seed0"][:2] == ["failed", "0/6"]
    assert found["D-seed1"] == ["running", "4/6", loss, "20", "s", f"{platform.node()},", "process", str(os.getpid())]
    assert "at step 2" in next(line for line in lines if line.startswith("A-seed0"))
    assert invoke("runs", tmp_path)[1].splitlines()[-1] == "1 finished, 0 running, 1 failed, 2 waiting"
    assert invoke("runs", tmp_path / "runs")[0] == 1


# -- the output --


def program(*args, **settings):
    return subprocess.run([sys.executable, ROOT / "cli.py", *map(str, args)], stderr=subprocess.PIPE, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("args",
                         [["routers"], ["route", "{run}", "a\n"],
                          ["generate", "{run}", "--prompt", "\u00fc\u2014", "--length", 1],
                                  ["route", "{run}", "a", "--gate"]])
def test_an_output_of_eight_bits_gets_question_marks(args, run):
    done = program(*(str(arg).format(run=run) for arg in args), stdout=subprocess.PIPE,
                   env=os.environ | {"PYTHONIOENCODING": "latin-1"})
    said = b"checkpoint of step 6\n" if args[0] == "generate" else b""
    assert done.returncode == 0 and done.stderr == said and done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("args",
                         [["--help"], ["routers"], ["route", "{run}", "a"], ["params", "grok-1"],
                          pytest.param(["study", "--plot-only"], marks=pytest.mark.slow)])
def test_an_output_that_is_full_ends_in_one_line(args, run, finished, tmp_path):
    if args[0] == "study":
        shutil.copytree(finished, tmp_path / "study")
        args = [*args, "--out", tmp_path / "study"]
    with open("/dev/full", "w") as full:
        done = program(*(str(arg).format(run=run) for arg in args), stdout=full)
    assert done.returncode == 1
    assert re.fullmatch(rb"Error: .*No space left on device.*\n", done.stderr)


def test_text_of_a_file_reaches_the_terminal_escaped(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    files.save_arrays(tmp_path / "run/checkpoint.npz", {}, {"kind": "\x1b[2Jgone"})
    code, output = invoke("route", tmp_path / "run", "a")
    assert code == 1 and "\x1b" not in output and r"holds a \x1b[2Jgone" in output


def test_text_of_rows_reaches_the_terminal_escaped(monkeypatch, capsys):
    monkeypatch.setattr(caveats, "warnings", lambda results: ["`\x1b[2Jrun` failed."])
    monkeypatch.setattr(report, "finding", lambda results: ["**a\nb**"])
    cli._print_finding(SimpleNamespace(experiment=SimpleNamespace(question="Why?")))
    assert capsys.readouterr().out == "\nWhy?\n- `\\x1b[2Jrun` failed.\n- a b\n"


def test_a_failed_run_is_named_escaped(text, tmp_path, monkeypatch):
    monkeypatch.setattr("tinymoe.study.runner.run_study", lambda *args, **options: {"D-seed0": "\x1b[2J is\nno text"})
    code, output = study(text, tmp_path, "--config", "D")
    assert code == 1 and r"Error: D-seed0 failed: \x1b[2J is no text" in output


# -- mistakes --

MISTAKES = {  # what is typed: (exit code, what the line must name)
    "--jbos 2": (2, "--jbos"),
    "--config H": (2, "'H'"),
    "--steps 0": (2, "0 is not in the range"),
    "--steps many": (2, "'many'"),
    "--seeds 0": (2, "0 is not in the range"),
    "--jobs -1": (2, "-1 is not in the range"),
    "--text nowhere.txt": (1, "'nowhere.txt'"),
    "--text {dir}/empty.txt": (1, "'empty' is empty"),
    "--text {dir}/short.txt": (1, "'short' has only 9 bytes"),
    "--text {dir}/nothing": (1, "nothing' is empty"),
    "--out {dir}/short.txt/below": (1, "short.txt"),
    "--out {dir}/short.txt": (2, "short.txt"),
    "--out /proc/nowhere": (1, "/proc/nowhere"),
    "--out {dir}/nothing --plot-only": (1, "nothing"),
    "--out {dir}/missing --plot-only": (1, "missing"),
    "--out {dir}/short.txt --plot-only": (2, "short.txt"),
    "--out {dir}/short.txt/": (2, "short.txt"),
    "--out=": (2, "empty"),
    "--scheduler here": (2, "tcp://HOST:PORT"),
    "--scheduler tcp://host": (2, "tcp://HOST:PORT"),
    "--out {dir}/\udcff": (2, "UTF-8"),
    "--seeds 1001": (2, "1001 is not in the range"),
    "--set router.x": (2, "router.x"),
    "--set router.nonsense=1": (2, "nonsense is no option of top_k"),
    "--set losses.nonsense=1": (2, "unknown loss 'nonsense'"),
    "--set jitter=0.1": (2, "jitter=0.1: .*router.NAME"),
    "--import {dir}/missing.py": (1, "missing.py"),
    "--import {dir}/short.txt": (1, "short.txt"),
    "--set top_k=99": (2, "top_k 99 "),
    "--set top_k=1.5": (2, "top_k 1.5 "),
    "--set top_k=two": (2, "top_k two|top_k 'two'"),
    "--set n_heads=3": (2, "d_model 16 is not divisible by n_heads 3"),
    "--set nonsense=1": (2, "nonsense=1"),
    "--set nosign": (2, "nosign"),
    "--set steps=0": (2, "steps 0 "),
    "--set moe_layers=7": (2, "moe_layers 7"),
    "--set moe_layers=[7]": (2, "moe_layers .*7"),
    "--set n_experts=many": (2, "n_experts 'many'"),
    "--set router=nope": (2, "'nope'"),
    "--set router=[1]": (2, r"router \[1\] must be a name"),
    "--set router={{}}": (2, r"router \{\} must be a name"),
    '--set router=["top_k","hash"]': (2, "one name for each of the 1 MoE layers"),
    "--set expert_backend=[]": (2, r"expert_backend \[\] must be one of"),
    "--set q_rank=1.5": (2, "q_rank 1.5 must be a whole number"),
    "--set q_rank=many": (2, "q_rank 'many' must be a whole number"),
    "--set top_k=" + 5000 * "9": (2, r"top_k '999.*\.\.\."),
    "--set learning_rate=fast": (2, "learning_rate 'fast'"),
    "--set warmup=long": (2, "warmup 'long'"),
    "--set max_norm=NaN": (2, "max_norm nan"),
    "--set aux_coef=much": (2, "aux_coef 'much'"),
    "--set aux_coef=NaN": (2, "aux_coef nan"),
    "--set losses.z=null": (2, "z"),
    "--set capacity_factor=big": (2, "capacity_factor 'big'"),
    "--set router.renormalise=maybe": (2, "renormalise 'maybe'"),
    "--set vocab_size=10": (2, "vocab_size 10 "),
    "--set vocab_size=x": (2, "vocab_size 'x'"),
    "--set router.renormalise=1": (2, "renormalise 1 "),
    "--set d_ff=100000000000000000000": (2, "d_ff 100000000000000000000 "),
    "--set batch_size=100000000000000000000": (2, "batch_size 100000000000000000000 "),
    "--set router.jitter=1.5": (2, "jitter 1.5 "),
    "--set router.n_groups=3 --set router.group_limit=1": (2, "n_groups 3 "),
    "--set router_options=" + 490 * '{{"a":' + "1" + 490 * "}}": (2, "router_options .* must be an object"),
    "--set seq_len=100000": (1, "seq_len 100000"),
    "--set learning_rate=0.5": (1, "B-seed0 failed.*training learning_rate is.*--fresh"),
    "--set d_ff=8": (1, "B-seed0 failed.*model d_ff is.*--fresh"),
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_ends_in_one_clear_line_and_loses_nothing(typed, finished, text, tmp_path):
    code, named = MISTAKES[typed]
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "nothing").mkdir()
    before = snapshot(finished), snapshot(tmp_path)
    got, output = study(text, finished, "--config", "B", *typed.format(dir=tmp_path).split())
    error = [line for line in output.splitlines() if line.startswith("Error:")]
    assert got == code and len(error) == 1 and re.search(named, error[0]), output
    assert (snapshot(finished), snapshot(tmp_path)) == before


@pytest.mark.parametrize("freeze, named", [('["nothing"]', "nothing"), ('[""]', "leaves nothing to train")])
def test_what_cannot_be_frozen_fails_that_run_alone(freeze, named, text, tmp_path):
    code, output = study(text, tmp_path, "--config", "B", "--set", f"freeze={freeze}")
    assert code == 1 and re.search(f"Error: B-seed0 failed: .*{named}", output)


def test_a_usage_error_of_the_real_program():
    result = subprocess.run([sys.executable, ROOT / "cli.py", "study", "--steps", "0"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.splitlines()[-
        1].startswith("Error: Invalid value for '--steps'")


# -- routers, options, probe, params --

MINE = '''
from tinymoe import functional as F
from tinymoe.moe.routers import LinearRouter
from tinymoe.moe.routing import from_mask


class Mine(LinearRouter, name="{name}"):
    """Every expert whose probability is above a share of 1 / E.

    share: what the probability is compared with, times E.
    """

    def __init__(self, d_model, n_experts, top_k, rng, dtype, share: float = 1.0):
        super().__init__(d_model, n_experts, top_k, rng, dtype)
        self.share = share

    def forward(self, x, context):
        logits = self.scores(x)
        probs = F.softmax(logits)
        return from_mask(probs.data >= self.share / probs.shape[1], probs, logits, probs)
'''


def test_options_lists_every_setting_with_its_default_and_its_meaning():
    code, output = invoke("options")
    lines = [line.split(None, 2) for line in output.splitlines() if line]
    listed = {line[0]: line[1:] for line in lines}
    assert code == 0
    for config in (ModelConfig, TrainConfig):
        assert all(len(listed[field.name]) == 2 for field in dataclasses.fields(config))  # a default and a meaning
    assert listed["n_experts"][0] == "8" and listed["steps"][0] == "2000" and listed["losses.z"][0] == "0.0"
    for name, router in ROUTERS.items():
        for option in router.options().keys() - OF_THE_MODEL:
            assert any(line[0] == f"router.{option}" and re.search(rf"\w .*\(.*\b{name}\b", line[2]) for line in lines)
    assert all(len(listed[f"losses.{name}"]) == 2 for name in LOSSES if name != "balance")


def test_an_imported_file_makes_its_router_known_with_its_options(tmp_path, monkeypatch):
    monkeypatch.setitem(ROUTERS, "mine_cli", None)  # which takes the name out again at the end
    (tmp_path / "mine.py").write_text(MINE.format(name="mine_cli"))
    code, output = invoke("options", "--import", tmp_path / "mine.py")
    assert code == 0
    assert re.search(r"router.share +1.0 +what the probability is compared with, times E \(mine_cli\)", output)
    assert "mine_cli" in invoke("routers", "--import", tmp_path / "mine.py")[1]
    sets = [x for one in ("seq_len=16", "d_model=8", "d_ff=8", "batch_size=2", "router.share=0.5")
            for x in ("--set", one)]
    code, output = invoke("probe", "mine_cli", "--steps", 1, "--import", tmp_path / "mine.py", *sets)
    assert code == 0 and output.startswith("mine_cli after 1 steps"), output


def test_an_imported_file_is_run_once(text, tmp_path):
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'times')!r}, 'a').write('once')")
    assert study(text, tmp_path / "out", "--config", "F", "--import", tmp_path / "mine.py")[0] == 0
    assert (tmp_path / "times").read_text() == "once"


@pytest.mark.parametrize("table, code, message", [
    (ROUTERS, """
from tinymoe.moe.routers import LinearRouter
class Scores(LinearRouter, name="mine_wrong"):
    def forward(self, x, context):
        return self.scores(x)
""", "Error: router mine_wrong returned a Tensor, not a Routing: make one with from_mask("),
    (LOSSES, """
from tinymoe.moe.losses import LOSSES
LOSSES["mine_wrong"] = lambda r: r.logits.mean()
""", 'mine.py (TypeError: LOSSES["mine_wrong"] must be a Loss, such as Loss("what it means", lambda r, c: ')])
@pytest.mark.parametrize("command", [["probe", "mine_wrong"], ["explain", "--router", "mine_wrong"]])
def test_an_imported_router_or_loss_that_is_not_one_is_one_line(command, table, code, message, tmp_path, monkeypatch):
    monkeypatch.setitem(table, "mine_wrong", None)  # which takes the name out again at the end
    (tmp_path / "mine.py").write_text(code)
    exit_code, output = invoke(*command, "--import", tmp_path / "mine.py", "--set", "d_model=8")
    assert exit_code in (1, 2) and message in output and "Traceback" not in output, output


@pytest.mark.parametrize("code, message", [
    ('ROUTERS["mine_odd"] = 5', 'ROUTERS["mine_odd"] must be a Router: '),
    ('class Odd(TopK, name="mine_odd"):\n    x: "Nope" = 3',
     "router Odd: an annotation cannot be evaluated (NameError: name 'Nope' is not defined)")])
@pytest.mark.parametrize("command", ["options", "routers"])
def test_a_file_with_a_router_that_cannot_be_described_is_one_line(command, code, message, tmp_path, monkeypatch):
    monkeypatch.setitem(ROUTERS, "mine_odd", None)
    (tmp_path / "mine.py").write_text(f"from tinymoe.moe.routers import ROUTERS, TopK\n{code}\n")
    exit_code, output = invoke(command, "--import", tmp_path / "mine.py")
    assert exit_code == 1 and output.startswith("Error: ") and message in output and output.count("\n") == 1, output


def test_options_shows_any_default(tmp_path, monkeypatch):
    monkeypatch.setitem(ROUTERS, "mine_odd", None)
    (tmp_path / "mine.py").write_text("""
import numpy as np
from tinymoe.moe.routers import TopK
class Odd(TopK, name="mine_odd"):
    f: np.float32 = np.float32(0.5)
    s: set = {1}
    d: dict = {(1, 2): [3]}
""")
    code, output = invoke("options", "--import", tmp_path / "mine.py")
    assert code == 0 and re.findall(r"^router.([fsd]) +(.*?)  ", output, re.M) == [
        ("d", "{(1, 2): [3]}"), ("f", "0.5"), ("s", "{1}")]


def test_a_loss_in_a_file_is_trained_with_and_probed(tmp_path, monkeypatch):
    monkeypatch.setitem(LOSSES, "mine_loss", None)
    (tmp_path / "mine.py").write_text("""
from tinymoe.moe.losses import LOSSES, Loss
LOSSES["mine_loss"] = Loss("mean square of the logits", lambda r, c: (r.logits ** 2).mean())
""")
    sets = [x for one in ("seq_len=16", "d_model=8", "d_ff=8", "batch_size=2", "losses.mine_loss=0.1")
            for x in ("--set", one)]
    code, output = invoke("probe", "top_k", "--steps", 1, "--import", tmp_path / "mine.py", *sets)
    assert code == 0 and re.search(r"^mine_loss +0\.1 +\d", output, re.M), output


def test_an_unknown_router_names_the_option_that_makes_it_known():
    code, output = invoke("probe", "mine_unknown")
    assert code == 2 and "unknown router 'mine_unknown'" in output and "--import FILE.py" in output


def test_options_of_the_router_and_losses_are_set_by_name(text, tmp_path):
    sets = ("--set", "router.renormalise=false", "--set", "router.jitter=0.25", "--set", "losses.importance=0.5")
    assert study(text, tmp_path, "--config", "D", *sets)[0] == 0
    model = json.loads((tmp_path / "runs/D-seed0/config.json").read_bytes())["model"]
    assert model["router_options"] == {"renormalise": False, "jitter": 0.25} and model["losses"] == {"importance": 0.5}


def test_routers_are_listed():
    code, output = invoke("routers")
    assert code == 0 and all(name in output for name in ("top_k", "base_assignment", "not while training"))


def test_the_page_of_routers_is_made_from_the_classes():
    """After a change of a router: python cli.py routers --long > docs/routers.md"""
    page = (ROOT / "docs" / "routers.md").read_text(encoding="utf-8")
    done = subprocess.run([sys.executable, ROOT / "cli.py", "routers", "--long"], capture_output=True)
    assert done.stdout.decode() == page
    assert re.findall(r"^## `(\w+)`$", page, re.M)[:2] == ["top_k", "noisy_top_k"]
    missing = re.findall(r"## `(\w+)`\n\n[^#]*- (?:formula|used by): –", page)
    assert not missing, f"a class attribute formula or used_by is missing: {missing}"
    assert "- formula: p = softmax(x W); the K largest p; gates p / (sum of the chosen p), or p for K = 1\n" in page


def test_probe_says_what_leaks_and_refuses_what_it_does_not_know():
    small = [x for name in ("seq_len=16", "d_model=8", "d_ff=8", "batch_size=2") for x in ("--set", name)]
    code, output = invoke("probe", "expert_choice", "--steps", 1, *small)
    assert code == 0 and "exactly zero" not in output and "nats" in output
    code, output = invoke("probe", "hash", "--steps", 1, *small)
    assert code == 0 and output.count("exactly zero") == 3
    code, output = invoke("probe", "sinkhorn", "--steps", 1, *small, "--text", "synthetic")
    assert code == 0 and "sinkhorn leaks while training, not when it is evaluated" in output
    code, output = invoke("probe", "topk")
    assert code == 2 and "unknown router 'topk'" in output
    for option in ("moe_layers=[]", "seq_len=1", "vocab_size=100"):
        code, output = invoke("probe", "top_k", "--set", option)
        assert code == 2 and "a probe needs" in output


@pytest.mark.parametrize("text, message",
                         [(None, "no preset"), ("[]", "not a JSON object"), ("{}", "lacks"), ("nonsense", ""),
                                           ("[" * 100000, "")])
def test_params_refuses_what_is_no_config(tmp_path, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    code, output = invoke("params", path)
    assert code == (2 if text is None else 1) and output.splitlines()[-1].startswith("Error: ") and message in output


@pytest.mark.parametrize("args", [["params", "{long}"], ["route", "{long}", "a"], ["view", "{long}"],
                                  ["generate", "{long}", "--prompt", "a"], ["findings", "{long}"],
                                  ["compact", "{long}"], ["view", "{run}", "--text", "{long}"],
                                  ["view", "{run}", "--out", "{long}"], ["probe", "{long}"],
                                  ["routers", "--import", "{long}"], ["study", "--plot-only", "--out", "{long}"]])
@pytest.mark.parametrize("long", ["a/" * 3000, "a" * 300])
def test_a_path_that_is_too_long_is_one_line(args, long, run):
    code, output = invoke(*(arg.format(long=long, run=run) for arg in args))
    assert code in (1, 2) and [line[:6] for line in output.splitlines()].count("Error:") == 1, output[:500]
    assert output.splitlines()[-1].startswith("Error:") and "cannot write the output" not in output


def test_a_context_of_many_digits_is_wrong_usage():
    for digits in (80, 5000):
        code, output = invoke("params", "mixtral-8x7b", "--context", "9" * digits)
        assert code == 2 and output.splitlines()[-1].startswith("Error: Invalid value for '--context'")


def test_params_counts_a_preset_and_the_config_of_a_run(tmp_path):
    assert "671,026,419,200" in invoke("params", "deepseek-v3")[1]
    assert invoke("params", "DeepSeek-V3") == invoke("params", "deepseek-v3")
    (tmp_path / "config.json").write_text(json.dumps({"model": ModelConfig().to_dict()}))
    assert "4,040,832" in invoke("params", tmp_path / "config.json")[1]


# -- route, view, generate --


@pytest.fixture(scope="module")
def run(finished):
    return finished / "runs" / "B-seed0"


@pytest.fixture(scope="module")
def mixed(text, tmp_path_factory):
    """A run whose two MoE layers have different routers."""
    out = tmp_path_factory.mktemp("mixed")
    code, output = study(text, out, "--config", "D", moe_layers="[0,1]", router='["hash","expert_choice"]')
    assert code == 0, output
    return out / "runs" / "D-seed0"


def test_commands_show_a_run_with_a_router_for_each_layer(mixed, tmp_path):
    code, output = invoke("route", mixed, "one two three four", "--entropy")
    assert code == 0 and "layer 0, 4 experts" in output and "layer 1, 4 experts" in output
    assert "Otherwise: expert_choice looks at later bytes too" in output.splitlines()[-1]
    code, output = invoke("route", mixed, "one one one", "--layer", 0)
    expert = output.splitlines()[2][8:]
    assert code == 0 and expert[:3] == expert[4:7] == expert[8:]  # hash: the same byte, the same expert
    assert invoke("generate", mixed, "--prompt", "one", "--length", 3)[0] == 0
    assert invoke("view", mixed, "--out", tmp_path / "saved.html")[0] == 0
    shutil.copytree(mixed, tmp_path / "run", ignore=shutil.ignore_patterns("routings"))
    (tmp_path / "words.txt").write_text(WORDS)
    assert invoke("view", tmp_path / "run", "--text", tmp_path / "words.txt")[0] == 0
    for page in (tmp_path / "saved.html", tmp_path / "run" / "view.html"):
        data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)[1])
        assert data["router"] == "hash, expert_choice" and data["layers"] == [0, 1] and not data["limited"]
        assert "expert_choice looks at later bytes too" in data["note"]
    assert re.search(r"\| D .*hash.*expert_choice", (mixed.parent.parent / "FINDINGS.md").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_command_shows_a_run_with_a_router_of_the_users(text, tmp_path):
    """A new process knows the router from what the run recorded; --import is not needed again."""
    (tmp_path / "mine.py").write_text(MINE.format(name="mine_recorded"))
    settings = [f"--set={name}={value}".replace(" ", "") for name, value in (MODEL | TRAINING).items()]
    commands = [["study", "--jobs", 1, "--config", "D", "--text", text, "--out", tmp_path / "out", *settings,
                 "--import", tmp_path / "mine.py", "--set", "router=mine_recorded"],
                ["view", tmp_path / "out/runs/D-seed0"], ["route", tmp_path / "out/runs/D-seed0", "a"],
                ["generate", tmp_path / "out/runs/D-seed0", "--prompt", "a", "--length", 1],
                ["study", "--plot-only", "--out", tmp_path / "out"]]
    for args in commands:
        done = program(*args, stdout=subprocess.PIPE)
        said = b"checkpoint of step 6\n" if args[0] == "generate" else b""
        assert done.returncode == 0 and done.stderr == said, done.stderr
    assert "mine_recorded" in (tmp_path / "out/runs/D-seed0/view.html").read_text(encoding="utf-8")
    assert "D mine_recorded, K=" in (tmp_path / "out/FINDINGS.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name, value", [("NUMBA_NUM_THREADS", "0"), ("NUMBA_THREADING_LAYER", "x")])
def test_what_numba_refuses_is_one_line(name, value):
    pytest.importorskip("numba")
    done = program("gradcheck", "--only", "gelu", stdout=subprocess.PIPE,
                   env=os.environ | {"TINYMOE_KERNELS": "numba", name: value})
    assert done.returncode == 1 and done.stdout == b""
    assert re.fullmatch(rb"Error: numba does not start: .*TINYMOE_KERNELS=numpy\n", done.stderr)


def test_probe_takes_a_router_for_each_layer():
    small = [x for name in ("seq_len=16", "d_model=8", "d_ff=8", "batch_size=2") for x in ("--set", name)]
    code, output = invoke("probe", "top_k", "--steps", 1, *small, "--set", 'router=["reinforce","expert_choice"]',
                          "--set", "top_k=1")
    assert code == 0 and output.startswith("reinforce, expert_choice after 1 steps"), output
    code, output = invoke("probe", "top_k", "--steps", 1, *small, "--set", 'router=["top_k","base_assignment"]')
    assert code == 0 and output.startswith("top_k, base_assignment after 1 steps"), output  # the second needs K = 1
    code, output = invoke("probe", "top_k", "--set", 'router=["top_k"]')
    assert code == 2 and "one name for each of the 2 MoE layers" in output


def test_probe_takes_a_run_a_checkpoint_and_weights(run, finished, text, tmp_path):
    code, output = invoke("probe", run, "--text", text)
    assert code == 0 and re.match(rf"{run}, step 6: top_k; \d sequences of 16 bytes of text\n", output), output
    assert output == invoke("probe", run / "checkpoint.npz", "--text", text)[1].replace("/checkpoint.npz,", ",")
    code, output = invoke("probe", finished / "runs" / "E-seed0", "--text", text)
    assert code == 0 and "layer 1: expert_choice leaks: later tokens change the experts of" in output
    assert "trained on a text that is not here: give --text" in invoke("probe", run)[1]
    tinymoe.Transformer(ModelConfig(**MODEL)).save(tmp_path / "weights.npz")
    (tmp_path / "ids.txt").write_text(" ".join(map(str, range(200))))
    code, output = invoke("probe", tmp_path / "weights.npz", "--ids", tmp_path / "ids.txt")
    assert code == 0 and f"weights: top_k; 8 sequences of 16 ids of {tmp_path}" in output
    for args, code, message in (([run, "--steps", 3], 2, "as it is"), ([run, "--set", "top_k=1"], 2, "as it is"),
                                (["top_k", "--ids", "x"], 2, "--ids is for a file or run"),
                                ([tmp_path / "none.npz"], 2, "does not exist"), ([tmp_path], 1, "no config.json"),
                                ([run, "--ids", tmp_path / "none"], 1, "none"), ([text], 1, "config.json")):
        found = invoke("probe", *args)
        assert found[0] == code and message in found[1].splitlines()[-1], found


def test_route_shows_each_byte_above_its_expert(run, finished, monkeypatch):
    code, output = invoke("route", run, "one two\n", "--gate", "--entropy")
    text, expert, gate, entropy = (line[8:] for line in output.splitlines()[1:5])
    assert output.startswith("layer 1, 4 experts, step 6\n")
    assert code == 0 and text == "one two↵"
    assert set(expert) <= set("0123") and len(expert) == len(gate) == len(entropy) == 8
    assert "prefix alone" not in output and "windows" not in output
    code, output = invoke("route", finished / "runs" / "E-seed0", "more than sixteen bytes")
    assert code == 0 and "every 16" in output and "prefix alone" in output
    monkeypatch.setattr(os, "isatty", lambda handle: True)
    for no_color, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        assert ("\x1b[" in CliRunner().invoke(cli.main, ["route", str(run), "a"], color=True).output) == coloured


def test_view_writes_a_page_into_the_run_or_elsewhere(run, text, tmp_path):
    out = tmp_path / "new" / "page.html"
    code, output = invoke("view", run, "--text", text, "--out", out)
    assert code == 0 and str(out) in output and out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert invoke("view", run)[0] == 0 and (run / "view.html").exists()
    (run / "view.html").unlink()
    (tmp_path / "link").symlink_to(out)
    out.write_text("old")
    assert invoke("view", run, "--text", text, "--out", tmp_path / "link")[0] == 0
    assert (tmp_path / "link").is_symlink() and out.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_link_that_came_with_a_folder_is_not_followed(run, tmp_path):
    shutil.copytree(run, tmp_path / "out/runs/B-seed0")
    page, table, mine = tmp_path / "out/runs/B-seed0/view.html", tmp_path / "out/rows.csv", tmp_path / "mine"
    mine.write_text("mine")
    for link in (page, table):
        link.unlink(missing_ok=True)
        link.symlink_to(mine)
    assert invoke("view", page.parent)[0] == invoke("rows", table.parent)[0] == 0
    assert mine.read_text() == "mine" and not page.is_symlink() and table.read_text().startswith("run_id")


def test_generate_continues_a_prompt_and_repeats_itself(run):
    code, output = invoke("generate", run, "--prompt", "Grüße \udcff", "--length", 40)
    assert code == 0 and output.startswith("Grüße \ufffd") and len(output) > 40
    assert all(c.isprintable() or c in "\n\t" for c in output)
    assert output == invoke("generate", run, "--prompt", "Grüße \udcff", "--length", 40)[1]
    assert output != invoke("generate", run, "--prompt", "Grüße \udcff", "--length", 40, "--seed", 1)[1]
    assert output.splitlines()[-1] == "checkpoint of step 6"
    greedy = [invoke("generate", run, "--prompt", "ab", "--length", 8, *options)
              for options in (("--temperature", 0), ("--top", 1))]
    assert greedy[0] == greedy[1] and greedy[0][0] == 0


@pytest.mark.parametrize("typed, code, named", [
    ("route {dir}/nowhere a", 1, "nowhere"), ("view {dir}/nowhere", 1, "nowhere"),
    ("generate {dir}/nowhere --prompt a", 1, "nowhere"),
    ("route {dir}/torn a", 1, "not a complete"), ("view {dir}/torn", 1, "not a complete"),
    ("generate {dir}/torn --prompt a", 1, "not a complete"),
    ("view {dir}/none", 1, "none holds no checkpoint: give the folder of one run, such as OUT/runs/D-seed0"),
    ("route {run}/../.. a", 1, "give the folder of one run"), ("probe {run}/../..", 1, "give the folder of one run"),
    ("generate {run}/../.. --prompt a", 1, "give the folder of one run"),
    ("route {run} a --layer 0", 2, "--layer 0: .* are 1"),
    ("route {run} ", 2, "TEXT is empty"), ("view {run} --text {dir}/missing.txt", 1, "missing.txt"),
    ("view {run} --text {dir}/empty.txt", 1, "empty.txt is empty"), ("view {run} --text {dir}", 1, "directory"),
    ("view {run} --out {dir}/empty.txt/page.html", 1, "empty.txt"),
    ("view {run} --out {run}/log.jsonl", 2, "is a file of a run"),
    ("view {run} --out {run}/routings/000006.npz", 2, "is a file of a run"),
    ("view {run} --out {dir}/link.html", 2, "is a file of a run"),
    ("rows {run}/../.. -o {run}/config.json", 2, "is a file of a run"),
    ("rows {run}/../.. -o {run}/../../FINDINGS.md", 2, "is a file of a run"),
    ("compare {run} -o {dir}/runs.jsonl", 2, "is a file of a run"),
    ("explain --figure {run}/checkpoint.npz", 2, "is a file of a run"),
    ("compare {run} -o {dir}/x.pdf", 2, "x.pdf: a figure is a PNG"),
    ("explain --figure {dir}/x.pdf", 2, "x.pdf: a figure is a PNG"),
    ("view {dir}/large --text {dir}/words.txt", 1, "numbers that are not finite"),
    ("route {dir}/large ab --gate --entropy --load", 1, "numbers that are not finite"),
    ("generate {dir}/large --prompt ab", 1, "numbers that are not finite"),
    ("generate {run} --prompt a --temperature -1", 2, "temperature -1.0"),
    ("generate {run} --prompt a --temperature nan", 2, "temperature nan"),
    ("generate {run} --prompt a --temperature hot", 2, "hot"),
    ("generate {run} --prompt ", 2, "prompt is empty"),
    ("generate {run} --prompt a --length 0", 2, "0 is not in the range")])
def test_a_run_that_cannot_be_shown_ends_in_one_clear_line(typed, code, named, run, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "none").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "link.html").symlink_to(run / "checkpoint.npz")
    (tmp_path / "torn" / "checkpoint.npz").write_bytes((run / "checkpoint.npz").read_bytes()[:-2000])
    (tmp_path / "words.txt").write_text("one two")
    arrays, header = files.load_arrays(run / "checkpoint.npz", "checkpoint")
    files.save_arrays(tmp_path / "large" / "checkpoint.npz", {name: array * array.dtype.type(
        1e37 if name.startswith("p/") else 1) for name, array in arrays.items()}, header)
    before = snapshot(run)
    got, output = invoke(*(part.format(dir=tmp_path, run=run) for part in typed.split(" ")))
    error = [line for line in output.splitlines() if line.startswith("Error:")]
    assert got == code and len(error) == 1 and re.search(named, error[0]), output
    assert snapshot(run) == before
