"""The architecture, read from the import statements: a folder of tinymoe imports only from floors below its own."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [["files"], ["kernels"], ["autograd"], ["layers"], ["moe"], ["model"], ["training"], ["study"],
          ["experiments", "tools"]]  # from the bottom up; a folder imports only from floors below its own
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = sorted(ROOT.glob("tinymoe/**/*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
EVERYWHERE = [*FILES, ROOT / "cli.py"]


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


def test_only_the_compiled_kernels_import_numba():
    found = {path.relative_to(ROOT / "tinymoe").parts[:2] for path in FILES if outside(path) & {"numba", "llvmlite"}}
    assert found == {("kernels", "compiled")}


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
    assert sorted(names) == ["Path", "click", "contextlib", "json", "os", "sys", "time"]


@pytest.mark.parametrize("path", EVERYWHERE, ids=[*NAMES, "cli.py"])
def test_a_file_says_what_it_is_and_no_function_is_over_50_lines(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 50] == []
