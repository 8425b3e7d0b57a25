"""What `python cli.py bench` measures: the ladder of expert backends, and where a training step spends its time."""

import contextlib
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from . import kernels
from .experts import BACKENDS, ExpertBank
from .files import write_rows
from .model import ModelConfig, Transformer
from .optim import AdamW, clip_gradients
from .train import machine

SIZES = (  # n_tokens, d_model, n_experts, top_k; d_ff is 4 d_model
    (512, 64, 8, 1), (1024, 128, 8, 1), (2048, 128, 8, 2), (2048, 64, 8, 2), (2048, 64, 32, 2), (2048, 64, 64, 4))


def ladder(sizes=SIZES, repeats=5):
    """Yield the rows of ExpertBank.benchmark for each size; the Python loop takes part at the smallest alone."""
    for i, size in enumerate(sizes):
        backends = tuple(b for b in BACKENDS if b != "loop" or i == 0)
        yield from ExpertBank.benchmark(*size, backends=backends, repeats=repeats)


# -- where a step spends its time ---------------------------------------------------------------

def _experts_flops(x, token, offsets, gate, w1, *rest):
    return 4 * len(token) * w1.shape[1] * w1.shape[2]


def _attention_flops(q, k, v, *rest):
    b, t, h, d = q.shape
    return b * h * t * t * (d + v.shape[-1])  # the half that is not masked


# Floating-point operations of the matrix products in a call; 0 for kernels without any.
FLOPS = {
    "linear": lambda x, w, b: 2 * x.shape[0] * w.size,
    "linear_backward": lambda dy, x, w: 4 * x.shape[0] * w.size,
    "causal_attention": _attention_flops,
    "causal_attention_backward": lambda dout, *qkv: 2 * _attention_flops(*qkv),
    "experts_forward": _experts_flops,
    "experts_backward": lambda dy, *rest: 2 * _experts_flops(*rest),
} | dict.fromkeys(("activation", "activation_backward", "layer_norm", "layer_norm_backward", "add_rows", "adamw",
                   "sum_of_squares"), lambda *args: 0)


@contextlib.contextmanager
def timed_kernels():
    """Inside, every kernel call adds to the dict that is yielded: name -> calls, seconds, flops (3,)."""
    spent, originals = defaultdict(lambda: np.zeros(3)), {name: getattr(kernels, name) for name in FLOPS}

    def timing(name, kernel):
        def call(*args):
            start = time.perf_counter()
            result = kernel(*args)
            spent[name] += 1, time.perf_counter() - start, FLOPS[name](*args)
            return result
        return call

    try:
        for name, kernel in originals.items():
            setattr(kernels, name, timing(name, kernel))
        yield spent
    finally:
        for name, kernel in originals.items():
            setattr(kernels, name, kernel)


def training_step(config, batch_size=8, seed=0):
    """A function that takes one training step of a fresh model on random bytes."""
    model, rng = Transformer(config, seed), np.random.default_rng(seed)
    parameters = model.parameters()
    optimizer = AdamW(parameters)

    def step():
        ids = rng.integers(0, config.vocab_size, (batch_size, config.seq_len + 1))
        loss = model.loss(ids[:, :-1], ids[:, 1:], training=True, rng=rng).total
        optimizer.zero_grad()
        loss.backward(retain_graph=False)
        clip_gradients(parameters, 1.0)
        optimizer.step()
    return step


def step_profile(config=ModelConfig(), batch_size=8, repeats=20):
    """Rows {"operation", "calls", "ms", "share", "gflops"} of one training step, the slowest first.

    ms and calls are means over `repeats` steps. "NumPy and Python" is all that is no kernel; the whole step is last.
    """
    step = training_step(config, batch_size)
    for _ in range(3):
        step()
    with timed_kernels() as spent:
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        total = time.perf_counter() - start
    spent["NumPy and Python"] = repeats, total - sum(seconds for _, seconds, _ in spent.values()), 0
    spent = dict(sorted(spent.items(), key=lambda item: -item[1][1]))
    spent["whole step"] = repeats, total, sum(flops for _, _, flops in spent.values())
    return [{"operation": name, "calls": calls / repeats, "ms": 1e3 * seconds / repeats, "share": seconds / total,
             "gflops": flops / seconds / 1e9} for name, (calls, seconds, flops) in spent.items()]


def sgemm_gflops(n=1024, repeats=10):
    """GFLOP/s of one float32 matrix product on one thread: what a core can do at best."""
    a = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * n ** 3 / float(np.median(times)) / 1e9


# -- writing it up ------------------------------------------------------------------------------

def draw_ladder(rows, path):
    """A bar for each size and backend: forward + backward in milliseconds, logarithmic."""
    import matplotlib
    from matplotlib.figure import Figure

    from .plots import COLOURS, DOUBLE, STYLE, save

    def size_of(row):
        return row["n_tokens"], row["d_model"], row["n_experts"], row["top_k"]

    rows = [row for row in rows if row["pass"] == "forward + backward"]
    sizes = list(dict.fromkeys(map(size_of, rows)))
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(DOUBLE, 2.8), layout="constrained")
        axes = fig.subplots()
        for i, (backend, hatch) in enumerate(zip(BACKENDS, ("..", "//", "\\\\", ""))):
            mine = {sizes.index(size_of(row)): row["ms"] for row in rows if row["backend"] == backend}
            bars = axes.bar([place + 0.2 * (i - 1.5) for place in mine], mine.values(), 0.18, label=backend,
                            color=COLOURS[i], hatch=hatch, edgecolor="white", linewidth=0.5)
            axes.bar_label(bars, fmt="{:.3g}", fontsize=6, padding=1)
        axes.set(yscale="log", ylabel="forward + backward (ms)", xticks=range(len(sizes)),
                 xticklabels=[f"N {n}, D {d}\nE {e}, K {k}" for n, d, e, k in sizes])
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.12)
        fig.legend(loc="outside upper center", ncols=4)
        save(fig, path)


def write(out, name, rows):
    """Rows, each with the machine it was measured on, to out/NAME.jsonl; returns the path."""
    path, where = Path(out) / f"{name}.jsonl", machine()
    write_rows(path, [row | where for row in rows])
    return path
