"""Routers: gates by hand, ties, noise, equal load, causality, and where their gradient comes from."""
import numpy as np
import pytest

import naive
from tinymoe import ModelConfig, Tensor, Transformer, gradcheck
from tinymoe.autograd import functional as F
from tinymoe.moe import routers
from tinymoe.moe.routers import RouteContext

EVALUATION = RouteContext()
NAMES = ["top_k", "noisy_top_k", "expert_choice"]          # those of the study
P = np.array([[.5, .3, .2],
              [.1, .6, .3],
              [.2, .2, .6]])


def route(p, name="top_k", k=1, context=EVALUATION, **options):
    """The Routing of a router whose probabilities are exactly known: identity weights, log p as the state."""
    p = np.array(p, float)
    router = routers.make(name, p.shape[1], p.shape[1], k, dtype=np.float64, **options)
    router.weight.data = np.eye(p.shape[1])
    return router(Tensor(np.log(p)), context)


def states(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def trained(name, d, e, k, seed=0, scale=1.0, **options):
    """A float64 router with weights large enough to decide, and its state as at the start."""
    router = routers.make(name, d, e, k, dtype=np.float64, **options)
    for i, p in enumerate(p for p in router.parameters().values() if p.requires_grad):
        p.data = scale * states(*p.shape, seed=[seed, i])
    return router


@pytest.mark.parametrize("name, k, options, gates", [
    ("top_k", 1, {}, [[.5, 0, 0], [0, .6, 0], [0, 0, .6]]),                         # as they are
    ("top_k", 1, {"renormalise": True}, np.eye(3)),
    ("top_k", 2, {}, [[.625, .375, 0], [0, 2/3, 1/3], [.25, 0, .75]]),              # token 2: .2 ties .2, expert 0 wins
    ("top_k", 2, {"renormalise": False}, [[.5, .3, 0], [0, .6, .3], [.2, 0, .6]]),  # Grok-1
    ("top_k", 3, {}, P),                                                            # K = E
    ("noisy_top_k", 2, {}, [[.625, .375, 0], [0, 2/3, 1/3], [.25, 0, .75]]),        # no noise at evaluation
    ("expert_choice", 1, {}, [[.5, 0, 0], [0, .6, 0], [0, 0, .6]]),                 # C = 1: the largest of each column
    ("expert_choice", 2, {}, [[.5, .3, 0], [0, .6, .3], [.2, 0, .6]]),              # C = 2, gates not renormalised
    ("expert_choice", 3, {}, P)])
def test_gates_by_hand(name, k, options, gates):
    r = route(P, name, k, **options)
    np.testing.assert_allclose(r.to_dense().data, gates, atol=1e-12)
    np.testing.assert_allclose(r.probs.data, P, atol=1e-12)


@pytest.mark.parametrize("name, k, chosen", [
    ("top_k", 1, [[1, 0, 0]] * 3), ("top_k", 2, [[1, 1, 0]] * 3),
    ("expert_choice", 1, [[1, 1, 1], [0, 0, 0], [0, 0, 0]]), ("expert_choice", 2, [[1, 1, 1], [1, 1, 1], [0, 0, 0]])])
def test_ties_go_to_the_lowest_index(name, k, chosen):
    np.testing.assert_array_equal(route(np.full((3, 3), 1 / 3), name, k).mask(), chosen)


def test_ties_among_many():
    """Two values only, in no order: a sort that is not stable mixes up indices from 17 entries on."""
    p = np.random.default_rng(0).integers(1, 3, size=40)
    first = np.flatnonzero(p == 2)[:6]
    assert np.flatnonzero(route([p / p.sum()], k=6).load).tolist() == first.tolist()
    two = np.stack([p, 3 - p], axis=1) / 3               # 40 tokens to 2 experts, C = 40 * .3 / 2 = 6
    assert np.flatnonzero(route(two, "expert_choice", .3).mask()[:, 0]).tolist() == first.tolist()


def test_renormalising_is_the_softmax_over_the_selected():
    router, x = trained("top_k", 5, 6, 3), Tensor(states(8, 5))
    r = router(x, RouteContext())
    selected = np.where(r.mask(), r.logits.data, -np.inf)
    np.testing.assert_allclose(r.to_dense().data, F.softmax(Tensor(selected)).data, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_one_token_and_one_expert(name):
    one_token, one_expert = route(P[:1], name, 1), route(np.ones((3, 1)), name, 1)
    assert one_token.coverage.tolist() == ([3] if name == "expert_choice" else [1])  # C = ceil(1/3) = 1 for each expert
    assert one_expert.load.tolist() == [3] and one_expert.gate.data.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "name, k",
    [("top_k", 0), ("top_k", 4), ("top_k", 1.5), ("noisy_top_k", -1), ("expert_choice", 0), ("expert_choice", 4)],
)
def test_impossible_top_k(name, k):
    with pytest.raises(ValueError, match=f"top_k {k} .*n_experts 3"):
        routers.make(name, 4, 3, k)


def test_unknown_router_lists_the_known():
    with pytest.raises(ValueError, match="'topk'.*top_k, noisy_top_k.*expert_choice"):
        routers.make("topk", 4, 3)


# -- gradients ----------------------------------------------------------------------------------

def margin(r):
    """The smallest distance between two probabilities that compete, by row and by column."""
    return min(np.diff(np.sort(r.probs.data, axis=axis), axis=axis).min() for axis in (0, 1))


@pytest.mark.parametrize(
    "name, k, options",
    [
        ("top_k", 1, {}),
        ("top_k", 2, {}),
        ("top_k", 2, {"renormalise": False}),
        ("noisy_top_k", 1, {}),
        ("noisy_top_k", 2, {}),
        ("expert_choice", 1.5, {}),
    ],
)
def test_gradients_away_from_ties(name, k, options):
    router, x = trained(name, 3, 4, k, **options), Tensor(states(5, 3))

    def outputs(*_):
        r = router(x, RouteContext(training=True, rng=np.random.default_rng(3)))
        assert margin(r) > 1e-5
        parts = [r.to_dense().reshape(-1), r.probs.reshape(-1), r.logits.reshape(-1)]
        return F.concatenate(parts + ([r.soft_load] if r.soft_load is not None else []))

    result = gradcheck(outputs, x, *router.parameters().values())
    assert result, result


@pytest.mark.parametrize(
    "k, renormalise, learns", [(1, None, True), (1, True, False), (2, None, True), (2, False, True)]
)
def test_the_language_model_loss_reaches_the_router(k, renormalise, learns):
    """A renormalised top-1 gate is the constant 1: its router would never learn from the text. Hence the default."""
    config = ModelConfig(
        vocab_size=11,
        n_layers=1,
        d_model=8,
        n_heads=2,
        d_ff=8,
        seq_len=6,
        moe_layers=(0,),
        n_experts=4,
        top_k=k,
        router_options=dict(renormalise=renormalise),
        aux_coef=0,
    )
    model, ids = Transformer(config, dtype=np.float64), np.arange(12).reshape(2, 6) % 11
    model.loss(ids, (ids + 1) % 11).total.backward()
    gradient = model.parameters()["blocks.0.feed_forward.router.weight"].grad
    assert (np.abs(gradient).max() > 0) if learns else (gradient == 0).all()


# -- noisy top-k --------------------------------------------------------------------------------

def test_noisy_top_k_starts_indifferent():
    assert all((p.data == 0).all() for p in routers.make("noisy_top_k", 4, 3).parameters().values())
    x = Tensor(states(4000, 4))
    r = routers.make("noisy_top_k", 4, 4, 1, dtype=np.float64)(
        x, RouteContext(training=True, rng=np.random.default_rng(0))
    )
    assert np.abs(r.load - 1000).max() < 140       # 5 standard deviations of sqrt(4000 * 1/4 * 3/4) = 27
    np.testing.assert_allclose(r.logits.data.std(), np.log(2) + .01, rtol=.03)      # sigma = softplus(0) + 0.01


def test_noise_only_while_training_and_the_same_from_the_same_seed():
    router, x = trained("noisy_top_k", 4, 5, 2), Tensor(states(6, 4))

    def logits(training, seed):
        return router(x, RouteContext(training=training, rng=np.random.default_rng(seed))).logits.data

    np.testing.assert_array_equal(logits(False, 0), x.data @ router.weight.data)
    np.testing.assert_array_equal(logits(True, 1), logits(True, 1))
    assert not np.isclose(logits(True, 1), logits(True, 2)).any()
    assert router(x, RouteContext()).soft_load is None
    with pytest.raises(ValueError, match="rng"):
        router(x, RouteContext(training=True))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_soft_load(k):
    """Against the formula, and against what it means: expert i's own noise is drawn again, the others' stays."""
    router, x = trained("noisy_top_k", 3, 4, k), Tensor(states(6, 3))
    r = router(x, RouteContext(training=True, rng=np.random.default_rng(0)))
    clean, sigma = x.data @ router.weight.data, np.logaddexp(x.data @ router.noise.data, 0) + .01
    if k == 4:
        return np.testing.assert_array_equal(r.soft_load.data, [6] * 4)
    np.testing.assert_allclose(r.soft_load.data, naive.noisy_load(clean, r.logits.data, sigma, k), atol=1e-12)
    rng = np.random.default_rng(1)
    for i in range(4):
        h = np.repeat(r.logits.data[None], 4000, axis=0)
        h[:, :, i] = clean[:, i] + sigma[:, i] * rng.standard_normal((4000, 6))
        inside = (h > h[:, :, i:i + 1]).sum(axis=-1) < k
        assert inside.mean(axis=0).sum() == pytest.approx(r.soft_load.data[i], abs=.1)   # 5 standard deviations


# -- expert choice ------------------------------------------------------------------------------

@pytest.mark.parametrize("c", [.5, 1, 2, 3.5])
def test_expert_choice_has_equal_load_and_unequal_coverage(c):
    r = trained("expert_choice", 6, 8, c)(Tensor(states(64, 6)), RouteContext())
    assert r.load.tolist() == [8 * c] * 8 and r.coverage.mean() == c       # C = 64 c / 8
    assert r.coverage.min() < c < r.coverage.max()                         # at c <= 1 some token has none
    np.testing.assert_array_equal(r.gate.data, r.probs.data[r.token, r.expert])


def causal_route(router, x):
    """x (B, T, D) -> (B, T, E) bool"""
    context = RouteContext(ids=np.zeros(x.shape[:2], int), causal=True)
    return router(Tensor(x.reshape(-1, x.shape[-1])), context).mask().reshape(*x.shape[:2], -1)


@pytest.mark.parametrize("c", [.5, 1, 2])
def test_causal_expert_choice_decides_on_the_prefix(c):
    router, x = trained("expert_choice", 5, 4, c), states(3, 10, 5)
    chosen = causal_route(router, x)
    for sequence, got in zip(x, chosen):
        p = F.softmax(Tensor(sequence @ router.weight.data)).data
        np.testing.assert_array_equal(got, naive.prefix_choice(p, c))
        np.testing.assert_array_equal(causal_route(router, sequence[None])[0], got)      # alone as in the batch
    later = x.copy()
    later[:, 6:] += 1
    np.testing.assert_array_equal(causal_route(router, later)[:, :6], chosen[:, :6])
    assert (causal_route(router, later)[:, 6:] != chosen[:, 6:]).any()


def test_expert_choice_leaks_the_future_unless_told_not_to():
    """P(expert 0) of the tokens is .4, .6, or .4, .2 after a change: the first token loses or keeps its place (C =
    1)."""
    ids = np.zeros((1, 2), int)
    for context, first_kept in ((RouteContext(ids), [False, True]), (RouteContext(ids, causal=True), [True, True])):
        got = [route([[.4, .6], [p, 1 - p]], "expert_choice", 1, context).mask()[0, 0] for p in (.6, .2)]
        assert got == first_kept


def test_causal_ties_go_to_the_earlier_token():
    chosen = route(np.full((4, 2), .5), "expert_choice", 1, RouteContext(np.zeros((1, 4), int), causal=True)).mask()
    # room ceil(n / 2) = 1, 1, 2, 2, but a newcomer that ties ranks last
    np.testing.assert_array_equal(chosen, [[True, True], [False, False], [False, False], [False, False]])


def test_causal_expert_choice_needs_the_sequences():
    with pytest.raises(ValueError, match="ids"):
        route(P, "expert_choice", 1, RouteContext(causal=True))


# -- what goes in and what comes out ------------------------------------------------------------

@pytest.mark.parametrize("name", ["hash", "expert_choice", "top_k"])
def test_ids_must_be_those_of_the_rows(name):
    """A table of ids (1, 3) would give a Routing of 3 tokens for 6 rows; prefixes of 3 would mix sequences."""
    router, x = routers.make(name, 8, 4), Tensor(states(6, 8, dtype=np.float32))
    for ids in (np.zeros((1, 3), int), np.zeros(6, int), [[0, 1, 2, 3]]):
        with pytest.raises(routers.RouteError, match=rf"^router {name} has x \(6, 8\), but RouteContext.ids .* = 6$"):
            router(x, RouteContext(ids, causal=True))
    assert router(x, RouteContext([[0, 1, 2], [3, 4, 5]], causal=True)).n_tokens == 6


@pytest.mark.parametrize("shape, expected", [((2, 3, 8), 8), ((8,), 8)])
def test_a_router_takes_rows(shape, expected):
    with pytest.raises(routers.RouteError, match=rf"top_k takes x \(N, D\), .* reshape it to \(-1, {expected}\)$"):
        routers.make("top_k", 8, 4)(Tensor(np.zeros(shape, np.float32)))


def test_a_router_needs_no_context_where_it_reads_none():
    router, x = routers.make("top_k", 8, 4), Tensor(states(6, 8, dtype=np.float32))
    np.testing.assert_array_equal(router(x).mask(), router(x, RouteContext()).mask())
    with pytest.raises(routers.RouteError, match="^router top_k takes a RouteContext, not a ndarray: write "):
        router(x, np.zeros((2, 3), int))


def test_a_router_without_a_name_has_that_of_its_class_and_is_not_in_the_table():
    class Half(routers.TopK):
        def forward(self, x, context):
            return super().forward(x[:len(x) // 2], context)

    class Nothing(routers.Router):
        def forward(self, x, context):
            return None

    class Twice(routers.TopK):
        def scores(self, x):
            return F.concatenate([super().scores(x)] * 2, axis=1)

    x, rng = Tensor(states(6, 8, dtype=np.float32)), np.random.default_rng(0)
    for cls, message in ((Half, "router Half returned a Routing of 3 tokens for x of 6 rows"),
                         (Twice, "router Twice returned a Routing of 8 experts, but has 4"),
                         (Nothing, "router Nothing returned a NoneType, not a Routing")):
        with pytest.raises(routers.RouteError, match=message):
            cls(8, 4, 2, rng, np.float32)(x)
        assert cls.name not in routers.ROUTERS
    assert routers.ROUTERS["top_k"] is routers.TopK and routers.TopK.name == "top_k"


def test_a_context_takes_a_seed_and_lists():
    context = RouteContext([[1, 2]], training=True, rng=3, domain=[0])
    assert context.ids.shape == (1, 2) and context.domain.tolist() == [0]
    assert context.rng.random() == np.random.default_rng(3).random()
    rng = np.random.default_rng(0)
    assert RouteContext(rng=rng).rng is rng and RouteContext().rng is None
