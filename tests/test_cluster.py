"""A study on a Dask cluster of this machine: workers and the scheduler die, and it ends with the same bits.

`python tests/cluster_show.py` does the same on two hosts that are network namespaces, for longer.
"""

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from test_lease import left
from test_study import outcome, tiny, wait_for
from test_train import MODEL, TRAINING, WORDS, results, snapshot
from tinymoe import files, kernels
from tinymoe.study import runner
from tinymoe.training import data, lease
from tinymoe.training.data import CorpusError, load_corpus
from tinymoe.training.plan import Event

cluster = pytest.importorskip("tinymoe.study.cluster", reason="distributed is not installed", exc_type=ImportError)
ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS)
    return path


class Dask:
    """A scheduler and workers, each a process of its own (a worker has no nanny: it stays dead)."""

    def __init__(self, n_workers, scheme="tcp", **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address, self.workers = f"{scheme}://127.0.0.1:{self.port}", []
        self.environment = os.environ | environment | {"PYTHONPATH": str(ROOT), "NUMBA_NUM_THREADS": "1"}
        self.start_scheduler()
        for _ in range(n_workers):
            self.start_worker()

    def _start(self, module, *args):
        command = [sys.executable, "-m", f"distributed.cli.{module}", *map(str, args), "--no-dashboard"]
        return subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def start_scheduler(self):
        self.scheduler = self._start("dask_scheduler", "--host", self.address.rpartition(":")[0], "--port", self.port)

    def start_worker(self):
        self.workers.append(self._start("dask_worker", self.address, "--nthreads", 1, "--no-nanny"))

    def kill_worker(self):
        worker = next(worker for worker in self.workers if worker.poll() is None)
        worker.kill()
        worker.wait()

    def end(self):
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def dask():
    dask = Dask(2)
    yield dask
    dask.end()


def several(n, steps=6, **training):
    return [replace(tiny("F", steps=steps, **training), seed=seed) for seed in range(n)]


def study(text, out, dask, **settings):
    """The command line of a study."""
    settings = [f"{name}={value}".replace(" ", "") for name, value in (MODEL | TRAINING | settings).items()]
    command = [sys.executable, ROOT / "cli.py", "study", "--text", text, "--out", out, "--config", "F", "--scheduler",
               dask.address, *(arg for setting in settings for arg in ("--set", setting))]
    return list(map(str, command))


def trained(runs, out, text, dask, **options):
    """(failures, events) of a study on the cluster."""
    events = []
    failures = runner.run_study(runs, out, text, on_event=events.append, scheduler=dask.address, **options)
    return failures, events


def test_a_study_has_the_bits_of_a_local_one(text, tmp_path, dask):
    runs = [*several(3), replace(tiny("A", learning_rate=1e30), seed=7)]
    failures, events = trained(runs, tmp_path / "far", text, dask)
    local = runner.run_study(runs, tmp_path / "near", text)
    assert failures == local and list(failures) == ["A-seed7"] and "at step 2, beginning in" in failures["A-seed7"]
    for run in runs[:3]:
        assert results(tmp_path / "far/runs" / run.run_id) == results(tmp_path / "near/runs" / run.run_id)
    assert sorted(e.run_id for e in events if e.kind == "done") == [run.run_id for run in runs[:3]]
    assert not list(tmp_path.glob("far/.shared*")) and not list(tmp_path.glob("far/runs/*/.lease*"))
    before, done = snapshot(tmp_path / "far/runs"), [e for e in events if e.kind == "done"]
    again = trained(runs[:3], tmp_path / "far", text, dask)[1]
    assert sorted(again, key=repr) == sorted(done, key=repr) and snapshot(tmp_path / "far/runs") == before
    config = (tmp_path / "far/runs/F-seed0/config.json").stat().st_mtime
    assert trained(runs[:1], tmp_path / "far", text, dask, fresh=True)[0] == {}
    assert (tmp_path / "far/runs/F-seed0/config.json").stat().st_mtime > config


def test_workers_and_the_scheduler_die_and_nothing_is_lost(text, tmp_path, dask):
    """Two workers are killed while they train, and once the scheduler, with which the workers end."""
    runs, done, kills = several(5, steps=200, n_evaluations=40), [], []

    def disturb():
        for kill in ("worker", "scheduler", "worker"):
            seen = {path: path.stat().st_mtime_ns for path in tmp_path.glob("far/runs/*/checkpoint.npz")}
            wait_for(lambda: any(path.stat().st_mtime_ns != seen.get(path)  # noqa: B023  (called at once)
                                 for path in tmp_path.glob("far/runs/*/checkpoint.npz")))
            kills.append(len(list(tmp_path.glob("far/runs/*/summary.json"))))
            if kill == "worker":
                dask.kill_worker()
            else:
                dask.scheduler.kill()
                dask.scheduler.wait()
                dask.start_scheduler()
                dask.start_worker()  # those that were there end with the scheduler
            dask.start_worker()

    thread = threading.Thread(target=disturb, daemon=True)
    thread.start()
    failures, events = trained(runs, tmp_path / "far", text, dask)
    thread.join()
    assert failures == {} and len(kills) == 3 and kills[-1] < 5  # the last one too came while something trained
    done = sorted(event.run_id for event in events if event.kind == "done")
    assert done == [run.run_id for run in runs]
    assert runner.run_study(runs, tmp_path / "near", text) == {}
    assert outcome(tmp_path / "far") == outcome(tmp_path / "near")


def test_a_run_that_another_process_trains_is_looked_at_again(text, tmp_path, dask, monkeypatch):
    """A worker itself waits ten seconds for the folder; it is free once the study has heard that it is busy."""
    left_behind, ended, said = tmp_path / "runs/F-seed0", cluster.Cluster.ended, []
    left_behind.mkdir(parents=True)
    lease_of_another = left(left_behind)

    def hear(pool, future):
        event = ended(pool, future)
        said.append(event.kind)
        lease_of_another.unlink(missing_ok=True)
        return event

    monkeypatch.setattr(cluster.Cluster, "ended", hear)
    failures, events = trained(several(1), tmp_path, text, dask)
    assert failures == {} and events[-1].kind == "done" and said == ["busy", "done"]


def test_ctrl_c_stops_the_workers_too_and_the_same_command_goes_on(text, tmp_path, dask):
    command = study(text, tmp_path, dask, steps=3000, n_evaluations=300)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        wait_for(lambda: (tmp_path / "runs/F-seed0/checkpoint.npz").exists())
        assert lease.holder(tmp_path / "runs/F-seed0")["pid"] in [worker.pid for worker in dask.workers]
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and output.splitlines()[-1].startswith("Interrupted. The same command ")
    assert "Traceback" not in output
    wait_for(lambda: lease.holder(tmp_path / "runs/F-seed0") is None)
    assert not (tmp_path / "runs/F-seed0/summary.json").exists()


def test_what_is_missing_is_said_in_one_line(text, tmp_path, dask, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 2)
    with pytest.raises(cluster.ClusterError, match="no scheduler at tcp://127.0.0.1:9 .*start it"):
        trained(several(1), tmp_path, text, type("", (), {"address": "tcp://127.0.0.1:9"}))
    monkeypatch.setattr(cluster.Path, "write_text", lambda self, text: None)
    with pytest.raises(cluster.ClusterError, match="the worker tcp://.* does not see .*No such file.*machines share"):
        trained(several(1), tmp_path, text, dask)
    monkeypatch.undo()
    monkeypatch.setattr(cluster, "_code", lambda: "another")
    with pytest.raises(cluster.ClusterError, match="the worker tcp://.* has other code of tinymoe"):
        trained(several(1), tmp_path, text, dask)


def test_a_worker_that_reads_other_texts_trains_nothing(text, tmp_path, dask, monkeypatch):
    real = data.load_corpus
    path = tmp_path / "text.txt"
    path.write_text(WORDS)

    def change_then(*args):
        corpus = real(*args)
        path.write_text(WORDS.upper())
        return corpus

    monkeypatch.setattr(data, "load_corpus", change_then)
    failures, _ = trained(several(1), tmp_path / "out", path, dask)
    assert "reads other texts than this machine" in failures["F-seed0"]


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes certificates with openssl")
def test_certificates_guard_the_scheduler(text, tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=tinymoe",
                    "-keyout", key, "-out", certificate], check=True, capture_output=True)
    names = {"CA_FILE": certificate, **{f"{who}__{what}": file for who in ("SCHEDULER", "WORKER", "CLIENT")
                                        for what, file in (("KEY", key), ("CERT", certificate))}}
    environment = {f"DASK_DISTRIBUTED__COMM__TLS__{name}": str(file) for name, file in names.items()}
    dask = Dask(1, "tls", **environment)
    try:
        done = subprocess.run(study(text, tmp_path / "out", dask), env=os.environ | environment, capture_output=True)
        assert done.returncode == 0, done.stderr
        monkeypatch.setattr(cluster, "PATIENCE", 2)
        with pytest.raises(cluster.ClusterError, match="no scheduler at tls://"):
            trained(several(1), tmp_path, text, dask)
    finally:
        dask.end()
    assert (tmp_path / "out/runs/F-seed0/summary.json").exists()


def test_a_dict_of_texts_is_read_once():
    texts = {"words": WORDS.encode()}
    assert cluster._corpus(texts, 16) is cluster._corpus(dict(texts), 16) is not cluster._corpus(texts, 8)


class Worker:
    """What `_work` asks its worker for."""

    address = "tcp://1.2.3.4:5"

    def get_current_task(self):
        return "key"


def test_a_worker_that_joins_with_other_code_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "get_worker", Worker)
    assert cluster._work(None, None, {}, "numpy", "another", tiny(), tmp_path, False) == Worker.address
    retired, done, pool = [], cluster.futures.Future(), cluster.Cluster.__new__(cluster.Cluster)
    done.set_result(Worker.address)
    pool._client, pool._sent = SimpleNamespace(retire_workers=retired.extend), {done: (tiny(), None)}
    assert pool.ended(done) == Event("busy", "F-seed0") and retired == [Worker.address]


def test_a_worker_that_joins_late_with_other_code_leaves_and_the_others_train_all(text, tmp_path):
    """It answers at once, so it would be the free one again and again."""
    shutil.copytree(ROOT / "tinymoe", tmp_path / "other/tinymoe", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "other/tinymoe/more.py").write_text("other = 1")
    dask, joined = Dask(1), []

    def join(event):
        if not joined:
            dask.environment |= {"PYTHONPATH": str(tmp_path / "other"), "PYTHONSAFEPATH": "1"}
            joined.append(dask.start_worker())

    try:
        failures = runner.run_study(several(6, steps=300), tmp_path / "out", text, on_event=join,
                                    scheduler=dask.address)
        assert failures == {} and len(list(tmp_path.glob("out/runs/*/summary.json"))) == 6
        wait_for(lambda: dask.workers[1].poll() is not None)
        assert dask.workers[0].poll() is None
    finally:
        dask.end()


def test_a_text_that_changed_since_a_worker_read_it_is_read_again(text, tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text(WORDS)
    cluster._corpus(str(path), 16)
    path.write_text(WORDS.upper())
    new, found = load_corpus(path, 16), []
    monkeypatch.setattr(cluster, "get_worker", Worker)
    for described in (new.describe(), {}):
        with contextlib.suppress(CorpusError):
            cluster._work(lambda plan, folder, fresh, corpora, send: found.append(corpora(16)), str(path),
                          {16: described}, kernels.active(), cluster._code(), tiny(), tmp_path, False)
    assert [corpus.describe() for corpus in found] == [new.describe()]


def test_a_log_that_cannot_be_read_is_looked_at_again(tmp_path, monkeypatch):
    """Other machines replace it, and on NFS reading it may fail meanwhile."""
    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    pool = cluster.Cluster.__new__(cluster.Cluster)
    pool._sent, pool._reached, pool._changed, pool._news = {1: (tiny(), tmp_path)}, {"F-seed0": 0}, {"F-seed0": 0}, []

    def steps():
        pool._due = 0.0
        return [event.step for event in pool.events()]

    files.write_rows(tmp_path / "log.jsonl", [{"a row": "of another program"}])
    assert steps() == []
    files.write_rows(tmp_path / "log.jsonl", [{"step": 3, "cross_entropy": None, "seconds": 1.0}])
    monkeypatch.setattr(cluster, "read_rows", stale)
    assert steps() == []
    monkeypatch.undo()
    assert steps() == [3] and steps() == []


def test_a_run_whose_workers_die_without_progress_fails():
    """The second time that Dask gives up without a step in between."""
    killed = cluster.futures.Future()
    killed.set_exception(cluster.KilledWorker("key", "tcp://1.2.3.4:5", 3))
    pool = cluster.Cluster.__new__(cluster.Cluster)
    pool._died_at, pool._reached, kinds = {}, {"F-seed0": 0}, []
    for step in (0, 20, 20):
        pool._sent, pool._reached["F-seed0"] = {killed: (tiny(), None)}, step
        kinds.append(pool.ended(killed).kind)
    assert kinds == ["busy", "busy", "failed"]
