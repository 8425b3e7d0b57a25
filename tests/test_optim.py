"""AdamW against plain NumPy, clipping against its definition, and the learning rate at its corners."""
import numpy as np
import pytest

import naive
from tinymoe import Tensor
from tinymoe.training import optim

pytestmark = pytest.mark.filterwarnings("error")


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def leaf(values, dtype=np.float64):
    return Tensor(np.array(values, dtype), requires_grad=True)


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (np.float32, 2e-6)])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0}, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3}],
                         ids=["defaults", "no decay", "other"])
def test_adamw(options, dtype, tolerance):
    shapes = {"w": (40, 1000), "b": (3,), "s": ()}  # both kernels, and a number
    parameters = {name: leaf(normal(*shape), dtype) for name, shape in shapes.items()}
    optimiser = optim.AdamW(parameters, no_decay=["b"], **options)
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1} | options
    expected = {name: (p.data.astype(np.float64), 0.0, 0.0) for name, p in parameters.items()}
    for step in range(1, 6):
        optimiser.lr = settings["lr"] / step
        for name, p in parameters.items():
            p.grad = normal(*p.shape, seed=step).astype(dtype)
            decay = 0.0 if name == "b" else settings["weight_decay"]
            expected[name] = naive.adamw(expected[name][0], p.grad.astype(np.float64), *expected[name][1:],
                                         optimiser.lr,
                                         *settings["betas"], settings["eps"], decay, step)
        optimiser.step()
    for name, p in parameters.items():
        assert p.dtype == dtype and p.shape == shapes[name]
        np.testing.assert_allclose(p.data, expected[name][0], rtol=tolerance, atol=tolerance)


def test_the_first_step_is_the_learning_rate_whatever_the_gradient():
    """m / sqrt(v) is the sign of g after one step, so p moves by lr; the decay takes lr * 0.1 * p more."""
    p = leaf([1.0, 1.0, 1.0])
    p.grad = np.array([1e-3, -1e3, 0.0])
    optim.AdamW({"p": p}, lr=0.01, eps=1e-30).step()
    np.testing.assert_allclose(p.data, [1 - 0.01 - 0.001, 1 + 0.01 - 0.001, 1 - 0.001], rtol=1e-12)


def test_parameters_without_a_gradient_wait_with_their_own_step_count():
    p, q = leaf([1.0]), leaf([1.0])
    optimiser = optim.AdamW({"p": p, "q": q}, lr=0.1, weight_decay=0.5)
    p.grad = np.array([2.0])
    optimiser.step()
    assert q.item() == 1 and p.item() == pytest.approx(1 - 0.1 - 0.05)
    p.grad, q.grad = None, np.array([2.0])
    optimiser.step()
    assert q.item() == pytest.approx(1 - 0.1 - 0.05)
    optimiser.zero_grad()
    assert p.grad is None and q.grad is None


def test_transposed_and_read_only_parameters_are_updated():
    frozen = normal(4, 3)
    frozen.setflags(write=False)
    p, q = Tensor(normal(3, 4).T, requires_grad=True), Tensor(frozen, requires_grad=True)
    before = p.data.copy()
    p.grad, q.grad = normal(4, 3, seed=1), normal(4, 3, seed=1)
    optim.AdamW({"p": p, "q": q}, lr=0.1, weight_decay=0.0).step()
    np.testing.assert_allclose(p.data, before - 0.1 * np.sign(p.grad), rtol=1e-5)
    np.testing.assert_allclose(q.data, frozen - 0.1 * np.sign(q.grad), rtol=1e-5)


@pytest.mark.parametrize("options, message", [
    ({"lr": -1}, "^lr -1 must be a finite number of at least 0$"), ({"lr": np.nan}, "^lr nan must be"),
    ({"lr": "0.1"}, "^lr '0.1' must be"), ({"eps": 0}, "^eps 0 must be a finite number above 0$"),
    ({"weight_decay": -0.1}, "^weight_decay -0.1 must be"), ({"betas": (0.9,)}, r"^betas \(0.9,\) must be two numbers"),
    ({"betas": 0.9}, "^betas 0.9 must be two numbers"), ({"betas": (0.9, 1.0)}, "^betas .* must be two numbers"),
    ({"no_decay": ("bias",)}, "^no_decay 'bias' is not the name of a parameter: choose from w, q$"),
    ({"no_decay": "wq"}, "^no_decay 'wq' is not the name")])
def test_settings_that_adamw_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        optim.AdamW({"w": leaf([1.0]), "q": leaf([1.0])}, **options)


def test_parameters_are_a_dict_of_tensors_each_once():
    p = leaf([1.0])
    for wrong in ([p], {"p": p}.values(), object()):
        for call in (optim.AdamW, lambda wrong: optim.clip_gradients(wrong, 1.0)):
            with pytest.raises(TypeError, match=r"a dict of name -> Tensor, not .*: give model\.parameters\(\)"):
                call(wrong)
    with pytest.raises(TypeError, match="parameter 'p' must be a Tensor, not list"):
        optim.AdamW({"p": [1.0]})
    with pytest.raises(ValueError, match="got no parameters"):
        optim.AdamW({})
    with pytest.raises(ValueError, match="'q' is the same Tensor as 'p'"):
        optim.AdamW({"p": p, "q": p})


def test_no_decay_may_be_one_name():
    p = leaf([1.0])
    p.grad = np.array([0.0])
    optim.AdamW({"bias": p}, lr=1.0, no_decay="bias").step()
    assert p.item() == 1


# -- clipping --

@pytest.mark.parametrize("max_norm", [-1, np.nan, None])
def test_clipping_refuses_a_norm_below_zero(max_norm):
    """Would have caught: gradients with the other sign."""
    p = leaf([0.0])
    p.grad = np.array([2.0])
    with pytest.raises(ValueError, match=f"max_norm {max_norm} must be a number of at least 0"):
        optim.clip_gradients({"p": p}, max_norm)
    assert p.grad == 2 and optim.clip_gradients({"p": p}, np.inf) == 2 and p.grad == 2

@pytest.mark.parametrize("max_norm, scale", [(13, 1), (13.1, 1), (6.5, 0.5), (1.0, 1 / 13)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_clip_gradients(max_norm, scale, dtype):
    """The common norm of (3, 4) and 12 is 13."""
    a, b, c = leaf([0, 0], dtype), leaf(0, dtype), leaf([0], dtype)
    a.grad, b.grad = np.array([3, 4], dtype), np.array(12, dtype)
    assert optim.clip_gradients({"a": a, "b": b, "c": c}, max_norm) == 13
    np.testing.assert_allclose([*a.grad, b.grad], scale * np.array([3, 4, 12]), rtol=1e-6)
    assert a.grad.dtype == b.grad.dtype == dtype and c.grad is None


def test_clip_gradients_of_none_of_zero_and_of_many():
    p = leaf(np.zeros((300, 300)), np.float32)
    assert optim.clip_gradients({"p": p}, 1.0) == 0
    p.grad = np.zeros((300, 300), np.float32)
    assert optim.clip_gradients({"p": p}, 1.0) == 0 and not p.grad.any()
    p.grad = np.full((300, 300), 1e25, np.float32)  # the square is beyond float32
    assert optim.clip_gradients({"p": p}, 1.0) == pytest.approx(3e27)
    assert np.linalg.norm(p.grad.astype(np.float64)) == pytest.approx(1)


def test_clipping_reports_a_norm_that_is_not_finite():
    p = leaf([0.0, 0.0])
    p.grad = np.array([np.nan, 1.0])
    assert np.isnan(optim.clip_gradients({"p": p}, 1.0))


def test_clipping_leaves_the_gradients_of_other_leaves_alone():
    p, q = leaf([0.0, 0.0]), leaf([0.0, 0.0])
    ((p + q) * 10).sum().backward()
    optim.clip_gradients({"p": p}, 1.0)
    assert q.grad.tolist() == [10, 10]


# -- schedule --

@pytest.mark.parametrize("step, steps, rate", [
    (1, 100, 0.2), (4, 100, 0.8), (5, 100, 1.0),           # warm-up over 5 of 100 steps
    # one step up, then a cosine over 6 steps: half and a third of the way
    (100, 100, 0.1), (4, 7, 0.55), (3, 7, 0.775),
    (1, 1, 1.0), (1, 2, 1.0), (2, 2, 0.1), (1, 20, 1.0)])
def test_learning_rate(step, steps, rate):
    assert optim.learning_rate(step, steps, 2.0) == pytest.approx(2.0 * rate)


def test_learning_rate_options_and_shape():
    assert optim.learning_rate(50, 100, 1.0, warmup=1.0) == pytest.approx(0.5)
    assert optim.learning_rate(1, 100, 1.0, warmup=0.0) == pytest.approx(1.0)
    assert optim.learning_rate(100, 100, 1.0, floor=0.0) == pytest.approx(0.0)
    assert optim.learning_rate(101, 100, 1.0) == pytest.approx(0.1)  # past the end it stays at the floor
    rates = np.array([optim.learning_rate(s, 200, 1.0) for s in range(1, 201)])
    assert (np.diff(rates[:10]) > 0).all() and (np.diff(rates[9:]) < 0).all()


def test_no_decay_names():
    shapes = {"token_embedding.weight": (5, 2), "blocks.0.norm1.weight": (2,),
              "blocks.0.attention.query.weight": (2, 2), "head.bias": (5,),
              "blocks.1.moe.router.projection": (2, 3), "blocks.1.moe.bank.w1": (3, 2, 4),
              "blocks.1.moe.bank.b1": (3, 4)}
    kept = optim.no_decay_names({name: leaf(np.zeros(shape)) for name, shape in shapes.items()})
    assert kept == {"token_embedding.weight", "blocks.0.norm1.weight", "head.bias", "blocks.1.moe.bank.b1"}
