"""The pages of docs/: those that are made here are up to date. `python tests/test_docs.py` makes them again."""

from pathlib import Path

import pytest

import cli
from test_readme import require_commands
from tinymoe.tools.explain import Example

DOCS = Path(__file__).resolve().parent.parent / "docs"


INTRO = """# One layer, worked out

This page is what `python cli.py explain` prints. With `--step` it waits after each part; `--router NAME` shows another
router, and `--seed 1` other numbers.
"""


def explain_page():
    return "\n".join([INTRO, *Example({}).parts()])


MADE = {"explain.md": explain_page}


@pytest.mark.parametrize("name", MADE)
def test_a_page_that_is_made_is_up_to_date(name):
    assert (DOCS / name).read_text(encoding="utf-8") == MADE[name](), "run: python tests/test_docs.py"


def test_the_table_of_commands_has_every_command_and_its_options_exist():
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    require_commands(page)
    assert [name for name in cli.main.commands if f"`python cli.py {name}" not in page] == []
    assert all(option in page for option in ("-o", "-j", "-n", "130"))


if __name__ == "__main__":
    for name, make in MADE.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
