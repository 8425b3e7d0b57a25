"""The runner: the table of configs, runs one by one and side by side, and processes that are killed."""

import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cli
from test_train import MODEL, TRAINING, WORDS, own_router, results, snapshot, tiny
from tinymoe import files
from tinymoe.experiments import STUDY
from tinymoe.study import runner as study
from tinymoe.training import identity, lease, plan, run_folder
from tinymoe.training.data import CorpusError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS)
    return path


def outcome(out):
    return {folder.name: results(folder) for folder in sorted((out / "runs").iterdir())}


# -- the table --


def test_the_configs_are_those_of_the_study():
    assert [(s.id, *s.model.values()) for s in STUDY.settings] == [
        ("A", "top_k", 1, 0.0), ("B", "top_k", 1, 0.01), ("C", "top_k", 1, 0.1),
        ("D", "top_k", 2, 0.01), ("E", "expert_choice", 2, 0.0), ("F", "noisy_top_k", 2, 0.01),
        ("G", "top_k", 2, 0.01, {"renormalise": False})]
    assert list(next(o for o in cli.study.params if o.name == "configs").type.choices) == [s.id for s in STUDY.settings]
    full, quick = (STUDY.runs(STUDY.scales[name], 1)[0].training for name in ("default", "quick"))
    assert full == plan.TrainConfig(final_windows=1000) and full.steps == 2000 and full.batch_size == 8
    assert quick == replace(full, steps=200, n_evaluations=4, final_windows=32)


def test_runs_go_seed_by_seed_and_overrides_win_over_the_table():
    all_runs = STUDY.runs(STUDY.scales["default"], 2, "EA", {"top_k": 3, "n_layers": 4, "moe_layers": [1]})
    assert [run.run_id for run in all_runs] == ["E-seed0", "A-seed0", "E-seed1", "A-seed1"]
    assert {(run.model.top_k, run.model.n_layers) for run in all_runs} == {(3, 4)}
    assert all_runs[0].model.router == "expert_choice"


def test_another_router_does_not_get_the_options_of_the_one_it_replaces():
    def options(**model):
        return STUDY.runs(STUDY.scales["default"], 1, "G", model)[0].model.router_options

    assert options() == options(router="top_k") == {"renormalise": False}
    assert options(router="random") == {}
    assert options(router="sinkhorn", router_options={"router_std": 0.1}) == {"router_std": 0.1}


def test_options_that_are_given_are_added_to_those_of_the_setting():
    (run,) = STUDY.runs(STUDY.scales["default"], 1, "G", {"router_options": {"router_std": 0.1}})
    assert run.model.router_options == {"renormalise": False, "router_std": 0.1}


# -- one by one --


def test_events_tell_every_step_and_the_end(text, tmp_path):
    events = []
    assert study.run_study([tiny()], tmp_path, text, on_event=events.append) == {}
    assert [(e.kind, e.step) for e in events] == [*(("step", i) for i in range(1, 7)), ("done", 0)]
    assert all(e.run_id == "F-seed0" and not e.message for e in events)


def test_a_failed_run_does_not_stop_the_others(text, tmp_path):
    bad = tiny("A", learning_rate=1e30)
    failures = study.run_study([bad, tiny("F")], tmp_path, text)
    assert list(failures) == ["A-seed0"] and "at step 2, beginning in" in failures["A-seed0"]
    assert (tmp_path / "runs/A-seed0/failure.json").exists() and (tmp_path / "runs/F-seed0/summary.json").exists()


def test_an_error_of_any_kind_does_not_stop_the_others(text, tmp_path):
    """Two run folders that cannot be made, since files are in their place; a model no memory can hold."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/A-seed0").write_text("mine")
    huge = tiny("B", model={"d_model": 2**30})
    failures = study.run_study([tiny("A"), huge, tiny("F")], tmp_path, text)
    assert list(failures) == ["A-seed0", "B-seed0"] and "A-seed0" in failures["A-seed0"]
    assert (tmp_path / "runs/A-seed0").read_text() == "mine" and (tmp_path / "runs/F-seed0/summary.json").exists()


def raises(trainer):
    raise ValueError("two\nlines")


@pytest.mark.parametrize("measure, said", [
    (raises, "measure failed (ValueError: two lines): it must return"),
    (lambda trainer: {"y": 1, "x": float("nan")}, "measure failed at 'x', nan (ValueError: "),
    (lambda trainer: {"x": np.float32(1)}, "measure failed at 'x', "),
    (lambda trainer: {"x": [np.nan] * 999}, f"measure failed at 'x', {str([np.nan] * 999)[:80]} (ValueError: "),
    (lambda trainer: {"load_cv": 9.0}, "measure failed at 'load_cv', 9.0 (ValueError: every run has a number of this"),
    (lambda trainer: None, "measure failed (TypeError")])
def test_a_measure_that_fails_stops_no_other_run_and_can_be_mended(text, tmp_path, measure, said):
    events, mine = [], tmp_path / "runs/A-seed0/summary.json"
    failures = study.run_study([replace(tiny("A"), measure=measure), tiny("F")], tmp_path, text)
    assert list(failures) == ["A-seed0"] and failures["A-seed0"].startswith(said) and "\n" not in failures["A-seed0"]
    assert (tmp_path / "runs/F-seed0/summary.json").exists() and not mine.exists()
    mended = [replace(tiny("A"), measure=lambda trainer: {"x": 1.0}), tiny("F")]
    assert study.run_study(mended, tmp_path, text, on_event=events.append) == {}
    assert {e.kind for e in events} == {"resumed", "done"} and files.read_json(mine)["measured"] == {"x": 1.0}


def test_fresh_trains_again_and_nothing_else_does(text, tmp_path):
    steps = []

    def count(**options):
        steps.clear()
        study.run_study([tiny()], tmp_path, text, on_event=lambda e: steps.append(e.step), **options)
        return len(steps) - 1

    assert count() == 6
    first, own = outcome(tmp_path), tmp_path / "runs/notes"
    own.mkdir()
    (own / "mine.txt").write_text("kept")
    assert count() == 0 and count(fresh=True) == 6
    assert own.joinpath("mine.txt").read_text() == "kept" and results(tmp_path / "runs/F-seed0") == first["F-seed0"]
    study.run_study([tiny(steps=3)], tmp_path, text, fresh=True)  # other settings: what --fresh is the remedy for
    assert results(tmp_path / "runs/F-seed0")[1][0]["step"] == 3


def test_fresh_leaves_a_run_alone_that_another_process_writes(text, tmp_path, monkeypatch):
    folder = tmp_path / "runs/F-seed0"
    study.run_study([tiny()], tmp_path, text)
    before = snapshot(folder)
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: None)
    with run_folder.RunFolder(folder).locked():
        failures = study.run_study([tiny()], tmp_path, text, fresh=True)
    assert "is being written by another process" in failures["F-seed0"] and snapshot(folder) == before


def test_a_run_whose_start_failed_is_not_trained(text, tmp_path):
    """Else it would start from what an earlier command left."""
    def dense_and_after(**training):
        return [replace(tiny("D", model={"moe_layers": []}, **training), config_id="dense"),
                replace(tiny("D", **training), config_id="up", start="dense")]

    study.run_study(dense_and_after()[:1], tmp_path, text)
    failures = study.run_study(dense_and_after(learning_rate=0.01), tmp_path, text)
    assert "other settings" in failures["dense-seed0"]
    assert failures["up-seed0"] == "its start, the run dense-seed0, failed"
    assert list((tmp_path / "runs/up-seed0").iterdir()) == []


def test_a_run_reads_the_text_by_its_own_window_whatever_is_trained_beside_it(tmp_path):
    """In a short text the split depends on the length of a window."""
    text, long = WORDS.encode(), replace(tiny("A"), model=replace(tiny().model, seq_len=64))
    assert study.run_study([tiny(), long], tmp_path / "both", text) == {}
    for run in (long, tiny()):
        assert study.run_study([run], tmp_path / "one", text) == {}
    valid = [[files.read_json(tmp_path / where / "runs" / run.run_id / "config.json")["corpus"]["text"]["valid_bytes"]
              for run in (tiny(), long)] for where in ("both", "one")]
    assert valid[0] == valid[1] and valid[0][0] != valid[0][1]


def test_domains_in_another_order_are_another_run(tmp_path):
    """They would draw other batches."""
    texts = {"words": WORDS.encode(), "backwards": WORDS[::-1].encode()}
    assert study.run_study([tiny()], tmp_path, texts) == study.run_study([tiny()], tmp_path, texts) == {}
    failures = study.run_study([tiny()], tmp_path, dict(reversed(texts.items())))
    assert "order of the domains is ['words', 'backwards'], not ['backwards', 'words']" in failures["F-seed0"]


def test_a_missing_text_loses_nothing_even_with_fresh(text, tmp_path):
    study.run_study([tiny()], tmp_path, text)
    before = snapshot(tmp_path)
    with pytest.raises(CorpusError, match="nowhere.txt"):
        study.run_study([tiny()], tmp_path, tmp_path / "nowhere.txt", fresh=True)
    assert snapshot(tmp_path) == before


# -- side by side --


@pytest.mark.slow
def test_a_killed_worker_is_reported_and_the_same_command_makes_it_good(text, tmp_path):
    """The bits are the same with two jobs as with one, and with any number of threads."""
    all_runs = [tiny("F"), replace(tiny("F", steps=3000, n_evaluations=1500), seed=1)]  # the second is long
    killed = []

    def kill(event):
        if not killed and event.run_id == "F-seed1" and (tmp_path / "two/runs/F-seed1/checkpoint.npz").exists():
            killed.append(lease.holder(tmp_path / "two/runs/F-seed1")["pid"])  # whichever process has this run
            os.kill(killed[0], signal.SIGKILL)

    failures = study.run_study(all_runs, tmp_path / "two", text, jobs=2, on_event=kill)
    assert killed and list(failures) == ["F-seed1"] and "same command again" in failures["F-seed1"]
    study.run_study(all_runs[:1], tmp_path / "one", text)
    assert results(tmp_path / "two/runs/F-seed0") == results(tmp_path / "one/runs/F-seed0")


def children(pid):
    """Pids of the processes that a process started."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second if it ends between open and read
        return False


def wait_for(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
CONFIGS, STEPS = "AF", 200


def command(text, out):
    values = MODEL | TRAINING | {"n_evaluations": 40}
    settings = [f"{name}={value}".replace(" ", "") for name, value in values.items() if name != "steps"]
    return [sys.executable, str(ROOT / "cli.py"), "study", "--text", str(text), "--out", str(out), "--jobs", "2",
            "--steps", str(STEPS), *(arg for c in CONFIGS for arg in ("--config", c)),
            *(arg for s in settings for arg in ("--set", s))]


@linux
@pytest.mark.slow
def test_a_study_killed_outright_takes_its_workers_along_and_goes_on_with_the_same_bits(text, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen(command(text, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: list(out.glob("runs/*/checkpoint.npz")))
        workers = children(process.pid)
        assert len(workers) >= 2 and process.poll() is None
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not any(map(alive, workers)))
    assert len(list(out.glob("runs/*/summary.json"))) < 2  # there is something left to do

    again = subprocess.run(command(text, out), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    whole = [tiny(c, steps=STEPS, n_evaluations=40) for c in CONFIGS]
    study.run_study(whole, tmp_path / "whole", text)
    assert outcome(out) == outcome(tmp_path / "whole")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("moment", ["importing", "training"])
def test_ctrl_c_ends_with_one_line_and_130(text, tmp_path, moment):
    process = subprocess.Popen(command(text, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True,  # and SIGINT as usual, which a shell's background job ignores:
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        if moment == "importing":
            wait_for(lambda: len(children(process.pid)) == 3)  # two workers and multiprocessing's own helper
            time.sleep(0.7)
        else:
            wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.npz")))
        workers = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and output.splitlines()[-1].startswith("Interrupted. The same command ")
    assert "Traceback" not in output
    wait_for(lambda: not any(map(alive, workers)))


# -- workers that die --


def first_worker(known):
    """The pid of a worker process that is not in `known`, as soon as there is one."""
    found = set()
    wait_for(lambda: found.update(p.pid for p in multiprocessing.active_children() if p.pid not in known) or found)
    return min(found)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, 0.2, 1.0], ids=["at once", "while it imports", "later"])
def test_a_worker_that_dies_while_it_starts_fails_one_run_and_the_others_finish(text, tmp_path, delay):
    def kill():
        pid = first_worker(known)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)

    known = {p.pid for p in multiprocessing.active_children()}
    killer = threading.Thread(target=kill)
    killer.start()
    all_runs = [replace(tiny("F", steps=200), seed=seed) for seed in range(3)]
    failures = study.run_study(all_runs, tmp_path, text, jobs=2)
    killer.join()
    assert len(failures) == 1 and "exit code -9: run the same command again" in next(iter(failures.values()))
    finished = {path.parent.name for path in tmp_path.glob("runs/*/summary.json")}
    assert finished == {run.run_id for run in all_runs} - set(failures)
    assert study.run_study(all_runs, tmp_path, text, jobs=2) == {}


def die_while_sending(trainer):
    """Write the first half of a message into the pipe to the parent, then die. It is called in the worker."""
    for link in Path("/proc/self/fd").iterdir():
        if os.path.exists(link) and os.readlink(link).startswith("socket:"):
            os.write(int(link.name), struct.pack("!i", 10**6) + b"half a message")
    os.kill(os.getpid(), signal.SIGKILL)


@linux
@pytest.mark.slow
def test_a_worker_that_dies_while_it_sends_fails_one_run_and_the_others_finish(text, tmp_path):
    all_runs = [replace(tiny(), seed=seed, measure=die_while_sending if seed == 1 else None) for seed in range(4)]
    failures = study.run_study(all_runs, tmp_path, text, jobs=2)
    assert list(failures) == ["F-seed1"] and len(list(tmp_path.glob("runs/*/summary.json"))) == 3


@pytest.mark.slow
def test_a_measure_that_no_process_can_be_sent_fails_its_run_alone(text, tmp_path):
    all_runs = [replace(tiny(), seed=seed, measure=(lambda trainer: {}) if seed == 1 else None) for seed in range(4)]
    failures = study.run_study(all_runs, tmp_path, text, jobs=2)
    assert list(failures) == ["F-seed1"] and "define its `measure` at the top level of a module" in failures["F-seed1"]
    assert len(list(tmp_path.glob("runs/*/summary.json"))) == 3


@pytest.mark.slow
def test_workers_know_the_users_routers(text, tmp_path):
    path, model = own_router(tmp_path, 2)
    identity.execute_files((path,))
    all_runs = [replace(tiny("D", model=model), seed=seed, imports=(path,)) for seed in range(2)]
    assert study.run_study(all_runs, tmp_path / "two", text, jobs=2) == {}
    assert study.run_study(all_runs, tmp_path / "one", text) == {}
    assert outcome(tmp_path / "two") == outcome(tmp_path / "one")


@pytest.mark.slow
def test_a_program_without_a_main_guard_ends_with_one_line(text, tmp_path):
    (tmp_path / "program.py").write_text(f"""
import sys
import threading
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
from dataclasses import replace
from test_train import tiny
from tinymoe.study.runner import run_study
run_study([replace(tiny(), seed=seed) for seed in range(3)], {str(tmp_path / 'out')!r}, {str(text)!r}, jobs=2)
""")
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert 'if __name__ == "__main__":' in line and "jobs=1" in line


@pytest.mark.slow
def test_a_damaged_header_is_one_line_with_two_jobs_too(text, tmp_path):
    """And the advice helps: without the folder the same command trains the run."""
    all_runs = [replace(tiny(), seed=seed) for seed in range(2)]
    assert study.run_study(all_runs, tmp_path, text) == {}
    for run, change in zip(all_runs, ({"n_rows": 1.5}, {"generators": {}})):
        folder = tmp_path / "runs" / run.run_id
        (folder / "summary.json").unlink()
        arrays, header = files.load_arrays(folder / "checkpoint.npz", "checkpoint")
        files.save_arrays(folder / "checkpoint.npz", arrays, header | change)
    failures = study.run_study(all_runs, tmp_path, text, jobs=2)
    assert len(failures) == 2
    assert all("move this run's folder away" in message and "\n" not in message for message in failures.values())
    for run in all_runs:
        shutil.rmtree(tmp_path / "runs" / run.run_id)
    assert study.run_study(all_runs, tmp_path, text, jobs=2) == {}


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_whose_folder_vanishes_says_so(text, tmp_path, jobs):
    def vanish(event):
        if event.kind == "done":
            shutil.rmtree(tmp_path / "out")
    all_runs = [tiny(), replace(tiny(steps=400), seed=1)]
    failures = study.run_study(all_runs, tmp_path / "out", text, jobs=jobs, on_event=vanish)
    assert set(failures) == {"F-seed0", "F-seed1"} if jobs == 2 else "F-seed0" in failures
    assert all("vanished" in message for message in failures.values())


# -- what a study refuses --


def test_output_among_the_texts_is_refused(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "words.txt").write_text(WORDS)
    for out in (texts, texts / "results", texts / "a" / "b"):
        with pytest.raises(CorpusError, match="lies inside --text .*choose an --out outside of it"):
            study.run_study([tiny()], out, texts)
    assert [path.name for path in texts.iterdir()] == ["words.txt"]
    for out in (tmp_path / "results", texts / ".hidden"):  # hidden files are no text
        assert study.run_study([tiny()], out, texts) == {}


def test_no_run_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match="^there is no run to train: give at least one RunPlan"):
        study.run_study([], tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_runs_train_on_bytes_in_memory(text, tmp_path):
    assert study.run_study([tiny()], tmp_path / "memory", {"words": text.read_bytes()}) == {}
    assert study.run_study([tiny()], tmp_path / "file", text) == {}
    assert outcome(tmp_path / "memory") == outcome(tmp_path / "file")


def test_two_runs_of_one_id_are_refused(text, tmp_path):
    with pytest.raises(ValueError, match="the same id"):
        study.run_study([tiny(), tiny(steps=3)], tmp_path, text)


@pytest.mark.parametrize("place", ["runs", "runs/F-seed0", *(f"runs/F-seed0/{name}" for name in
                                                            (".lock", "routings", "log.jsonl"))])
def test_a_link_inside_the_results_leads_nowhere(text, tmp_path, place):
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    (outside / "000002.npz").write_text("mine")
    (out / place).parent.mkdir(parents=True)
    is_file = place.endswith((".lock", ".jsonl"))
    (out / place).symlink_to(outside / "000002.npz" if is_file else outside)
    before = snapshot(outside)
    if place == "runs":
        with pytest.raises(OSError, match="runs is a link"):
            study.run_study([tiny()], out, text)
    else:
        assert "is a link" in study.run_study([tiny()], out, text)["F-seed0"]
    assert snapshot(outside) == before


# -- resuming --


def test_resuming_says_from_which_step(text, tmp_path):
    def stop(event):
        if event.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.run_study([tiny()], tmp_path, text, on_event=stop)
    events = []
    study.run_study([tiny()], tmp_path, text, on_event=events.append)
    assert [(e.kind, e.step) for e in events] == [("resumed", 4), ("step", 5), ("step", 6), ("done", 0)]
    assert all(e.steps == 6 for e in events[:-1])
