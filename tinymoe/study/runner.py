"""Running many runs side by side.

Runs share nothing, so the natural parallelism is over them: each in a process of its own on one
thread. A run gives the same bits on any number of threads, so how they are spread changes no result.
"""

import multiprocessing
import os
import queue
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import kernels
from ..training.data import load_corpus
from ..files import CheckpointError
from ..training.trainer import NonFiniteLoss, RunError, finished, train


@dataclass(frozen=True)
class Event:
    """Progress of one run: kind "step" (step, loss), "done" (message empty) or "failed" (message says why)."""

    kind: str
    run_id: str
    step: int = 0
    loss: float = 0.0
    message: str = ""


def run_study(all_runs, out, text=None, jobs=1, fresh=False, on_event=lambda event: None):
    """Train every run that is not complete under out/runs, `jobs` at a time. Returns the messages of those that failed.

    text: None for the default corpus, or a path. fresh: throw away what these runs left before.
    on_event: called with each Event in this process. A failed run does not stop the others. Runs that start from
    others wait for them.
    Raises data.CorpusError, OSError where nothing can be written.
    """
    corpus = load_corpus(text, seq_len=all_runs[0].model.seq_len)
    folders = {run.run_id: Path(out) / "runs" / run.run_id for run in all_runs}
    Path(out).mkdir(parents=True, exist_ok=True)
    run_all = _side_by_side if jobs > 1 and len(all_runs) > 1 else _one_by_one
    failures = {}

    def note(event):
        if event.kind == "failed":
            failures[event.run_id] = event.message
        on_event(event)

    for stage in ([run for run in all_runs if not run.start], [run for run in all_runs if run.start]):
        if stage:
            run_all(stage, folders, corpus, jobs, fresh, note)
    return failures


def _attempt(run, corpus, folder, fresh, send):
    """Train one run and report on it; only errors that are nobody's business here escape."""
    def on_step(step, loss):
        send(Event("step", run.run_id, step, loss))

    try:
        train(run, corpus, folder, on_step, fresh)
        send(Event("done", run.run_id))
    except (NonFiniteLoss, RunError, CheckpointError, OSError, MemoryError) as error:
        send(Event("failed", run.run_id, message=str(error) or type(error).__name__))


def _one_by_one(all_runs, folders, corpus, jobs, fresh, note):
    for run in all_runs:
        _attempt(run, corpus, folders[run.run_id], fresh, note)


def _side_by_side(all_runs, folders, corpus, jobs, fresh, note):
    """One process a run, at most `jobs` at once. They are killed with this process, however it ends."""
    kernels.compile_all(np.float32)  # once, before many processes would do it at the same time
    context = multiprocessing.get_context("spawn")
    events, waiting, working = context.Queue(), list(all_runs), {}
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                run = waiting.pop(0)
                if finished(folders[run.run_id]) and not fresh:  # not worth a process
                    _attempt(run, corpus, folders[run.run_id], fresh, note)
                    continue
                args = run, corpus, folders[run.run_id], fresh, events
                working[run.run_id] = context.Process(target=_worker, args=args, daemon=True)
                _start(working[run.run_id])
            for event in _drain(events):
                note(event)
                if event.kind != "step":
                    working.pop(event.run_id).join()
            for run_id in [r for r, p in working.items() if not p.is_alive() and events.empty()]:
                message = f"its process ended with exit code {working.pop(run_id).exitcode}: run the same command again"
                note(Event("failed", run_id, message=message))
    finally:
        started = [process for process in working.values() if process.pid]
        for process in started:
            process.kill()
        for process in started:
            process.join()


def _start(process):
    before = os.environ.get("NUMBA_NUM_THREADS")
    os.environ["NUMBA_NUM_THREADS"] = "1"  # read when the new process loads numba: no idle threads that spin
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None
    try:
        process.start()  # which inherits the mask: Ctrl-C while it still imports is not its business either
    finally:
        del os.environ["NUMBA_NUM_THREADS"]
        if before is not None:
            os.environ["NUMBA_NUM_THREADS"] = before
        if masked is not None:  # a Ctrl-C that waited is raised here
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)


def _drain(events, seconds=0.2):
    try:
        yield events.get(timeout=seconds)
        while True:
            yield events.get_nowait()
    except queue.Empty:
        return


def _worker(run, corpus, folder, fresh, events):
    """The body of a process: no reaction to Ctrl-C (the parent kills it), and no life after its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    last = 0.0

    def send(event):
        nonlocal last
        if event.kind != "step" or time.monotonic() - last > 0.2 or event.step == run.training.steps:
            last = time.monotonic()
            events.put(event)

    _attempt(run, corpus, folder, fresh, send)
