"""A plan and its runs: learning rates that a sweep chooses, commands that go on where they stopped, changed plans."""

import dataclasses
import json
import re
import shutil
import types

import numpy as np
import pytest
from click.testing import CliRunner

import cli
from test_experiments import TOY
from test_report import LOSSES, STUDY, change, layer_row, row, write_run, write_study
from tinymoe.experiments import EXPERIMENTS
from tinymoe.study import figures, gathered, quantities, report, runner, tables
from tinymoe.study.experiment import CANDIDATES, Claim, Effect, Experiment, Primary, Setting, sweep_id
from tinymoe.study.quantities import LOSS, value
from tinymoe.study.results import Results, best_rates, sweep_losses
from tinymoe.study.rows import RunRecord, load_runs
from tinymoe.study.statistics import Comparison, Contrast, corrected, holm
from tinymoe.training import trainer

SMALL = dict(batch_size=2, n_evaluations=2, eval_windows=2, final_windows=3)
ONE_EXPERT = {"n_experts": 1, "top_k": 1, "aux_coef": 0.0}
MIXTURE, ACTIVE, TOTAL = (Setting("mixture", "top-2 of 8"),
                          Setting("dense-active", "as two", model=ONE_EXPERT, width=2),
                          Setting("dense-total", "as eight", model=ONE_EXPERT, width=8))


def better(first, second):
    return Primary(question=f"Is {first} better?", contrast=Contrast(LOSS, first, minus=second),
                   lower=f"{first} is better.", higher=f"{first} is worse.", same="They are the same.",
                   not_known="It is not known.")


TOY_DENSE = Experiment(  # the third setting shares the rate of the second
    name="dense", question="Is a mixture better than a dense model?",
    settings=(MIXTURE, ACTIVE, dataclasses.replace(TOTAL, rate_of="dense-active")), metrics=(LOSS, "parameters"),
    primary=(better("mixture", "dense-active"), better("dense-total", "mixture")),
    exploratory=(Contrast("cross_entropy", "mixture", minus="dense-active"),), figures={}, crossings=(
        (LOSS, "dense-total", "mixture"),),
    scales={"default": TOY}, training=SMALL, rates=(1e-3, 4e-3), steps=4, seeds=2)


# -- what a plan is --

def test_the_runs_of_a_sweep_are_named_by_their_rate():
    scale = TOY_DENSE.scale("full")
    plans = TOY_DENSE.sweep(scale)
    assert [plan.run_id for plan in plans[:4]] == ["mixture@0.001-seed100", "mixture@0.004-seed100",
                                                   "dense-active@0.001-seed100", "dense-active@0.004-seed100"]
    assert len(plans) == 8 and {plan.seed for plan in plans} == {100, 101}
    assert all(f"@{plan.training.learning_rate:g}-" in plan.run_id and plan.training.steps == 4 for plan in plans)
    assert [plan.config_id for plan in TOY_DENSE.sweep(scale, only=["dense-total"])] == ["dense-active@0.001",
                                                                                         "dense-active@0.004"] * 2
    assert [sweep_id("a", rate) for rate in CANDIDATES] == ["a@0.001", "a@0.002", "a@0.004", "a@0.008"]


def test_only_the_plan_scores_all_validation_windows():
    frozen = EXPERIMENTS["frozen"]
    windows = [frozen.runs(frozen.scale(name), 1)[0].training.final_windows for name in ("quick", "default", "full")]
    assert windows == [64, 64, 1000]


def test_a_scale_is_given_by_its_name():
    frozen = EXPERIMENTS["frozen"]
    assert frozen.runs("quick", 2) == frozen.runs(frozen.scale("quick"), 2)
    assert TOY_DENSE.sweep("full") == TOY_DENSE.sweep(TOY_DENSE.scale("full"))
    with pytest.raises(ValueError, match="^unknown scale 'quik': choose one of quick, default, full$"):
        frozen.runs("quik", 2)


def test_chosen_rates_reach_the_runs_and_a_given_rate_wins():
    rates = {"mixture": 4e-3, "dense-active": 1e-3, "dense-total": 1e-3}
    runs = TOY_DENSE.runs(TOY, 1, rates=rates)
    assert {run.config_id: run.training.learning_rate for run in runs} == rates
    (run,) = TOY_DENSE.runs(TOY, 1, ["mixture"], training={"learning_rate": 0.5}, rates=rates)
    assert run.training.learning_rate == 0.5 and run.plan_hash == TOY_DENSE.plan_hash


def test_the_length_of_a_setting_is_in_the_steps_of_the_plan():
    settings = (MIXTURE, dataclasses.replace(ACTIVE, length=2),
                dataclasses.replace(TOTAL, rate_of="dense-active", length=1.2))
    runs = dataclasses.replace(TOY_DENSE, settings=settings).runs(TOY_DENSE.scale("full"), 1)
    assert [run.training.steps for run in runs] == [4, 8, 5]  # 4.8 is rounded


@pytest.mark.parametrize("changed", [{"rate_of": "mixture"}, {"start": "dense-active"}])
def test_a_setting_whose_rate_is_undefined_is_refused(changed):
    settings = (MIXTURE, dataclasses.replace(ACTIVE, rate_of="mixture"), dataclasses.replace(TOTAL, **changed))
    if "rate_of" in changed:
        settings = (settings[0], settings[1], dataclasses.replace(TOTAL, rate_of="dense-active"))  # that chooses none
    with pytest.raises(ValueError, match="dense-total needs rate_of"):
        dataclasses.replace(TOY_DENSE, settings=settings)


def test_the_hash_is_of_the_plan_and_of_nothing_else():
    def changed(**fields):
        return dataclasses.replace(TOY_DENSE, **fields).plan_hash != TOY_DENSE.plan_hash

    first, second = TOY_DENSE.primary
    assert changed(seeds=3) and changed(steps=5) and changed(rates=()) and changed(settings=TOY_DENSE.settings[::-1])
    assert changed(primary=(first,)) and changed(primary=(dataclasses.replace(first, margin=0.02), second))
    assert not changed(primary=(dataclasses.replace(first, same="It does not matter."), second))  # words alone
    assert changed(exploratory=(Contrast("load_cv", "mixture"),))
    claims = [Claim(None, words, "", (Effect(LOSS, "mixture", "<", bound, minus="dense-total"),))
              for words, bound in (("a", 0), ("b", 0), ("a", 1))]
    hashes = [dataclasses.replace(TOY_DENSE, claims=(claim,)).plan_hash for claim in claims]
    assert hashes[0] == hashes[1] != hashes[2]
    assert not changed(caution="other") and not changed(figures={})


# -- choosing --

def swept(losses):
    """Runs of a sweep: {(setting, rate): losses of the seeds, None for one that failed}."""
    for (name, rate), those in losses.items():
        for seed, loss in zip((100, 101), those):
            plan = f"{name}@{rate:g}"
            summary = {"final": {LOSS: loss}} if loss is not None else None
            yield RunRecord(f"{plan}-seed{seed}", {"config_id": plan, "seed": seed}, [], summary,
                            None if summary else {"reason": "the loss is not finite"})


ENOUGH = {("mixture", 1e-3): (2.0, 1.0), ("mixture", 4e-3): (1.4, 1.4),
          ("dense-active", 1e-3): (1.5, 1.5), ("dense-active", 4e-3): (1.0, 2.0)}


def test_the_lowest_mean_loss_wins_and_of_equal_ones_the_smaller_rate():
    assert best_rates(TOY_DENSE, list(swept(ENOUGH))) == {
        "mixture": 4e-3, "dense-active": 1e-3, "dense-total": 1e-3}
    assert best_rates(TOY_DENSE, list(swept(ENOUGH)), ["mixture"]) == {"mixture": 4e-3}


def test_a_rate_at_which_a_run_failed_is_not_taken():
    runs = list(swept(ENOUGH | {("mixture", 4e-3): (0.1, None)}))
    assert best_rates(TOY_DENSE, runs)["mixture"] == 1e-3 and sweep_losses(TOY_DENSE, runs)["mixture"][4e-3] == float(
        "inf")
    with pytest.raises(ValueError, match="the sweep of mixture gives no learning rate"):
        best_rates(TOY_DENSE, list(swept(ENOUGH | {("mixture", 1e-3): (None, 1), ("mixture", 4e-3): (1, None)})))


def test_a_sweep_that_is_not_finished_chooses_nothing():
    with pytest.raises(ValueError, match="the sweep of dense-active gives no learning rate"):
        best_rates(TOY_DENSE, [run for run in swept(ENOUGH) if run.run_id != "dense-active@0.004-seed101"])


# -- the command --

@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, output) of a plan that was run, its rows compact and its folders gone."""
    out = tmp_path_factory.mktemp("plan") / "dense"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EXPERIMENTS, "dense", TOY_DENSE)
        patch.setattr(figures, "draw_all", lambda results: [])
        output = typed(out)
    assert CliRunner().invoke(cli.main, ["compact", str(out)]).exit_code == 0
    shutil.rmtree(out / "runs")
    return out, output


def typed(out, *more, code=0):
    result = CliRunner().invoke(cli.main, ["experiment", "dense", "--full", "--jobs", "1", "--out", str(out), *more])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def copy(done, tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "dense", TOY_DENSE)
    monkeypatch.setattr(figures, "draw_all", lambda results: [])
    return shutil.copytree(done[0], tmp_path / "dense")


def test_a_plan_is_run_from_its_sweep_to_its_document(done):
    out, output = done
    assert output.index("8 run(s)") < output.index("learning rates: mixture 0.00") < output.index("6 run(s)")
    runs = load_runs(out)
    assert len(runs) == 14 and all(run.plan_hash == TOY_DENSE.plan_hash for run in runs)
    rates = best_rates(TOY_DENSE, runs)
    assert all(run.config["training"]["learning_rate"] == rates[run.config_id] for run in runs if run.seed < 100)
    text = (out / "FINDINGS.md").read_text()
    (line,) = [line for line in text.splitlines() if line.endswith(", at the end of the range | dense-total |")]
    assert line.startswith("| dense-active | ") and "**" in line
    assert "| dense | 6 | 8 | 0 | 0.00 |" in text and "`mixture-seed{0,1}`" in text
    assert "@0.001-seed100` is" not in text
    assert not any(sentence in text for sentence in ("The plan has", "another one than today", "No plan"))
    assert "chosen as the table of learning rates shows" in text and "compare with care" not in text
    assert f"Plan: `{TOY_DENSE.plan_hash[:12]}`" in text


def test_rows_without_folders_count_as_finished_and_stay(copy):
    before = (copy / "runs.jsonl").read_bytes()
    output = typed(copy)
    assert "8 of 8 runs are finished" in output and "6 of 6 runs are finished" in output and "run(s)" not in output
    assert not (copy / "runs").exists()
    lines = before.splitlines(keepends=True)
    (copy / "runs.jsonl").write_bytes(b"".join(line for line in lines if b'"run_id": "mixture-seed1"' not in line))
    assert "1 run(s) of 4 steps" in typed(copy) and len(list((copy / "runs").iterdir())) == 1
    assert CliRunner().invoke(cli.main, ["compact", str(copy)]).output.startswith("14 runs")


def test_the_text_has_a_share_and_every_domain_a_difference(copy):
    results = Results(TOY_DENSE, copy)
    low, high, share = results.text_uncertainty(results.primary[0].contrast)
    assert low < results.primary[0].mean < high and 0 < share <= 1
    by_domain = results.by_domain(results.primary[0].contrast)
    assert len(by_domain) == 4
    assert sum(one.mean for one in by_domain.values()) / 4 == pytest.approx(results.primary[0].mean)
    assert re.search(r"share of the variance \| \d+% \|", tables.primary_table(results))
    assert tables.domain_table(results).count("\n") == 9


def test_rows_of_other_settings_are_refused_and_fresh_is_the_remedy(copy, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "dense", dataclasses.replace(TOY_DENSE, steps=2))
    assert "with other settings (training steps is 4, not 2)" in typed(copy, code=1)
    assert "8 run(s) of 2 steps" in typed(copy, "--fresh")
    assert {run.summary["steps"] for run in load_runs(copy)} == {2}


@pytest.mark.parametrize("stop", [3, 8])  # within the sweep, and between it and the first run
def test_fresh_that_was_interrupted_throws_the_runs_after_the_sweep_away_too(copy, monkeypatch, stop):
    real, begun = trainer.train, []

    def interrupted(plan, *more):
        if len(begun) == stop:
            raise KeyboardInterrupt
        begun.append(plan.run_id)
        return real(plan, *more)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "train", interrupted)
        assert "Leave --fresh out to resume" in typed(copy, "--fresh", code=130)
    assert "6 run(s) of 4 steps" in typed(copy) and not (copy / "fresh.json").exists()
    assert len(list(copy.glob("runs/*/summary.json"))) == 14


def test_the_seeds_that_choose_rates_are_in_no_mean(copy):
    assert "--seeds 101 would use seed 100, which chooses" in typed(copy, "--seeds", "101", code=2)


def test_a_failed_run_of_a_sweep_is_not_tried_again_and_another_is(copy):
    rows = [json.loads(line) for line in (copy / "runs.jsonl").read_text().splitlines()]
    for each in rows:
        if each["config"]["run_id"] in ("mixture@0.004-seed100", "mixture-seed0"):
            each["summary"], each["failure"] = None, {"reason": "the loss is not finite"}
        each["config"]["training"]["learning_rate"] = {"mixture": 1e-3}.get(
            each["config"]["config_id"], each["config"]["training"]["learning_rate"])
    (copy / "runs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    output = typed(copy)
    assert "8 of 8 runs are finished" in output and "1 run(s)" in output and "mixture-seed0: done" in output
    assert "learning rates: mixture 0.001," in output
    assert "not finite" in (copy / "FINDINGS.md").read_text()


def test_a_run_that_starts_from_a_row_alone_is_refused(copy, monkeypatch):
    settings = (MIXTURE, ACTIVE, dataclasses.replace(TOTAL, start="dense-active", rate_of="mixture"))
    monkeypatch.setitem(EXPERIMENTS, "dense", dataclasses.replace(TOY_DENSE, settings=settings))
    lines = (copy / "runs.jsonl").read_text().splitlines(keepends=True)
    (copy / "runs.jsonl").write_text("".join(line for line in lines if "dense-total" not in line))
    assert "dense-total-seed0 starts from dense-active-seed0, of which only the row" in typed(copy, code=1)


# -- what the document says of a plan --

def test_a_table_has_no_row_that_holds_nothing(tmp_path):
    results = Results(STUDY, write_study(tmp_path, n_seeds=1))
    rows = [line.split(" | ")[0] for line in tables.primary_table(results).splitlines()[2:]]
    assert rows == ["| difference", "| mean", "| margin", "| seeds"]
    assert tables.answers(results)[0].startswith("Does balancing cost loss? **Not tested")


def test_runs_of_another_plan_and_of_none_are_counted(tmp_path):
    write_study(tmp_path)
    change(tmp_path / "runs/A-seed0", None, plan_hash="0" * 64)
    for seed in (0, 1):
        change(tmp_path / f"runs/B-seed{seed}", None, plan_hash=STUDY.plan_hash)
    text = report.write_findings(Results(STUDY, tmp_path)).read_text()
    assert "**The plan has 12 seeds of 2,000 steps, with a learning rate chosen for each setting: `--full`" in text
    assert "**The plan of 1 run is another one than today's.**" in text
    assert "**No plan was recorded by 18 runs.**" in text


def test_the_seeds_that_would_decide_have_a_price(tmp_path):
    """102 seeds of two settings, at 20 seconds a run; one slow run does not change the median."""
    results = Results(STUDY, write_study(tmp_path))
    results.groups["A"][1].summary["wall_seconds"] = 3600.0
    found = types.SimpleNamespace(verdict="not known", needed=102, needed_range=(50, None), between=False,
                                  contrast=Contrast(LOSS, "C", minus="A"))

    def said(**changed):
        one = types.SimpleNamespace(**vars(found) | changed)
        return tables.deciding_hours(results, one), tables.to_decide(results, one)

    assert said() == (pytest.approx(102 * 40 / 3600), "102 seeds (50 to over 1,000), 1.1 core-hours")
    assert said(needed=None, needed_range=(None, None)) == (
        pytest.approx(1000 * 40 / 3600), "over 1,000 seeds (over 1,000), over 11.1 core-hours")
    assert said(between=True) == (
        0, "no number of seeds is known, as the difference seems to lie between 0 and the margin")
    assert said(verdict="same")[0] == 0


def test_the_price_of_a_seed_has_the_run_that_it_starts_from(tmp_path):
    settings = tuple(dataclasses.replace(s, start="A") if s.id == "C" else s for s in STUDY.settings)
    results = Results(dataclasses.replace(STUDY, settings=settings, rates=()), write_study(tmp_path))
    found = types.SimpleNamespace(verdict="not known", needed=102, between=False,
                                  contrast=Contrast(LOSS, "C", minus="B"))
    assert tables.deciding_hours(results, found) == pytest.approx(102 * 60 / 3600)


def test_a_ratio_is_said_with_its_geometric_mean_and_interval():
    """Ratios 0.2 and 0.4: sqrt(0.08) = 0.283. Their logarithms differ by ln 2, so the standard error is 0.347, and half
    the 90% interval is 6.314 times that, 2.188: 0.283 / 8.92 and 0.283 * 8.92."""
    effect = Effect("max_violation", "a", "<", 0.5, over="b")
    assert tables.measured(effect, np.log([0.2, 0.4])).endswith("`a` / `b`: 0.283 [0.032, 2.523]; needs < 0.5")


def test_failed_runs_threads_and_wall_clock_are_in_the_compute(tmp_path):
    """20 seconds a run; A-seed0 took an hour on one thread, B-seed0 had four threads, and D-seed1 failed after the 20
    seconds of its log."""
    write_study(tmp_path)
    path = tmp_path / "runs/A-seed0/summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"wall_seconds": 3600.0}))
    (tmp_path / "runs/D-seed1/summary.json").rename(tmp_path / "runs/D-seed1/failure.json")
    change(tmp_path / "runs/B-seed0", None, threads=4)
    hours = 1 + (19 + 4) * 20 / 3600
    assert tables.compute_row(Results(STUDY, tmp_path)) == ["study", "20", "0", "1", f"{hours:.2f}"]


# -- quantities of curves --

def curve(tmp_path, name, losses, load=(25, 25, 25, 25)):
    folder = write_run(tmp_path, name, 0, losses[-1])
    rows = [row(10 * i, loss, loss, [layer_row(list(load) if i else [25] * 4, 1.0)], 100)
            for i, loss in enumerate(losses)]
    (folder / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": 10 * (len(losses) - 1)}))
    return folder


def test_quantities_of_curves_by_hand(tmp_path):
    """A: 3, 2, 1 at steps and seconds 0, 10, 20; B: 3, 1.8, 1.4. A - B is 0.2 at 10 and -0.4 at 20: they cross a third
    of the way. Loads 75, 25: exp(0.5623) = 1.755 of 4 experts."""
    curve(tmp_path, "A", (3.0, 2.0, 1.0), load=(75, 25, 0, 0))
    curve(tmp_path, "B", (3.0, 1.8, 1.4))
    results = Results(STUDY, tmp_path)
    assert results.crossing(LOSS, "A", "B") == {0: pytest.approx(10 + 10 / 3)}
    assert str(results.crossing(LOSS, "A", "A")) == "{0: nan}"

    def crossing(*curves):
        return quantities.crossing(*[[{"step": i, "layers": [], "x": x} for i, x in enumerate(xs)] for xs in curves],
                                   "x")

    assert crossing((0, 3, 2, 1, 1), (0, 2, 2, 2, 2)) == 2  # they meet at 2
    assert str(crossing((0, 3, 3), (1, 2, 2))) == "nan"  # step 0, before any training, does not count
    a, b = (runs[0] for runs in results.groups.values())
    assert quantities.in_row(a.log[1], "effective_experts") == pytest.approx(1.7548, abs=1e-4)
    assert value(a, "collapse_step") == 10 and str(value(b, "collapse_step")) == "nan"
    assert [results.cell("collapse_step", name) for name in "AB"] == ["10", "never"]
    assert str(value(a, "known_gap")) == "nan"  # rows of before have no such numbers


def test_a_loss_has_a_margin_and_another_quantity_has_none(tmp_path):
    experiment = dataclasses.replace(STUDY, exploratory=(Contrast(LOSS, "A", minus="B"), Contrast("leak", "E"),
                                                         Contrast("load_cv", "A", minus="B")))
    margins = [one.margin for one in Results(experiment, write_study(tmp_path)).exploratory]
    assert margins == [0.01, 0.01, None]


# -- the gathered document --

def test_the_surprise_is_the_largest_exploratory_difference_that_survives(tmp_path):
    """Only differences of the causal loss count: A - B, and not the load, or C - D, whose seeds scatter."""
    losses = LOSSES | {"C": (1.0, 2.0, 3.0), "D": (2.0, 1.0, 1.5)}
    experiment = dataclasses.replace(STUDY, exploratory=(
        Contrast(LOSS, "A", minus="B"), Contrast(LOSS, "C", minus="D"), Contrast("load_cv", "A", minus="B")))
    said = gathered.surprise([Results(experiment, write_study(tmp_path, losses=losses))])
    assert said.startswith("**Of 2 differences that no question asked for, the largest that is shown: A (no load "
                           "balancing) is 0.367 nats worse than B (light balancing).** The interval is [")
    assert " million parameters in all, and learning rates of 0.001, at the end of the range. The 2 are of" in said
    claim = Claim(3, "A is worse", "nobody", (Effect(LOSS, "B", "<", 0, minus="A"),))
    asked = dataclasses.replace(experiment, claims=(claim,))
    assert gathered.surprise([Results(asked, tmp_path)]).startswith("No exploratory difference")
    none = dataclasses.replace(STUDY, exploratory=())
    assert gathered.surprise([Results(none, tmp_path)]).startswith("No exploratory difference")


def test_a_difference_of_settings_that_were_trained_otherwise_is_no_surprise(tmp_path):
    """B for twice the steps, or from another model; or the text is one of the experiment's own."""
    write_study(tmp_path, losses={name: LOSSES[name] for name in "AB"})

    def said(text=None, **changed):
        settings = tuple(dataclasses.replace(s, **changed) if s.id == "B" else s for s in STUDY.settings)
        return gathered.surprise([Results(dataclasses.replace(
            STUDY, settings=settings, text=text, rates=(), exploratory=(Contrast(LOSS, "A", minus="B"),)), tmp_path)])

    assert "A (no load balancing) is 0.367 nats worse than B" in said()
    for other in (said(length=2), said(start="D"), said(text="synthetic")):
        assert other.startswith("No exploratory difference")


def test_the_yardstick_says_what_routing_is_worth(tmp_path, monkeypatch):
    settings = {s.id for name in gathered.YARDSTICKS for s in EXPERIMENTS[name].settings}
    assert all({*contrast.settings} <= settings for _, contrast in gathered.YARDSTICKS.values())
    monkeypatch.setattr(gathered, "YARDSTICKS", {
        "study": ("C in place of A", Contrast(LOSS, "C", minus="A")), "dense": ("no run", Contrast(LOSS, "A"))})
    said = gathered.yardstick([Results(STUDY, write_study(tmp_path))])
    assert said.endswith("count as none. C in place of A changes the loss by -0.367 [-0.510, -0.223] nats.")


@pytest.mark.parametrize("losses, said", [
    (LOSSES, "** The learning rates 0.004 and 0.002 differ. |"),
    (LOSSES | {"C": (1.0, 2.0, 3.0)}, "nats; learning rates 0.004 and 0.002 |")])  # not known: there is no answer
def test_unequal_rates_stand_in_the_row_of_a_question(losses, said, tmp_path, monkeypatch):
    monkeypatch.setattr(Results, "learning_rate", lambda self, name: 0.002 if name == "A" else 0.004)
    results = Results(STUDY, write_study(tmp_path, losses=losses))
    rows = "".join(gathered.questions([results], [results])).splitlines()
    assert [line for line in rows if "learning rates" in line] == [line for line in rows if said in line] != []


@pytest.mark.parametrize("rates, first_seed, ends", [
    ((0.1, 0.2, 0.3), 0, (0.1, 0.3)), ((0.1, 0.2), 9, (0.1, 0.2)), ((), 0, ()),
    ((), 9, (CANDIDATES[0], CANDIDATES[-1]))])
def test_a_rate_at_an_end_is_one_of_a_sweep(rates, first_seed, ends):
    results = types.SimpleNamespace(experiment=dataclasses.replace(STUDY, rates=rates, first_seed=first_seed))
    assert tuple(rate for rate in sorted({0.1, 0.2, 0.3, *CANDIDATES}) if tables.at_an_end(results, rate)) == ends


def test_a_correction_over_all_experiments_says_which_verdicts_it_would_cost():
    """p of 0.0042, 0.038 and 1, each alone in its experiment; of all three the second becomes 2 * 0.038."""
    def among(name, *numbers):
        comparisons = corrected([Comparison(Contrast(LOSS, "C", minus="A"), values, 0.01) for values in numbers], holm)
        return types.SimpleNamespace(experiment=types.SimpleNamespace(name=name), primary=comparisons)

    found = [among("one", (1.0, 1.1, 1.25)), among("two", (1.0, 1.7, 2.1)), among("three", (-1.0, 0.0, 1.0))]
    assert [each.primary[0].verdict for each in found] == ["different", "different", "not known"]
    assert gathered.over_all(found) == (
        "With Holm's correction over all 3 primary comparisons, 1 of the 2 that are *different* would stay so, not "
        "`C` - `A` of `two` (p = 0.076).")
    assert gathered.over_all(found[:1]).endswith("comparisons, 1 of the 1 that are *different* would stay so.")
    assert gathered.over_all(found[2:]) == gathered.over_all([]) == ""
    like = [*found[:1], among("four", (0.001, -0.001, 0.0005)), among("five", (0.004, -0.004, 0.0015))]
    assert [each.primary[0].verdict for each in like[1:]] == ["same", "same"]  # p of 0.0019, and of 0.0283 twice
    assert gathered.over_all(like) == (
        "With Holm's correction over all 3 primary comparisons, 1 of the 1 that are *different* would stay so; 1 of "
        "the 2 that are *same* would stay so, not `C` - `A` of `five` (p = 0.057).")


@pytest.mark.slow
def test_the_forest_shows_what_was_tested(tmp_path):
    results = Results(STUDY, write_study(tmp_path))
    assert figures.draw_forest([results], tmp_path).read_bytes().startswith(b"\x89PNG")
    with figures.default_style():
        (axes,) = figures.forest([results]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["study: C - A", "study: E - G"]  # two of three
    assert figures.draw_forest([], tmp_path) is None


def test_the_axis_of_the_forest_ends_at_the_first_tick_beyond_the_data(tmp_path):
    """C - A of -0.37 to -0.5 and A - A: 37 to 60 margins below 0, and none above."""
    losses = {"A": (2.0, 2.2, 2.4), "C": (1.5, 1.7, 1.8), "E": (1.6, 1.9, 2.0), "G": (1.6, 1.9, 2.0)}
    with figures.default_style():
        (axes,) = figures.forest([Results(STUDY, write_study(tmp_path, losses=losses))]).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "−100", "−50", "−20", "−10", "−5", "−2", "−1", "0", "1"] and axes.get_xlim() == (-100, 1)
