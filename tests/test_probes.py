"""The probes find what is known: leaks, dependence on the batch, terms without gradient, collapsed routing."""

import numpy as np
import pytest

from tinymoe import ModelConfig, Tensor, Transformer
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
        if changes.get("router") != "noisy_top_k":
            assert probes.causality(m, IDS, causal=True).tokens == 0


@pytest.mark.parametrize("changes, depends",
                         [(dict(), False), (dict(router="expert_choice"), True), (dict(router="sequence"), False),
                                              (dict(capacity_factor=.5, drop_policy="gate"), True)])
def test_who_depends_on_the_batch(changes, depends):
    found = probes.batch_independence(model(**changes), IDS)
    assert (found["other neighbours"].tokens > 0) == depends and (found["other neighbours"].logits > 1e-4) == depends
    assert depends or found["alone"].logits < 1e-4


def test_flattery_is_zero_for_the_causal_and_not_for_expert_choice():
    assert probes.flattery(model(), IDS, TARGETS) == 0
    assert abs(probes.flattery(model("expert_choice"), IDS, TARGETS)) > 1e-3


@pytest.mark.parametrize("changes, zero", [
    (dict(), set()), (dict(router_options=dict(renormalise=True)), {"cross_entropy"}),
    (dict(router="hash"), {"cross_entropy", "balance", "z"}),
    (dict(router="frozen"), {"cross_entropy", "balance", "z"})])
def test_gradient_path(changes, zero):
    """A renormalised top-1 gate is the constant 1: the text teaches its router nothing."""
    found = probes.gradient_path(model(scale=5, **changes), IDS, TARGETS)
    assert {term for term, (_, norm) in found.items() if norm == 0} == zero
    assert found["balance"][0] == .01 and found["z"][0] == 1


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


def test_every_router_can_be_probed():
    for name in routers.ROUTERS:
        m, domain = model(name), np.arange(len(IDS))
        assert probes.batch_independence(m, IDS, domain).keys() == {"alone", "other neighbours"}
        assert isinstance(probes.gradient_path(m, IDS, TARGETS, domain)["cross_entropy"][1], float)
        assert all(p.grad is None for p in m.parameters().values() if isinstance(p, Tensor))
