"""The architecture, read from the import statements: each file of tinymoe imports only from files above it."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("files tensor kernels functional gradcheck nn attention routing routers losses experts comm config moe model params interop synthetic "
         "data optim metrics evaluation train probes generate study rows plots view report experiments bench checks").split()
FILES = sorted(ROOT.glob("tinymoe/**/*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
EVERYWHERE = [*FILES, ROOT / "cli.py"]


def module(path):
    """The part of tinymoe that a file belongs to: "routers" for routers.py and for routers/any.py."""
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


def outside(path):
    return {name.split(".")[0] for name in imports(path)} - {"tinymoe"}


def test_every_file_has_its_place_in_the_order():
    assert {module(path) for path in FILES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_imports_only_from_files_above_it(path):
    if module(path) != "__init__":
        place = ORDER.index(module(path))
        assert [name for name in inside(path) if ORDER.index(name) > place] == []


def test_the_package_imports_in_reading_order():
    names = inside(ROOT / "tinymoe" / "__init__.py")
    assert names == sorted(names, key=ORDER.index)


def test_only_the_kernels_import_numba():
    assert {module(path) for path in FILES if outside(path) & {"numba", "llvmlite"}} == {"kernels"}


@pytest.mark.parametrize("path", EVERYWHERE, ids=[*NAMES, "cli.py"])
def test_a_file_depends_on_the_requirements_alone_and_unpickles_nothing(path):
    needed = {line.split("#")[0].strip().split(">")[0].split("=")[0]
              for line in (ROOT / "requirements.txt").read_text().splitlines()} - {"", "pytest"}
    assert outside(path) - set(sys.stdlib_module_names) <= needed
    assert not outside(path) & {"pickle", "marshal", "shelve", "dill"}
    assert "allow_pickle=True" not in path.read_text(encoding="utf-8")


def test_the_command_line_imports_tinymoe_only_inside_its_commands():
    top = ast.parse((ROOT / "cli.py").read_text(encoding="utf-8")).body
    names = [alias.name for node in top if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    assert sorted(names) == ["Path", "click", "json", "os"]


@pytest.mark.parametrize("path", EVERYWHERE, ids=[*NAMES, "cli.py"])
def test_a_file_says_what_it_is_and_no_function_is_over_50_lines(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 50] == []
