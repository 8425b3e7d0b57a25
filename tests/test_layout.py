"""The architecture, read from the import statements: a folder of tinymoe imports only from floors below its own."""

import ast
import json
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import tinymoe

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [["files"], ["kernels"], ["autograd"], ["layers"], ["moe"], ["model"], ["training"], ["study"],
          ["experiments", "tools"]]  # from the bottom up; a folder imports only from floors below its own
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = sorted(ROOT.glob("tinymoe/**/*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
EVERYWHERE = [*FILES, ROOT / "cli.py"]
OPTIONAL = {"bench_pytorch.py": {"torch"}, "compare.py": {"pyarrow"}}  # imported only where they are asked for


def module(path):
    """The floor's folder (or file) that a file belongs to: "moe" for moe/any.py."""
    return path.relative_to(ROOT / "tinymoe").parts[0].removesuffix(".py")


def imports(path):
    """Absolute dotted names that a file imports, wherever in it, in order."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[:len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def inside(path):
    """The parts of tinymoe that a file imports, in order, each once."""
    parts = [name.split(".") for name in imports(path)]
    return list(dict.fromkeys(p[1] for p in parts if p[0] == "tinymoe" and len(p) > 1))


def dotted(path):
    """tinymoe.moe.routing of its file; a package has the name of its folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules(path):
    """The modules of tinymoe that a file imports; a package that it lies in itself does not count."""
    known, own = {dotted(file) for file in FILES}, dotted(path)
    for name in imports(path):
        found = name if name in known else name.rpartition(".")[0]
        if found in known and not f"{own}.".startswith(f"{found}."):
            yield found


def outside(path):
    return {name.split(".")[0] for name in imports(path)} - {"tinymoe"}


def requirements():
    """The lines of requirements.txt, without comments."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line]


def pyproject():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_package_is_its_floors_and_nothing_else():
    there = {path.name.removesuffix(".py") for path in (ROOT / "tinymoe").iterdir()} - {"__init__", "__pycache__"}
    assert there == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_folder_imports_only_from_floors_below(path):
    own = module(path)
    if own != "__init__":
        assert [name for name in inside(path) if name != own and FLOOR[name] >= FLOOR[own]] == []


def test_no_imports_go_in_a_circle():
    known = {dotted(path): set(modules(path)) for path in FILES if path != ROOT / "tinymoe/__init__.py"}
    assert tuple(TopologicalSorter(known).static_order())  # raises CycleError


def test_the_package_imports_in_reading_order():
    floors = [FLOOR[name] for name in inside(ROOT / "tinymoe" / "__init__.py")]
    assert floors == sorted(floors)


def test_everything_is_reached_from_the_package():
    """In a fresh process, in which no other test has imported anything."""
    code = ("import sys, tinymoe as tm; late = {'matplotlib', 'tinymoe.study', 'tinymoe.tools'} & sys.modules.keys();"
            "print(late, tm.training.trainer.Trainer is tm.Trainer, tm.model.generate.generate is tm.generate,"
            "tm.train, tm.RunPlan, tm.TrainConfig, tm.load_model, tm.load_corpus, tm.study.runner.run_study,"
            "tm.experiments.STUDY, 'study' in dir(tm), tm.tools.explain, hasattr(tm, 'nothing'),"
            "hasattr(tm.study, 'nothing'))")
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("set() True True <") and found.stdout.endswith("False False\n")


def test_only_the_compiled_kernels_import_numba():
    found = {path.relative_to(ROOT / "tinymoe").parts[:2] for path in FILES if outside(path) & {"numba", "llvmlite"}}
    assert found == {("kernels", "compiled")}


def test_only_the_file_of_the_cluster_imports_dask():
    assert [str(path.relative_to(ROOT)) for path in EVERYWHERE if outside(path) & {"distributed", "dask"}] == [
        "tinymoe/study/cluster.py"]


@pytest.mark.parametrize("path", EVERYWHERE, ids=[*NAMES, "cli.py"])
def test_a_file_depends_on_the_requirements_alone_and_unpickles_nothing(path):
    needed = {re.match(r"\w+", line)[0] for line in requirements()} - {"pytest", "hypothesis"}
    assert outside(path) - set(sys.stdlib_module_names) - OPTIONAL.get(path.name, set()) <= needed
    assert not outside(path) & {"pickle", "marshal", "shelve", "dill"}
    assert "allow_pickle=True" not in path.read_text(encoding="utf-8")


def test_the_command_line_imports_tinymoe_only_inside_its_commands():
    top = ast.parse((ROOT / "cli.py").read_text(encoding="utf-8")).body
    names = [alias.name for node in top if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    light = "Path click codecs collections contextlib functools itertools json math os re shutil signal sys"
    assert sorted(names) == light.split()


@pytest.mark.parametrize("path", EVERYWHERE, ids=[*NAMES, "cli.py"])
def test_a_file_says_what_it_is_and_no_function_is_over_50_lines(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 50] == []


# -- the package --


def test_requirements_are_the_dependencies_and_the_extras_but_for_the_linter():
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    dev = [each for each in extras["dev"] if not each.startswith("ruff")]
    assert requirements() == project["dependencies"] + extras["interop"] + extras["cluster"] + dev


def test_the_package_has_its_script_its_page_and_its_version():
    settings = pyproject()
    assert settings["project"]["scripts"] == {"tinymoe": "cli:run"}
    assert settings["tool"]["setuptools"]["py-modules"] == ["cli"]
    for package, names in settings["tool"]["setuptools"]["package-data"].items():
        assert all((ROOT / package.replace(".", "/") / name).exists() for name in names)
    others = {path.name for path in (ROOT / "tinymoe").rglob("*.*")
              if path.suffix != ".py" and "__pycache__" not in path.parts}
    assert others == {"report.html", "view.html", "watch.html"}  # anything else must be named as package data
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "tinymoe.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", tinymoe.__version__)


def test_the_lock_holds_the_versions_of_the_published_rows():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {re.match(r"\w+", line)[0] for line in [*requirements(), "ruff"]} <= locked.keys()
    pinned = dict(line.split("==") for line in requirements() if "==" in line)
    assert pinned.items() <= locked.items()
    for versions in published_versions():
        assert versions.pop("python") in lines[2] and versions.items() <= locked.items()


def published_versions():
    """What the published rows say of the versions that made them."""
    rows = [json.loads(line) for path in (ROOT / "results/published").rglob("runs.jsonl")
            for line in path.read_text().splitlines()]
    return [row["config"]["versions"] for row in rows]
