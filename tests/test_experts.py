"""ExpertBank: all backends against loops (naive.py) and each other, with every load that can occur."""
import numpy as np
import pytest

import naive
from tinymoe import ExpertBank, RouteContext, Routing, Tensor, gradcheck
from tinymoe.moe import routers
from tinymoe.moe.experts import BACKENDS
from tinymoe.moe.routing import from_mask

D, F, E = 3, 4, 4
NAMES = ["w1", "b1", "w2", "b2"]
MANY = 2 * 256 + 3                               # rows for several pieces of one expert in the numba kernels


def chosen(*rows):
    """A mask from the experts of each token: chosen([0, 2], []) has two tokens, the second without an expert."""
    mask = np.zeros((len(rows), E), bool)
    for row, experts in zip(mask, rows):
        row[experts] = True
    return mask


LOADS = {
    "one each": chosen([0], [1], [2], [3]),
    "two each": chosen([0, 1], [1, 2], [2, 3], [3, 0], [0, 2]),
    "empty experts": chosen([1], [3], [3]),
    "first and last empty": chosen([1, 2], [2], [1]),
    "one expert has all": chosen([2], [2], [2], [2], [2]),
    "no token": np.zeros((0, E), bool),
    "one token": chosen([3]),
    "one token, two experts": chosen([0, 3]),
    "tokens without an expert": chosen([], [1], [], [0, 1, 2], []),
    "nothing assigned": chosen([], [], []),
    "top-4 of 4": np.ones((3, E), bool),
    "several pieces": np.arange(MANY * E).reshape(MANY, E) % np.array([1, 3, MANY * E, 2]) == 0,
}


def problem(mask, dtype=np.float64, activation="gelu", backend="loop"):
    """(bank, x, routing, gate, dy) with every number random, biases too."""
    rng = np.random.default_rng(0)
    bank = ExpertBank(E, D, F, activation, backend, dtype=dtype)
    for p in bank.parameters().values():
        p.data = rng.standard_normal(p.shape).astype(dtype)
    x = Tensor(rng.standard_normal((len(mask), D)).astype(dtype), requires_grad=True)
    gates = Tensor(rng.uniform(.1, 1, mask.shape).astype(dtype))
    r = from_mask(mask, gates, gates, gates)
    gate = Tensor(r.gate.data, requires_grad=True)
    r = Routing(r.token, r.offsets, gate, gates, gates)
    return bank, x, r, gate, rng.standard_normal(x.shape).astype(dtype)


def arrays(*tensors):
    return [t.data.astype(float) for t in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype, activation", [
    (np.float64, "gelu"), (np.float64, "silu"), (np.float64, "relu"), (np.float64, "swiglu"),
    (np.float32, "gelu"), (np.float32, "geglu")])
def test_output_and_all_gradients(load, dtype, activation, backend):
    if load == "several pieces" and (backend == "loop" or activation != "gelu"):
        return                                   # the loop cuts no pieces, and pieces do not know the activation
    bank, x, r, gate, dy = problem(LOADS[load], dtype, activation, backend)
    weights = [getattr(bank, name) for name in NAMES]
    inputs = [arrays(x)[0], r.token, r.offsets, *arrays(gate, *weights), activation]
    y = bank(x, r)
    y.backward(dy)
    grads = [np.zeros(t.shape, dtype) if t.grad is None else t.grad for t in (x, gate, *weights)]
    expected = [naive.experts(*inputs), *naive.experts_backward(dy.astype(float), *inputs)]
    tolerance = 1e-10 if dtype == np.float64 else 2e-5
    for name, got, want in zip(["y", "x", "gate", *NAMES], [y.data, *grads], expected):
        assert got.dtype == dtype, name
        largest = max(1, np.abs(want).max(initial=0))
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * largest, err_msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_who_has_no_assignment_gets_exactly_nothing(backend):
    bank, x, r, _, dy = problem(LOADS["tokens without an expert"], backend=backend)
    y = bank(x, r)
    y.backward(dy)
    assert (y.data[[0, 2, 4]] == 0).all() and (x.grad[[0, 2, 4]] == 0).all()
    for name in NAMES:
        gradient = getattr(bank, name).grad
        assert (gradient[3] == 0).all() and (gradient[:3] != 0).any(axis=tuple(range(1, gradient.ndim))).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_expert_with_gate_one_by_hand(backend):
    """relu(x [1, -1] + [0, 1]) . [2, 3] + 5 at x = 2: hidden (2, 0), so 2 * 2 + 5 = 9; at gate 1/2, 4.5."""
    bank = ExpertBank(1, 1, 2, "relu", backend, dtype=np.float64)
    for name, value in zip(NAMES, ([[[1, -1]]], [[0, 1]], [[[2], [3]]], [[5]])):
        getattr(bank, name).data = np.array(value, float)
    one = Tensor(np.ones((2, 1)))
    r = from_mask(np.ones((2, 1), bool), Tensor(np.array([[1.], [.5]])), one, one)
    np.testing.assert_allclose(bank(Tensor(np.full((2, 1), 2.)), r).data, [[9], [4.5]])


@pytest.mark.parametrize("name, k", [
    ("top_k", 1), ("top_k", 2), ("top_k", 4), ("noisy_top_k", 2), ("expert_choice", 2), ("expert_choice", .5)])
def test_backends_agree_behind_every_router(name, k):
    """Output and the gradients of x, of the router and of the experts, through a real Routing."""
    results = {}
    for backend in BACKENDS:
        bank, x, _, _, dy = problem(np.ones((9, E), bool), backend=backend)
        router = routers.make(name, D, E, k, dtype=np.float64)
        y = bank(x, router(x, RouteContext(training=True, rng=np.random.default_rng(1))))
        y.backward(dy)
        results[backend] = [y.data, x.grad, router.weight.grad, *(getattr(bank, w).grad for w in NAMES)]
    for backend, got in results.items():
        for a, b in zip(got, results["loop"]):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12, err_msg=backend)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "loop"])
@pytest.mark.parametrize("load", LOADS)
def test_an_activation_without_a_kernel(load, backend):
    """The experts of GPT-OSS: output and all gradients as by the loop."""
    found = []
    for name in ("loop", backend):
        bank, x, r, gate, dy = problem(LOADS[load], activation="clamped_swiglu", backend=name)
        y = bank(x, r)
        y.backward(dy)
        found.append([y.data, *(p.grad if p.grad is not None else np.zeros(p.shape)
                                for p in (x, gate, *bank.parameters().values()))])
    for one, other in zip(*found):
        np.testing.assert_allclose(one, other, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu", "geglu", "swiglu", "clamped_swiglu"])
def test_gradcheck(activation, backend):
    bank, x, r, gate, _ = problem(LOADS["tokens without an expert"], activation=activation, backend=backend)
    result = gradcheck(lambda *_: bank(x, r), x, gate, *(getattr(bank, name) for name in NAMES))
    assert result, result


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_and_frozen_inputs(backend):
    bank, x, r, gate, dy = problem(LOADS["two each"], backend=backend)
    y = bank(x, r)
    y.backward(dy)
    once = gate.grad.copy()
    y.backward(dy)
    np.testing.assert_allclose(gate.grad, 2 * once, rtol=1e-12)
    bank.w1.requires_grad, bank.w1.grad = False, None
    bank(x, r).backward(dy)
    assert bank.w1.grad is None and bank.w2.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_strided_input_is_read_right(backend):
    bank, x, r, _, dy = problem(LOADS["two each"], backend=backend)
    strided = Tensor(np.asfortranarray(x.data))
    np.testing.assert_allclose(bank(strided, r).data, bank(x, r).data, rtol=1e-12)
    bank(x, r).backward(np.asfortranarray(dy))
    by_columns, x.grad = x.grad, None
    bank(x, r).backward(dy)
    np.testing.assert_allclose(x.grad, by_columns, rtol=1e-12)


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="'torch'.*loop, naive, numpy, numba"):
        ExpertBank(2, 3, 4, backend="torch")
    bank, x, *_ = problem(LOADS["one each"])
    r = problem(LOADS["two each"])[2]
    with pytest.raises(ValueError, match="5 tokens.*4 tokens"):
        bank(x, r)
    with pytest.raises(ValueError, match="4 experts.*2 experts"):
        ExpertBank(2, D, F, backend="naive", dtype=np.float64)(Tensor(np.zeros((5, D))), r)


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_an_x_of_another_width_or_dtype_is_refused(backend):
    """NumPy would broadcast or convert them."""
    bank, x, r, *_ = problem(LOADS["one each"], backend=backend)
    for width in (D - 1, D + 1):
        with pytest.raises(ValueError, match=f"width {D} and float64 take x .N, {D}. .* not .4, {width}. float64"):
            bank(Tensor(np.zeros((4, width))), r)
    for other in (x.data[None], x.data.astype(np.float32)):
        with pytest.raises(ValueError, match="take x"):
            bank(Tensor(other), r)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["gelu", "clamped_swiglu"])
def test_without_assignments_all_gradients_are_zero(activation, backend):
    bank, x, r, gate, dy = problem(LOADS["nothing assigned"], activation=activation, backend=backend)
    bank(x, r).backward(dy)
    assert not any(p.grad.any() for p in (x, *bank.parameters().values())) and gate.grad.shape == (0,)
    if backend != "naive":  # which multiplies by 0
        assert not bank(Tensor(np.full(x.shape, np.inf)), r).data.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_refused(backend):
    bank, x, r, *_ = problem(LOADS["one each"], np.float16, backend=backend)
    with pytest.raises(TypeError, match="^ExpertBank got float16, but all must be float32, or all float64"):
        bank(x, r)


def test_the_benchmark_compares_with_naive_or_else_with_the_last(monkeypatch):
    """`loop` gives twice the others here: it is 1 from naive, and they are half of it away."""
    monkeypatch.setitem(BACKENDS, "loop", lambda *arguments: BACKENDS["numpy"](*arguments) * 2)
    for backends, far in (("loop", "naive", "numpy"), {"loop": 1}), (("numpy", "loop"), {"numpy": 0.5}):
        for row in ExpertBank.benchmark(8, 4, 2, 1, backends=backends, repeats=1):
            assert row["difference"] == pytest.approx(far.get(row["backend"], 0), abs=1e-5)


def test_an_unknown_activation_is_refused_at_once():
    with pytest.raises(ValueError, match="'tanh'.*gelu, silu, relu"):
        ExpertBank(2, 3, 4, activation="tanh")


def test_same_seed_same_weights():
    a, b, c = (ExpertBank(3, 4, 5, seed=s).parameters() for s in (0, 0, 1))
    assert list(a) == NAMES and [a[n].shape for n in NAMES] == [(3, 4, 5), (3, 5), (3, 5, 4), (3, 4)]
    assert all((a[n].data == b[n].data).all() for n in NAMES) and (a["w1"].data != c["w1"].data).all()
    assert a["w1"].data.std() == pytest.approx(.02, rel=.3) and not a["b1"].data.any()
