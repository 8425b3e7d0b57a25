"""The gradient check of everything: what `python cli.py gradcheck` runs, as a table.

A case is a name and a function that runs one check in float64. Discrete choices make a router's output jump, so
its case also makes sure that no step of the differences changes a choice.
"""

from dataclasses import dataclass

import numpy as np

from ..autograd import functional as F
from .. import kernels
from ..moe import losses, routers
from ..layers.attention import CausalSelfAttention
from ..model.config import ModelConfig
from ..moe.experts import BACKENDS, ExpertBank
from ..autograd.gradcheck import GradcheckResult, gradcheck
from ..model.transformer import Transformer
from ..moe.layer import MoELayer
from ..layers.nn import Embedding, FeedForward, LayerNorm, Linear, RMSNorm
from ..moe.routers import RouteContext
from ..moe.routing import from_mask, limit_capacity
from ..autograd.tensor import Tensor

RTOL = 1e-5


@dataclass(frozen=True)
class CheckRow:
    """One line of the table. error: the largest relative error, or for an exact zero the largest magnitude."""

    name: str
    ok: bool
    error: float
    note: str = ""

    def line(self):
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.name:<46} {self.error:8.1e}  {self.note}".rstrip()


def run_all(only=None):
    """Yield a CheckRow for every case whose name contains `only` (all for None), as each is done."""
    threads = kernels.get_threads()
    kernels.set_threads(1)  # arrays this small are not worth waking a second thread
    try:
        for name, check in CASES.items():
            if only is None or only in name:
                result, note = check()
                yield CheckRow(name, result.ok, result.max_error, note if result.ok else result.where)
    finally:
        kernels.set_threads(threads)


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def _leaf(*shape, seed=0):
    return Tensor(_normal(*shape, seed=seed), requires_grad=True)


def _check(function, *inputs, note=""):
    return lambda: (gradcheck(function, *inputs, rtol=RTOL), note)


def _module(make, *inputs):
    """The check of a module's output for its parameters and its inputs; `make` builds it when the check runs."""
    def run():
        module = make(np.random.default_rng(0))
        parameters = module.parameters().values()
        for p in parameters:  # away from the special values 0 and 1 of an initial bias or scale
            p.data = p.data + 0.1 * _normal(*p.shape, seed=1)
        return gradcheck(lambda *t: module(*t[:len(inputs)]), *inputs, *parameters, rtol=RTOL), ""
    return run


# -- operations, layers, attention --------------------------------------------------------------

A, B, POSITIVE = _normal(3, 4), _normal(2, 3, 4, seed=1), 0.5 + np.abs(_normal(3, 4, seed=2))
IDS = np.array([2, 0, 2, 1])

OPERATIONS = {
    "add": _check(lambda a, b: a + b, A, B),
    "subtract": _check(lambda a, b: a - b, A, B),
    "multiply": _check(lambda a, b: a * b, A, B),
    "divide": _check(lambda a, b: b / a, POSITIVE, B),
    "power": _check(lambda a, b: a ** b, POSITIVE, B),
    "negate": _check(lambda a: -a, A),
    "exp": _check(lambda a: a.exp(), A),
    "log": _check(lambda a: a.log(), POSITIVE),
    "sqrt": _check(lambda a: a.sqrt(), POSITIVE),
    "tanh": _check(lambda a: a.tanh(), A),
    "matmul": _check(lambda a, b: a @ b, _normal(2, 1, 3, 4), _normal(5, 4, 2, seed=1)),
    "matmul with vectors": _check(lambda a, b: (a @ b) * (b @ b), A, _normal(4, seed=1)),
    "sum": _check(lambda a: a.sum(axis=(0, 2)), B),
    "mean": _check(lambda a: a.mean(axis=-1, keepdims=True), B),
    "max": _check(lambda a: a.max(axis=1), B),
    "reshape and transpose": _check(lambda a: a.reshape(4, 6).T @ a.transpose(1, 0, 2).reshape(4, 6), B),
    "slice": _check(lambda a: a[..., ::-2] * a[1, None, :, :2], B),
    "index with repeats": _check(lambda a: a[[0, 2, 0]] * a[:, [1, 1, 3]][[2, 2, 1]].sum(), A),
    "concatenate": _check(lambda a, b: F.concatenate([a, b, a], axis=1), A, _normal(3, 2, seed=1)),
    "where": _check(lambda a: F.where(A > 0, a, a * a), A),
    "gather": _check(lambda a: F.gather(a, np.array([[0, 0, 3], [1, 2, 2], [3, 3, 3]])), A),
    "scatter_add": _check(lambda a: F.scatter_add(a, IDS[:3], 4), A),
    "embedding": _check(lambda a: F.embedding(a, IDS[None]), A),
    "linear": _check(F.linear, B, _normal(4, 5, seed=3), _normal(5, seed=4)),
    "softmax": _check(F.softmax, A),
    "log_softmax": _check(F.log_softmax, A),
    "logsumexp": _check(F.logsumexp, A),
    "cross_entropy": _check(lambda a: F.cross_entropy(a, IDS[:3]), A),
    "layer_norm": _check(F.layer_norm, B, _normal(4, seed=3), _normal(4, seed=4)),
    "rms_norm": _check(F.rms_norm, B, _normal(4, seed=3)),
    "causal attention": _check(F.causal_attention, _normal(2, 5, 4, 3), _normal(2, 5, 2, 3, seed=1),
                               _normal(2, 5, 2, 2, seed=2), note="two groups of two heads"),
} | {f.__name__: _check(f, A) for f in (F.gelu, F.silu, F.relu, F.sigmoid, F.softplus, F.normal_cdf)}

LAYERS = {
    "Linear": _module(lambda rng: Linear(4, 5, rng, dtype=float), B),
    "LayerNorm": _module(lambda rng: LayerNorm(4, dtype=float), B),
    "RMSNorm": _module(lambda rng: RMSNorm(4, dtype=float), B),
    "Embedding": _module(lambda rng: Embedding(3, 4, rng, dtype=float), IDS),
    "FeedForward": _module(lambda rng: FeedForward(4, 7, rng, dtype=float), B),
    "CausalSelfAttention": _module(lambda rng: CausalSelfAttention(6, 2, rng, dtype=float), _normal(2, 5, 6)),
}


# -- routers, their losses, experts, the model --------------------------------------------------

N, D, E = 12, 6, 4  # two sequences of six tokens
SEQUENCES = np.arange(N).reshape(2, -1)


def _routed(name, function, top_k=2, training=True, causal=False, **options):
    """The check of function(routing) for a router's input and weights, all at one and the same choice."""
    def run():
        router = routers.make(name, D, E, top_k, 0, float, **options)
        for p in router.parameters().values():
            p.data = p.data + _normal(*p.shape, seed=1)
        x, first = _leaf(N, D, seed=2), None

        def route(*_):
            nonlocal first
            routing = router(x, RouteContext(SEQUENCES, training, np.random.default_rng(3), causal))
            first = routing.mask() if first is None else first
            if (routing.mask() != first).any():
                raise ValueError(f"{name}: the differences step over a tie; choose other inputs")
            return function(routing)

        return gradcheck(route, x, *router.parameters().values(), rtol=RTOL), ""
    return run


def _gates(routing):
    return F.concatenate([routing.gate, routing.logits.reshape(-1), routing.probs.reshape(-1)])


ROUTERS = {
    "top_k, K = 1": _routed("top_k", _gates, top_k=1),
    "top_k, K = 2": _routed("top_k", _gates),
    "top_k, K = 2, not renormalised": _routed("top_k", _gates, renormalise=False),
    "top_k, K = E": _routed("top_k", _gates, top_k=E),
    "noisy_top_k, training": _routed("noisy_top_k", _gates),
    "noisy_top_k, evaluation": _routed("noisy_top_k", _gates, training=False),
    "noisy_top_k, smooth load": _routed("noisy_top_k", lambda r: r.soft_load),
    "top_k, jitter, groups, random second": _routed("top_k", _gates, jitter=0.1, n_groups=2, group_limit=1,
                                                    second_expert="random"),
    "sigmoid_bias": _routed("sigmoid_bias", _gates),
    "sigmoid_bias, groups": _routed("sigmoid_bias", _gates, n_groups=2, group_limit=1),
    "frozen, the input": _routed("frozen", _gates),
    "sinkhorn, K = 1, training": _routed("sinkhorn", _gates, top_k=1),
    "sinkhorn, K = 2, evaluation": _routed("sinkhorn", _gates, training=False),
    "base_assignment, training": _routed("base_assignment", _gates, top_k=1),
    "shuffled": _routed("shuffled", _gates),
    "reinforce, training": _routed("reinforce", _gates, top_k=1),
    "sequence, prefix": _routed("sequence", _gates),
    "sequence, mean": _routed("sequence", _gates, sequence_pool="mean"),
    "expert_choice": _routed("expert_choice", _gates),
    "expert_choice, on the prefix": _routed("expert_choice", _gates, causal=True),
    "expert_choice, over tokens": _routed("expert_choice", _gates, softmax_over="tokens"),
    "expert_choice, over tokens, on the prefix": _routed("expert_choice", _gates, causal=True, softmax_over="tokens"),
}

LOSSES = {
    "load_balancing_loss": _routed("top_k", losses.load_balancing_loss),
    "sequence_balance_loss": _routed("top_k", lambda r: losses.sequence_balance_loss(r, 6)),
    "device_balance_loss": _routed("top_k", lambda r: losses.device_balance_loss(r, 2)),
    "communication_balance_loss": _routed("top_k", lambda r: losses.communication_balance_loss(r, 2, 1)),
    "z_loss": _routed("top_k", losses.z_loss),
    "importance_loss": _routed("top_k", losses.importance_loss),
    "load_loss": _routed("noisy_top_k", losses.load_loss),
    "policy_loss": _routed("reinforce", lambda r: losses.policy_loss(r, np.arange(float(r.n_tokens))), top_k=1),
}

ASSIGNMENTS = {  # (N, E) masks: the cases in which dispatch goes wrong
    "balanced": np.arange(N)[:, None] % E == np.arange(E),
    "one expert holds all": np.tile(np.arange(E) == 2, (N, 1)),
    "uneven, some tokens bare": _normal(N, E, seed=5) > 0.3,
}


def _bank(backend, mask):
    def run():
        bank, x, gates = ExpertBank(E, D, 5, backend=backend, dtype=float), _leaf(N, D), _leaf(N, E, seed=1)
        for p in bank.parameters().values():
            p.data = _normal(*p.shape, seed=2)
        scores = Tensor(np.zeros((N, E)))
        return gradcheck(lambda *_: bank(x, from_mask(mask, gates, scores, scores)), x, gates,
                         *bank.parameters().values(), rtol=RTOL), ""
    return run


EXPERTS = {f"{backend}, {name}": _bank(backend, mask) for backend in BACKENDS for name, mask in ASSIGNMENTS.items()}

SMALL = dict(vocab_size=7, n_layers=2, d_model=D, n_heads=2, d_ff=5, seq_len=6, moe_layers=(1,), n_experts=E,
             losses={"z": 0.01})


def _moe_layer(**options):
    layer = MoELayer(ModelConfig(**SMALL | options), np.random.default_rng(0), 0.5, float)
    x = _leaf(2, 6, 6)
    layer.router.weight.data = _normal(6, E, seed=3)
    return _check(lambda *_: layer(x, RouteContext(SEQUENCES))[0], x, *layer.parameters().values())


def _model(**options):
    """The total loss, for every parameter of a whole small model."""
    def run():
        model = Transformer(ModelConfig(**SMALL | options), dtype=float)
        for i, p in enumerate(model.parameters().values()):
            p.data = p.data + 0.3 * _normal(*p.shape, seed=i)
        ids = np.random.default_rng(0).integers(0, 7, (2, 7))
        result = gradcheck(lambda *_: model.loss(ids[:, :-1], ids[:, 1:], True, np.random.default_rng(1)).total,
                           *model.parameters().values(), rtol=RTOL)
        return result, f"{len(model.parameters())} tensors"
    return run


MODELS = {
    "MoELayer": _moe_layer(),
    "MoELayer, capacity 0.75": _moe_layer(capacity_factor=0.75),
    "Transformer, dense": _model(moe_layers=()),
    "Transformer, top_k, K = 1": _model(top_k=1),
    "Transformer, top_k, K = 2": _model(),
    "Transformer, noisy_top_k": _model(router="noisy_top_k", losses={"importance": 0.1, "load": 0.1}),
    "Transformer, expert_choice": _model(router="expert_choice"),
}


# -- gradients that must be exactly zero --------------------------------------------------------

def _zero(make, note):
    """make() returns an array of gradients, every one of which must be exactly 0."""
    def run():
        largest = float(np.abs(make()).max())
        return GradcheckResult(largest == 0, largest, note), note
    return run


def _renormalised_top_1():
    router, x = routers.make("top_k", D, E, 1, 0, float, renormalise=True), _leaf(N, D)
    (router(x, RouteContext(SEQUENCES)).gate * _normal(N)).sum().backward()
    return router.weight.grad


def _idle_expert():
    bank, gates, scores = ExpertBank(E, D, 5, dtype=float), _leaf(N, E), Tensor(np.zeros((N, E)))
    bank(_leaf(N, D, seed=1), from_mask(ASSIGNMENTS["one expert holds all"], gates, scores, scores)).sum().backward()
    return np.concatenate([p.grad[0].ravel() for p in bank.parameters().values()])


def _noise_at_evaluation():
    router = routers.make("noisy_top_k", D, E, 2, 0, float)
    _gates(router(_leaf(N, D), RouteContext(SEQUENCES))).sum().backward()
    return np.zeros(1) if router.noise.grad is None else router.noise.grad


def _later_tokens():
    attention, x = CausalSelfAttention(6, 2, np.random.default_rng(0), dtype=float), _leaf(2, 5, 6)
    attention(x)[:, :3].sum().backward()
    return x.grad[:, 3:]


def _dropped_gate():
    gates, scores = _leaf(N, E), Tensor(np.zeros((N, E)))
    routing = limit_capacity(from_mask(ASSIGNMENTS["one expert holds all"], gates, scores, scores), 1.0, 1)
    ExpertBank(E, D, 5, dtype=float)(_leaf(N, D, seed=1), routing).sum().backward()
    return gates.grad[len(routing.token):]


ZEROS = {
    "router weights, K = 1 renormalised": _zero(_renormalised_top_1, "the gate is constant 1: not the default"),
    "weights of an expert without tokens": _zero(_idle_expert, "a dead expert stays dead"),
    "noise weights at evaluation": _zero(_noise_at_evaluation, "no noise is drawn"),
    "later tokens, through attention": _zero(_later_tokens, "outputs at t <= 2, inputs at t > 2"),
    "gates of dropped assignments": _zero(_dropped_gate, "they take no part"),
}

CASES = {f"{group}: {name}": check for group, cases in (
    ("operation", OPERATIONS), ("layer", LAYERS), ("router", ROUTERS), ("loss", LOSSES), ("experts", EXPERTS),
    ("whole", MODELS), ("exactly zero", ZEROS)) for name, check in cases.items()}
