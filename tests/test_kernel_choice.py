"""Which kernels run: the default, the choice, what a wrong choice says, and what the choice changes in the process."""
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tinymoe import ModelConfig, Transformer, kernels, optim
from tinymoe.kernels import reference

ROOT = Path(__file__).parents[1]
SMALL = ModelConfig(vocab_size=11, n_layers=2, d_model=8, n_heads=2, d_ff=16, seq_len=4, moe_layers=(1,), n_experts=4)


def python(code, **environment):
    """What a fresh process prints, which runs the code with TINYMOE_KERNELS unset unless it is given."""
    kept = {name: value for name, value in os.environ.items()
            if name != "TINYMOE_KERNELS" and not name.endswith("_NUM_THREADS") and name != "VECLIB_MAXIMUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=kept | environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def chosen():
    before = kernels.active()
    yield
    kernels.use(before)


@pytest.mark.slow
def test_the_default_is_numba_where_it_is_installed():
    expected = "numba" if find_spec("numba") else "numpy"
    assert python("from tinymoe import kernels; print(kernels.active())") == expected


def test_the_default_is_numpy_where_numba_is_missing():
    code = ("import numpy as np; from tinymoe import kernels; kernels.find_spec = lambda name: None; "
            "print(kernels.active(), kernels.linear(np.ones((1, 2)), np.ones((2, 1)), None))")
    assert python(code) == "numpy [[2.]]"


def test_the_environment_chooses_and_child_processes_follow(chosen):
    assert python("from tinymoe import kernels; print(kernels.active())", TINYMOE_KERNELS="numpy") == "numpy"
    kernels.use("numpy")
    assert os.environ["TINYMOE_KERNELS"] == "numpy" and kernels.linear is reference.linear


def test_a_wrong_name_is_one_line_that_names_the_choices():
    with pytest.raises(kernels.KernelsError, match="^unknown kernels 'torch': .*numpy or numba$"):
        kernels.use("torch")
    done = subprocess.run([sys.executable, "cli.py", "bench", "--quick"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"TINYMOE_KERNELS": "fast"})
    assert done.returncode == 1
    assert done.stderr == "Error: unknown kernels 'fast': set TINYMOE_KERNELS to numpy or numba\n"


def test_numba_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(kernels.KernelsError, match="^numba is not installed: run `pip install numba`, or .*numpy$"):
        kernels.use("numba")


def test_what_is_no_kernel_is_an_attribute_error():
    with pytest.raises(AttributeError, match="sort"):
        kernels.sort()


BLAS = "from tinymoe.kernels import blas; print(blas.get_threads())"


@pytest.mark.slow
def test_the_import_changes_nothing_and_the_first_kernel_holds_blas_at_one_thread():
    before = python("import scipy.linalg, threadpoolctl; "
                    "print(max(pool['num_threads'] for pool in threadpoolctl.threadpool_info()))")
    assert python(f"import sys, tinymoe; assert 'numba' not in sys.modules; {BLAS}") == before
    for name in ("numpy", "numba")[:2 if find_spec("numba") else 1]:
        use = f"from tinymoe import kernels; kernels.use('{name}'); {BLAS}"
        assert python(use) == "1" and python(use, TINYMOE_KEEP_THREADS="1") == before


@pytest.mark.parametrize("n", [0, -1, 10_000])
def test_a_number_of_threads_that_cannot_be_is_an_error(n, both_kernels):
    with pytest.raises(ValueError):
        kernels.set_threads(n)


def test_timing_counts_calls_seconds_and_work(both_kernels):
    x, w = np.ones((3, 2)), np.ones((2, 2))
    with kernels.timed(work=lambda name, *arguments: len(arguments)) as spent:
        kernels.linear(x, w, None)
        kernels.linear(x, w, None)
        kernels.sum_of_squares(x)
    kernels.linear(x, w, None)
    counts = {name: (calls, work) for name, (calls, _, work) in spent.items()}
    assert counts == {"linear": (2, 6), "sum_of_squares": (1, 1)}
    assert all(seconds > 0 for _, seconds, _ in spent.values())


def test_a_kernel_that_was_taken_while_timing_stays_the_one_that_it_was(chosen):
    """Would have caught: the backward pass of attention by the kernels that were chosen after its forward pass."""
    pytest.importorskip("numba")
    kernels.use("numpy")
    with kernels.timed() as spent:
        backward = kernels.causal_attention_backward
        assert backward.args == ("causal_attention_backward", reference.causal_attention_backward)
        x = np.ones((1, 2, 1, 2))
        kernels.use("numba")
        _, p = reference.causal_attention(x, x, x)
        backward(x, x, x, x, p)  # the compiled one refuses p, which is not packed
    assert spent["causal_attention_backward"][0] == 1


def test_both_kinds_train_the_same_model_to_rounding(chosen):
    pytest.importorskip("numba")
    losses = {}
    for name in ("numpy", "numba"):
        kernels.use(name)
        model, rng = Transformer(SMALL, seed=0), np.random.default_rng(0)
        optimizer = optim.AdamW(model.parameters(), lr=1e-2)
        losses[name] = []
        for _ in range(5):
            ids = rng.integers(0, SMALL.vocab_size, (2, SMALL.seq_len + 1))
            optimizer.zero_grad()
            terms = model.loss(ids[:, :-1], ids[:, 1:], training=True)
            terms.total.backward()
            optimizer.step()
            losses[name].append(float(terms.total.data))
    np.testing.assert_allclose(losses["numpy"], losses["numba"], rtol=1e-4)
    assert losses["numpy"][0] == pytest.approx(losses["numba"][0], rel=1e-6)
