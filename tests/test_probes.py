"""The probes find what is known: leaks, dependence on the batch, terms without gradient, collapsed routing."""

import json

import numpy as np
import pytest

import published
from tinymoe import ModelConfig, Transformer
from tinymoe.moe import metrics, routers
from tinymoe.study import probes

IDS = np.random.default_rng(0).integers(0, 11, (4, 8))
TARGETS = (IDS + 3) % 11


def model(router="top_k", scale=30, **changes):
    """A small model whose routers are decided."""
    m = Transformer(ModelConfig(**dict(vocab_size=11, n_layers=2, d_model=8, n_heads=2, d_ff=8, seq_len=8,
                                       moe_layers=(0, 1),
                                       n_experts=4, router=router, top_k=1) | changes), seed=2)
    for p in m.parameters().values():
        p.data = (p.data * scale if p.ndim > 1 and p.requires_grad else p.data).astype(np.float32)
    return m


@pytest.mark.parametrize("changes, evaluated, trained", [
    (dict(), False, False), (dict(router="noisy_top_k"), False, False), (dict(router="hash"), False, False),
    (dict(router="expert_choice"), True, True), (dict(router="sinkhorn"), False, True),
    (dict(router="base_assignment"), False, True), (dict(router="sequence"), False, False),
    (dict(router="sequence", router_options=dict(sequence_pool="mean")), True, True),
    (dict(capacity_factor=.5, drop_policy="gate"), True, True)])
def test_who_leaks(changes, evaluated, trained):
    m = model(**changes)
    assert (probes.causality(m, IDS).tokens > 0) == evaluated
    assert (probes.causality(m, IDS, training=True).tokens > 0) == trained
    if evaluated:
        assert probes.causality(m, IDS).logits > 1e-4
        assert probes.causality(m, IDS, causal=True).tokens == 0


@pytest.mark.parametrize("changes, depends",
                         [(dict(), False), (dict(router="expert_choice"), True), (dict(router="sequence"), False),
                                              (dict(capacity_factor=.5, drop_policy="gate"), True)])
def test_who_depends_on_the_batch(changes, depends):
    found = probes.batch_independence(model(**changes), IDS)
    assert (found["other neighbours"].tokens > 0) == depends and (found["other neighbours"].logits > 1e-4) == depends
    assert depends or found["alone"].logits < 1e-4


def test_leak_in_loss_is_zero_for_the_causal_and_not_for_expert_choice():
    assert probes.leak_in_loss(model(), IDS, TARGETS) == 0
    assert abs(probes.leak_in_loss(model("expert_choice"), IDS, TARGETS)) > 1e-3


@pytest.mark.parametrize("changes, zero", [
    (dict(), set()), (dict(router_options=dict(renormalise=True)), {"cross_entropy"}),
    (dict(router="hash"), {"cross_entropy", "balance", "z"}),
    (dict(router="frozen"), {"cross_entropy", "balance", "z"})])
def test_gradient_path(changes, zero):
    """A renormalised top-1 gate is the constant 1: the text teaches its router nothing."""
    found = probes.gradient_path(model(scale=5, **changes), IDS, TARGETS)
    assert {term for term, (_, norm) in found.items() if norm == 0} == zero
    assert found["balance"][0] == .01 and found["z"][0] == 0  # and the norm of z is that at coefficient 1


def test_only_an_unbalanced_choice_beats_the_exact_assignment():
    short = probes.assignment_shortfall(model(), IDS)
    assert short["best expert"] < 0 <= short["greedy"] and short["Sinkhorn"] > short["best expert"]


def test_alarms():
    router = routers.make("top_k", 3, 4)
    router.weight.grad = np.ones((3, 4), np.float32)
    # K = 1 and K = E
    assert metrics.alarms(0, [5, 5, 5, 5], 20, router) == [] == metrics.alarms(0, [20] * 4, 20, router)
    assert metrics.alarms(3, [96, 2, 2, 0], 100,
                          router) == ["layer 3: 1 of 4 experts dead (under 1% of their fair share)",
                                                           "layer 3: expert 0 serves 96% of the tokens"]
    # K = 2
    assert metrics.alarms(3, [100, 40, 30, 30], 100, router) == ["layer 3: expert 0 serves 100% of the tokens"]
    router.weight.grad[:] = 0
    assert metrics.alarms(1, [1, 1, 1, 1], 4, router) == ["layer 1: the router's gradient is exactly zero"]
    assert metrics.alarms(1, [1, 1, 1, 1], 4, None) == [] == metrics.alarms(1, [2, 2], 4,
                                                                            routers.make("random", 3, 2, 1))


@pytest.mark.parametrize("routers_, which", [
    (["top_k", "expert_choice"], {1}), (["expert_choice", "top_k"], {0}), (["hash", "top_k"], set())])
def test_a_leak_is_of_the_layer_that_chooses(routers_, which):
    """A leak of layer 0 changes the states that layer 1 sees, and so its choices, but not by its own router."""
    m = model(router=routers_)
    found = probes.layer_reports(m, IDS)
    assert {r.layer for r in found if r.leaks[0] > 0} == which
    assert [r.declared for r in found] == [(name != "expert_choice",) * 2 for name in routers_]
    assert (probes.causality(m, IDS).tokens > 0) == bool(which)
    assert all(part.change_routing is None for part in m.moe_parts())
    leaking = [a for a in probes.alarms(m, found, IDS, TARGETS) if "leaks" in a]
    assert [a.split(":")[0] for a in leaking] == [f"layer {i}" for i in which]


def test_a_leak_of_training_alone():
    found = probes.layer_reports(model(router="base_assignment"), IDS)
    assert all(r.leaks[0] == 0 < r.leaks[1] and r.declared == (True, False) for r in found)
    assert "layer 0: base_assignment leaks while training, not when it is evaluated" in found[0].warnings()[0]


def test_what_a_report_says():
    """Loads 8, 8, 0, 0 have the entropy ln 2, as two equal experts; 4, 2, 1, 1 have 1.75 ln 2, as 2^1.75 experts."""
    def report(load, leaks=(0, 0), declared=(True, True)):
        return probes.LayerReport(3, "mine", declared, leaks, np.array(load), 0.0)

    assert report([8, 8, 0, 0]).effective == pytest.approx(2) and report([8, 8, 0, 0]).dead == 2
    assert report([4, 2, 1, 1]).effective == pytest.approx(2**1.75) and report([0, 0]).effective == 0
    assert report([1, 1, 1, 1]).warnings() == []
    assert report([9, 0, 0, 0]).warnings() == [
        "layer 3: the load collapses: it is as uneven as if 1.0 of 4 experts shared all tokens equally"]
    assert report([1, 1], leaks=(.25, .5)).warnings() == [
        "layer 3: mine leaks: later tokens change the experts of 25.0% of the earlier tokens, although it is declared "
        "causal"]
    assert report([1, 1], leaks=(0, .5), declared=(True, False)).warnings() == [
        "layer 3: mine leaks while training, not when it is evaluated: later tokens change the experts of 50.0% of "
        "the earlier tokens"]
    assert report([1, 1], declared=(False, False)).warnings() == [
        "layer 3: mine is declared not causal, but no leak was found with these tokens"]


def test_weights_are_probed_with_bytes_or_ids(tmp_path):
    """13 ids give windows of 6; only a vocabulary of 256 is of bytes; random ids where nothing is given."""
    model().save(tmp_path / "small.npz")
    model(vocab_size=256).save(tmp_path / "bytes.npz")
    model(moe_layers=()).save(tmp_path / "dense.npz")
    (tmp_path / "ids.txt").write_text("0 1 2 3 4 5, 6 7 8\n9 10 0 1")
    np.save(tmp_path / "ids.npy", np.arange(6, dtype=np.uint8))
    (tmp_path / "words.txt").write_text("one two three " * 20)
    found = probes.loaded(tmp_path / "small.npz", ids=tmp_path / "ids.txt")
    np.testing.assert_array_equal(found.ids, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 0]])
    np.testing.assert_array_equal(found.targets, [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 1]])
    np.testing.assert_array_equal(probes.loaded(tmp_path / "small.npz", ids=tmp_path / "ids.npy").ids, [[0, 1], [2, 3]])
    found = probes.loaded(tmp_path / "small.npz")
    assert found.ids.shape == (8, 8) and "random ids" in found.about and found.ids.max() < 11
    found = probes.loaded(tmp_path / "bytes.npz", text=tmp_path / "words.txt")
    assert "bytes of text" in found.about and bytes(found.ids[0].tolist()).decode() in "one two three " * 3
    for wrong in ("1 2 3", "1 2 3 4 5 11", "1 2 3 4 5 -1", "1 2 3 4 5 x", "1 2 3 4 5 0.5"):
        (tmp_path / "wrong.txt").write_text(wrong)
        with pytest.raises(ValueError, match="--ids .*wrong.txt must hold"):
            probes.loaded(tmp_path / "small.npz", ids=tmp_path / "wrong.txt")
    np.save(tmp_path / "wrong.npy", np.ones(9))
    (tmp_path / "small.npz").with_name("zip.npy").write_bytes((tmp_path / "small.npz").read_bytes())
    (tmp_path / "torn.npy").write_bytes(b"PK and no more")
    for path, options, message in (*(("small.npz", dict(ids=tmp_path / f"{name}.npy"), "must hold whole numbers")
                                     for name in ("wrong", "zip", "torn")),
                                   ("small.npz", dict(text=tmp_path / "words.txt"), "11 tokens are not bytes"),
                                   ("dense.npz", {}, "no layer with experts")):
        with pytest.raises(ValueError, match=message):
            probes.loaded(tmp_path / path, **options)


def test_a_model_that_overflows_is_not_probed(tmp_path):
    """Would have caught: losses and gradients printed as nan."""
    large = model(vocab_size=256)
    for p in large.parameters().values():
        p.data[...] *= 1e38
    large.save(tmp_path / "large.npz")
    with pytest.raises(ValueError, match="large.npz: the numbers of this model are not finite"):
        probes.loaded(tmp_path / "large.npz")


def test_published_weights_are_probed(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    config = published.CONFIGS["olmoe"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.save_file(published.tensors(config), tmp_path / "model.safetensors")
    found = probes.loaded(tmp_path)
    assert "published weights: top_k; 8 sequences of 12 random ids" in found.about
    reports = probes.layer_reports(found.model, found.ids)
    assert [(r.layer, r.leaks, len(r.load), r.load.sum()) for r in reports] == [
        (i, (0, 0), 6, 8 * 12 * 3) for i in (0, 1)]


def test_every_router_can_be_probed():
    for name in routers.ROUTERS:
        m, domain = model(name), np.arange(len(IDS))
        assert probes.batch_independence(m, IDS, domain).keys() == {"alone", "other neighbours"}
        assert isinstance(probes.gradient_path(m, IDS, TARGETS, domain)["cross_entropy"][1], float)
        assert all(p.grad is None for p in m.parameters().values())
