"""Studies that are killed at random moments: run again, they end with the same bits as one that was never disturbed.

The short form kills six times. `TINYMOE_TESTS=long pytest tests/test_kills.py` kills 200 times: with one job and with
two, with the default threading layer of numba and with workqueue. TINYMOE_KILLS sets another number.
"""

import itertools
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
NUMBERS = itertools.count()
SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
TARGETS = "parent", "child", "both"  # child: one process that the study started; both: the parent and all of them
MOMENTS = "start", "sending", "training", "writing"
IN_RUN = re.compile(r"\.lock|\.lease\d|config\.json|log\.jsonl|summary\.json|failure\.json|checkpoint\.npz|routings")
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
    """A `cli.py study`, whose processes all have an environment variable that tells them from others."""

    def __init__(self, text, folder, jobs, layer=None, **environment):
        self.out, self.log = folder / "out", folder / "log.txt"
        settings = [f"{name}={value}".replace(" ", "") for name, value in SETTINGS.items() if name != "steps"]
        command = [sys.executable, ROOT / "cli.py", "study", "--text", text, "--out", self.out, "--jobs", jobs,
                   "--steps", 60, *(arg for name in CONFIGS for arg in ("--config", name)),
                   *(arg for setting in settings for arg in ("--set", setting))]
        # one thread: several would wait for each other on a busy machine
        environment |= {"NUMBA_NUM_THREADS": "1"} | ({"NUMBA_THREADING_LAYER": layer} if layer else {})
        self.started, self.mark = time.time(), f"TINYMOE_TEST={os.getpid()}-{next(NUMBERS)}"
        environment["TINYMOE_TEST"] = self.mark.partition("=")[2]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=log, env=os.environ | environment, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a background job ignores it

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
        """Pids of its processes, the parent first; a zombie does not count, since it has no environment."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if self.mark.encode() in path.read_bytes().split(b"\0"):
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
        """Send the signal `delay` seconds after the moment; False if there was nothing to send it to."""
        while not self.reached(moment):
            if self.process.poll() is not None:
                return False
            time.sleep(0 if moment == "writing" else 0.002)
        time.sleep(delay)
        parent, *children = self.alive() or [None]
        if parent != self.process.pid or target == "child" and not children:
            return False
        one = children[int(delay * 1000) % len(children)] if children else None  # a worker, or multiprocessing's helper
        hit = {"parent": [parent], "child": [one], "both": [parent, *children]}[target]
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
    if "findings in" in output:  # the work is done, and Python exits
        expected = expected | {-number}
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


@pytest.mark.skipif(os.environ.get("TINYMOE_KERNELS") == "numpy", reason="nothing is compiled")
@pytest.mark.parametrize("number, target", [*itertools.product(SIGNALS, TARGETS)] if LONG else [
    (signal.SIGKILL, "parent"), (signal.SIGTERM, "parent"), (signal.SIGINT, "both")])
def test_a_signal_while_kernels_are_compiled_ends_all_that_compile(text, undisturbed, tmp_path, number, target):
    """Would have caught: Ctrl-C that prints the tracebacks of the compiling processes, and compiling processes that
    outlive their parent for a minute. In the long form, the same command then compiles and trains as if nothing was.
    """
    pytest.importorskip("numba")
    study = Study(text, tmp_path, jobs=2, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    try:
        end = time.monotonic() + LIMIT
        while len(study.alive()) < 3:  # two processes compile
            assert time.monotonic() < end and study.process.poll() is None, study.output()
            time.sleep(0.01)
        time.sleep(random.Random(f"{number} {target}").random())
        parent, *children = study.alive()
        for pid in {"parent": [parent], "child": children[:1], "both": [parent, *children]}[target]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        assert (check_end(study, number, target) == 0) == (target == "child")  # the parent makes up for a child
    finally:
        study.end()
    if LONG:
        again = Study(text, tmp_path, jobs=2, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
        assert again.ended() == 0, again.output()
        check_folder(again, undisturbed)


COUNTED = """
import os, signal, sys
left = int(sys.argv.pop(1))

def count(*event):
    global left
    left -= 1
    if left == 0:
        sys.setprofile(None)
        os.kill(os.getpid(), signal.SIGINT)

program = compile(open("cli.py", encoding="utf-8").read(), os.path.abspath("cli.py"), "exec")
sys.path.insert(0, "")
sys.setprofile(count)
try:
    exec(program, {"__name__": "__main__", "__file__": os.path.abspath("cli.py")})
finally:
    sys.setprofile(None)
    print("calls:", -left)
"""


def interrupted_at(call, folder):
    """A command that imports all of the package and then fails, with Ctrl-C at its n-th call or return; 0 for none."""
    return subprocess.run([sys.executable, "-c", COUNTED, str(call), "study", "--plot-only", "--out", folder],
                          capture_output=True, text=True, timeout=LIMIT, cwd=ROOT,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def test_ctrl_c_while_the_program_starts_ends_with_one_line(tmp_path):
    """Would have caught: a traceback, or an abort of the interpreter, where Ctrl-C comes before the command begins."""
    total, rng = int(interrupted_at(0, tmp_path).stdout.split("calls:")[1]), random.Random(0)
    faults = []
    for call in [10_000, 60_000, *(rng.randrange(total) for _ in range(200 if LONG else 4))]:
        done = interrupted_at(call, tmp_path)
        if "Traceback" in done.stderr or "Fatal" in done.stderr or done.returncode not in (130, 1):
            faults.append((call, done.returncode, done.stderr[-300:]))
    assert faults == []
