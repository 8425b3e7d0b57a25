"""Properties that hold for every input: random graphs, routings, configs, files and corpora, found by hypothesis.

The cases are the same at every run. The default is small; `TINYMOE_TESTS=long pytest tests/test_properties.py` takes
thirty times as many cases, another seed of them with TINYMOE_SEED=N.
"""

import dataclasses
import hashlib
import json
import math
import os
import unicodedata

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, example, given, seed, settings
from hypothesis import strategies as st

import naive_routing as naive
import tinymoe as tm
from tinymoe import files, losses, metrics
from tinymoe import functional as F
from tinymoe.model.config import ModelConfig
from tinymoe.moe.devices import traffic
from tinymoe.moe.routers import ROUTERS
from tinymoe.moe.routing import from_mask, largest, limit_capacity, merge
from tinymoe.training.data import CorpusError, load_corpus
from tinymoe.training.plan import TrainConfig

LONG, SEED = os.environ.get("TINYMOE_TESTS") == "long", os.environ.get("TINYMOE_SEED")


def cases(n):
    """Run a test with n random cases; the same ones each time, unless TINYMOE_SEED is given."""
    def decorate(test):
        test = settings(max_examples=30 * n if LONG else n, derandomize=SEED is None, deadline=None, database=None,
                        suppress_health_check=list(HealthCheck), print_blob=False,
                        phases=[Phase.explicit, Phase.generate, Phase.shrink])(test)
        return test if SEED is None else seed(int(SEED))(test)
    return decorate


# -- graphs -------------------------------------------------------------------------------------

SHAPES = [(), (1,), (3,), (0,), (2, 3), (1, 3), (3, 1), (2, 0), (0, 3), (2, 1, 3), (1, 4, 2, 2), (2, 3, 1, 4),
          (1, 2, 1, 0), (0, 2, 1, 2), (2, 0, 2, 2)]
LAYOUTS = {  # the same numbers with other strides
    "C": lambda a: np.array(a, order="C"), "F": lambda a: np.array(a, order="F"),
    "reversed": lambda a: np.array(np.flip(a), order="C")[tuple([slice(None, None, -1)] * a.ndim)],
    "every second": lambda a: np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim else np.array(a),
    "one column": lambda a: np.stack([a, a], axis=-1)[..., 1], "read only": lambda a: _frozen(np.array(a)),
}
REFUSALS = ValueError, TypeError, IndexError  # of a forward pass


def _frozen(array):
    array.flags.writeable = False
    return array


def positive(x):
    return x * x + 0.5


def like(x, *values):
    """A Tensor of the numbers from values[0] to values[1], of shape values[2:], in the dtype of x."""
    return tm.Tensor(np.linspace(*values[:2], math.prod(values[2:])).reshape(values[2:]).astype(x.dtype))


def numbers(draw, shape):
    """Values without ties, so that no kink is near."""
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    return rng.permutation(np.linspace(-1.6, 1.5, max(1, math.prod(shape)))[:math.prod(shape)]).reshape(shape)


def axis_of(draw, ndim, several=False):
    one = st.integers(-ndim, ndim - 1) if ndim else st.just(None)
    if not several or ndim < 2:
        return draw(one)
    return draw(st.one_of(st.none(), one, st.permutations(range(ndim)).map(lambda p: tuple(p[:2]))))


def index_of(draw, shape):
    """An index of any kind that fits the shape."""
    parts = []
    for n in shape[:draw(st.integers(0, len(shape)))]:
        kinds = [st.slices(n), st.just(np.arange(n) % 2 == 0)] if not parts else [st.slices(n)]
        if n:
            kinds += [st.integers(-n, n - 1), st.lists(st.integers(-n, n - 1), min_size=2, max_size=2).map(np.array)]
        parts.append(draw(st.one_of(kinds)))
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), None)
    elif draw(st.booleans()) and len(parts) < len(shape):
        parts.append(...)
    return tuple(parts)


def unary(draw, x):
    """A function of one tensor, with arguments drawn to fit x: (name, function)."""
    axis, keep = axis_of(draw, x.ndim, several=True), draw(st.booleans())
    one, last = axis_of(draw, x.ndim) if x.ndim else -1, x.shape[-1] if x.ndim else 1
    ids = draw(st.lists(st.integers(0, max(0, len(x.data) - 1 if x.ndim else 0)), max_size=4))
    table = {
        "neg": lambda a: -a, "exp": lambda a: (a * 0.5).exp(), "log": lambda a: positive(a).log(),
        "sqrt": lambda a: positive(a).sqrt(), "tanh": lambda a: a.tanh(),
        "square": lambda a: a ** 2, "cube": lambda a: a ** 3, "inverse": lambda a: positive(a) ** -1,
        "rpow": lambda a: 1.5 ** a, "rsub": lambda a: np.float64(2.0) - a, "rdiv": lambda a: 2 / positive(a),
        "sum": lambda a: a.sum(axis, keep), "mean": lambda a: a.mean(axis, keep), "max": lambda a: a.max(axis, keep),
        "flat": lambda a: a.reshape(-1), "as shape": lambda a: a.reshape(a.shape + (1,)), "T": lambda a: a.T,
        "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "sigmoid": F.sigmoid, "softplus": F.softplus,
        "cdf": F.normal_cdf, "geglu": lambda a: F.activation(a, "geglu"), "swiglu": lambda a: F.activation(a, "swiglu"),
        "softmax": lambda a: F.softmax(a, one), "log_softmax": lambda a: F.log_softmax(a, one),
        "logsumexp": lambda a: F.logsumexp(a, one),
        "embedding": lambda a: F.embedding(a, np.array(ids, int).reshape(1, -1)),
        "scatter": lambda a: F.scatter_add(a, np.arange(len(a)) % 2, 3),
        "rotary": F.rotary, "attention": lambda a: F.causal_attention(a, a, a),
        "norm": lambda a: F.layer_norm(a, like(a, 1, 2, last), like(a, 0, 1, last)),
        "rms": lambda a: F.rms_norm(a, like(a, 1, 2, last)),
        "cross entropy": lambda a: F.cross_entropy(a, np.arange(len(a)) % last),
        "linear": lambda a: F.linear(a, like(a, -1, 1, last, 2)),
        "where": lambda a: F.where(a.data > 0.1, a, 0.5), "iterate": lambda a: sum(list(a), like(a, 1, 1)),
    }
    if x.ndim:
        index, axes = index_of(draw, x.shape), draw(st.permutations(range(x.ndim)))
        places = draw(st.lists(st.integers(0, max(0, x.shape[one] - 1)), min_size=1, max_size=4))
        thin = tuple(len(places) if i == one % x.ndim else 1 if keep else n for i, n in enumerate(x.shape))
        at = np.zeros(thin, int) + np.array(places).reshape([-1 if i == one % x.ndim else 1 for i in range(x.ndim)])
        table |= {"index": lambda a: a[index], "transpose": lambda a: a.transpose(*axes),
                  "gather": lambda a: F.gather(a, at, one), "join": lambda a: F.concatenate([a, a * 2, a], one)}
    name = draw(st.sampled_from(sorted(table)))
    return name, table[name]


BINARY = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / positive(b),
    "**": lambda a, b: positive(a) ** b, "@": lambda a, b: a @ b, "@.T": lambda a, b: a @ b.T,
    "where": lambda a, b: F.where(b.data > 0, a, b), "concatenate": lambda a, b: F.concatenate([a, b]),
    "concatenate last": lambda a, b: F.concatenate([a, b], -1), "linear": lambda a, b: F.linear(a, b),
    "linear with bias": lambda a, b: F.linear(a, b, b.sum(axis=0)), "rms": lambda a, b: F.rms_norm(a, b),
    "layer norm": lambda a, b: F.layer_norm(a, b, b), "array": lambda a, b: np.ones((2, 3)) + a * b,
}


@st.composite
def programs(draw):
    """(leaves, steps): arrays with their layouts, and functions of earlier results whose forward passes go through."""
    leaves = [(numbers(draw, draw(st.sampled_from(SHAPES))), draw(st.sampled_from(sorted(LAYOUTS))))
              for _ in range(draw(st.integers(1, 3)))]
    pool, steps = [tm.Tensor(LAYOUTS[layout](a)) for a, layout in leaves], []
    for _ in range(draw(st.integers(1, 6))):
        if draw(st.booleans()):
            places = [draw(st.integers(0, len(pool) - 1))]
            name, function = unary(draw, pool[places[0]])
        else:
            places = [draw(st.integers(0, len(pool) - 1)) for _ in range(2)]
            name = draw(st.sampled_from(sorted(BINARY)))
            function = BINARY[name]
        try:
            with np.errstate(all="ignore"):
                value = function(*(pool[i] for i in places))
        except REFUSALS:  # the shapes do not fit; anything else is a fault
            continue
        if value.size > 200 or not np.isfinite(value.data).all() or np.abs(value.data).max(initial=0) > 50:
            continue
        pool.append(value)
        steps.append((name, function, places))
    assume(steps)
    return leaves, steps


def run(leaves, steps):
    """The results of all steps, added up with fixed weights into one number, and the names of the steps."""
    pool = list(leaves)
    for _, function, places in steps:
        pool.append(function(*(pool[i] for i in places)))
    total = tm.Tensor(np.zeros((), leaves[0].dtype))
    for result in pool[len(leaves):]:
        total = total + (result * np.cos(np.arange(result.size)).reshape(result.shape).astype(total.dtype)).sum()
    return total


@cases(200)
@given(programs())
def test_gradients_of_random_graphs_are_finite_differences(program):
    """Would have caught: functions that accept in forward what backward cannot take (an index that broadcasts), a 0-d
    tensor that iterates as empty, a width of 0 that ends in a ZeroDivisionError.
    """
    start, steps = program
    leaves = [tm.Tensor(LAYOUTS[layout](a), requires_grad=True) for a, layout in start]
    total = run(leaves, steps)
    if total.requires_grad:
        total.backward()
    first = [None if leaf.grad is None else leaf.grad.copy() for leaf in leaves]
    for which, ((array, layout), gradient) in enumerate(zip(start, first)):
        gradient = np.zeros(array.shape) if gradient is None else gradient
        assert gradient.shape == array.shape and gradient.dtype == np.float64
        for at in list(np.ndindex(array.shape))[:6]:
            slopes = []
            for step in (1e-6, -1e-6):
                moved = array.copy()
                moved[at] += step
                inputs = [tm.Tensor(LAYOUTS[kind](moved if i == which else a)) for i, (a, kind) in enumerate(start)]
                slopes.append((run(inputs, steps).item() - total.item()) / step)
            scale = max(1, *map(abs, slopes))
            if abs(slopes[0] - slopes[1]) < 1e-3 * scale:  # no kink and no change of a choice in between
                assert abs(gradient[at] - np.mean(slopes)) < 1e-5 * scale, ([s[0] for s in steps], layout, which, at)
    if total.requires_grad:  # a second pass over the same graph adds the same again
        total.backward()
        assert all(np.allclose(leaf.grad, 2 * g) for leaf, g in zip(leaves, first) if g is not None)


@cases(60)
@given(programs())
def test_random_graphs_of_float32_stay_float32(program):
    """Would have caught: an operation or a gradient that changes the dtype it was given."""
    start, steps = program
    assume(all(name != "array" for name, *_ in steps))  # NumPy's float64 makes float64
    leaves = [tm.Tensor(LAYOUTS[layout](a.astype(np.float32)), requires_grad=True) for a, layout in start]
    pool = list(leaves)
    for name, function, places in steps:
        pool.append(function(*(pool[i] for i in places)))
        assert pool[-1].dtype == np.float32, name
    total = run(leaves, steps)
    if total.requires_grad:
        total.backward()
    assert all(leaf.grad.dtype == np.float32 for leaf in leaves if leaf.grad is not None)


@cases(30)
@given(st.data())
def test_ties_and_repeated_indices_share_gradients_as_a_loop_does(data):
    """Would have caught: an index that broadcasts; gradients of repeated indices that overwrite each other."""
    shape = data.draw(st.sampled_from([(1,), (4,), (2, 3), (3, 1, 2)]))
    values = np.array(data.draw(st.lists(st.integers(0, 2), min_size=math.prod(shape), max_size=math.prod(shape))))
    layout = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))]
    x = tm.Tensor(layout(values.reshape(shape).astype(float)), requires_grad=True)
    axis, expected = axis_of(data.draw, x.ndim), np.zeros(shape)
    largest_of = x.max(axis)
    weight = 1.0 + np.arange(largest_of.size).reshape(largest_of.shape)
    (largest_of * weight).sum().backward()
    for at in np.ndindex(shape):
        line = tuple(slice(None) if i == axis % x.ndim else n for i, n in enumerate(at))
        rest = tuple(n for i, n in enumerate(at) if i != axis % x.ndim)
        if x.data[at] == max(x.data[line]):
            expected[at] = weight[rest] / list(x.data[line]).count(x.data[at])
    np.testing.assert_allclose(x.grad, expected)

    index = np.array(data.draw(st.lists(st.integers(-shape[0], shape[0] - 1), min_size=1, max_size=6)))
    x.grad, expected = None, np.zeros(shape)
    picked = x[index]
    (picked * (1.0 + np.arange(picked.size)).reshape(picked.shape)).sum().backward()
    for place, i in enumerate(index):
        expected[i] += (1.0 + np.arange(picked.size)).reshape(picked.shape)[place]
    np.testing.assert_allclose(x.grad, expected)


@pytest.mark.parametrize("router", ["top_k", "expert_choice", "noisy_top_k"])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_a_model_takes_an_empty_batch_or_refuses_it(router, shape):
    """Would have caught: an empty batch that ends in NumPy's reshape error."""
    model = tm.Transformer(ModelConfig(d_model=8, n_heads=2, d_ff=8, n_layers=2, moe_layers=[1], seq_len=8, n_experts=2,
                                       router=router, top_k=1))
    try:
        output = model.forward(np.zeros(shape, int))
    except ValueError as error:
        assert "reshape" not in str(error) and "\n" not in str(error)
    else:
        assert output.logits.shape == (*shape, 256)


# -- routings -----------------------------------------------------------------------------------


@st.composite
def routings(draw, whole=1, devices=1):
    """A Routing of any kind: tokens without expert, experts without tokens, one expert, ties among gates.

    The number of tokens is a multiple of `whole`, that of the experts one of `devices`.
    """
    n, e = whole * draw(st.integers(1, 4)), devices * draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    mask = rng.random((n, e)) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    mask[:, :draw(st.integers(0, e))] &= draw(st.booleans())
    logits = rng.standard_normal((n, e)) * draw(st.sampled_from([0.0, 1.0, 30.0]))
    gates = np.round(rng.random((n, e)), 1) if draw(st.booleans()) else rng.random((n, e))
    logits, gates = (tm.Tensor(x, requires_grad=True) for x in (logits, gates))
    soft = F.softplus(logits).sum(axis=0) if draw(st.booleans()) else None
    return from_mask(mask, gates, logits, F.softmax(logits), soft_load=soft)


@cases(60)
@given(routings(whole=6, devices=2), st.sampled_from([1, 2, 3, 6]))
def test_losses_are_those_of_plain_loops(routing, length):
    """Would have caught: a balance loss of scores that do not sum to 1, a division by an empty load."""
    mask, probs, logits = routing.mask(), routing.probs.data, routing.logits.data
    gates, n_devices = routing.to_dense().data, 2
    nats = np.linspace(0.5, 3, routing.n_tokens)
    pairs = {
        losses.load_balancing_loss(routing): naive.balance(mask.sum(axis=0), probs),
        losses.sequence_balance_loss(routing, length): naive.sequence_balance(mask, probs, length),
        losses.device_balance_loss(routing, n_devices): naive.device_balance(mask, probs, n_devices),
        losses.communication_balance_loss(routing, n_devices, 2): naive.communication(mask, probs, n_devices, 2),
        losses.z_loss(routing): naive.z(logits),
        losses.importance_loss(routing): naive.cv_squared(gates.sum(axis=0), 1e-10),
        losses.policy_loss(routing, nats): naive.policy(mask, logits, nats)}
    for got, expected in pairs.items():
        assert got.shape == () and got.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        got.backward()  # every loss has a finite gradient
    assert np.isfinite(routing.logits.grad).all()
    if routing.soft_load is None:
        with pytest.raises(ValueError, match="soft_load"):
            losses.load_loss(routing)
    else:
        expected = naive.cv_squared(routing.soft_load.data, 1e-10)
        assert losses.load_loss(routing).item() == pytest.approx(expected, rel=1e-9)


@cases(60)
@given(routings(whole=6), st.sampled_from([1, 2, 3, 6]), st.integers(0, 2**20))
def test_metrics_are_those_of_plain_loops(routing, length, number):
    """Would have caught: a metric of an empty load, of one expert or of windows of one token that is NaN."""
    mask, probs, load = routing.mask(), routing.probs.data, routing.mask().sum(axis=0)
    rng = np.random.default_rng(number)
    labels, later = rng.integers(0, 3, routing.n_tokens), rng.random(mask.shape) < 0.5
    assert routing.load.tolist() == load.tolist() and routing.coverage.tolist() == mask.sum(axis=1).tolist()
    table = naive.label_load(mask, labels, 3)
    pairs = [
        (metrics.load_cv(routing), naive.cv_squared(load) ** 0.5), (metrics.max_violation(load), naive.violation(load)),
        (metrics.load_entropy(routing), naive.load_entropy(load)), (metrics.dead_experts(routing), naive.dead(load)),
        (metrics.router_entropy(routing), naive.mean_entropy(probs)),
        (metrics.marginal_entropy(routing), naive.entropy(probs.mean(axis=0))), (metrics.drop_rate(routing), 0),
        (metrics.token_coverage(routing), naive.covered(mask)),
        (metrics.repetition(routing, length), naive.repetition(mask, length)),
        (metrics.saturation(mask, later), naive.saturation(mask, later)),
        (metrics.co_activation(routing), naive.co_activation(mask)), (metrics.label_load(routing, labels, 3), table),
        (metrics.mutual_information(table), naive.mutual_information(table))]
    for got, expected in pairs:
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)
    null = metrics.shuffled_information(mask.astype(int), labels, 3, np.random.default_rng(0), n_shuffles=3)
    assert -1e-12 < null <= math.log(3) + 1e-9


@cases(60)
@given(routings(whole=2, devices=2), st.sampled_from([0.1, 0.5, 1.0, 1.25, 9.0]), st.sampled_from(["order", "gate"]))
def test_capacity_traffic_and_merging_are_those_of_plain_loops(routing, factor, policy):
    """Would have caught: ties among gates that drop another token, experts or devices without tokens."""
    mask, gates = routing.mask(), routing.to_dense().data
    limit = naive.capacity(*mask.shape, 1.5, factor)
    kept = naive.limited(mask, gates, limit, policy)
    limited = limit_capacity(routing, factor, 1.5, policy)
    assert (limited.mask() == kept).all() and limited.n_dropped == mask.sum() - kept.sum()
    assert limited.demand.tolist() == mask.sum(axis=0).tolist() and (limited.to_dense().data == gates * kept).all()
    assert metrics.drop_rate(limited) == pytest.approx(limited.n_dropped / max(1, mask.sum()))
    sent = traffic(routing, n_devices=2, d_model=3)
    rows, work = naive.traffic(mask, 2)
    assert sent.rows.tolist() == rows.tolist() and sent.load.tolist() == work.tolist()
    both = merge([limited, routing])
    assert (both.mask() == np.concatenate([kept, mask])).all()
    assert both.demand.tolist() == (2 * mask.sum(axis=0)).tolist() and both.n_dropped == limited.n_dropped


@cases(60)
@given(st.data())
def test_the_largest_of_ties_are_the_first(data):
    """Would have caught: a tie that goes to another index in a vectorised path."""
    values = st.sampled_from([0.0, -0.0, 1.0, 2.0, -np.inf, np.inf, np.nan])
    rows, width = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 6))
    scores = np.array(data.draw(st.lists(values, min_size=rows * width, max_size=rows * width))).reshape(rows, width)
    k = data.draw(st.integers(0, width))
    assert (largest(scores, k) == naive.largest(scores, k)).all()
    assert (largest(scores.T, k, axis=0) == naive.largest(scores, k).T).all()


SCORES = st.sampled_from([0.0, 1.0, 30.0, 1000.0])


@pytest.mark.parametrize("name", ROUTERS)
@cases(6)
@given(st.data())
def test_every_router_gives_a_routing_and_a_causal_one_reads_no_later_token(name, data):
    """Would have caught: sigmoid scores whose probs do not sum to 1; a later token that leaks into an earlier one
    through the shift of a softmax, or gives it NaN.
    """
    cls, (b, t, d, e) = ROUTERS[name], (2, data.draw(st.sampled_from([1, 3, 8])), 3, data.draw(st.sampled_from([2, 4])))
    k = 1 if cls.top_1_only else data.draw(st.sampled_from([1, 2]))
    options = {"vocab_size": 5} if "vocab_size" in cls.options() else {}
    if "softmax_over" in cls.options():
        options["softmax_over"] = data.draw(st.sampled_from(["tokens", "experts"]))
    dtype = data.draw(st.sampled_from([np.float32, np.float64]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    x = (rng.standard_normal((b * t, d)) * data.draw(SCORES) + data.draw(SCORES)).astype(dtype)
    router, ids = tm.routers.make(name, d, e, k, seed=1, dtype=dtype, **options), rng.integers(0, 5, (b, t))
    for p in router.parameters().values():
        p.data = (p.data * 50).astype(dtype)
    training = data.draw(st.booleans())

    def route(x, causal):
        return router(tm.Tensor(x), tm.RouteContext(ids, training and not causal, np.random.default_rng(3), causal,
                                                         domain=np.arange(b)))

    routing = route(x, causal=False)
    assert routing.gate.dtype == routing.probs.dtype == dtype
    assert np.isfinite(routing.gate.data).all() and np.isfinite(routing.probs.data).all()
    np.testing.assert_allclose(routing.probs.data.sum(axis=1), 1, atol=1e-5)
    pairs = list(zip(routing.expert.tolist(), routing.token.tolist()))
    assert pairs == sorted(set(pairs))
    cut, changed = data.draw(st.integers(0, t)), x.reshape(b, t, d).copy()
    changed[:, cut:] = rng.standard_normal((b, t - cut, d)) * 1000
    before, after = (route(one, causal=True) for one in (x, changed.reshape(b * t, d)))
    first = np.tile(np.arange(t) < cut, b)
    assert np.isfinite(before.to_dense().data).all()
    assert (before.mask()[first] == after.mask()[first]).all()
    np.testing.assert_array_equal(before.to_dense().data[first], after.to_dense().data[first])


# -- configs and files --------------------------------------------------------------------------

ODD = st.sampled_from([None, True, False, 0, 1, 2, 3, 4, 8, -1, 0.5, 1.0, 2.5, 1e-9, 2**31 - 1, 2**31, 10**30, math.nan,
                       math.inf, -math.inf, "", "top_k", "rms", "rotary", "expert_choice", "numba", "\x1b[31m", "🎲",
                       [], [0], [0, 1], [1, 1], [True], [0.0], ["top_k"], ["top_k", "hash"], ["router"], (), (0,), {},
                       {"z": 0.1}, {"jitter": 0.1}, {"renormalise": False}, {"z": "a"}, {"balance": 1}, b"rms", 1j,
                       np.int64(2), np.float32(0.5), np.bool_(True), np.array(2), np.array([1, 2]), np.str_("rms"),
                       np.array(["top_k"]), object, range(2), {1, 2}, {0: 1}, [[0]], np.nan, np.float64("inf")])


def mutated(cls, most):
    """Keyword arguments of a config with up to `most` odd values."""
    names = [field.name for field in dataclasses.fields(cls)]
    return st.dictionaries(st.sampled_from(names), ODD, max_size=most)


def holds_plain_values(value):
    """Whether a value of to_dict is what JSON gives back: no NumPy number, no tuple."""
    if isinstance(value, dict):
        return all(type(key) is str and holds_plain_values(one) for key, one in value.items())
    if isinstance(value, list):
        return all(map(holds_plain_values, value))
    return value is None or type(value) in (bool, int, float, str)


@cases(300)
@given(mutated(ModelConfig, 3))
@example({"router_options": {0: 1}})
def test_a_model_config_is_refused_in_one_line_or_survives_json(changes):
    """Would have caught: lists, arrays and NumPy numbers in fields that end in a TypeError or are no JSON; huge numbers
    of experts that take memory before they are refused.
    """
    try:
        config = ModelConfig(**changes)
    except ValueError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 1000
        return
    stored = config.to_dict()
    assert holds_plain_values(stored)
    assert ModelConfig.from_dict(json.loads(json.dumps(stored, allow_nan=False))) == config
    assert ModelConfig.from_dict(stored).to_dict() == stored
    with pytest.raises(ValueError, match="unknown ModelConfig keys: n_expert$"):
        ModelConfig.from_dict(stored | {"n_expert": 1})


@cases(200)
@given(mutated(TrainConfig, 3))
def test_a_train_config_is_refused_in_one_line_or_survives_json(changes):
    """Would have caught: NumPy numbers that are no JSON, billions of evaluations that give no answer."""
    try:
        config = TrainConfig(**changes)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return
    stored = dataclasses.asdict(config)
    assert holds_plain_values(stored) and TrainConfig(**json.loads(json.dumps(stored, allow_nan=False))) == config
    if min(config.n_evaluations, config.steps) <= 10**5:
        steps = config.evaluation_steps()
        assert max(steps) == config.steps and min(steps) >= 1 and len(steps) <= min(config.n_evaluations, config.steps)


TEXT = st.text(st.characters(codec=None), max_size=12)  # surrogates and control characters included
JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-2**70, 2**70), TEXT,
                              st.floats(allow_nan=False, allow_infinity=False)),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8)
ROWS = st.lists(st.dictionaries(TEXT, JSON, max_size=4), max_size=4)


@pytest.mark.slow
@cases(100)
@given(ROWS, st.binary(max_size=20), st.data())
def test_rows_survive_a_file_and_a_torn_end(tmp_path_factory, rows, tail, data):
    """Would have caught: line separators and surrogates inside a row that end it early."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    files.write_rows(path, rows)
    assert files.read_rows(path) == rows
    content = path.read_bytes()
    path.write_bytes(content[:data.draw(st.integers(0, len(content)))] + tail)
    try:
        json.loads(tail)
    except ValueError:
        found = files.read_rows(path)
        assert found[:len(rows)] == rows[:len(found)]
    if rows:
        files.write_json(path, rows[0])
        assert files.read_json(path) == rows[0]


KINDS = ["?", "i1", "u1", "i2", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16", ">i4", ">f8", "U3"]
MEMBERS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\0\\"), min_size=1,
                  max_size=8).filter(lambda name: name not in ("file", "allow_pickle", "__header__", "args", "kwds"))


@cases(100)
@given(st.dictionaries(MEMBERS, st.tuples(st.sampled_from(KINDS), st.sampled_from(SHAPES), st.sampled_from("CFS"),
                                          st.binary(max_size=400)), max_size=4), JSON, st.booleans())
def test_arrays_survive_a_file(tmp_path_factory, arrays, extra, compress):
    """Would have caught: arrays of size 0, of no axes, or with other strides that a parser of headers does not take."""
    made = {}
    for name, (kind, shape, order, raw) in arrays.items():
        dtype, size = np.dtype(kind), math.prod(shape)
        if kind == "U3":
            array = np.array([raw[i:i + 3].hex()[:3] for i in range(size)], dtype).reshape(shape)
        else:
            raw = (raw + bytes(16 * size))[:size * dtype.itemsize]
            array = np.frombuffer(bytes(b & 1 for b in raw) if kind == "?" else raw, dtype).reshape(shape)
        made[name] = LAYOUTS["reversed"](array) if order == "S" else np.array(array, order=order)
    path = tmp_path_factory.mktemp("arrays") / "a.npz"
    files.save_arrays(path, made, {"kind": "test", "extra": extra}, compress=compress)
    found, header = files.load_arrays(path, "test")
    assert header == {"kind": "test", "extra": extra} and found.keys() == made.keys()
    for name, array in made.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes() and found[name].flags.writeable


# -- corpora ------------------------------------------------------------------------------------

PIECES = ["a", "A", "b", ":", ";", "_", "?", "*", "é", "e\u0301", "\u0300", "\u0301", "🎲", "🎯", "\u200d",
          "\u202e", "\n", "\x1b", " ", " (2)", ".", ".txt", "$x$", "|", "<b>", "\\", "%", "#", "^", "{", "ß",
          "SS", "\udcff", "\ufeff"]
NAMES = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join).filter(
    lambda name: not name.startswith("."))
T = 3  # seq_len
LEAST = 4 * (T + 1)


def folder_of(tmp_path_factory, entries):
    """A folder with a file for each name, or a folder of two files where the content is a pair."""
    folder = tmp_path_factory.mktemp("texts")
    for name, content in entries.items():
        if isinstance(content, tuple):
            (folder / name / "deep").mkdir(parents=True)
            (folder / name / "deep" / name).write_bytes(content[0])
            (folder / name / "z").write_bytes(content[1])
        else:
            (folder / name).write_bytes(content)
    return folder


CONTENT = st.integers(LEAST, 400).flatmap(lambda n: st.integers(0, 2**20).map(
    lambda number: np.random.default_rng(number).bytes(n)))


@cases(60)
@given(st.dictionaries(NAMES, st.one_of(CONTENT, st.tuples(CONTENT, CONTENT)), min_size=1, max_size=6),
       st.integers(0, 2**20))
def test_domains_stay_distinct_hashed_and_apart(tmp_path_factory, entries, number):
    """Would have caught: names that collide once they are made safe (`a:b` and `a;b`, combining marks, two emoji), so
    that a domain and its hash are lost; windows of two domains, or of training and validation, that mix.
    """
    corpus = load_corpus(folder_of(tmp_path_factory, entries), seq_len=T)
    raws = [entries[name] for name in sorted(entries)]
    raws = [b"\n".join(raw) if isinstance(raw, tuple) else raw for raw in raws]
    assert len(set(corpus.names)) == len(entries) == len(corpus.names)
    assert len({unicodedata.normalize("NFC", name) for name in corpus.names}) == len(entries)
    assert all(name.isprintable() and name.encode() and not set(name) & set("|$<>*:;\\%#{}^") for name in corpus.names)
    assert [corpus.describe()[name]["sha256"] for name in corpus.names] == [hashlib.sha256(r).hexdigest() for r in raws]
    json.dumps(corpus.describe(), allow_nan=False)
    for domain, raw in zip(corpus.domains, raws):
        trained, held = (np.zeros(len(raw), bool) for _ in range(2))
        for spans, seen in ((domain.train, trained), (domain.valid, held)):
            for first, end in spans:
                assert not seen[first:end].any()
                seen[first:end] = True
        assert (trained ^ held).all() and domain.tokens.tobytes() == raw
    ids, targets, of = corpus.validation(50, T)
    assert set(of.tolist()) == set(range(len(raws)))
    for one, after, d in zip(ids, targets, of):
        window, domain = bytes([*one.tolist(), int(after[-1])]), corpus.domains[d]
        assert any(window in raws[d][first:end] for first, end in domain.valid) and (one[1:] == after[:-1]).all()
    ids, targets = corpus.batch(np.random.default_rng(number), 20, T)
    spans = [domain.tokens[first:end].tobytes() for domain in corpus.domains for first, end in domain.train]
    for one, after in zip(ids, targets):
        assert any(bytes([*one.tolist(), int(after[-1])]) in span for span in spans)


@cases(30)
@given(st.dictionaries(NAMES, CONTENT, min_size=1, max_size=4), st.data())
def test_a_changed_text_is_another_corpus_and_a_short_one_is_refused(tmp_path_factory, entries, data):
    """Would have caught: a changed text that passes for the same run, because its hash was lost with its name."""
    folder = folder_of(tmp_path_factory, entries)
    before, name = load_corpus(folder, seq_len=T).describe(), data.draw(st.sampled_from(sorted(entries)))
    raw, place = entries[name], data.draw(st.integers(0, len(entries[name]) - 1))
    (folder / name).write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1:])
    after = load_corpus(folder, seq_len=T).describe()
    assert [name for name in before if before[name] != after[name]] != [] and before.keys() == after.keys()
    (folder / name).write_bytes(raw[:data.draw(st.integers(0, LEAST - 1))])
    with pytest.raises(CorpusError, match=r"domain '[^\n]*' (is empty|has only \d+ bytes)") as refused:
        load_corpus(folder, seq_len=T)
    assert "\n" not in str(refused.value)
