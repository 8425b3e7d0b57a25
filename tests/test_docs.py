"""The pages of docs/: those that are made here are up to date. `python tests/test_docs.py` makes them again."""

from pathlib import Path

import pytest

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


if __name__ == "__main__":
    for name, make in MADE.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
