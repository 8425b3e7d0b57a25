"""Tensor: values against NumPy, gradients against central differences, errors by what they tell the user to do."""
import contextvars
import copy
import gc
import itertools
import operator
import pickle
import threading
import weakref

import numpy as np
import pytest

import naive
import tinymoe as tm
from tinymoe import Tensor
from tinymoe.autograd import functional as F
from tinymoe.autograd import tensor
from tinymoe.autograd.tensor import record

pytestmark = pytest.mark.filterwarnings("error")

BINARY = [operator.add, operator.sub, operator.mul, operator.truediv, operator.pow]
SHAPES = [(), (1,), (3,), (2, 3), (1, 3), (2, 1), (4, 2, 3)]
DTYPES = [np.float16, np.float32, np.float64]


def positive(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).uniform(0.5, 2, shape)


def leaf(values, dtype=np.float64):
    return Tensor(np.array(values, dtype), requires_grad=True)


def gradient(function, *values):
    """The gradient of sum(function(leaf)) for each of the values."""
    leaves = [leaf(v) for v in values]
    function(*leaves).sum().backward()
    return leaves[0].grad if len(leaves) == 1 else [x.grad for x in leaves]


def check(function, *arrays):
    """The same function on Tensors and on arrays: equal values, and gradients equal to central differences."""
    leaves = [Tensor(a, requires_grad=True) for a in arrays]
    out, expected = function(*leaves), np.asarray(function(*arrays))
    np.testing.assert_allclose(out.data, expected, rtol=1e-14)
    assert out.shape == expected.shape
    dy = np.random.default_rng(1).standard_normal(out.shape)
    out.backward(dy)
    for i, x in enumerate(leaves):
        numeric = naive.central_difference(lambda z, i=i: function(*arrays[:i], z, *arrays[i + 1:]), arrays[i], dy)
        assert type(x.grad) is np.ndarray and x.grad.shape == x.shape and x.grad.dtype == x.dtype
        np.testing.assert_allclose(x.grad, numeric, rtol=1e-6, atol=1e-8)


# ---- arithmetic ----------------------------------------------------------------------------------

@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("a", SHAPES)
@pytest.mark.parametrize("b", SHAPES)
def test_broadcasting(op, a, b):
    check(op, positive(*a), positive(*b, seed=1))


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("other",
                         [2, 1.5, True, np.float64(1.5), np.int64(2), np.bool_(True), positive(3), positive(1, 2).T,
                          [1.0, 2.0, 3.0]])
def test_plain_operand_on_either_side(op, other):
    constant = np.asarray(other, np.float64)  # NumPy itself refuses True - True
    for swapped in (False, True):
        def function(x, other, swapped=swapped):
            return op(other, x) if swapped else op(x, other)

        x = leaf(positive(2, 3))
        y = function(x, other)
        y.backward(np.ones((2, 3)))
        np.testing.assert_allclose(y.data, function(x.data, constant))
        np.testing.assert_allclose(x.grad,
                                   naive.central_difference(lambda z: function(z, constant), x.data, np.ones((2, 3))),
                                   rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [
    lambda x: x + 1.5, lambda x: 2 - x, lambda x: x * np.float64(2.5), lambda x: np.float64(2.5) / x,
    lambda x: x ** np.int64(2), lambda x: x * np.arange(3), lambda x: [1, 2, 3] - x, lambda x: x * Tensor([1, 2, 3]),
    lambda x: x * np.array(2.5), lambda x: x + Tensor(2.5),
    lambda x: Tensor(2.5) * x, lambda x: Tensor([1, 2, 3]) - x, lambda x: Tensor(2) ** x,
    lambda x: F.where(x.data > 1, Tensor(7.0), x), lambda x: F.where(x.data > 1, x, Tensor(7)),
    lambda x: 2.0 ** x, lambda x: -x, lambda x: x @ x.T, lambda x: x.sum(0), lambda x: x.mean(axis=(0, 1)),
    lambda x: x.max(1),
    lambda x: x.exp().log().sqrt().tanh(), lambda x: x[[0, 0, 1]], lambda x: x.reshape(-1).transpose()])
def test_dtype_is_kept(function, dtype):
    x = leaf(positive(2, 3), dtype)
    y = function(x).retain_grad()
    y.sum().backward()
    assert y.dtype == y.grad.dtype == x.grad.dtype == dtype


def test_a_product_with_a_wider_array_gives_a_gradient_of_the_leafs_dtype():
    x = leaf([1, 2, 3], np.float32)
    y = x * np.ones((2, 3))
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, x.grad.tolist()) == (np.float64, np.float32, [2, 2, 2])


@pytest.mark.parametrize("axis", [0, (0, 1), None])
def test_a_mean_of_many_float32_rows_keeps_its_digits(axis):
    """Would have caught: a balance loss of 1.0007 at perfect balance, from 100,000 rows added one by one."""
    mean = Tensor(np.full((100_000, 3), 1 / 3, np.float32)).mean(axis=axis)
    np.testing.assert_allclose(mean.data, np.float32(1 / 3), rtol=1e-7)


@pytest.mark.parametrize("name", ["exp", "log", "sqrt", "tanh"])
def test_unary(name):
    for shape in [(), (3,), (2, 3)]:
        check(lambda x: getattr(x, name)() if isinstance(x, Tensor) else getattr(np, name)(x), positive(*shape))


@pytest.mark.parametrize("power, slopes",
                         [(0, [0, 0, 0]), (1, [1, 1, 1]), (2, [-4, 0, 6]), (3, [12, 0, 27]), (1.0, [1, 1, 1])])
def test_powers_at_zero_and_below(power, slopes):
    assert gradient(lambda x: x ** power, [-2.0, 0, 3]).tolist() == slopes
    assert gradient(lambda x: x ** np.full(3, power), [-2.0, 0, 3]).tolist() == slopes


def test_exponent_with_a_gradient():
    check(operator.pow, positive(2, 3), np.array([-1.5, 0, 2]))
    assert gradient(lambda y: 0.0 ** y, [1.0, 2]).tolist() == [0, 0]
    assert np.isnan(gradient(lambda y: (-2.0) ** y, [2.0])).all()


# ---- matrix product ------------------------------------------------------------------------------

@pytest.mark.parametrize("a, b", [
    [(3,), (3,)], [(3,), (3, 2)], [(2, 3), (3,)], [(2, 3), (3, 4)], [(5, 2, 3), (3,)], [(3,), (5, 3, 2)],
    [(5, 2, 3), (3, 4)],
    [(2, 3), (5, 3, 4)], [(5, 1, 2, 3), (4, 3, 2)], [(1, 2, 3), (4, 3, 2)], [(1, 1), (1, 1)], [(0, 3), (3, 2)],
    [(2, 0), (0, 3)]])
def test_matmul(a, b):
    check(operator.matmul, positive(*a), positive(*b, seed=1))
    check(lambda x: positive(*a) @ x, positive(*b))
    check(lambda x: x @ positive(*b), positive(*a))


# ---- reductions and shapes -----------------------------------------------------------------------

@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1, -3, (0,), (0, 2), (-1, 0), (2, 1), (0, 1, 2), ()])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("name", ["sum", "mean", "max"])
def test_reductions(name, axis, keepdims):
    check(lambda x: getattr(x, name)(axis=axis, keepdims=keepdims), positive(2, 3, 4))
    if axis is None:
        check(lambda x: getattr(x, name)(), positive())


def test_ties_of_max_share_the_gradient():
    assert gradient(lambda x: x.max(), [[3.0, 1], [3, 3]]).tolist() == [[1 / 3, 0], [1 / 3, 1 / 3]]
    assert gradient(lambda x: x.max(axis=1), [[3.0, 1], [3, 3]]).tolist() == [[1, 0], [0.5, 0.5]]
    assert gradient(lambda x: x.max(axis=(0, 1), keepdims=True), [[-1.0, -1]]).tolist() == [[0.5, 0.5]]


def test_sums_of_integers_and_booleans_count():
    assert Tensor(np.ones(300, np.int8)).sum().item() == 300
    assert Tensor(np.ones(3, bool)).sum().item() == 3


@pytest.mark.parametrize("function", [
    lambda x: x.reshape(4, 6), lambda x: x.reshape((-1, 2)), lambda x: x.reshape([3, 8]), lambda x: x.reshape(-1),
    lambda x: x.T,
    lambda x: x.transpose(), lambda x: x.transpose(1, 2, 0), lambda x: x.transpose((2, 0, 1)),
    lambda x: x.transpose(-1, 0, -2),
    lambda x: x.T.reshape(-1) * positive(24), lambda x: x.transpose(1, 0, 2).sum(axis=0) @ x[0].T])
def test_shapes(function):
    check(function, positive(2, 3, 4))


@pytest.mark.parametrize("index", [
    0, -1, slice(None), slice(1, None), slice(None, None, -2), slice(3, 0, -1), None, ..., (..., 0), (0, ...),
    (None, 1, ..., None),
    (slice(None), 1), (slice(None, None, -1), slice(0, 2)), np.int64(1), [0, 0, 2], np.array([[1, 1], [0, -1]]),
    np.array(1),
    (np.array([0, 0, 1]), np.array([2, 2, 0])), (np.array([0, 0])[:, None], np.array([1, 1])), (slice(None), [1, 1]),
    ([0, 0], slice(1, None)), ([0, 0], None, 1), ([0, 0], slice(None), [1, 1]), (0, [1, 1]), [],
    [True, False, True, True], True,
    np.arange(24).reshape(4, 3, 2) % 5 == 0, (slice(None), np.array([True, False, True]))],
    ids=lambda i: repr(i).replace("\n", "")[:40])
def test_indexing(index):
    check(lambda x: x[index], positive(4, 3, 2))


def test_an_index_may_be_a_tensor():
    assert gradient(lambda x: x[Tensor(np.array([0, 0, 2]))] + x[Tensor([True, False, True]), ][0],
                    [1.0, 2, 3]).tolist() == [5, 0, 1]


# ---- the backward pass ---------------------------------------------------------------------------

@pytest.mark.slow
def test_a_chain_of_100_000_additions_and_its_end():
    x = leaf(0.0)
    y = x
    for _ in range(100_000):
        y = y + 1.0
    y.backward()
    assert (y.item(), x.grad) == (100_000, 1)
    middle = weakref.ref(y._parents[0])
    del y
    gc.collect()
    assert middle() is None


def test_diamonds_double_at_each_step():
    x = leaf(1.0)
    y = x
    for _ in range(40):  # 2^40 paths
        y = y + y
    y.backward()
    assert x.grad == 2**40


def test_fan_out_to_uses_of_different_depth():
    x = leaf(3.0)
    a = (x * x).retain_grad()           # x enters y as x^3 + x^2 + x
    (a * x + a + x).backward()
    assert x.grad == 27 + 6 + 1 and a.grad == 4


def test_backward_twice_is_exact():
    x = leaf([1.0, 2])
    h = (x * x).retain_grad()
    y = (h * h).sum()
    for calls in (1, 2, 3):
        y.backward()
        np.testing.assert_array_equal(x.grad, calls * 4 * x.data**3)
        np.testing.assert_array_equal(h.grad, calls * 2 * h.data)


def test_a_tensor_between_keeps_its_gradient_only_where_asked_to():
    x = leaf([1.0, 2])
    h, kept = x * 2, (x * 3).retain_grad()
    (h + kept).sum().backward()
    assert h.grad is None and kept.grad.tolist() == [1, 1] and x.grad.tolist() == [5, 5]


def test_a_kept_gradient_of_one_number_stays_an_array():
    y = leaf(2.0).exp().retain_grad()
    for calls in (1, 2):
        y.backward()
        assert isinstance(y.grad, np.ndarray) and y.grad == calls


def test_a_vjp_with_fewer_gradients_than_parents_is_an_error():
    x, y = leaf([1.0]), leaf([2.0])
    with pytest.raises(ValueError, match="shorter"):
        record(x.data + y.data, (x, y), lambda g: (g,)).backward()


def test_a_graph_that_is_not_retained_gives_the_same_gradient_once():
    x = leaf([1.0, 2])
    h = x * x
    y = (h * h).sum()
    y.backward(retain_graph=False)
    np.testing.assert_array_equal(x.grad, 4 * x.data**3)
    for again in (y, h.sum()):
        with pytest.raises(RuntimeError, match="freed"):
            again.backward()


def test_a_freed_part_is_noticed_before_any_leaf_changes():
    a, b = leaf([1.0, 2]), leaf([3.0, 4])
    h = a * a
    h.sum().backward(retain_graph=False)
    with pytest.raises(RuntimeError, match="freed"):
        (h * b).sum().backward()
    assert b.grad is None
    with pytest.raises(RuntimeError, match="nothing"):
        Tensor([1.0]).retain_grad()


def test_two_graphs_accumulate_into_one_leaf_until_its_gradient_is_none():
    x = leaf([1.0, 2])
    (x * 2).sum().backward()
    (x * 3).sum().backward()
    assert x.grad.tolist() == [5, 5]
    x.grad = None
    x.sum().backward()
    assert x.grad.tolist() == [1, 1]


@pytest.mark.parametrize("function",
                         [lambda x, y: x + y, lambda x, y: x - -y, lambda x, y: (x + y).reshape(2, 1),
                          lambda x, y: (x + y)[::1]])
def test_leaves_own_their_gradients(function):
    x, y, seed = leaf([1.0, 2]), leaf([3.0, 4]), np.ones(2)
    out = function(x, y).retain_grad()
    out.backward(seed.reshape(out.shape))
    x.grad *= 7  # as clip_gradients does
    assert y.grad.tolist() == seed.tolist() == [1, 1] and out.grad.ravel().tolist() == [1, 1]


def test_no_grad_and_detach_cut_the_graph():
    x = leaf([1.0, 2])
    with tm.no_grad():
        with tm.no_grad():
            pass
        assert not (x * 2).requires_grad
    with pytest.raises(KeyError), tm.no_grad():
        raise KeyError
    y = x * 2
    assert y.requires_grad and not y.detach().requires_grad
    (x * y.detach()).sum().backward()
    assert x.grad.tolist() == [2, 4] and y.grad is None


def test_no_grad_acts_on_its_own_thread_alone():
    """The other thread opens a block first and closes it last. Both threads record again afterwards."""
    x, opened, close = leaf([1.0, 2]), threading.Event(), threading.Event()
    seen = {}

    def other():
        with tm.no_grad():
            opened.set()
            assert close.wait(10)
            seen["inside"] = (x * 2).requires_grad
        seen["after"] = (x * 2).requires_grad

    thread = threading.Thread(target=other)
    thread.start()
    assert opened.wait(10) and (x * 2).requires_grad
    with tm.no_grad():
        close.set()
        thread.join()
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad and seen == {"inside": False, "after": True}


def test_no_grad_blocks_may_overlap_in_one_thread_and_stay_in_their_context():
    def block():
        with tm.no_grad():
            yield

    x, first, second = leaf([1.0, 2]), block(), block()
    next(first), next(second), next(first, None)
    assert not (x * 2).requires_grad
    next(second, None)
    assert (x * 2).requires_grad
    with tm.no_grad():
        assert not contextvars.copy_context().run(lambda: (x * 2).requires_grad)
        assert contextvars.Context().run(lambda: (x * 2).requires_grad)


def test_values_that_an_optimiser_changes_before_backward_are_refused():
    """Forward, step, backward: x * x would give the gradient 2x at the new x. No leaf changes."""
    x, other = leaf([1.0, 2]), leaf([3.0, 4])
    y, fresh = (x * x).sum() + other.sum(), (other * other).sum()
    fresh.backward()
    tm.optim.AdamW({"other": other}).step()
    other.grad = None
    for stale in (y, fresh):
        with pytest.raises(RuntimeError, match=r"shape \(2,\) changed.*before the optimiser"):
            stale.backward()
    assert x.grad is None and other.grad is None
    (x * x * other).sum().backward()
    np.testing.assert_array_equal(other.grad, x.data ** 2)


@pytest.mark.parametrize("make", [lambda a: np.array(a.T, order="F").T, lambda a: np.array(a[::-1, ::-1])[::-1, ::-1],
                                  lambda a: np.repeat(a, 2, axis=1)[:, ::2], lambda a: (a.setflags(write=False), a)[1]])
def test_strided_and_read_only_inputs(make):
    a = positive(3, 4)
    check(lambda x: (x * x) @ x.T + x[:, ::-1].max(axis=1), make(a.copy()))


def test_zero_size_and_zero_dimensions():
    for function in (lambda x: x * 2.0, lambda x: x.sum(), lambda x: x.mean(axis=1), lambda x: x.T @ x,
                     lambda x: x[:0], lambda x: x.reshape(3, 0)):
        assert gradient(function, np.zeros((0, 3))).shape == (0, 3)
    for function in (lambda x: x * x, lambda x: 2 ** x, lambda x: x.mean(), lambda x: x.exp(), lambda x: x.T,
                     lambda x: x[None] @ x[None]):
        grad = gradient(function, 2.0)
        assert type(grad) is np.ndarray and grad.shape == ()


def test_iteration():
    x = leaf([[1.0, 2], [3, 4]])
    a, b = x
    (a * b).sum().backward()
    assert x.grad.tolist() == [[3, 4], [1, 2]] and list(Tensor(np.zeros((0, 3)))) == []
    assert [float(v) for v in Tensor([1.0, 2])] == [1, 2] and sum(leaf([1.0, 2])).requires_grad


def test_the_values_of_a_tensor_are_an_array_where_no_graph_is_lost():
    x = leaf([1.0, 2])
    assert np.asarray(x.detach()).tolist() == np.asarray(x.numpy()).tolist() == [1, 2]
    assert Tensor([x.detach(), x.detach()]).shape == (2, 2)
    with tm.no_grad():
        assert np.concatenate([x, x * 2]).tolist() == [1, 2, 2, 4]


def test_leaves_of_one_array_do_not_share_it():
    """Would have caught: AdamW on a, which changed b and the user's array too."""
    start = np.array([1.0, 2])
    a, b = Tensor(start, requires_grad=True), Tensor(start, requires_grad=True)
    a.sum().backward()
    tm.optim.AdamW({"a": a}, lr=0.5).step()
    assert a.data[0] < 1 and b.data.tolist() == start.tolist() == [1, 2]


def test_a_whole_number_leaf_is_refused_before_any_gradient_is_given():
    """Would have caught: the gradient [0.5, 0.5] in whole numbers, [0, 0]."""
    x, other = Tensor([1, 2]), leaf([3.0, 4])
    x.requires_grad = True
    for y in ((x * 0.5 + other).sum(), x.sum()):
        with pytest.raises(TypeError, match="int64 has no gradient: convert with .astype"):
            y.backward()
    assert x.grad is None and other.grad is None


def test_a_copy_is_a_leaf_of_its_own_with_values_and_gradient():
    x = leaf([1.0, 2], np.float32)
    (x * x).sum().backward()
    for y in (copy.copy(x), copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        y.data[0], y.grad[1] = 5, 6
        y.sum().backward()
        assert (y.dtype, y.requires_grad, y.data.tolist(), y.grad.tolist()) == (np.float32, True, [5, 2], [3, 7])
    assert x.data.tolist() == [1, 2] and copy.deepcopy(x).grad.tolist() == [2, 4]
    assert not copy.copy(x.detach()).requires_grad


def test_a_pickled_leaf_works_in_a_new_process(monkeypatch):
    """Would have caught: "a leaf changed after the forward pass", because the clock starts at 0 there."""
    x = leaf([1.0, 2])
    x.mark_changed()
    content = pickle.dumps(x)
    monkeypatch.setattr(tensor, "_clock", itertools.count())
    y = pickle.loads(content)
    (y * y).sum().backward()
    assert y.grad.tolist() == [2, 4]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_comparisons_are_those_of_the_values(requires_grad):
    x, a = Tensor([1.0, 2, 3], requires_grad), np.array([3.0, 2, 1])
    for compare in (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne):
        for other in (2, a, a.tolist(), Tensor(a), Tensor(a, True), np.float64(2)):
            plain = np.asarray(getattr(other, "data", other) if isinstance(other, Tensor) else other)
            for found, expected in ((compare(x, other), compare(x.data, plain)),
                                    (compare(other, x), compare(plain, x.data))):
                assert type(found) is np.ndarray and found.tolist() == expected.tolist()
    assert x[x == 2.0].data.tolist() == [2] and x[x > 1].data.tolist() == [2, 3]
    assert (x == None) is False and (x != "a") is True  # noqa: E711
    assert {x: 1}[x] == 1 and x in {x} and x.detach() not in {x}
    assert np.isfinite(x).all() and np.argmax(x) == 2 and np.zeros_like(x).tolist() == [0, 0, 0]
    assert (np.shape(x), np.ndim(x), np.size(x)) == ((3,), 1, 3)


def test_a_tensor_of_one_element_is_a_number():
    loss = leaf([2.25])
    assert loss > 2 and f"{loss:.3f} {loss:5.1f}" == "2.250   2.2" and f"{loss}" == str(loss) == repr(loss)
    assert (int(loss), float(loss), round(loss), round(loss, 1), bool(loss)) == (2, 2.25, 2, 2.2, True)


def test_functions_of_numpy_compute_where_no_graph_is_lost():
    x = Tensor([4.0, 9])
    for function in (np.exp, np.log, np.sum, np.mean, np.max, np.sin, np.std, np.sort, lambda x: np.clip(x, 5, 6),
                     lambda x: np.maximum(x, x[0]), lambda x: np.add.reduce(x), lambda x: np.stack([x, x], axis=1),
                     lambda x: np.where(x > 5, x, 0), lambda x: np.sum(x[None], axis=(0, 1))):
        found = function(x)
        assert isinstance(found, (np.ndarray, np.floating)) and np.array_equal(found, function(x.data))
    total, y = np.zeros(2), leaf([1.0, 2])
    total += x
    assert total.tolist() == [4, 9] and (np.ones(2) + x).data.tolist() == [5, 10]
    with tm.no_grad():
        assert np.sum(y) == 3 and np.square(y).tolist() == [1, 4]


def test_astype_and_its_gradient():
    x = leaf([1.5, -2], np.float32)
    y = x.astype(np.float64)
    (y * y).sum().backward()
    assert (y.dtype, x.grad.dtype, x.grad.tolist()) == (np.float64, np.float32, [3, -4])
    assert x.astype(int).data.tolist() == [1, -2] and not x.astype(int).requires_grad


def test_the_absolute_value_has_the_slope_of_the_sign():
    x = leaf([-2.0, 0, 3])
    (abs(x) + x.abs()).sum().backward()
    assert x.abs().data.tolist() == [2, 0, 3] and x.grad.tolist() == [-2, 0, 2]


# ---- errors --------------------------------------------------------------------------------------

def in_place(x):
    x[0] = 1.0


def under_no_grad(x):
    with tm.no_grad():
        y = x.sum()
    y.backward()


@pytest.mark.parametrize("wrong, error, remedy", [
    (lambda x: x + np.ones(2), ValueError, r"shapes \(3,\) and \(2,\).*reshape"),
    (lambda x: np.ones((2, 2)) * x, ValueError, r"shapes \(2, 2\) and \(3,\).*reshape"),
    (lambda x: x @ np.ones((2, 3)), ValueError, r"\(3,\) and \(2, 3\).*last axis"),
    (lambda x: x @ 2.0, ValueError, r"\(3,\) and \(\)"),
    (lambda x: np.ones((4, 2, 3)) @ x[None, :, None] @ np.ones((3, 1, 1)), ValueError, "counted from the right"),
    (lambda x: (x * 2).backward(), ValueError, r"\(3,\).*\.sum\(\)\.backward"),
    (lambda x: (x * 2).backward(np.ones(2)), ValueError, r"\(2,\).*\(3,\)"),
    (lambda x: Tensor([1.0]).backward(), RuntimeError, "requires_grad=True"),
    (under_no_grad, RuntimeError, "no_grad"),
    (in_place, TypeError, "where or functional.concatenate"),
    (lambda x: Tensor([1, 2], requires_grad=True), TypeError, "int64 has no gradient.*float32"),
    (lambda x: Tensor(["a"]), TypeError, "real numbers"),
    (lambda x: x + None, TypeError, "real numbers"),
    (lambda x: x.transpose(5), ValueError, "axis|axes|bounds"),
    (lambda x: x[None].transpose(0, 3), ValueError, "axis|axes|bounds"),
    (lambda x: x.reshape(2, 2), ValueError, "reshape"),
    (lambda x: x[3], IndexError, "out of bounds"),
    (lambda x: Tensor(np.array([1, 2])) ** -1, ValueError, "negative integer powers"),
    (lambda x: list(x.sum()), TypeError, r"\(\).*item"),
    (lambda x: sum(Tensor(2.0)), TypeError, r"\(\).*item"),
    (lambda x: np.exp(x), TypeError, r"np.exp .*use x\.exp\(\), or np.exp of x\.data outside the graph"),
    (lambda x: np.sin(x), TypeError, r"np.sin .*use np.sin of x\.data"),
    (lambda x: np.add(np.ones(3), x, out=np.ones(3)), TypeError, r"np.add .*x\.data"),
    (lambda x: np.concatenate([x, x]), TypeError, r"functional.concatenate, or np.concatenate of x\.data"),
    (lambda x: np.stack([x, x]), TypeError, r"functional.stack, or np.stack of x\.data"),
    (lambda x: np.mean(x), TypeError, r"np.mean .*use x\.mean\(\), or np.mean of x\.data"),
    (lambda x: np.abs(x), TypeError, r"np.abs .*use x\.abs\(\), or np.abs of x\.data"),
    (lambda x: np.clip(x, 0, 1), TypeError, r"np.clip .*use np.clip of x\.data"),
    (lambda x: np.add(np.ones(3), 1, out=x.detach()), TypeError, r"np.add cannot write .*x\.data as out"),
    (lambda x: bool(x), ValueError, r"\(3,\) is neither true nor false: use x\.data\.any\(\)"),
    (float, ValueError, r"\(3,\) is not a single number: .*\.sum\(\)"),
    (lambda x: f"{x:.3f}", ValueError, r"\(3,\) is not a single number"),
    (lambda x: x < None, TypeError, "'<' not supported"),
    (lambda x: copy.copy(x * 2), TypeError, r"\(3,\) that was computed .*x\.detach\(\)"),
    (lambda x: pickle.dumps(x * 2), TypeError, r"\(3,\) that was computed .*x\.detach\(\)"),
    (lambda x: np.array([x, x]), TypeError, "functional.concatenate"),
    (lambda x: np.array([x.sum(), x.sum()]), TypeError, "functional.concatenate"),
    (lambda x: Tensor([x, x]), TypeError, "functional.concatenate"),
    (lambda x: Tensor([x.sum(), x.sum()]), TypeError, "functional.concatenate"),
    (lambda x: Tensor(x), TypeError, "functional.concatenate"),
    (lambda x: Tensor(np.ones((2, 3))) * [x, x], TypeError, "functional.concatenate"),
    (lambda x: [x, x] + x, TypeError, "functional.concatenate"),
    (lambda x: record(x.data, (x,), lambda g: (g[:1],)).sum().backward(), ValueError, "shape"),
])
def test_errors_say_what_to_do(wrong, error, remedy):
    with pytest.raises(error, match=remedy):
        wrong(leaf([1.0, 2, 3]))


def test_a_number_with_a_gradient_takes_the_dtype_of_the_array_beside_it():
    """As one without a gradient does; its own gradient keeps its own dtype."""
    x, scale = Tensor(np.ones((2, 3), np.float32), True), Tensor(2.0, True)
    product = x * scale
    assert product.dtype == np.float32 and scale.dtype == np.float64
    product.sum().backward()
    assert scale.grad == 6 and scale.grad.dtype == np.float64 and x.grad.dtype == np.float32
