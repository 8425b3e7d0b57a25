"""The pages of docs/: those that are made are up to date, and what they tell to do works.

`python tests/test_docs.py` makes docs/explain.md again; with --tour also the notebook, which trains for a minute.
"""

import json
import sys
from pathlib import Path

import pytest

import cli
import notebook
from test_readme import require_commands
from tinymoe.tools.explain import Example

DOCS = Path(__file__).resolve().parent.parent / "docs"


INTRO = """# One layer, worked out

This page is what `python cli.py explain` prints. With `--step` it waits after each part; `--router NAME` shows another
router, and `--seed 1` other numbers.
"""


def explain_page():
    return "\n".join([INTRO, *Example({}).parts()])


AGAIN = "run: python tests/test_docs.py --tour"
MADE = {"explain.md": explain_page}


@pytest.mark.parametrize("name", MADE)
def test_a_page_that_is_made_is_up_to_date(name):
    assert (DOCS / name).read_text(encoding="utf-8") == MADE[name](), "run: python tests/test_docs.py"


def test_the_notebook_has_the_cells_of_its_script_and_kept_outputs():
    made = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))
    script = (DOCS / "tour.py").read_text(encoding="utf-8")
    assert [(cell["cell_type"], cell["source"]) for cell in made["cells"]] == notebook.cells(script), AGAIN
    kept = [cell["outputs"] for cell in made["cells"] if cell["cell_type"] == "code"]
    assert all(outputs for outputs in kept) and "image/png" in kept[-1][0]["data"]
    assert (DOCS / "tour.ipynb").stat().st_size < 200_000


def test_the_tour_runs_and_its_first_cells_print_what_the_notebook_keeps():
    script = (DOCS / "tour.py").read_text(encoding="utf-8")
    assert "STEPS = 300" in script
    made = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))
    outputs = notebook.run(script.replace("STEPS = 300", "STEPS = 2"))
    before = [number for number, (kind, text) in enumerate(notebook.cells(script)) if "STEPS = 300" in text][0]
    assert all(cell.get("outputs") == found for cell, found in zip(made["cells"][:before], outputs))


def test_the_table_of_commands_has_every_command_and_its_options_exist():
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    require_commands(page)
    assert [name for name in cli.main.commands if f"`python cli.py {name}" not in page] == []
    assert all(option in page for option in ("-o", "-j", "-n", "130"))


if __name__ == "__main__":
    for name, make in MADE.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
    if "--tour" in sys.argv:
        made = notebook.notebook((DOCS / "tour.py").read_text(encoding="utf-8"))
        (DOCS / "tour.ipynb").write_text(made, encoding="utf-8")
