"""The laboratory: every experiment runs from end to end at a toy scale, and what it says follows from its rows."""

import dataclasses
import itertools
import json
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import cli
import naive_routing
from test_metrics import routing
from tinymoe import ModelConfig, Tensor, Transformer, files
from tinymoe import experiments as lab
from tinymoe.experiments import EXPERIMENTS
from tinymoe.moe import metrics
from tinymoe.moe.routers import ROUTERS
from tinymoe.moe.routing import from_mask
from tinymoe.study import figures, gathered, maps, measures, report, statistics
from tinymoe.study.experiment import SWEEP_SEEDS
from tinymoe.study.probes import Influence, rerouted
from tinymoe.study.quantities import LOSS, value
from tinymoe.study.rows import RunRecord
from tinymoe.study.statistics import Contrast
from tinymoe.training.data import load_corpus, split_spans
from tinymoe.training.evaluation import Validation, losses_and_routings
from tinymoe.training.trainer import Trainer, train

TOY = lab.Scale({"n_layers": 2, "d_model": 8, "n_heads": 2, "d_ff": 8, "moe_layers": (0, 1), "seq_len": 16}, 2, 2)


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


QUICKEST = "fine-grained dense".split()


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICKEST else pytest.mark.slow)
                                  for name in EXPERIMENTS])
def test_every_experiment_runs_and_writes_itself_up(name, corpora, tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "WINDOWS", 2)
    experiment = EXPERIMENTS[name]
    finish(experiment, corpora, tmp_path)
    for path in figures.draw_all(lab.Results(experiment, tmp_path)):
        assert path.stat().st_size > 1000
    text = report.write_findings(lab.Results(experiment, tmp_path)).read_text()
    assert "No finding" not in text and "Not finished" not in text and "not tested |" not in text
    assert all(f"| {setting.id} |" in text for setting in experiment.settings)
    for heading, compared in (("Primary", experiment.primary), ("Exploratory", experiment.exploratory)):
        part = text.split(f"## {heading} comparisons")[1].split("##")[0] if compared else ""
        rows = [line.split(" | ") for line in re.findall(r"^\| .*$", part, re.M)]
        n = 0 if not rows else len(rows[0]) - 1 if heading == "Primary" else len(rows) - 2  # a column, or a row
        assert n == len(compared)
        expected = {"| mean", "| verdict", "| smallest effect"}
        assert not rows or heading == "Exploratory" or expected <= {r[0] for r in rows}
    assert report.write_findings(lab.Results(experiment, tmp_path)).read_text() == text


def test_nothing_is_planned_twice_and_every_claim_has_a_place():
    for experiment in EXPERIMENTS.values():
        compared = [*(one.contrast for one in experiment.primary), *experiment.exploratory]
        assert len({(one.metric, *sorted(one.settings)) for one in compared}) == len(compared)
    # the claims 1 and 7 hold by construction
    assert {c.number for e in EXPERIMENTS.values() for c in e.claims if c.number} == {2, 3, 4, 5, 6, 8, 9, 10}


@pytest.mark.parametrize("changed, message", [
    ({"exploratory": (Contrast("load_cv", "learned", minus="topp-2"),)}, "no setting is called topp-2"),
    ({"settings": EXPERIMENTS["frozen"].settings * 2}, "two settings have one id"),
    ({"name": "../x"}, "'../x' names a folder"), ({"name": ""}, "'' names a folder"),
    ({"figures": {"../f": None}}, "'../f' names a folder or a figure"), ({"rates": (1e-3, 1e-3)}, "are one"),
    ({"training": {"steps": 3}}, "`training` has no steps"),
    ({"settings": (lab.Setting("a/b", ""),), "exploratory": (), "primary": (), "claims": (), "crossings": ()},
     "'a/b' names a folder"),
    ({"settings": (), "exploratory": (), "primary": (), "claims": (), "crossings": ()}, "needs a setting and a seed"),
    ({"seeds": 0}, "needs a setting and a seed"),
    ({"metrics": ("mega_flops",)}, r"no quantity mega_flops: did you mean megaflops\?"),
    ({"exploratory": (Contrast("causal_loss:poetry", "learned"),)}, "no quantity causal_loss:poetry"),
    ({"crossings": (("xyz", "learned", "frozen"),)}, "no quantity xyz: no row holds it"),
    ({"figures": {"one": figures.at_the_end("xyz")}}, "no quantity xyz"),
    ({"figures": {"one": figures.one_against_other("xyz", LOSS)}}, "no quantity xyz"),
    ({"figures": {"one": figures.over_steps("topp-2", LOSS)}}, "no setting is called topp-2"),
    ({"figures": {"one": figures.over_steps("learned", LOSS, names=["frosen"])}}, "no setting is called frosen"),
    ({"figures": {"one": figures.at_the_end(LOSS, reference="topp-2")}}, "no setting is called topp-2"),
    ({"figures": {"one": figures.lines_by({"line": ["frosen"]}, len, "x", LOSS)}}, "no setting is called frosen"),
    ({"figures": {"one": maps.diagram({"frosen": (8, 1, 2)}, "x", "y")}}, "no setting is called frosen"),
    ({"figures": {"one": maps.routes("frosen")}}, "no setting is called frosen"),
    ({"exploratory": (Contrast(LOSS, "learned", minus="learned"),)}, "compares a setting with itself"),
    ({"model": {"topk": 1}}, "all settings: no field is called topk: `options` lists them"),
    ({"training": {"rate": 1}}, "no field is called rate"),
    ({"settings": (lab.Setting("learned", "", model={"topk": 1}), *EXPERIMENTS["frozen"].settings[1:])},
     "learned: no field is called topk"),
    ({"settings": (lab.Setting(1, ""), *EXPERIMENTS["frozen"].settings)}, "1 names a folder or a figure"),
    ({"settings": (lab.Setting("learned", None), *EXPERIMENTS["frozen"].settings[1:])}, "None stands where a text"),
    ({"figures": {1: None}}, "1 names a folder or a figure"), ({"scales": {}}, "`scales` has no")])
def test_a_name_that_is_no_setting_or_quantity_is_refused_before_anything_is_trained(changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(EXPERIMENTS["frozen"], **changed)


@pytest.mark.parametrize("make, message", [
    (lambda: Contrast(LOSS, "a", minus="b", over="c"), "give minus or over"),
    (lambda: Contrast(LOSS, "a", times=2), "times is a factor of minus"),
    (lambda: lab.Effect(LOSS, "a", "=<", 0), "unknown relation '=<': choose one of >, >=, <, <="),
    (lambda: primary(Contrast(LOSS, "a", over="b")), "use minus in place of over"),
    (lambda: primary(Contrast(LOSS, "a", minus="b"), margin=0), "margin 0 must be a number above 0"),
    (lambda: primary(Contrast(LOSS, "a", minus="b"), margin=None), "margin None must be a number above 0"),
    (lambda: primary(Contrast(LOSS, "a", minus="b"), margin=-0.1), "margin -0.1 must be a number above 0")])
def test_a_comparison_that_says_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def primary(contrast, **margin):
    return lab.Primary(question="?", contrast=contrast, lower="", higher="", same="", **margin)


def test_two_settings_that_train_the_same_are_refused_before_anything_is_trained():
    """0.01 is the default balance coefficient, so the second changes nothing; a sweep may choose what another has."""
    settings = (lab.Setting("a", "a"), lab.Setting("b", "b", model={"aux_coef": 0.01}))
    same = lab.Experiment(name="x", question="?", settings=settings, metrics=(LOSS,), figures={})
    with pytest.raises(ValueError, match="x: a and b are the same model, trained in the same way"):
        same.runs("quick", 1)
    assert len(same.runs("quick", 1, rates={"a": 1e-3, "b": 2e-3})) == 2
    for experiment in EXPERIMENTS.values():
        assert all(experiment.runs(scale, 1) for scale in ("quick", "default", "full"))


def test_a_measure_may_not_return_what_every_run_has(tmp_path):
    """Tables would show one number or the other."""
    experiment = lab.Experiment(name="pair", question="?", settings=(lab.Setting("a", "a"),), metrics=(LOSS,),
                                figures={}, measure=lambda trainer: {"effective_experts": 77.0},
                                training={"batch_size": 2, "n_evaluations": 1, "eval_windows": 1, "final_windows": 1})
    (plan,) = experiment.runs(TOY, 1)
    train(plan, load_corpus(None, 16), tmp_path / "runs" / plan.run_id)
    with pytest.raises(ValueError, match="the `measure` of pair returns effective_experts, a number that every run"):
        lab.Results(experiment, tmp_path)


def test_a_start_that_has_a_start_is_refused():
    """run_study trains first the runs without a start, and then those with one."""
    settings = (lab.Setting("a", "a"), lab.Setting("b", "b", start="a"), lab.Setting("c", "c", start="b"))
    with pytest.raises(ValueError, match="c starts from b, which has a start of its own"):
        lab.Experiment(name="x", question="?", settings=settings, metrics=(LOSS,), figures={})


def test_runs_that_differ_in_more_than_the_seed_are_in_no_mean(corpora, tmp_path):
    experiment = EXPERIMENTS["frozen"]
    for run in toy_runs(experiment):
        if run.config_id == "learned":
            training = dataclasses.replace(run.training, steps=2 + run.seed)
            train(dataclasses.replace(run, training=training), corpora[None], tmp_path / "runs" / run.run_id)
    with pytest.raises(ValueError, match="learned-seed0 and learned-seed1 differ in their training"):
        lab.Results(experiment, tmp_path)


def test_a_metric_that_nobody_measured_is_named(corpora, tmp_path):
    run = next(iter(toy_runs(EXPERIMENTS["frozen"])))
    train(run, corpora[None], tmp_path / "runs" / run.run_id)
    with pytest.raises(ValueError, match="no quantity entropy_of_nothing"):
        lab.Results(EXPERIMENTS["frozen"], tmp_path).mean("entropy_of_nothing", run.config_id)


def test_every_figure_has_a_caption_and_no_two_settings_one_look():
    """More settings than colours: those that are not in a primary comparison are grey, and their names are drawn."""
    run = types.SimpleNamespace(log=[{"validation_tokens": 1}], final={"validation_tokens": 2})
    some = types.SimpleNamespace(groups={}, with_experts=[], runs=[run], several=True)
    for experiment in (lab.STUDY, *EXPERIMENTS.values()):
        assert all(draw.caption(some).endswith(".") for draw in experiment.figures.values())
        styles = [figures.style_of(experiment, s.id) for s in experiment.settings]
        looks = [tuple(style.values()) for style in styles if style["color"] != figures.GREY]
        assert len({colour for colour, _ in looks}) == len(looks) >= min(len(styles), 2)


# -- verdicts --

class Fake(lab.Results):
    """Results whose numbers are given: {setting: numbers by seed}."""

    def __init__(self, **numbers):
        self.given = {name.replace("_", "-"): np.array(values, float) for name, values in numbers.items()}

    def numbers(self, metric, setting):
        return dict(enumerate(self.given[setting]))


def verdict(results, *effects):
    return results.outcome(lab.Claim(1, "", "", effects))[0]


@pytest.mark.parametrize("numbers, relation, said", [
    ((1, 1.1, 0.9), ">", "held"), ((-1, -1.1, -0.9), ">", "did not hold"), ((1, -1, 0.2), ">", "undecided"),
    ((1, 1.1, 0.9), "<", "did not hold"), ((-1, -1.1, -0.9), "<", "held"), ((1, -1, 0.2), "<", "undecided"),
    ((0, 0, 0), ">=", "held"), ((0, 0, 0), ">", "did not hold"), ((0, 0, 0), "<=", "held"), ((1e-9,) * 3, ">", "held"),
    ((1e-9,) * 3, "<=", "did not hold"), ((1,), ">", "undecided")])  # one seed decides nothing
def test_a_claim_holds_where_its_whole_interval_is_beyond_the_bound(numbers, relation, said):
    assert verdict(Fake(a=numbers), lab.Effect("loss", "a", relation, 0)) == said
    assert verdict(Fake(a=np.add(numbers, 3)), lab.Effect("loss", "a", relation, 3)) == said
    assert verdict(Fake(a=np.add(numbers, 7), b=(7,) * len(numbers)),
                   lab.Effect("loss", "a", relation, 0, minus="b")) == said
    assert verdict(Fake(a=np.add(numbers, 3), b=(0.5,) * len(numbers)),
                   lab.Effect("loss", "a", relation, 6, over="b")) == said


def test_differences_and_ratios_are_paired_by_seed():
    wide = Fake(a=(1.1, 2.1, 3.1), b=(1, 2, 3), c=(2.2, 4.2, 6.2))
    assert verdict(wide, lab.Effect("loss", "a", ">", 0, minus="b")) == "held"
    assert verdict(wide, lab.Effect("loss", "c", "<=", 2, over="a")) == "held"


@pytest.mark.parametrize("numbers, said", [((1e-3, 1, 1e-3), "held"), ((0, 1, 1), "undecided"),
                                           ((0, 0, 0), "did not hold"), ((2,), "held")])
def test_a_number_that_is_never_negative_must_be_above_0_in_every_run(numbers, said):
    assert verdict(Fake(a=numbers), lab.Effect("loss", "a", ">", 0, every_run=True)) == said


@pytest.mark.parametrize("first, second, said", [
    ((1, 1, 1), (1, 1, 1), "held"), ((1, 1, 1), (1, -1, 0), "undecided"), ((1, -1, 0), (-1, -1, -1), "did not hold")])
def test_all_effects_of_a_claim_must_hold(first, second, said):
    assert verdict(Fake(a=first, b=second), *(lab.Effect("loss", name, ">", 0) for name in "ab")) == said


@pytest.mark.parametrize("absent", ["shuffled", "learned"])
def test_a_setting_without_a_run_is_named_and_decides_nothing(corpora, tmp_path, absent):
    experiment = EXPERIMENTS["frozen"]
    for run in toy_runs(experiment, 1):
        if run.config_id != absent:
            train(run, corpora[None], tmp_path / "runs" / run.run_id)
    assert figures.draw_all(lab.Results(experiment, tmp_path)) == []
    text = report.write_findings(lab.Results(experiment, tmp_path)).read_text()
    assert "No finding" in text and f"Not finished, so missing from some numbers: {absent}." in text
    assert re.search(r"^\| 4 .*not tested", text, re.M)


def test_settings_without_a_common_seed_decide_nothing(corpora, tmp_path):
    experiment = EXPERIMENTS["fine-grained"]
    for run in toy_runs(experiment):
        if (run.config_id == "2-of-8") == (run.seed == 0):
            train(run, corpora[None], tmp_path / "runs" / run.run_id)
    assert figures.draw_all(lab.Results(experiment, tmp_path)) == []
    assert "No finding" in report.write_findings(lab.Results(experiment, tmp_path)).read_text()


def test_numbers_are_paired_by_seed_and_failed_runs_are_told(corpora, tmp_path):
    """2-of-8 has seeds 0, 1 and 2, the others 0 and 2 alone: seed 1 is in no pair."""
    experiment = EXPERIMENTS["fine-grained"]
    for run in toy_runs(experiment, 3):
        if run.seed != 1 or run.config_id == "2-of-8":
            train(run, corpora[None], tmp_path / "runs" / run.run_id)
    results = lab.Results(experiment, tmp_path)
    assert len(results.groups["2-of-8"]) == 3
    losses = {run.run_id: value(run, LOSS) for run in results.runs}
    assert Contrast(LOSS, "4-of-16", minus="2-of-8").of(results.numbers).tolist() == [
        losses[f"4-of-16-seed{s}"] - losses[f"2-of-8-seed{s}"] for s in (0, 2)]
    paired = [losses[f"4-of-16-seed{s}"] - losses[f"2-of-8-seed{s}"] for s in (0, 2)]
    assert results.exploratory[0].mean == pytest.approx(np.mean(paired))
    failed = tmp_path / "runs/8-of-32-seed1"
    shutil.copytree(tmp_path / "runs/8-of-32-seed0", failed)
    (failed / "summary.json").rename(failed / "failure.json")
    assert "`8-of-32-seed1` failed" in report.write_findings(lab.Results(experiment, tmp_path)).read_text()


# -- what is measured --

@pytest.fixture(scope="module")
def trainer(corpora):
    run = next(run for run in toy_runs(EXPERIMENTS["specialise"], 1) if run.config_id == "top-1")
    trainer = Trainer(Transformer(run.model, run.seed), run, corpora[None])
    for _ in range(3):
        trainer.advance()
    return trainer


def test_counterfactual_routes_by_hand():
    gates = np.array([[.6, .4, 0], [0, .3, .7]])
    routing = from_mask(gates > 0, Tensor(gates), Tensor(gates), Tensor(gates))
    for change, expected in ((measures.drop(1), [[.6, 0, 0], [0, 0, .7]]),
                             (measures.swap(1), [[.6, 0, .4], [0, .7, .3]]),
                             (measures.swap(2), [[0, .4, .6], [.7, .3, 0]]),
                             (measures.force(2), [[0, 0, 1], [0, 0, 1]])):
        np.testing.assert_allclose(change(routing, None).to_dense().data, expected)
    assert measures.drop(1)(routing, None).load.tolist() == [1, 0, 1]


def test_swapping_an_expert_for_its_copy_costs_nothing_and_dropping_it_does(trainer):
    valid = trainer.validation(2)
    for p in (p for layer in trainer.model.moe_parts() for p in layer.experts.parameters().values()):
        p.data = np.repeat(p.data[:1] + 0.5, len(p.data), axis=0)
    nats = losses_and_routings(trainer.model, valid, causal=False)[0]
    found = measures.counterfactuals(trainer.model, valid, nats)
    assert abs(found["swap_cost"]) < 1e-6 < abs(found["drop_cost"])
    assert np.shape(found["drop_table"]) == (8, 4)
    divergence = measures.function_divergence(trainer.model.moe_parts()[0], trainer.model, valid)
    assert divergence == pytest.approx(0, abs=1e-6)


def test_one_model_of_expert_choice_under_each_rule(trainer):
    """By batch it is the val loss of the final windows, by the causal rule their causal loss; the load CV is that of
    all windows together, as in a row. The router keeps its rule."""
    assert set(measures.by_rule(trainer).values()) == {None}  # another router
    plan = dataclasses.replace(
        trainer.plan, training=dataclasses.replace(trainer.plan.training, final_windows=3),
        model=ModelConfig(**trainer.plan.model.to_dict() | {
            "router": "expert_choice", "top_k": 1, "router_options": {}}))
    other = type(trainer)(Transformer(plan.model, seed=1), plan, trainer.corpus)
    for _ in range(3):
        other.advance()
    found, row = measures.by_rule(other), other.evaluate(other.validation(3))[0]
    assert found["loss_by_batch"] == row["val_cross_entropy"] and found["load_cv_by_batch"] < .01
    assert found["loss_by_threshold"] == row["causal_cross_entropy"] != found["loss_by_prefix"]
    assert {layer.router.rule for layer in other.model.moe_parts()} == {"batch"}
    for layer in other.model.moe_parts():
        layer.router.rule = "threshold"
    layers = other.evaluate(other.validation(3))[0]["layers"]
    assert found["load_cv_by_threshold"] == pytest.approx(np.mean([layer["load_cv"] for layer in layers]))


def test_function_divergence_of_opposite_experts():
    """Outputs y and -y: 1 - cosine is 2."""
    model = Transformer(ModelConfig(n_layers=1, moe_layers=(0,), n_experts=2, top_k=1, d_model=8, d_ff=8, n_heads=2,
                                    seq_len=8))
    bank = model.moe_parts()[0].experts
    for p, sign in ((bank.w1, 1), (bank.b1, 1), (bank.w2, -1), (bank.b2, -1)):
        p.data[1] = sign * p.data[0]
    ids = np.arange(16).reshape(2, 8)
    valid = Validation(ids, ids, np.array([0, 1]), ("a", "b"), 2)
    assert measures.function_divergence(model.moe_parts()[0], model, valid) == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("fields", [{"moe_layers": ()}, {"n_experts": 1, "top_k": 1}])
def test_without_several_experts_there_is_no_divergence(corpora, fields):
    run = next(run for run in toy_runs(EXPERIMENTS["frozen"], 1))
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, aux_coef=0.0, **fields))
    assert measures.divergence(Trainer(Transformer(run.model), run, corpora[None])) == {"function_divergence": None}


def test_byte_classes():
    assert [measures.CLASSES[i] for i in measures.byte_class(np.frombuffer(b"aZ7 \n,\x00\xff", np.uint8))] == [
        "lower case", "upper case", "digit", "space", "space", "punctuation", "other", "other"]


def bigrams(folder, one, two):
    """What the bigram classifier finds in a text of two domains, in windows of 16 pairs."""
    (folder / "one").write_bytes(one)
    (folder / "two").write_bytes(two)
    corpus = load_corpus(folder, seq_len=17)
    return measures.bigram_classifier(corpus, Validation(*corpus.validation(8, 17), corpus.names, 4))


def test_the_bigram_classifier_knows_texts_that_share_no_pair(tmp_path):
    found = bigrams(tmp_path, b"ab" * 2000, b"cd" * 2000)
    assert found["bigram_accuracy"] == 1 and found["bigram_information_excess"] > 0.6  # ln 2 less what chance gives


def test_the_bigram_classifier_compares_shares_of_texts_and_not_counts(tmp_path):
    """ab and ba are half of the pairs of the long text and all of the short one, which therefore gets them."""
    assert bigrams(tmp_path, b"abac" * 100_000, b"ab" * 50_000)["bigram_accuracy"] == 0.75


def test_the_bigram_classifier_counts_no_validation_text(tmp_path):
    """Only the validation text of two has x: no window of it is known."""
    text = bytearray(b"cd" * 2000)
    for first, end in split_spans(len(text), 17)[1]:
        text[first:end] = b"x" * (end - first)
    assert bigrams(tmp_path, b"ab" * 2000, text)["bigram_accuracy"] == 0.5


def test_the_classes_of_bytes_make_up_the_load_of_the_last_layer(trainer, monkeypatch):
    monkeypatch.setattr(measures, "WINDOWS", 2)
    table = np.array(measures.specialisation(trainer)["class_table"])
    last = losses_and_routings(trainer.model, trainer.validation(2), causal=False)[1][-1]
    assert len(table) == len(measures.CLASSES) and (table.sum(axis=0) == sum(r.load for r in last)).all()


def test_information_and_divergence_are_means_over_the_layers(trainer, monkeypatch):
    monkeypatch.setattr(measures, "WINDOWS", 2)
    of_layer = itertools.cycle((1.0, 3.0))
    monkeypatch.setattr(measures, "information", lambda *_: {"class_information_excess": next(of_layer)})
    monkeypatch.setattr(measures, "function_divergence", lambda *_: next(of_layer))
    monkeypatch.setattr(measures, "counterfactuals", lambda *_: {})
    found = measures.specialisation(trainer)
    assert found["class_information_excess"] == found["function_divergence"] == 2


def test_what_the_expert_adds_to_the_byte():
    """Two letters, two domains, two experts. Byte xor domain: neither alone tells of the domain, both together ln 2."""
    rng = np.random.default_rng(0)
    domain, ids = np.arange(64) % 2, rng.integers(0, 2, (64, 32))
    for expert, expected in ((ids ^ domain[:, None], np.log(2)), (ids, 0),
                             (np.repeat(domain, 32).reshape(64, 32), np.log(2)),
                             (rng.integers(0, 2, (64, 32)), 0)):
        gates = np.eye(2)[expert.ravel()]
        routing = from_mask(gates > 0, Tensor(gates), Tensor(gates), Tensor(gates))
        found = metrics.information_given(routing, ids, domain, np.random.default_rng(0))
        assert found["domain_given_byte"] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("known, other", [("class", "position"), ("position", "class")])
def test_information_of_an_expert_a_byte(known, other):
    """Experts 0 and 1 by the class of the byte, or by the half of the window: ln 2; the other label says nothing."""
    is_large = np.random.default_rng(0).random((64, 16)) < .5
    ids = np.where(is_large, ord("B"), ord("a"))
    expert = is_large if known == "class" else np.tile(np.arange(16) >= 8, (64, 1))
    valid = Validation(ids, ids, np.arange(64) % 2, ("x", "y"), 8)
    found = measures.information(routing(np.eye(2)[expert.ravel().astype(int)]), valid)
    assert found[f"{known}_information_excess"] == pytest.approx(np.log(2), abs=.01)
    assert abs(found[f"{other}_information_excess"]) < .01


def test_the_information_of_labels_by_chance_is_none():
    """4 experts, 8 labels, 200 bytes: the null that is subtracted is 3 * 7 / 400 = 0.05."""
    rng = np.random.default_rng(0)
    experts, labels = rng.integers(4, size=200), rng.integers(8, size=200)
    assert abs(measures._above_chance(np.eye(4, dtype=int)[experts], labels, rng)) < .03


@pytest.mark.parametrize("draws", [False, True])
def test_noise_share_by_hand(draws):
    """Gradients (1, 1) and (1, -1) in turn, 16 batches: variance 16/15, squared mean 1 - 1/15. They are those of the
    policy loss for a router that draws, else of the cross-entropy."""
    w, signs, of = Tensor(np.zeros(2), True), itertools.cycle((1, -1)), types.SimpleNamespace

    def backward():
        w.grad = np.array([1., next(signs)])

    loss = of(backward=backward)
    terms = of(policy=loss, cross_entropy=None) if draws else of(policy=None, cross_entropy=loss)
    model = of(moe_parts=lambda: [of(router=of(weight=w))], loss=lambda *a, **k: terms, config=of(seq_len=4))
    fake = of(model=model, corpus=of(labelled_batch=lambda *a: (0, 0, 0)), optimizer=of(zero_grad=lambda: None),
              plan=of(seed=0, training=of(batch_size=1)))
    assert list(measures.gradient_noise(fake).values()) == pytest.approx([16 / 15, 14 / 15, 16 / 30])


def test_influence_is_nothing_without_drops_and_something_with_them(corpora, monkeypatch):
    for name, changed in (("dropless", False), ("capacity-order", True), ("expert-choice", True)):
        run = next(run for run in toy_runs(EXPERIMENTS["batch"], 1) if run.config_id == name)
        found = measures.influence(Trainer(Transformer(run.model, run.seed), run, corpora[None]))
        assert (found["mates_rerouted"] > 0, found["later_logits"] > 1e-6) == (changed, changed)


def test_influence_is_a_mean_over_windows_by_hand(corpora, monkeypatch):
    """Two windows. Mates change the logits by 0 and 2, later bytes by 10 and 30; each reroutes a tenth of that."""
    run = next(toy_runs(EXPERIMENTS["batch"], 1))
    logits = iter((0.0, 10.0, 2.0, 30.0))
    monkeypatch.setattr(measures, "compared", lambda *_: (lambda x: Influence(tokens=x / 10, logits=x))(next(logits)))
    found = measures.influence(Trainer(Transformer(run.model), run, corpora[None]))
    assert found == {"mates_logits": 1, "mates_rerouted": 0.1, "later_logits": 20, "later_rerouted": 2}


def test_later_bytes_change_a_window_whose_router_sees_all_of_it_and_other_windows_do_not(corpora):
    run = next(toy_runs(EXPERIMENTS["batch"], 1))
    model = dataclasses.replace(run.model, router="sequence", router_options={"sequence_pool": "mean"})
    trainer = Trainer(Transformer(model, seed=2), dataclasses.replace(run, model=model), corpora[None])
    for p in trainer.parameters.values():
        p.data = p.data * np.float32(30 if p.ndim > 1 else 1)  # so that routes change
    found = measures.influence(trainer)
    assert found["mates_rerouted"] == 0 < found["later_rerouted"]
    assert found["mates_logits"] < 1e-3 < found["later_logits"]


def test_padding_and_excess_are_what_they_say():
    """Capacity 2 of 4 experts for 4 tokens of top-1 (factor 2): 8 places, of which 3 are taken in each batch of 4."""
    model = {"n_experts": 4, "top_k": 1, "seq_len": 2, "capacity_factor": 2.0}
    final = {"layers": [{"load": [6, 0, 0, 0]}], "validation_tokens": 8, "causal_cross_entropy": 1.5}
    run = RunRecord("a",
                    {"model": model, "training": {"batch_size": 2},
                     "corpus": {"x": {"entropy_rate": 1.0}, "y": {"entropy_rate": 1.2}}},
                   [], {"final": final})
    assert value(run, "padding") == pytest.approx(1 - 6 / 16) and value(run, "excess") == pytest.approx(.4)


# -- the commands --

def test_the_list_names_every_experiment():
    listed = CliRunner().invoke(cli.main, ["experiment"])
    assert listed.exit_code == 0 and all(name in listed.output for name in EXPERIMENTS)


def test_an_unknown_experiment_is_refused_in_one_line():
    refused = CliRunner().invoke(cli.main, ["experiment", "nonsense"])
    assert refused.exit_code == 2 and "no experiment nonsense: choose one of expert-choice" in refused.output


def test_an_experiment_about_a_text_takes_no_other():
    refused = CliRunner().invoke(cli.main, ["experiment", "scope", "--text", "mine.txt"])
    assert refused.exit_code == 2 and "scope is about its own text, synthetic" in refused.output


def test_the_command_runs_draws_and_says(corpora, tmp_path, monkeypatch):
    monkeypatch.setitem(lab.SCALES, "quick", dataclasses.replace(TOY, seeds=1))
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(1000))))
    typed = ["experiment", "fine-grained", "--quick", "--jobs", "1", "--text", str(tmp_path / "text.txt"), "--out",
             str(tmp_path / "out")]
    done = CliRunner().invoke(cli.main, typed)
    assert done.exit_code == 0, done.output
    assert "Do many small experts beat few large ones?" in done.output
    assert "few large ones?" in done.output and "Not tested: there are" in done.output
    assert (tmp_path / "out/figures/at_the_end.png").exists()
    again = CliRunner().invoke(cli.main, [*typed, "--plot-only"])
    assert again.exit_code == 0 and again.output.splitlines()[-1] == done.output.splitlines()[-1]


QUESTION = Path(__file__).parent.parent / "docs/my_question.py"


def test_a_question_of_ones_own_is_a_file(tmp_path, monkeypatch):
    monkeypatch.setitem(lab.SCALES, "quick", TOY)
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(1000))))
    typed = ["--quick", "--jobs", "1", "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.main, ["experiment", str(QUESTION), *typed])
    assert done.exit_code == 0, done.output
    assert "Is the second expert of a byte worth its work?" in done.output
    assert {path.name for path in (tmp_path / "out/runs").iterdir()} == {
        f"top-{k}-seed{seed}" for k in (1, 2) for seed in (0, 1)}
    assert (tmp_path / "out/figures/over_steps.png").exists()
    assert QUESTION.read_text().count("\n") < 18


def test_a_measure_of_ones_own_runs_in_this_process(tmp_path, monkeypatch):
    monkeypatch.setitem(lab.SCALES, "quick", TOY)
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(1000))))
    mine = QUESTION.read_text().replace("metrics=(", 'measure=lambda trainer: {"seven": 7.0}, metrics=("seven", ')
    (tmp_path / "mine.py").write_text(mine)
    done = CliRunner().invoke(cli.main, ["experiment", str(tmp_path / "mine.py"), "--quick", "--jobs", "2", "--text",
                                         str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "| seven |" in (tmp_path / "out/FINDINGS.md").read_text()


@pytest.mark.slow
def test_a_router_may_stand_in_the_file_of_the_question(tmp_path, monkeypatch):
    """Would have caught: workers that did not know it, after the other settings had trained."""
    monkeypatch.setitem(lab.SCALES, "quick", TOY)
    monkeypatch.setitem(ROUTERS, "own", None)
    del ROUTERS["own"]  # and again after the test
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(1000))))
    router = "from tinymoe.moe.routers import ROUTERS\nclass Own(ROUTERS['top_k'], name='own'): pass\n"
    (tmp_path / "mine.py").write_text(router + QUESTION.read_text().replace('"top_k": 1', '"router": "own"'))
    done = CliRunner().invoke(cli.main, ["experiment", str(tmp_path / "mine.py"), "--quick", "--jobs", "2", "--text",
                                         str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "out/runs/top-1-seed0/config.json").read_text())
    assert config["model"]["router"] == "own" and config["imports"][0]["path"] == str(tmp_path / "mine.py")


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_bug_in_a_users_router_fails_its_run_and_no_other(tmp_path, monkeypatch, jobs):
    """The others train, and the document is written."""
    monkeypatch.setitem(lab.SCALES, "quick", TOY)
    monkeypatch.setitem(ROUTERS, "own", None)
    del ROUTERS["own"]  # and again after the test
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(1000))))
    router, file = tmp_path / "own.py", tmp_path / "mine.py"
    router.write_text("from tinymoe.moe.routers import ROUTERS\nclass Own(ROUTERS['top_k'], name='own'):\n"
                      "    def forward(self, x, context): raise KeyError('oops')\n")
    file.write_text(QUESTION.read_text().replace('"top_k": 1', '"router": "own"'))
    command = ["experiment", str(file), "--quick", "--seeds", "1", "--jobs", jobs, "--text", str(tmp_path / "text.txt"),
               "--import", str(router), "--out", str(tmp_path / "out")]
    failed = CliRunner().invoke(cli.main, command)
    assert failed.exit_code == 1 and "top-1-seed0 failed: KeyError: 'oops': correct it and start again" in failed.output
    assert (tmp_path / "out/runs/top-2-seed0/summary.json").exists() and (tmp_path / "out/FINDINGS.md").exists()


@pytest.mark.parametrize("text, message", [
    ("x = 1", "defines 0 experiments"), ("import nonsense_of_mine", "cannot import"), (None, "cannot import"),
    ("second = dataclasses.replace(my_question, name='other')", "defines 2 experiments"),
    ("my_question = dataclasses.replace(my_question, name='dense')", "has an experiment dense already")])
def test_a_file_that_is_no_question_is_refused_in_one_line(tmp_path, text, message):
    if text is not None:
        begin = "" if "my_question" not in text else QUESTION.read_text() + "import dataclasses\n"
        (tmp_path / "mine.py").write_text(begin + text)
    refused = CliRunner().invoke(cli.main, ["experiment", str(tmp_path / "mine.py")])
    assert refused.exit_code == 1 and message in refused.output and refused.output.count("\n") == 1


def test_questions_are_asked_again_of_the_same_settings_on_other_seeds():
    def run(experiment, name, published=None):
        """The run of a setting by the plan, with the learning rate of its published rows where they choose one."""
        first = experiment.first_seed
        (one,) = experiment.runs("full", 1, only=[name])
        assert one.seed == first
        rows = files.read_rows(published / "runs.jsonl") if published else []
        rates = {row["config"]["training"]["learning_rate"] for row in rows if row["config"]["config_id"] == name}
        return one.model, dataclasses.replace(one.training, **({"learning_rate": rates.pop()} if rates else {}))

    published, n = Path(__file__).parent.parent / "results/published/experiments", 0
    later = [experiment for experiment in EXPERIMENTS.values() if experiment.first_seed]
    asked = {one.question: (experiment, one.contrast.settings) for experiment in later for one in experiment.primary}
    for before in EXPERIMENTS.values():
        for one in before.primary:
            if before not in later and one.question in asked:
                again, names = asked[one.question]
                for name, old in zip(names, one.contrast.settings):
                    assert run(again, name) == run(before, old, published / before.name), (name, old)
                    n += 1
    assert n == 2 * len(asked) == 10
    for before in ("frozen", "modern", "unit", "capacity", "balance"):
        (old,) = lab.Results(EXPERIMENTS[before], published / before).primary
        again, _ = asked[EXPERIMENTS[before].primary[0].question]
        assert statistics.seeds_needed(old.sd / old.margin, statistics.LEVEL / len(again.primary)) <= again.seeds
    taken = max(*SWEEP_SEEDS, *(before.seeds for before in EXPERIMENTS.values()))
    assert taken < min(again.first_seed for again in later)


def test_of_a_question_that_was_asked_again_the_later_answer_counts(corpora, tmp_path):
    once = EXPERIMENTS["fine-grained"]
    later = dataclasses.replace(once, name="later", first_seed=7)
    assert later.plan_hash != once.plan_hash
    for experiment in (once, later):
        finish(experiment, corpora, tmp_path / experiment.name)
    found = [lab.Results(experiment, tmp_path / experiment.name) for experiment in (once, later)]
    assert {run.seed for run in found[1].runs} == {7, 8}
    assert [results.experiment.name for results, *_ in gathered.asked(found)] == ["later"]
    assert [results.experiment.name for results, *_ in gathered.asked(found[:1])] == ["fine-grained"]
    assert "planned before the runs: 1;" in (said := gathered.counted(found)) and " 1 of them were asked again" in said
    said = "".join(gathered.questions(found, found))
    assert "experiments/later/" in said and "experiments/fine-grained/" not in said
    first, second = (gathered.summary(results, found) for results in found)
    assert "The answer is in [later]" in first and "Asked again" not in second
    shutil.rmtree(tmp_path / "later/runs")
    finish(later, corpora, tmp_path / "later", 1)  # one seed tells nothing yet: the earlier answer stands
    found[1] = lab.Results(later, tmp_path / "later")
    assert [results.experiment.name for results, *_ in gathered.asked(found)] == ["fine-grained"]


def test_nothing_to_gather_and_nothing_to_draw_are_said(tmp_path):
    for typed in (["findings", str(tmp_path)], ["experiment", "frozen", "--plot-only", "--out", str(tmp_path)]):
        refused = CliRunner().invoke(cli.main, typed)
        assert refused.exit_code == 1 and "no finished run" in refused.output


def test_experiments_are_gathered_before_the_study_has_ended(corpora, tmp_path):
    finish(EXPERIMENTS["fine-grained"], corpora, tmp_path / "experiments/fine-grained")
    done = CliRunner().invoke(cli.main, ["findings", str(tmp_path)])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "FINDINGS.md").read_text()
    assert "## The questions\n\n" in text and "## The three questions" not in text
    assert "so not here: study, expert-choice" in text
    page = CliRunner().invoke(cli.main, ["report", str(tmp_path)])
    assert page.exit_code == 0, page.output


def test_a_document_of_others_is_not_overwritten(tmp_path):
    """Would have caught: the findings of the first version, replaced by those of its rows."""
    (tmp_path / "FINDINGS.md").write_text("# Findings of mine\n")
    refused = CliRunner().invoke(cli.main, ["findings", str(tmp_path)])
    assert refused.exit_code == 1 and "was not made by this program" in refused.output
    assert [path.name for path in tmp_path.iterdir()] == ["FINDINGS.md"]


def test_what_is_gathered_names_what_is_missing(corpora, tmp_path):
    study = [dataclasses.replace(run, config_id=name) for run, name in zip(toy_runs(EXPERIMENTS["frozen"], 1), "AB")]
    for run in study:
        train(run, corpora[None], tmp_path / "full/runs" / run.run_id)
    finish(EXPERIMENTS["fine-grained"], corpora, tmp_path / "experiments/fine-grained")
    found = gathered.published_results(tmp_path, lab.STUDY, EXPERIMENTS.values())
    text = gathered.gather(tmp_path, *found).read_text()
    assert "No runs are finished yet" not in text
    assert "Without finished runs, so not here: expert-choice, " in text and "(`fine-grained`)" in text


@pytest.mark.parametrize("changes", [
    {"router": "hash"}, {"router": "oracle"}, {"moe_layers": ()}, {"losses": {"policy": 0.0}, "router": "reinforce",
                                                                   "top_k": 1},
    {"n_copy": 1}, {"vocab_size": 300}, {"seq_len": 15}])
def test_measures_take_any_model(corpora, changes):
    run = next(toy_runs(EXPERIMENTS["batch"], 1))
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))
    trainer = Trainer(Transformer(run.model, run.seed), run, corpora[None])
    for measure in (measures.influence, measures.gradient_noise, *[measures.traffic] * bool(run.model.moe_layers)):
        assert all(number is None or np.isfinite(number) for number in measure(trainer).values())


def test_measures_take_a_text_of_one_domain():
    run = next(toy_runs(EXPERIMENTS["batch"], 1))
    trainer = Trainer(Transformer(run.model, run.seed), run, load_corpus(" ".join(map(str, range(999))).encode(), 16))
    for measure in (measures.influence, measures.gradient_noise, measures.traffic, measures.specialisation,
                    measures.divergence, measures.by_rule):
        json.dumps(measure(trainer), allow_nan=False)


@pytest.mark.parametrize("activation, n_matrices", [("gelu", 2), ("swiglu", 3)])
def test_the_traffic_of_a_run_by_loops(corpora, monkeypatch, activation, n_matrices):
    """Two devices of two experts; two batches of a layer. Rows have 4 bytes a number; a device does 1e11 a second."""
    run = next(toy_runs(EXPERIMENTS["batch"], 1))
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, activation=activation))
    rng, mean = np.random.default_rng(0), lambda numbers: pytest.approx(sum(numbers) / len(numbers))
    masks = [rng.random((8, 4)) < chance for chance in (.3, .7)]
    routings = [from_mask(mask, *[Tensor(np.ones((8, 4)))] * 3) for mask in masks]
    monkeypatch.setattr(measures, "losses_and_routings", lambda *a, **k: (None, [routings]))
    trainer = Trainer(Transformer(run.model, run.seed), run, corpora[None])
    found, d, f = measures.traffic(trainer), run.model.d_model, run.model.expert_width
    assert {int(name.split("_")[1]) for name in found} == {1, 2, 4}
    parts = [naive_routing.traffic(mask, 2) for mask in masks]
    away = [rows[0, 1] + rows[1, 0] for rows, _ in parts]
    assert found["sent_2"] == mean([2 * 4 * d * n / 8 for n in away])
    assert found["link_2"] == mean([4 * d * max(rows[0, 1], rows[1, 0]) / 8 for rows, _ in parts])
    assert found["reach_2"] == mean([rows.sum() / 8 for rows, _ in parts])
    assert found["slowest_2"] == mean([work.max() / work.mean() for _, work in parts])
    flops = 2 * n_matrices * d * f
    seconds = [2 * 4 * d * max(rows[0, 1], rows[1, 0]) / 1e9 + work.max() * flops / 1e11 for rows, work in parts]
    assert found["path_2"] == mean([1e6 * each for each in seconds])


def test_the_costs_of_changed_routes_by_loops(corpora):
    """Each change of each expert in each layer, one after the other, by the losses of the domains."""
    run = next(toy_runs(EXPERIMENTS["batch"], 1))
    trainer = Trainer(Transformer(run.model, run.seed), run, corpora[None])
    valid, model = trainer.validation(2), trainer.model
    nats = losses_and_routings(model, valid, causal=False)[0]
    found = measures.counterfactuals(model, valid, nats)
    for name, change in (("drop", measures.drop), ("swap", measures.swap), ("force", measures.force)):
        costs = []
        for layer in model.moe_parts():
            for e in range(run.model.n_experts):
                with rerouted(change(e), layer):
                    changed = losses_and_routings(model, valid, causal=False)[0]
                costs.append([(changed - nats)[valid.domain == d].mean() for d in range(len(valid.names))])
        assert found[f"{name}_cost"] == pytest.approx(np.mean(costs), abs=1e-6)
        assert found[f"{name}_spread"] == pytest.approx(np.mean([np.std(each) for each in costs]), abs=1e-6)
        np.testing.assert_allclose(found[f"{name}_table"], costs[-run.model.n_experts:], atol=1e-6)  # the last layer
    assert found["force_cost"] != found["drop_cost"]


def test_quantities_of_a_row_by_hand():
    """Loads 6, 2, 0, 0 of 8 bytes with K = 1; ln 4 = 1.3863. The training loss is that of the last row."""
    layer = {"load": [6, 2, 0, 0], "token_coverage": 0.75, "router_entropy": 0.5, "marginal_entropy": 1.0,
             "mutual_information": 0.3, "mutual_information_null": 0.1, "byte_information": 0.9,
             "byte_information_null": 0.2, "byte_known": 0.6, "domain_known": 0.2}
    worse = layer | {"load_cv": 2.0, "dead_experts": 3}
    log = [{"step": 0, "cross_entropy": None, "layers": [layer | {"load_cv": 9.0, "dead_experts": 4}]},
           {"step": 5, "cross_entropy": 3.0, "layers": [worse]},
           {"step": 9, "cross_entropy": 2.0, "layers": [layer | {"load_cv": 1.0, "dead_experts": 2}]}]
    final = {"layers": [layer], "causal_cross_entropy": 0.5, "val_cross_entropy": 0.4}
    measured = {"loss_by_prefix": 2.5, "loss_by_threshold": 2.25}
    run = RunRecord("a", {"model": {}}, log, {"final": final, "measured": measured})
    wanted = {"prefix_cost": 0.25, "token_perplexity": np.exp(2.0), "lost_all": 0.25, "leak": 0.1,
              "router_entropy_share": 0.5 / np.log(4), "marginal_entropy_share": 1 / np.log(4), "mi_excess": 0.2,
              "byte_excess": 0.7, "byte_over_domain": 0.5, "known_gap": 0.4, "worst_cv": 2.0, "worst_dead": 3,
              "cross_entropy": 2.0}
    assert {name: value(run, name) for name in wanted} == {name: pytest.approx(x) for name, x in wanted.items()}


@pytest.mark.parametrize("rows", ["", None])
def test_an_experiment_without_a_finished_run_is_absent_from_the_gathered_document(corpora, tmp_path, rows):
    """An empty runs.jsonl, or a sweep run alone."""
    finish(EXPERIMENTS["fine-grained"], corpora, tmp_path / "experiments/fine-grained", 1)
    place = tmp_path / "experiments/frozen"
    if rows is None:
        run = dataclasses.replace(next(toy_runs(EXPERIMENTS["frozen"])), config_id="learned@0.001", seed=100)
        train(run, corpora[None], place / "runs" / run.run_id)
    else:
        place.mkdir()
        (place / "runs.jsonl").write_text(rows)
    found, absent = gathered.published_results(tmp_path, lab.STUDY, EXPERIMENTS.values())
    assert [one.experiment.name for one in found] == ["fine-grained"] and EXPERIMENTS["frozen"] in absent
