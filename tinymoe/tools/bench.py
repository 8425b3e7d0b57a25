"""What `python cli.py bench` measures: expert backends against each other, a training step three ways and operation by
operation, and how the time grows with experts, tokens and imbalance.

What is compared is timed in turn, so that a noisy moment of the machine hits all of it, and the median counts. The
profile of a step is a mean over steps.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from operator import itemgetter
from pathlib import Path

import numpy as np
import threadpoolctl

from .. import kernels
from ..autograd.tensor import Tensor
from ..files import write_rows
from ..model.config import ModelConfig
from ..model.transformer import Transformer
from ..moe.experts import BACKENDS, ExpertBank
from ..moe.routing import from_mask, largest
from ..study.palette import COLOURS
from ..training.identity import machine
from ..training.optim import AdamW, clip_gradients

DEFAULT = ModelConfig()
LADDER = tuple(dict(n_tokens=n, d_model=d, n_experts=e, top_k=k) for n, d, e, k in (  # d_ff is 4 d_model
    (512, 64, 8, 1), (1024, 128, 8, 1), (2048, 128, 8, 2), (2048, 64, 8, 2), (2048, 64, 32, 2), (2048, 64, 64, 4)))
PYTORCH = "PyTorch"  # the name of its rows
IN_PYTORCH = """n_layers d_model n_heads d_ff seq_len vocab_size moe_layers n_experts top_k aux_coef
    expert_backend""".split()  # what bench_pytorch.py reads, and the choice of tinymoe's backend


def busy() -> str:
    """A warning where more is running than the machine has cores; "" where all is well."""
    load, cores = os.getloadavg()[0], os.cpu_count()
    return f"load {load:.1f} on {cores} cores: other programs are running, so these times mean nothing" \
        if load > cores else ""


def describe(row) -> str:
    """The machine of a row in words: threads, libraries, processor."""
    info = row["thread_info"]
    blas = ", ".join("{name} {version} at {threads} thread(s)".format_map(pool) for pool in info["blas"])
    numba = f"numba {info['numba']} ({info['threading_layer']})" if info["numba"] else "NumPy kernels"
    return f"{row['threads']} thread(s), {numba}, {blas}; {row['processor']}, {row['cores']} cores"


def ladder(sizes=LADDER, repeats=5):
    """Yield the rows of ExpertBank.benchmark for each size: the Python loop for the first alone, numba where chosen.

    Where PyTorch is installed, it has a row for each size. "relative" is to the naive backend.
    """
    backends = [name for name in BACKENDS if name != "numba" or kernels.active() == "numba"]
    for size in sizes:
        rows = ExpertBank.benchmark(**size, backends=backends, repeats=repeats)
        rows += [rows[-1] | {"backend": PYTORCH, "ms": ms, "difference": None, "first_ms": None, "min_ms": None}
                 for ms in pytorch(repeats, layers=[size])]
        naive = {row["pass"]: row["ms"] for row in rows if row["backend"] == "naive"}
        yield from (row | {"relative": row["ms"] / naive[row["pass"]]} for row in rows)
        backends = [name for name in backends if name != "loop"]


def pytorch(repeats, layers=(), steps=(), batch_size=8) -> list[float]:
    """Milliseconds of these layers and of a training step of these ModelConfigs in PyTorch; [] if it is not installed.

    It runs in a process of its own, on as many threads as the kernels use; a failure there is printed, and gives [].
    """
    if importlib.util.find_spec("torch") is None:
        return []
    asked = {"threads": kernels.get_threads(), "repeats": repeats, "layers": list(layers),
             "steps": [config.to_dict() for config in steps], "batch_size": batch_size}
    program = Path(__file__).with_name("bench_pytorch.py")
    done = subprocess.run([sys.executable, program], input=json.dumps(asked), stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else []


def beyond_pytorch(config) -> list[str]:
    """The fields that bench_pytorch.py does not read and that differ from the defaults: its model is then another."""
    return [name for name, value in vars(config).items()
            if name not in IN_PYTORCH and value != getattr(DEFAULT, name)]


def training_step(config, batch_size=8):
    """A function that takes one training step of a fresh model on random bytes."""
    model, rng = Transformer(config), np.random.default_rng(0)
    parameters = model.parameters()
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError(f"freeze {list(config.freeze)} leaves nothing to train: freeze less")
    optimizer = AdamW(parameters)

    def step():
        ids = rng.integers(0, config.vocab_size, (batch_size, config.seq_len + 1))
        output = model.forward(ids[:, :-1], training=True, rng=rng)
        loss = model.loss_terms(output, ids[:, 1:]).total
        optimizer.zero_grad()
        loss.backward(retain_graph=False)
        clip_gradients(parameters, 1.0)
        optimizer.step()
        model.after_step(output.routings)
    return step


WAYS = {"naive experts": ("numpy", "naive"), "NumPy kernels": ("numpy", "numpy"), "numba kernels": ("numba", "numba")}


def three_ways(config=DEFAULT, batch_size=8, repeats=7):
    """Rows {"step", "kernels", "expert_backend", "ms", "relative"} of one training step, relative to naive experts.

    Naive experts run each expert on every token; their other kernels are NumPy's. The numba kernels take part where
    they are chosen, and PyTorch where it is installed and has this model. The choice of kernels is the same afterwards.
    """
    before = kernels.active()
    ways = {step: way for step, way in WAYS.items() if way[0] in ("numpy", before)}
    steps = {step: training_step(dataclasses.replace(config, expert_backend=backend), batch_size)
             for step, (_, backend) in ways.items()}
    try:
        ms = _medians(steps, repeats, prepare=lambda step: kernels.use(ways[step][0]))
    finally:
        kernels.use(before)
    if not beyond_pytorch(config) and (found := pytorch(repeats, steps=[config], batch_size=batch_size)):
        ms[PYTORCH], ways[PYTORCH] = found[0], (PYTORCH, PYTORCH)
    return [{"step": step, "kernels": name, "expert_backend": backend, "ms": ms[step],
             "relative": ms[step] / ms["naive experts"]} for step, (name, backend) in ways.items()]


def _experts_flops(x, token, offsets, gate, weights, *rest):
    w1, _, w2, _ = weights
    return 2 * len(token) * (w1[0].size + w2[0].size)


def _attention_flops(q, k, v, *rest):
    b, t, h, d = q.shape
    return b * h * t * t * (d + v.shape[-1])  # the half that is not masked


FLOPS = {  # floating-point operations of the matrix products in a call; other kernels have none
    "linear": lambda x, w, b: 2 * x.shape[0] * w.size,
    "linear_backward": lambda dy, x, w: 4 * x.shape[0] * w.size,
    "causal_attention": _attention_flops,
    "causal_attention_backward": lambda dy, *rest: 2 * _attention_flops(*rest),
    "experts_forward": _experts_flops,
    "experts_backward": lambda dy, *rest: 2 * _experts_flops(*rest),
}


def step_profile(config=DEFAULT, batch_size=8, repeats=20):
    """Rows {"operation", "calls", "ms", "share", "gflops"} of one training step, the slowest first.

    ms and calls are means over `repeats` steps. "NumPy and Python" is all that is not a kernel. The whole step is last.
    """
    step = training_step(config, batch_size)
    for _ in range(3):
        step()
    with kernels.timed(work=lambda name, *arguments, **_: FLOPS[name](*arguments) if name in FLOPS else 0) as spent:
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        total = time.perf_counter() - start
    spent["NumPy and Python"] = repeats, total - sum(seconds for _, seconds, _ in spent.values()), 0
    spent = dict(sorted(spent.items(), key=lambda item: -item[1][1]))
    spent["whole step"] = repeats, total, sum(work for _, _, work in spent.values())
    return [{"operation": name, "calls": calls / repeats, "ms": 1e3 * seconds / repeats, "share": seconds / total,
             "gflops": work / seconds / 1e9} for name, (calls, seconds, work) in spent.items()]


def sgemm_gflops():
    """GFLOP/s of a product of two float32 matrices (1024, 1024) in NumPy, on as many threads as the kernels use."""
    a = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    with threadpoolctl.threadpool_limits(kernels.get_threads(), "blas"):
        return 2 * len(a) ** 3 / _medians({"": lambda: a @ a}, repeats=10)[""] / 1e6


def _medians(functions, repeats, prepare=lambda name: None):
    """dict name -> milliseconds: the median over rounds that call each function. prepare(name) is not timed."""
    times = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            prepare(name)
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(ms[1:])) for name, ms in times.items()}  # the first round warms up


def skewed_layer(share, n_tokens=2048, d_model=128):
    """A function that runs one layer of 8 experts forward and backward, in which `share` of the tokens choose expert 0.

    A token has two experts, so the load is balanced where the share is 0.25. The other choices are uniform.
    """
    rng, n_experts = np.random.default_rng(0), 8
    scores = rng.random((n_tokens, n_experts), dtype=np.float32)
    scores[:, 0] = rng.permutation(n_tokens) < round(share * n_tokens)  # 1 beats every score, 0 none
    gates = Tensor(scores, requires_grad=True)
    routing = from_mask(largest(scores, 2), gates, gates, gates)
    bank = ExpertBank(n_experts, d_model, 4 * d_model, seed=0)
    x = Tensor(rng.standard_normal((n_tokens, d_model)).astype(np.float32), requires_grad=True)

    def both():
        for leaf in (x, gates, *bank.parameters().values()):
            leaf.grad = None
        bank(x, routing).backward(x.data)
    return both


def scaling(experts=(8, 16, 32, 64), tokens=(512, 1024, 2048, 4096, 8192), shares=(0.25, 0.5, 0.8, 1.0), repeats=7):
    """Rows {"against", "value", "ms", "relative"} of three scans; relative is to the first value of each.

    experts: a training step with E experts; the active parameters stay the same, but for the router. tokens: a training
    step on batches of so many tokens, multiples of seq_len. shares: one expert layer in which expert 0 has that share
    of the tokens. Functions that take turns push each other's data out of the caches.
    """
    scans = {"experts": (experts, lambda e: training_step(ModelConfig(n_experts=e))),
             "tokens": (tokens, lambda n: training_step(DEFAULT, n // DEFAULT.seq_len)),
             "imbalance": (shares, skewed_layer)}
    rows = []
    for against, (values, make) in scans.items():
        ms = _medians({value: make(value) for value in values}, repeats)
        rows += [{"against": against, "value": value, "ms": ms[value], "relative": ms[value] / ms[values[0]]}
                 for value in values]
    return rows


@contextlib.contextmanager
def _figure(path, height, n_panels=1):
    """(figure, panels) in the style of the study's figures, saved at the end. matplotlib is first imported here."""
    from ..study.figures import default_style, panel_grid, save
    with default_style():
        fig, (panels,) = panel_grid(1, n_panels, height)
        yield fig, panels
        save(fig, path)


def draw_ladder(rows, path):
    """A bar for each size and backend: forward + backward in milliseconds, logarithmic."""
    rows = [row for row in rows if row["pass"] == "forward + backward"]
    size_of = itemgetter("n_tokens", "d_model", "n_experts", "top_k")
    sizes = list(dict.fromkeys(map(size_of, rows)))

    with _figure(path, 2.8) as (fig, (axes,)):
        for i, (backend, hatch) in enumerate(zip((*BACKENDS, PYTORCH), ("..", "//", "\\\\", "", "xx"))):
            mine = {sizes.index(size_of(row)): row["ms"] for row in rows if row["backend"] == backend}
            if not mine:
                continue
            bars = axes.bar([place + 0.17 * (i - 2) for place in mine], mine.values(), 0.15, label=backend,
                            color=COLOURS[i], hatch=hatch, edgecolor="white", linewidth=0.5)
            axes.bar_label(bars, fmt="{:.3g}", fontsize=6, padding=1)
        axes.set(yscale="log", ylabel="forward + backward (ms)", xticks=range(len(sizes)),
                 xticklabels=[f"N {n}, D {d}\nE {e}, K {k}" for n, d, e, k in sizes])
        axes.yaxis.set_major_formatter("{x:g}")  # the default writes formulas, which are not parsed here
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.12)
        fig.legend(loc="outside upper center", ncols=5)


def draw_profile(rows, path):
    """A bar for each operation of the step, the slowest on top, with its rate where it multiplies matrices."""
    with _figure(path, 2.8) as (_, (axes,)):
        operations, whole = rows[:-1], rows[-1]
        bars = axes.barh([row["operation"] for row in operations], [row["ms"] for row in operations], color=COLOURS[0])
        axes.bar_label(bars, [f"{row['share']:.0%}" + (f", {row['gflops']:.0f} GFLOP/s" if row["gflops"] else "")
                              for row in operations], fontsize=6, padding=2)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.2)
        axes.set(xlabel="milliseconds", title=f"A training step of {whole['ms']:.0f} ms at {whole['gflops']:.0f} "
                                              f"GFLOP/s; sgemm alone runs at {whole['sgemm_gflops']:.0f}")


def draw_scaling(rows, path):
    """Three panels: time against experts, tokens and imbalance. Dashed: in proportion to the matrix products.

    The work of the optimizer grows with the experts instead, and does not grow with the tokens.
    """
    labels = {"experts": "experts E, 2 for each token", "tokens": "tokens in the batch",
              "imbalance": "share of tokens at expert 0"}

    with _figure(path, 2.4, n_panels=3) as (fig, panels):
        for axes, (against, label) in zip(panels, labels.items()):
            values, ms = zip(*((row["value"], row["ms"]) for row in rows if row["against"] == against))
            ideal = [ms[0] * v / values[0] if against == "tokens" else ms[0] for v in values]
            axes.plot(values, ms, "o-", color=COLOURS[0], label="measured")
            axes.plot(values, ideal, "--", color="black", label="if time grew as the matrix products do")
            if against != "imbalance":
                axes.set_xscale("log", base=2)
                axes.set_xticks(values, [f"{v:g}" for v in values], minor=False)
            axes.set(xlabel=label, ylim=(0, 1.15 * max(*ms, *ideal)), ylabel="layer, forward + backward (ms)"
                     if against == "imbalance" else "training step (ms)")
        fig.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)


def write(out, name, rows):
    """Write rows to out/NAME.jsonl, each with the machine, its load and any PyTorch's version; return them."""
    where = machine() | {"load": os.getloadavg()[0]}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        where["torch"] = importlib.metadata.version("torch")
    rows = [row | where for row in rows]
    write_rows(Path(out) / f"{name}.jsonl", rows)
    return rows
