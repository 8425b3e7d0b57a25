"""The Routing record and the capacity limit, with three tokens and three experts worked by hand."""
import numpy as np
import pytest

from tinymoe import Routing, Tensor, gradcheck
from tinymoe.moe import routers
from tinymoe.moe.routing import capacity, from_mask, largest, limit_capacity, merge, shares

GATES = np.array([[.40, .60, 0],     # first choice expert 1, second expert 0
                  [.35, 0, .30],     # first choice expert 0, second expert 2
                  [.95, .05, 0]])    # first choice expert 0, second expert 1


def routing(gates, **fields):
    gates = gates if isinstance(gates, Tensor) else Tensor(np.array(gates, float))
    scores = Tensor(np.zeros(gates.shape))
    return from_mask(gates.data != 0, gates, scores, scores, **fields)


def pairs(r):
    return set(zip(r.token.tolist(), r.expert.tolist()))


def top_1(choices, n_experts):
    return routing(np.eye(n_experts)[list(choices)])


def test_fields_by_hand():
    r = routing(GATES)
    assert r.token.tolist() == [0, 1, 2, 0, 2, 1] and r.offsets.tolist() == [0, 3, 5, 6]
    assert r.expert.tolist() == [0, 0, 0, 1, 1, 2]
    assert r.gate.data.tolist() == [.40, .35, .95, .60, .05, .30]
    assert r.load.tolist() == [3, 2, 1] and r.coverage.tolist() == [2, 2, 2]
    assert (r.n_tokens, r.n_experts, r.n_dropped, r.demand.tolist()) == (3, 3, 0, [3, 2, 1])
    np.testing.assert_array_equal(r.to_dense().data, GATES)


def test_a_token_and_an_expert_may_have_nothing():
    r = routing([[0, 0, 1.], [0, 0, 0], [.5, 0, 0]])
    assert r.load.tolist() == [1, 0, 1] and r.coverage.tolist() == [1, 0, 1]


def test_a_gate_of_zero_is_still_an_assignment():
    zero = Tensor(np.zeros((2, 2)))
    r = from_mask(np.array([[True, False], [True, True]]), zero, zero, zero)
    assert r.load.tolist() == [2, 1] and r.mask().sum() == 3
    assert merge([r, r]).load.tolist() == [4, 2]


def test_gradients_go_to_the_chosen_places_only():
    gates = Tensor(GATES, requires_grad=True)
    weight = np.arange(9.).reshape(3, 3)
    (routing(gates).to_dense() * weight).sum().backward()        # matrix -> list -> matrix
    np.testing.assert_array_equal(gates.grad, weight * (GATES != 0))


def test_to_dense_keeps_the_dtype():
    assert routing(Tensor(GATES.astype(np.float32))).to_dense().dtype == np.float32


@pytest.mark.parametrize(
    "name, k", [("top_k", 1), ("top_k", 3), ("noisy_top_k", 2), ("expert_choice", 2), ("expert_choice", 0.5)]
)
@pytest.mark.parametrize("factor", [None, .5])
def test_every_router_makes_a_sorted_routing_without_repeats(name, k, factor):
    rng = np.random.default_rng(0)
    x = Tensor(rng.standard_normal((12, 6)).astype(np.float32))
    r = routers.make(name, 6, 4, k)(x, routers.RouteContext(training=True, rng=rng))
    r = r if factor is None else limit_capacity(r, factor, k)
    place = r.expert * 12 + r.token                              # by expert, then by token, none twice
    assert (np.diff(place) > 0).all()
    assert r.load.sum() == r.coverage.sum() == len(r.token) == r.offsets[-1]
    np.testing.assert_array_equal(r.to_dense().data != 0, r.mask())


@pytest.mark.parametrize("n_gates, offsets", [(3, [0, 1, 2]),      # three gates for two assignments
                                              (2, [0, 2]),         # one expert too few
                                              (2, [0, 1, 1]),      # the last assignment is nobody's
                                              (2, [1, 1, 2]),      # the first is nobody's
                                              (2, [0, 3, 2])])     # expert 1 has minus one
def test_sizes_that_do_not_fit_are_refused(n_gates, offsets):
    scores = Tensor(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="offsets"):
        Routing(np.array([0, 1]), np.array(offsets), Tensor(np.ones(n_gates)), scores, scores)


@pytest.mark.parametrize("token", [[0, 2], [-1, 1]])
def test_a_token_that_does_not_exist_is_refused(token):
    """The kernels do not look: they would read and write outside their arrays."""
    scores = Tensor(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="token"):
        Routing(np.array(token), np.array([0, 1, 2]), Tensor(np.ones(2)), scores, scores)


@pytest.mark.parametrize("change, message", [
    (dict(logits=Tensor(np.zeros((3, 2)))), r"logits \(3, 2\) and probs \(2, 2\) must both be"),
    (dict(probs=Tensor(np.zeros(4))), r"probs \(4,\) must both be"),
    (dict(probs=np.zeros((2, 2))), r"probs is a ndarray, but must be a Tensor: write tm.Tensor\(probs\)"),
    (dict(gate=np.ones(2)), "gate is a ndarray, but must be a Tensor"),
    (dict(token=np.array([0., 1.])), "token must be a one-dimensional array of signed integers, not float64"),
    (dict(token=[0, 1]), "token must be .* not a list"),
    (dict(offsets=np.array([0, 1, 2], np.uint8)), "offsets must be a one-dimensional array of signed integers")])
def test_fields_of_a_wrong_type_or_shape_are_refused(change, message):
    scores = Tensor(np.zeros((2, 2)))
    fields = dict(token=np.array([0, 1]), offsets=np.array([0, 1, 2]), gate=Tensor(np.ones(2)), logits=scores,
                  probs=scores)
    assert Routing(**fields).load.tolist() == [1, 1]
    with pytest.raises(ValueError, match=message):
        Routing(**fields | change)


@pytest.mark.parametrize("wrong", range(4))
def test_a_mask_and_its_tensors_have_one_shape(wrong):
    """A transposed matrix of gates has the wrong gates, and probs of 3 tokens make a Routing of 3 tokens."""
    parts = [np.eye(3, 2) > 0, *[Tensor(np.ones((3, 2)))] * 3]
    parts[wrong] = parts[wrong].T
    with pytest.raises(ValueError, match="chosen, gates, logits and probs must all be .*, not .*3, 2"):
        from_mask(*parts)
    parts[wrong] = [[1, 0], [0, 1], [0, 0]]
    with pytest.raises(ValueError, match="chosen must be an array|is a list, but must be a Tensor"):
        from_mask(*parts)


def test_a_gate_matrix_and_back():
    """(.5, 0; 0, .25): token 0 has expert 0, token 1 expert 1. The gradient comes back where a gate is not 0."""
    dense = Tensor(np.array([[.5, 0], [0, .25], [0, 0]]), requires_grad=True)
    r = from_mask(dense.data != 0, dense, dense, dense)
    assert r.token.tolist() == [0, 1] and r.offsets.tolist() == [0, 1, 2] and r.gate.data.tolist() == [.5, .25]
    assert r.to_dense().data.tolist() == dense.data.tolist()
    (r.to_dense() * 3).sum().backward()
    assert dense.grad.tolist() == [[3, 0], [0, 3], [0, 0]]


def test_merge_puts_tokens_one_after_the_other():
    whole = merge([routing(GATES, n_dropped=2), routing(GATES[:1], n_dropped=3)])
    np.testing.assert_array_equal(whole.to_dense().data, GATES[[0, 1, 2, 0]])
    assert whole.load.tolist() == [4, 3, 1] and whole.n_dropped == 5 and whole.n_tokens == 4


# -- capacity -----------------------------------------------------------------------------------

@pytest.mark.parametrize("n, e, k, factor, expected", [
    (8, 4, 1, 1.0, 2), (8, 4, 2, 1.0, 4),
    (10, 3, 1, 1.0, 4),       # 3.33 rounds up
    (8, 4, 1, 1.25, 3),       # 2.5 rounds up
    (20, 2, 1, 1.1, 11),      # 1.1 * 20 / 2 is 11.000000000000002 in floating point, but means 11
    (100, 10, 1, 1.1, 11), (30, 3, 2, 1.1, 22),
    (50_000_000, 2, 1, 1.1, 27_500_000),  # whose error is above 1e-9
    (8, 4, 2, 100, 8),        # no expert can hold a token twice
    (8, 4, 1, .01, 1),        # and each holds at least one
    (8, 4, .5, 1.0, 1)])      # expert choice with half an expert a token
def test_capacity(n, e, k, factor, expected):
    assert capacity(n, e, k, factor) == expected


@pytest.mark.parametrize(
    "factor, policy, kept_by_0, kept_by_1, n_dropped",
    [
        # C = factor * 3 * 2 / 3; expert 2 has token 1 alone and always keeps it
        (
            0.5,
            "order",
            {1},
            {0},
            3,
        ),  # C = 1: token 0 comes first but 0 is its second choice; tokens 1 and 2 go before it
        (0.5, "gate", {2}, {0}, 3),  # .95 is the largest
        (1.0, "order", {1, 2}, {0, 2}, 1),  # C = 2: both first choices
        (1.0, "gate", {0, 2}, {0, 2}, 1),  # .95, .40 before .35
        (1.5, "order", {0, 1, 2}, {0, 2}, 0),  # C = 3: the limit equals the largest load
        (9.0, "gate", {0, 1, 2}, {0, 2}, 0),
    ],
)
def test_who_is_dropped(factor, policy, kept_by_0, kept_by_1, n_dropped):
    r = limit_capacity(routing(GATES), factor, 2, policy)
    assert pairs(r) == {(t, 0) for t in kept_by_0} | {(t, 1) for t in kept_by_1} | {(1, 2)}
    assert r.n_dropped == n_dropped == 6 - len(r.token)
    assert r.demand.tolist() == [3, 2, 1]
    np.testing.assert_array_equal(r.to_dense().data, np.where(r.mask(), GATES, 0))


@pytest.mark.parametrize("gates, policy, kept", [
    # token 0 ties, so expert 0 is its first choice and 1 its second; expert 1 is the first choice of token 1
    ([[.5, .5], [.4, .6]], "order", {(0, 0), (1, 1)}),
    ([[.5, .5], [.5, .5]], "order", {(0, 0), (0, 1)}),     # the earlier token; token 1 loses all
    ([[.5, .5], [.5, .5]], "gate", {(0, 0), (0, 1)})])
def test_ties_at_capacity_one(gates, policy, kept):
    assert pairs(limit_capacity(routing(gates), .5, 2, policy)) == kept      # C = .5 * 2 * 2 / 2 = 1


def test_what_is_dropped_gets_no_gradient():
    gates = Tensor(GATES, requires_grad=True)
    r = limit_capacity(routing(gates), .5, 2)
    r.to_dense().sum().backward()
    np.testing.assert_array_equal(gates.grad, r.mask())


def test_a_second_limit_adds_to_the_count_and_keeps_the_first_demand():
    r = limit_capacity(limit_capacity(routing(GATES), 1.0, 2), .5, 2)
    assert r.n_dropped == 3 and r.load.tolist() == [1, 1, 1] and r.demand.tolist() == [3, 2, 1]


def test_unknown_policy():
    with pytest.raises(ValueError, match="'last'.*order, gate"):
        limit_capacity(routing(GATES), 1.0, 2, "last")


@pytest.mark.parametrize("policy", ["order", "gate"])
@pytest.mark.parametrize("choices, n_experts, share", [
    ([0] * 6 + [1] * 2 + [2], 3, 1 / 3),     # C = 3: expert 0 drops 3 of 9; (|6-3| + |2-3| + |1-3|) / 9 / 2 = 1/3
    ([0, 1, 2], 3, 0),
    ([2] * 8, 4, 3 / 4)])                    # C = 2
def test_top_1_at_factor_1_drops_half_the_distance_to_balance(choices, n_experts, share, policy):
    r = top_1(choices, n_experts)
    limited = limit_capacity(r, 1.0, 1, policy)
    assert limited.n_dropped / len(choices) == pytest.approx(share)
    assert share == pytest.approx(np.abs(r.load / len(choices) - 1 / n_experts).sum() / 2)


# -- ranking ------------------------------------------------------------------------------------

@pytest.mark.parametrize("k", range(5))
def test_largest_always_takes_k_and_a_nan_last(k):
    scores = np.array([[1, np.nan, 3, 2], [np.nan] * 4, [-np.inf, np.nan, -np.inf, 0], [1, 1, 1, 1]])
    expected = [[2, 3, 0, 1], [0, 1, 2, 3], [3, 0, 1, 2], [0, 1, 2, 3]]                     # NaN ties with -inf
    chosen = largest(scores, k)
    assert [set(np.flatnonzero(row)) for row in chosen] == [set(row[:k]) for row in expected]
    np.testing.assert_array_equal(largest(scores.T, k, axis=0), chosen.T)


@pytest.mark.parametrize("k", [5, -1])
def test_the_largest_k_are_from_0_to_all(k):
    with pytest.raises(ValueError, match=f"^k {k} must be from 0 to 4, the number of entries along this axis$"):
        largest(np.zeros((2, 4)), k)
    assert largest(np.zeros((2, 4)), 0).sum() == 0 and largest(np.zeros((2, 4)), 4).all()


def test_shares_of_what_is_chosen():
    """.5 and .3 of .8; all of .2; with dy = (1, 0, 0) in the first row, dx = ((1 - 5/8) / .8, -(5/8) / .8, 0)."""
    values, chosen = np.array([[.5, .3, .2], [.2, .7, .1]]), np.array([[1, 1, 0], [1, 0, 0]], bool)
    np.testing.assert_allclose(shares(Tensor(values), chosen).data, [[5 / 8, 3 / 8, 0], [1, 0, 0]])
    leaf = Tensor(values, requires_grad=True)
    shares(leaf, chosen).backward(np.array([[1., 0, 0], [0, 0, 0]]))
    np.testing.assert_allclose(leaf.grad, [[3 / 6.4, -5 / 6.4, 0], [0, 0, 0]])
    assert gradcheck(lambda x: shares(x, chosen), values).ok


def test_assignments_must_be_sorted_and_there_once():
    probs = Tensor(np.full((3, 2), .5))
    for token in ([1, 0, 2], [0, 0, 2]):
        with pytest.raises(ValueError, match="must rise.*only once"):
            Routing(np.array(token), np.array([0, 2, 3]), Tensor(np.ones(3)), probs, probs)
    assert Routing(np.array([1, 2, 0]), np.array([0, 2, 3]), Tensor(np.ones(3)), probs, probs).load.tolist() == [2, 1]


@pytest.mark.parametrize("factor", [0, -1.0, float("nan")])
def test_a_capacity_factor_is_above_0(factor):
    with pytest.raises(ValueError, match="capacity factor .* must be above 0"):
        limit_capacity(routing(GATES), factor, 2)
    assert capacity(0, 4, 2) == 0  # at most N


@pytest.mark.parametrize("n, e, k", [(8, 2, 0), (8, 2, -1), (8, 2, float("nan")), (-1, 8, 2), (8, 0, 2)])
def test_a_capacity_needs_tokens_experts_and_a_k(n, e, k):
    with pytest.raises(ValueError, match=f"above 0, not {n} tokens, {e} experts and {k} per token"):
        capacity(n, e, k)
    with pytest.raises(ValueError, match="not 4 tokens, 3 experts and 0 per token"):
        limit_capacity(routing(np.ones((4, 3))), 1.0, 0)


def test_shares_of_nothing_are_0():
    values = Tensor(np.array([[.25, .75, .5], [.1, 0, 0], [.2, .3, .5]]), requires_grad=True)
    chosen = np.array([[True, True, False], [False, True, True], [False] * 3])
    share = shares(values, chosen)
    assert share.data.tolist() == [[.25, .75, 0], [0, 0, 0], [0, 0, 0]]
    share.sum().backward()
    assert np.isfinite(values.grad).all()
