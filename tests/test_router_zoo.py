"""The routers beyond the study's three: choices and gates by hand, and what every router promises of itself."""
import itertools

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import naive
import naive_routing
from tinymoe import ModelConfig, Tensor, Transformer, gradcheck
from tinymoe.autograd import functional as F
from tinymoe.layers import nn
from tinymoe.model.generate import generate
from tinymoe.moe import metrics, routers
from tinymoe.moe.losses import load_balancing_loss
from tinymoe.moe.routers import ROUTERS, RouteContext
from tinymoe.moe.routers.expert_choice import prefix_softmax
from tinymoe.moe.routers.token_choice import log_softplus
from tinymoe.moe.routing import from_mask, limit_capacity
from tinymoe.training.data import load_corpus
from tinymoe.training.evaluation import Validation, evaluate
from tinymoe.training.optim import AdamW
from tinymoe.training.plan import RunPlan, TrainConfig
from tinymoe.training.trainer import Trainer

ALL, EVALUATION = list(ROUTERS), RouteContext()


def context(training=False, ids=None, seed=0, **fields):
    known = {} if ids is None else {"domain": np.arange(len(ids))}
    return RouteContext(ids, training, np.random.default_rng(seed), **known | fields)


def route(logits, name, k=1, where=EVALUATION, bias=None, **options):
    """The Routing of a router whose logits are exactly known: identity weights."""
    logits = np.array(logits, float)
    router = routers.make(name, logits.shape[1], logits.shape[1], k, dtype=np.float64, **options)
    router.weight.data = np.eye(logits.shape[1])
    if bias is not None:
        router.bias.data = np.array(bias, float)
    return router(Tensor(logits), where)


def logit(p):
    return np.log(p) - np.log1p(-np.array(p))


# -- sigmoid scores with a bias -----------------------------------------------------------------

S = [[.8, .6, .2], [.5, .4, .3]]


def test_sigmoid_gates_by_hand():
    r = route(logit(S), "sigmoid_bias", 2)
    np.testing.assert_allclose(r.to_dense().data, [[.8 / 1.4, .6 / 1.4, 0], [.5 / .9, .4 / .9, 0]])
    np.testing.assert_allclose(r.probs.data, [[.5, .375, .125], [5 / 12, 4 / 12, 3 / 12]])
    np.testing.assert_allclose(route(logit(S), "sigmoid_bias", 1).gate.data, [.8, .5])
    np.testing.assert_allclose(route(logit(S), "sigmoid_bias", 1, renormalise=True).gate.data, [1, 1])
    np.testing.assert_allclose(
        route(logit(S), "sigmoid_bias", 2, renormalise=False).to_dense().data, [[0.8, 0.6, 0], [0.5, 0.4, 0]]
    )
    np.testing.assert_allclose(route(logit(S), "sigmoid_bias", 2, gate_scale=2.5).gate.data.sum(), 5)


def test_the_bias_chooses_and_is_not_in_the_gate():
    """With b = (0, 0, .15): .35 and .45 for the last expert. Token 1 now takes it, ahead of .4; its gates are of s."""
    r = route(logit(S), "sigmoid_bias", 2, bias=[0, 0, .15])
    np.testing.assert_allclose(r.to_dense().data, [[.8 / 1.4, .6 / 1.4, 0], [.5 / .8, 0, .3 / .8]])


def test_the_bias_moves_against_the_load():
    router = routers.make("sigmoid_bias", 3, 3, 1, dtype=np.float64, bias_rate=.01)
    router.weight.data = np.eye(3)
    routing = router(Tensor(logit([[.9, .1, .1]] * 3 + [[.1, .9, .1]] * 2 + [[.1, .1, .9]])), context(training=True))
    router.after_step(routing)                                     # load (3, 2, 1), mean 2
    np.testing.assert_array_equal(router.bias.data, [-.01, 0, .01])
    assert not router.bias.requires_grad


def test_the_bias_alone_balances_a_collapsed_router():
    rng = np.random.default_rng(0)
    router = routers.make("sigmoid_bias", 4, 4, 1, dtype=np.float64, bias_rate=.005)
    router.weight.data, x = np.eye(4), Tensor(rng.standard_normal((256, 4)) + [3, 0, 0, 0])
    before = metrics.max_violation(router(x, RouteContext()))
    for _ in range(400):
        router.after_step(router(x, RouteContext()))
    assert before > 2 and metrics.max_violation(router(x, RouteContext())) < .2


def test_sqrt_softplus_scores_by_hand():
    """Logits log(exp(s^2) - 1) have the scores s: the gates are those of sigmoid scores of the same s."""
    for options in ({}, {"renormalise": False, "gate_scale": 1.5}):
        got, same = (route(z, "sigmoid_bias", 2, score=score, **options) for z, score in (
            (np.log(np.expm1(np.square(S))), "sqrt_softplus"), (logit(S), "sigmoid")))
        np.testing.assert_allclose(got.to_dense().data, same.to_dense().data)
        np.testing.assert_allclose(got.probs.data, same.probs.data)


def test_softmax_scores_with_a_bias_by_hand():
    """The bias (0, .3, 0) makes the second expert the first; the gate stays its probability."""
    r = route(np.log([[.5, .3, .2]]), "sigmoid_bias", 1, bias=[0, .3, 0], score="softmax")
    np.testing.assert_allclose(r.to_dense().data, [[0, .3, 0]])
    np.testing.assert_allclose(r.probs.data, [[.5, .3, .2]])


@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrt_softplus"])
@pytest.mark.parametrize("shift", [0, -60., -200., 50.])
def test_every_score_has_probs_that_sum_to_1_and_finite_gradients(score, shift):
    z = Tensor((np.random.default_rng(0).standard_normal((5, 4)) + shift).astype("f"), requires_grad=True)
    router = routers.make("sigmoid_bias", 4, 4, 2, score=score)
    router.weight.data = np.eye(4, dtype=np.float32)
    r = router(z, RouteContext())
    np.testing.assert_allclose(r.probs.data.sum(axis=1), 1, rtol=1e-5)
    ((r.probs * np.arange(4, dtype=np.float32)).sum() + r.gate.sum()).backward()
    assert np.isfinite(z.grad).all() and r.gate.dtype == np.float32


def test_log_softplus_has_the_right_value_and_gradient():
    z = np.array([-700., -41, -40, -39, -1, 0, 3, 800])
    by_hand = [-700, -41, -40, -39, np.log(np.log1p(np.exp(-1))), np.log(np.log(2)), np.log(np.log1p(np.exp(3))),
               np.log(800)]
    np.testing.assert_allclose(log_softplus(Tensor(z)).data, by_hand, rtol=1e-15)
    assert gradcheck(log_softplus, Tensor(z[3:7]))


def after(router, load):
    """The bias of a router after a step with this load."""
    x = np.repeat(np.eye(len(load)), load, axis=0)
    router.after_step(from_mask(x > 0, Tensor(x), Tensor(x), Tensor(x)))
    return router.bias.data


def test_the_centred_step_has_mean_zero():
    """Loads (4, 1, 1), mean 2: signs (-1, 1, 1), their mean 1/3."""
    router = routers.make("sigmoid_bias", 3, 3, 1, dtype=np.float64, bias_rate=.3, bias_rule="centred")
    np.testing.assert_allclose(after(router, [4, 1, 1]), [-.4, .2, .2])


def test_the_smooth_step_by_hand():
    """Loads (3, 1), mean 2: v = (-1/2, 1/2), steps .1 tanh(v) = -+.046212, of which half counts, and half of the rest
    in the next step, at balance."""
    router = routers.make("momentum_bias", 2, 2, 1, dtype=np.float64, bias_rate=.1, clamp=1, momentum=.5)
    step = .1 * np.tanh(.5) / 2
    np.testing.assert_allclose(after(router, [3, 1]), [-step, step])
    np.testing.assert_allclose(after(router, [2, 2]), [-1.5 * step, 1.5 * step])
    loads = np.random.default_rng(0).integers(1, 9, (5, 2))
    again = routers.make("momentum_bias", 2, 2, 1, dtype=np.float64)
    for load in loads:
        after(again, load)
    np.testing.assert_allclose(again.bias.data, naive_routing.momentum_bias(loads.tolist(), 5e-4, 2, .5))
    assert np.isfinite(after(again, [0, 0])).all()


def test_the_quantile_bias_by_hand():
    """Scores (.9, .1), (.8, .3), (.7, .6), (.2, .4); K = 1, C = 2. Alpha, the second of each: .1, .3, .6, .2. Column 0
    minus alpha: .8, .5, .1, 0, the third largest .1; column 1: 0, 0, 0, .2, the third 0. Bias (-.1, 0), less its mean.
    """
    scores = np.array([[.9, .1], [.8, .3], [.7, .6], [.2, .4]])
    router = routers.make("quantile_bias", 2, 2, 1, dtype=np.float64)
    router.weight.data = np.eye(2)
    router.after_step(router(Tensor(logit(scores)), context(training=True)))
    np.testing.assert_allclose(router.bias.data, [-.05, .05], atol=1e-12)


def test_the_quantile_bias_against_plain_loops_and_at_its_limits():
    rng = np.random.default_rng(0)
    router = routers.make("quantile_bias", 4, 4, 2, dtype=np.float64)
    router.weight.data, bias = np.eye(4), np.zeros(4)
    for _ in range(4):
        z = rng.standard_normal((10, 4)) + [2, 0, 0, -1]
        router.after_step(router(Tensor(z), RouteContext()))
        bias = naive_routing.quantile_bias(1 / (1 + np.exp(-z)), bias, 2)
        np.testing.assert_allclose(router.bias.data, bias, atol=1e-12)
    everything = routers.make("quantile_bias", 2, 2, 2, dtype=np.float64)
    everything.after_step(everything(Tensor(np.ones((3, 2))), RouteContext()))
    assert not everything.bias.data.any()


@pytest.mark.parametrize("name, steps, limit", [("quantile_bias", 5, .1), ("momentum_bias", 2000, .2)])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_these_biases_balance_a_collapsed_router(name, steps, limit, score):
    rng = np.random.default_rng(0)
    router = routers.make(name, 4, 4, 1, dtype=np.float64, score=score)
    router.weight.data, x = np.eye(4), Tensor(rng.standard_normal((256, 4)) + [3, 0, 0, 0])
    before = metrics.max_violation(router(x, RouteContext()))
    for _ in range(steps):
        router.after_step(router(x, RouteContext()))
    assert before > 1.5 and metrics.max_violation(router(x, RouteContext())) < limit


def test_the_bias_of_real_experts_by_hand():
    """K = 2, four tokens, loads (3, 1) of two real experts and 4 of a copy. A token is to have 1 real expert: 1/4 of
    the assignments for each. They have 3/8 and 1/8, so the steps are -1/8 and 1/8 of the rate."""
    router = routers.make("real_bias", 3, 3, 2, dtype=np.float64, n_real=2, real_k=1, bias_rate=.8)
    chosen = np.array([[1, 0, 1], [1, 0, 1], [1, 0, 1], [0, 1, 1]])
    router.after_step(from_mask(chosen > 0, *[Tensor(chosen.astype(float))] * 3))
    np.testing.assert_allclose(router.bias.data, [-.1, .1, 0])


def test_real_bias_aims_at_what_a_token_can_have():
    """K = 3 of 3 real experts and one copy: two at least are real, where 1 is asked for. Loads (2, 2, 0) and 2 of the
    copy, of two tokens: the target is 2 / 3 / 3 = 2/9, the shares are 1/3, 1/3 and 0. The steps sum to 0."""
    router = routers.make("real_bias", 4, 4, 3, dtype=np.float64, n_real=3, real_k=1, bias_rate=.9)
    router.after_step(from_mask(np.array([[1, 1, 0, 1]] * 2) > 0, *[Tensor(np.ones((2, 4)))] * 3))
    np.testing.assert_allclose(router.bias.data, [-.1, -.1, .2, 0], atol=1e-15)


@pytest.mark.parametrize("name, option", [("remoe", {"penalty_factor": 0.5}), ("momentum_bias", {"momentum": 1.0})])
def test_an_option_that_would_turn_a_rule_round_is_refused(name, option):
    (word, value), = option.items()
    with pytest.raises(ValueError, match=f"{word} {value} must be at least"):
        routers.make(name, 4, 4, 2, **option)


def test_the_gates_of_real_experts_are_probabilities():
    """Probabilities .5, .3, .2 and a bias (0, 0, .2): experts 0 and 2, with gates 6 * .5 and 6 * .2."""
    r = route(np.log([[.5, .3, .2]]), "real_bias", 2, bias=[0, 0, .2], gate_scale=6.)
    np.testing.assert_allclose(r.to_dense().data, [[3, 0, 1.2]])


# -- a hash chooses, the scores weigh ------------------------------------------------------------

def test_hash_gated_by_hand():
    """The table sends id 0 to experts 0 and 2, id 1 to 1 and 2, whatever the scores, which alone make the gates."""
    router = routers.make("hash_gated", 3, 3, 2, dtype=np.float64, vocab_size=2, gate_scale=2)
    router.weight.data, router.table.data = np.eye(3), np.array([[1., 0, 1], [0, 1, 1]])
    r = router(Tensor(logit(S)), context(ids=np.array([[1, 0]])))
    np.testing.assert_allclose(r.to_dense().data, [[0, 2 * .6 / .8, 2 * .2 / .8], [2 * .5 / .8, 0, 2 * .3 / .8]])
    assert not router.table.requires_grad
    with pytest.raises(ValueError, match="hash_gated needs RouteContext.ids"):
        router(Tensor(logit(S)), RouteContext())


def test_hash_gated_in_the_first_layers_alone():
    names = ["hash_gated", "sigmoid_bias"]
    config = small("top_k", router=names, moe_layers=(0, 1), router_options={"score": "sqrt_softplus"})
    model, ids = Transformer(config), np.array([[3, 5, 3, 5, 3, 5]])
    first, second = (layer.router for layer in model.moe_parts())
    mask = model.forward(ids).routings[0].mask()
    assert (first.name, second.name) == tuple(names) and first.score == second.score == "sqrt_softplus"
    np.testing.assert_array_equal(mask, first.table.data[ids[0]] > 0)


# -- options of the token-choice routers --------------------------------------------------------

def test_the_best_groups_stay():
    """Groups (0, 1) and (2, 3). By its best expert the second wins; by its two best the first does, 1.2 against 1.1."""
    p = [[.6, .6, .9, .2]]
    assert route(np.log(p), "top_k", 2, n_groups=2, group_limit=1).mask().tolist() == [[False, False, True, True]]
    assert route(logit(p), "sigmoid_bias", 2, n_groups=2, group_limit=1).mask().tolist() == [[True, True, False, False]]
    assert route(np.log(p), "top_k", 2, n_groups=2, group_limit=2).mask().tolist() == [[True, False, True, False]]


def test_a_masked_group_loses_even_to_negative_scores():
    r = route(logit([[.5, .4, .6, .1]]), "sigmoid_bias", 2, bias=[-1, -1, -2, -2], n_groups=2, group_limit=1)
    assert r.mask().tolist() == [[True, True, False, False]]        # scores -.5 and -.6: above the mask, if below 0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(n_groups=3, group_limit=1), "n_groups 3 .*n_experts 4"),
        (dict(n_groups=2), "go together"),
        (dict(n_groups=2, group_limit=3), "group_limit 3"),
        (dict(n_groups=4, group_limit=1), "leaves 1 experts, fewer than top_k 2"),
        (dict(second_expert="none"), "'none'.*threshold"),
        (dict(second_expert="threshold", second_threshold=.5), "second_threshold 0.5 must be below 0.5"),
        (dict(bias_rate=0.1), "bias_rate is no option of top_k, which takes .*renormalise"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        routers.make("top_k", 4, 4, 2, **options)
    with pytest.raises(ValueError, match=message):
        ModelConfig(n_experts=4, router_options=options)


@pytest.mark.parametrize("policy, kept", [("all", [2, 2]), ("threshold", [2, 1])])
def test_second_expert_by_hand(policy, kept):
    """Gates .6 and .4, or .9 and .1, against a threshold of .25; only while training."""
    p, options = np.log([[.6, .4], [.9, .1]]), dict(second_expert=policy, second_threshold=.25)
    r = route(p, "top_k", 2, context(training=True), **options)
    assert r.coverage.tolist() == kept
    np.testing.assert_allclose(r.to_dense().data[:, 0], [.6, .9])            # the first keeps its gate
    assert route(p, "top_k", 2, **options).coverage.tolist() == [2, 2]


def test_a_threshold_for_the_second_expert_keeps_some_by_default():
    """Gates .7 and .3, or .9 and .1, against 0.2."""
    r = route(np.log([[.7, .3], [.9, .1]]), "top_k", 2, context(training=True), second_expert="threshold")
    assert r.coverage.tolist() == [2, 1]


def test_a_random_second_expert_is_kept_in_proportion_to_its_gate():
    r = route(np.tile(np.log([[.8, .2]]), (4000, 1)), "top_k", 2, context(training=True), second_expert="random")
    assert r.load[0] == 4000 and abs(r.load[1] / 4000 - .2 / .5) < .04       # 5 standard deviations


def test_jitter_multiplies_the_inputs_while_training():
    x = np.tile([[1., 2]], (500, 1))
    noisy = route(x, "top_k", 1, context(training=True), jitter=.1).logits.data
    ratio = noisy / x
    assert .9 <= ratio.min() < .91 and 1.09 < ratio.max() <= 1.1
    np.testing.assert_array_equal(route(x, "top_k", 1, jitter=.1).logits.data, x)
    with pytest.raises(ValueError, match="rng"):
        route(x, "top_k", 1, RouteContext(training=True), jitter=.1)


# -- nobody learns to choose --------------------------------------------------------------------

def test_hash_goes_by_the_id_alone():
    router, ids = routers.make("hash", 3, 8, 2), np.array([[5, 200, 5], [0, 5, 255]])
    mask = router(Tensor(np.random.default_rng(0).standard_normal((6, 3)).astype("f")), context(ids=ids)).mask()
    assert (mask.sum(axis=1) == 2).all() and (mask[[0, 2, 4]] == mask[0]).all()
    assert len(np.unique(router.table.data, axis=0)) > 20                    # of 28 pairs, by 256 ids
    with pytest.raises(ValueError, match="ids"):
        router(Tensor(np.ones((6, 3))), RouteContext())
    for unknown in (-1, 256):
        with pytest.raises(IndexError, match=f"{unknown}"):
            router(Tensor(np.ones((1, 3))), RouteContext([[unknown]]))


def test_the_hash_table_is_saved_with_the_model(tmp_path):
    model = Transformer(small("hash"), seed=3)
    model.save(tmp_path / "model.npz")
    ids = np.arange(12).reshape(2, 6) % 11
    again = Transformer.load(tmp_path / "model.npz").forward(ids)
    np.testing.assert_array_equal(model.forward(ids).logits.data, again.logits.data)


@pytest.mark.parametrize("name", ["hash", "random"])
def test_choices_without_a_score_have_equal_gates_and_probabilities_that_say_so(name):
    r = routers.make(name, 3, 4, 2, dtype=np.float64)(Tensor(np.ones((6, 3))), context(ids=np.arange(6)[None]))
    assert (r.gate.data == .5).all() and not r.gate.requires_grad
    np.testing.assert_allclose(r.probs.data, r.mask() / 2)
    np.testing.assert_allclose(F.softmax(r.logits).data, r.probs.data, atol=1e-12)


def test_random_is_fresh_while_training_and_the_same_at_each_evaluation():
    router, x, rng = routers.make("random", 3, 8, 2), Tensor(np.ones((800, 3))), np.random.default_rng(1)
    first, second = (router(x, RouteContext(training=True, rng=rng)) for _ in range(2))
    assert (first.mask() != second.mask()).any() and np.abs(first.load - 200).max() < 62       # 5 standard deviations
    np.testing.assert_array_equal(*(router(x, RouteContext()).mask() for _ in range(2)))       # without a generator


def test_random_has_no_favourites_in_the_validation_set():
    """Domains take the same places in every batch: a draw that repeats there would look like knowledge of the
    domain."""
    ids, names = np.zeros((64, 32), int), ("a", "b", "c", "d")
    model = Transformer(small("random", seq_len=32))
    row = evaluate(model, Validation(ids, ids, np.arange(64) % 4, names, 8), [1.0])[0]["layers"][0]
    assert row["mutual_information"] - row["mutual_information_null"] < .002 and row["load_cv"] < .05


@pytest.mark.parametrize("name", ["sinkhorn", "base_assignment"])
def test_matchings_are_causal_where_they_are_asked_to_be(name):
    x = np.random.default_rng(0).standard_normal((12, 3)) + [3, 0, 0]
    np.testing.assert_array_equal(route(x, name, 1, context(True, causal=True)).mask(), route(x, name, 1).mask())


def test_matchings_survive_scores_that_are_not_finite_or_far_apart():
    assert routers.balanced_assignment(np.array([[np.nan, 1], [np.inf, 0]])).sum() == 2
    plan = routers.sinkhorn_plan(np.array([[-800., 0, 0, 0]] * 64))
    np.testing.assert_allclose(plan, 0.25)  # an expert that is far behind gets its share all the same


@pytest.mark.parametrize("name, options", [
    ("sigmoid_bias", {}), ("momentum_bias", {}), ("quantile_bias", {}), ("real_bias", {"n_real": 3}), ("remoe", {}),
    ("top_p", {"steer": 0.1})])
def test_what_steers_a_frozen_router_stays(name, options):
    for frozen in (False, True):
        router = routers.make(name, 3, 4, 1, **options)
        if frozen:
            nn.freeze(router)
        before = {key: p.data.copy() for key, p in router.parameters().items()}
        router.after_step(router(Tensor(np.random.default_rng(0).standard_normal((5, 3), "f")), RouteContext()))
        assert frozen == all((before[key] == p.data).all() for key, p in router.parameters().items())


def test_freezing_needs_the_name_of_a_parameter():
    with pytest.raises(ValueError, match="ruoter"):
        Transformer(small("top_k", freeze=("ruoter",)))


def test_a_frozen_router_is_top_k_that_never_learns():
    x, frozen = (
        Tensor(np.random.default_rng(0).standard_normal((6, 3)), True),
        routers.make("frozen", 3, 4, 2, dtype=np.float64),
    )
    learned = routers.make("top_k", 3, 4, 2, dtype=np.float64)
    np.testing.assert_array_equal(*(router(x, RouteContext()).to_dense().data for router in (frozen, learned)))
    (frozen(x, RouteContext()).gate * np.arange(12)).sum().backward()
    assert frozen.weight.grad is None and np.abs(x.grad).max() > 0           # but the layers below do


def test_freezing_takes_the_gradient_from_what_is_named():
    model = Transformer(small("top_k", freeze=("router", "attention")))
    ids = np.arange(12).reshape(2, 6) % 11
    model.loss(ids, ids).total.backward()
    named = {name for name in model.parameters() if "router" in name or "attention" in name}
    assert named and {name for name, p in model.parameters().items() if p.grad is None} == named


# -- told the domain ----------------------------------------------------------------------------

def test_the_oracle_goes_by_the_domain_alone():
    """K = 2 of 6 experts: domain 0 has 0 and 1, domain 2 has 4 and 5, and domain 3 those of 0 again."""
    router = routers.make("oracle", 3, 6, 2, dtype=np.float64)
    x, ids = Tensor(np.random.default_rng(0).standard_normal((6, 3))), np.zeros((3, 2), int)
    r = router(x, RouteContext(ids, domain=np.array([2, 0, 3])))
    np.testing.assert_allclose(r.to_dense().data, np.eye(3)[[2, 2, 0, 0, 0, 0]].repeat(2, axis=1) / 2)
    with pytest.raises(routers.RouteError, match="oracle needs RouteContext.domain"):
        router(x, RouteContext(ids))


def test_the_oracle_trains_and_is_evaluated_by_the_domains_of_the_text(tmp_path):
    """Each of four sources has its expert, in training and validation: 1.386 nats of information, the most there is."""
    corpus = load_corpus("synthetic", seq_len=16)
    plan = RunPlan("D", purpose="test", seed=0, model=small("oracle", vocab_size=256, seq_len=16, top_k=1),
                   training=TrainConfig(steps=2, batch_size=8))
    trainer = Trainer(Transformer(plan.model), plan, corpus)
    trainer.advance()
    row, _ = trainer.evaluate(trainer.validation(4))[:2]
    assert row["layers"][0]["mutual_information"] == pytest.approx(np.log(4))
    with pytest.raises(routers.RouteError, match="text of a run alone"):
        next(generate(trainer.model, b"text", 1))


# -- scores that are very small or very large ------------------------------------------------------

@pytest.mark.parametrize("top", [-50., -120.])
def test_the_probabilities_of_sigmoid_scores_sum_to_1_however_small_they_are(top):
    """Else the balance loss can be cheated: scores of -50 to -53 gave a sum of 0.029 and a loss of 0.051.

    By hand: p = (0.6439, 0.2369, ...), and K = 2 gives f = (1/2, 1/2, 0, 0), so 4 * (0.6439 + 0.2369) / 2 = 1.7616.
    """
    router = routers.make("sigmoid_bias", 1, 4, 2)
    router.weight.data = top - np.arange(4, dtype=np.float32)[None]
    routing = router(Tensor(np.ones((6, 1), np.float32)), RouteContext())
    np.testing.assert_allclose(routing.probs.data.sum(axis=1), 1, rtol=1e-6)
    if top == -50:  # below, float32 cannot tell the scores apart, and their choice is a tie
        assert load_balancing_loss(routing).item() == pytest.approx(1.7616, rel=1e-4)


def test_a_later_token_does_not_reach_an_earlier_one_through_a_shift():
    """Scores 0, 0, 0, 110 in float32: with the maximum of the sequence as shift the first token's gate was NaN."""
    x, ids = np.array([[0.], [0.], [0.], [110.]], np.float32), np.zeros((1, 4), int)
    router = routers.make("expert_choice", 1, 2, 1, softmax_over="tokens")
    router.weight.data = np.ones((1, 2), np.float32)
    first = [router(Tensor(x[:n]), RouteContext(ids[:, :n], causal=True)).to_dense().data[0] for n in (1, 3, 4)]
    assert np.isfinite(first).all() and (first[0] == first[1]).all() and (first[0] == first[2]).all()


def test_prefix_softmax_has_the_right_gradient():
    z = np.random.default_rng(0).standard_normal((2, 5, 3)) * 3
    assert gradcheck(prefix_softmax, z).ok
    by_hand = [np.exp(z[:, t]) / np.exp(z[:, :t + 1]).mean(axis=1) for t in range(5)]
    np.testing.assert_allclose(prefix_softmax(Tensor(z)).data, np.stack(by_hand, axis=1))


# -- expert choice by a softmax over tokens -----------------------------------------------------

def test_expert_choice_over_tokens_by_hand():
    """Columns (2, 1, 1) / 4 and (1, 6, 1) / 8; C = 1: expert 0 takes token 0, expert 1 token 1. Over experts, token
    2 is as good for expert 0 (1/2) as it is for expert 1, and token 0 best (2/3)."""
    r = route(np.log([[2., 1], [1, 6], [1, 1]]), "expert_choice", 2 / 3, softmax_over="tokens")
    np.testing.assert_allclose(r.to_dense().data, [[3 * .5, 0], [0, 3 * .75], [0, 0]])
    np.testing.assert_allclose(r.probs.data, [[2 / 3, 1 / 3], [1 / 7, 6 / 7], [.5, .5]])
    causal = route(
        np.log([[2.0, 1], [1, 6], [1, 1]]),
        "expert_choice",
        2 / 3,
        RouteContext(np.zeros((1, 3), int), causal=True),
        softmax_over="tokens",
    )
    np.testing.assert_allclose(causal.to_dense().data, [[1, 1], [0, 2 * 6 / 7], [0, 0]])       # of the sequence so far
    with pytest.raises(ValueError, match="softmax_over 'rows'"):
        routers.make("expert_choice", 2, 2, 1, softmax_over="rows")


# -- expert choice by thresholds ----------------------------------------------------------------

COLUMN = [.9, .8, .3, .1]                                          # P(expert 0) of four tokens; C = 4 * 1 / 2 = 2


def two_experts(p):
    return np.log([[q, 1 - q] for q in p])


def thresholded(name="expert_choice", **options):
    router = routers.make(name, 2, 2, 1, dtype=np.float64, **options)
    router.weight.data = np.eye(2)
    return router


def test_thresholds_by_hand():
    """The second largest of (.9, .8, .3, .1) is .8, of (.1, .2, .7, .9) it is .7. Another batch has .6 and .5:
    .9 * .8 + .1 * .6 = .78, .9 * .7 + .1 * .5 = .68. Tokens .79, .77 and .3 then go to (0), nobody and (1)."""
    router = thresholded(threshold_decay=.9)
    router.after_step(router(Tensor(two_experts(COLUMN)), context(training=True)))
    np.testing.assert_allclose(router.threshold.data, [.8, .7])
    router.after_step(router(Tensor(two_experts([.8, .6, .5, .1])), context(training=True)))
    np.testing.assert_allclose(router.threshold.data, [.78, .68])
    new = router(Tensor(two_experts([.79, .77, .3])), context(ids=np.zeros((1, 3), int), causal=True))
    np.testing.assert_allclose(new.to_dense().data, [[.79, 0], [0, 0], [0, .7]])
    assert not router.threshold.requires_grad


def test_thresholds_of_the_batch_itself_choose_what_the_batch_rule_chooses():
    x, where = Tensor(np.random.default_rng(0).standard_normal((24, 2))), dict(ids=np.zeros((2, 12), int))
    for over in ("experts", "tokens"):
        router = thresholded(softmax_over=over)
        batch = router(x, context(training=True, **where))
        router.after_step(batch)
        np.testing.assert_array_equal(router(x, context(causal=True, **where)).mask(), batch.mask())


def test_thresholds_against_plain_loops():
    rng, router, seen = np.random.default_rng(1), thresholded(threshold_decay=.8), []
    for _ in range(5):
        routing = router(Tensor(rng.standard_normal((10, 2))), context(training=True))
        router.after_step(routing)
        seen.append(routing.probs.data)
    np.testing.assert_allclose(router.threshold.data, naive_routing.thresholds(seen, 5, .8))


def test_the_rules_of_expert_choice():
    """Thresholds .8 and .7 do not apply before a step; then rule and causal_rule say which of the three is used.

    Of the tokens .5, .6, .9 and .1 expert 0 takes the two best of the batch. On the prefix it has room for 1, 1, 2 and
    2 tokens, and each of the first three is the best so far.
    """
    p, ids = two_experts([.5, .6, .9, .1]), np.zeros((1, 4), int)
    chosen = {"batch": [0, 1, 1, 0], "prefix": [1, 1, 1, 0], "threshold": [0, 0, 1, 0]}

    def first_expert(trained=True, causal=False, training=False, name="expert_choice", **options):
        router = thresholded(name, **options)
        router.threshold.data = np.array([.8, .7]) * trained
        return router(Tensor(p), context(training, ids, causal=causal)).mask()[:, 0].tolist()

    for rule in chosen:
        for causal in (False, True):
            for training in (False, True):
                used = "threshold" if causal and rule == "batch" else rule
                assert first_expert(rule=rule, causal=causal, training=training) == chosen[used]
    assert first_expert(causal=True, causal_rule="prefix") == chosen["prefix"]
    assert first_expert(causal=True, trained=False) == chosen["prefix"]          # no step yet
    assert first_expert(name="expert_threshold", training=True) == chosen["threshold"]
    for rule in chosen:
        router = thresholded(rule=rule)
        assert router.causal == router.causal_training == (rule != "batch")
    with pytest.raises(ValueError, match="threshold_decay 1.5"):
        thresholded(threshold_decay=1.5)


def test_expert_choice_names_its_rules():
    rules = ROUTERS["expert_choice"].rules
    assert rules({}) == "by batch, causal by threshold"
    assert rules({"causal_rule": "prefix"}) == "by batch, causal by prefix" and rules({"rule": "prefix"}) == "by prefix"
    assert ROUTERS["expert_threshold"].rules({}) == "by threshold" and ROUTERS["top_k"].rules({}) == ""


def test_expert_choice_renormalised_by_hand():
    """C = 2 of three: token 0 has expert 0 alone, so 1; token 1 has both, .6 and .4; token 2 has expert 1 alone."""
    p = [[.7, .3], [.6, .4], [.2, .8]]
    r = route(np.log(p), "expert_choice", 4 / 3, renormalise=True)
    np.testing.assert_allclose(r.to_dense().data, [[1, 0], [.6, .4], [0, 1]])
    none = route(np.log([[.9, .1], [.8, .2], [.1, .9], [.5, .5]]), "expert_choice", .5, renormalise=True)
    np.testing.assert_allclose(none.to_dense().data, [[1, 0], [0, 0], [0, 1], [0, 0]])


def test_thresholds_are_saved_with_the_model_and_resume(tmp_path):
    model, ids = Transformer(small("expert_choice"), seed=1), np.arange(12).reshape(2, 6) % 11
    model.after_step(model.forward(ids, training=True).routings)
    model.save(tmp_path / "model.npz")
    again = Transformer.load(tmp_path / "model.npz")
    assert again.moe_parts()[0].router.threshold.data.all()
    np.testing.assert_array_equal(*(m.forward(ids, causal=True).logits.data for m in (model, again)))


# -- logits of other forms ----------------------------------------------------------------------

def test_a_learned_bias_is_in_choice_and_gate():
    """Logits (0, ln 2) and a bias (ln 6, 0): probabilities 3/4 and 1/4. It is trained, unlike that of sigmoid_bias."""
    r = route([[0, np.log(2)]], "biased_top_k", 1, bias=[np.log(6), 0])
    np.testing.assert_allclose(r.to_dense().data, [[.75, 0]])
    assert routers.make("biased_top_k", 2, 2).bias.requires_grad


def test_normalised_logits_by_hand():
    """(1, 3, 5) has mean 3 and sample variance (4 + 0 + 4) / 2 = 4, so at scale 2 it is (-2, 0, 2). Equal logits stay
    equal, and a single expert has the logit 0."""
    r = route([[1, 3, 5], [4, 4, 4]], "normalised_top_k", 1, logit_scale=2.)
    np.testing.assert_allclose(r.logits.data, [[-2, 0, 2], [0, 0, 0]], atol=1e-6)
    shifted = route(np.array([[1, 3, 5], [4, 4, 4]]) * 7 + 2, "normalised_top_k", 1, logit_scale=2.)
    np.testing.assert_allclose(shifted.logits.data, r.logits.data, atol=1e-6)
    z = np.random.default_rng(0).standard_normal((6, 5))
    found = route(z, "normalised_top_k", 2, logit_scale=.7).logits.data
    np.testing.assert_allclose(found, naive_routing.normalised(z, .7), rtol=1e-9)
    np.testing.assert_array_equal(route([[3.]], "normalised_top_k", 1).logits.data, [[0]])


def test_cosines_by_hand():
    """Token (3, 4) and experts (1, 0), (0, 2), (-6, -8): cosines .6, .8, -1, divided by tau = .5. Tau stays >= .01."""
    router = routers.make("cosine_top_k", 2, 3, 2, dtype=np.float64, router_width=2)
    router.projection.data, router.weight.data = np.eye(2), np.array([[1., 0, -6], [0, 2, -8]])
    x = Tensor(np.array([[3., 4], [0, 0]]))
    np.testing.assert_allclose(router(x, RouteContext()).logits.data, [[1.2, 1.6, -2], [0, 0, 0]])
    router.log_scale.data = np.array(9.)
    np.testing.assert_allclose(router(x, RouteContext()).logits.data[0], [60, 80, -100])
    with pytest.raises(ValueError, match="temperature 0.001 must be at least 0.01"):
        routers.make("cosine_top_k", 2, 3, 2, temperature=.001)
    for name in ("cosine_top_k", "normalised_top_k"):
        with pytest.raises(ValueError, match=f"router_std 0 must be above 0 for {name}"):
            routers.make(name, 2, 3, 2, router_std=0)


# -- a number of experts that the token decides ----------------------------------------------------

def test_top_p_by_hand():
    """At .7 the first token needs .5 and .3, the second .8 alone, and the tie of the third goes to the lowest."""
    p = [[.5, .2, .3], [.1, .8, .1], [.4, .2, .4]]
    r = route(np.log(p), "top_p", 1, top_p=.7)
    np.testing.assert_allclose(r.to_dense().data, [[.5, 0, .3], [0, .8, 0], [.4, 0, .4]])
    one = route(np.log(p), "top_p", 1, top_p=.3, renormalise=True)
    np.testing.assert_allclose(one.to_dense().data, [[1, 0, 0], [0, 1, 0], [1, 0, 0]])
    p = np.random.default_rng(0).dirichlet(np.ones(5), 40)
    np.testing.assert_array_equal(route(np.log(p), "top_p", 1, top_p=.6).mask(), naive_routing.top_p(p, .6))
    with pytest.raises(ValueError, match="top_p 0 must be above 0"):
        routers.make("top_p", 2, 2, top_p=0)


def test_top_p_is_steered_to_k_experts_a_token():
    """At .5 the tokens have 1, 1 and 2 experts, 4/3 on average, and K = 2 of 4: .5 + .3 (2/3) / 4 = .55."""
    router = routers.make("top_p", 4, 4, 2, dtype=np.float64, top_p=.5, steer=.3)
    router.weight.data = np.eye(4)
    p = np.log([[.7, .1, .1, .1], [.1, .6, .2, .1], [.24, .24, .26, .26]])
    router.after_step(router(Tensor(p), RouteContext()))
    assert router.threshold.item() == pytest.approx(.55)
    fixed = routers.make("top_p", 4, 4, 2, dtype=np.float64, top_p=.5)
    fixed.after_step(fixed(Tensor(p), RouteContext()))
    assert fixed.threshold.item() == .5
    x = Tensor(np.random.default_rng(0).standard_normal((400, 4)))
    for _ in range(200):
        router.after_step(router(x, RouteContext()))
    assert router(x, RouteContext()).coverage.mean() == pytest.approx(2, abs=.1)


def test_remoe_by_hand():
    """Gates are the positive logits. Two of four tokens use expert 0 (mean gate 3/4), one expert 1 (1/2); K = 1 of 2:
    lambda 2 (1/2 3/4 + 1/4 1/2) = lambda. Three of four tokens' worth is less than K, so lambda falls by 1.2."""
    router = routers.make("remoe", 2, 2, 1, dtype=np.float64, penalty_start=.5)
    router.weight.data = np.eye(2)
    r = router(Tensor(np.array([[1., -1], [2, 2], [-3, 0], [-1, -2]])), RouteContext())
    np.testing.assert_allclose(r.to_dense().data, [[1, 0], [2, 2], [0, 0], [0, 0]])
    assert router.penalty(r, None).item() == pytest.approx(.5)
    router.after_step(r)
    assert router.coefficient.item() == pytest.approx(.5 / 1.2)
    router.after_step(router(Tensor(np.ones((3, 2))), RouteContext()))
    assert router.coefficient.item() == pytest.approx(.5)
    router.after_step(router(Tensor(np.array([[1., -1]])), RouteContext()))  # exactly K
    assert router.coefficient.item() == pytest.approx(.5)


def test_mixture_of_depths_by_hand():
    """One expert, half of each sequence: tokens of logit 3 and 2, and of 0 and -1; causally those above 0.

    The penalty is the mean of log(1 + exp z) - [chosen] z.
    """
    z, ids = np.array([[3.], [1], [2], [-5], [-1], [-2], [0], [-3]]), np.zeros((2, 4), int)
    router = routers.make("mixture_of_depths", 1, 1, .5, dtype=np.float64, choice_loss=1.)
    router.weight.data = np.eye(1)
    r = router(Tensor(z), context(ids=ids))
    np.testing.assert_allclose(r.to_dense().data[:, 0], [3, 0, 2, 0, -1, 0, 0, 0])
    assert r.coverage.tolist() == [1, 0, 1, 0, 1, 0, 1, 0]
    chosen = z[:, 0] * [1, 0, 1, 0, 1, 0, 1, 0]
    assert router.penalty(r, None).item() == pytest.approx((np.log1p(np.exp(z[:, 0])) - chosen).mean())
    assert router(Tensor(z), context(ids=ids, causal=True)).coverage.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="mixture_of_depths needs RouteContext.ids"):
        router(Tensor(z), RouteContext())


# -- matchings ----------------------------------------------------------------------------------

def test_sinkhorn_by_hand():
    """exp(logits) = (4, 1), (2, 1) has the odds ratio 2, which scaling keeps: a / (1 - a) = sqrt 2 on the diagonal.

    So token 1 is sent to expert 1, though it likes expert 0 better; gates are sigmoids of its logits, log 4 and 0.
    """
    logits, a = np.log([[4., 1], [2, 1]]), np.sqrt(2) / (1 + np.sqrt(2))
    np.testing.assert_allclose(routers.sinkhorn_plan(logits, 50), [[a, 1 - a], [1 - a, a]])
    np.testing.assert_allclose(route(logits, "sinkhorn", 1, context(training=True)).to_dense().data, [[.8, 0], [0, .5]])
    np.testing.assert_allclose(route(logits, "sinkhorn", 1).to_dense().data, [[.8, 0], [2 / 3, 0]])
    top_2 = route(np.log([[.5, .3, .2]]), "sinkhorn", 2)
    np.testing.assert_allclose(top_2.to_dense().data, [[.5, .3, 0]])         # the softmax, as it is


def test_a_sinkhorn_plan_is_balanced_whatever_the_scores():
    scores = np.random.default_rng(0).standard_normal((40, 5)) * 3 + [4, 0, 0, 0, -4]
    plan = routers.sinkhorn_plan(scores, 200)
    np.testing.assert_allclose(plan.sum(axis=0), 8)
    np.testing.assert_allclose(plan.sum(axis=1), 1, atol=1e-3)


def test_greedy_falls_short_of_the_exact_assignment():
    """Greedy takes the 5 and is left with the 0; the best pair is 4 + 4."""
    scores = np.array([[5., 4], [4, 0]])
    assert routers.balanced_assignment(scores).tolist() == [[False, True], [True, False]]
    assert routers.greedy_assignment(scores).tolist() == [[True, False], [False, True]]
    assert routers.shortfall(scores, routers.greedy_assignment(scores)) == 1.5
    assert routers.shortfall(scores, routers.balanced_assignment(scores)) == 0


@pytest.mark.parametrize("n", [6, 5])
def test_the_assignment_is_the_best_of_all(n):
    """Against every way of giving 6 (or 5) tokens to 3 experts with room for 2 each."""
    scores = np.random.default_rng(n).standard_normal((n, 3))
    ways = [w for w in itertools.product(range(3), repeat=n) if max(map(w.count, range(3))) <= 2]
    best = max(sum(scores[i, e] for i, e in enumerate(w)) for w in ways)
    for solve, equal in ((routers.balanced_assignment, True), (routers.greedy_assignment, False)):
        chosen = solve(scores)
        assert (chosen.sum(axis=1) == 1).all() and chosen.sum(axis=0).max() <= 2
        assert (scores * chosen).sum() == pytest.approx(best) if equal else (scores * chosen).sum() <= best


@pytest.mark.parametrize("n", [160, 157, 3])
@pytest.mark.parametrize("kind", ["spread", "one favourite", "integers", "all alike", "repeated"])
def test_the_assignment_scores_as_much_as_scipys(kind, n):
    """SciPy assigns tokens to places, as many for each expert as it has room."""
    rng = np.random.default_rng(n)
    scores = {"spread": rng.standard_normal((n, 8)), "one favourite": rng.standard_normal((n, 8)) + 9 * np.eye(8)[2],
              "integers": rng.integers(0, 3, (n, 8)), "all alike": np.tile(rng.standard_normal(8), (n, 1)),
              "repeated": rng.standard_normal((9, 8))[rng.integers(0, 9, n)]}[kind].astype(np.float32)
    room = -(-n // 8)
    _, place = linear_sum_assignment(np.repeat(scores, room, axis=1), maximize=True)
    chosen = routers.balanced_assignment(scores)
    assert (chosen.sum(axis=1) == 1).all() and chosen.sum(axis=0).max() <= room
    assert scores[chosen].sum(dtype=float) == pytest.approx(scores[range(n), place // room].sum(dtype=float), abs=1e-9)
    np.testing.assert_array_equal(chosen, routers.balanced_assignment(scores))


def test_base_assignment_balances_while_training_only():
    x = np.random.default_rng(0).standard_normal((12, 3)) + [3, 0, 0]
    training, evaluated = route(x, "base_assignment", 1, context(training=True)), route(x, "base_assignment", 1)
    assert training.load.tolist() == [4, 4, 4] and evaluated.load[0] > 8
    np.testing.assert_allclose(evaluated.gate.data, 1 / (1 + np.exp(-x[evaluated.token, evaluated.expert])))
    with pytest.raises(ValueError, match="top_k 2 must be 1 for base_assignment"):
        routers.make("base_assignment", 3, 3, 2)
    for top_k in (np.inf, "2", None, True):
        with pytest.raises(ValueError, match=f"top_k {top_k!r} must be a whole number"):
            routers.make("top_k", 3, 3, top_k)


# -- one decision for a sequence ----------------------------------------------------------------

def test_sequence_routing_by_hand():
    """Tokens (3, 0), (0, 1), (0, 4): prefix means (3, 0), (1.5, .5), (1, 5/3). The mean over all is the last of
    them."""
    x, ids = [[3, 0], [0, 1], [0, 4]], np.zeros((1, 3), int)
    assert route(x, "sequence", 1, context(ids=ids)).mask()[:, 0].tolist() == [True, True, False]
    mean = route(x, "sequence", 1, context(ids=ids), sequence_pool="mean")
    assert mean.mask()[:, 1].all()
    np.testing.assert_allclose(mean.logits.data, [[1, 5 / 3]] * 3)
    causal = route(x, "sequence", 1, context(ids=ids, causal=True), sequence_pool="mean")
    assert causal.mask()[:, 0].tolist() == [True, True, False]
    with pytest.raises(ValueError, match="ids"):
        route(x, "sequence", 1)


def test_one_decision_for_all_layers():
    config = dict(n_layers=3, moe_layers=(0, 1, 2))
    ids = np.arange(12).reshape(2, 6) % 11
    layers = Transformer(small("sequence", router_options={"sequence_scope": "global"}, **config)).forward(ids).routings
    assert layers[0] is layers[1] is layers[2]
    router, again = routers.make("sequence", 4, 3, 1, sequence_scope="global"), RouteContext(ids)
    x = np.random.default_rng(0).standard_normal((2, 12, 4)).astype(np.float32)
    assert router(Tensor(x[0]), again) is not router(Tensor(x[1]), again)  # two passes with one context
    layers = Transformer(small("sequence", router_options={"router_std": 1.0}, **config)).forward(ids).routings
    assert (layers[0].mask() != layers[2].mask()).any()


def test_prefix_mean_has_the_right_gradient():
    assert gradcheck(routers.sequence.prefix_mean, Tensor(np.random.default_rng(0).standard_normal((2, 4, 3))))


def test_a_whole_number_is_a_threshold_too():
    """With threshold 1 a second expert stays with probability equal to its gate, here 1/2."""
    r = route(np.zeros((4000, 2)), "top_k", 2, context(training=True), second_expert="random", second_threshold=1)
    assert abs(r.load[1] / 4000 - .5) < .03


def test_noisy_top_k_takes_groups_and_then_has_no_smooth_load():
    logits = np.array([[3., 0, 2.9, 2.8], [0, 3, 1, 1]])
    router = routers.make("noisy_top_k", 4, 4, 2, dtype=np.float64, n_groups=2, group_limit=1)
    router.weight.data = np.eye(4)
    assert router(Tensor(logits), context()).mask().tolist() == [[True, True, False, False]] * 2
    assert router(Tensor(logits), context(training=True)).soft_load is None
    with pytest.raises(ValueError, match="without groups"):
        small("noisy_top_k", router_options=dict(n_groups=2, group_limit=1), losses={"load": .1})


# -- by trial, and shuffled --------------------------------------------------------------------

def test_reinforce_draws_from_its_softmax_while_training_and_takes_the_best_otherwise():
    p = np.array([.6, .3, .1])
    r = route(np.tile(np.log(p), (6000, 1)), "reinforce", where=context(training=True))
    np.testing.assert_allclose(r.load / 6000, p, atol=.02)
    assert (r.gate.data == 1).all() and not r.gate.requires_grad
    assert route([[.1, .2, 0.], [.3, .3, .1]], "reinforce").expert.tolist() == [0, 1]  # a tie to the lowest


def test_reinforce_learns_by_the_policy_loss_alone():
    model, ids = Transformer(small("reinforce", aux_coef=0), seed=1), np.random.default_rng(0).integers(0, 11, (4, 7))
    weight = model.moe_parts()[0].router.weight
    terms = model.loss(ids[:, :-1], ids[:, 1:], training=True, rng=np.random.default_rng(0))
    assert terms.total.item() == pytest.approx(terms.cross_entropy.item() + terms.policy.item(), rel=1e-6)
    terms.cross_entropy.backward()
    assert weight.grad is None
    model.loss(ids[:, :-1], ids[:, 1:], training=True, rng=np.random.default_rng(0)).policy.backward()
    assert np.abs(weight.grad).max() > 0


def test_shuffled_keeps_the_load_and_takes_the_choice_from_the_token():
    logits = np.random.default_rng(0).standard_normal((64, 4))
    own, dealt = route(logits, "top_k", 2), route(logits, "shuffled", 2, where=context())
    assert own.load.tolist() == dealt.load.tolist() and (dealt.coverage == 2).all()
    assert (own.mask() != dealt.mask()).any(axis=1).mean() > .5
    p = dealt.probs.data * dealt.mask()
    np.testing.assert_allclose(dealt.to_dense().data, p / p.sum(axis=1, keepdims=True))


def test_shuffled_on_the_prefix_deals_out_earlier_choices_of_the_same_sequence():
    """Tokens 0 to 2 of a sequence choose expert 0, the others 1; the other sequence chooses 2 and 3."""
    logits = np.eye(4)[[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]]
    for seed in range(5):
        r = route(logits, "shuffled", 1, context(ids=np.zeros((2, 6), int), seed=seed, causal=True))
        e = r.mask().argmax(axis=1)
        assert (e[:3] == 0).all() and set(e[:6]) <= {0, 1} and (e[6:9] == 2).all() and set(e[6:]) <= {2, 3}


# -- what every router promises -----------------------------------------------------------------

def small(name, **changes):
    k = 1 if ROUTERS[name].top_1_only else 2
    return ModelConfig(
        **dict(
            vocab_size=11,
            n_layers=2,
            d_model=8,
            n_heads=2,
            d_ff=8,
            seq_len=6,
            moe_layers=(1,),
            n_experts=4,
            router=name,
            top_k=k,
        )
        | changes
    )


@pytest.mark.parametrize("name", ALL)
def test_every_router_trains_the_small_model(name):
    """Without a special case: the loss on one batch falls, and a learned router's weights have a gradient of the text
    and move."""
    model, rng = Transformer(small(name, aux_coef=0), seed=1), np.random.default_rng(0)
    ids, optimizer = rng.integers(0, 11, (4, 7)), AdamW(model.parameters(), lr=1e-2)
    parameters, losses = model.moe_parts()[0].router.parameters().values(), []
    output = model.forward(ids[:, :-1], training=True, rng=np.random.default_rng(0), domain=np.arange(4))
    model.loss_terms(output, ids[:, 1:]).cross_entropy.backward()
    learns = any(p.grad is not None and p.grad.any() for p in parameters)
    assert learns == (ROUTERS[name].learned and name != "reinforce")  # which learns by its policy loss
    before = [p.data.copy() for p in parameters]
    for _ in range(30):
        output = model.forward(ids[:, :-1], training=True, rng=rng, domain=np.arange(4))
        terms = model.loss_terms(output, ids[:, 1:])
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        model.after_step(output.routings)
        losses.append(terms.cross_entropy.item())
    assert losses[-1] < losses[0] - .5
    assert ROUTERS[name].learned == any((p.data != old).any() for p, old in zip(parameters, before))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_a_router_is_as_causal_as_it_says(name, training):
    """Change the last tokens of each sequence: a causal router routes the others as before, another one does not."""
    rng, ids, e = np.random.default_rng(0), np.zeros((8, 6), int), 4
    router = routers.make(name, 5, e, 1, dtype=np.float64, **({"router_std": 1.0} if name != "expert_choice" and
                                                                 ROUTERS[name].learned else {}))
    x = rng.standard_normal((8, 6, 5))
    later = x.copy()
    later[:, 3:] += 3 * rng.standard_normal((8, 3, 5))
    before, after = (
        router(Tensor(z.reshape(48, 5)), context(training, ids)).mask().reshape(8, 6, e)[:, :3] for z in (x, later)
    )
    promised = router.causal_training if training else router.causal
    assert (before == after).all() == promised


@pytest.mark.parametrize("name", ALL)
def test_one_token_one_expert_and_all_experts(name):
    k = 1 if ROUTERS[name].top_1_only else 4
    one_expert = routers.make(name, 3, 1, 1)(Tensor(np.ones((5, 3), "f")), context(True, np.zeros((1, 5), int)))
    assert one_expert.load.tolist() == [5]
    all_experts = routers.make(name, 3, 4, k)(Tensor(np.ones((1, 3), "f")), context(True, np.zeros((1, 1), int)))
    assert all_experts.coverage.tolist() == [k] or ROUTERS[name].mean_k
    assert all_experts.gate.dtype == np.float32


@pytest.mark.parametrize("name", ALL)
def test_every_router_says_what_it_is(name):
    router = ROUTERS[name]
    assert router.name == name and router.__doc__
    assert (router.paper != "–") == (name not in ("random", "shuffled"))
    assert all(router.meaning(option) for option in router.options())
    config = small(name)
    parameters = Transformer(config).moe_parts()[0].router.parameters()
    length = {"D": config.d_model, "E": config.n_experts, "V": config.vocab_size, "R": 16}
    assert {n: p.shape for n, p in parameters.items()} == {
        n: tuple(map(length.get, axes)) for n, axes in router.shapes.items()
    }


# -- numbers at their limits ----------------------------------------------------------------------

@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_no_tokens_are_routed_nowhere(name, training):
    """Nothing that is saved becomes NaN, and the load is 0."""
    k = 1 if ROUTERS[name].top_1_only or ROUTERS[name].sampled else 2
    router = routers.make(name, 3, 4, k)
    routing = router(Tensor(np.zeros((0, 3), np.float32)), context(training, np.zeros((0, 5), int)))
    assert routing.load.tolist() == [0] * 4
    router.after_step(routing)
    assert all(np.isfinite(p.data).all() for p in router.parameters().values())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_large_logits_give_finite_gates(name, training):
    k = 1 if ROUTERS[name].top_1_only or ROUTERS[name].sampled else 2
    router, rng = routers.make(name, 4, 4, k), np.random.default_rng(0)
    if hasattr(router, "weight"):
        router.weight.data = rng.normal(0, 5e3, router.weight.shape).astype(np.float32)
    x = Tensor(rng.standard_normal((32, 4)).astype(np.float32), requires_grad=True)
    routing = router(x, context(training, rng.integers(0, 256, (4, 8))))
    assert np.isfinite(routing.gate.data).all()
    if routing.gate.requires_grad:
        routing.gate.sum().backward()
        assert np.isfinite(x.grad).all()


def test_sinkhorn_chooses_well_where_its_plan_underflows():
    """Against the same iteration on logarithms."""
    logits = np.random.default_rng(0).standard_normal((64, 4)) * 1e3
    plan = logits.copy()
    for _ in range(20):
        plan -= np.logaddexp.reduce(plan, axis=1, keepdims=True)
        plan += np.log(16) - np.logaddexp.reduce(plan, axis=0)
    second = np.argsort(-plan, axis=1)[:, 1]
    chosen = route(logits, "sinkhorn", 2, context(training=True)).mask()
    assert (routers.sinkhorn_plan(logits) == 0).any() and chosen[np.arange(64), second].all()


def test_top_p_is_steered_by_what_was_wanted():
    """A capacity limit drops half of the assignments: top_p would rise for ever if it made up for them."""
    router = routers.make("top_p", 4, 4, 1, dtype=np.float64, steer=.1)
    router.weight.data = np.eye(4) * 9
    routing = router(Tensor(np.eye(4)[[0] * 8]), EVALUATION)
    assert routing.load.tolist() == [8, 0, 0, 0]
    router.after_step(limit_capacity(routing, 1, 1))
    assert router.threshold.data == .4


@pytest.mark.parametrize("name, options, steered, load, end", [
    ("remoe", {}, "coefficient", 0, 1e-20), ("remoe", {}, "coefficient", 4, 1e20),
    ("top_p", {"steer": 0.1}, "threshold", 0, 1.0), ("top_p", {"steer": 0.1}, "threshold", 4, 0.01)])
def test_what_steers_a_load_has_two_ends(name, options, steered, load, end):
    router = routers.make(name, 4, 4, 2, **options)
    routing = from_mask(np.arange(4)[None] < load, *[Tensor(np.ones((1, 4), np.float32))] * 3)
    for _ in range(700):
        router.after_step(routing)
    assert getattr(router, steered).data == np.float32(end)


def test_the_penalty_of_remoe_is_that_before_a_capacity_limit():
    router = routers.make("remoe", 2, 2, 1, dtype=np.float64, penalty_start=1.0)
    router.weight.data = np.eye(2)
    routing = router(Tensor([[1.0, -1], [3, 1]]), EVALUATION)
    want = 2 / 1 * (2 / 2 * (1 + 3) / 2 + 1 / 2 * 1 / 2)
    for each in routing, limit_capacity(routing, 1, 1):
        assert router.penalty(each, None).data == pytest.approx(want)


def test_real_bias_knows_the_experts_of_its_model():
    config = ModelConfig(n_layers=2, d_model=8, d_ff=8, n_heads=2, seq_len=8, moe_layers=(1,), n_experts=3, n_zero=2,
                         router="real_bias")
    assert Transformer(config).blocks[1].feed_forward.router.n_real == 3
    for real_k in (3, 4):
        with pytest.raises(ValueError, match=f"real_k {real_k} must be at most 2"):
            routers.make("real_bias", 4, 5, 2, n_real=3, real_k=real_k)
    with pytest.raises(ValueError, match="^n_real 6 must be at most n_experts 5$"):
        routers.make("real_bias", 4, 5, 2, n_real=6)


def test_all_experts_of_real_bias_are_real_unless_a_number_is_given():
    """One token, K = 1 of 4 experts, to have 1 real one: each 1/4 of the assignments; the chosen one has all."""
    router = routers.make("real_bias", 4, 4, 1, dtype=np.float64, bias_rate=1)
    router.after_step(router(Tensor(np.eye(4)[:1] * 0), EVALUATION))
    np.testing.assert_allclose(router.bias.data, [-.75, .25, .25, .25])


@pytest.mark.parametrize("name, option, value", [
    ("quantile_bias", "n_groups", 1), ("quantile_bias", "bias_rule", "sign"), ("hash_gated", "n_groups", 1)])
def test_an_option_that_a_router_fixes_is_refused(name, option, value):
    with pytest.raises(ValueError, match=f"^{option} is no option of {name}, .*: the class fixes it at {value!r}$"):
        routers.make(name, 4, 4, 1, **{option: value})


def test_a_threshold_of_0_takes_no_token_without_a_gate():
    router = routers.make("expert_threshold", 2, 2, 1)
    router.weight.data, router.threshold.data = np.eye(2, dtype=np.float32) * 200, np.array([0, .5], np.float32)
    assert router(Tensor(np.eye(2, dtype=np.float32)), EVALUATION).mask().tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("ids, domain, message", [
    (np.zeros((2, 3), int), [0], r"domain \(1,\) for 6 tokens of 2 sequences: give it one domain for each sequence"),
    (np.zeros((2, 3), int), [0, 1, 2], "of 2 sequences"), (np.zeros((2, 3), int), [[0, 1]], r"domain \(1, 2\)"),
    (np.zeros((2, 3), int), 0, r"domain \(\)"), (None, [0, 1, 2, 3], r"domain \(4,\) for 6 tokens: give"),
    (None, np.zeros(0, int), r"domain \(0,\)"), (None, [0, -1], r"domain \[0, -1\]: give it integers from 0"),
    (None, [0.5, 1.0], r"domain \[0.5, 1.0\]: give it integers")])
@pytest.mark.parametrize("name", ["oracle", "top_k"])
def test_domains_are_one_integer_for_each_sequence(name, ids, domain, message):
    with pytest.raises(routers.RouteError, match=f"^router {name} has RouteContext.*{message}"):
        routers.make(name, 3, 4, 2)(Tensor(np.zeros((6, 3), "f")), RouteContext(ids, domain=domain))


def test_the_oracle_takes_domains_of_any_integer_dtype():
    router, x = routers.make("oracle", 3, 6, 2), Tensor(np.zeros((1, 3), np.float32))
    masks = [router(x, RouteContext(domain=np.array([200], dtype))).mask() for dtype in (np.uint8, int)]
    np.testing.assert_array_equal(*masks)


# -- what a router wanted, and not what a capacity limit left, steers it --

@pytest.mark.parametrize("name", ["sigmoid_bias", "momentum_bias", "real_bias", "remoe", "top_p"])
def test_rules_count_what_was_wanted(name):
    """Loads (6, 2, 1) of 7 tokens become (3, 2, 1): by what is left, expert 0 would count as balanced, and a token
    would have less than one expert."""
    options = {"real_bias": {"n_real": 3}, "top_p": {"steer": 0.1}}.get(name, {})
    states = []
    for factor in (None, 1):
        router = routers.make(name, 3, 3, 1, dtype=np.float64, **options)
        scores = Tensor([[1.0, 1, 0]] * 2 + [[1, 0, 0]] * 4 + [[0, 0, 1]])
        routing = from_mask(scores.data > 0, scores, scores, scores)
        assert routing.load.tolist() == [6, 2, 1]
        before = {name: p.data.copy() for name, p in router.parameters().items()}
        router.after_step(routing if factor is None else limit_capacity(routing, factor, 1))
        states.append({name: p.data.copy() for name, p in router.parameters().items()})
    assert all((states[0][name] == states[1][name]).all() for name in before)
    assert any((states[0][name] != before[name]).any() for name in before)


def test_the_quantile_bias_goes_a_part_of_the_way():
    rng = np.random.default_rng(0)
    router = routers.make("quantile_bias", 4, 4, 1, dtype=np.float64, bias_rate=.5, score="softmax")
    router.weight.data, bias = np.eye(4), np.zeros(4)
    for _ in range(2):
        routing = router(Tensor(rng.standard_normal((12, 4))), context(training=True))
        scores = np.array([naive.softmax(row) for row in routing.logits.data])
        bias = bias + .5 * (naive_routing.quantile_bias(scores, bias, 1) - bias)
        router.after_step(routing)
        np.testing.assert_allclose(router.bias.data, bias)


@pytest.mark.parametrize("name", ["noisy_top_k", "sequence", "frozen"])
def test_jitter_multiplies_the_inputs_of_every_router_that_has_it(name):
    """The logits of `sequence` are means over its tokens: within 10% too, and not the same."""
    router = routers.make(name, 2, 2, 1, dtype=np.float64, jitter=.1)
    router.weight.data = np.eye(2)
    x, ids = np.tile([[100., 200]], (64, 1)), np.zeros((64, 1), int)
    ratio = router(Tensor(x), context(training=True, ids=ids)).logits.data / x
    assert ratio.std() > .03 and np.abs(ratio - 1).max() < .15
    np.testing.assert_allclose(router(Tensor(x), context(ids=ids)).logits.data, x)


def test_the_policy_loss_of_a_model_by_hand():
    model, ids = Transformer(small("reinforce", aux_coef=0), 1, np.float64), np.random.default_rng(0).integers(
        0, 11, (4, 7))
    output = model.forward(ids[:, :-1], training=True, rng=np.random.default_rng(0))
    nats = [-np.log(naive.softmax(row)[t]) for row, t in zip(output.logits.data.reshape(24, -1), ids[:, 1:].ravel())]
    r = output.routings[0]
    assert model.loss_terms(output, ids[:, 1:]).policy.item() == pytest.approx(
        naive_routing.policy(r.mask(), r.logits.data, nats))
