"""The runner: trains many runs, here or in an executor of `concurrent.futures`: worker processes, or a Dask cluster.

A worker trains one run at a time in one thread. A run has the same bits on any number of threads, so the way that runs
are spread over processes and machines changes no result.
"""

import collections
import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from concurrent import futures
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np

from .. import kernels
from ..files import CheckpointError
from ..training.data import SYNTHETIC, CorpusError, corpora_of
from ..training.identity import RunError
from ..training.plan import Event
from ..training.run_folder import Busy, RunFolder
from ..training.trainer import NonFiniteLoss, train
from .rows import begin_anew, to_begin_anew

# errors that end one run and leave the others alone
RUN_ERRORS = (NonFiniteLoss, RunError, CheckpointError, CorpusError, OSError, MemoryError)
UNGUARDED = 93  # the exit code of a worker that was asked to start the study again
GUARD = 'tinymoe: run_study with jobs above 1 starts this program again in each worker: put the call under ' \
        '`if __name__ == "__main__":`, or use jobs=1'


def run_study(all_runs, out, text=None, jobs=1, fresh=False, on_event=lambda event: None, scheduler=None
              ) -> dict[str, str]:
    """Train the RunPlans that are not finished under out/runs, `jobs` at a time. Returns {run id: why it failed}.

    text: None for the default corpus, a path, or what else load_corpus takes. fresh: throw away what these runs left
    before, once: a later call without it goes on with those that have begun again. It may be the ids of these runs and
    of others, which later calls train. on_event: called in this process with each Event. scheduler: the address of a
    Dask scheduler, whose workers train instead of this machine. A failed run does not stop the others; runs that start
    from others wait for them. Raises data.CorpusError, cluster.ClusterError, OSError if nothing can be written,
    ValueError for no run and for two of one id, and SystemExit in a program that starts workers without
    `if __name__ == "__main__":`.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a worker that still imports the program
        raise SystemExit(UNGUARDED)
    if not all_runs:
        raise ValueError("there is no run to train: give at least one RunPlan, such as those of Experiment.runs")
    folders = {plan.run_id: Path(out, "runs", plan.run_id) for plan in all_runs}
    if len(folders) < len(all_runs):
        raise ValueError("two runs have the same id: give each its own config id or seed")
    _require_outside(Path(out), text)
    corpora, failures = corpora_of(text), {}
    described = {seq_len: corpora(seq_len).describe() for seq_len in {plan.model.seq_len for plan in all_runs}}
    _make_folders(Path(out), folders.values())
    if fresh:
        begin_anew(out, folders if fresh is True else fresh)
    anew = to_begin_anew(out)
    tasks = {plan.run_id: (plan, folders[plan.run_id], anew.get(plan.run_id, False)) for plan in all_runs}

    def note(event):
        if event.kind in ("failed", "busy"):
            failures[event.run_id], event = event.message, replace(event, kind="failed")
        on_event(event)

    for stage in ([plan for plan in all_runs if not plan.start], [plan for plan in all_runs if plan.start]):
        for plan in stage:
            if plan.start_id in failures:
                note(Event("failed", plan.run_id, message=f"its start, the run {plan.start_id}, failed"))
        stage = [plan for plan in stage if plan.run_id not in failures]
        todo = [plan for plan in stage if RunFolder(folders[plan.run_id]).is_to_do(anew.get(plan.run_id, False))]
        elsewhere = {plan.run_id for plan in todo if scheduler or min(jobs, len(todo)) > 1}
        for plan in stage:
            if plan.run_id not in elsewhere:  # a finished run is only checked
                _attempt(*tasks[plan.run_id], corpora, send=note)
        if elsewhere:
            with _executor(min(jobs, len(todo)), scheduler, out, text, described) as pool:
                _train_in(pool, [tasks[plan.run_id] for plan in todo], note)
    for run_id, folder in folders.items():
        if run_id not in failures and not folder.exists():
            note(Event("failed", run_id, message=f"{folder} vanished: run the same command again"))
    return failures


def _make_folders(out, folders):
    """Make a folder for each run: an empty one says that the run waits."""
    out.mkdir(parents=True, exist_ok=True)
    if Path(out, "runs").is_symlink():
        raise OSError(f"{Path(out, 'runs')} is a link: remove it, or choose another --out")
    for folder in folders:
        with contextlib.suppress(OSError):  # the run will say so
            folder.mkdir(parents=True, exist_ok=True)


def _executor(jobs, scheduler, out, text, described):
    """The processes of this machine, or where a scheduler is given its workers."""
    if not scheduler:
        return Processes(jobs, text)
    try:
        from .cluster import Cluster
    except ImportError as error:
        raise RunError(f"--scheduler needs Dask ({error}): run `pip install distributed`") from None
    return Cluster(scheduler, out, _attempt, text, described)


def _require_outside(out, text):
    """CorpusError if the results would lie among the texts: the next run would read them as text."""
    if not isinstance(text, (str, Path)) or text == SYNTHETIC:
        return
    folder, results = (Path(os.path.realpath(path)) for path in (text, out))  # Path.resolve fails for a loop of links
    if results.is_relative_to(folder) and not any(p.startswith(".") for p in results.relative_to(folder).parts):
        raise CorpusError(f"--out {out} lies inside --text {text}, so the results would be read as text: "
                          "choose an --out outside of it")


def _attempt(plan, folder, fresh, corpora, send):
    """Train one run and report on it; corpora(seq_len) gives the corpus, or raises CorpusError."""
    try:
        train(plan, corpora(plan.model.seq_len), folder, send, fresh)
        send(Event("done", plan.run_id))
    except RUN_ERRORS as error:
        kind = "busy" if isinstance(error, Busy) else "failed"
        send(Event(kind, plan.run_id, message=str(error) or type(error).__name__))
    except SystemError:  # Ctrl-C in compiled code
        raise
    except Exception as error:  # in a router, a loss or a `measure` of the user
        traceback.print_exc()
        send(Event("failed", plan.run_id, message=f"{type(error).__name__}: {error}: correct it and start again"))


def _train_in(pool, tasks, note):
    """Train each task (plan, folder, fresh) in an executor. It reports on runs by pool.events(), for which we ask."""
    waiting, running = collections.deque(tasks), {}
    while waiting or running:
        while waiting and len(running) < pool.batch:
            task = waiting.popleft()
            running[pool.submit(*task)] = task
        done, _ = futures.wait(running, timeout=0.05, return_when=futures.FIRST_COMPLETED)
        for event in pool.events():  # after `wait`, so that the steps of a run come before its end
            note(event)
        for future in done:
            task, event = running.pop(future), pool.ended(future)
            if event.kind == "busy" and pool.looks_again:
                waiting.append(task)
            else:
                note(event)


class Processes(futures.ThreadPoolExecutor):
    """Worker processes of this machine, each with one thread of this process that waits for it.

    A worker that dies fails the run that it trains and is replaced; a ProcessPoolExecutor would fail all runs. Each
    worker has its own pipe, so one that dies while it sends cannot block the others. text: what a worker reads itself;
    sending the corpus would block on a worker that dies while it starts.
    """

    batch, looks_again = float("inf"), False  # how many runs it takes; whether a run that is busy is tried again

    def __init__(self, jobs, text):
        kernels.compile_all(np.float32)  # once, before all workers would do it at the same time
        if hasattr(signal, "pthread_sigmask"):
            resource_tracker.ensure_running()  # when it starts, it changes the mask of its thread
        super().__init__(jobs, initializer=_mask_interrupts)
        self._text, self._own = text, threading.local()
        self._said, self._workers, self._lock, self._closed = queue.SimpleQueue(), [], threading.Lock(), False

    def submit(self, plan, folder, fresh):
        return super().submit(self._train, (plan, folder, fresh))

    def events(self):
        """What the workers have said since the last call."""
        while not self._said.empty():
            yield self._said.get()

    def ended(self, future):
        """The last Event of a run."""
        return future.result()

    def shutdown(self, wait=True, *, cancel_futures=True):
        """Kill the workers, and forget the runs that wait."""
        with self._lock:
            self._closed = True
        for worker in self._workers:
            worker.process.kill()
        super().shutdown(wait, cancel_futures=cancel_futures)

    def _train(self, task):
        """Train a run in the worker of this thread; returns its last Event."""
        worker = getattr(self._own, "worker", None) or self._start()
        try:
            event = worker.give(task)
            while event.kind in ("resumed", "step"):
                self._said.put(event)
                event = worker.receive()
        finally:  # also where the program has no main guard: the thread may have another run
            if not worker.alive:
                self._own.worker = None
        return event

    def _start(self):
        with self._lock:  # multiprocessing keeps a list of processes, and the environment is changed
            if self._closed:
                raise futures.CancelledError
            self._own.worker = _Worker(self._text, self._lock)
            self._workers.append(self._own.worker)
            return self._own.worker


class _Worker:
    """A process that trains one run after the other, and the pipe to it."""

    def __init__(self, text, lock):
        context = multiprocessing.get_context("spawn")
        self.pipe, other_end = context.Pipe()
        self.process = context.Process(target=_work, args=(other_end, text), daemon=True)
        self.alive, self.lock = True, lock
        before = os.environ.get("NUMBA_NUM_THREADS")
        os.environ["NUMBA_NUM_THREADS"] = "1"  # read when the process loads numba
        try:
            self.process.start()
        finally:
            other_end.close()  # now only the process has it, so the pipe ends with the process
            del os.environ["NUMBA_NUM_THREADS"]
            if before is not None:
                os.environ["NUMBA_NUM_THREADS"] = before

    def give(self, task):
        """Send a task (plan, folder, fresh); returns the first Event."""
        self.run_id = task[0].run_id
        try:
            self.pipe.send(task)
        except (BrokenPipeError, ConnectionResetError):  # it died: `receive` will say so
            pass
        except Exception as error:  # of pickle, so nothing was sent
            return Event("failed", self.run_id, message=f"it cannot be sent to a process ({error}): define its "
                                                        "`measure` at the top level of a module, or use jobs=1")
        return self.receive()

    def receive(self):
        """The next Event; "failed" if the process has ended."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.alive = False
            with self.lock:
                self.process.join()
            self.pipe.close()
            if self.process.exitcode == UNGUARDED:
                raise SystemExit(GUARD) from None
            return Event("failed", self.run_id, message=f"its process ended with exit code {self.process.exitcode}: "
                                                        "run the same command again")


def _mask_interrupts():
    """Ctrl-C goes to the main thread; a worker, which inherits the mask, does not get it while it imports."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _work(pipe, text):
    """What a worker does: it reads the text, and trains the runs that it is given."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which kills its workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    corpora, sent = corpora_of(text), 0.0

    def send(event):
        nonlocal sent
        if event.kind != "step" or time.monotonic() - sent > 0.2 or event.step == event.steps:
            sent = time.monotonic()
            with contextlib.suppress(OSError):  # the parent has ended, and this process soon exits too
                pipe.send(event)

    with contextlib.suppress(EOFError, OSError):  # likewise
        while True:
            plan, folder, fresh = pipe.recv()
            _attempt(plan, folder, fresh, corpora, send)


def _exit_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)
