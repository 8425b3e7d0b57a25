"""Runs on a Dask cluster: one task for each run, on any number of machines that share the results folder.

A task may start twice, or start again elsewhere: the folder of its run is its lock and its checkpoint. So Dask may lose
workers, and this process may lose the scheduler. A worker trains one run at a time, in one thread that is not its main
one and without signals. It is the only file that needs `distributed`.
"""

import contextlib
import functools
import hashlib
import logging
import os
import sys
import threading
import time
import uuid
from concurrent import futures
from pathlib import Path

from distributed import Client, KilledWorker, get_worker

from .. import kernels
from ..files import read_rows
from ..training.data import CorpusError, load_corpus
from ..training.plan import Event

BATCH = 1000  # tasks that the scheduler has at a time
PATIENCE = 60  # seconds to wait for the scheduler, and for the first worker
LOST = 300  # seconds to wait for a scheduler that was there before
OTHER_CODE = "the worker {} has other code of tinymoe: install the same version there, and start the worker again"
KEPT = []  # (text, seq_len, Corpus) of the last two texts that a worker has read
ONE_RUN = threading.Lock()  # a worker with several threads trains one run at a time: kernels may need the process alone


class ClusterError(Exception):
    """A scheduler or worker that is not there, or a worker that cannot take part."""


class Unwanted(BaseException):
    """The run was cancelled, or its worker closes."""


class _Client(Client):
    def __del__(self):  # one that found no scheduler would wait, and print a traceback
        pass


class Cluster(futures.Executor):
    """The workers of the Dask scheduler at `address`.

    attempt: attempt(plan, folder, fresh, corpora, send) trains a run; workers import it by its name. text: what workers
    read. described: by seq_len, how its corpus describes itself, which they must find. Raises ClusterError.
    """

    batch, looks_again = BATCH, True

    def __init__(self, address, out, attempt, text, described):
        for name in ("distributed", "distributed.client", "distributed.core", "tornado.application"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are told in one line
        self._address, self._command, self._client = address, uuid.uuid4().hex[:8], None
        text = os.path.abspath(text) if isinstance(text, (str, Path)) and text and os.path.exists(text) else text
        self._work = functools.partial(_work, attempt, text, described, kernels.active(), _code())
        self._sent, self._n_sent, self._news, self._due = {}, 0, [], 0.0
        self._reached, self._changed, self._died_at = {}, {}, {}  # by run id: step, time of its log, step of its kill
        self._connect(PATIENCE)
        try:
            self._require_workers(Path(out).absolute())
        except BaseException:
            self.shutdown()
            raise

    def submit(self, plan, folder, fresh):
        """Send a run to the cluster. Raises ClusterError if the scheduler is gone for long."""
        if self._client.status != "running":
            self.shutdown()
            self._connect(LOST)
        if plan.run_id not in self._reached:
            self._changed[plan.run_id] = _time(folder)
            self._reached[plan.run_id] = step = 0 if fresh else (_progress(folder) or [0])[0]
            if step:
                self._news.append(Event("resumed", plan.run_id, step, steps=plan.training.steps))
        self._n_sent += 1
        future = self._client.get_executor(pure=False, retries=2).submit(
            self._work, plan, folder.absolute(), fresh,
            key=(f"train-{self._command}", plan.run_id, self._n_sent),
            priority=bool(self._reached[plan.run_id]))  # begun runs first
        self._sent[future] = plan, folder
        return future

    def events(self):
        """What the logs of the runs say that is new; they are read about once a second."""
        news, self._news = self._news, []
        yield from news
        started = time.monotonic()
        if started < self._due:
            return
        for plan, folder in list(self._sent.values()):
            if (changed := _time(folder)) != self._changed[plan.run_id] and (found := _progress(folder)):
                self._changed[plan.run_id], (step, loss) = changed, found
                if step > self._reached[plan.run_id]:
                    self._reached[plan.run_id] = step
                    yield Event("step", plan.run_id, step, loss, steps=plan.training.steps)
        self._due = time.monotonic() + 1 + 20 * (time.monotonic() - started)

    def ended(self, future):
        """The last Event of a run; "busy" if it is to be sent again."""
        run_id = self._sent.pop(future)[0].run_id
        try:
            if isinstance(found := future.result(), Event):
                return found
            with contextlib.suppress(Exception):  # the scheduler has gone, and so has this worker
                self._client.retire_workers([found])
            return Event("busy", run_id)
        except futures.CancelledError:  # the scheduler has gone
            return Event("busy", run_id)
        except KilledWorker:
            before, self._died_at[run_id] = self._died_at.get(run_id, -1), self._reached[run_id]
            message = "each worker that trained it died, and it came no further: see the log of the workers"
            return Event("failed" if before == self._reached[run_id] else "busy", run_id, message=message)
        except Exception as error:
            return Event("failed", run_id, message=f"{type(error).__name__}: {error}")

    def shutdown(self, wait=True, *, cancel_futures=True):
        """Leave the cluster. The scheduler then cancels what was sent, and workers stop after their step."""
        with contextlib.suppress(Exception):  # it may be gone
            self._client.close(timeout=5)

    def _connect(self, seconds):
        try:
            self._client = _Client(self._address, timeout=seconds, set_as_default=False)
        except (OSError, ValueError, RuntimeError, TypeError) as error:  # TypeError: certificates are missing
            raise ClusterError(f"no scheduler at {self._address} ({error}): start it, and run the same command again"
                               ) from None

    def _require_workers(self, out):
        """ClusterError unless the scheduler can import tinymoe and there are workers, each of which has this code and
        reads a file that lies in `out`."""
        try:
            self._client.wait_for_workers(1, timeout=PATIENCE)
        except (OSError, futures.TimeoutError):
            raise ClusterError(f"the scheduler at {self._address} has no worker: start one, "
                               f"`dask worker {self._address} --nthreads 1`") from None
        try:
            self._client.run_on_scheduler(_code)
        except Exception as error:
            raise ClusterError(f"the scheduler cannot import tinymoe ({type(error).__name__}: {error}): install it "
                               "there, and start the scheduler again") from None
        path = out / f".shared-{self._command}"
        path.write_text(self._command)
        try:
            found = self._client.run(_look, str(path), on_error="return")
        finally:
            path.unlink(missing_ok=True)
        for worker, seen in found.items():
            if isinstance(seen, BaseException):
                raise ClusterError(f"the worker {worker} cannot take part ({type(seen).__name__}: {seen}): "
                                   "install tinymoe there")
            if seen[0] != _code():
                raise ClusterError(OTHER_CODE.format(worker))
            if seen[1] != self._command:
                raise ClusterError(f"the worker {worker} does not see {out} ({seen[1]}): --out must be a folder that "
                                   "all machines share")


def _time(folder):
    """When the log of a run was changed; None if there is none."""
    with contextlib.suppress(OSError):
        return os.stat(folder / "log.jsonl").st_mtime_ns


def _progress(folder):
    """(step, loss) of the last row of a run's log; None if there is none, or while it cannot be read."""
    with contextlib.suppress(OSError, LookupError, TypeError, ValueError, ArithmeticError):
        row = read_rows(folder / "log.jsonl")[-1]
        return int(row["step"]), float(row["cross_entropy"] or 0)


@functools.cache
def _code():
    """A hash of the package's code."""
    root = Path(__file__).parents[1]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(root.rglob("*.py")))).hexdigest()


# -- what runs in a worker ------------------------------------------------------------------------


def _look(path):
    """(hash of the code, what is in the file or why it cannot be read)."""
    try:
        return _code(), Path(path).read_text()
    except OSError as error:
        return _code(), error.strerror


def _work(attempt, text, described, kind, code, plan, folder, fresh):
    """Train a run; returns its last Event. It is "busy" if another process trains it, or the run was cancelled.

    A worker with other code trains nothing, and returns its address.
    """
    worker = get_worker()
    key, last = worker.get_current_task(), None

    def send(event):
        nonlocal last
        last, task = event, worker.state.tasks.get(key)
        if worker.status.name.startswith("clos") or event.kind == "step" and (not task or task.state != "executing"):
            raise Unwanted

    def corpora(seq_len):
        for _ in range(2):
            if (found := _corpus(text, seq_len)).describe() == described[seq_len]:
                return found
            KEPT.clear()  # the text may have changed since it was read
        raise CorpusError(f"the worker {worker.address} reads other texts than this machine: give it the same")

    if _code() != code:  # it came after the study had looked at the workers
        logging.getLogger("distributed.worker").error(OTHER_CODE.format(worker.address))
        return worker.address
    if not folder.exists():
        return Event("failed", plan.run_id, message=f"the worker {worker.address} does not see {folder}")
    with ONE_RUN, contextlib.suppress(Unwanted):
        if "numba" not in sys.modules:
            os.environ["NUMBA_NUM_THREADS"] = "1"  # a nanny does not set it
        kernels.use(kind)
        kernels.set_threads(1)
        attempt(plan, folder, fresh, corpora, send)
        return last
    return Event("busy", plan.run_id)


def _corpus(text, seq_len):
    """The Corpus that load_corpus reads, kept for the next runs. A text may be a dict, so it is no key of a cache."""
    for its_text, its_len, corpus in KEPT:
        if (its_text, its_len) == (text, seq_len):
            return corpus
    KEPT[:] = [*KEPT[-1:], (text, seq_len, corpus := load_corpus(text, seq_len))]
    return corpus
