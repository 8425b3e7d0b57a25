"""The pages of docs/: those that are made are up to date, and what they tell to do works.

`PYTHONPATH=. python tests/test_docs.py` makes docs/explain.md again; with --tour also the notebook, which trains for a
minute and needs pandas.
"""

import json
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli
import notebook
from test_readme import require_commands
from tinymoe import experiments
from tinymoe.moe.routers import ROUTERS
from tinymoe.tools.explain import Example

DOCS = Path(__file__).resolve().parent.parent / "docs"


INTRO = """# One layer, worked out

This page is what `python cli.py explain` prints. With `--step` it waits after each part; `--router NAME` shows another
router, and `--seed 1` other numbers. `--figure FILE.png` draws parts 2 to 5:

![Token "l" through router, experts and sum](one_byte.png)

*The letter l: its logits become probabilities, the two largest become gates (bold), and the outputs of their experts,
each times its gate, add up to y.*
"""


def explain_page():
    return "\n".join([INTRO, *Example({}).parts()])


def test_every_work_that_is_cited_is_in_the_references():
    """A surname and a year, in the sources and pages: `Shazeer et al. 2017`, `Loshchilov & Hutter 2019`."""
    work = re.compile(r"\b([A-Z][A-Za-z]+(?:-[A-Z]+)?)(?: et al\.?,?| & [A-Z][a-z]+)? \(?((?:19|20)\d\d)\b")
    works = lambda text: set(work.findall(text))  # noqa: E731
    pages = [*DOCS.glob("*.md"), DOCS.parent / "README.md", *(DOCS.parent / "tinymoe").rglob("*.py")]
    cited = {work for path in pages if path.name != "references.md" for work in works(path.read_text(encoding="utf-8"))}
    assert len(cited) > 40 and cited <= works((DOCS / "references.md").read_text(encoding="utf-8"))


AGAIN = "install pandas, and run: PYTHONPATH=. python tests/test_docs.py --tour"
MADE = {"explain.md": explain_page}


@pytest.mark.parametrize("name", MADE)
def test_a_page_that_is_made_is_up_to_date(name):
    assert (DOCS / name).read_text(encoding="utf-8") == MADE[name](), \
        "run: PYTHONPATH=. python tests/test_docs.py"


def test_the_notebook_has_the_cells_of_its_script_and_kept_outputs():
    made = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))
    script = (DOCS / "tour.py").read_text(encoding="utf-8")
    assert [(cell["cell_type"], cell["source"]) for cell in made["cells"]] == notebook.cells(script), AGAIN
    kept = [cell["outputs"] for cell in made["cells"] if cell["cell_type"] == "code"]
    assert all(outputs for outputs in kept) and "image/png" in kept[-1][0]["data"]
    assert "load_cv" in kept[-2][0]["text"], AGAIN
    assert (DOCS / "tour.ipynb").stat().st_size < 200_000


@pytest.mark.slow
def test_the_tour_runs_and_its_first_cells_print_what_the_notebook_keeps():
    script = (DOCS / "tour.py").read_text(encoding="utf-8")
    assert "STEPS = 300" in script
    made = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))
    outputs = notebook.run(script.replace("STEPS = 300", "STEPS = 2"))
    before = [number for number, (kind, text) in enumerate(notebook.cells(script)) if "STEPS = 300" in text][0]
    assert all(cell.get("outputs") == found for cell, found in zip(made["cells"][:before], outputs))


EXERCISES = (DOCS / "exercises.md").read_text(encoding="utf-8")


def test_there_are_twenty_exercises_each_with_a_command_a_place_to_look_and_an_answer():
    parts = EXERCISES.split("\n### ")[1:]
    assert [int(part.split(".")[0]) for part in parts] == list(range(1, 21))
    for part in parts:
        assert "\n    python cli.py " in part and "Look at " in part and re.search(r"\*\*Answer\.\*\*.*\d", part, re.S)
    require_commands(EXERCISES)


@pytest.mark.slow
def test_every_command_of_the_exercises_works_at_a_small_size(tmp_path, monkeypatch):
    toy = {"n_layers": 2, "d_model": 8, "n_heads": 2, "d_ff": 8, "moe_layers": (1,), "seq_len": 16}
    monkeypatch.setitem(experiments.SCALES, "quick", experiments.Scale(toy, steps=2, seeds=1))
    monkeypatch.setattr(cli, "RESULTS", tmp_path)
    monkeypatch.chdir(DOCS.parent)
    (tmp_path / "words.txt").write_text(" ".join(map(str, range(1000))))
    typed = dict.fromkeys(re.findall(r"^    python cli\.py (.*)$", EXERCISES, re.M))
    assert len(typed) >= 12
    for line in typed:
        args = [arg.replace("results/", f"{tmp_path}/") for arg in shlex.split(line)]
        small = ["--text", str(tmp_path / "words.txt"), "-j", "1"] if args[0] == "experiment" else []
        small += ["-o", str(tmp_path / "compare.png")] if args[0] == "compare" else []
        done = CliRunner().invoke(cli.main, args + small)
        assert done.exit_code == 0, (line, done.output)
    used = {Path(name).stem for name in re.findall(r"docs/exercises/\w+\.py", EXERCISES)}
    assert used == {path.stem for path in (DOCS / "exercises").glob("*.py")}


def test_the_table_of_commands_has_every_command_and_its_options_exist():
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    require_commands(page)
    assert [name for name in cli.main.commands if f"`python cli.py {name}" not in page] == []
    assert all(option in page for option in ("-o", "-j", "-n", "130"))


def test_the_variant_of_an_experiment_differs_in_what_it_says(tmp_path):
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    file = re.search(r"^    import dataclasses\n(?:\n|    .*\n)+", page, re.M)[0]
    (tmp_path / "variant.py").write_text(textwrap.dedent(file))
    variant = experiments.from_file(str(tmp_path / "variant.py"))
    run, before = (one.runs("quick", seeds=1)[0].model for one in (variant, experiments.EXPERIMENTS["frozen"]))
    assert (run.n_experts, before.n_experts) == (16, 8) and variant.name == "frozen-16"


@pytest.mark.slow
def test_the_lines_of_python_train_and_load_a_model(tmp_path, monkeypatch, capsys):
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    lines = re.search(r"^    import tinymoe as tm\n(?:\n|    .*\n)+", page, re.M)[0]
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(lines), {})
    assert "(4, 128, 256)" in capsys.readouterr().out and (tmp_path / "mine" / "summary.json").exists()


def test_the_help_of_study_names_its_configs_and_the_command_below_the_routers_trains_each():
    shown = CliRunner().invoke(cli.main, ["study", "--help"]).output
    assert re.findall(r"^  ([A-Z])  ", shown, re.M) == [setting.id for setting in experiments.STUDY.settings]
    name = re.search(r"--config (\w) --set router=NAME", CliRunner().invoke(cli.main, ["routers"]).output)[1]
    for router in ROUTERS:
        assert experiments.STUDY.runs("quick", seeds=1, only=[name], model={"router": router})


if __name__ == "__main__":
    for name, make in MADE.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
    if "--tour" in sys.argv:
        made = notebook.notebook((DOCS / "tour.py").read_text(encoding="utf-8"))
        (DOCS / "tour.ipynb").write_text(made, encoding="utf-8")
