"""One run: stopped anywhere, it goes on and ends with the same bits; what it cannot use, it leaves alone and says so."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

import tinymoe as tm
from tinymoe import files, kernels
from tinymoe.experiments import STUDY, Scale
from tinymoe.training import trainer as t
from tinymoe.training.data import load_corpus

MODEL = dict(d_model=16, n_heads=2, d_ff=32, n_layers=2, moe_layers=[1], seq_len=16, n_experts=4)
TRAINING = dict(steps=6, batch_size=4, n_evaluations=3, eval_windows=2, final_windows=2)  # looks after steps 2, 4 and 6
WORDS = " ".join(f"{a}{b}" for a in "blue red green".split() for b in range(200))


def tiny(config_id="F", steps=6, model=(), **training):
    """A run that takes a fraction of a second. F routes with noise, so its second generator matters too."""
    training = TRAINING | {"steps": steps} | training
    (run,) = STUDY.runs(Scale({}, steps, 1), seeds=1, only=[config_id], model=MODEL | dict(model), training=training)
    return run


def snapshot(folder):
    """{path: bytes} of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def results(folder):
    """All that a run left behind, but for what the clock says."""
    with np.load(folder / "checkpoint.npz") as stored:
        arrays = {name: stored[name].tobytes() for name in stored.files if name != "__header__"}
        header = json.loads(str(stored["__header__"]))
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    arrays |= {path.name: path.read_bytes() for path in (folder / "routings").glob("*")}  # the zip format keeps no clock time here
    return arrays, *([{k: v for k, v in one.items() if k != "seconds"} for one in group] for group in ([header, summary], rows))


def stop_after(step):
    def on_step(reached, loss):
        if reached == step:
            raise KeyboardInterrupt
    return on_step


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS)
    return load_corpus(path, seq_len=16)


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """What an uninterrupted run leaves."""
    folder = tmp_path_factory.mktemp("reference")
    t.train(tiny(), corpus, folder)
    return results(folder)


@pytest.fixture
def stopped(corpus, tmp_path):
    """The folder of a run stopped at step 5 of 6, whose checkpoint is of step 4."""
    with pytest.raises(KeyboardInterrupt):
        t.train(tiny(), corpus, tmp_path, stop_after(5))
    assert files.load_arrays(tmp_path / "checkpoint.npz", "checkpoint")[1]["step"] == 4
    return tmp_path


# -- the loop --


def test_evaluations_are_spread_and_end_with_the_last_step():
    assert t.TrainConfig(steps=10, n_evaluations=3).evaluation_steps() == {3, 7, 10}
    assert t.TrainConfig(steps=2, n_evaluations=20).evaluation_steps() == {1, 2}


def test_a_run_learns_a_text_without_surprise(tmp_path):
    (tmp_path / "abc.txt").write_text("abc" * 500)
    losses = []
    t.train(tiny("D", steps=60, learning_rate=0.01, n_evaluations=1), load_corpus(tmp_path / "abc.txt", 16), tmp_path,
            lambda step, loss: losses.append(loss))
    assert len(losses) == 60 and losses[0] == pytest.approx(np.log(256), abs=0.1) and losses[-1] < 0.3


def test_the_folder_of_a_run_holds_what_the_contract_says(corpus, tmp_path):
    summary = t.train(tiny(), corpus, tmp_path)
    routings = [f"routings/{step:06}.npz" for step in (0, 2, 4, 6)]
    assert sorted(snapshot(tmp_path)) == [".lock", "checkpoint.npz", "config.json", "log.jsonl", *routings, "summary.json"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert tm.ModelConfig.from_dict(config["model"]) == tiny().model and config["training"]["steps"] == 6
    assert config["corpus"] == corpus.describe() and config["threads"] == kernels.get_threads()
    rows = files.read_rows(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4, 6] and summary["status"] == "complete"
    assert rows[0]["train_loss"] is None and all(row["train_loss"] > 0 for row in rows[1:])


@pytest.mark.parametrize("config_id", "DE")
def test_saved_routings_are_those_that_the_log_measured(corpus, tmp_path, config_id):
    t.train(tiny(config_id), corpus, tmp_path)
    shown, _ = files.load_arrays(tmp_path / "routings" / "000006.npz", "routings")
    last = files.read_rows(tmp_path / "log.jsonl")[-1]["layers"][0]
    ids, _, domain = corpus.validation(2, 16)  # all that this run evaluates: two windows of one domain
    assert (shown["ids"] == ids).all() and (shown["domain"] == domain).all()
    assert shown["chosen"][0].sum(axis=0).tolist() == last["load"] and (shown["gates"][~shown["chosen"]] == 0).all()
    np.testing.assert_allclose(shown["probs"].astype(float).sum(axis=2), 1, atol=2e-3)
    routing = t.load_model(tmp_path).forward(ids).routings[0]
    np.testing.assert_allclose(shown["gates"][0], routing.to_dense().data, atol=1e-3)


def test_fresh_throws_saved_routings_away_and_a_dense_model_saves_none(corpus, tmp_path):
    t.train(tiny(), corpus, tmp_path)
    t.train(tiny("D", n_evaluations=2), corpus, tmp_path, fresh=True)
    assert sorted(path.name for path in (tmp_path / "routings").iterdir()) == ["000000.npz", "000003.npz", "000006.npz"]
    t.train(tiny(model={"moe_layers": []}), corpus, tmp_path, fresh=True)
    assert not (tmp_path / "routings").exists()


@pytest.mark.skipif(os.cpu_count() < 2, reason="one core")
def test_the_number_of_threads_does_not_change_a_bit(corpus, reference, tmp_path):
    there = kernels.get_threads()
    try:
        kernels.set_threads(2)
        t.train(tiny(), corpus, tmp_path)
    finally:
        kernels.set_threads(there)
    assert results(tmp_path) == reference


# -- stopping and going on --


@pytest.mark.parametrize("step", [1, 3, 4, 6])  # before a checkpoint, after one, right at one, and before summary.json
def test_a_run_stopped_after_any_step_ends_with_the_same_bits(corpus, reference, tmp_path, step):
    with pytest.raises(KeyboardInterrupt):
        t.train(tiny(), corpus, tmp_path, stop_after(step))
    assert not (tmp_path / "summary.json").exists()
    t.train(tiny(), corpus, tmp_path)
    assert results(tmp_path) == reference


@pytest.mark.parametrize("config_id", "AE")
def test_other_routers_go_on_with_the_same_bits_too(corpus, tmp_path, config_id):
    t.train(tiny(config_id), corpus, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        t.train(tiny(config_id), corpus, tmp_path / "torn", stop_after(3))
    t.train(tiny(config_id), corpus, tmp_path / "torn")
    assert results(tmp_path / "torn") == results(tmp_path / "whole")


def test_the_bits_depend_on_the_seed_and_on_the_noise(corpus, reference, tmp_path, monkeypatch):
    t.train(replace(tiny(), seed=1), corpus, tmp_path / "seed")
    assert results(tmp_path / "seed")[0] != reference[0]
    real = np.random.default_rng
    monkeypatch.setattr(t.np.random, "default_rng", lambda seed=None: real([0, 3] if seed == [0, 2] else seed))
    t.train(tiny(), corpus, tmp_path / "noise")
    assert results(tmp_path / "noise")[0] != reference[0]


def test_a_kill_between_log_and_checkpoint_is_made_good(corpus, reference, stopped, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(t, "save_arrays", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            t.train(tiny(), corpus, stopped)
    assert [row["step"] for row in files.read_rows(stopped / "log.jsonl")] == [0, 2, 4, 6]  # one row ahead
    t.train(tiny(), corpus, stopped)
    assert results(stopped) == reference


@pytest.mark.parametrize("torn", [b'{"step": 6, "tra', b"\xff\x00\n", b"7\n"], ids=["cut", "not text", "not a row"])
def test_a_torn_last_line_of_the_log_is_made_good(corpus, reference, stopped, torn):
    with open(stopped / "log.jsonl", "ab") as log:
        log.write(torn)
    t.train(tiny(), corpus, stopped)
    assert results(stopped) == reference


def test_a_half_written_file_never_counts(corpus, reference, stopped, monkeypatch):
    before = snapshot(stopped)
    monkeypatch.setattr(files.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        t.train(tiny(), corpus, stopped)
    assert snapshot(stopped) == before
    monkeypatch.undo()
    for name in ("summary.json", "checkpoint.npz", "log.jsonl"):  # what kill -9 leaves
        (stopped / f".{name}.k1ll3d").write_bytes(b"half")
    t.train(tiny(), corpus, stopped)
    assert results(stopped) == reference


def test_a_finished_run_is_not_trained_again(corpus, tmp_path):
    summary = t.train(tiny(), corpus, tmp_path)
    before, when = snapshot(tmp_path), (tmp_path / "summary.json").stat().st_mtime_ns
    assert t.train(tiny(), corpus, tmp_path, stop_after(1)) == summary
    assert snapshot(tmp_path) == before and (tmp_path / "summary.json").stat().st_mtime_ns == when


# -- what a run refuses --


def test_a_finished_run_from_before_a_setting_existed_is_still_the_same_run(corpus, tmp_path):
    t.train(tiny(), corpus, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model"]["freeze"], config["model"]["norm"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = snapshot(tmp_path)
    t.train(tiny(), corpus, tmp_path)
    assert snapshot(tmp_path) == before


def test_a_stopped_run_from_before_a_setting_existed_goes_on(corpus, reference, stopped):
    config = json.loads((stopped / "config.json").read_text())
    arrays, header = files.load_arrays(stopped / "checkpoint.npz", "checkpoint")
    for model in (config["model"], header["model"]):
        del model["freeze"], model["norm_eps"]
    (stopped / "config.json").write_text(json.dumps(config))
    files.save_arrays(stopped / "checkpoint.npz", arrays, header)
    t.train(tiny(), corpus, stopped)
    assert results(stopped) == reference


def refuses(error, match, run, corpus, folder):
    """train raises an error of one line that matches, and leaves every file as it was."""
    before = snapshot(folder)
    with pytest.raises(error, match=match) as caught:
        t.train(run, corpus, folder)
    assert snapshot(folder) == before and "\n" not in str(caught.value)


@pytest.mark.parametrize("other", [tiny(steps=7), tiny(model={"d_ff": 8}), replace(tiny(), seed=1)], ids=["training", "model", "seed"])
def test_other_settings_in_the_same_folder(corpus, stopped, other):
    refuses(t.RunError, "other settings .*choose another --out, or start again with --fresh", other, corpus, stopped)


def test_another_text_in_the_same_folder(stopped, tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "words.txt"
    text.write_text(WORDS[::-1])
    refuses(t.RunError, "corpus .* is .*, not ", tiny(), load_corpus(text, 16), stopped)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"], ids=["empty", "cut", "a list", "not text"])
def test_a_broken_config(corpus, stopped, content):
    (stopped / "config.json").write_bytes(content)
    refuses(t.RunError, "config.json .*move this run's folder away", tiny(), corpus, stopped)


def test_a_folder_in_use(corpus, stopped, monkeypatch):
    monkeypatch.setattr(t.time, "sleep", lambda seconds: None)
    with t.locked(stopped):
        refuses(t.RunError, "is being written by another process", tiny(), corpus, stopped)
    t.train(tiny(), corpus, stopped)  # the lock is free again


def _model(path):
    tm.Transformer(tiny().model).save(path)


def _bare(path):
    np.savez(path, p=np.ones(3))


def _pickled(path):
    np.savez(path, __header__=np.array([{"kind": "checkpoint"}], dtype=object))


def _without(*names):
    def cut(path):
        arrays, header = files.load_arrays(path, "checkpoint")
        files.save_arrays(path, {k: a for k, a in arrays.items() if k not in names}, {k: v for k, v in header.items() if k not in names})
    return cut


DAMAGE = {"truncated": lambda path: path.write_bytes(path.read_bytes()[:-2000]), "empty": lambda path: path.write_bytes(b""),
          "text": lambda path: path.write_text("no archive"), "a model": _model, "a stranger's arrays": _bare, "pickled": _pickled,
          "no weights": _without("p/head.weight"), "no moments": _without("m/head.weight"), "no generators": _without("generators"),
          "no row count": _without("n_rows")}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_checkpoint_that_is_damaged_or_foreign(corpus, stopped, damage):
    damage(stopped / "checkpoint.npz")
    refuses(files.CheckpointError, "checkpoint.npz .*", tiny(), corpus, stopped)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", None])
def test_a_torn_summary_is_written_again(corpus, tmp_path, content):
    whole, path = t.train(tiny(), corpus, tmp_path), tmp_path / "summary.json"
    path.unlink() if content is None else path.write_bytes(content)
    assert not t.finished(tmp_path)
    assert t.train(tiny(), corpus, tmp_path) == whole and json.loads(path.read_bytes()) == whole


def test_routings_of_an_earlier_run_are_gone(corpus, tmp_path):
    t.train(tiny(), corpus, tmp_path)
    for name in t.FILES:
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "routings" / "000099.npz").touch()
    t.train(tiny(), corpus, tmp_path)
    assert not (tmp_path / "routings" / "000099.npz").exists()


def test_models_that_cannot_be_loaded(corpus, tmp_path):
    t.train(tiny(), corpus, tmp_path)
    arrays, header = files.load_arrays(tmp_path / "checkpoint.npz", "checkpoint")
    name = "p/head.weight"
    for changed in (arrays[name][:1], arrays[name] * np.nan):
        files.save_arrays(tmp_path / "checkpoint.npz", arrays | {name: changed}, header)
        with pytest.raises(files.CheckpointError, match="head.weight has another shape, or is not finite"):
            t.load_model(tmp_path)
    (tmp_path / "checkpoint.npz").unlink()
    with pytest.raises(files.CheckpointError, match="has rows but no checkpoint"):
        t.load_model(tmp_path)


@pytest.mark.parametrize("finished", [False, True])
def test_a_log_that_is_gone(corpus, stopped, finished):
    if finished:
        t.train(tiny(), corpus, stopped)
    (stopped / "log.jsonl").unlink()
    refuses(files.CheckpointError, "log.jsonl is incomplete: move this run's folder away", tiny(), corpus, stopped)


# -- losses that are not finite --


@pytest.mark.parametrize("steps, n_evaluations", [(6, 3), (3, 3), (1, 1)], ids=["in training", "at a look", "at the end"])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_recorded(corpus, tmp_path, steps, n_evaluations):
    run = tiny("D", steps=steps, n_evaluations=n_evaluations, learning_rate=1e30)
    for _ in range(2):  # the same again when it is tried again
        with pytest.raises(t.NonFiniteLoss, match=r"at step [12], beginning in .+; lower the learning rate"):
            t.train(run, corpus, tmp_path)
        failure = json.loads((tmp_path / "failure.json").read_text())
        assert failure["step"] in (1, 2) and failure["layer"] and "not finite" in failure["reason"]
        assert not (tmp_path / "summary.json").exists()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_layer_where_it_began_is_named(corpus, tmp_path, monkeypatch):
    class Poisoned(t.Transformer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.blocks[1].norm2.weight.data[:] = 1e4  # finite, but these two make the experts overflow
            self.blocks[1].feed_forward.experts.w2.data[:] = 1e38
    monkeypatch.setattr(t, "Transformer", Poisoned)
    with pytest.raises(t.NonFiniteLoss, match="beginning in layer 1"):
        t.train(tiny("D"), corpus, tmp_path)


# -- from another run --

def dense_and_after(**changes):
    dense = replace(tiny("A", model={"moe_layers": []}), config_id="dense")
    return dense, replace(tiny("D", model={"activation": "gelu"}), config_id="up", start="dense", **changes)


def test_a_run_starts_as_the_other_ended(corpus, tmp_path):
    dense, up = dense_and_after()
    t.train(dense, corpus, tmp_path / dense.run_id)
    trained, model = t.load_model(tmp_path / dense.run_id), t.first_model(up, tmp_path / up.run_id)
    ids = corpus.validation(1, 16)[0]
    np.testing.assert_allclose(model.forward(ids).logits.data, trained.forward(ids).logits.data, atol=1e-5)
    assert t.train(up, corpus, tmp_path / up.run_id)["status"] == "complete"
    again = t.first_model(replace(dense, config_id="on", start="dense"), tmp_path / "on-seed0")  # the same model goes on
    assert all((p.data == trained.parameters()[name].data).all() for name, p in again.parameters().items())


def test_a_run_whose_start_is_missing_says_so_and_one_of_another_start_is_another(corpus, tmp_path):
    dense, up = dense_and_after()
    with pytest.raises(t.RunError, match="not finished"):
        t.train(up, corpus, tmp_path / up.run_id)
    t.train(dense, corpus, tmp_path / dense.run_id)
    t.train(up, corpus, tmp_path / up.run_id)
    with pytest.raises(t.RunError, match="start is dense, not None"):
        t.train(replace(up, start=None), corpus, tmp_path / up.run_id)


def test_a_run_that_started_from_another_goes_on_with_the_same_bits_and_then_needs_it_no_more(corpus, tmp_path):
    dense, up = dense_and_after()
    for folder in ("whole", "stopped"):
        t.train(dense, corpus, tmp_path / folder / dense.run_id)
    t.train(up, corpus, tmp_path / "whole" / up.run_id)
    with pytest.raises(KeyboardInterrupt):
        t.train(up, corpus, tmp_path / "stopped" / up.run_id, stop_after(3))
    t.train(up, corpus, tmp_path / "stopped" / up.run_id)
    assert results(tmp_path / "stopped" / up.run_id) == results(tmp_path / "whole" / up.run_id)
    (tmp_path / "whole" / dense.run_id / "checkpoint.npz").unlink()
    assert t.train(up, corpus, tmp_path / "whole" / up.run_id)["status"] == "complete"


def test_what_goes_on_reads_on(corpus, tmp_path):
    """Not the first run's batches again."""
    dense, up = dense_and_after()
    t.train(dense, corpus, tmp_path / dense.run_id)
    batches = [t.Trainer(run, corpus, tmp_path / run.run_id).generators["data"].random() for run in (dense, up)]
    assert batches[0] != batches[1]


def test_what_is_measured_at_the_end_is_kept(corpus, tmp_path):
    run = replace(tiny(), measure=lambda trainer: {"steps_seen": trainer.step})
    assert t.train(run, corpus, tmp_path)["measured"] == {"steps_seen": 6}


@pytest.mark.parametrize("damage", ["p/token_embedding.weight", "header"])
def test_a_model_of_a_damaged_checkpoint(corpus, stopped, damage):
    arrays, header = files.load_arrays(stopped / "checkpoint.npz", "checkpoint")
    if damage == "header":
        header["model"]["n_experts"] = 3
    else:
        del arrays[damage]
    files.save_arrays(stopped / "checkpoint.npz", arrays, header)
    with pytest.raises(files.CheckpointError, match="train it again"):
        t.load_model(stopped)


@pytest.mark.parametrize("bad", [dict(steps=0), dict(steps=1.5), dict(steps=True), dict(batch_size="4"), dict(learning_rate="fast"),
                                 dict(learning_rate=0), dict(learning_rate=float("nan")), dict(warmup="long"), dict(warmup=2),
                                 dict(weight_decay="much"), dict(weight_decay=-1), dict(max_norm=0), dict(max_norm=float("nan"))], ids=str)
def test_training_settings_that_make_no_run(bad):
    (name, value), = bad.items()
    with pytest.raises(ValueError, match=f"{name} .*{value}"):
        t.TrainConfig(**bad)
