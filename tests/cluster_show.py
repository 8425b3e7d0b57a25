"""A study on two hosts, network namespaces of this machine, whose workers, scheduler and link fail again and again.

    sudo python tests/cluster_show.py [KILLS]

Host a has the scheduler, the study and one worker, host b two workers. A random worker is killed KILLS times (20), the
scheduler twice, and the link between the hosts is down once for a minute. Then every run must have the bits of a
study without a cluster, and must have been trained to its end once. It needs root, iproute2 and util-linux.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from test_study import outcome  # noqa: E402
from test_train import MODEL, TRAINING, WORDS  # noqa: E402
from tinymoe.files import read_rows  # noqa: E402

SCHEDULER, SETTINGS = "tcp://10.77.0.1:8786", MODEL | TRAINING | {"steps": 6000, "n_evaluations": 80}
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "NUMBA_NUM_THREADS": "1", "TINYMOE_LEASE": "20"}


def sh(command):
    subprocess.run(command, shell=True, check=True)


class Host:
    """A network, host name and process numbers of its own; the files are those of this machine."""

    def __init__(self, name, address):
        self.name = name
        sh(f"ip netns add {name}")
        self.process = subprocess.Popen(["ip", "netns", "exec", name, "unshare", "--uts", "--pid", "--fork",
                                         "--kill-child", "--mount-proc", "sh", "-c", f"hostname {name}; sleep 9999"])
        time.sleep(1)
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.inside = ["nsenter", "--target", children[0], "--net", "--uts", "--pid", "--mount"]
        sh(f"ip link set v-{name} netns {name}; ip -n {name} addr add {address}/24 dev v-{name}; "
           f"ip -n {name} link set v-{name} up; ip -n {name} link set lo up")

    def start(self, log, *command, **options):
        with open(log, "a") as file:
            return subprocess.Popen([*self.inside, sys.executable, *map(str, command)], cwd=ROOT, env=ENVIRONMENT,
                                    stdout=file, stderr=file, **options)

    def end(self):
        self.process.kill()
        self.process.wait()
        subprocess.run(["ip", "netns", "delete", self.name])


def descendants(pid):
    """A process and what it started, the youngest last."""
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [each for child in path.read_text().split() for each in descendants(int(child))]
    return found


class Cluster:
    """The two hosts with what runs on them. What ends is started again, as a service manager does."""

    def __init__(self, folder):
        self.folder, self.restarts, self.over = folder, -4, False
        sh("ip link add v-tm-a type veth peer name v-tm-b")
        self.a, self.b = Host("tm-a", "10.77.0.1"), Host("tm-b", "10.77.0.2")
        worker = "-m", "distributed.cli.dask_worker", SCHEDULER, "--nthreads", 1, "--no-dashboard", "--local-directory"
        self.services = {
            "scheduler": (self.a, ("-m", "distributed.cli.dask_scheduler", "--host", "10.77.0.1", "--no-dashboard")),
            **{f"worker{n}": (host, (*worker, folder / f"dask{n}")) for n, host in enumerate((self.a, self.b, self.b))}}
        self.running = {}
        self.thread = threading.Thread(target=self._keep)
        self.thread.start()

    def _keep(self):
        while not self.over:
            for name, (host, command) in self.services.items():
                if name not in self.running or self.running[name].poll() is not None:
                    self.running[name] = host.start(self.folder / f"{name}.log", *command)
                    self.restarts += 1
            time.sleep(0.5)

    def kill(self, name):
        """Kill the scheduler, or the process of a worker that trains (its nanny starts another)."""
        processes = descendants(self.running[name].pid)
        python = [pid for pid in processes if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]  # of a nanny
        os.kill(python[-1] if name != "scheduler" else processes[-1], signal.SIGKILL)

    def end(self):
        self.over = True
        self.thread.join()
        for host in (self.a, self.b):
            host.end()


def watch(out, ends, stop):
    """Collect in `ends` every summary.json that is written, by run."""
    while not stop.is_set():
        for path in out.glob("runs/*/summary.json"):
            ends.setdefault(path.parent.name, set()).add(path.stat().st_mtime_ns)
        time.sleep(0.02)


def disturb(cluster, kills, out, say, rng):
    """The kills and the cut, each a random time after a checkpoint was written, spread over the study."""
    what = ["worker"] * kills + ["scheduler"] * 2 + ["cut"]
    rng.shuffle(what)
    for number, each in enumerate(what):
        while rows(out) < 0.9 * number / len(what) * 24 * (SETTINGS["n_evaluations"] + 1) + 1:
            time.sleep(0.05)
        time.sleep(rng.random() * 3)
        name = f"worker{rng.randrange(3)}" if each == "worker" else each
        finished = len(list(out.glob("runs/*/summary.json")))
        say(f"{number + 1:3} of {len(what)}: {name}, when {finished} runs are finished")
        if each == "cut":
            sh("ip -n tm-b link set v-tm-b down")
            time.sleep(60)
            sh("ip -n tm-b link set v-tm-b up")
        else:
            try:
                cluster.kill(name)
            except (OSError, IndexError) as error:  # it is just being started
                say(f"     not hit: {error}")


def rows(out):
    """Rows in the logs of all runs."""
    return sum(len(read_rows(path)) for path in out.glob("runs/*/log.jsonl"))


def command(text, out, *options):
    settings = [f"{name}={value}".replace(" ", "") for name, value in SETTINGS.items()]
    return [ROOT / "cli.py", "study", "--text", text, "--out", out, "--seeds", 4, *options,
            *(arg for name in "ABCDEF" for arg in ("--config", name)),
            *(arg for setting in settings for arg in ("--set", setting))]


def main(kills=20):
    folder, started = Path(tempfile.mkdtemp(prefix="tinymoe-show-")), time.monotonic()
    text, out = folder / "words.txt", folder / "cluster"
    text.write_text(WORDS)

    def say(message):
        print(f"{time.monotonic() - started:6.0f} s  {message}", flush=True)

    say(f"logs in {folder}")
    ends, stop = {}, threading.Event()
    cluster = Cluster(folder)
    try:
        threading.Thread(target=watch, args=(out, ends, stop), daemon=True).start()
        threading.Thread(target=disturb, args=(cluster, kills, out, say, random.Random(0)), daemon=True).start()
        codes = []
        while not codes or codes[-1] and len(codes) < 5:
            codes.append(cluster.a.start(folder / "study.log", *command(text, out, "--scheduler", SCHEDULER)).wait())
            say(f"the command ended with {codes[-1]}")
        time.sleep(1)
    finally:
        stop.set()
        cluster.end()
    say(f"{cluster.restarts} restarts of a scheduler or worker by their service manager")
    subprocess.run([sys.executable, *map(str, command(text, folder / "alone", "--jobs", 1))], cwd=ROOT, env=ENVIRONMENT,
                   check=True, stdout=subprocess.DEVNULL)
    same = outcome(out) == outcome(folder / "alone")
    say(f"{len(ends)} of 24 runs ended, {sum(len(times) > 1 for times in ends.values())} more than once; bits "
        f"{'are those' if same else 'DIFFER from those'} of a study without a cluster")
    return 0 if same and len(ends) == 24 and all(len(times) == 1 for times in ends.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main(*map(int, sys.argv[1:])))
