"""Damaged files and odd command lines: every command ends in time, with its result or with one line that says why not.

The cases are the same at every run. The default is small; `TINYMOE_TESTS=long pytest tests/test_fuzz.py` takes fifty
times as many, others with TINYMOE_SEED=N. A failed test lists every kind of failure once, with the case that showed it.
"""

import copy
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socketserver
import sys
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

import cli
import published
from test_train import WORDS
from tinymoe import ModelConfig, files
from tinymoe.files import CheckpointError
from tinymoe.model import published as interop
from tinymoe.moe.routers import ROUTERS
from tinymoe.study import figures
from tinymoe.study.rows import load_runs

LONG, SEED = os.environ.get("TINYMOE_TESTS") == "long", os.environ.get("TINYMOE_SEED", "0")
SECONDS, MEMORY = 60, 3 << 30  # what one command may take: time, and more bytes than before
TINY = dict(d_model=4, n_heads=1, d_ff=4, n_layers=2, moe_layers=[1], seq_len=4, n_experts=2, batch_size=2,
            n_evaluations=2, eval_windows=1, final_windows=1, steps=2)
SETTINGS = [arg for name, value in TINY.items() for arg in ("--set", f"{name}={value}")]
LINE = re.compile(r"|Usage: .*|Try '.*|Error: \S.*|Warning: .*|  +\S.*")  # of the error stream of a failed command
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="time and memory are limited as on Linux")


class Late(BaseException):
    """A command took too long. No handler of errors catches it."""


def _late(number, frame):
    raise Late


@contextmanager
def limits():
    """Raise Late after SECONDS, and MemoryError where more than MEMORY is asked for."""
    taken = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, before[1]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def where(error):
    """The exception and the place that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(frame.filename).name}, {frame.name}: {str(error)[:80]}"


def fault_of(*args):
    """What is wrong with how a command ended; None if all is well."""
    with limits():
        result = CliRunner().invoke(cli.main, [str(arg) for arg in args])
    error = result.exception
    if error and not isinstance(error, SystemExit):
        return where(error)
    if result.exit_code not in (0, 1, 2):
        return f"exit code {result.exit_code}"
    lines = result.stderr.split("\n")
    if result.exit_code:
        odd = [line for line in lines if not LINE.fullmatch(line)]
        if odd or not any(line.startswith("Error: ") for line in lines):
            return f"not one line: {odd or result.output[-200:]}"
    raw = [line for line in lines if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in line)]
    return f"control characters: {raw}" if raw else None


def fault_of_call(function, *refusals):
    """The same for a function: it may raise the refusals, with a message of one line."""
    try:
        with limits():
            function()
    except refusals as error:
        return None if str(error) and "\n" not in str(error) else f"message of several lines: {error!r:.200}"
    except (Late, Exception) as error:
        return where(error)
    return None


def collect(number, case):
    """Call case(rng) -> (fault or None, description) as often as asked; fail with one line for each kind of fault."""
    faults = {}
    for i in range(number * (50 if LONG else 1)):
        fault, description = case(random.Random(f"{SEED} {i}"))
        if fault:
            kind = re.sub(r"\d+", "#", fault)[:60]
            faults.setdefault(kind, f"case {i}: {fault}\n    {description}")
    assert not faults, "\n" + "\n".join(faults.values())


# -- what is changed ----------------------------------------------------------------------------

ODD = [None, True, False, -1, 0, 1, 2, 1.5, 1e-300, 1e308, 2**31 - 1, 2**63, 10**40, math.nan, math.inf, "", "a", "1",
       "\x1b[31mred", "a\nb", "🎲", "x" * 5000, "\ud800", [], {}, [0], [[]], [None], {"a": 1}, [[1, 2], [3]], ["a"],
       ["top_k"], {"": {}}]


def places(value, above=()):
    """Paths to every value inside a JSON value."""
    yield above
    inner = value.items() if isinstance(value, dict) else enumerate(value[:6]) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*above, key))


def mutate_json(rng, value):
    """A copy with one key removed, added or renamed, or one value replaced; and what was done."""
    value = copy.deepcopy(value)
    spots = [path for path in places(value) if path]
    if not spots or rng.random() < 0.02:
        odd = rng.choice(ODD)
        return odd, f"all = {odd!r:.60}"
    *path, last = rng.choice(spots)
    inside = value
    for key in path:
        inside = inside[key]
    what, odd = rng.choice(["remove", "add", "replace", "replace", "replace"]), copy.deepcopy(rng.choice(ODD))
    if what == "remove":
        del inside[last]
    elif what == "add" and isinstance(inside, dict):
        inside[rng.choice(["new", "\x1b[31m", "a\nb", ""])] = odd
    else:
        inside[last] = odd
    return value, f"{what} {[*path, last]} {odd!r:.60}"


def mutate_bytes(rng, raw):
    """Bytes with a flipped bit, cut, grown or overwritten; and what was done."""
    place = rng.randrange(len(raw) or 1)
    what = rng.choice(["flip", "flip", "cut", "insert", "zero", "empty"])
    if what == "flip" and raw:
        bit = rng.randrange(8)
        return raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1:], f"flip bit {bit} of byte {place}"
    changed = {"cut": raw[:place], "insert": raw[:place] + rng.randbytes(3) + raw[place:],
               "zero": raw[:place] + bytes(min(64, len(raw) - place)) + raw[place + 64:]}.get(what, b"")
    return changed, f"{what} at byte {place}"


def mutate_arrays(rng, path):
    """Change the header, or an array, of a file that is otherwise as it should be; says what was done."""
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    header = json.loads(str(arrays.pop("__header__")))
    name = rng.choice(sorted(arrays))
    array = arrays[name]
    what = rng.choice(["header"] * 4 + ["drop", "rename", "reshape", "type", "nan", "grow", "text"])
    if what == "header":
        header, what = mutate_json(rng, header)
    elif what in ("drop", "rename"):
        del arrays[name]
        if what == "rename":
            arrays[name + "x"] = array
    else:
        arrays[name] = {"reshape": lambda: array.reshape(-1), "type": lambda: array.astype("i2"),
                        "nan": lambda: np.full(array.shape, math.nan), "text": lambda: np.array("text"),
                        "grow": lambda: np.concatenate([array.reshape(-1)] * 2)}[what]()
    files.save_arrays(path, arrays, header)
    return f"{name}: {what}"


def mutate_place(rng, path):
    """Put something else where the file is; says what."""
    what = rng.choice(["missing", "folder", "dangling link", "link to itself", "link to a device"])
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif "link" in what:
        path.symlink_to({"dangling link": "nowhere", "link to itself": path.name}.get(what, os.devnull))
    return what


def mutate_file(rng, path):
    """Damage one file in one of all ways; says how."""
    choice = rng.random()
    if choice < 0.05:
        return mutate_place(rng, path)
    if choice < 0.3 or path.suffix not in (".json", ".jsonl", ".npz"):
        changed, what = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(changed)
        return what
    if path.suffix == ".npz":
        return mutate_arrays(rng, path)
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    i = rng.randrange(len(lines))
    changed, what = mutate_json(rng, json.loads(lines[i]))
    lines[i] = json.dumps(changed)
    path.write_text("\n".join(lines) + "\n")
    return f"line {i}: {what}"


# -- run folders --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS)
    return path


@pytest.fixture(scope="module")
def study(text, tmp_path_factory):
    """(folder of a finished study of two tiny runs, the command that trains it)."""
    folder = tmp_path_factory.mktemp("study") / "out"
    command = ["study", "--jobs", 1, "--text", text, "--config", "D", "--config", "E", *SETTINGS, "--out"]
    result = CliRunner().invoke(cli.main, [str(arg) for arg in (*command, folder)])
    assert result.exit_code == 0, result.output
    return folder, command


@pytest.fixture
def copied(study, tmp_path, monkeypatch):
    """make() -> a fresh copy of the study. Most figures are left out, since they take seconds."""
    draw, rng = figures.draw_all, random.Random(SEED)
    monkeypatch.setattr(figures, "draw_all", lambda results: draw(results) if LONG and rng.random() < 0.03 else [])

    def make():
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return shutil.copytree(study[0], tmp_path / "out")

    return make


def commands_for(out, run, command):
    """Commands that read a run or its study."""
    return [["generate", run, "--prompt", "ab", "--length", 2], ["route", run, "abc", "--gate", "--entropy"],
            ["view", run, "--out", out.parent / "page.html"], ["params", run / "config.json"], ["compact", out],
            ["study", "--plot-only", "--out", out], [*command, out], [*command, out]]


@pytest.mark.slow
def test_a_damaged_run_is_refused_in_one_line(study, copied):
    """Would have caught: array files that lie about themselves; a header that `restore` trusts; a bad key or type in
    config.json, log.jsonl or summary.json; a link inside a run folder; text of files that reaches the terminal raw.
    """
    def case(rng):
        out = copied()
        run = out / "runs" / rng.choice(["D-seed0", "E-seed0"])
        if rng.random() < 0.4:
            (run / "summary.json").unlink()  # the run is to be resumed
        path = rng.choice(sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock"))
        what = mutate_file(rng, path)
        command = rng.choice(commands_for(out, run, study[1]))
        resumes = (run / "summary.json").exists()
        return fault_of(*command), f"{path.relative_to(out)}: {what}; {command[0]}; summary there: {resumes}"

    collect(120, case)


def test_damaged_published_rows_are_refused_in_one_line(study, copied):
    """Would have caught: rows with one bad key or type that end `--plot-only` in a traceback."""
    def case(rng):
        out = copied()
        with limits():
            CliRunner().invoke(cli.main, ["compact", str(out)])
        shutil.rmtree(out / "runs")
        what = mutate_file(rng, out / "runs.jsonl")
        command = rng.choice([["study", "--plot-only", "--out", out], ["compact", out], ["findings", out.parent]])
        return fault_of(*command), f"runs.jsonl: {what}; {command[0]}"

    collect(60, case)


def flips(rng, raw, number, bits=8):
    """(place, bit) of one-bit flips: `bits` random ones of every byte in the long form, else `number` of any bytes."""
    if LONG:
        return [(place, bit) for place in range(len(raw)) for bit in rng.sample(range(8), bits)]
    return [(rng.randrange(len(raw)), rng.randrange(8)) for _ in range(number)]


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "summary.json"])
def test_a_flipped_bit_of_rows_is_refused_in_one_line_or_read(study, copied, name):
    """Would have caught: 971 of 26,551 flips of rows that ended in a KeyError, TypeError or AttributeError."""
    out, rng, faults = copied(), random.Random(SEED + name), {}
    path = out / "runs" / "D-seed0" / name
    whole = path.read_bytes()
    for place, bit in flips(rng, whole, 250, bits=1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1:])
        fault = fault_of_call(lambda: load_runs(out), ValueError)
        if not fault and rng.random() < 0.1:
            fault = fault_of("study", "--plot-only", "--out", out)
        if fault:
            around = whole[max(0, place - 20):place + 20]
            faults.setdefault(re.sub(r"\d+", "#", fault)[:60], (place, bit, around, fault))
    assert not faults, "\n" + "\n".join(map(str, faults.values()))


# -- published weights --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", published.CONFIGS)
def test_damaged_published_weights_are_refused_in_one_line(tmp_path, kind):
    """Would have caught: weights whose config asks for gigabytes before they are refused; dangling shards, and folders
    in place of files.
    """
    safetensors = pytest.importorskip("safetensors.numpy")
    config = published.CONFIGS[kind]
    weights, folder = tmp_path / "model.safetensors", tmp_path
    safetensors.save_file(published.tensors(config), weights)
    whole = weights.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    index = {"weight_map": dict.fromkeys(published.tensors(config), weights.name)}

    def case(rng):
        for path in (weights, folder / "config.json", folder / "model.safetensors.index.json"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        weights.write_bytes(whole)
        (folder / "config.json").write_text(json.dumps(config))
        choice = rng.random()
        if choice < 0.4:
            changed, what = mutate_json(rng, config)
            (folder / "config.json").write_text(json.dumps(changed))
        elif choice < 0.6:
            header, what = mutate_json(rng, json.loads(whole[8:8 + length]))
            text = json.dumps(header).encode()
            weights.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length:])
        elif choice < 0.75:
            changed, what = mutate_json(rng, index)
            (folder / "model.safetensors.index.json").write_text(json.dumps(changed))
        elif choice < 0.9:
            start, what = mutate_bytes(rng, whole[:8 + length])
            weights.write_bytes(start + whole[8 + length:])
        else:
            what = mutate_file(rng, rng.choice([weights, folder / "config.json"]))
        fault = fault_of_call(lambda: interop.load(folder), CheckpointError, ValueError)
        return fault or fault_of("params", folder / "config.json"), what

    collect(60, case)


# -- command lines ------------------------------------------------------------------------------

WORDS_OF_A_SHELL = [
    "", " ", "-", "--", "0", "-1", "1", "2", "1.5", "1e400", "nan", "inf", "2147483648", "9" * 80, "a", "Ä", "🎲",
    "\x1b[31m", "a\nb", "\udcff", "x" * 5000, "[1", "{}", "../..", "/dev/null", "/dev/full", "/proc/self/mem", "top_k",
    "synthetic", "D", "mixtral-8x7b", "/" + "a/" * 3000]
VALUES = [
    "", "0", "-1", "1", "2", "3", "0.5", "1e-9", "1e308", "1e999", "NaN", "2147483647", "2147483648", "9" * 50, "true",
    "null", "[]", "[0]", "[0,1]", "[1,1]", "[9]", "[\"top_k\"]", "[\"top_k\",\"hash\"]", "{}", "{\"z\":1}", "text",
    "\"rms\"", "rms", "rotary", "latent", "geglu", "\x1b[31m", "a\nb", "[[0]]", "[" * 2000, "1_000", "naive", *ROUTERS]
TRAINED = {"study": ["--jobs", "1", "--config", "D", *SETTINGS], "experiment": ["--plot-only"],
           "probe": ["--steps", "1", *SETTINGS[:14], "--set", "batch_size=2"], "bench": ["--repeats", "0"],
           "gradcheck": ["--only", "no such check"]}  # keeps a command that is in order after all short


def names_of_settings(rng):
    fields = sorted(ModelConfig.__dataclass_fields__) + ["steps", "batch_size", "learning_rate", "warmup",
                                                         "weight_decay", "max_norm", "n_evaluations", "eval_windows"]
    groups = [f"router.{option}" for router in ROUTERS.values() for option in router.options()] + [
        "losses.z", "losses.load", "losses.policy", "losses.device", "losses.none", "router.", "losses", "router"]
    return rng.choice(fields + sorted(groups))


def test_odd_settings_are_refused_in_one_line(text, tmp_path):
    """Would have caught: `expert_backend` as a list, `q_rank` of NumPy's kinds, billions of experts, layers or
    evaluations that take memory or time before they are refused.
    """
    def case(rng):
        changed = [f"{names_of_settings(rng)}={rng.choice(VALUES)}" for _ in range(rng.choice([1, 1, 2, 3]))]
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        sets = [arg for one in changed for arg in ("--set", one)]
        command = rng.choice([["study", *TRAINED["study"], "--text", text, "--out", tmp_path / "out"]] * 3 + [
            ["probe", rng.choice(sorted(ROUTERS)), *TRAINED["probe"]]])
        return fault_of(*command, *sets), f"{command[0]} {[one[:60] for one in changed]}"

    collect(100, case)


def random_command(rng, run, tmp_path):
    """A command with some of its options, each with an odd value; not one that trains for long."""
    name = rng.choice(sorted(cli.main.commands))
    command = cli.main.commands[name]
    args = []
    for parameter in command.params:
        paths = run, tmp_path, run / "config.json", run / "checkpoint.npz", tmp_path / "new"
        odd = rng.choice([*WORDS_OF_A_SHELL, *paths])
        if isinstance(parameter, click.Argument):
            args += [odd] if rng.random() < 0.9 or name == "findings" else []  # by default it writes what is published
        elif parameter.name not in ("jobs", "seeds", "repeats", "imports", "length") and rng.random() < 0.3:
            args += [parameter.opts[-1]] + ([] if parameter.is_flag else [odd])
    if name == "generate":
        args += ["--length", "2"]
    if rng.random() < 0.1:
        args.insert(rng.randrange(len(args) + 1), rng.choice(WORDS_OF_A_SHELL))
    return [name, *TRAINED.get(name, []), *args]


def test_odd_command_lines_end_in_one_line(study, tmp_path, monkeypatch):
    """Would have caught: a path of many parts, an empty or undecodable `--out`, `params --context` of 80 digits, a
    device as an output path, output to a full device.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(socketserver.BaseServer, "serve_forever", lambda server: None)  # watch serves until Ctrl-C
    monkeypatch.setattr(figures, "draw_all", lambda results: [])

    def case(rng):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        run = shutil.copytree(study[0] / "runs" / "D-seed0", tmp_path / "run")
        command = random_command(rng, run, tmp_path)
        return fault_of(*command), str([str(arg)[:80] for arg in command])

    collect(200, case)
