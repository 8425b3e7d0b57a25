"""Studies that are killed at random moments: run again, they end with the same bits as one that was never disturbed.

The short form kills six times. `TINYMOE_TESTS=long pytest tests/test_kills.py` kills 200 times: with one job and with
two, with the default threading layer of numba and with workqueue. TINYMOE_KILLS sets another number.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from test_train import MODEL, TRAINING, WORDS, results
from tinymoe.files import TEMPORARY

ROOT = Path(__file__).resolve().parent.parent
LONG = os.environ.get("TINYMOE_TESTS") == "long"
KILLS = int(os.environ.get("TINYMOE_KILLS", 50 if LONG else 3))  # of each of the two or four cases
LIMIT = 120  # seconds after which a command counts as hanging
CONFIGS, SETTINGS = "AF", MODEL | TRAINING | {"n_evaluations": 30}
SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
TARGETS = "parent", "child", "both"  # child: one process that the study started; both: the parent and all of them
MOMENTS = "start", "sending", "training", "writing"
IN_RUN = re.compile(r"\.lock|config\.json|log\.jsonl|summary\.json|failure\.json|checkpoint\.npz|routings")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS)
    return path


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    """What the study leaves if nobody stops it."""
    study = Study(text, tmp_path_factory.mktemp("undisturbed"), jobs=1)
    assert study.ended() == 0, study.output()
    return study.outcome()


class Study:
    """A `cli.py study` in a process group and session of its own, so that no process of it can hide."""

    def __init__(self, text, folder, jobs, layer=None):
        self.out, self.log = folder / "out", folder / "log.txt"
        settings = [f"{name}={value}".replace(" ", "") for name, value in SETTINGS.items() if name != "steps"]
        command = [sys.executable, ROOT / "cli.py", "study", "--text", text, "--out", self.out, "--jobs", jobs,
                   "--steps", 60, *(arg for name in CONFIGS for arg in ("--config", name)),
                   *(arg for setting in settings for arg in ("--set", setting))]
        # one thread: several wait for each other on a busy machine, and the bits are the same
        environment = os.environ | {"NUMBA_NUM_THREADS": "1"} | ({"NUMBA_THREADING_LAYER": layer} if layer else {})
        self.started = time.time()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment,
                                            start_new_session=True, preexec_fn=lambda: signal.signal(
                                                signal.SIGINT, signal.SIG_DFL))  # a background job ignores it

    def output(self):
        return self.log.read_text(errors="replace")

    def ended(self):
        """The exit code; fails if there is none within the limit."""
        try:
            return self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.end()
            pytest.fail(f"it hangs: {self.output()}")

    def end(self):
        """Kill all that is left of it."""
        for pid in self.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def alive(self):
        """Pids of its session, the parent first; a zombie does not count."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                state, _, _, session = path.read_text().rsplit(")", 1)[1].split()[:4]
                if session == str(self.process.pid) and state not in "ZX":
                    found.append(int(path.parent.name))
        return sorted(found, key=lambda pid: (pid != self.process.pid, pid))

    def reached(self, moment):
        """Whether the moment has come."""
        if moment == "start":  # jobs are starting, or the program itself is
            return len(self.alive()) > 1 or time.time() - self.started > 1
        if moment == "sending":  # the parent has just reported on a worker
            return re.search("resumed|done", self.output())
        pattern = "runs/*/.*.tinymoe" if moment == "writing" else "runs/*/checkpoint.npz"
        for path in self.out.glob(pattern):
            with suppress(OSError):
                if path.stat().st_mtime > self.started:
                    return True
        return False

    def disturb(self, moment, number, target, delay):
        """Send the signal `delay` seconds after the moment; False if the study ended before."""
        while not self.reached(moment):
            if self.process.poll() is not None:
                return False
            time.sleep(0 if moment == "writing" else 0.002)
        time.sleep(delay)
        parent, *children = self.alive() or [None]
        if parent != self.process.pid:
            return False
        if target == "child" and not children:
            return False
        hit = {"parent": [parent], "child": children[-1:], "both": [parent, *children]}[target]
        for pid in hit:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return True

    def outcome(self):
        return {folder.name: results(folder) for folder in sorted((self.out / "runs").iterdir())}


def check_end(study, number, target):
    """What must hold after a signal: an end in time, the right exit code, one line, no process left."""
    code, output = study.ended(), study.output()
    assert "Traceback" not in output
    expected = {0, 1} if target == "child" else {0, 130} if number == signal.SIGINT else {0, -number}
    assert code in expected, (code, output)
    if code == 1:
        errors = [line for line in output.splitlines() if line.startswith("Error: ")]
        assert errors and all(line.endswith("run the same command again") for line in errors), output
    if code == 130:
        assert output.splitlines()[-1].startswith("Interrupted"), output
    end = time.monotonic() + 20
    while left := study.alive():
        assert time.monotonic() < end, f"processes {left} are left"
        time.sleep(0.02)
    return code


def check_folder(study, undisturbed):
    """What must hold after the last command: the same numbers, and no other file than a run writes."""
    assert study.outcome() == undisturbed
    inside = [path for path in study.out.rglob("*") if TEMPORARY.fullmatch(path.name)]
    assert inside == []
    assert [path for path in study.out.glob("runs/*/*") if not IN_RUN.fullmatch(path.name)] == []
    assert {path.name for path in study.out.iterdir()} <= {"runs", "FINDINGS.md", "summary.csv"}


@pytest.mark.parametrize("layer", [None, "workqueue"] if LONG else [None], ids=lambda layer: layer or "default")
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_that_is_killed_at_random_moments_ends_with_the_same_bits(text, undisturbed, tmp_path, jobs, layer):
    """Would have caught: a worker that dies while it starts or sends hangs the study, deaf to Ctrl-C; tracebacks and
    processes that stay after a signal; temporary files that no later run removes; a worker's death that takes other
    runs along. The same folder is used again and again until a study ends in it.
    """
    rng, kills, tries, folder = random.Random(f"{jobs} {layer}"), 0, 0, tmp_path / "0"
    folder.mkdir()
    while kills < KILLS:
        tries += 1
        assert tries <= 5 * KILLS + 10, "studies end before a signal reaches them"
        how = rng.choice(MOMENTS), rng.choice(SIGNALS), rng.choice(TARGETS), rng.choice((0, 0.3)) * rng.random()
        study = Study(text, folder, jobs, layer)
        try:
            kills += study.disturb(*how)
            code = check_end(study, *how[1:3])
        except BaseException:
            print(f"kill {kills} of jobs {jobs}: {how}\n{study.output()}")
            raise
        finally:
            study.end()
        if code == 0:
            check_folder(study, undisturbed)
            folder = tmp_path / str(tries)
            folder.mkdir()
    last = Study(text, folder, jobs, layer)
    try:
        assert last.ended() == 0, last.output()
        check_folder(last, undisturbed)
    finally:
        last.end()
