"""gradcheck finds small faults and only faults, and leaves no trace on what it checked. Its table is complete."""
import inspect
import sys

import numpy as np
import pytest

from tinymoe import Tensor, attention, gradcheck, kernels, losses, nn, routers
from tinymoe.autograd import functional as F
from tinymoe.autograd.tensor import primitive
from tinymoe.layers.latent_attention import LatentAttention
from tinymoe.moe.experts import BACKENDS
from tinymoe.tools import checks

pytestmark = pytest.mark.filterwarnings("error")
RNG = np.random.default_rng(0)
SMALL, LARGE = RNG.standard_normal((3, 4)), RNG.standard_normal((30, 40))


def squares(fault, scale=1.0):
    """scale x^2 with a VJP that is multiplied by `fault`, a number or an array."""
    return lambda x: primitive(scale * x.data**2, (x, lambda g: g * 2 * scale * x.data * fault))


def one_entry(shape, error):
    fault = np.ones(shape)
    fault[1, 2] += error
    return fault


@pytest.mark.parametrize("x",
                         [SMALL, LARGE, 3.0, RNG.standard_normal((1, 129)), np.zeros((0, 2)), SMALL.T[::-1],
                          1e6 * SMALL, 1e-3 * SMALL],
                         ids=["small", "large", "number", "just large", "empty", "strided", "huge", "tiny"])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
def test_right_gradients_pass(x, scale):
    result = gradcheck(squares(1.0, scale), x)
    assert result and result.ok and result.max_error < 1e-6, result


@pytest.mark.parametrize("x", [SMALL, LARGE, np.array(3.0)], ids=["small", "large", "number"])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
@pytest.mark.parametrize("fault", [1.001, 0.999, 0.0, -1.0, np.nan])
def test_wrong_gradients_fail_at_every_scale(x, scale, fault):
    result = gradcheck(squares(fault, scale), x)
    assert not result and not result.ok and result.max_error > 1e-4


def test_one_wrong_entry_is_found_and_named():
    result = gradcheck(lambda a, b: a.sum() + squares(one_entry((3, 4), 0.001))(b).sum(), SMALL, SMALL)
    assert not result.ok and "input 1 at (1, 2)" in result.where
    assert result.max_error == pytest.approx(1e-3, rel=0.01)
    assert not gradcheck(squares(one_entry((30, 40), 1.0)), LARGE)


def test_one_wrong_entry_is_found_beside_one_a_thousand_times_larger():
    x = SMALL.copy()
    x[0, 0], x[1, 2] = 1e3, 1.0
    assert gradcheck(squares(1.0), x)
    assert not gradcheck(squares(one_entry((3, 4), 0.1)), x)


@pytest.mark.parametrize("size", [1e8, 1e12])
def test_the_step_along_a_random_direction_grows_with_the_entries(size):
    """Would have caught: a step of 1e-6 beside 1e8, where the difference is rounding alone and everything passes."""
    assert gradcheck(squares(1.0), size * LARGE)
    assert not gradcheck(squares(0.5), size * LARGE) and not gradcheck(squares(0.0), size * LARGE)


def test_one_large_entry_does_not_hide_the_others_of_a_large_input():
    """Would have caught: each entry's step by its own size, so that 1e4 among 100 normals outweighs them."""
    x, fault = np.random.default_rng(0).standard_normal(100), np.ones(100)
    x[0], fault[50:] = 1e4, 1.1
    assert gradcheck(squares(1.0), x)
    assert not gradcheck(squares(fault), x)


@pytest.mark.parametrize("x", [SMALL, LARGE], ids=["small", "large"])
def test_entries_that_are_not_finite_have_a_step_too(x):
    x = x.copy()
    x[1] = -np.inf
    assert gradcheck(lambda x: F.where(np.isinf(x.data), 0.0, x), x)
    assert gradcheck(lambda x: F.where(np.isinf(x.data), 0.0, x), np.full(x.shape, np.inf))


def test_an_entry_below_a_hundredth_of_the_largest_is_measured_by_it():
    """The gradients are 2 and 2e-4: an error of 2e-5 is 1e-3 of 0.02, one of 2e-8 is 1e-6."""
    for error, passes in ((0.1, False), (1e-4, True)):
        fault = np.array([1, 1 + error])
        assert gradcheck(squares(fault), np.array([1, 1e-4])).ok == passes


def test_a_missing_and_a_surplus_gradient_fail():
    assert not gradcheck(lambda x: x.detach() * 2 + x, SMALL)
    assert not gradcheck(lambda x: x.detach() * 2, SMALL)
    assert not gradcheck(lambda x: primitive(np.zeros(x.shape), (x, lambda g: g)), SMALL)


@pytest.mark.parametrize("function",
                         [lambda x: x * 0.0, lambda x: Tensor(1.0), lambda x: F.softmax(x).sum(),
                          lambda x: (x - x) * 1e6])
def test_a_gradient_of_exactly_zero_passes(function):
    assert gradcheck(function, SMALL), gradcheck(function, SMALL)


def test_what_rounding_causes_is_forgiven():
    assert gradcheck(lambda x: x * 1e-6 + 1e3, SMALL)
    assert gradcheck(lambda x: F.log_softmax(x * 30), SMALL)


def test_only_inputs_that_require_gradients_are_checked_unless_none_does():
    x, ids = Tensor(SMALL, requires_grad=True), np.array([0, 2, 2])
    assert gradcheck(lambda x, y: x * y.detach(), x, Tensor(SMALL + 1))
    assert not gradcheck(lambda x, y: x * y.detach(), SMALL, SMALL + 1)
    assert gradcheck(F.embedding, x, ids)
    with pytest.raises((ValueError, TypeError)):  # nothing to check is no success
        gradcheck(lambda ids: Tensor(ids.data * 2.0), ids)


def test_a_computed_tensor_is_checked_like_a_leaf():
    x = Tensor(SMALL, requires_grad=True)
    y = x * 2
    assert gradcheck(lambda y: y * y, y)
    y.sum().backward()
    assert (x.grad == 2).all()  # it is as computed as before


def test_one_tensor_given_twice():
    x = Tensor(SMALL, requires_grad=True)
    before = x.data
    assert gradcheck(lambda a, b: a * b, x, x) and x.data is before and x.grad is None


@pytest.mark.parametrize("function, error", [
    (lambda x, w: x * w, None), (lambda x, w: 1 / 0, ZeroDivisionError), (lambda x, w: x.data, TypeError),
    (lambda x, w: None, TypeError),
    (lambda x, w: x * RNG.standard_normal(), ValueError), (lambda x, w: x @ np.ones(9), ValueError)])
def test_everything_is_put_back_even_after_an_error(function, error):
    x, w = Tensor(SMALL.astype(np.float32)), Tensor(SMALL.astype(np.float16), requires_grad=True)
    w.grad = np.full((3, 4), 5, np.float16)
    x_data, w_data, w_grad = x.data, w.data, w.grad
    if error:
        with pytest.raises(error):
            gradcheck(function, x, w)
    else:
        assert gradcheck(function, x, w)
    assert x.data is x_data and w.data is w_data and w.grad is w_grad and x.grad is None
    assert (x.requires_grad, w.requires_grad) == (False, True)
    np.testing.assert_array_equal(x_data, SMALL.astype(np.float32))
    assert (w_grad == 5).all()


def test_the_gradients_of_what_is_no_input_are_put_back():
    """Would have caught: a layer whose weights kept the gradient of gradcheck's random weights."""
    layer, inner = nn.Linear(4, 2, 0, dtype=np.float64), Tensor(2.0, requires_grad=True)
    layer.bias.grad = kept = np.ones(2)
    factor = (inner * 3).retain_grad()
    assert gradcheck(lambda x: layer(x) * factor, SMALL)
    assert layer.weight.grad is inner.grad is factor.grad is None and layer.bias.grad is kept

    def fails(g):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        gradcheck(lambda x: primitive(x.data, (x, fails)) + layer(x).sum(), SMALL)
    assert layer.weight.grad is None and layer.bias.grad is kept


def test_float32_inputs_are_checked_in_float64():
    seen = []
    assert gradcheck(lambda x: seen.append(x.dtype) or x.exp(), SMALL.astype(np.float32)).max_error < 1e-7
    assert set(seen) == {np.dtype(np.float64)}


def test_read_only_inputs():
    x = SMALL.copy()
    x.setflags(write=False)
    assert gradcheck(lambda x: x * x, x)


# ---- the table of `cli.py gradcheck` -------------------------------------------------------------

def functions_of(*owners):
    """The Python functions that a module or a class defines itself, by their code."""
    return {inspect.unwrap(f).__code__: f"{owner.__name__}.{name}" for owner in owners
            for name, f in vars(owner).items()
            if inspect.isfunction(f) and f.__module__ == getattr(owner, "__module__", owner.__name__)}


MODELS = [name for name in checks.cases() if name.startswith("whole: Transformer")]


@pytest.fixture(scope="module", params=["numpy", pytest.param("numba", marks=pytest.mark.slow)])
def table(request):
    """(the results of the table, the code of every function that ran for it, the kernels that ran), on both kernels.

    Without whole models, which take long. The kernels stay chosen while tests use it.
    """
    if request.param == "numba":
        pytest.importorskip("numba")
    before, ran, results = kernels.active(), set(), {}
    kernels.use(request.param)
    kernels.compile_all("float64")
    with kernels.timed() as spent:
        for name, check in checks.cases().items():
            if name not in MODELS:
                sys.setprofile(lambda frame, *_: ran.add(frame.f_code))
                try:
                    results[name] = check()
                finally:
                    sys.setprofile(None)
    yield results, ran, set(spent)
    kernels.use(before)


def test_every_function_router_loss_and_kernel_has_a_case(table):
    names = {name.split(": ")[1].split(",")[0] for name in checks.cases()}
    public = {name.split(".")[-1] for name in functions_of(F).values() if "._" not in name}
    assert public <= names and set(routers.ROUTERS) <= names and set(losses.LOSSES) <= names
    layers = [nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.FeedForward, attention.CausalSelfAttention,
              LatentAttention]
    wanted = functions_of(Tensor, F, *layers, losses, *routers.ROUTERS.values())
    wanted |= {backend.__code__: name for name, backend in BACKENDS.items()}
    without_gradient = "__repr__ detach retain_grad mark_changed equivalent_coefficient after_step _step".split()
    assert set(kernels.KERNELS) - table[2] == {"adamw", "sum_of_squares"}  # these have no gradient
    missing = [name for code, name in wanted.items() if code not in table[1]]
    assert [name for name in missing if name.split(".")[-1] not in without_gradient] == []


@pytest.mark.parametrize("name", [name for name in checks.cases() if name not in MODELS])
def test_the_case_passes(name, table):
    assert table[0][name].ok, table[0][name]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_case_of_a_whole_model_passes(name, table):
    result = checks.cases()[name]()
    assert result.ok, result


def test_the_table_finds_a_wrong_gradient_and_a_choice_that_flips(monkeypatch):
    monkeypatch.setattr(F, "sigmoid", lambda x: primitive(x.data, (x, lambda g: 2 * g)))
    (row,) = checks.run_all("router: sigmoid_bias, groups")
    assert not row.ok and row.line().startswith("FAIL  router: sigmoid_bias, groups") and "differences give" in row.note
    monkeypatch.undo()
    monkeypatch.setattr(checks, "X", Tensor(np.zeros((checks.N, checks.D))))  # all experts tie
    (row,) = checks.run_all("router: top_k, K = 1")
    assert not row.ok and "choice" in row.note


def test_the_table_finds_a_gradient_that_is_a_thousandth_too_large(monkeypatch):
    monkeypatch.setitem(checks.OPERATIONS, "negate",
                        (lambda a: primitive(-a.data, (a, lambda g: -1.001 * g)), checks.A))
    (row,) = checks.run_all("operation: negate")
    assert not row.ok


def test_a_wrong_gradient_of_a_module_names_the_parameter():
    wrong = checks._module(lambda: nn.Linear(4, 5, RNG, dtype=float), SMALL,
                           call=lambda module, x: x @ module.weight.detach() + module.bias)
    assert wrong().where.startswith("weight at (")


def test_a_case_that_raises_an_error_is_a_failed_row_and_the_others_follow(monkeypatch):
    monkeypatch.setitem(checks.OPERATIONS, "sum", (lambda a: {}["no such\nkey"], checks.A))
    rows = {row.name: row for row in checks.run_all("operation: s")}
    assert [name for name, row in rows.items() if not row.ok] == ["operation: sum"] and len(rows) > 3
    assert rows["operation: sum"].line().endswith(r"inf  ERROR KeyError: 'no such\nkey'")


def test_a_gradient_that_must_be_zero_fails_where_it_is_not():
    assert checks._zero(lambda x: Tensor(SMALL) * 2, SMALL).ok
    assert not checks._zero(lambda x: x * 1e-200 + SMALL, SMALL).ok
