"""Where compiled code is kept, and what happens when that place, a setting or a compiling process fails."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from test_study import alive

pytest.importorskip("numba")
ROOT = Path(__file__).parents[1]
COMPILE = "from tinymoe.kernels.compiled import compile; "
WHERE = COMPILE + "print(compile.CACHE, compile.is_compiled('float32'))"
RELU = "import numpy as np; from tinymoe import kernels; print(kernels.activation(np.array([-1.0, 2.0]), 'relu'))"
slow = pytest.mark.slow


def start(code, root=ROOT, cwd=ROOT, **environment):
    """A process that runs the code with tinymoe from `root`, first in its path, and without the current folder.

    Ctrl-C reaches it also where the tests themselves run in the background.
    """
    code = f"import sys; sys.path[0] = {str(root)!r}; {code}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "XDG_", "TINYMOE_"))}
    environment = kept | {"TINYMOE_KERNELS": "numba"} | environment
    return subprocess.Popen([sys.executable, "-c", code], cwd=cwd, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def run(code, **options):
    """(what it prints, what it prints as errors) of a process that must end well."""
    process = start(code, **options)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip(), err.strip()


@pytest.fixture
def installed(tmp_path):
    """A folder that holds the package alone, as pip makes it."""
    shutil.copytree(ROOT / "tinymoe", tmp_path / "site" / "tinymoe", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "site"


# ---- the folder ----------------------------------------------------------------------------------

def test_a_checkout_keeps_its_code_in_its_own_folder():
    assert run(WHERE)[0].startswith(str(ROOT / "tinymoe/kernels/compiled/__pycache__/numba-"))


def test_an_installed_package_keeps_its_code_in_the_cache_of_the_user(installed, tmp_path):
    assert run(WHERE, root=installed, HOME=str(tmp_path))[0].startswith(f"{tmp_path}/.cache/tinymoe/numba-")
    cache = tmp_path / "elsewhere"
    folder = Path(run(WHERE, root=installed, XDG_CACHE_HOME=str(cache))[0].split()[0])
    assert folder.parent == cache / "tinymoe" and folder.stat().st_mode & 0o777 == 0o700


def test_without_a_home_all_still_works(installed):
    """No cache means slower, never broken."""
    no_home = "import os, pwd; os.environ.pop('HOME'); pwd.getpwuid = {}.__getitem__; "
    assert run(no_home + "import tinymoe; " + WHERE, root=installed)[0] == "None False"


@slow
def test_without_a_folder_for_compiled_code_all_still_works():
    """Below a file no folder can be made."""
    assert run(RELU, NUMBA_CACHE_DIR=os.devnull + "/x")[0] == "[0. 2.]"


def test_another_python_numba_or_cpu_has_other_code(tmp_path):
    places = {run(change + WHERE, NUMBA_CACHE_DIR=str(tmp_path), **environment)[0] for change, environment in (
        ("", {}), ("sys.implementation.cache_tag = 'cpython-399'; ", {}), ("", {"NUMBA_CPU_NAME": "haswell"}),
        ("import numba; numba.__version__ = '0.99'; ", {}))}
    assert len(places) == 4 and all(place.endswith("False") for place in places)


# ---- damage --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def one_kernel(tmp_path_factory):
    """A cache that holds the activation alone."""
    path = tmp_path_factory.mktemp("one")
    assert run(RELU, NUMBA_CACHE_DIR=str(path)) == ("[0. 2.]", "")
    return path


@slow
@pytest.mark.parametrize("kind, keep", [("nbi", 0), ("nbi", 50), ("nbc", 0), ("nbc", 200)])
def test_a_damaged_file_is_thrown_away_and_compiled_again(one_kernel, kind, keep, tmp_path):
    options = {"NUMBA_CACHE_DIR": str(tmp_path)}
    shutil.copytree(one_kernel, tmp_path, dirs_exist_ok=True)
    os.truncate(next(tmp_path.rglob(f"*._activation-*.{kind}")), keep)
    out, err = run(RELU, **options)
    assert out == "[0. 2.]" and err.count("\n") == 0
    assert err.startswith(f"The compiled kernels in {tmp_path}/")
    assert err.endswith(" are damaged: they are compiled again.")
    assert run(RELU, **options) == ("[0. 2.]", "")


@slow
def test_where_all_kernels_were_kept_all_are_compiled_again_by_other_processes(one_kernel, tmp_path):
    """So this process reads every kernel, and has the same bits as others."""
    here = f"compile._compile_apart = lambda dtype: print(dtype, {RELU.split('; ')[-1]!r}); "
    shutil.copytree(one_kernel, tmp_path, dirs_exist_ok=True)
    Path(run(WHERE, NUMBA_CACHE_DIR=str(tmp_path))[0].split()[0], "float64").touch()
    os.truncate(next(tmp_path.rglob("*._activation-*.nbc")), 9)
    assert run(COMPILE + here + RELU, NUMBA_CACHE_DIR=str(tmp_path))[0].startswith("float64 ")
    assert not list(tmp_path.rglob("float64"))


@slow
def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path):
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
    process = start(full + RELU, NUMBA_CACHE_DIR=str(tmp_path))
    error = process.communicate(timeout=300)[1].splitlines()[-1]
    assert error.startswith(f"tinymoe.kernels.KernelsError: cannot keep compiled kernels in {tmp_path}/numba-")
    assert error.endswith("make room there, or set NUMBA_CACHE_DIR to another folder")


# ---- settings ------------------------------------------------------------------------------------

@pytest.mark.parametrize("setting", [{"NUMBA_NUM_THREADS": "0"}, {"NUMBA_THREADING_LAYER": "x"}])
def test_a_setting_that_numba_refuses_is_one_line(setting):
    done = subprocess.run([sys.executable, "cli.py", "gradcheck"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"TINYMOE_KERNELS": "numba"} | setting)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("Error: numba does not start: ")
    assert done.stderr.endswith(": change that, or set TINYMOE_KERNELS=numpy\n")


@slow
def test_warnings_that_are_errors_change_nothing(tmp_path):
    assert run(RELU, PYTHONWARNINGS="error", NUMBA_CACHE_DIR=str(tmp_path)) == ("[0. 2.]", "")


# ---- the processes that compile ------------------------------------------------------------------

def children(process):
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def gone(pids, seconds=60):
    """Whether all these processes end in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(map(alive, pids)):
            return True
        time.sleep(0.1)
    return False


@slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize("wait", [0, 4])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_processes_that_compile_end_with_their_parent(number, wait, tmp_path):
    """Ctrl-C reaches all processes of the terminal. Only the parent says so."""
    process = start("from tinymoe import kernels; kernels.compile_all('float64')", NUMBA_CACHE_DIR=str(tmp_path))
    end = time.monotonic() + 60
    while len(pids := children(process)) < 2:
        assert time.monotonic() < end and process.poll() is None, process.kill() or process.communicate()
        time.sleep(0.02)
    time.sleep(wait)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert out == "" and err.count("Traceback") == (number == signal.SIGINT)
    assert gone(pids)


@slow
def test_the_processes_that_compile_import_nothing_from_the_current_folder(tmp_path):
    """Here they find all compiled: what they import is the same. The mark is there if both ended well."""
    (tmp_path / "scipy.py").write_text("open('imported', 'w').close(); raise SystemExit(1)")
    kept = Path(run("from tinymoe import kernels; kernels.compile_all('float64'); " + WHERE)[0].split()[0])
    copy = shutil.copytree(kept, tmp_path / "cache" / kept.name)
    (copy / "float64").unlink()
    run(COMPILE + "compile._compile_apart('float64')", cwd=tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert (copy / "float64").exists() and not (tmp_path / "imported").exists()
