"""The README is true: its example, its router, its file map and its commands are run or counted here."""

import contextlib
import io
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import cli
import tinymoe as tm
from tinymoe.experiments import EXPERIMENTS, STUDY
from tinymoe.moe import routers
from tinymoe.study import gathered, report

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "results/published"
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)


def test_the_example_prints_what_it_says():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(next(text for language, text in BLOCKS if language == "python"), {})
    assert printed.getvalue() == next(text for language, text in BLOCKS if language == "")


def test_the_router_in_ten_lines_trains(monkeypatch):
    monkeypatch.setitem(routers.ROUTERS, "above_mean", None)  # which takes the name out again at the end
    exec(next(text for language, text in BLOCKS if "class AboveMean" in text), {"__name__": "mine"})
    model = tm.Transformer(tm.ModelConfig(vocab_size=9, n_layers=2, d_model=8, n_heads=2, d_ff=8, seq_len=4,
                                          moe_layers=(1,),
                                          router="above_mean"), dtype=np.float64)
    ids = np.arange(8).reshape(2, 4)
    weight = model.parameters()["blocks.1.feed_forward.router.weight"]
    assert tm.gradcheck(lambda _: model.loss(ids, ids).total, weight).ok
    model.loss(ids, ids).cross_entropy.backward()
    assert np.abs(weight.grad).max() > 0


def test_the_router_in_a_file_is_known_to_the_commands(tmp_path):
    (tmp_path / "above_mean.py").write_text(next(text for language, text in BLOCKS if "class AboveMean" in text))
    listed = subprocess.run([sys.executable, "cli.py", "routers", "--import", tmp_path / "above_mean.py"],
                            cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "above_mean" in listed


def lines_of(name):
    """How many lines of Python a file or a folder of tinymoe has; cli.py lies beside it."""
    path = ROOT / name if name == "cli.py" else ROOT / "tinymoe" / name
    files = [path] if path.is_file() else path.rglob("*.py")
    return sum(file.read_text(encoding="utf-8").count("\n") for file in files)


def table(part):
    """{file or folder: lines} of the rows in a part of the README."""
    rows = re.findall(r"^\| `([\w./]+)` \| ([\d,]+) \|", part, re.M)
    return {name: int(lines.replace(",", "")) for name, lines in rows}


CORE, AROUND = README[:README.find("Around the core")], README[README.find("Around the core"):]


def corrected(readme):
    """The README with the numbers of lines, and the results, as they are."""
    readme = re.sub(r"^(\| `([\w./]+)` \| )[\d,]+ \|", lambda row: f"{row[1]}{lines_of(row[2])} |", readme, flags=re.M)
    readme = re.sub(r"(it has )[\d,]+ lines", rf"\g<1>{sum(map(lines_of, table(CORE))):,} lines", readme)
    readme = re.sub(r"\([\d,]+( lines in all\))", rf"({lines_of(''):,}\g<1>", readme)
    rows, unknown = decided()
    readme = re.sub(r"(^\| found \|.*\n.*\n)(?:\|.*\n)*", lambda head: f"{head[1]}{rows}\n", readme, flags=re.M)
    return re.sub(r"^Not known: (.+\n)*", unknown + "\n", readme, flags=re.M)


def decided():
    """The README's table of what was decided, and its sentence of what is not known: the first page of the published
    findings, shortened."""
    page = (PUBLISHED / "FINDINGS.md").read_text(encoding="utf-8")

    def rows_below(head):
        """The rows of all tables that begin with this heading: the study and the experiments have one each."""
        tables = re.findall(rf"^\| {head} \|.*\n.*\n((?:\|.*\n)*)", page, re.M)
        return [line.strip("| ").split(" | ") for line in "".join(tables).splitlines()]

    rows = []
    for _, answer, difference, *_, experiment in rows_below("question"):
        settings = " - ".join(re.findall("`.*?`", difference))
        numbers = difference.split(": ")[-1]
        place = experiment.replace("(", "(results/published/")
        rows.append(f"| {answer.replace('**', '')} | {settings}: {numbers} | {place} |")
    where = {}
    for question, *_, experiment in rows_below("question, not known"):
        where.setdefault(question, []).append(f"`{re.search(r'[^[]+(?=])', experiment)[0]}`")
    unknown = [f"{question} ({' and '.join(those)})" for question, those in where.items()] or ["nothing."]
    return "\n".join(rows), textwrap.fill("Not known: " + " ".join(unknown), 125, break_on_hyphens=False)


def numbers(readme):
    """{what: lines} of files, folders, the core and all, as the README says."""
    totals = re.search(r"it has ([\d,]+) lines", readme), re.search(r"\(([\d,]+) lines in all\)", readme)
    return table(readme) | {total[0]: int(total[1].replace(",", "")) for total in totals}


def test_its_numbers_of_lines_are_true_within_3():
    """`python tests/test_readme.py` corrects them."""
    there = {path.name + "/" * path.is_dir() for path in (ROOT / "tinymoe").iterdir()}
    assert set(table(AROUND)) >= there - {"__pycache__/", "__init__.py"} and table(CORE)
    pairs = zip(numbers(README).items(), numbers(corrected(README)).values())
    assert [(what, true) for (what, said), true in pairs if abs(said - true) > 3] == []


def test_the_core_is_short():
    assert sum(map(lines_of, table(CORE))) <= 2600


def test_its_results_are_the_first_page_of_the_findings():
    """`python tests/test_readme.py` corrects them."""
    assert all(part in README for part in decided())


def test_its_numbers_stand_in_the_published_findings():
    """Means with their half widths, and intervals, whatever the sign of the difference."""
    def intervals(text):
        return set(map(frozenset, re.findall(r"\[[+-]?(\d[\d.]*), [+-]?(\d[\d.]*)\]", text)))

    findings = "".join(path.read_text(encoding="utf-8") for path in PUBLISHED.rglob("FINDINGS.md"))
    words = re.sub(r"```.*?```", "", README, flags=re.S)
    assert [number for number in re.findall(r"\d[\d.]* ± [\d.]*\d", words) if number not in findings] == []
    assert intervals(words) and intervals(words) - intervals(findings) == set()


DONE = {path.parent: {"full": STUDY}.get(path.parent.name) or EXPERIMENTS[path.parent.name]
        for path in sorted(PUBLISHED.rglob("runs.jsonl"))}


@pytest.mark.slow
def test_the_published_findings_follow_from_the_published_rows(tmp_path):
    shutil.copytree(PUBLISHED, tmp_path / "again")
    if not DONE:
        return
    found, absent = gathered.published_results(tmp_path / "again", STUDY, EXPERIMENTS.values())
    assert {results.folder.relative_to(tmp_path / "again") for results in found} == {
        folder.relative_to(PUBLISHED) for folder in DONE}
    for results in found:
        written = report.write_findings(results)
        assert written.read_text() == (PUBLISHED / written.relative_to(tmp_path / "again")).read_text(), written
    assert gathered.gather(tmp_path / "again", found, absent).read_text() == (PUBLISHED / "FINDINGS.md").read_text()


def require_commands(text):
    """Every command that a text names must exist, with its options."""
    named = re.findall(r"python cli\.py (\w+)([^`\n|]*)", text)
    assert named
    for command, rest in named:
        known = {name for option in cli.main.commands[command].params for name in option.opts}
        assert set(re.findall(r"(?<!\S)--[\w-]+", rest)) <= known, (command, rest)


def test_every_command_that_it_names_exists_with_its_options():
    require_commands(README)


def test_the_recipes_are_short_and_name_files_and_commands_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    recipes = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    for name in ("A router", "A loss", "A metric", "An experiment", "A kernel"):
        assert "Place: " in recipes[name] and "Test: " in recipes[name] and recipes[name].strip().count("\n") < 15
    for name in re.findall(r"`((?:tests|tinymoe|\.ci)/[\w./]*)`", text):
        assert (ROOT / name).exists(), name
    require_commands(text)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(corrected(README), encoding="utf-8")
