"""Every kernel, in NumPy and in numba, against a plain loop (naive.py) in both precisions.

Backward passes also against central differences.

Also with the compiler off: NUMBA_DISABLE_JIT=1 pytest tests/test_kernels.py
"""
import inspect
import itertools
import math
import os

import numpy as np
import pytest

import naive
from tinymoe import kernels
from tinymoe.kernels import reference

pytestmark = pytest.mark.usefixtures("both_kernels")
DTYPES = [np.float64, np.float32]
ADAMW = dict(lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
NAMES = ["gelu", "silu", "relu"]
COMPILED = os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"
# sizes for more than one piece of the numba kernels (a test compares them with the kernels' own)
MANY = 2 * 256 + 3 if COMPILED else 5           # rows of dense layers and experts: more than two pieces
TILE_COLUMNS = 256 + 9 if COMPILED else 5       # of a linear layer
QUERIES = 64 + 3                                # time steps of attention
ENTRIES = 5 * 8192 if COMPILED else 7           # of a parameter
ONE_THREAD = 4 * 8192 if COMPILED else 8        # entries that are still left to one thread


def normal(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def close(got, expected, tolerance=None):
    got = np.asarray(got)
    tolerance = tolerance or (1e-10 if got.dtype == np.float64 else 2e-5)
    assert got.shape == np.shape(expected)
    largest = max(1.0, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * largest)


def all_close(got, expected, dtype):
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype
        close(g, e)


@pytest.fixture
def threads():
    before = kernels.get_threads()
    yield kernels.set_threads
    kernels.set_threads(before)


# ---- dense layers --------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 5])
def test_linear(n, dtype):
    x, w, b, dy = (normal(*shape, dtype=dtype) for shape in ((n, 3), (3, 4), (4,), (n, 4)))
    for bias in (b, None):
        close(kernels.linear(x, w, bias), naive.linear(x, w, bias))
    all_close(kernels.linear_backward(dy, x, w), naive.linear_backward(dy, x, w), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_over_many_pieces_and_strided_inputs(dtype):
    x, w, dy = normal(2, MANY, dtype=dtype).T, normal(3, 2, dtype=dtype).T, normal(MANY, 3, dtype=dtype)
    close(kernels.linear(x, w, None), x @ w)
    all_close(kernels.linear_backward(dy, x, w), (dy @ w.T, x.T @ dy, dy.sum(0)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_over_many_tiles(dtype):
    """More rows, columns and terms of a sum than fit in one tile of a matrix product, and more than one task."""
    n, i, o = MANY, 70, TILE_COLUMNS
    x, w, dy = normal(n, i, dtype=dtype), normal(i, o, dtype=dtype), normal(n, o, dtype=dtype)
    b = normal(o, dtype=dtype)
    close(kernels.linear(x, w, b), x @ w + b)
    all_close(kernels.linear_backward(dy, x, w), (dy @ w.T, x.T @ dy, dy.sum(0)), dtype)


@pytest.mark.parametrize("shape", [(7, 7), (ENTRIES + 3,)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_activation(name, dtype, shape):
    x, dy = np.linspace(-12, 12, math.prod(shape)).reshape(shape).astype(dtype), normal(*shape, dtype=dtype)
    close(kernels.activation(x, name), naive.each(naive.activation, x, name), 1e-12 if dtype == np.float64 else 1e-6)
    close(kernels.activation_backward(dy, x, name), dy * naive.each(naive.activation_slope, x, name),
          1e-12 if dtype == np.float64 else 1e-6)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_a_name_means_the_activation_of_this_name_in_reference(name):
    """In the experts too, whose loops choose by a number. Would have caught a number that a new entry had moved."""
    x, dy = normal(3, 8), normal(3, 4 if name in reference.GATED else 8)
    close(kernels.activation(x, name), reference.activation(x, name))
    close(kernels.activation_backward(dy, x, name), reference.activation_backward(dy, x, name))
    arguments = routed(ROUTES["balanced"], gated=name in reference.GATED)
    (y, saved), (expected, kept) = (m.experts_forward(*arguments, name) for m in (kernels, reference))
    close(y, expected)
    all_close(kernels.experts_backward(y, *arguments, name, saved),
              reference.experts_backward(y, *arguments, name, kept), np.float64)


def test_an_activation_without_a_loop_is_an_error_that_names_it(monkeypatch, both_kernels):
    monkeypatch.setitem(reference.CURVES, "cube", lambda x: (x**3, 3 * x**2))
    x, arguments = normal(3, 8), routed(ROUTES["balanced"])
    for call in (lambda: kernels.activation(x, "cube"), lambda: kernels.activation_backward(x, x, "cube"),
                 lambda: kernels.experts_forward(*arguments, "cube")):
        if both_kernels == "numba":
            with pytest.raises(kernels.KernelsError, match="no loop for cube: add one, or set TINYMOE_KERNELS=numpy"):
                call()
        else:
            call()


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_activation_in_float32_is_good_to_a_few_units_in_the_last_place(name):
    x = np.linspace(-20, 20, 2001 if COMPILED else 101).astype(np.float32)
    error = np.abs(kernels.activation(x, name) - naive.each(naive.activation, x, name))
    assert np.all(error <= 2e-7 * np.maximum(1, np.abs(x)))
    assert np.array_equal(kernels.activation(np.float32([-1e4, 0, 1e4]), name), np.float32([0, 0, 1e4]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, MANY])
def test_layer_norm(n, dtype):
    x, dy = normal(n, 6, dtype=dtype), normal(n, 6, dtype=dtype, seed=2)
    weight, bias = normal(6, dtype=dtype), normal(6, dtype=dtype, seed=1)
    y, mean, rstd = kernels.layer_norm(x, weight, bias, 1e-5)
    close(y, naive.layer_norm(x.astype(float), weight, bias, 1e-5))
    close(mean, x.mean(1))
    gradients = kernels.layer_norm_backward(dy, x, weight, mean, rstd)
    all_close(gradients, naive.layer_norm_backward(dy, x.astype(float), weight, 1e-5), dtype)
    if dtype == np.float64:
        numeric = naive.central_difference(lambda x: naive.layer_norm(x, weight, bias, 1e-5), x[:2], dy[:2])
        close(gradients[0][:2], numeric, 1e-7)


# ---- attention -----------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, T, H, G, d, dv", [
    (2, 1, 2, 2, 3, 3), (1, 5, 4, 2, 3, 2), (2, 7, 3, 1, 2, 4), (1, QUERIES, 1, 1, 2, 2)])
def test_causal_attention(B, T, H, G, d, dv, dtype):
    q, k = normal(B, T, H, d, dtype=dtype), normal(B, T, G, d, dtype=dtype, seed=1)
    v = normal(B, T, G, dv, dtype=dtype, seed=2)
    out, saved = kernels.causal_attention(q, k, v)
    all_close([out], [naive.causal_attention(q, k, v)[0]], dtype)
    dout = normal(B, T, H, dv, dtype=dtype, seed=3)
    gradients = kernels.causal_attention_backward(dout, q, k, v, saved)
    all_close(gradients, naive.causal_attention_backward(dout, q, k, v), dtype)
    if dtype == np.float64 and T < 10:
        for i, gradient in enumerate(gradients):
            def attend(z, i=i):
                return kernels.causal_attention(*[z if j == i else x for j, x in enumerate((q, k, v))])[0]
            close(gradient, naive.central_difference(attend, (q, k, v)[i], dout), 1e-7)


# ---- experts -------------------------------------------------------------------------------------

# expert of each assignment of each token: name -> list over tokens of tuples of experts
ROUTES = {
    "balanced": [(0, 1), (1, 2), (2, 0), (0, 2)],
    "one expert holds all": [(1,)] * 4,
    "empty experts and a token without": [(0,), (), (3, 0), (0,)],
    "no assignment": [(), ()],
    "one token": [(2,)],
    "one token, every expert": [(0, 1, 2, 3)],
    "no token": [],
}


def routed(experts_of, n_experts=4, D=3, F=5, dtype=np.float64, gated=False):
    """-> the arguments of experts_forward, without the activation"""
    up = 2 * F if gated else F
    pairs = sorted((e, n) for n, experts in enumerate(experts_of) for e in experts)
    token = np.array([n for _, n in pairs], dtype=int)
    offsets = np.searchsorted([e for e, _ in pairs], np.arange(n_experts + 1))
    weights = (normal(n_experts, D, up, dtype=dtype), normal(n_experts, up, dtype=dtype),
               normal(n_experts, F, D, dtype=dtype), normal(n_experts, D, dtype=dtype))
    return normal(len(experts_of), D, dtype=dtype), token, offsets, normal(len(token), dtype=dtype), weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", [*NAMES, *naive.GATED])
def test_experts(route, name, dtype):
    arguments = routed(ROUTES[route], dtype=dtype, gated=name in naive.GATED)
    y, saved = kernels.experts_forward(*arguments, name)
    all_close([y], [naive.experts(*arguments[:4], *arguments[4], name)], dtype)
    dy = normal(*y.shape, dtype=dtype, seed=9)
    gradients = kernels.experts_backward(dy, *arguments, name, saved)
    all_close(gradients, naive.experts_backward(dy, *arguments[:4], *arguments[4], name), dtype)
    for e in np.flatnonzero(np.diff(arguments[2]) == 0):
        assert all(np.all(z[e] == 0) for z in gradients[2:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("name", ["silu", "swiglu"])
def test_experts_over_many_pieces(name, share, dtype):
    """`share` of the tokens go to expert 2 first; the rest take turns."""
    experts_of = [(2,) if n < share * MANY else tuple({n % 4, (n + 1) % 4}) for n in range(MANY)]
    arguments = routed(experts_of, D=2, F=2, dtype=dtype, gated=name in naive.GATED)
    y, saved = kernels.experts_forward(*arguments, name)
    close(y, naive.experts(*arguments[:4], *arguments[4], name))
    dy = normal(*y.shape, dtype=dtype, seed=9)
    gradients = kernels.experts_backward(dy, *arguments, name, saved)
    all_close(gradients, naive.experts_backward(dy, *arguments[:4], *arguments[4], name), dtype)


@pytest.mark.parametrize("name", ["silu", "swiglu"])
def test_experts_without_hidden_units_are_their_last_bias(name):
    x, token, offsets, gate, weights = routed([(1,), (2,)], F=0, gated=name in naive.GATED)
    y, saved = kernels.experts_forward(x, token, offsets, gate, weights, name)
    close(y, gate[:, None] * weights[3][[1, 2]])
    dx, dgate, *_, db2 = kernels.experts_backward(np.ones_like(x), x, token, offsets, gate, weights, name, saved)
    assert not dx.any()
    close(dgate, weights[3][[1, 2]].sum(axis=1))
    close(db2[[1, 2]], np.repeat(gate[:, None], 3, axis=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu", "swiglu"])
def test_experts_wider_than_a_tile(name, dtype):
    arguments = routed([(1,)] * 100, D=70, F=TILE_COLUMNS, dtype=dtype, gated=name in naive.GATED)
    y, saved = kernels.experts_forward(*arguments, name)
    all_close([y], [naive.experts(*arguments[:4], *arguments[4], name)], dtype)
    gradients = kernels.experts_backward(y, *arguments, name, saved)
    all_close(gradients, naive.experts_backward(y, *arguments[:4], *arguments[4], name), dtype)


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_experts_gradients_by_central_differences(name):
    x, token, offsets, gate, weights = routed(ROUTES["empty experts and a token without"])
    dy = normal(*x.shape, seed=9)
    _, saved = kernels.experts_forward(x, token, offsets, gate, weights, name)
    gradients = kernels.experts_backward(dy, x, token, offsets, gate, weights, name, saved)
    free = [x, gate, *weights]
    for i, gradient in enumerate(gradients):
        def forward(z, i=i):
            x, gate, *weights = free[:i] + [z] + free[i + 1:]
            return kernels.experts_forward(x, token, offsets, gate, weights, name)[0]
        close(gradient, naive.central_difference(forward, free[i], dy), 1e-7)


# ---- optimiser, norm, scatter --------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2), (ENTRIES,)])
def test_adamw(shape, dtype):
    parameter, m, v = normal(*shape, dtype=dtype), np.zeros(shape, dtype), np.zeros(shape, dtype)
    expected = parameter.astype(float), m.astype(float), v.astype(float)
    for step in (1, 2, 3):
        gradient = normal(*shape, dtype=dtype, seed=step)
        kernels.adamw(parameter, gradient, m, v, step=step, **ADAMW)
        expected = naive.adamw(expected[0], gradient, *expected[1:], 0.1, 0.9, 0.95, 1e-8, 0.1, step)
    all_close((parameter, m, v), expected, dtype)


@pytest.mark.parametrize("size", [3, ENTRIES])
@pytest.mark.filterwarnings("ignore:overflow")
def test_adamw_with_a_gradient_whose_square_overflows_changes_nothing_ever_after(size):
    parameter, m, v = np.ones(size, np.float32), np.zeros(size, np.float32), np.zeros(size, np.float32)
    for step, gradient in ((1, 2e19), (2, 1.0), (3, -2e19)):
        kernels.adamw(parameter, np.full(size, gradient, np.float32), m, v, step=step, **ADAMW | {"weight_decay": 0.0})
        assert (parameter == 1).all() and (v == np.inf).all() and np.isfinite(m).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 7, ONE_THREAD + 1])
def test_sum_of_squares(size, dtype):
    x = normal(size, dtype=dtype)
    assert kernels.sum_of_squares(x) == pytest.approx(np.sum(x.astype(float)**2), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 34])
def test_add_rows_with_repeats(width, dtype):
    index = np.array([2, 0, 2, 2, 4])
    rows = normal(5, width, dtype=dtype)
    close(kernels.add_rows(5, index, rows), naive.add_rows(5, index, rows))
    assert not kernels.add_rows(3, index[:0], rows[:0]).any()


# ---- promises ------------------------------------------------------------------------------------

def everything(dtype):
    """The results of all kernels at sizes of several pieces, as bytes."""
    x, w, b = normal(MANY, 40, dtype=dtype), normal(40, 40, dtype=dtype), normal(40, dtype=dtype)
    arguments = routed([(0, 1 + n % 2) if n % 5 else (0, 3) for n in range(MANY)], D=40, F=24, dtype=dtype)
    heads = normal(2, 37, 4, 8, dtype=dtype)
    out, weights = kernels.causal_attention(heads, heads[:, :, :2], heads[:, :, 2:])
    y, saved = kernels.experts_forward(*arguments, "gelu")
    normed = kernels.layer_norm(x, b, b, 1e-5)
    optimised = [normal(ENTRIES, dtype=dtype, seed=i)**2 for i in range(4)]
    kernels.adamw(*optimised, step=3, **ADAMW)
    results = [kernels.linear(x, w, b), *kernels.linear_backward(x, x, w), kernels.activation(x, "gelu"),
               kernels.activation_backward(x, x, "gelu"), *normed, *kernels.layer_norm_backward(x, x, b, *normed[1:]),
               out, *kernels.causal_attention_backward(out, heads, heads[:, :, :2], heads[:, :, 2:], weights),
               y, *kernels.experts_backward(y, *arguments, "gelu", saved), *optimised,
               np.array(kernels.sum_of_squares(optimised[0])), kernels.add_rows(7, np.arange(MANY) % 7, x)]
    return [z.tobytes() for z in results]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_for_every_run_and_thread_count(threads, dtype, both_kernels):
    if both_kernels == "numba" and not COMPILED:
        pytest.skip("one thread without the compiler")
    threads(1)
    alone = everything(dtype)
    for n in (1, 2, 2):
        try:
            threads(n)
        except ValueError:
            pytest.skip("this machine has one core")
        assert everything(dtype) == alone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_bad_number_is_never_hidden(bad, dtype):
    x, w, b = normal(3, 4, dtype=dtype), normal(4, 4, dtype=dtype), normal(4, dtype=dtype)
    x[1, 2] = bad

    def spoiled(y, at=1):
        return not np.isfinite(y[at]).any()
    for name in NAMES:
        if not (name == "relu" and bad == -np.inf):                 # whose limit is 0
            assert not np.isfinite(kernels.activation(x, name)[1, 2])
        assert not np.isfinite(kernels.activation_backward(x, np.ones_like(x), name)[1, 2])
        assert np.isfinite(kernels.activation(x, name)).sum() >= x.size - 1
        if np.isnan(bad):
            assert np.isnan(kernels.activation_backward(np.ones_like(x), x, name)[1, 2])
    assert spoiled(kernels.linear(x, w, b)) and spoiled(kernels.layer_norm(x, b, b, 1e-5)[0])
    dx, dw, db = kernels.linear_backward(x, np.ones_like(x), w)
    assert spoiled(dx) and spoiled(dw[:, 2], ...) and spoiled(db, 2)
    dx, dw, db = kernels.layer_norm_backward(x, w[:3], b, *kernels.layer_norm(w[:3], b, b, 1e-5)[1:])
    assert spoiled(dx) and spoiled(dw, 2) and spoiled(db, 2)
    assert not np.isfinite(kernels.sum_of_squares(x)) and spoiled(kernels.add_rows(3, np.arange(3), x), (1, 2))
    q = normal(1, 3, 1, 4, dtype=dtype)
    q[0, 1, 0] = np.nan if np.isinf(bad) else bad
    for place in range(3):
        out, _ = kernels.causal_attention(*[q if i == place else np.ones_like(q) for i in range(3)])
        assert np.isnan(out[0, 1:2]).all()
    ones = [np.ones_like(q)] * 3
    dq, dk, dv = kernels.causal_attention_backward(q, *ones, kernels.causal_attention(*ones)[1])
    assert spoiled(dq[0]) and spoiled(dk[0, :2], ...) and spoiled(dv[0, :2], ...)
    arguments = routed([(0, 1), (1,), (2,)], D=4, dtype=dtype)
    saved = kernels.experts_forward(*arguments, "gelu")[1]
    dx, dgate, dw1, db1, dw2, db2 = kernels.experts_backward(x, *arguments, "gelu", saved)
    assert spoiled(dx) and spoiled(dgate, 2) and spoiled(dw1) and spoiled(db1)  # assignment 2: of token 1 to expert 1
    assert spoiled(dw2[1, :, 2], ...) and spoiled(db2, (1, 2))
    arguments[0][1, 2] = bad
    assert spoiled(kernels.experts_forward(*arguments, "gelu")[0])
    parameter = np.ones((3, 4), dtype)
    kernels.adamw(parameter, x, np.zeros_like(x), np.zeros_like(x), step=1, **ADAMW)
    assert not np.isfinite(parameter[1, 2]) and np.isfinite(parameter).sum() == 11


def test_read_only_inputs_are_taken():
    x = normal(3, 4)
    x.flags.writeable = False
    assert np.array_equal(kernels.activation(x, "relu"), np.maximum(x, 0))


def test_a_number_without_axes_keeps_its_shape():
    x = np.float64(2).reshape(())
    assert kernels.activation(x, "relu").shape == kernels.activation_backward(x, x, "relu").shape == ()


def test_threads_are_reported(threads):
    threads(1)
    info = kernels.thread_info()
    assert info["threads"] == kernels.get_threads() == 1
    assert {"threading_layer", "blas", "numba"} <= info.keys()


ONLY_NUMBA = pytest.mark.parametrize("both_kernels", [pytest.param("numba", marks=pytest.mark.slow)], indirect=True)


@ONLY_NUMBA
def test_compile_all_reports_seconds(both_kernels):
    assert kernels.compile_all(np.float64) > 0


# ---- every kernel twice --------------------------------------------------------------------------

def test_every_kernel_has_a_twin_with_the_same_arguments_and_an_example(both_kernels):
    for name in kernels.KERNELS:
        here, there = (inspect.signature(getattr(place, name)).parameters for place in (kernels, reference))
        assert here.keys() == there.keys()
    if both_kernels == "numba":
        from tinymoe.kernels.compiled import compile
        assert sorted(kernel.__name__ for kernel in compile.EXAMPLES) == kernels.KERNELS


@pytest.mark.skipif(not COMPILED, reason="with the compiler off the sizes are small")
@ONLY_NUMBA
def test_the_sizes_of_these_tests_are_more_than_a_piece(both_kernels):
    from tinymoe.kernels.compiled import attention, dense, experts, product, runtime, updates
    assert MANY > dense.LINEAR_ROWS and product.DEPTH < 70
    assert TILE_COLUMNS > dense.LINEAR_COLUMNS > product.VECTORS * product.BITS // 32
    assert MANY > 2 * experts.SEGMENT > 2 * runtime.PIECE and QUERIES > attention.QUERIES and updates.COLUMNS < 34
    assert ENTRIES > ONE_THREAD > 2 * runtime.SLICE and ONE_THREAD == updates.ONE_THREAD


@pytest.mark.parametrize("dtype", DTYPES)
@ONLY_NUMBA
def test_products_of_any_size_and_layout(both_kernels, dtype):
    """Of whole numbers, so that sums are exact. Nothing beside `out` is written, and nothing beside a and b counts."""
    from tinymoe.kernels.compiled.compile import loop
    from tinymoe.kernels.compiled.product import BITS, DEPTH, ROWS, VECTORS, multiply

    @loop
    def both(a, b, out, sums):
        multiply(a, b, out, False)
        multiply(a, b, sums, True)

    rng, columns = np.random.default_rng(0), VECTORS * BITS // (8 * np.dtype(dtype).itemsize)

    def inside(rows, columns, layout="rows"):
        whole = np.full((2 * columns + 2, 2 * rows + 2) if layout == "turned" else (2 * rows + 2, 2 * columns + 2),
                        np.nan, dtype)
        view = {"rows": whole[1:rows + 1, 1:columns + 1], "turned": whole[1:columns + 1, 1:rows + 1].T,
                "backwards": whole[2 * rows:0:-2, 2 * columns:0:-2]}[layout]
        view[:] = rng.integers(-8, 9, view.shape)
        return whole, view

    sizes = itertools.product((0, 1, ROWS, 2 * ROWS + 1, 3 * ROWS - 1), (0, 1, DEPTH, DEPTH + 1, 2 * DEPTH + 3),
                              (0, 1, columns - 1, columns, 2 * columns + 1))
    for M, K, N in sizes:
        for layouts in itertools.product(("rows", "turned", "backwards"), repeat=2):
            (_, a), (_, b) = map(inside, (M, K), (K, N), layouts)
            (around, out), (around_sums, sums) = inside(M, N), inside(M, N)
            expected = a.astype(int) @ b.astype(int)
            expected_sums = sums + expected
            both(a, b, out, sums)
            assert (out == expected).all() and (sums == expected_sums).all()
            assert np.isnan(around).sum() == np.isnan(around_sums).sum() == around.size - out.size


@ONLY_NUMBA
def test_the_plan_of_the_experts_is_the_one_that_is_drawn_beside_it(both_kernels):
    from tinymoe.kernels.compiled import experts
    pieces, first_slot, first_piece = experts._plan(np.array([0, 10, 12, 12, 17]), 4, 2)
    assert pieces.tolist() == [[0, 0, 3, -1], [0, 3, 6, 0], [0, 6, 10, 1],
                               [1, 10, 12, -1], [3, 12, 14, -1], [3, 14, 17, 2]]
    assert first_slot.tolist() == [0, 2, 2, 2, 3] and first_piece.tolist() == [0, 3, 6]


# ---- arrays that do not fit ----------------------------------------------------------------------

def misfits():
    """Calls that would read or write beyond an array, by name."""
    def of(*shape):
        return np.ones(shape)

    def experts(x=(3, 2), token=(0, 2, 1), offsets=(0, 1, 3), gate=3, b1=(2, 5), w2=(2, 5, 2), b2=(2, 2), name="gelu"):
        return of(*x), np.array(token), np.array(offsets), of(gate), (of(2, 2, 5), of(*b1), of(*w2), of(*b2)), name

    y, saved = reference.experts_forward(*experts())
    for name, changes in {"x": dict(x=(3, 3)), "token": dict(token=(0, 3, 1)), "negative": dict(token=(0, -1, 1)),
                          "offsets": dict(offsets=(0, 1, 4)), "falling": dict(offsets=(0, 4, 3)), "gate": dict(gate=2),
                          "b1": dict(b1=(2, 4)), "w2": dict(w2=(2, 5, 1)), "few w2": dict(w2=(1, 5, 2)),
                          "b2": dict(b2=(1, 2)), "gated": dict(name="swiglu")}.items():
        yield f"experts {name}", lambda changes=changes: kernels.experts_forward(*experts(**changes))
        dy = of(*changes.get("x", y.shape))
        yield f"experts back {name}", lambda dy=dy, changes=changes: kernels.experts_backward(
            dy, *experts(**changes), saved)
    for name, *shapes in (("rows", (2, 2), (15,), (3, 2)), ("width", (3, 1), (15,), (3, 2)),
                          ("before", (3, 2), (10,), (3, 2)), ("out", (3, 2), (15,), (2, 2))):
        yield f"experts back saved {name}", lambda shapes=shapes: kernels.experts_backward(
            of(3, 2), *experts(), tuple(of(*shape) for shape in shapes))
    yield "experts dtype", lambda: kernels.experts_forward(experts()[0].astype(np.float32), *experts()[1:])
    yield "linear", lambda: kernels.linear(of(3, 2), of(4, 5), None)
    yield "linear bias", lambda: kernels.linear(of(3, 2), of(2, 5), of(4))
    yield "linear back", lambda: kernels.linear_backward(of(3, 4), of(3, 2), of(2, 5))
    yield "layer norm", lambda: kernels.layer_norm(of(3, 2), of(1), of(2), 1e-5)
    yield "layer norm back", lambda: kernels.layer_norm_backward(of(3, 2), of(3, 2), of(2), of(2), of(3))
    yield "activation back", lambda: kernels.activation_backward(of(2), of(3), "gelu")
    yield "attention", lambda: kernels.causal_attention(of(1, 3, 2, 2), of(1, 2, 2, 2), of(1, 3, 2, 2))
    yield "attention back", lambda: kernels.causal_attention_backward(*[of(1, 3, 2, 2)] * 4, of(1, 2, 3))
    yield "rows", lambda: kernels.add_rows(3, [0, 3], of(2, 2))
    yield "few rows", lambda: kernels.add_rows(3, [0, 1, 2], of(2, 2))
    yield "adamw m", lambda: kernels.adamw(of(4), of(4), of(2), of(4), step=1, **ADAMW)
    yield "adamw g", lambda: kernels.adamw(of(4), of(2), of(4), of(4), step=1, **ADAMW)
    yield "adamw view", lambda: kernels.adamw(of(4, 4), of(4, 4), of(4, 4).T, of(4, 4), step=1, **ADAMW)


@ONLY_NUMBA
@pytest.mark.parametrize("name, call", list(misfits()), ids=[name for name, _ in misfits()])
def test_arrays_that_do_not_fit_are_refused_before_compiled_code_goes_beyond_them(both_kernels, name, call):
    with pytest.raises(ValueError, match="do not fit together in one kernel"):
        call()


def test_heads_of_width_1_may_have_any_stride():
    q, k, v = (normal(2, 5, 2, seed=i)[..., None] for i in range(3))
    dy = np.moveaxis(normal(1, 2, 5, 2, seed=3), 0, -1)
    y, saved = kernels.causal_attention(q, k, v)
    want, p = reference.causal_attention(*(np.array(x) for x in (q, k, v)))
    close(y, want)
    back = kernels.causal_attention_backward(dy, q, k, v, saved)
    for got, expected in zip(back, reference.causal_attention_backward(np.array(dy), q, k, v, p)):
        close(got, expected)


def test_timings_may_be_nested():
    with kernels.timed() as outer:
        kernels.sum_of_squares(np.ones(3))
        with kernels.timed() as inner:
            kernels.sum_of_squares(np.ones(3))
        kernels.sum_of_squares(np.ones(3))
    assert outer["sum_of_squares"][0] == 2 and inner["sum_of_squares"][0] == 1
