"""Metrics by hand, and their values under chance."""
import math

import numpy as np
import pytest

import naive_routing
from tinymoe import ExpertBank, Tensor
from tinymoe.moe import metrics
from tinymoe.moe.routing import from_mask, limit_capacity
from tinymoe.training.evaluation import Validation, layer_numbers


def routing(gates, probs=None):
    gates = np.array(gates, float)
    probs = Tensor(gates if probs is None else np.array(probs, float))
    return from_mask(gates != 0, Tensor(gates), probs, probs)


def top_1(choices, n_experts):
    return routing(np.eye(n_experts)[np.asarray(choices)])


LOADS = (metrics.load_cv, metrics.max_violation, metrics.load_entropy, metrics.dead_experts, metrics.effective_experts)


@pytest.mark.parametrize("load", [4, [-4, 4], [[4, 4], [8, 0]], [], [math.nan, 1], [math.inf, 1], None, "ab",
                                  [top_1([0, 1], 2)], np.ones((8, 8))])
@pytest.mark.parametrize("of", LOADS)
def test_what_is_no_load_of_one_layer_is_refused(of, load):
    with pytest.raises(ValueError, match=r"^a load is \(E,\) counts of at least 0, or one Routing, not .*: give one "):
        of(load)


def test_effective_experts_by_hand():
    """4 equal loads are 4 experts; (2, 1, 1) of 4 has the entropy ln 2 / 2 + ln 4 / 2 = ln 2^1.5; nothing is 0."""
    for load, expected in ([5, 5, 5, 5], 4), ([2, 1, 1], 2 ** 1.5), ([9, 0], 1), ([7], 1), ([0, 0], 0):
        assert metrics.effective_experts(load) == pytest.approx(expected)
    assert metrics.effective_experts(top_1([0, 0, 1, 2], 3)) == pytest.approx(2 ** 1.5)


@pytest.mark.parametrize(
    "load, cv, violation, entropy, dead",
    [
        ([4, 4, 4, 4], 0, 0, 1, 0),
        ([16, 0, 0, 0], math.sqrt(3), 3, 0, 3),  # sqrt(E - 1) and E - 1
        (
            [3, 1, 2],
            math.sqrt(2 / 3) / 2,
            0.5,  # variance (1 + 1 + 0) / 3, mean 2
            (math.log(2) / 2 + math.log(6) / 6 + math.log(3) / 3) / math.log(3),
            0,
        ),
        (
            [1, 99, 100, 200],
            math.sqrt((99**2 + 1 + 0 + 100**2) / 4) / 100,
            1,
            (0.0025 * math.log(400) + 0.2475 * math.log(400 / 99) + 0.25 * math.log(4) + 0.5 * math.log(2))
            / math.log(4),
            0,
        ),  # exactly 1%: alive
        ([1, 199, 200, 400], None, None, None, 1),  # half a percent of the fair share: dead
        ([7], 0, 0, 1, 0),
        ([0, 0], 0, 0, 1, 2),
    ],
)
def test_load_by_hand(load, cv, violation, entropy, dead):
    load = np.array(load)
    for function, expected in (
        (metrics.load_cv, cv),
        (metrics.max_violation, violation),
        (metrics.load_entropy, entropy),
        (metrics.dead_experts, dead),
    ):
        if expected is not None:
            assert function(load) == pytest.approx(expected)
            assert function(top_1(np.repeat(np.arange(len(load)), load), len(load))) == pytest.approx(expected)


def test_entropies_tell_confident_from_balanced():
    confident = routing(np.eye(3))                     # each token certain, all experts used
    undecided = routing(np.eye(3), np.full((3, 3), 1 / 3))
    collapsed = routing([[1, 0, 0]] * 3)
    assert [metrics.router_entropy(r) for r in (confident, undecided, collapsed)] == pytest.approx([0, math.log(3), 0])
    assert [metrics.marginal_entropy(r) for r in (confident, undecided, collapsed)] == pytest.approx(
        [math.log(3), math.log(3), 0]
    )
    # (.5, .5) has ln 2, (1, 0) has none; together (.75, .25)
    mixed = routing(np.eye(2), [[.5, .5], [1, 0]])
    assert metrics.router_entropy(mixed) == pytest.approx(math.log(2) / 2)
    assert metrics.marginal_entropy(mixed) == pytest.approx(.75 * math.log(4 / 3) + .25 * math.log(4))


def test_dropped_assignments_and_uncovered_tokens_are_two_numbers():
    r = limit_capacity(
        routing([[0.6, 0.4]] * 3), 0.5, 2
    )  # C = ceil(.5 * 3 * 2 / 2) = 2: token 2 loses both, nobody else any
    assert metrics.drop_rate(r) == pytest.approx(2 / 6) and metrics.token_coverage(r) == pytest.approx(2 / 3)
    r = limit_capacity(routing([[.6, .4], [.4, .6]]), .5, 2)     # C = 1: both lose their second choice
    assert metrics.drop_rate(r) == .5 and metrics.token_coverage(r) == 1


def test_saturation_by_hand():
    then = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]], bool)
    final = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]], bool)  # token 0 keeps both, 1 keeps one of two, 2 ends without
    assert metrics.saturation(then, final) == 3 / 4 and metrics.saturation(final, final) == 1
    assert metrics.saturation(final, then) == 3 / 6
    assert metrics.saturation(then, np.zeros((3, 3), bool)) == 0


def test_saturation_of_independent_choices_is_chance():
    masks = np.random.default_rng(0).random((2, 20_000, 8)).argsort(axis=2) < 2
    assert metrics.saturation(*masks) == pytest.approx(2 / 8, abs=.01)


def test_co_activation_by_hand():
    r = routing([[.5, .5, 0, 0], [.5, 0, .5, 0], [.5, .5, 0, 0], [0, 1, 0, 0]])
    # expert 0 has tokens 0 1 2, expert 1 has 0 2 3, expert 2 has 1, expert 3 none
    np.testing.assert_allclose(
        metrics.co_activation(r), [[1, 2 / 3, 1 / 3, 0], [2 / 3, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    )


@pytest.mark.parametrize(
    "choices, seq_len, expected",
    [
        ([0, 0, 1, 1], 4, 2 / 3),
        ([0, 0, 1, 1], 2, 1),
        ([0, 1, 1, 0], 2, 0),  # pairs never cross from one sequence to the next
        ([1, 1, 1], 1, 0),
    ],
)
def test_repetition(choices, seq_len, expected):
    assert metrics.repetition(top_1(choices, 2), seq_len) == pytest.approx(expected)


def test_repetition_with_two_experts_a_token():
    # 0 -> 1: both of {0, 1} against {1, 2}, one stays; 1 -> 2: {1, 2} against {1, 2}, two stay
    assert metrics.repetition(routing([[1, 1, 0], [0, 1, 1], [0, 1, 1]]), 3) == 3 / 4


def bank(w1, w2):
    b = ExpertBank(len(w1), 2, 1)
    b.w1.data, b.w2.data = np.array(w1, np.float32).reshape(-1, 2, 1), np.array(w2, np.float32).reshape(-1, 1, 2)
    return b


@pytest.mark.parametrize("w1, w2, expected", [
    ([[1, 0], [1, 0]], [[0, 2], [0, 2]], 0),                       # the same
    ([[1, 0], [3, 0]], [[0, 2], [0, 6]], 0),                       # the same but for the scale
    ([[1, 0], [-1, 0]], [[0, 2], [0, -2]], 2),                     # opposite
    ([[1, 0], [0, 1]], [[1, 0], [1, 0]], .5),                      # cosine of (1,0,1,0) and (0,1,1,0): 1/2
    ([[1, 0], [1, 0], [0, 1]], [[0, 0]] * 3, 2 / 3)])              # cosines 1, 0, 0
def test_weight_divergence(w1, w2, expected):
    assert metrics.weight_divergence(bank(w1, w2)) == pytest.approx(expected, abs=1e-6)
    assert metrics.weight_divergence(bank(w1, w2), 4.0) == pytest.approx(expected / 4, abs=1e-6)
    assert metrics.weight_divergence(bank(w1, w2), 2e-16) == pytest.approx(expected, abs=1e-6)  # copies, rounded


def test_random_experts_are_already_far_apart():
    assert metrics.weight_divergence(ExpertBank(8, 32, 64)) == pytest.approx(1, abs=.01)
    assert metrics.weight_divergence(ExpertBank(1, 4, 4), 0.0) == 0


# -- information --------------------------------------------------------------------------------

def test_label_load_by_hand():
    r = routing([[1, 1, 0], [0, 1, 0], [0, 0, 1]])
    assert metrics.label_load(r, np.array([1, 0, 1]), 2).tolist() == [[0, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize("counts, expected", [
    ([[5, 0], [0, 5]], math.log(2)),                   # the label tells the expert
    ([[2, 4], [3, 6]], 0),                             # independent: rows in proportion
    ([[3, 1], [1, 3]], .75 * math.log(1.5) + .25 * math.log(.5)),      # 6/16 against 1/4, 2/16 against 1/4
    ([[4, 0, 0], [0, 2, 2]], math.log(2)),
    ([[0, 0], [0, 0]], 0)])
def test_mutual_information(counts, expected):
    assert metrics.mutual_information(np.array(counts)) == pytest.approx(expected, abs=1e-12)


def test_shuffled_labels_leave_the_known_bias():
    """Independent labels: the plug-in estimate is not 0 but (rows - 1)(columns - 1) / 2n."""
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=2000)
    experts = np.eye(8, dtype=int)[labels * 2 + rng.integers(2, size=2000)]      # the label decides a pair of experts
    real = np.stack([experts[labels == d].sum(axis=0) for d in range(3)])
    assert metrics.mutual_information(real) == pytest.approx(math.log(3), abs=.01)
    null = metrics.shuffled_information(experts, labels, 3, rng, 200)
    assert null == pytest.approx(2 * 5 / 4000, rel=.2)           # six of the eight experts are used


def test_shuffling_windows_leaves_more_than_shuffling_tokens():
    """Units that are alike inside (a window of one domain) must be shuffled whole: 20 windows of 50, not 1,000
    tokens."""
    rng = np.random.default_rng(0)
    by_window = np.eye(4, dtype=int)[rng.integers(4, size=20)] * 50
    by_token = np.repeat(by_window // 50, 50, axis=0)
    domains = np.arange(20) % 2
    null = [metrics.shuffled_information(counts, labels, 2, rng)
            for counts, labels in ((by_window, domains), (by_token, np.repeat(domains, 50)))]
    assert null[0] > .03 and null[1] < .004            # 3 / 40 and 3 / 2000


def test_the_null_of_domains_shuffles_windows_and_that_of_bytes_tokens():
    """20 windows of 50 bytes, all of one expert; the bytes are random, of 5 values: 12 / 2000."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, size=(20, 50))
    found = layer_numbers([top_1(np.repeat(rng.integers(4, size=20), 50), 4)],
                          Validation(ids, ids, np.arange(20) % 2, ("x", "y"), 20))
    assert found["mutual_information_null"] > .03 > found["byte_information_null"]


# -- noise floors (CLAIMS) ----------------------------------------------------------------------

def test_noise_floor_of_uniform_random_top_1():
    """E = 8, N = 2048: the variance of a count is 256 * 7/8, so CV^2 is 7 / 2048 on average, CV about .058; drop
    share 2.3%."""
    rng = np.random.default_rng(0)
    routings = [top_1(rng.integers(8, size=2048), 8) for _ in range(200)]
    cv = np.sqrt(np.mean([metrics.load_cv(r) ** 2 for r in routings]))
    assert cv == pytest.approx(math.sqrt(7 / 2048), rel=.06) and cv == pytest.approx(.058, abs=.003)
    dropped = np.mean([metrics.drop_rate(limit_capacity(r, 1.0, 1)) for r in routings])
    assert dropped == pytest.approx(.023, abs=.0015)


# -- what experts know of one label beyond the other --

@pytest.mark.parametrize("expert, byte_known, domain_known", [
    (lambda byte, domain: 2 * domain + byte % 2, 1, 1),  # of byte: ln 2 of ln 2, as the experts have ln 4 in all
    (lambda byte, domain: byte % 2, 1, 0), (lambda byte, domain: domain, 0, 1), (lambda byte, domain: 0 * byte, 0, 0),
    (lambda byte, domain: byte % 2 ^ domain, 1, 1)])  # neither alone says anything
def test_shares_of_what_could_be_known_by_hand(expert, byte_known, domain_known):
    """Two bytes and two domains, all four pairs equally often: ln 2 of each is open once the other is known."""
    rng = np.random.default_rng(0)
    domain, ids = np.arange(200) % 2, np.tile(np.arange(32) % 2, (200, 1))
    gates = np.eye(4)[np.broadcast_to(expert(ids, domain[:, None]), ids.shape).ravel()]
    found = metrics.information_given(routing(gates), ids, domain, rng)
    assert found["byte_known"] == pytest.approx(byte_known, abs=0.03)
    assert found["domain_known"] == pytest.approx(domain_known, abs=0.03)
    assert found["byte_given_domain"] == pytest.approx(byte_known * np.log(2), abs=0.03)


@pytest.mark.parametrize("n_bytes, chosen, share", [
    (4, lambda byte: [byte // 2], 1),  # 2 experts can carry ln 2 of the ln 4 of four bytes: all that they can
    (8, lambda byte: [byte % 2, 2 + byte // 2 % 2], 1),  # 2 of 4 a byte: ln 4 - ln 2 at most. H(e) = ln 4
    (8, lambda byte: [byte % 2, 2], np.log(2) / 2 / np.log(2))])  # half of the assignments say ln 2, the others nothing
def test_what_experts_can_carry_is_the_ceiling(n_bytes, chosen, share):
    ids = np.tile(np.arange(64) % n_bytes, (100, 1))
    gates = np.zeros((ids.size, 4 if n_bytes == 8 else 2))
    for token, byte in enumerate(ids.ravel()):
        gates[token, chosen(byte)] = 0.5
    found = metrics.information_given(routing(gates), ids, np.arange(100) % 2, np.random.default_rng(0))
    assert found["byte_known"] == pytest.approx(share, abs=0.03) and abs(found["domain_known"]) < 0.03


def test_bytes_are_shuffled_within_their_domain():
    """Random experts, and no byte in both domains: shuffled over all bytes, the null would be too large by 0.1 nats."""
    rng = np.random.default_rng(0)
    domain = np.tile([1, 0], 10)
    ids = rng.integers(0, 8, (20, 16)) + 8 * domain[:, None]
    gates = np.eye(4)[rng.integers(0, 4, ids.size)]
    found = metrics.information_given(routing(gates), ids, domain, np.random.default_rng(1))
    assert abs(found["byte_given_domain"]) < 0.05


def test_where_nothing_could_be_known_the_share_is_0():
    ids, alone = np.tile(np.arange(8), (4, 1)), np.ones((32, 1))
    found = metrics.information_given(routing(alone), ids, np.zeros(4, int), np.random.default_rng(0))
    assert found == dict.fromkeys(("byte_given_domain", "domain_given_byte", "byte_known", "domain_known"), 0)


def test_labels_may_have_any_integer_dtype():
    """A byte times the number of experts does not fit into a byte."""
    rng = np.random.default_rng(0)
    labels, chosen = rng.integers(0, 256, 64), rng.random((64, 8)) < .25
    r = from_mask(chosen, *[Tensor(np.ones((64, 8)))] * 3)
    small, large = (metrics.label_load(r, labels.astype(dtype), 256) for dtype in (np.uint8, int))
    np.testing.assert_array_equal(small, large)
    null = [metrics.shuffled_information(chosen.astype(int), labels.astype(dtype), 256, np.random.default_rng(1))
            for dtype in (np.uint8, int)]
    assert null[0] == null[1]


def test_the_numbers_of_a_layer_by_loops():
    """Two batches of two windows of three bytes: the mean of both MaxVios is not that of the whole."""
    rng = np.random.default_rng(0)
    masks = [rng.random((6, 4)) < chance for chance in ([.9, .2, .2, .1], [.1, .2, .2, .9])]
    ids, domain = rng.integers(0, 5, (4, 3)), np.array([0, 1, 0, 1])
    routings = [from_mask(mask, *[Tensor(np.full((6, 4), .25))] * 3) for mask in masks]
    found = layer_numbers(routings, Validation(ids, ids, domain, ("x", "y"), 2))
    whole = np.concatenate(masks)
    each = [naive_routing.violation(mask.sum(axis=0)) for mask in masks]
    assert found["max_violation_batch"] == pytest.approx(sum(each) / 2)
    assert found["max_violation"] == pytest.approx(naive_routing.violation(whole.sum(axis=0))) != sum(each) / 2
    tables = [naive_routing.label_load(whole, labels, n) for labels, n in (
        (ids.ravel(), 5), (np.repeat(domain, 3), 2))]
    assert found["byte_information"] == pytest.approx(naive_routing.mutual_information(tables[0]))
    assert found["mutual_information"] == pytest.approx(naive_routing.mutual_information(tables[1]))
    assert found["domain_load"] == tables[1].tolist()
    assert found["repetition"] == pytest.approx(naive_routing.repetition(whole, 3))
