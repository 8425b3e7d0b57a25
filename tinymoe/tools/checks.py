"""The gradient check of everything in float64, as a table: `python cli.py gradcheck` runs it on the kernels in use.

One line adds a case: a function of Tensors in OPERATIONS, a layer in LAYERS, other options of a router in
ROUTER_OPTIONS, another router than top_k for a loss in LOSS_ROUTERS. Every router and loss has a case without that, and
a kernel is checked by the operation that calls it.
"""

import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from .. import kernels
from ..autograd import functional as F
from ..autograd.gradcheck import GradcheckResult, gradcheck
from ..autograd.tensor import Tensor
from ..layers.attention import CausalSelfAttention
from ..layers.latent_attention import LatentAttention
from ..layers.nn import Embedding, FeedForward, LayerNorm, Linear, RMSNorm
from ..layers.windowed_attention import WindowedAttention
from ..model.config import ModelConfig
from ..model.transformer import Transformer
from ..moe import routers
from ..moe.experts import BACKENDS, ExpertBank
from ..moe.layer import MoELayer
from ..moe.losses import LOSSES, LossContext
from ..moe.routers import RouteContext
from ..moe.routing import from_mask, limit_capacity

RTOL = 1e-5


@dataclass(frozen=True)
class CheckRow:
    """One line of the table. error: the largest relative error. note: where a failure is, and both values."""

    name: str
    ok: bool
    error: float
    note: str = ""

    def line(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.name:<50} {self.error:8.1e}  {self.note}".rstrip()


def run_all(only: str | None = None) -> Iterator[CheckRow]:
    """Yield a CheckRow for every case whose name contains `only` (None: for every case), as each is done.

    A case that raises an error has failed; its note is the error.
    """
    threads = kernels.get_threads()
    kernels.set_threads(1)  # a second thread does not pay for arrays this small
    try:
        for name, check in cases().items():
            if only is None or only in name:
                try:
                    result = check()
                except Exception as error:  # a case that cannot run must not hide the others
                    result = GradcheckResult(False, np.inf, " ".join(f"ERROR {type(error).__name__}: {error}".split()))
                yield CheckRow(name, result.ok, result.max_error, "" if result.ok else result.where)
    finally:
        kernels.set_threads(threads)


def cases() -> dict[str, Callable[[], GradcheckResult]]:
    """Every case by its name; calling a case runs it."""
    groups = {
        "operation": {name: partial(gradcheck, *case, rtol=RTOL) for name, case in OPERATIONS.items()},
        "layer": {name: _module(*case) for name, case in LAYERS.items()},
        "router": {name: _router(name) for name in routers.ROUTERS} |
                  {f"{name}, {label}": _router(name, **case) for (name, label), case in ROUTER_OPTIONS.items()},
        "loss": {name: _router(LOSS_ROUTERS.get(name, "top_k"), loss.of) for name, loss in LOSSES.items()},
        "experts": {f"{backend}, {name}": _experts(backend, mask) for backend in BACKENDS
                    for name, mask in ASSIGNMENTS.items()},
        "whole": {"MoELayer": _moe_layer(), "MoELayer, capacity 0.75": _moe_layer(capacity_factor=0.75),
                  "MoELayer, copy and zero experts": _moe_layer(n_copy=1, n_zero=2),
                  "Transformer, balance over batches": _model(losses={"global_batch": 0.5}),
                  "MoELayer, gated shared expert": _moe_layer(n_shared=1, shared_gate=True)} |
                 {f"Transformer, {name}": _model(**options) for name, options in MODELS.items()},
        "exactly zero": {name: partial(_zero, *case) for name, case in ZEROS.items()}}
    return {f"{group}: {name}": check for group, checks in groups.items() for name, check in checks.items()}


def _rng(seed=0):
    return np.random.default_rng(seed)


def _normal(*shape, seed=0):
    return _rng(seed).standard_normal(shape)


A, B, POSITIVE = _normal(3, 4), _normal(2, 3, 4, seed=1), 0.5 + np.abs(_normal(3, 4, seed=2))
IDS = np.array([2, 0, 2, 1])

OPERATIONS = {  # name -> (function, its inputs)
    **{f.__name__: (f, A, B) for f in (operator.add, operator.sub, operator.mul)},
    "divide": (lambda a, b: b / a, POSITIVE, B),
    "power": (operator.pow, POSITIVE, B),
    "negate": (operator.neg, A),
    **{f.__name__: (f, POSITIVE) for f in (Tensor.exp, Tensor.log, Tensor.sqrt, Tensor.tanh)},
    "abs": (abs, A),
    "astype": (lambda a: a.astype(np.float64) * a, A),
    "matmul": (lambda a, b: a @ b, _normal(2, 1, 3, 4), _normal(5, 4, 2, seed=1)),
    "matmul with vectors": (lambda a, b: (a @ b) * (b @ b), A, _normal(4, seed=1)),
    "sum": (lambda a: a.sum(axis=(0, 2)), B),
    "mean": (lambda a: a.mean(axis=-1, keepdims=True), B),
    "max": (lambda a: a.max(axis=1), B),
    "reshape and transpose": (lambda a: a.reshape(4, 6).T @ a.transpose(1, 0, 2).reshape(4, 6), B),
    "slice": (lambda a: a[..., ::-2] * a[1, None, :, :2], B),
    "index with repeats": (lambda a: a[[0, 2, 0]] * a[:, [1, 1, 3]][[2, 2, 1]].sum(), A),
    "concatenate": (lambda a, b: F.concatenate([a, b, a], axis=1), A, _normal(3, 2, seed=1)),
    "stack": (lambda a, b: F.stack([a, b * a, a], axis=1), A, POSITIVE),
    "where": (lambda a: F.where(A > 0, a, a * a), A),
    "gather": (lambda a: F.gather(a, np.array([[0, 0, 3], [1, 2, 2], [3, 3, 3]])), A),
    "scatter_add": (lambda a: F.scatter_add(a, IDS[:3], 4), A),
    "embedding": (lambda a: F.embedding(a, IDS[None]), A),
    "linear": (F.linear, B, _normal(4, 5, seed=3), _normal(5, seed=4)),
    **{f.__name__: (f, A) for f in (F.softmax, F.log_softmax, F.logsumexp)},
    "cross_entropy": (lambda a: F.cross_entropy(a, IDS[:3]), A),
    "layer_norm": (F.layer_norm, B, _normal(4, seed=3), _normal(4, seed=4)),
    "rms_norm": (F.rms_norm, B, _normal(4, seed=3)),
    "rotary": (F.rotary, _normal(2, 3, 2, 4)),
    "causal_attention, two groups of two heads": (
        F.causal_attention, _normal(2, 5, 4, 3), _normal(2, 5, 2, 3, seed=1), _normal(2, 5, 2, 2, seed=2)),
    **{f.__name__: (f, A) for f in (F.gelu, F.silu, F.relu, F.sigmoid, F.softplus, F.normal_cdf)},
    **{f"activation, {name}": (lambda a, name=name: F.activation(a, name), A) for name in F.ACTIVATIONS},
}


LAYERS = {  # name -> (function that makes one, its inputs)
    "Linear": (lambda: Linear(4, 5, _rng(), dtype=float), B),
    "LayerNorm": (lambda: LayerNorm(4, dtype=float), B),
    "RMSNorm": (lambda: RMSNorm(4, dtype=float), B),
    "Embedding": (lambda: Embedding(3, 4, _rng(), dtype=float), IDS),
    "FeedForward": (lambda: FeedForward(4, 7, _rng(), dtype=float), B),
    "CausalSelfAttention": (lambda: CausalSelfAttention(4, 2, _rng(), dtype=float), B),
    "WindowedAttention": (lambda: WindowedAttention(4, 2, _rng(), dtype=float, window=2, sinks=True), B),
    "LatentAttention": (lambda: LatentAttention(4, 2, _rng(), dtype=float, q_rank=3, kv_rank=5, rope_dim=2), B),
}


def _module(make, *inputs, call=lambda module, *x: module(*x), spread=0.1):
    """Check call(module, *inputs) for all inputs and parameters. `make` builds the module when the check runs.

    spread: of noise added to the parameters, because an initial bias of 0 or scale of 1 is a special value.
    """
    def run():
        module = make()
        names, parameters = module.parameters().keys(), module.parameters().values()
        for i, p in enumerate(parameters, start=1):
            p.data = p.data + spread * _normal(*p.shape, seed=i)
        result = gradcheck(lambda *t: call(module, *t[:len(inputs)]), *inputs, *parameters, rtol=RTOL)
        places = [*(f"input {i}" for i in range(len(inputs))), *names]
        return replace(result, where=re.sub(r"^input (\d+)", lambda found: places[int(found[1])], result.where))
    return run


N, D, E = 12, 6, 4  # two sequences of six tokens
SEQUENCES, DOMAINS = np.arange(N).reshape(2, -1), np.arange(2)
X, GATES = Tensor(_normal(N, D, seed=20)), Tensor(_normal(N, E))

ROUTER_OPTIONS = {  # (router, label) -> what differs from the default
    ("top_k", "K = 1"): dict(top_k=1),
    ("top_k", "not renormalised"): dict(renormalise=False),
    ("top_k", "K = E"): dict(top_k=E),
    ("top_k", "jitter, groups, random second"): dict(jitter=0.1, n_groups=2, group_limit=1, second_expert="random"),
    ("noisy_top_k", "evaluation"): dict(training=False),
    ("noisy_top_k", "smooth load"): dict(function=lambda routing, context: routing.soft_load),
    ("sigmoid_bias", "groups"): dict(n_groups=2, group_limit=1),
    ("sigmoid_bias", "sqrt_softplus"): dict(score="sqrt_softplus"),
    ("sigmoid_bias", "softmax"): dict(score="softmax"),
    ("hash_gated", "not renormalised"): dict(renormalise=False, score="sqrt_softplus"),
    ("cosine_top_k", "K = 1"): dict(top_k=1),
    ("top_p", "renormalised"): dict(renormalise=True),
    ("mixture_of_depths", "causal"): dict(causal=True),
    ("sinkhorn", "K = 1"): dict(top_k=1),
    ("sinkhorn", "evaluation"): dict(training=False),
    ("sequence", "mean"): dict(sequence_pool="mean"),
    ("expert_choice", "on the prefix"): dict(causal=True, causal_rule="prefix"),
    ("expert_choice", "by threshold"): dict(rule="threshold"),
    ("expert_choice", "renormalised"): dict(renormalise=True),
    ("expert_choice", "over tokens"): dict(softmax_over="tokens"),
    ("expert_choice", "over tokens, on the prefix"): dict(rule="prefix", softmax_over="tokens"),
}
LOSS_ROUTERS = {"load": "noisy_top_k", "policy": "reinforce"}  # the other losses are checked with top_k


def _all_outputs(routing, context=None):
    return F.concatenate([routing.gate, routing.logits.reshape(-1), routing.probs.reshape(-1)])


def _router(name, function=_all_outputs, top_k=None, training=True, causal=False, **options):
    """Check function(routing, LossContext) and the router's penalty for the router's input and weights.

    top_k: None for 2, or 1 if the router needs it.
    """
    def run():
        choices = set()

        def call(router, x):
            routing = router(x, RouteContext(SEQUENCES, training, _rng(3), causal, domain=DOMAINS))
            choices.add(routing.mask().tobytes())
            about = LossContext(router, seq_len=6, n_devices=2, token_nats=lambda: np.arange(float(N)))
            value, penalty = function(routing, about), router.penalty(routing, about)
            return value if penalty is None else value + penalty

        k = top_k or (1 if routers.ROUTERS[name].top_1_only else 2)
        result = _module(lambda: routers.make(name, D, E, k, dtype=float, **options), X.data, call=call, spread=1.0)()
        if len(choices) > 1:  # a choice has no gradient, so the differences must not change it
            return GradcheckResult(False, np.inf, "a step of the differences changes the choice: use other inputs")
        return result
    return run


ASSIGNMENTS = {  # name -> mask (N, E) of a hard case for dispatch
    "balanced": np.arange(N)[:, None] % E == np.arange(E),
    "one expert holds all": np.tile(np.arange(E) == 2, (N, 1)),
    "uneven, tokens without expert": _normal(N, E, seed=5) > 0.3,
}


def _routing(mask, gates):
    scores = Tensor(np.zeros((N, E)))
    return from_mask(mask, gates, scores, scores)


def _experts(backend, mask):
    return _module(lambda: ExpertBank(E, D, 5, backend=backend, dtype=float), X.data, GATES.data,
                   call=lambda bank, x, gates: bank(x, _routing(mask, gates)), spread=1.0)


SMALL = dict(vocab_size=7, n_layers=2, d_model=D, n_heads=2, d_ff=5, seq_len=6, moe_layers=(1,), n_experts=E,
             losses=dict(z=0.01))
MODELS = {  # name -> what differs from SMALL
    "dense": dict(moe_layers=()),
    "top_k, K = 1": dict(top_k=1),
    "top_k, K = 2": dict(),
    "noisy_top_k": dict(router="noisy_top_k", losses=dict(z=0.01, importance=0.1, load=0.1)),
    "expert_choice": dict(router="expert_choice"),
}


def _moe_layer(**options):
    return _module(lambda: MoELayer(ModelConfig(**SMALL | options), "top_k", _rng(), 0.5, float), _normal(2, 6, D),
                   call=lambda layer, x: layer(x, RouteContext(SEQUENCES))[0], spread=0.3)


def _model(**options):
    """Check the total loss for every parameter."""
    ids = _rng().integers(0, 7, (2, 7))
    return _module(lambda: Transformer(ModelConfig(**SMALL | options), dtype=float), spread=0.3,
                   call=lambda model: model.loss(ids[:, :-1], ids[:, 1:], training=True, rng=_rng(1)).total)


CROWDED = ASSIGNMENTS["one expert holds all"]  # expert 2; with room for 3 tokens, 9 of 12 are dropped


def _replaced(module, **parameters):
    vars(module).update(parameters)
    return module


def _first_expert(*parameters):
    bank = ExpertBank(E, D, 5, dtype=float)
    names = bank.parameters().items()
    return _replaced(bank, **{name: F.concatenate([p, whole[1:]]) for p, (name, whole) in zip(parameters, names)})


ZEROS = {  # name -> (function, inputs on which its output must not depend at all)
    "router weights, K = 1 renormalised": (  # the gate is then the constant 1; this is not the default
        lambda weight: _replaced(routers.make("top_k", D, E, top_k=1, dtype=float, renormalise=True), weight=weight)(
            X, RouteContext()).gate, _normal(D, E)),
    "noise weights at evaluation": (
        lambda noise: _all_outputs(_replaced(routers.make("noisy_top_k", D, E, dtype=float), noise=noise)(
            X, RouteContext())), _normal(D, E)),
    "weights of an expert without tokens": (
        lambda *parameters: _first_expert(*parameters)(X, _routing(CROWDED, GATES)),
        _normal(1, D, 5), _normal(1, 5), _normal(1, 5, D), _normal(1, D)),
    "gates of dropped assignments": (
        lambda dropped: ExpertBank(E, D, 5, dtype=float)(X, limit_capacity(
            _routing(CROWDED, F.concatenate([GATES[:3], dropped])), factor=1.0, top_k=1)), _normal(9, E)),
    "later tokens, through attention": (
        lambda later: CausalSelfAttention(4, 2, _rng(), dtype=float)(F.concatenate([Tensor(B), later], axis=1))[:, :3],
        _normal(2, 2, 4)),
}


def _zero(function, *inputs):
    result = gradcheck(function, *inputs)
    return replace(result, ok=result.max_error == 0)
