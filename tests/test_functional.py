"""Functions of Tensors: values by hand and from naive.py, gradients against central differences, and extremes."""
import contextlib
import itertools
import math

import numpy as np
import pytest

import naive
from tinymoe import Tensor, gradcheck, kernels
from tinymoe.autograd import functional as F

pytestmark = pytest.mark.filterwarnings("error")

NAMES = ["gelu", "silu", "relu"]
INF = np.inf


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def leaf(values, dtype=np.float64):
    return Tensor(np.array(values, dtype), requires_grad=True)


def gradients(function, *arrays, dtype=np.float64, dy=None):
    """(value, gradient of each array) for sum(function(*arrays) * dy)."""
    leaves = [leaf(a, dtype) for a in arrays]
    out = function(*leaves)
    out.backward(np.ones(out.shape) if dy is None else dy)
    assert out.dtype == dtype and all(x.grad.dtype == dtype and x.grad.shape == x.shape for x in leaves)
    return out.data, [x.grad for x in leaves]


def check(function, oracle, *arrays, tolerance=1e-10):
    """Values equal to the oracle's, and gradients to its central differences."""
    expected = np.asarray(oracle(*arrays))
    dy = normal(*expected.shape, seed=1)
    value, grads = gradients(function, *arrays, dy=dy)
    assert value.shape == expected.shape
    np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance)
    for i, grad in enumerate(grads):
        numeric = naive.central_difference(lambda z, i=i: oracle(*arrays[:i], z, *arrays[i + 1:]), arrays[i], dy)
        np.testing.assert_allclose(grad, numeric, rtol=1e-6, atol=1e-8)


# ---- activations ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name, inner", naive.GATED.items())
def test_gated_activations(name, inner):
    x = np.asarray(3 * normal(2, 3, 8))
    check(lambda x: F.activation(x, name), lambda x: naive.each(naive.activation, x[..., :4], inner) * x[..., 4:], x)


def test_the_clamped_swiglu():
    """a s(1.702 a) (1 + b): 1 s(1.702) 3 for (1, 2); beyond 7 as at 7 for a, and as at -7 or 7 for b."""
    def oracle(x):
        a, b = np.minimum(x[..., :4], 7), np.clip(x[..., 4:], -7, 7)
        return a / (1 + np.exp(-1.702 * a)) * (1 + b)

    assert F.activation(Tensor([1.0, 2.0]), "clamped_swiglu").item() == pytest.approx(3 / (1 + np.exp(-1.702)))
    for far, near in (([9.0, 2.0], [7.0, 2.0]), ([-9.0, 99.0], [-9.0, 7.0]), ([1.0, -99.0], [1.0, -7.0])):
        assert F.activation(Tensor(far), "clamped_swiglu").item() == F.activation(Tensor(near), "clamped_swiglu").item()
    check(lambda x: F.activation(x, "clamped_swiglu"), oracle, np.asarray(6 * normal(3, 2, 8)))
    assert F.activation(Tensor(np.ones((2, 4), np.float32)), "clamped_swiglu").dtype == np.float32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 2), (0, 3)])
def test_activations(name, shape):
    check(getattr(F, name), lambda x: naive.each(naive.activation, x, name), np.asarray(3 * normal(*shape)))


def test_gelu_is_the_tanh_form():
    """At 1 the tanh form gives 0.841192, the exact one 0.841345."""
    assert F.gelu(Tensor([1.0])).item() == pytest.approx(0.8411919906082768, abs=1e-15)


def test_relu_at_zero_has_slope_zero():
    assert gradients(F.relu, [-1.0, -0.0, 0.0, 1e-300])[1][0].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("function, limits, slopes", [
    (F.sigmoid, [0, 0, 1, 1], [0, 0, 0, 0]), (F.softplus, [0, 0, 1e2, 1e4], [0, 0, 1, 1]),
    (F.relu, [0, 0, 1e2, 1e4], [0, 0, 1, 1]),
    (F.gelu, [0, 0, 1e2, 1e4], [0, 0, 1, 1]), (F.silu, [0, 0, 1e2, 1e4], [0, 0, 1, 1])])
def test_activations_far_out(function, limits, slopes, dtype):
    value, (grad,) = gradients(function, [-1e4, -1e2, 1e2, 1e4], dtype=dtype)
    np.testing.assert_allclose(value, limits, atol=1e-40)
    np.testing.assert_allclose(grad, slopes, atol=1e-40)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-13)])
def test_sigmoid_and_softplus_keep_their_digits_in_the_tail(dtype, tolerance):
    x = np.array([-80.0, -40, -20, -10, -1, 0, 1, 10])
    s = np.array([1 / (1 + math.exp(-z)) for z in x])
    value, (grad,) = gradients(F.sigmoid, x, dtype=dtype)
    np.testing.assert_allclose(value, s, rtol=tolerance)
    np.testing.assert_allclose(grad[:7], (s * (1 - s))[:7], rtol=tolerance)
    value, (grad,) = gradients(F.softplus, x, dtype=dtype)
    np.testing.assert_allclose(value, [math.log1p(math.exp(z)) for z in x], rtol=tolerance)
    np.testing.assert_allclose(grad, s, rtol=tolerance)


def test_normal_cdf():
    check(F.normal_cdf, lambda x: np.array([0.5 * (1 + math.erf(z / math.sqrt(2))) for z in x]),
          np.array([-3.0, -0.5, 0, 1, 4]))


# ---- softmax family ------------------------------------------------------------------------------

@pytest.mark.parametrize("axis", [-1, 0, 1, -2])
def test_softmax_family(axis):
    def rows(x):
        return np.apply_along_axis(naive.softmax, axis, x)

    x = 3 * normal(3, 4, 2)
    check(lambda x: F.softmax(x, axis), rows, x)
    check(lambda x: F.log_softmax(x, axis), lambda x: np.log(rows(x)), x)
    check(lambda x: F.logsumexp(x, axis), lambda x: np.log(np.exp(x).sum(axis)), x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("row, p",
                         [([1e30, 1e30, 0], [0.5, 0.5, 0]), ([-1e30, -1e30, -1e30], [1 / 3] * 3),
                          ([-INF, 2, 2], [0, 0.5, 0.5]),
                                    ([-INF, 7, -INF], [0, 1, 0]), ([1e4, -1e4, 1e4], [0.5, 0, 0.5])])
def test_softmax_family_at_extremes(row, p, dtype):
    np.testing.assert_allclose(F.softmax(leaf(row, dtype)).data, p, rtol=1e-6)
    np.testing.assert_allclose(np.exp(F.log_softmax(leaf(row, dtype)).data), p, rtol=1e-6)
    assert F.logsumexp(leaf(row, dtype)).item() == pytest.approx(max(row), rel=1e-6, abs=math.log(3))
    np.testing.assert_allclose(gradients(F.logsumexp, row, dtype=dtype)[1][0], p, rtol=1e-6)
    assert np.isfinite(gradients(F.softmax, row, dtype=dtype, dy=np.arange(3))[1][0]).all()
    assert np.isfinite(gradients(F.log_softmax, row, dtype=dtype, dy=np.arange(3))[1][0]).all()


def test_a_row_of_minus_infinity_sums_to_zero():
    assert F.logsumexp(Tensor([[-INF, -INF], [0, 0]])).data.tolist() == [-INF, math.log(2)]


def test_cross_entropy_by_hand():
    """p = (1/4, 3/4), target 1, and p = (1/2, 1/2), target 0: mean of log 4/3 and log 2, gradient (p - onehot) / 2."""
    value, (grad,) = gradients(lambda x: F.cross_entropy(x, [1, 0]), [[0.0, math.log(3)], [5, 5]])
    assert value == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    np.testing.assert_allclose(grad, [[1 / 8, -1 / 8], [-1 / 4, 1 / 4]])


@pytest.mark.parametrize("targets", [[0, 3, 3], np.array([2, 1, 0], np.uint8), Tensor([1, 1, 1])])
def test_cross_entropy(targets):
    check(lambda x: F.cross_entropy(x, targets), lambda x: naive.cross_entropy(x, np.asarray(targets)),
          3 * normal(3, 4))


def test_cross_entropy_of_a_certain_mistake_is_finite():
    value, (grad,) = gradients(lambda x: F.cross_entropy(x, [0]), [[-1e4, 1e4]], dtype=np.float32)
    assert value == 2e4 and grad.tolist() == [[-1, 1]]


@pytest.mark.parametrize("logits, targets",
                         [((2, 3), [0, 3]), ((2, 3), [-1, 0]), ((2, 3), [0.0, 1.0]), ((2, 3), [0]), ((0, 3), []),
                                             ((2, 3), [[0], [1]]), ((2, 3, 4), [0, 1]), ((2, 3), [True, False])])
def test_cross_entropy_refuses(logits, targets):
    with pytest.raises(ValueError, match="targets"):
        F.cross_entropy(leaf(np.zeros(logits)), targets)


# ---- layers' arithmetic --------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 2, 3), (0, 3), (2, 0, 3)])
def test_linear_and_norms(shape):
    def rows(oracle):
        return lambda x, *rest: (y := oracle(x.reshape(-1, 3), *rest)).reshape(*shape[:-1], y.shape[-1])

    x, w, b, scale, shift = normal(*shape), normal(3, 2), normal(2), normal(3, seed=2), normal(3, seed=3)
    check(F.linear, rows(naive.linear), x, w, b)
    check(lambda x, w: F.linear(x, w), rows(lambda x, w: naive.linear(x, w, None)), x, w)
    check(F.layer_norm, rows(lambda *a: naive.layer_norm(*a, 1e-5)), x, scale, shift)
    check(F.rms_norm, rows(lambda *a: naive.rms_norm(*a, 1e-5).reshape(-1, 3)), x, scale)
    check(lambda x, w: F.rms_norm(x, w, eps=0.5), rows(lambda *a: naive.rms_norm(*a, 0.5).reshape(-1, 3)), x, scale)


def test_strided_inputs_and_gradients():
    x, w, dy = normal(3, 4).T, normal(2, 3).T, normal(2, 4).T
    check(lambda x, w: F.linear(x, w).T, lambda x, w: (x @ w).T, x, w)
    check(lambda x: F.gelu(x.T), lambda x: naive.each(naive.activation, x.T, "gelu"), x)
    x.setflags(write=False)
    for function in (lambda x: F.linear(x, Tensor(w)) * dy, F.silu,
                     lambda x: F.layer_norm(x, Tensor(np.ones(3)), Tensor(np.zeros(3)))):
        assert np.isfinite(gradients(function, x)[1][0]).all()


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-6), (np.float64, 1e-13)])
def test_layer_norm_of_a_large_mean_and_of_a_constant(dtype, tolerance):
    """One pass (E x^2 - (E x)^2) would lose every digit here: the mean is 10^4 times the spread."""
    x, one, zero = np.array([[1.0, 2, 3, 6]]), np.ones(4), np.zeros(4)
    far, _ = gradients(F.layer_norm, x + 1e4, one, zero, dtype=dtype)
    np.testing.assert_allclose(far, naive.layer_norm(x, one, zero, 1e-5), rtol=tolerance)
    flat, grads = gradients(F.layer_norm, np.full((1, 4), 7.0), one, zero, dtype=dtype)
    assert flat.tolist() == [[0] * 4] and np.isfinite(grads[0]).all()


@pytest.mark.parametrize("B, T, H, G, d, dv",
                         [(1, 1, 1, 1, 2, 2), (2, 5, 2, 2, 3, 4), (1, 4, 4, 2, 2, 3), (2, 3, 4, 1, 1, 1)])
def test_causal_attention(B, T, H, G, d, dv):
    check(F.causal_attention, lambda *a: naive.causal_attention(*a)[0], normal(B, T, H, d), normal(B, T, G, d, seed=1),
          normal(B, T, G, dv, seed=2))


def test_causal_attention_by_hand():
    """q = 0: the weights are equal, so position t gets the mean of v[0..t]; later positions get no gradient."""
    zero, v = np.zeros((1, 3, 1, 1)), np.array([3.0, 5, 10]).reshape(1, 3, 1, 1)
    value, (_, _, dv) = gradients(F.causal_attention, zero, zero, v, dy=np.array([0, 1.0, 0]).reshape(1, 3, 1, 1))
    assert value.ravel().tolist() == [3, 4, 6] and dv.ravel().tolist() == [0.5, 0.5, 0]


WRONG = {  # these reach compiled loops, where a wrong size reads foreign memory
    "bias": lambda: F.linear(leaf(np.ones((2, 3))), leaf(np.ones((3, 4))), leaf(np.ones(3))),
    "features": lambda: F.linear(leaf(np.ones((2, 4))), leaf(np.ones((3, 4)))),
    "axes of the weight": lambda: F.linear(leaf(np.ones((2, 3))), leaf(np.ones((3, 3, 1)))),
    "a vector as weight": lambda: F.linear(leaf(np.ones((2, 3))), leaf(np.ones(3))),
    "layer_norm weight": lambda: F.layer_norm(leaf(np.ones((2, 3))), leaf(np.ones(2)), leaf(np.ones(3))),
    "layer_norm bias": lambda: F.layer_norm(leaf(np.ones((2, 3))), leaf(np.ones(3)), leaf(np.ones(1))),
    "rms_norm weight": lambda: F.rms_norm(leaf(np.ones((2, 3))), leaf(np.ones((2, 1)))),
    "groups": lambda: F.causal_attention(leaf(np.ones((1, 2, 3, 4))), leaf(np.ones((1, 2, 2, 4))),
                                         leaf(np.ones((1, 2, 2, 4)))),
    "axes of v": lambda: F.causal_attention(leaf(np.ones((1, 2, 1, 4))), leaf(np.ones((1, 2, 1, 4))),
                                            leaf(np.ones((1, 2, 1, 4, 1)))),
    "time": lambda: F.causal_attention(leaf(np.ones((1, 3, 1, 4))), leaf(np.ones((1, 2, 1, 4))),
                                       leaf(np.ones((1, 2, 1, 4)))),
    "width": lambda: F.causal_attention(leaf(np.ones((1, 2, 1, 4))), leaf(np.ones((1, 2, 1, 3))),
                                        leaf(np.ones((1, 2, 1, 3)))),
}


@pytest.mark.parametrize("function", [F.gelu, F.relu, lambda x: F.embedding(x, [0]), lambda x: F.linear(x, x),
                                      lambda x: F.layer_norm(x, x[0], x[0]), lambda x: F.rms_norm(x, x[0]),
                                      lambda x: F.rotary(x[None, None]),
                                      lambda x: F.causal_attention(x[None, None], x[None, None], x[None, None])])
@pytest.mark.parametrize("dtype", [np.float16, np.int64])
def test_compiled_functions_say_which_dtypes_they_take(function, dtype):
    with pytest.raises(TypeError, match="float32"):
        function(Tensor(np.ones((2, 2), dtype)))


@pytest.mark.parametrize("values, axis", [([1, 2, 3], -1), ([[1, 2], [3, 0]], 0), (2, -1), (2.0, None), (True, -1)])
def test_functions_of_integers_and_of_single_numbers(values, axis):
    """Would have caught: softplus in whole numbers, and logsumexp that could not write into a scalar."""
    x, exact = Tensor(values), np.array(values, float)
    np.testing.assert_allclose(F.softplus(x).data, np.log1p(np.exp(exact)), rtol=1e-3 if x.dtype == bool else 1e-12)
    np.testing.assert_allclose(F.sigmoid(x).data, 1 / (1 + np.exp(-exact)), rtol=1e-3 if x.dtype == bool else 1e-12)
    total = np.log(np.exp(exact).sum(axis=None if not exact.ndim else axis))
    np.testing.assert_allclose(F.logsumexp(x, axis).data, total, rtol=1e-12)
    np.testing.assert_allclose(F.log_softmax(x, axis).data, exact - total, atol=1e-12)


@pytest.mark.parametrize("dtype, values", [(np.uint8, [1, 2, 255]), (np.int8, [-100, 100, 0]), (bool, [True, False, 1]),
                                           (np.int16, [-30_000, 30_000, 29_999])])
def test_the_softmax_family_of_small_whole_numbers_is_that_of_float64(dtype, values):
    """Would have caught: 1 - 255 = 2 in uint8."""
    x = Tensor(np.array([values], dtype))
    for function in (F.softmax, F.log_softmax, F.logsumexp, lambda x: F.cross_entropy(x, [1])):
        y, exact = function(x), function(x.astype(np.float64))
        assert y.dtype == np.float64
        np.testing.assert_array_equal(y.data, exact.data)


def test_no_time_steps_and_no_classes():
    """Along an axis of length 0 a softmax is empty, and log sum exp is log 0."""
    x = leaf(np.ones((3, 0)))
    assert F.softmax(x).shape == F.log_softmax(x).shape == (3, 0) and (F.logsumexp(x).data == -INF).all()


@pytest.mark.parametrize("eps", [1e-5, np.float64(1e-5), np.array(1e-5)])
def test_the_norms_keep_the_dtype_whatever_that_of_eps(eps):
    x, one = leaf([[1, 2]], np.float32), leaf([1, 1], np.float32)
    assert F.rms_norm(x, one, eps).dtype == F.layer_norm(x, one, one, eps).dtype == np.float32


def test_a_foreign_byte_order_is_named():
    with pytest.raises(TypeError, match="^gelu got >f4, but all must be float32"):
        F.gelu(Tensor(np.ones(2, ">f4")))


def test_sigmoid_keeps_the_dtype():
    assert [F.sigmoid(Tensor(np.ones(2, t))).dtype for t in ("f2", "f4", "f8")] == ["f2", "f4", "f8"]


def test_compiled_functions_refuse_to_mix_dtypes():
    with pytest.raises(TypeError, match=r"^linear got float32 and float64, .* x\.astype.*, or make the layer"):
        F.linear(leaf(np.ones((2, 2))), leaf(np.ones((2, 2)), np.float32))


@pytest.mark.parametrize("wrong", WRONG)
def test_shapes_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError):
        WRONG[wrong]()


@pytest.mark.parametrize("call, message", [
    (lambda x: F.activation(x, "tanh"), "^unknown activation 'tanh': choose one of gelu, .*clamped_swiglu$"),
    (lambda x: F.activation(x, "swiglu"), r"swiglu takes the two halves .* must be even, not \(2, 3\)"),
    (lambda x: F.activation(x, "clamped_swiglu"), r"clamped_swiglu takes the two halves .* not \(2, 3\)"),
    (lambda x: F.activation(x.sum(), "geglu"), r"geglu takes the two halves .* not \(\)"),
    (lambda x: F.causal_attention(x, x, x), r"causal_attention takes q \(B, T, H, d\).*not \(2, 3\), \(2, 3\)"),
])
def test_errors_say_what_is_taken(call, message):
    with pytest.raises(ValueError, match=message):
        call(leaf(np.ones((2, 3))))


# ---- lookups and joins ---------------------------------------------------------------------------

@pytest.mark.parametrize("ids", [[0, 0, 2], [[1, 1], [1, 3]], 2, np.zeros((0,), int), np.array([3, 0], np.uint8)])
def test_embedding(ids):
    check(lambda table: F.embedding(table, ids), lambda table: table[ids], normal(4, 3))


@pytest.mark.parametrize("ids", [[4], [0, -1], [0.0]])
def test_embedding_refuses(ids):
    with pytest.raises(IndexError):
        F.embedding(leaf(normal(4, 3)), ids)


@pytest.mark.parametrize("shape, index, axis",
                         [((2, 3), [[0, 0], [2, 1]], -1), ((2, 3), [[1, 1, 1]], 0), ((2, 3), [[-1], [0]], 1),
                                                ((2, 2, 3), [[[1, 1, 0]], [[0, 0, 0]]], 1), ((4,), [3, 3, 3], 0),
                          # the index broadcasts, or x does, or x is flattened
                          ((2, 3), [[0, 2]], 1), ((2, 3), [[1], [0], [1]], 0), ((1, 3), [[0, 0], [2, 1]], 1),
                          ((2, 3), [5, 0, 5], None)])
def test_gather(shape, index, axis):
    check(lambda x: F.gather(x, np.array(index), axis), lambda x: np.take_along_axis(x, np.array(index), axis),
          normal(*shape))


def test_scatter_add():
    def oracle(rows):
        out = np.zeros((4, *rows.shape[1:]))
        for i, row in zip([3, 0, 3], rows):
            out[i] += row
        return out

    for shape in [(3,), (3, 2), (3, 2, 2)]:
        check(lambda rows: F.scatter_add(rows, np.array([3, 0, 3]), 4), oracle, normal(*shape))
    with pytest.raises(IndexError):
        F.scatter_add(leaf([1.0]), np.array([4]), 4)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_concatenate(axis):
    shapes = [[2, 3, 4], [2, 3, 4], [2, 3, 4]]
    shapes[1][axis], shapes[2][axis] = 1, 0
    check(lambda *x: F.concatenate(x, axis), lambda *x: np.concatenate(x, axis), *(normal(*s) for s in shapes))
    check(lambda x: F.concatenate([x, x], axis), lambda x: np.concatenate([x, x], axis), normal(2, 3, 4))
    check(lambda x: F.concatenate((y for y in (np.ones((2, 3, 4)), x)), axis),  # an array, and a generator
          lambda x: np.concatenate([np.ones((2, 3, 4)), x], axis), normal(2, 3, 4))


def test_joined_integers_take_the_dtype_of_the_first_tensor():
    """As in an operation: a float32 graph stays float32."""
    x = Tensor(np.ones(2, np.float32), requires_grad=True)
    for join in (F.concatenate, F.stack):
        assert join([x, np.arange(2)]).dtype == join([[1, 2], x]).dtype == join([x, Tensor([1, 2])]).dtype == np.float32
        assert join([x, np.ones(2)]).dtype == np.float64 and join([[1, 2], [3, 4]]).dtype == np.int64


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_stack(axis):
    check(lambda *x: F.stack(x, axis), lambda *x: np.stack(x, axis), normal(2, 3), normal(2, 3, seed=1))
    check(lambda x: F.stack((y for y in (np.ones((2, 3)), x, x)), axis),  # an array, a repeat, and a generator
          lambda x: np.stack([np.ones((2, 3)), x, x], axis), normal(2, 3))
    for wrong, shapes in (([], r"\[\]"), ([normal(2), normal(3)], r"\[\(2,\), \(3,\)\]")):
        with pytest.raises(ValueError, match=f"all of one shape, not of the shapes {shapes}"):
            F.stack(wrong, axis)


@pytest.mark.parametrize("a, b", [((2, 3), (2, 3)), ((3,), (2, 1)), ((), (2, 3)), ((2, 3), ())])
def test_where(a, b):
    mask = np.array([[True, False, True], [False, False, True]])
    check(lambda a, b: F.where(mask, a, b), lambda a, b: np.where(mask, a, b), normal(*a), normal(*b, seed=1))


def test_where_with_numbers_keeps_the_dtype_and_no_gradient_leaks_from_the_other_side():
    x = leaf([0.0, 4], np.float32)
    y = F.where(x.data > 0, 1, x) + F.where(x.data > 0, x, -np.inf)[1]
    y.sum().backward()
    assert y.dtype == np.float32 and y.data.tolist() == [4, 5] and x.grad.tolist() == [1, 2]


def test_arrays_in_place_of_tensors():
    x, w, b = np.asarray(normal(2, 3)), np.asarray(normal(3, 2)), leaf([1.0, 2])
    assert F.softmax(np.array([0.0, 0.0])).data.tolist() == [0.5, 0.5] and F.relu(x=[-1.0, 2.0]).data.tolist() == [0, 2]
    assert F.cross_entropy(np.zeros((2, 4)), [0, 3]).item() == pytest.approx(math.log(4))
    np.testing.assert_allclose(F.linear(x, w, None).data, x @ w)
    for y in (F.linear(x, w, b), F.linear(Tensor(x), w, bias=b), F.linear(x, weight=leaf(w), bias=b)):
        b.grad = None
        y.sum().backward()
        np.testing.assert_allclose(y.data, x @ w + [1, 2])
        assert b.grad.tolist() == [2, 2]
    angles = np.array([0.5, 0.25])  # an argument that is meant to be an array stays one
    assert F.rotary(normal(1, 2, 1, 4), angles).shape == (1, 2, 1, 4)
    assert F.linear.__name__ == "linear" and F.linear.__doc__.startswith("x @ weight")
    for wrong in ("abc", None):
        with pytest.raises(TypeError, match="real numbers"):
            F.softmax(wrong)


# ---- what the forward pass accepts, the backward pass can differentiate --------------------------

SHAPES = [(), (1,), (3,), (2, 3), (1, 3), (2, 1), (2, 3, 2), (1, 2, 1, 2), (0, 3)]
INDICES = [0, -1, [0], [0, 1], (0, 1), [[0, 1]], [[0], [1]], [[0, 1, 1]], [[0, 0, 0], [1, 1, 1]], [[[0, 1]]],
           [0, 1, 2, 0], [], [[]], 1.0, [0.0],
           [True, False], [[True, False, True], [False, True, True]], np.array(1), np.array([0, 1], np.uint8), None,
           ..., range(2), slice(0, 2)]
AXES = [None, 0, 1, -1, -2, (0,), (0, 1), ()]
AT = {"getitem": lambda x, i: x[i], "embedding": F.embedding, "gather 0": lambda x, i: F.gather(x, i, 0),
      "gather -1": F.gather, "gather None": lambda x, i: F.gather(x, i, None),
      "scatter_add 1": lambda x, i: F.scatter_add(x, i, 1),
       "scatter_add 3": lambda x, i: F.scatter_add(x, i, 3), "where": lambda x, i: F.where(i, x, 2.0 * x)}
ALONG = {"sum": Tensor.sum, "mean": Tensor.mean, "max": Tensor.max, "softmax": F.softmax, "log_softmax": F.log_softmax,
         "logsumexp": F.logsumexp, "concatenate": lambda x, axis: F.concatenate([x, x * x], axis),
         "stack": lambda x, axis: F.stack([x, x * x], axis),
         "rotary": lambda x, _: F.rotary(x)}
CASES = [(name, f, argument) for table, arguments in ((AT, INDICES), (ALONG, AXES)) for name, f in table.items()
         for argument in arguments]


@pytest.mark.parametrize("function, argument", [case[1:] for case in CASES],
                         ids=[f"{name} {argument}" for name, _, argument in CASES])
def test_what_is_accepted_has_a_gradient(function, argument):
    for shape in SHAPES:
        x = leaf(normal(*shape))
        try:
            function(x, argument)
        except (ValueError, IndexError, TypeError, RuntimeWarning):  # the mean of nothing warns
            continue
        result = gradcheck(lambda x: function(x, argument), x)
        assert result, (shape, result)


def test_what_is_accepted_stays_accepted():
    """How many of all pairs of an argument and a shape each function takes: a refusal is not tested above."""
    accepted = dict.fromkeys(AT | ALONG, 0)
    for (name, function, argument), shape in itertools.product(CASES, SHAPES):
        with contextlib.suppress(ValueError, IndexError, TypeError, RuntimeWarning):
            function(leaf(normal(*shape)), argument)
            accepted[name] += 1
    assert accepted == {
        "getitem": 109, "embedding": 26, "gather 0": 15, "gather -1": 18, "gather None": 37, "scatter_add 1": 3,
        "scatter_add 3": 15, "where": 151, "sum": 62, "mean": 55, "max": 57, "softmax": 62, "log_softmax": 62,
        "logsumexp": 62, "concatenate": 28, "stack": 34, "rotary": 8}


@pytest.mark.parametrize("wrong, error", [
    (lambda: F.embedding(leaf([1.0, 2, 3]), [[0, 1, 1]]), ValueError),
    (lambda: F.embedding(leaf(np.ones((2, 3, 4))), [0]), ValueError),
    (lambda: F.embedding(leaf(np.ones((2, 3))), [True, False]), IndexError),
    (lambda: F.rotary(leaf(np.ones((1, 2, 4)))), ValueError),
    (lambda: F.scatter_add(leaf([1.0, 2, 3]), [[0, 0, 0], [1, 1, 1]], 3), ValueError),
    (lambda: F.scatter_add(leaf(np.ones((1, 2))), [0, 1], 2), ValueError),
    (lambda: F.scatter_add(leaf(1.0), [], 2), ValueError),
    (lambda: F.scatter_add(leaf([1.0, 2]), [True, False], 2), ValueError)])
def test_lookups_refuse_what_they_cannot_differentiate(wrong, error):
    with pytest.raises(error, match="not|integers"):
        wrong()


# -- nothing to compute ----------------------------------------------------------------------------

EMPTY = {  # name -> (call, shapes of its inputs, shape of the result, or the words of the refusal)
    "no rows through a layer": (F.linear, [(0, 4, 2), (2, 3), (3,)], (0, 4, 3)),
    "no features in": (F.linear, [(3, 0), (0, 2), (2,)], (3, 2)),
    "no features out": (F.linear, [(3, 2), (2, 0), (0,)], (3, 0)),
    "no rows to normalise": (F.layer_norm, [(0, 4, 3), (3,), (3,)], (0, 4, 3)),
    "nothing to normalise": (F.layer_norm, [(3, 0), (0,), (0,)], "layer_norm: .* nothing to normalise"),
    "no mean square": (F.rms_norm, [(3, 0), (0,)], "rms_norm: .* nothing to normalise"),
    "no sequences": (F.causal_attention, [(0, 4, 2, 3)] * 3, (0, 4, 2, 3)),
    "no time steps": (F.causal_attention, [(1, 0, 2, 3)] * 3, (1, 0, 2, 3)),
    "no values": (F.causal_attention, [(1, 4, 2, 3), (1, 4, 2, 3), (1, 4, 2, 0)], (1, 4, 2, 0)),
    "no entries of a head": (F.causal_attention, [(1, 4, 2, 0), (1, 4, 2, 0), (1, 4, 2, 3)], "d > 0"),
    "no heads": (F.causal_attention, [(2, 3, 0, 2)] * 3, "G dividing H"),
    "no width to turn": (F.rotary, [(1, 2, 2, 0)], (1, 2, 2, 0)),
    "nothing to turn": (F.rotary, [(0, 3, 2, 2)], (0, 3, 2, 2)),
    "no width of a table": (lambda table: F.embedding(table, [[1, 2]]), [(5, 0)], (1, 2, 0)),
    "no ids": (lambda table: F.embedding(table, np.zeros((0, 4), int)), [(5, 2)], (0, 4, 2)),
    "no width of a gate": (lambda x: F.activation(x, "swiglu"), [(3, 0)], (3, 0)),
    "no rows of a gate": (lambda x: F.activation(x, "geglu"), [(0, 4)], (0, 2)),
    "no numbers": (F.gelu, [(0,)], (0,)), "no rows of a softmax": (F.softmax, [(0, 3)], (0, 3)),
    "no rows of its logarithm": (F.log_softmax, [(0, 3)], (0, 3)),
    "no targets": (lambda x: F.cross_entropy(x, np.zeros(0, int)), [(0, 3)], "at least one integer"),
    "no rows to add": (lambda x: F.scatter_add(x, np.zeros(0, int), 3), [(0, 2)], (3, 2)),
    "no terms of a product": (lambda x: x @ x.T, [(2, 0)], (2, 2)), "no terms of a sum": (Tensor.sum, [(0,)], ()),
    "no largest": (lambda x: x.max(axis=0), [(0, 2)], "zero-size array"),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.filterwarnings("error")
def test_what_is_empty_has_an_empty_result_and_gradient_or_is_refused(name, both_kernels):
    call, shapes, expected = EMPTY[name]
    inputs = [Tensor(np.ones(shape), requires_grad=True) for shape in shapes]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            call(*inputs)
    else:
        y = call(*inputs)
        y.sum().backward()
        assert y.shape == expected and all(x.grad.shape == x.shape for x in inputs)
        assert all(np.isfinite(z).all() for z in (y.data, *(x.grad for x in inputs)))


def test_scatter_add_takes_no_index_from_the_end():
    for index in ([-1, 0], [0, 3]):
        with pytest.raises(IndexError, match="rows from 0 to 2"):
            F.scatter_add(Tensor([1.0, 1.0]), np.array(index), 3)


def test_the_clamp_of_swiglu_lets_nan_through():
    assert np.isnan(F.activation(Tensor([[np.nan, 1.0]]), "clamped_swiglu").data).all()
    assert np.isnan(F.activation(Tensor([[1.0, np.nan]]), "clamped_swiglu").data).all()


def test_a_graph_keeps_the_kernels_that_it_was_made_with():
    pytest.importorskip("numba")
    before, x = kernels.active(), np.random.default_rng(0).standard_normal((1, 5, 2, 3))
    gradients = []
    try:
        for first, then in (("numpy", "numpy"), ("numpy", "numba")):
            kernels.use(first)
            q = Tensor(x, requires_grad=True)
            y = (F.causal_attention(q, q, q) ** 2).sum()
            kernels.use(then)
            y.backward()
            gradients.append(q.grad)
    finally:
        kernels.use(before)
    np.testing.assert_array_equal(*gradients)


def test_attention_without_heads_is_refused():
    with pytest.raises(ValueError, match="G dividing H"):
        F.causal_attention(Tensor(np.ones((1, 2, 0, 3))), *[Tensor(np.ones((1, 2, 1, 3)))] * 2)
