"""The laboratory: every experiment runs from end to end at a toy scale, and what it says follows from its rows."""

import dataclasses
import re

import numpy as np
import pytest

from tinymoe import experiments as lab
from tinymoe.data import load_corpus
from tinymoe.experiments import EXPERIMENTS, measures, writeup
from tinymoe.train import train

TOY = lab.Scale({"n_layers": 2, "d_model": 8, "n_heads": 2, "d_ff": 8, "moe_layers": (1,), "seq_len": 16}, 2, 2)


@pytest.fixture(scope="module")
def corpora():
    return {text: load_corpus(text, seq_len=16) for text in (None, "synthetic")}


def toy_runs(experiment, n_seeds=2):
    training = {"batch_size": 2, "n_evaluations": 1, "eval_windows": 2, "final_windows": 2}
    for run in experiment.runs(TOY, n_seeds):
        yield dataclasses.replace(run, training=dataclasses.replace(run.training, **training))


def finish(experiment, corpora, out, n_seeds=2):
    runs = sorted(toy_runs(experiment, n_seeds), key=lambda run: run.start is not None)
    for run in runs:
        train(run, corpora[experiment.text], out / "runs" / run.run_id)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_and_writes_itself_up(name, corpora, tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "WINDOWS", 2)
    experiment = EXPERIMENTS[name]
    finish(experiment, corpora, tmp_path)
    for path in writeup.draw(experiment, tmp_path):
        assert path.stat().st_size > 1000
    text = writeup.write_findings(experiment, tmp_path).read_text()
    assert "No finding" not in text and "Not finished" not in text and "not tested |" not in text
    assert all(f"| {setting.id} |" in text for setting in experiment.settings)
    assert len(re.findall(r"^- ", text, re.M)) == len(experiment.planned)
    assert writeup.write_findings(experiment, tmp_path).read_text() == text


def test_what_is_planned_names_settings_and_nothing_twice():
    for experiment in EXPERIMENTS.values():
        ids = [setting.id for setting in experiment.settings]
        assert len(set(ids)) == len(ids) and len(set(experiment.planned)) == len(experiment.planned)
        assert {name for _, *pair in experiment.planned for name in pair} <= set(ids), experiment.name
        assert {setting.start for setting in experiment.settings} <= {None, *ids}
    assert sorted(c.number for e in EXPERIMENTS.values() for c in e.claims) == list(range(1, 11))
