"""The auxiliary losses, each number worked out by hand."""
import numpy as np
import pytest

import naive_routing
from tinymoe import ModelConfig, ModelOutput, Tensor, Transformer, gradcheck
from tinymoe.autograd import functional as F
from tinymoe.moe import losses, routers
from tinymoe.moe.routing import from_mask, limit_capacity


def routing(gates, probs=None, logits=None, **fields):
    values = gates.numpy() if isinstance(gates, Tensor) else gates
    gates, probs, logits = (t if isinstance(t, Tensor) else Tensor(np.array(values if t is None else t, float))
                            for t in (gates, probs, logits))
    return from_mask(gates.data != 0, gates, logits, probs, **fields)


def circulant(n, k):
    """(n, n) with ones in columns i .. i + k - 1 of row i: every expert gets k tokens."""
    return np.array([np.roll([1.] * k + [0.] * (n - k), i) for i in range(n)])


# -- load balance -------------------------------------------------------------------------------

@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_is_1_at_balance_whatever_k(k):
    confident = circulant(4, k) / k
    assert losses.load_balancing_loss(routing(confident)).item() == pytest.approx(1)
    assert losses.load_balancing_loss(routing(confident, np.full((4, 4), .25))).item() == pytest.approx(1)


@pytest.mark.parametrize("gates, probs, expected", [
    ([[1, 0, 0, 0]] * 3, None, 4),                     # all on one expert, with certainty: E
    ([[.5, .5, 0, 0]] * 3, None, 2),                   # two experts carry all: 4 (1/2 1/2 + 1/2 1/2)
    ([[1, 0, 0, 0]] * 3, [[.25] * 4] * 3, 1),          # all on one, but undecided: 4 * 1 * 1/4
    # f = (2/3, 1/3), P = (.34, .66): 2 (.2267 + .22) = .893, below the balanced value
    ([[.51, 0], [.51, 0], [0, 1]], [[.51, .49], [.51, .49], [0, 1]], 2 * (2 / 3 * .34 + 1 / 3 * .66)),
    # top-2 of 3, f = (3, 2, 1) / 6, P = (.6, .3, .1): 3 (.3 + .1 + .0167)
    ([[.6, .4, 0], [.7, 0, .3], [.5, .5, 0]], [[.6, .3, .1]] * 3, 1.25),
    ([[0, 0]] * 3, [[.5, .5]] * 3, 0)])                # nobody chose anything
def test_balance_by_hand(gates, probs, expected):
    assert losses.load_balancing_loss(routing(gates, probs)).item() == pytest.approx(expected)


def test_balance_sees_the_demand_and_not_what_capacity_left():
    collapsed = routing([[1, 0, 0, 0]] * 8)
    limited = limit_capacity(collapsed, 1.0, 1)        # C = 2: the load is now (2, 0, 0, 0)
    assert losses.load_balancing_loss(limited).item() == 4
    mixed = limit_capacity(routing([[1, 0]] * 3 + [[0, 1]]), 1.0, 1)  # load (2, 1), demand (3, 1)
    assert losses.load_balancing_loss(mixed).item() == pytest.approx(2 * (9 + 1) / 16)  # and not 2 (2/3 3/4 + 1/3 1/4)


def test_the_share_of_tokens_carries_no_gradient():
    """d/dp[n, e] = E f_e / N, and the gates, from which f is counted, get nothing."""
    probs, gates = (Tensor(np.array([[.6, .4], [.9, .1], [.2, .8]]) * m, True) for m in (1, [[1, 0], [1, 0], [0, 1]]))
    losses.load_balancing_loss(routing(gates, probs)).backward()
    np.testing.assert_allclose(probs.grad, [[4 / 9, 2 / 9]] * 3)
    assert gates.grad is None


def collapsed_on(*experts):
    """Three tokens, top-2 of eight, all on the same pair."""
    row = np.zeros(8)
    row[list(experts)] = .5
    return routing([row] * 3)


def test_layers_are_never_pooled_before_the_product():
    """Four layers, each collapsed on another pair: each costs 8 (2 * 1/2 * 1/2) = 4. Their pooled load is perfectly
    balanced, 1."""
    config = ModelConfig(
        vocab_size=5, n_layers=4, d_model=4, n_heads=1, d_ff=4, seq_len=3, moe_layers=(0, 1, 2, 3), aux_coef=0.1
    )
    output = ModelOutput(Tensor(np.zeros((1, 3, 5))), [collapsed_on(2 * i, 2 * i + 1) for i in range(4)])
    terms = Transformer(config).loss_terms(output, np.zeros((1, 3), int))
    assert terms.balance.item() == pytest.approx(4)
    assert terms.total.item() == pytest.approx(np.log(5) + .1 * 4)


# -- within sequences, over devices ---------------------------------------------------------------

def test_sequence_balance_by_hand():
    """Two sequences of two tokens. The first has both on expert 0, P = (.8, .2): 2 * .8 = 1.6; the second is even, P
    = (.4, .6): 1."""
    r = routing([[1, 0], [1, 0], [1, 0], [0, 1]], [[.9, .1], [.7, .3], [.6, .4], [.2, .8]])
    assert losses.sequence_balance_loss(r, 2).item() == pytest.approx((1.6 + 1) / 2)
    assert losses.sequence_balance_loss(r, 4).item() == pytest.approx(losses.load_balancing_loss(r).item())


def test_each_sequence_may_collapse_though_the_batch_is_balanced():
    r = routing([[1, 0]] * 3 + [[0, 1]] * 3)
    assert losses.load_balancing_loss(r).item() == 1 and losses.sequence_balance_loss(r, 3).item() == 2


def test_global_balance_by_hand():
    """Shares (1, 0) in the batch before and (0, 1) now, over four batches: f = (3/4, 1/4). P = (.2, .8): 2 (.15 + .2).

    The first batch has no mean before it, and stands for itself: f = (0, 1), 2 * .8.
    """
    now = routing([[0, 1], [0, 1]], [[.3, .7], [.1, .9]])
    assert losses.global_balance_loss(now, np.array([1., 0]), 4).item() == pytest.approx(.7)
    assert losses.global_balance_loss(now, np.zeros(2), 4).item() == pytest.approx(1.6)
    assert losses.global_balance_loss(now, np.array([1., 0]), 1).item() == pytest.approx(
        losses.load_balancing_loss(now).item())
    none = routing(np.zeros((2, 2)), [[.5, .5], [.5, .5]])  # a batch without assignments leaves the share as it was
    assert losses.running_share(none, np.array([.75, .25]), 4).tolist() == [.75, .25]


def test_global_balance_in_a_model_follows_the_batches(tmp_path):
    """Against plain loops over five batches; the mean is saved with the model, and evaluation leaves it as it is."""
    config = ModelConfig(vocab_size=11, n_layers=1, moe_layers=(0,), d_model=8, n_heads=2, d_ff=8, seq_len=6,
                         n_experts=4, losses={"global_batch": .1}, balance_batches=3)
    model, rng, loads = Transformer(config, dtype=np.float64), np.random.default_rng(0), []
    for _ in range(5):
        ids = rng.integers(0, 11, (2, 7))
        output = model.forward(ids[:, :-1], training=True)
        terms, r = model.loss_terms(output, ids[:, 1:]), output.routings[0]
        loads.append(r.load)
        assert terms.global_batch.item() == pytest.approx(naive_routing.global_balance(loads, r.probs.data, 3))
        model.after_step(output.routings)
    before = model.moe_parts()[0].recent_share.data
    model.loss(ids[:, :-1], ids[:, 1:])
    model.save(tmp_path / "model.npz")
    np.testing.assert_array_equal(Transformer.load(tmp_path / "model.npz").moe_parts()[0].recent_share.data, before)
    assert model.count_parameters()["total"] == Transformer(ModelConfig(**config.to_dict() | {"losses": {}})
                                                            ).count_parameters()["total"] + 4


def test_device_balance_by_hand():
    """Four experts on two devices, K = 2: five of six assignments lie on device 0; P over devices (.7, .3): 2 (5/6
    .7 + 1/6 .3)."""
    r = routing([[.5, .5, 0, 0], [.5, .5, 0, 0], [0, .5, .5, 0]], [[.4, .3, .2, .1]] * 3)
    assert losses.device_balance_loss(r, 2).item() == pytest.approx(2 * (5 / 6 * .7 + 1 / 6 * .3))
    assert losses.device_balance_loss(r, 4).item() == pytest.approx(losses.load_balancing_loss(r).item())
    assert losses.device_balance_loss(r, 1).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="n_devices 3.*n_experts 4"):
        losses.device_balance_loss(r, 3)


def test_communication_balance_counts_tokens_not_assignments():
    """As above: all three tokens reach device 0, one reaches device 1 too; two devices allowed: 2/2 (1 * .7 + 1/3 *
    .3)."""
    r = routing([[.5, .5, 0, 0], [.5, .5, 0, 0], [0, .5, .5, 0]], [[.4, .3, .2, .1]] * 3)
    assert losses.communication_balance_loss(r, 2, 2).item() == pytest.approx(.7 + .1)
    even = routing([[1, 0, 0, 0], [0, 0, 0, 1]], [[.25] * 4] * 2)
    assert losses.communication_balance_loss(even, 2, 1).item() == pytest.approx(1)


@pytest.mark.parametrize("name", ["switch", "megatron", "hf_mixtral", "deepseek"])
def test_equivalent_coefficients_give_the_same_gradient(name):
    """Three layers of equal load, K = 2: the other conventions as they are written, against the mean over layers."""
    L, K, N, E = 3, 2, 6, 4
    gates = circulant(4, 2)[[0, 1, 1, 2, 3, 0]] / 2
    layers = [Tensor(np.random.default_rng(i).dirichlet(np.ones(E), N), requires_grad=True) for i in range(L)]
    count = (gates > 0).sum(axis=0)

    def published():
        if name == "hf_mixtral":
            pooled = F.concatenate(layers)                                        # (L N, E)
            return E * (Tensor(L * count / (L * N)) * pooled.mean(axis=0)).sum()
        f = count / N if name == "switch" else count / (N * K)
        return sum(E * (Tensor(f) * p.mean(axis=0)).sum() for p in layers)

    def gradient(loss):
        for p in layers:
            p.grad = None
        loss.backward()
        return [p.grad for p in layers]

    ours = .01 * sum(losses.load_balancing_loss(routing(gates, p)) for p in layers) * (1 / L)
    theirs = losses.equivalent_coefficient(.01, "tinymoe", name, L, K) * published()
    np.testing.assert_allclose(gradient(ours), gradient(theirs), rtol=1e-12)
    there = losses.equivalent_coefficient(.01, "tinymoe", name, L, K)
    assert losses.equivalent_coefficient(there, name, "tinymoe", L, K) == pytest.approx(.01)


def test_unknown_conventions_are_refused():
    with pytest.raises(ValueError, match="'gshard'.*megatron"):
        losses.equivalent_coefficient(.01, "tinymoe", "gshard", 3, 2)


# -- entropy, similarity ------------------------------------------------------------------------

def test_entropy_by_hand():
    """ln 2 of two equal logits, and nothing of a certain choice; whatever the probs are."""
    r = routing(np.eye(2), logits=[[0, 0], [800, 0]], probs=[[1, 0], [.5, .5]])
    assert losses.entropy_loss(r).item() == pytest.approx(np.log(2) / 2)
    p = np.random.default_rng(0).dirichlet(np.ones(4), 6)
    assert losses.entropy_loss(routing(p, logits=np.log(p))).item() == pytest.approx(naive_routing.mean_entropy(p))


def test_an_expert_that_is_masked_by_minus_infinity_leaves_losses_finite():
    """Of two equal logits and one of -inf: entropy ln 2, whose gradient is 0; -ln p of the chosen expert is ln 2."""
    r = routing([[1, 0, 0]], logits=Tensor(np.array([[0., 0, -np.inf]]), True), probs=[[.5, .5, 0]])
    entropy = losses.entropy_loss(r)
    entropy.backward()
    assert entropy.item() == pytest.approx(np.log(2)) and np.abs(r.logits.grad).max() < 1e-12
    logits = Tensor(np.array([[0., 0, -np.inf]] * 2), True)
    two = routing([[1, 0, 0], [0, 1, 0]], logits=logits, probs=[[.5, .5, 0]] * 2)
    policy = losses.policy_loss(two, np.array([1., 2]))  # advantages -1 and 1
    policy.backward()
    assert policy.item() == pytest.approx(0)
    np.testing.assert_allclose(logits.grad, np.array([[-.5, .5, 0], [-.5, .5, 0]]) / 2)


def test_similarity_by_hand():
    """Columns (2, 0) and (1, 1): R^T R = (4, 2; 2, 2), less I: 3 + 2 + 2 + 1."""
    assert losses.similarity_loss(Tensor(np.array([[2., 1], [0, 1]]))).item() == 8
    assert losses.similarity_loss(Tensor(np.eye(3)[:, :2])).item() == 0
    weight = np.random.default_rng(0).standard_normal((5, 3))
    assert losses.similarity_loss(Tensor(weight)).item() == pytest.approx(naive_routing.similarity(weight))


def test_similarity_is_the_mean_over_the_layers_whose_router_learns():
    config = ModelConfig(n_layers=2, moe_layers=(0, 1), router=("top_k", "frozen"), d_model=8, n_heads=2, d_ff=8,
                         n_experts=4, vocab_size=8, seq_len=4, losses={"similarity": 1.0})
    model = Transformer(config, dtype=np.float64)
    ids = np.zeros((1, 4), int)
    one = losses.similarity_loss(next(iter(model.moe_parts())).router.weight).item()
    assert model.loss(ids, ids).similarity.item() == pytest.approx(one)


# -- z, importance, load ------------------------------------------------------------------------

def test_z_by_hand():
    # logsumexp of the rows: ln 2 and ln 4 = 2 ln 2, so (1 + 4) / 2 (ln 2)^2
    logits = [[0, 0], [np.log(3), 0]]
    assert losses.z_loss(routing(np.eye(2), logits=logits)).item() == pytest.approx(2.5 * np.log(2) ** 2)
    assert losses.z_loss(routing(np.eye(2), logits=[[1000., 0]] * 2)).item() == pytest.approx(1e6)      # no overflow


@pytest.mark.parametrize("gates, expected", [
    ([[.6, .4], [.9, .1]], .25),               # importance (1.5, .5): variance 1/4, mean 1
    ([[1, 0], [0, 1]], 0),
    ([[1, 0, 0]] * 5, 2),                      # one has all: E - 1
    ([[0, 0]], 0)])                            # 0 / (0 + 1e-10)
def test_importance_by_hand(gates, expected):
    assert losses.importance_loss(routing(gates)).item() == pytest.approx(expected, abs=1e-9)


def test_load_by_hand():
    r = routing(np.eye(2), soft_load=Tensor(np.array([3., 1.])))
    assert losses.load_loss(r).item() == pytest.approx(.25)          # variance 1, mean 2
    with pytest.raises(ValueError, match="noisy_top_k.*load_balancing_loss"):
        losses.load_loss(routing(np.eye(2)))


@pytest.mark.parametrize("loss, name, k", [("load_loss", "noisy_top_k", 1), ("load_loss", "noisy_top_k", 2)] + [
    (loss, name, k) for loss in ("load_balancing_loss", "z_loss", "importance_loss")
    for name, k in (("top_k", 1), ("top_k", 2), ("noisy_top_k", 2), ("expert_choice", 1))
    if (loss, name) != ("load_balancing_loss", "expert_choice")])        # the constant 1: see below
def test_gradients(loss, name, k):
    rng = np.random.default_rng(5)
    router = routers.make(name, 3, 4, k, dtype=np.float64)
    for p in router.parameters().values():
        p.data = rng.standard_normal(p.shape)
    x = Tensor(rng.standard_normal((6, 3)))

    def value(*_):
        return getattr(losses, loss)(router(x, routers.RouteContext(training=True, rng=np.random.default_rng(2))))

    result = gradcheck(value, x, *router.parameters().values())
    assert result, result


def test_with_expert_choice_the_balance_loss_has_nothing_to_say():
    """f_e = 1/E whatever the router does, so the loss is the sum of P, which is 1."""
    x = Tensor(np.random.default_rng(0).standard_normal((8, 3)), requires_grad=True)
    loss = losses.load_balancing_loss(
        routers.make("expert_choice", 3, 4, 1, dtype=np.float64)(x, routers.RouteContext())
    )
    loss.backward()
    assert loss.item() == pytest.approx(1) and np.abs(x.grad).max() < 1e-15


@pytest.mark.parametrize("loss", ["load_balancing_loss", "z_loss", "importance_loss"])
def test_losses_keep_the_dtype(loss):
    x = Tensor(np.ones((4, 3), np.float32))
    r = routers.make("top_k", 3, 4)(x, routers.RouteContext())
    assert getattr(losses, loss)(r).dtype == np.float32


def test_descending_on_the_balance_loss_alone_balances():
    """From a router that sends all 64 tokens to expert 0: the gradient must point away from it."""
    rng = np.random.default_rng(0)
    logits = Tensor(rng.standard_normal((64, 4)) + [5, 0, 0, 0], requires_grad=True)
    for _ in range(300):
        p = F.softmax(logits)
        chosen = routers.largest(p.data, 1)
        loss = losses.load_balancing_loss(from_mask(chosen, p * chosen, logits, p))
        logits.grad = None
        loss.backward()
        logits.data = logits.data - 20 * logits.grad
    assert np.bincount(logits.data.argmax(axis=1), minlength=4).max() < 40


# -- policy -------------------------------------------------------------------------------------

def test_policy_loss_by_hand():
    """Costs (1, 2, 6), mean 3: each less the mean of the other two is (-3, -3/2, 9/2); every choice has probability
    1/2."""
    chosen = [[1, 0], [0, 1], [1, 0]]
    r = routing(chosen, logits=Tensor(np.zeros((3, 2)), True))
    loss = losses.policy_loss(r, np.array([1., 2., 6.]))
    assert loss.item() == pytest.approx((-3 - 1.5 + 4.5) * np.log(.5) / 3)
    loss.backward()  # d ln p(chosen) / d logits = chosen - p
    np.testing.assert_allclose(r.logits.grad, np.array([[-1.5, 1.5], [.75, -.75], [2.25, -2.25]]) / 3)


def test_a_loss_by_device_needs_devices():
    r = routing([[1, 1, 0, 0]] * 2)
    for n_devices in (0, -2, 3):
        with pytest.raises(ValueError, match=f"n_devices {n_devices} must be at least 1 and divide n_experts 4"):
            losses.device_balance_loss(r, n_devices)


def test_policy_loss_of_one_token_or_equal_costs_teaches_nothing():
    for costs in ([2.], [2., 2., 2.]):
        logits = Tensor(np.ones((len(costs), 2)), True)
        losses.policy_loss(routing([[1, 0]] * len(costs), logits=logits), np.array(costs)).backward()
        assert not logits.grad.any()


def test_policy_gradients_are_those_of_the_expected_cost():
    """Over many draws the mean gradient is that of sum over experts of p_e cost_e, worked out exactly."""
    rng, logits = np.random.default_rng(0), np.array([[.3, -.2, .5]] * 4)
    p, cost = np.exp(logits[0]) / np.exp(logits[0]).sum(), np.array([1., 3., 0.])
    exact, total, n = p * (cost - p @ cost), np.zeros(3), 4000
    for _ in range(n):
        drawn = rng.choice(3, 4, p=p)
        z = Tensor(logits.copy(), True)
        losses.policy_loss(routing(np.eye(3)[drawn], logits=z), cost[drawn]).backward()
        total += z.grad.sum(axis=0)  # the mean over four tokens that are alike
    np.testing.assert_allclose(total / n, exact, atol=0.02)


def test_the_number_of_layers_as_policy_coefficient_gives_the_exact_gradient(monkeypatch):
    """Two layers, two tokens in sequences of their own, two experts: all 16 draws, each weighed by its probability.

    The router's gradient is that of the expected cross-entropy, by differences."""
    config = ModelConfig(vocab_size=5, n_layers=2, moe_layers=(0, 1), d_model=4, n_heads=1, d_ff=4, seq_len=1,
                         n_experts=2, top_k=1, router="reinforce", aux_coef=0, losses={"policy": 2.0})
    model, rng = Transformer(config, 1, np.float64), np.random.default_rng(0)
    for p in model.parameters().values():
        p.data = p.data + .7 * rng.standard_normal(p.shape)
    routed = [part.router for part in model.moe_parts()]

    def drawn(router, x, context):
        logits = router.scores(x)
        return from_mask(router.draw, Tensor(np.ones((2, 2))), logits, F.softmax(logits))

    def expected(learn=False):
        total = 0
        for draws in np.ndindex(2, 2, 2, 2):
            for router, draw in zip(routed, np.eye(2, dtype=bool)[list(draws)].reshape(2, 2, 2)):
                router.draw = draw
            output = model.forward(np.array([[1], [3]]), training=True)
            terms = model.loss_terms(output, np.array([[2], [0]]))
            p = np.prod([r.probs.data[r.mask()] for r in output.routings])
            total += p * terms.cross_entropy.item()
            if learn:
                (p * terms.total).backward()
        return total

    monkeypatch.setattr(routers.ROUTERS["reinforce"], "forward", drawn)
    expected(learn=True)
    for weight in (router.weight for router in routed):
        step, start = rng.standard_normal(weight.shape), weight.data
        high, low = (expected() for weight.data in (start + 1e-5 * step, start - 1e-5 * step))
        weight.data = start
        assert (weight.grad * step).sum() == pytest.approx((high - low) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("layers, k", [(0, 1), (3, 0), (3, float("nan"))])
def test_equivalent_coefficients_need_layers_and_experts(layers, k):
    with pytest.raises(ValueError, match="above 0"):
        losses.equivalent_coefficient(.01, "tinymoe", "switch", layers, k)
