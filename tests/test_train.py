"""One run: interrupted anywhere, it is resumed and ends with the same bits. What it cannot use it refuses and keeps."""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from dataclasses import replace

import numpy as np
import pytest

import tinymoe as tm
from tinymoe import files, kernels
from tinymoe.experiments import STUDY, Scale
from tinymoe.moe.routers import user_files
from tinymoe.study.rows import load_runs
from tinymoe.tools import view
from tinymoe.training import evaluation, identity, loading, plan, run_folder
from tinymoe.training import trainer as t
from tinymoe.training.data import load_corpus

MODEL = dict(d_model=16, n_heads=2, d_ff=32, n_layers=2, moe_layers=[1], seq_len=16, n_experts=4)
TRAINING = dict(steps=6, batch_size=4, n_evaluations=3, eval_windows=2, final_windows=2)  # looks after steps 2, 4 and 6
NAMES = list(tm.Transformer(tm.ModelConfig(**MODEL, router="noisy_top_k")).parameters())
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
    arrays |= {path.name: path.read_bytes() for path in (folder / "routings").glob("*")}  # they hold no clock time
    groups = [header, summary], rows
    return arrays, *([{k: v for k, v in one.items() if not k.endswith("seconds")} for one in group] for group in groups)


def stop_after(step):
    def on_event(event):
        if event.kind == "step" and event.step == step:
            raise KeyboardInterrupt
    return on_event


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
    assert plan.TrainConfig(steps=10, n_evaluations=3).evaluation_steps() == {3, 7, 10}
    assert plan.TrainConfig(steps=2, n_evaluations=20).evaluation_steps() == {1, 2}
    assert plan.TrainConfig(steps=2, n_evaluations=2 * 10**9).evaluation_steps() == {1, 2}


def test_a_run_learns_a_text_without_surprise(tmp_path):
    (tmp_path / "abc.txt").write_text("abc" * 500)
    losses = []
    t.train(tiny("D", steps=60, learning_rate=0.01, n_evaluations=1), load_corpus(tmp_path / "abc.txt", 16), tmp_path,
            lambda event: losses.append(event.loss))
    assert len(losses) == 60 and losses[0] == pytest.approx(np.log(256), abs=0.1) and losses[-1] < 0.3


def test_a_trainer_takes_a_model_of_its_plan_alone(corpus):
    run = tiny()
    other = tm.Transformer(replace(run.model, d_ff=2 * run.model.d_ff))
    with pytest.raises(ValueError, match=f"^the model has d_ff {other.config.d_ff}, but the plan {run.model.d_ff}: "):
        t.Trainer(other, run, corpus)
    assert t.Trainer(tm.Transformer(run.model), run, corpus).parameters


def test_the_folder_of_a_run_holds_what_the_contract_says(corpus, tmp_path):
    summary = t.train(tiny(), corpus, tmp_path)
    routings = [f"routings/{step:06}.npz" for step in (0, 2, 4, 6)]
    written = [".lock", "checkpoint.npz", "config.json", "log.jsonl", *routings, "summary.json"]
    assert sorted(snapshot(tmp_path)) == written
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
    routing = loading.load_model(tmp_path).forward(ids).routings[0]
    np.testing.assert_allclose(shown["gates"][0], routing.to_dense().data, atol=1e-3)


def test_fresh_throws_saved_routings_away_and_a_dense_model_saves_none(corpus, tmp_path):
    t.train(tiny(), corpus, tmp_path)
    t.train(tiny("D", n_evaluations=2), corpus, tmp_path, fresh=True)
    assert sorted(path.name for path in (tmp_path / "routings").iterdir()) == ["000000.npz", "000003.npz", "000006.npz"]
    t.train(tiny(model={"moe_layers": []}), corpus, tmp_path, fresh=True)
    assert not (tmp_path / "routings").exists()


def test_the_number_of_threads_does_not_change_a_bit(corpus, reference, tmp_path):
    there = kernels.get_threads()
    try:
        try:
            kernels.set_threads(2)
        except ValueError:
            pytest.skip("one core, or one thread of numba")
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


@pytest.mark.parametrize("config_id, model", [
    ("A", {}), ("E", {}), ("E", {"router": "expert_threshold"}), ("D", {"router": "remoe"}),
    ("D", {"router": "momentum_bias", "losses": {"global_batch": .1}}), ("D", {"router": "quantile_bias"}),
    ("D", {"router": "top_p", "router_options": {"steer": .1}}), ("D", {"router": "oracle", "n_copy": 1})])
def test_other_routers_and_their_state_go_on_with_the_same_bits_too(corpus, tmp_path, config_id, model):
    run = tiny(config_id, model=model)
    t.train(run, corpus, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        t.train(run, corpus, tmp_path / "torn", stop_after(3))
    t.train(run, corpus, tmp_path / "torn")
    assert results(tmp_path / "torn") == results(tmp_path / "whole")


def test_the_bits_depend_on_the_seed_and_on_the_noise(corpus, reference, tmp_path, monkeypatch):
    t.train(replace(tiny(), seed=1), corpus, tmp_path / "seed")
    assert results(tmp_path / "seed")[0] != reference[0]
    real = np.random.default_rng
    monkeypatch.setattr(t.np.random, "default_rng", lambda seed=None: real([0, 3] if seed == [0, 2] else seed))
    t.train(tiny(), corpus, tmp_path / "noise")
    assert results(tmp_path / "noise")[0] != reference[0]


def test_seeds_have_weights_and_batches_of_their_own(corpus, tmp_path):
    runs = [replace(tiny(), seed=seed) for seed in (0, 1)]
    first, second = (t.Trainer(loading.first_model(run, tmp_path), run, corpus) for run in runs)
    weights = "blocks.1.feed_forward.experts.w1"
    assert (first.parameters[weights].data != second.parameters[weights].data).any()
    assert first.generators.keys() == {"data", "noise"}
    assert all(rng.random() != second.generators[name].random() for name, rng in first.generators.items())


def test_a_kill_between_log_and_checkpoint_is_made_good(corpus, reference, stopped, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_arrays", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
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
        half = stopped / files.temporary_name(name).replace(f"{os.getpid():08x}", f"{2**31 - 1:08x}")
        half.write_bytes(b"half")
        os.utime(half, (0, 0))  # where it is not seen that a process is gone, its age counts
    t.train(tiny(), corpus, stopped)
    assert results(stopped) == reference and not list(stopped.rglob("*.tinymoe"))


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_a_run_that_stops_at_any_change_of_its_folder_ends_with_the_same_bits(
        corpus, reference, tmp_path, monkeypatch, after):
    """Before or after the n-th time that a file gets its name or is removed. First another run's files are removed."""
    t.train(tiny(steps=4), corpus, tmp_path / "other")
    for stop in itertools.count(1):
        folder, left = tmp_path / str(stop), itertools.count(stop, -1)
        shutil.copytree(tmp_path / "other", folder)

        def at(function, left=left):
            def changing(*args, **options):
                last = next(left) == 1
                if after or not last:
                    function(*args, **options)
                if last:
                    raise KeyboardInterrupt
            return changing

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", at(os.replace))
            patch.setattr(pathlib.Path, "unlink", at(pathlib.Path.unlink))
            with contextlib.suppress(KeyboardInterrupt):
                t.train(tiny(), corpus, folder, fresh="once")
                break
        t.train(tiny(), corpus, folder, fresh="once")
        assert results(folder) == reference
    assert stop > 20


@pytest.mark.parametrize("seed", [-1, True, 1.5, "0", 2**64])
def test_a_seed_that_no_row_can_have_is_refused(seed):
    """Would have caught: runs with the seeds True and 2**64 that trained to their end and could not be read back."""
    with pytest.raises(ValueError, match=rf"^seed {seed!r} must be a whole number from 0 to 2\*\*64 - 1$"):
        replace(tiny(), seed=seed)


@pytest.mark.parametrize("seed", [2**33, np.int64(3)])
def test_a_run_with_any_other_seed_is_read_back(corpus, tmp_path, seed):
    run = replace(tiny(steps=2), seed=seed)
    t.train(run, corpus, tmp_path / "runs" / run.run_id)
    assert [(found.run_id, found.seed, found.summary["seed"]) for found in load_runs(tmp_path)] == [
        (f"F-seed{seed}", seed, seed)]


def test_a_finished_run_is_not_trained_again(corpus, tmp_path):
    summary = t.train(tiny(), corpus, tmp_path)
    before, when = snapshot(tmp_path), (tmp_path / "summary.json").stat().st_mtime_ns
    assert t.train(tiny(), corpus, tmp_path, stop_after(1)) == summary
    assert snapshot(tmp_path) == before and (tmp_path / "summary.json").stat().st_mtime_ns == when


# -- what a run refuses --


def test_a_finished_run_from_before_a_setting_existed_is_still_the_same_run(corpus, tmp_path):
    t.train(tiny(), corpus, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model"]["freeze"], config["model"]["norm"], config["training"]["warmup"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = snapshot(tmp_path)
    t.train(tiny(), corpus, tmp_path)
    assert snapshot(tmp_path) == before


def test_a_stopped_run_from_before_a_setting_existed_goes_on(corpus, reference, stopped):
    config = json.loads((stopped / "config.json").read_text())
    arrays, header = files.load_arrays(stopped / "checkpoint.npz", "checkpoint")
    for model in (config["model"], header["model"]):
        del model["freeze"], model["norm_eps"]
    del config["training"]["weight_decay"]
    (stopped / "config.json").write_text(json.dumps(config))
    files.save_arrays(stopped / "checkpoint.npz", arrays, header)
    t.train(tiny(), corpus, stopped)
    assert results(stopped) == reference


def throws(error):
    """A function that raises the error, whatever it is given."""
    def raising(*args, **options):
        raise error
    return raising


def refuses(error, match, run, corpus, folder):
    """train raises an error of one line that matches, and leaves every file as it was."""
    before = snapshot(folder)
    with pytest.raises(error, match=match) as caught:
        t.train(run, corpus, folder)
    assert snapshot(folder) == before and "\n" not in str(caught.value)


@pytest.mark.parametrize("other", [tiny(steps=7), tiny(model={"d_ff": 8}), replace(tiny(), seed=1)],
                         ids=["training", "model", "seed"])
def test_other_settings_in_the_same_folder(corpus, stopped, other):
    message = "other settings .*choose another --out, or start again with --fresh"
    refuses(run_folder.RunError, message, other, corpus, stopped)


def test_a_folder_without_its_config(corpus, stopped):
    """A checkpoint does not say of which text and learning rate it is."""
    (stopped / "config.json").unlink()
    message = "no config.json that says of which: move this run's folder away"
    refuses(run_folder.RunError, message, tiny(), corpus, stopped)
    assert t.train(tiny(), corpus, stopped, fresh=True)["status"] == "complete"


def test_another_text_in_the_same_folder(stopped, tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "words.txt"
    text.write_text(WORDS[::-1])
    refuses(run_folder.RunError, "corpus .* is .*, not ", tiny(), load_corpus(text, 16), stopped)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"], ids=["empty", "cut", "a list", "not text"])
def test_a_broken_config(corpus, stopped, content):
    (stopped / "config.json").write_bytes(content)
    refuses(run_folder.RunError, "config.json .*move this run's folder away", tiny(), corpus, stopped)


def test_a_folder_in_use(corpus, stopped, monkeypatch):
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: None)
    with run_folder.RunFolder(stopped).locked():
        refuses(run_folder.RunError, "is being written by another process", tiny(), corpus, stopped)
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
        kept = ({key: value for key, value in part.items() if key not in names} for part in (arrays, header))
        files.save_arrays(path, *kept)
    return cut


DAMAGE = {"truncated": lambda path: path.write_bytes(path.read_bytes()[:-2000]),
          "empty": lambda path: path.write_bytes(b""), "text": lambda path: path.write_text("no archive"),
          "a model": _model, "a stranger's arrays": _bare, "pickled": _pickled,
          "no weights": _without("p/head.weight"), "no moments": _without("m/head.weight"),
          "no generators": _without("generators"),
          "no row count": _without("n_rows")}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_checkpoint_that_is_damaged_or_foreign(corpus, stopped, damage):
    damage(stopped / "checkpoint.npz")
    refuses(files.CheckpointError, "checkpoint.npz .*", tiny(), corpus, stopped)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", None])
def test_a_torn_summary_is_written_again(corpus, tmp_path, content):
    whole, path = t.train(tiny(), corpus, tmp_path), tmp_path / "summary.json"
    path.unlink() if content is None else path.write_bytes(content)
    assert run_folder.RunFolder(tmp_path).summary() is None
    again = t.train(tiny(), corpus, tmp_path)
    assert json.loads(path.read_bytes()) == again
    assert again | {"wall_seconds": 0} == whole | {"wall_seconds": 0}  # the last evaluation is made again


def test_the_wall_clock_counts_evaluations_and_the_time_before_an_interruption(corpus, stopped):
    arrays, header = files.load_arrays(stopped / "checkpoint.npz", "checkpoint")
    files.save_arrays(stopped / "checkpoint.npz", arrays, header | {"wall_seconds": 1000.0})
    summary = t.train(tiny(), corpus, stopped)
    assert summary["wall_seconds"] > 1000 > summary["seconds"]


def test_a_changed_plan_is_recorded_and_no_reason_to_refuse_a_run(corpus, tmp_path):
    t.train(replace(tiny(), plan_hash="a"), corpus, tmp_path)
    assert t.train(replace(tiny(), plan_hash="b"), corpus, tmp_path)["steps"] == 6
    assert json.loads((tmp_path / "config.json").read_text())["plan_hash"] == "a"


def test_routings_of_an_earlier_run_are_gone(corpus, tmp_path):
    t.train(tiny(), corpus, tmp_path)
    for name in run_folder.FILES:
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "routings" / "000099.npz").touch()
    t.train(tiny(), corpus, tmp_path)
    assert not (tmp_path / "routings" / "000099.npz").exists()


def test_models_that_cannot_be_loaded(corpus, tmp_path):
    t.train(tiny(), corpus, tmp_path)
    arrays, header = files.load_arrays(tmp_path / "checkpoint.npz", "checkpoint")
    name = "p/head.weight"
    for changed, named in ((arrays[name][:1], r"has the shape \(1, 256\), not \(16, 256\)"),
                           (arrays[name] * np.nan, "is not finite")):
        files.save_arrays(tmp_path / "checkpoint.npz", arrays | {name: changed}, header)
        with pytest.raises(files.CheckpointError, match=f"head.weight {named}"):
            loading.load_model(tmp_path)
    (tmp_path / "checkpoint.npz").unlink()
    with pytest.raises(files.CheckpointError, match="has rows but no checkpoint"):
        loading.load_model(tmp_path)


@pytest.mark.parametrize("finished", [False, True])
def test_a_log_that_is_gone(corpus, stopped, finished):
    if finished:
        t.train(tiny(), corpus, stopped)
    (stopped / "log.jsonl").unlink()
    refuses(files.CheckpointError, "log.jsonl is incomplete: move this run's folder away", tiny(), corpus, stopped)


@pytest.mark.parametrize("key, value", [
    ("n_rows", 1.5), ("n_rows", "3"), ("n_rows", 0), ("step", "a"), ("step", 1.5), ("step", None), ("seconds", "a"),
    ("seconds", float("nan")), ("seconds", None), ("wall_seconds", "a"), ("generators", {}),
    ("generators", {"data": 1, "noise": 2}),
    ("optimizer_steps", {}), ("optimizer_steps", 7), ("optimizer_steps", dict.fromkeys(NAMES, 10**400)),
    ("optimizer_steps", dict.fromkeys(NAMES, -1)),
    ("model", 3), ("run_id", [1])], ids=lambda value: str(value)[:40])
def test_a_checkpoint_whose_header_is_damaged(corpus, stopped, key, value):
    arrays, header = files.load_arrays(stopped / "checkpoint.npz", "checkpoint")
    files.save_arrays(stopped / "checkpoint.npz", arrays, header | {key: value})
    refuses(files.CheckpointError, "checkpoint.npz .*move (it|this run's folder) away", tiny(), corpus, stopped)


@pytest.mark.parametrize("content", [
    '{"corpus": 1}', '{"corpus": {"words": 1}}', '{"training": 3}', '{"imports": [1]}', '{"imports": [{"path": "a"}]}',
    '{"model": [1]}'])
def test_a_config_of_the_wrong_types(corpus, stopped, content):
    (stopped / "config.json").write_text(content)
    refuses(run_folder.RunError, "config.json is not the JSON|other settings", tiny(), corpus, stopped)


@pytest.mark.parametrize("content", ['{"step": 4, "loss": NaN}', '{"step": 4, "loss": 1e999}', '{"step": "4"}', "{}"])
def test_a_row_that_no_run_writes(corpus, stopped, content):
    rows = (stopped / "log.jsonl").read_text().splitlines()
    (stopped / "log.jsonl").write_text("\n".join([*rows[:-1], content]))
    refuses(files.CheckpointError, "checkpoint.npz .*: move this run's folder away", tiny(), corpus, stopped)


def flipped(content, seed=0):
    """The content with one random bit of one byte flipped, for each of its bytes."""
    for place, bit in enumerate(np.random.default_rng(seed).integers(0, 8, len(content))):
        yield content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1:]


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    """(plan, corpus, folder) of a finished run with a checkpoint of a few kilobytes. Its text has eight letters."""
    folder = tmp_path_factory.mktemp("smallest")
    (folder / "text").write_bytes(np.random.default_rng(0).integers(0, 8, 200).astype(np.uint8).tobytes())
    model = dict(vocab_size=8, d_model=2, n_heads=1, d_ff=2, n_layers=1, moe_layers=[0], seq_len=4, n_experts=2,
                 norm="rms", bias=False, tied=True, positions="rotary")
    corpus = load_corpus(folder / "text", seq_len=4)
    plan = replace(tiny("D", steps=2, n_evaluations=1), model=tm.ModelConfig(**model))
    t.train(plan, corpus, folder / "run")
    return plan, corpus, folder / "run"


def weights_of(folder):
    return {name: p.data.tobytes() for name, p in loading.load_model(folder).parameters().items()}


@pytest.mark.slow
def test_a_checkpoint_with_a_flipped_bit_has_the_right_weights_or_is_refused(smallest, tmp_path):
    """In every fourth byte; in the long form of the tests in every byte."""
    content, right, refused = (smallest[2] / "checkpoint.npz").read_bytes(), weights_of(smallest[2]), 0
    every = 1 if os.environ.get("TINYMOE_TESTS") == "long" else 4
    for damaged in itertools.islice(flipped(content), 0, None, every):
        (tmp_path / "checkpoint.npz").write_bytes(damaged)
        refused += 1
        with one_line():
            assert weights_of(tmp_path) == right
            refused -= 1
    assert refused > len(content) / every / 2


@pytest.mark.slow
def test_a_header_with_a_flipped_bit_has_the_right_weights_or_is_refused(smallest, tmp_path):
    """As if the checksum did not see it: the rest of the checkpoint is written around the damaged header."""
    folder = smallest[2]
    arrays, header = files.load_arrays(folder / "checkpoint.npz", "checkpoint")
    right = weights_of(folder)
    for number, damaged in enumerate(flipped(json.dumps(header).encode())):
        np.savez(tmp_path / "checkpoint.npz", **arrays, __header__=np.array(damaged.decode(errors="replace")))
        with one_line():
            assert weights_of(tmp_path) == right
        if number % 7 == 0:  # a run takes some milliseconds
            train_with(smallest, tmp_path / "run", "checkpoint.npz", (tmp_path / "checkpoint.npz").read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "summary.json"])
def test_rows_with_a_flipped_bit_are_used_or_refused(smallest, tmp_path, name, finished):
    content = (smallest[2] / name).read_bytes()
    for damaged in itertools.islice(flipped(content), 0, None, 7):
        train_with(smallest, tmp_path / "run", name, damaged, finished)


def train_with(smallest, run, name, damaged, finished=False):
    """Train in a copy of the run with a damaged file: it goes on, or says in one line what is wrong."""
    plan, corpus, folder = smallest
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder, run)
    if not finished:
        (run / "summary.json").unlink()
    (run / name).write_bytes(damaged)
    with one_line():
        assert t.train(plan, corpus, run)["status"] == "complete"


@contextlib.contextmanager
def one_line():
    """What is inside works, or raises one of the two errors with one line."""
    try:
        yield
    except (run_folder.RunError, files.CheckpointError) as error:
        assert len(files.printable(error).splitlines()) == 1


# -- what a run leaves alone --


@pytest.mark.parametrize("fresh", [False, True])
def test_files_of_the_user_are_kept_and_leftovers_of_a_crash_removed(corpus, stopped, fresh):
    kept = [".notes.txt", ".keep.d/a.txt", ".log.jsonl.txt", "log.jsonl.bak", "routings/notes.npz",
            "routings/.000002.npz", ".config.json.backup12", ".tinymoe"]
    gone = [f"{name}.{8 * letter}.tinymoe" for letter in "0a"
            for name in (".log.jsonl", ".checkpoint.npz", "routings/.000002.npz")]
    for name in kept + gone:
        (stopped / name).parent.mkdir(exist_ok=True)
        (stopped / name).write_text("mine")
    t.train(tiny(), corpus, stopped, fresh=fresh)
    assert all((stopped / name).read_text() == "mine" for name in kept)
    assert not any((stopped / name).exists() for name in gone)


@pytest.mark.parametrize("step", [1, 6])
def test_a_folder_that_vanishes_is_not_made_again(corpus, tmp_path, step):
    def vanish(event):
        if event.step == step:
            shutil.rmtree(tmp_path / "run")
    with pytest.raises(run_folder.RunError, match="run vanished while the run was training: run the same command"):
        t.train(tiny(), corpus, tmp_path / "run", vanish)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("deleted", [".lease1", "config.json", "a temporary file", "all"])
def test_a_run_whose_files_are_being_deleted_says_so(corpus, tmp_path, monkeypatch, deleted):
    """At whatever write it notices. Would have caught: advice to make room, since the folder itself was still there."""
    folder, rename = tmp_path / "run", os.replace

    def noticed(at):
        count = itertools.count()

        def delete(source, target):
            if next(count) == at:
                path = {"all": folder, "a temporary file": pathlib.Path(source)}.get(deleted, folder / deleted)
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            rename(source, target)

        monkeypatch.setattr(os, "replace", delete)
        try:
            t.train(tiny(), corpus, folder)
        except (run_folder.RunError, run_folder.Busy) as error:
            return str(error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    said = list(filter(None, map(noticed, range(12))))
    assert len(said) >= 6 and all("vanished" in message for message in said)


def test_a_lock_file_is_not_emptied(corpus, tmp_path):
    (tmp_path / ".lock").write_text("something")
    t.train(tiny(), corpus, tmp_path)
    assert (tmp_path / ".lock").read_text() == "something"


def test_a_finished_run_needs_no_lock(corpus, tmp_path, monkeypatch):
    """So a study that is finished can be read from a read-only folder."""
    summary = t.train(tiny(), corpus, tmp_path)
    monkeypatch.setattr(run_folder.os, "open", throws(OSError(30, "Read-only file system")))
    assert t.train(tiny(), corpus, tmp_path) == summary
    with pytest.raises(run_folder.RunError, match="other settings"):
        t.train(tiny(steps=7), corpus, tmp_path)


@pytest.mark.skipif(run_folder.fcntl is None, reason="no locks here")
def test_a_file_system_without_locks_has_a_remedy(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.fcntl, "flock", throws(OSError(95, "Operation not supported")))
    message = r"cannot be locked \(Operation not supported\): choose another --out, or set TINYMOE_NO_LOCK=1"
    with pytest.raises(run_folder.RunError, match=message):
        t.train(tiny(), corpus, tmp_path)
    monkeypatch.setenv("TINYMOE_NO_LOCK", "1")
    assert t.train(tiny(), corpus, tmp_path)["status"] == "complete"


# -- what is recorded --


def test_every_computed_term_of_the_loss_is_logged(corpus, tmp_path):
    t.train(tiny("D"), corpus, tmp_path / "plain")
    names = {"train_loss", "cross_entropy", "balance", "z", "gradient_norm"}
    assert names <= files.read_rows(tmp_path / "plain" / "log.jsonl")[-1].keys()
    more = ("importance", "load", "sequence", "multi_token")
    t.train(tiny("F", model={"losses": dict.fromkeys(more[:3], 0.1), "mtp_coef": 0.1}), corpus, tmp_path / "more")
    rows = files.read_rows(tmp_path / "more" / "log.jsonl")
    assert all(row[name] > 0 for row in rows[1:] for name in more)
    for row in rows[1:]:  # the mean of the total is the total of the means
        total = row["cross_entropy"] + 0.01 * row["balance"] + sum(0.1 * row[name] for name in more)
        assert row["train_loss"] == pytest.approx(total, rel=1e-5)
    t.train(tiny("D", model={"moe_layers": []}), corpus, tmp_path / "dense")
    dense = files.read_rows(tmp_path / "dense" / "log.jsonl")[-1]
    assert dense["balance"] is dense["z"] is None and dense["train_loss"] > 0


def test_a_run_records_its_kernels_and_is_not_resumed_with_others(corpus, stopped):
    config = json.loads((stopped / "config.json").read_text())
    assert config["kernels"] in ("numba", "numpy") and config["imports"] == []
    (stopped / "config.json").write_text(json.dumps(config | {"kernels": "others"}))
    refuses(run_folder.RunError, "kernels is others, not", tiny(), corpus, stopped)


def own_router(folder, number):
    """A file that defines a router as the user's own, and a run with it."""
    path = folder / "own.py"
    path.write_text(f"""
import tinymoe as tm

class Own(tm.routers.TopK, name="own_{number}"):
    pass
""")
    return path, {"router": f"own_{number}"}


def forget(router):
    """What this process knows of a user's router and its file, which the list of imported files still has."""
    del tm.routers.ROUTERS[router]
    identity.execute_files.cache_clear()
    user_files.IMPORTED.clear()


def test_a_run_records_and_loads_the_users_routers(corpus, tmp_path):
    path, model = own_router(tmp_path, 1)
    digest = identity.execute_files((path,))[0]["sha256"]
    plan = replace(tiny("D", model=model), imports=(path,))
    with pytest.raises(KeyboardInterrupt):
        t.train(plan, corpus, tmp_path / "run", stop_after(3))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["imports"] == [{"path": str(path), "sha256": digest}]
    forget("own_1")  # as in another process
    assert loading.load_model(tmp_path / "run").config == plan.model
    forget("own_1")
    assert '"own_1"' in view.page(tmp_path / "run")  # of saved routings, without the model
    path.write_text(path.read_text() + "# changed\n")
    forget("own_1")
    with pytest.raises(files.CheckpointError, match="own.py has changed since this run"):
        loading.load_model(tmp_path / "run")
    assert "own_1" not in tm.routers.ROUTERS  # a changed file is not executed
    with pytest.raises(run_folder.RunError, match="import own.py is .*, not .*--fresh"):
        t.train(plan, corpus, tmp_path / "run")
    path.unlink()
    identity.execute_files.cache_clear()
    with pytest.raises(run_folder.RunError, match="cannot import .*own.py"):
        t.train(plan, corpus, tmp_path / "run")


def test_a_run_folder_brings_no_code_along(corpus, stopped):
    """As one of a stranger would, with the hash that fits."""
    code = f"open({str(stopped / 'executed')!r}, 'w')"
    (stopped / "evil.py").write_text(code)
    recorded = {"path": str(stopped / "evil.py"), "sha256": hashlib.sha256(code.encode()).hexdigest()}
    config = json.loads((stopped / "config.json").read_text())
    (stopped / "config.json").write_text(json.dumps(config | {"imports": [recorded]}))
    for load in (loading.load_model, loading.execute_recorded_of):
        with pytest.raises(files.CheckpointError, match="evil.py is not in the list of imported files, .*--import"):
            load(stopped)
    assert not (stopped / "executed").exists()


def test_a_file_that_was_imported_once_is_known_to_later_processes(tmp_path, monkeypatch):
    """A list that cannot be written is no error, and then counts in its own process alone."""
    monkeypatch.setattr(user_files, "LIST", tmp_path / "cache/imports")
    path, other = own_router(tmp_path, 3)[0], tmp_path / "other.py"
    digest = user_files.load_file(path)
    monkeypatch.setattr(user_files, "IMPORTED", set())
    assert user_files.imported_before(digest) and not user_files.imported_before("0" * 64)
    del tm.routers.ROUTERS["own_3"]
    user_files.load_file(path)
    assert user_files.LIST.read_text() == f"{digest}\n"
    monkeypatch.setattr(user_files, "LIST", path / "imports")  # within a file
    other.write_text("x = 1")
    assert user_files.imported_before(user_files.load_file(other))
    monkeypatch.setattr(user_files, "IMPORTED", set())
    assert not user_files.imported_before(digest)
    del tm.routers.ROUTERS["own_3"]


def test_two_imported_files_of_one_name_both_count():
    """In any order. Would have caught: a change of the first that no command noticed."""
    first, second, changed = ({"path": f"/{folder}/own.py", "sha256": sha256 * 16} for folder, sha256 in (
        ("a", "1111"), ("b", "2222"), ("a", "3333")))
    want = {"own.py": "111111111111 and 222222222222"}
    assert identity.imports_of({"imports": [first, second]}) == want
    assert identity.imports_of({"imports": [second, first]}) == want
    assert identity.imports_of({"imports": [changed, second]}) != want
    assert identity.imports_of({"imports": [first]}) == {"own.py": "1" * 12}


def test_a_file_that_was_moved_and_imported_again_opens_its_runs(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(user_files, "LIST", tmp_path / "cache/imports")
    monkeypatch.setattr(user_files, "IMPORTED", set())
    path, model = own_router(tmp_path, 4)
    user_files.load_file(path)
    t.train(replace(tiny(model=model), imports=(str(path),)), corpus, tmp_path / "run")
    (tmp_path / "new").mkdir()
    path.rename(tmp_path / "new" / path.name)
    assert loading.load_model(tmp_path / "run").config.router == "own_4"  # this process has imported it
    monkeypatch.setattr(user_files, "IMPORTED", set())
    with pytest.raises(files.CheckpointError, match="cannot be used"):
        loading.load_model(tmp_path / "run")
    user_files.load_file(tmp_path / "new" / path.name)
    assert loading.load_model(tmp_path / "run").config.router == "own_4"
    del tm.routers.ROUTERS["own_4"]


def test_a_run_without_a_row_gives_way_to_one_with_other_settings(tmp_path, corpus, monkeypatch):
    """Nothing was trained, so nothing is lost; --fresh would delete the finished runs of the same command."""
    def stop(self, folder):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(t.Trainer, "evaluate_and_save", stop)
        t.train(tiny(), corpus, tmp_path)
    assert (tmp_path / "config.json").exists() and not (tmp_path / "log.jsonl").exists()
    assert t.train(tiny(learning_rate=0.5), corpus, tmp_path)["status"] == "complete"
    with pytest.raises(run_folder.RunError, match="other settings"):
        t.train(tiny(), corpus, tmp_path)


@pytest.mark.parametrize("imports", [3, [3], [{}], [{"path": 3, "sha256": ""}], [{"path": "/a\0", "sha256": ""}],
                                     [{"path": "/nowhere.py", "sha256": ""}], {"path": "a"}], ids=str)
def test_recorded_imports_of_the_wrong_types(stopped, imports):
    (stopped / "config.json").write_text(json.dumps({"imports": imports}))
    with pytest.raises(files.CheckpointError, match="config.json names files to import that cannot be used"):
        loading.load_model(stopped)


@pytest.mark.parametrize("key, value", [("n_layers", 9999), ("vocab_size", 4 * 10**7), ("n_experts", 2**30)])
def test_a_header_of_a_huge_model_takes_no_memory(stopped, key, value):
    arrays, header = files.load_arrays(stopped / "checkpoint.npz", "checkpoint")
    header["model"][key] = value
    files.save_arrays(stopped / "checkpoint.npz", arrays, header)
    with pytest.raises(files.CheckpointError, match="the file holds"):
        loading.load_model(stopped)


def test_more_than_256_domains_keep_their_numbers(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(260):
        (tmp_path / "texts" / f"{i:03}").write_text(f"{i:03} " * 20)
    corpus = load_corpus(tmp_path / "texts", seq_len=16)
    t.train(tiny("D", steps=1, n_evaluations=1, eval_windows=1, final_windows=1), corpus, tmp_path / "run")
    shown, header = files.load_arrays(tmp_path / "run" / "routings" / "000001.npz", "routings")
    assert shown["domain"].tolist() == list(range(260)) and header["names"][259] == "259"


def test_the_divergence_of_the_weights_is_relative_to_that_of_fresh_experts(corpus, tmp_path):
    t.train(tiny("D"), corpus, tmp_path)
    (layer,) = files.read_rows(tmp_path / "log.jsonl")[0]["layers"]
    assert layer["weight_divergence"] == pytest.approx(1, abs=1e-9)


def test_the_final_evaluation_has_its_own_number_of_windows(corpus, tmp_path):
    summary = t.train(tiny("D", eval_windows=1, final_windows=2), corpus, tmp_path)
    rows = [files.read_rows(tmp_path / "log.jsonl")[-1], summary["final"]]
    assert [row["validation_tokens"] for row in rows] == [16, 32]


# -- losses that are not finite --


@pytest.mark.parametrize("steps, n_evaluations", [(6, 3), (3, 3), (1, 1)],
                         ids=["in training", "at an evaluation", "at the end"])
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
    class Poisoned(tm.Transformer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.blocks[1].norm2.weight.data[:] = 1e4  # finite, but these two make the experts overflow
            self.blocks[1].feed_forward.experts.w2.data[:] = 1e38
    monkeypatch.setattr(loading, "Transformer", Poisoned)
    with pytest.raises(t.NonFiniteLoss, match="beginning in layer 1"):
        t.train(tiny("D"), corpus, tmp_path)


# -- from another run --

def dense_and_after(**changes):
    dense = replace(tiny("A", model={"moe_layers": []}), config_id="dense")
    return dense, replace(tiny("D", model={"activation": "gelu"}), config_id="up", start="dense", **changes)


def test_a_run_starts_as_the_other_ended(corpus, tmp_path):
    dense, up = dense_and_after()
    t.train(dense, corpus, tmp_path / dense.run_id)
    trained, model = loading.load_model(tmp_path / dense.run_id), loading.first_model(up, tmp_path)
    ids = corpus.validation(1, 16)[0]
    np.testing.assert_allclose(model.forward(ids).logits.data, trained.forward(ids).logits.data, atol=1e-5)
    assert t.train(up, corpus, tmp_path / up.run_id)["status"] == "complete"
    again = loading.first_model(replace(dense, config_id="on", start="dense"), tmp_path)  # the same model goes on
    assert all((p.data == trained.parameters()[name].data).all() for name, p in again.parameters().items())


def test_a_run_whose_start_is_missing_says_so_and_one_of_another_start_is_another(corpus, tmp_path):
    dense, up = dense_and_after()
    with pytest.raises(run_folder.RunError, match="not finished"):
        t.train(up, corpus, tmp_path / up.run_id)
    t.train(dense, corpus, tmp_path / dense.run_id)
    t.train(up, corpus, tmp_path / up.run_id)
    with pytest.raises(run_folder.RunError, match="start is dense, not None"):
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


def test_a_continued_run_draws_new_batches(corpus, tmp_path):
    dense, up = dense_and_after()
    t.train(dense, corpus, tmp_path / dense.run_id)
    trainers = [t.Trainer(loading.first_model(run, tmp_path), run, corpus) for run in (dense, up)]
    batches = [trainer.generators["data"].random() for trainer in trainers]
    assert batches[0] != batches[1]


def test_seeds_have_upcycled_routers_of_their_own(corpus, tmp_path):
    weights = []
    for seed in (0, 1):
        dense, up = (replace(run, seed=seed) for run in dense_and_after())
        t.train(dense, corpus, tmp_path / dense.run_id)
        weights.append(loading.first_model(up, tmp_path).moe_parts()[0].router.weight.data)
    assert (weights[0] != weights[1]).any()


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
        loading.load_model(stopped)


@pytest.mark.parametrize("bad", [
    dict(steps=0), dict(steps=1.5), dict(steps=True), dict(batch_size="4"), dict(learning_rate="fast"),
    dict(learning_rate=0), dict(learning_rate=float("nan")), dict(warmup="long"), dict(warmup=2),
    dict(weight_decay="much"), dict(weight_decay=-1), dict(max_norm=0), dict(max_norm=float("nan"))], ids=str)
def test_training_settings_that_make_no_run(bad):
    (name, value), = bad.items()
    with pytest.raises(ValueError, match=f"{name} .*{value}"):
        plan.TrainConfig(**bad)


def test_a_loss_is_the_mean_over_domains_and_is_kept_by_stretches_of_text():
    """Three windows of domain a at 1, 2 and 3 nats, one of domain b at 6: the mean is (2 + 6) / 2 = 4, not 12 / 4."""
    nats = np.array([1.0, 6.0, 2.0, 3.0])[:, None] * np.ones((1, 5))
    ids = np.zeros((4, 5), int)
    valid = evaluation.Validation(ids, ids, np.array([0, 1, 0, 0]), ("a", "b"), 2)
    assert evaluation._loss_numbers("val", nats, valid)["val_cross_entropy"] == 4
    assert evaluation.losses_by_part(nats, valid) == {"a": [1, 2, 3], "b": [6]}
    many = evaluation.Validation(np.zeros((50, 1)), None, np.zeros(50, int), ("a",), 2)
    parts = evaluation.losses_by_part(np.arange(50.0)[:, None], many)["a"]
    assert len(parts) == evaluation.N_STRETCHES and parts[:3] == [1, 4, 6.5]  # windows 0 to 2, 3 to 5, 6 and 7


def test_a_loss_of_ln_8_is_a_perplexity_of_8_and_3_bits():
    ids = np.zeros((1, 5), int)
    valid = evaluation.Validation(ids, ids, np.zeros(1, int), ("a",), 1)
    found = evaluation._loss_numbers("val", np.full((1, 5), np.log(8)), valid)
    assert [found[f"val_{name}"] for name in ("perplexity", "bits_per_byte")] == pytest.approx([8, 3])


def test_the_stretches_of_text_have_the_causal_loss(corpus, tmp_path):
    summary = t.train(tiny("E"), corpus, tmp_path)
    mean = np.mean([np.mean(losses) for losses in summary["causal_by_part"].values()])
    assert mean == pytest.approx(summary["final"]["causal_cross_entropy"], abs=1e-5)
    assert abs(mean - summary["final"]["val_cross_entropy"]) > 1e-4  # E is not causal


# -- what a step does with the plan --

def trainer_of(corpus, config_id="F", **training):
    run = tiny(config_id, **training)
    return t.Trainer(tm.Transformer(run.model, run.seed), run, corpus)


def test_gradients_are_clipped_to_the_norm_of_the_plan(corpus):
    trainer = trainer_of(corpus, max_norm=1e-3)
    trainer.advance()
    norm = sum(float((p.grad.astype(float) ** 2).sum()) for p in trainer.parameters.values() if p.grad is not None)
    assert norm ** 0.5 == pytest.approx(1e-3, rel=1e-4) and trainer.since_row[-1]["gradient_norm"] > 1e-2


def test_the_optimizer_has_the_weight_decay_of_the_plan(corpus):
    """Decay holds for matrices of linear layers, router and experts, and for nothing else."""
    trainer = trainer_of(corpus, weight_decay=0.25)
    assert trainer.optimizer.weight_decay == 0.25
    decayed = {"blocks.1.feed_forward.router.weight", "blocks.1.feed_forward.router.noise",
               "blocks.1.feed_forward.experts.w1", "blocks.1.feed_forward.experts.w2",
               "blocks.0.feed_forward.up.weight", "blocks.0.feed_forward.down.weight", "head.weight",
               *(f"blocks.{i}.attention.{name}.weight" for i in (0, 1) for name in ("query", "key", "value", "out"))}
    assert set(trainer.parameters) - trainer.optimizer.no_decay == decayed


def test_a_row_holds_means_over_the_steps_since_the_row_before(corpus, tmp_path):
    losses = []
    t.train(tiny(), corpus, tmp_path, lambda event: losses.append(event.loss) if event.kind == "step" else None)
    rows = files.read_rows(tmp_path / "log.jsonl")
    assert [row["cross_entropy"] for row in rows[1:]] == pytest.approx([sum(losses[i:i + 2]) / 2 for i in (0, 2, 4)])
