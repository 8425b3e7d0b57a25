"""The README is true: its example, its router, its file map and its commands are run or counted here."""

import contextlib
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

import cli
import tinymoe as tm
from tinymoe.experiments import EXPERIMENTS, STUDY
from tinymoe.moe import routers
from tinymoe.study import report

ROOT = Path(__file__).parent.parent
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


def test_the_file_map_names_every_file_with_its_length():
    said = {name: int(lines) for name, lines in re.findall(r"^\| `tinymoe/([\w./]+)` \| (\d+) \|", README, re.M)}
    counted = {str(p.relative_to(ROOT / "tinymoe")): p.read_text().count("\n")
               for p in (ROOT / "tinymoe").rglob("*.py")}
    folders = {}
    for name, lines in counted.items():
        place = name.split("/")[0] + "/" if "/" in name else name
        folders[place] = folders.get(place, 0) + lines
    assert said.keys() == folders.keys()
    assert all(abs(said[name] - lines) <= 0.1 * lines + 3 for name, lines in folders.items()), folders


def test_its_numbers_stand_in_the_published_findings():
    findings = "".join(path.read_text() for path in (ROOT / "results/published").rglob("FINDINGS.md"))
    assert all(number in findings for number in re.findall(r"[\d.]+ ± [\d.]+", README))


def test_the_published_findings_follow_from_the_published_rows(tmp_path):
    shutil.copytree(ROOT / "results/published/full", tmp_path / "full")
    again = report.write_findings(STUDY, tmp_path / "full").read_text()
    assert again == (ROOT / "results/published/full/FINDINGS.md").read_text()


def test_the_gathered_findings_and_those_of_each_experiment_follow_from_their_rows(tmp_path):
    published = ROOT / "results/published"
    shutil.copytree(published, tmp_path / "again")
    done = [name for name in EXPERIMENTS if (published / "experiments" / name).exists()]
    assert done
    for name in done:
        again = report.write_findings(EXPERIMENTS[name], tmp_path / "again/experiments" / name).read_text()
        assert again == (published / "experiments" / name / "FINDINGS.md").read_text(), name
    assert report.gather(tmp_path / "again", STUDY,
                         EXPERIMENTS.values()).read_text() == (published / "FINDINGS.md").read_text()


def test_its_verdicts_on_the_claims_are_those_of_the_findings():
    findings = (ROOT / "results/published/FINDINGS.md").read_text()
    said = dict(re.findall(r"^\| (\d+)\. .* \| \*\*([\w ]+)\*\* \|$", README, re.M))
    assert said and said == dict(re.findall(r"^\| (\d+) \| .* \| \*\*([\w ]+)\*\* \| \[[\w-]+\]\(.*\) \|$", findings,
                                            re.M))


def test_every_command_it_names_exists():
    named = set(re.findall(r"`python cli\.py (\w+)", README))
    assert named and named <= set(cli.main.commands)
