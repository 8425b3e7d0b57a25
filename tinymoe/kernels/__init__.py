"""Compiled kernels: arrays in, arrays out. The only folder that imports numba.

The plan:

- **One thread pool.** Threads are numba's; BLAS runs inside them at one thread (`tinymoe/__init__.py` sees to
  that), because two pools that spin starve each other. A matrix product is `np.dot(a, b, out)` on contiguous
  operands, as fast in a kernel as from NumPy.
- **Pieces.** Work is cut into pieces of rows that fit in cache (in attention, into groups of heads), and a piece is
  carried through everything that can be done with it: for an expert, gather, multiply, add the bias, activate,
  multiply. A piece never crosses
  from one expert to the next, and an expert with many tokens is simply many pieces, so collapsed routing costs
  no more than balanced routing.
- **Ownership.** A piece's rows belong to one thread. Where many rows add into one place, either the first piece
  writes the result and the others a partial sum each (weight gradients), or each thread owns columns of the result
  and takes all rows in order (the sum over a token's experts).
- **Determinism.** Where pieces begin and end depends on sizes and routing, never on the number of threads, and
  partial sums are added in a fixed order: the same bits on every run and for every thread count.

A public function makes its inputs contiguous, allocates and plans; the compiled functions above it compute.
Nothing is validated here.

Axes: N tokens, D width, F hidden width, E experts, A assignments, P pieces, S partial sums (slots),
B batch, T time, H heads, G groups of heads that share keys and values.
"""
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from .compiled.activations import ACTIVATIONS, GATED, activation, activation_backward
from .compiled.attention import QUERIES, causal_attention, causal_attention_backward
from .compiled.dense import SEGMENT, layer_norm, layer_norm_backward, linear, linear_backward
from .compiled.experts import experts_backward, experts_forward
from .compiled.runtime import PIECE, SLICE, compiled_mark, get_threads, set_threads, thread_info
from .compiled.updates import ALONE, COLUMNS, adamw, add_rows, sum_of_squares

__all__ = ["ACTIVATIONS", "ALONE", "COLUMNS", "GATED", "PIECE", "QUERIES", "SEGMENT", "SLICE", "activation",
           "activation_backward", "adamw", "add_rows", "call_attention", "call_others", "causal_attention",
           "causal_attention_backward", "compile_all", "experts_backward", "experts_forward", "get_threads",
           "is_compiled", "layer_norm", "layer_norm_backward", "linear", "linear_backward", "set_threads",
           "sum_of_squares", "thread_info"]


def compile_all(dtype):
    """Have every kernel compiled for a dtype ("float32" or "float64") and loaded -> seconds

    A process that compiles can differ in the last bit from one that reads the result back (a function that is not
    inlined is optimised again inside each caller). So processes of their own compile, once, and this one reads: then
    all runs have the same bits. Where nothing can be kept, it compiles here.
    """
    started, name = time.perf_counter(), np.dtype(dtype).name
    done = compiled_mark(name)
    if done is not None and not done.exists():
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        code = "from tinymoe import kernels; kernels.{}('{}')".format
        halves = [subprocess.Popen([sys.executable, "-c", code(half, name)], env=os.environ | {"PYTHONPATH": path})
                  for half in ("call_attention", "call_others")]
        if [half.wait() for half in halves] == [0, 0]:
            done.touch()
    call_attention(dtype)
    call_others(dtype)
    return time.perf_counter() - started


def is_compiled(dtype):
    """Whether `compile_all` has nothing to compile for this dtype."""
    done = compiled_mark(np.dtype(dtype).name)
    return done is not None and done.exists()


def call_attention(dtype):
    """Call the kernels of attention once, on tiny arrays: a good third of the time that compiling takes."""
    heads = np.ones((1, 2, 1, 2), dtype)
    out, saved = causal_attention(heads, heads, heads)
    causal_attention_backward(out, heads, heads, heads, saved)


def call_others(dtype):
    """Call every other kernel once."""
    x, w, b = np.ones((2, 2), dtype), np.ones((2, 2), dtype), np.ones(2, dtype)
    segments = np.ones((SEGMENT + 1, 2), dtype)                  # two, so that partial sums are added
    linear_backward(linear(segments, w, b), segments, w)
    activation_backward(activation(x, "gelu"), x, "gelu")
    y, mean, rstd = layer_norm(x, b, b, 1e-5)
    layer_norm_backward(y, x, b, mean, rstd)
    weights = np.ones((2, 2, 2), dtype)
    routed = x, np.array([0, 1]), np.array([0, 2, 2]), b, weights, x, weights, x, "gelu"
    y, saved = experts_forward(*routed)
    experts_backward(y, *routed, saved)
    add_rows(2, np.array([0, 0]), x)
    for size in (ALONE, ALONE + 1):
        adamw(*(np.ones(size, dtype) for _ in range(4)), 0.1, 0.9, 0.95, 1e-8, 0.1, 1)
        sum_of_squares(np.ones(size, dtype))
