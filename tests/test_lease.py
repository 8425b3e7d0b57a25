"""The lease of a run's folder: one process writes, on whatever host it is; a lease of the dead is taken over."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from test_study import wait_for
from test_train import corpus, reference, results, stopped, tiny  # noqa: F401  (fixtures)
from tinymoe import files
from tinymoe.study.rows import overview
from tinymoe.training import identity, lease, run_folder
from tinymoe.training import trainer as t

ROOT = Path(__file__).resolve().parent.parent


def left(folder, tag="another1", pid=7, age=0.0, content=None, number=1):
    """A lease that a process of some host left, `age` seconds ago."""
    path = folder / f".lease{number}"
    path.write_text(json.dumps({"host": "far", "tag": tag, "pid": pid}) if content is None else content)
    os.utime(path, (time.time() - age,) * 2)
    return path


def take(folder, locked=False):
    """Whether the folder's lease can be had; it is released again."""
    one = lease.Lease(folder)
    try:
        return one.take(locked)
    finally:
        one.release()


def test_a_lease_is_of_one_process_and_is_gone_after_it(tmp_path):
    first = lease.Lease(tmp_path)
    assert first.take(False) and first.held() and not take(tmp_path)
    assert lease.holder(tmp_path)["pid"] == os.getpid() and [p.name for p in tmp_path.iterdir()] == [".lease1"]
    first.release()
    assert lease.holder(tmp_path) is None and not list(tmp_path.iterdir()) and take(tmp_path)


@pytest.mark.parametrize("case, free", [
    (dict(age=lease.SECONDS - 30), False), (dict(age=lease.SECONDS + 30), True),  # another host: by its time alone
    (dict(tag="mine", pid=2**22 + 1), True), (dict(tag="mine", pid=os.getppid()), False),  # this host: is it alive?
    (dict(content="", age=-30), False), (dict(content="", age=5), True), (dict(content="[1]", age=5), True)])
def test_a_lease_is_taken_over_when_it_is_stale(tmp_path, case, free):
    if case.get("tag") == "mine":
        if not sys.platform.startswith("linux"):
            pytest.skip("it is not seen that a process is gone")
        case = case | {"tag": files.host_tag()}
    left(tmp_path, **case)
    assert take(tmp_path) is free
    assert bool(list(tmp_path.iterdir())) is not free


@pytest.mark.parametrize("content", ['{"tag": "x", "pid": 5}', '{"host": "a", "tag": "x", "pid": 1e999}', "[" * 1000,
                                     '{"host": "a", "tag": "x", "pid": ' + "9" * 900 + "}"])
def test_a_damaged_lease_is_of_an_unknown_process(tmp_path, content):
    left(tmp_path, content=content)
    assert lease.holder(tmp_path) == {"host": "?", "pid": 0}


def test_seconds_of_a_row_say_nothing_where_they_are_not_finite(tmp_path):
    folder = tmp_path / "runs" / "A-seed0"
    folder.mkdir(parents=True)
    left(folder)
    (folder / "config.json").write_text('{"training": {"steps": 9}}')
    (folder / "log.jsonl").write_text('{"step": 3, "causal_cross_entropy": 2.0, "seconds": 1e999}')
    assert (overview(tmp_path)[0]["state"], overview(tmp_path)[0]["left"]) == ("running", None)


@pytest.mark.parametrize("text", ["abc", "nan", "-1", "0", "inf"])
def test_the_time_of_a_lease_is_a_number_above_0(tmp_path, text):
    done = subprocess.run([sys.executable, "cli.py", "runs", tmp_path], cwd=ROOT, env=os.environ | {
        "TINYMOE_LEASE": text}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"Error: TINYMOE_LEASE is '{text}': set it to a number of seconds above 0")


def test_the_lock_shows_that_a_holder_on_this_host_is_gone(tmp_path):
    left(tmp_path, files.host_tag(), os.getppid())  # a number that another process has by now
    assert take(tmp_path, locked=True)


def test_who_judged_too_long_ago_withdraws(tmp_path, monkeypatch):
    """Would have caught: a slow process that removed the lease of another which had taken over in the meantime."""
    fast, slow = lease.Lease(tmp_path), lease.Lease(tmp_path)
    left(tmp_path, age=lease.SECONDS + 30)

    def judge(leases, locked):
        monkeypatch.undo()
        return fast.take(False)

    monkeypatch.setattr(slow, "_are_stale", judge)
    assert not slow.take(False) and fast.held() and not slow.held()
    assert [p.name for p in tmp_path.iterdir()] == [".lease2"]
    fast.release()
    assert slow.take(False) and slow.held()
    slow.release()
    left(tmp_path, age=lease.SECONDS + 30)

    def judge_longer(leases, locked):
        for _ in range(2):  # another takes over, dies, and a third takes over
            fast.take(False)
            os.utime(fast.path, (0, 0))
        return fast.take(False)

    monkeypatch.setattr(lease, "is_gone", lambda pid: False)
    monkeypatch.setattr(slow, "_are_stale", judge_longer)
    assert not slow.take(False) and fast.held() and not slow.held()
    assert [p.name for p in tmp_path.iterdir()] == [".lease4"]
    fast.release()


def test_a_holder_renews_its_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "SECONDS", 0.3)
    first, waits = lease.Lease(tmp_path), []
    wait = first._ended.wait
    monkeypatch.setattr(first._ended, "wait", lambda seconds: waits.append(seconds) or wait(seconds))
    first.take(False)
    for _ in range(2):
        os.utime(first.path, (0, 0))
        wait_for(lambda: first.path.stat().st_mtime > 0, seconds=20)
    first.release()
    assert max(waits) < 0.3 / 2


PROGRAM = """
import os, random, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from tinymoe.training.lease import Lease
folder, rng, left = Path(sys.argv[1]), random.Random(sys.argv[2]), 30
while left:
    one = Lease(folder)
    if not one.take(False):
        time.sleep(rng.random() * 0.002)
        continue
    number = int((folder / "number").read_text())
    time.sleep(rng.random() * 0.001)
    (folder / "number").write_text(str(number + 1))
    left -= 1
    if rng.random() < 0.5:
        one._ended.set()
        os.utime(one.path, (0, 0))  # as if it had died long ago
    else:
        one.release()
"""


@pytest.mark.slow
def test_many_processes_never_hold_it_at_once(tmp_path):
    """Four processes each add 1 to a number 30 times, and half of the times leave a stale lease behind."""
    (tmp_path / "number").write_text("0")
    programs = [subprocess.Popen([sys.executable, "-c", PROGRAM.format(root=str(ROOT)), tmp_path, str(seed)])
                for seed in range(4)]
    assert [program.wait(120) for program in programs] == [0] * 4
    assert (tmp_path / "number").read_text() == "120"


# -- runs --


def test_a_run_that_another_host_trains_is_busy(corpus, stopped, monkeypatch):  # noqa: F811
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: None)
    left(stopped)
    with pytest.raises(run_folder.Busy, match="is being written by another process"):
        t.train(tiny(), corpus, stopped)


def test_a_stale_lease_is_taken_over_and_the_run_ends_with_the_same_bits(corpus, stopped, reference):  # noqa: F811
    left(stopped, age=lease.SECONDS + 30)
    t.train(tiny(), corpus, stopped)
    assert results(stopped) == reference and not list(stopped.glob(".lease*"))


def test_what_another_host_left_half_written_is_removed(corpus, stopped, reference):  # noqa: F811
    """Would have caught: a file of a worker that was killed while it wrote, and that stayed in the finished run."""
    for place in (stopped / ".log.jsonl", stopped / "routings/.000006.npz"):
        place.with_name(f"{place.name}.0123456789abcdef.tinymoe").write_text("half")
    t.train(tiny(), corpus, stopped)
    assert results(stopped) == reference and not list(stopped.rglob("*.tinymoe"))


def test_a_process_that_slept_too_long_writes_no_more(corpus, stopped, reference):  # noqa: F811
    def sleep(event):
        if event.kind == "step":
            (stopped / ".lease1").unlink(missing_ok=True)
            left(stopped, number=2)

    with pytest.raises(run_folder.Busy, match="another process took it over while this one was stopped"):
        t.train(tiny(), corpus, stopped, sleep)
    assert json.loads((stopped / ".lease2").read_text())["host"] == "far"
    (stopped / ".lease2").unlink()
    t.train(tiny(), corpus, stopped)
    assert results(stopped) == reference


def test_a_run_that_ended_while_this_process_waited_is_not_trained_again(corpus, stopped, tmp_path, monkeypatch):  # noqa: F811
    def end(seconds):
        shutil.copytree(tmp_path / "elsewhere", stopped, dirs_exist_ok=True)
        (stopped / ".lease1").unlink()

    t.train(tiny(), corpus, tmp_path / "elsewhere")
    left(stopped)
    monkeypatch.setattr(run_folder.time, "sleep", end)
    events = []
    assert t.train(tiny(), corpus, stopped, events.append)["steps"] == 6 and events == []


def test_a_run_begun_by_a_command_is_begun_once(corpus, tmp_path):  # noqa: F811
    """A cluster may start a task of the command `--fresh` twice: it throws away what was there before the first."""
    def steps(fresh):
        events = []
        t.train(tiny(), corpus, tmp_path, lambda event: events.append(event.step), fresh)
        return len(events)

    assert [steps(fresh) for fresh in (False, "one", "one", "two", "two", False, True)] == [6, 6, 0, 6, 0, 0, 6]


def test_a_resume_on_another_processor_is_noted(corpus, stopped, monkeypatch):  # noqa: F811
    before = files.read_json(stopped / "config.json")
    monkeypatch.setattr(t, "machine", lambda: identity.machine() | {"processor": "other"})
    t.train(tiny(), corpus, stopped)
    config = files.read_json(stopped / "config.json")
    assert identity.noted(config, "processor") == [before["processor"], "other"]
    assert config == before | {"processors": [before["processor"], "other"]}


def test_a_resume_with_other_versions_is_noted(corpus, stopped, monkeypatch):  # noqa: F811
    before, newer = files.read_json(stopped / "config.json"), {"python": "3.99"}
    monkeypatch.setattr(t, "machine", lambda: identity.machine() | {"versions": newer})
    t.train(tiny(), corpus, stopped)
    assert files.read_json(stopped / "config.json") == before | {"all_versions": [before["versions"], newer]}


def test_a_lock_is_free_after_a_lease_that_could_not_be_removed(tmp_path, monkeypatch):
    def broken(self):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(lease.Lease, "release", broken)
    with pytest.raises(OSError, match="Input/output"), run_folder.RunFolder(tmp_path).locked():
        pass
    monkeypatch.undo()
    with run_folder.RunFolder(tmp_path).locked():
        pass


def test_a_lease_that_vanishes_while_it_is_read_is_absent(tmp_path, monkeypatch):
    """On NFS that is ESTALE, where another host has removed the file."""
    def stale(*how):
        raise OSError(errno.ESTALE, "Stale file handle")

    left(tmp_path)
    monkeypatch.setattr(lease, "open", stale, raising=False)
    assert lease.holder(tmp_path) is None


def test_a_lease_that_a_full_disk_cannot_hold_leaves_no_file(tmp_path, monkeypatch):
    def full(handle, *how):
        os.close(handle)
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(lease, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left on device: make room"):
        lease.Lease(tmp_path).take(locked=True)
    assert not list(tmp_path.iterdir())
