"""Tests of what routers do to a model, as `python cli.py probe` runs them.

Does a later token, or another sequence of the batch, change the output for an earlier one? Which terms of the loss
give the router a gradient? Has routing collapsed? The subject is a router, trained briefly in a small model, or a run,
a file of weights, or published weights.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..autograd.tensor import Tensor, no_grad
from ..model import published
from ..model.config import ModelConfig
from ..model.transformer import Transformer
from ..moe import metrics
from ..moe.routers import RouteContext, find, greedy_assignment, shortfall, sinkhorn_plan
from ..moe.routing import largest
from ..training.data import load_corpus
from ..training.evaluation import Validation, first_nonfinite, losses_and_routings
from ..training.loading import corpus_of, load_checkpoint
from ..training.plan import RunPlan
from ..training.trainer import Trainer

LONGEST = 128  # tokens of a probed sequence, at most
SEQUENCES = 8  # of ids that are not text


@dataclass(frozen=True)
class Subject:
    """A model to probe, and the tokens to probe it with. about: what both are, in words."""

    model: Transformer
    ids: np.ndarray  # (B, T)
    targets: np.ndarray
    domain: np.ndarray | None  # (B,) where it is known
    about: str


@dataclass(frozen=True)
class Influence:
    """How much a change of the input changes tokens that should not depend on it."""

    tokens: float  # share of these tokens whose experts change in any layer
    logits: float  # the largest change of their logits; below 1e-4 it is rounding


def compared(model, ids, other_ids, keep, domain=None, **options):
    """The Influence of other_ids instead of ids on the tokens that keep(array (B, T, ...)) -> (..., X) selects."""
    def outcome(ids):
        known = None if domain is None else domain[:len(ids)]
        with no_grad():
            output = model.forward(ids, rng=np.random.default_rng(0), domain=known, **options)
        masks = [np.zeros((*ids.shape, 0), bool), *(r.mask().reshape(*ids.shape, -1) for r in output.routings)]
        return keep(np.concatenate(masks, axis=-1)), keep(output.logits.data)

    (chosen, logits), (other_chosen, other_logits) = outcome(ids), outcome(other_ids)
    return Influence(float((chosen != other_chosen).any(axis=-1).mean()), float(np.abs(logits - other_logits).max()))


def causality(model, ids: np.ndarray, causal: bool = False, training: bool = False, domain=None) -> Influence:
    """The Influence of the second half of each sequence on its first half: none, where routing is causal.

    ids (B, T); their second halves become random tokens. training: route as a training step does, with the same noise
    both times. Attention is causal, so any change comes through the routers.
    """
    half, other = later_changed(model, ids)
    return compared(model, ids, other, lambda x: x[:, :half], domain, causal=causal, training=training)


def later_changed(model, ids):
    """(T // 2, a copy of ids (B, T) with random tokens from there on)."""
    half, other = ids.shape[1] // 2, ids.copy()
    other[:, half:] = np.random.default_rng(0).integers(0, model.config.vocab_size, ids[:, half:].shape)
    return half, other


def batch_independence(model, ids: np.ndarray, domain=None) -> dict[str, Influence]:
    """The Influence of the other sequences on the first sequence of ids (B, T): dict of Influences.

    "alone": they are left out. "other neighbours": random tokens replace them.
    """
    other = ids.copy()
    other[1:] = np.random.default_rng(0).integers(0, model.config.vocab_size, ids[1:].shape)
    return {name: compared(model, ids, those, lambda x: x[0], domain)
            for name, those in (("alone", ids[:1]), ("other neighbours", other))}


def leak_in_loss(model, ids: np.ndarray, targets: np.ndarray, domain=None) -> float:
    """Loss routed on the prefix alone minus loss routed over the batch, in nats; 0 for a causal router."""
    domain = np.zeros(len(ids), int) if domain is None else domain
    valid = Validation(ids, targets, domain, names=("text",), batch_size=len(ids))
    leaky, causal = (losses_and_routings(model, valid, c)[0].mean(dtype=float) for c in (False, True))
    return float(causal - leaky)


def gradient_path(model, ids: np.ndarray, targets: np.ndarray, domain=None) -> dict[str, tuple]:
    """The gradient that each term of the loss gives to all routers' weights: dict term -> (coefficient, norm).

    The norm is that of coefficient * term, and of the term itself where its coefficient is 0: what it would do. A norm
    of 0.0 is exactly zero: the router learns nothing from the term.
    """
    terms = model.loss(ids, targets, training=True, rng=np.random.default_rng(0), domain=domain)
    coefficients = {"cross_entropy": 1.0, "penalty": 1.0, "multi_token": model.config.mtp_coef,
                    **model.config.coefficients()}
    weights = [p for layer in model.moe_parts() for p in layer.router.parameters().values() if p.requires_grad]
    norms = {}
    for name, term in {"cross_entropy": terms.cross_entropy, **terms.terms}.items():
        _clear_gradients(model)
        if term.requires_grad:
            ((coefficients[name] or 1.0) * term).backward()
        squares = sum((p.grad.astype(float) ** 2).sum() for p in weights if p.grad is not None)
        norms[name] = coefficients[name], float(np.sqrt(squares))
    _clear_gradients(model)
    return norms


def _clear_gradients(model):
    for p in model.parameters().values():
        p.grad = None


def assignment_shortfall(model, ids, domain=None):
    """Mean score of the exact balanced assignment minus that of other ways to give every token one expert.

    dict of numbers, from the first MoE layer's logits on ids (B, T). "best expert" is below 0: better, but unbalanced.
    """
    with no_grad():
        scores = model.forward(ids, domain=domain).routings[0].logits.data.astype(float)
    ways = {"best expert": largest(scores, 1), "Sinkhorn": largest(sinkhorn_plan(scores), 1),
            "greedy": greedy_assignment(scores)}
    return {name: shortfall(scores, chosen) for name, chosen in ways.items()}


@dataclass(frozen=True)
class LayerReport:
    """What one MoE layer does to B * T tokens."""

    layer: int
    router: str
    declared: tuple[bool, bool]  # whether it is declared causal: as evaluated, as trained
    leaks: tuple[float, float]  # share of earlier tokens that later tokens reroute: as evaluated, as trained
    load: np.ndarray  # (E,)
    uncovered: float  # share of tokens without expert

    @property
    def dead(self) -> int:
        """Experts with less than 1% of their fair share."""
        return metrics.dead_experts(self.load)

    @property
    def effective(self) -> float:
        """exp(entropy of the load): so many experts with equal loads have the same entropy."""
        return metrics.effective_experts(self.load)

    def warnings(self) -> list[str]:
        """Sentences on leaks and collapse."""
        said, (evaluated, trained), E = [], self.leaks, len(self.load)
        if evaluated or trained:
            when = "" if evaluated else " while training, not when it is evaluated"
            unexpected = ", although it is declared causal" if self.declared[not evaluated] else ""
            said.append(f"{self.router} leaks{when}: later tokens change the experts of {evaluated or trained:.1%} of "
                        f"the earlier tokens{unexpected}")
        elif not all(self.declared):
            when = "" if not self.declared[0] else " while training"
            said.append(f"{self.router} is declared not causal{when}, but no leak was found with these tokens")
        if self.effective < E / 2:
            said.append(f"the load collapses: it is as uneven as if {self.effective:.1f} of {E} experts shared all "
                        "tokens equally")
        return [f"layer {self.layer}: {sentence}" for sentence in said]


def layer_reports(model, ids: np.ndarray, domain=None) -> list[LayerReport]:
    """A LayerReport of each MoE layer on ids (B, T). domain (B,): for routers that need it."""
    with no_grad():
        routings = model.forward(ids, rng=np.random.default_rng(0), domain=domain).routings
        leaks = zip(*(own_leaks(model, ids, training, domain) for training in (False, True)))
    limit = "" if model.config.capacity_factor is None else " with a capacity limit"
    return [LayerReport(i, part.router.name + limit, (part.causal, part.causal and part.router.causal_training), leak,
                        r.load, uncovered=1 - metrics.token_coverage(r))
            for i, part, leak, r in zip(model.config.moe_layers, model.moe_parts(), leaks, routings)]


def own_leaks(model, ids: np.ndarray, training: bool = False, domain=None) -> list[float]:
    """The share of the first halves' tokens that each MoE layer reroutes when the second halves become random tokens.

    ids (B, T). The layer sees the states of the first halves unchanged, so a leak of an earlier layer does not count.
    """
    half, other = later_changed(model, ids)
    before, changed = (layer_inputs(model, those, domain) for those in (ids, other))
    after = [np.concatenate([x[:, :half], z[:, half:]], axis=1) for x, z in zip(before, changed)]

    def choices(states, ids):
        context = RouteContext(ids, training, np.random.default_rng(0), domain=domain)
        return [layer(Tensor(x), context)[1].mask().reshape(*ids.shape, -1)[:, :half]
                for layer, x in zip(model.moe_parts(), states)]

    return [float((a != b).any(axis=-1).mean()) for a, b in zip(choices(before, ids), choices(after, other))]


def layer_inputs(model, ids, domain=None):
    """The input (B, T, D) of each MoE layer, as an array."""
    with observed(*model.moe_parts()) as seen:
        model.forward(ids, rng=np.random.default_rng(0), domain=domain)
    return [x.data.reshape(*ids.shape, -1) for _, x in seen]


@contextmanager
def observed(*layers):
    """Within it, a list of the (Routing, input (N, D) Tensor) of each call of these MoE layers."""
    seen = []

    def note(routing, x):
        seen.append((routing, x))
        return routing

    with rerouted(note, *layers):
        yield seen


@contextmanager
def rerouted(change, *layers):
    """Within it, the MoE layers route by change(their Routing, their input (N, D) Tensor)."""
    before = [layer.change_routing for layer in layers]
    for layer in layers:
        layer.change_routing = change
    try:
        yield
    finally:
        for layer, function in zip(layers, before):
            layer.change_routing = function


def alarms(model, reports, ids: np.ndarray, targets: np.ndarray, domain=None) -> list[str]:
    """Warnings about the model's layers, as sentences: leaks, collapse, dead or crowded experts, no gradient.

    reports: those of `layer_reports` on the same ids.
    """
    _clear_gradients(model)
    model.loss(ids, targets, training=True, rng=np.random.default_rng(0), domain=domain).total.backward()
    return [warning for report, part in zip(reports, model.moe_parts()) for warning in
            [*report.warnings(), *metrics.alarms(report.layer, report.load, ids.size, part.router)]]


def trained(config, steps: int, training, text=None) -> Subject:
    """A model after so many training steps, with validation windows of all domains."""
    corpus = load_corpus(text, seq_len=config.seq_len)
    trainer = Trainer(Transformer(config), RunPlan("probe", purpose="probe", seed=0, model=config, training=training),
                      corpus)
    for _ in range(steps):
        trainer.advance()
    windows = corpus.validation(2, config.seq_len)
    about = f"{', '.join(config.routers)} after {steps} steps, {len(windows[0])} sequences of {config.seq_len} bytes"
    return Subject(trainer.model, *windows, about)


def small_model(fields: dict) -> ModelConfig:
    """The ModelConfig of a probe: two MoE layers of width 32, but for these fields; top_k 1 for a router that needs it.

    Raises ValueError for a model without experts, or that cannot read text, and what ModelConfig raises.
    """
    fields = {"d_model": 32, "d_ff": 64, "n_layers": 2, "moe_layers": (0, 1), "seq_len": 64} | fields
    names = fields["router"] if isinstance(fields["router"], (list, tuple)) else [fields["router"]]
    if any(isinstance(name, str) and find(name).top_1_only for name in names):
        fields = {"top_k": 1} | fields
    config = ModelConfig(**fields)
    if not config.moe_layers or config.seq_len < 2 or config.vocab_size < 256:
        raise ValueError("a probe needs a layer with experts, seq_len of at least 2 and vocab_size of at least 256")
    return config


def loaded(path: str | Path, ids: str | Path | None = None, text: str | Path | None = None) -> Subject:
    """The model of a run folder, of an .npz file of weights, or of published weights, and tokens to probe it with.

    ids: a file of token ids. Otherwise the tokens are bytes: of `text`, or of the text that a run was trained on, or of
    the installed texts. A model whose vocabulary is not of bytes gets random ids.
    Raises CheckpointError, CorpusError, OSError or ValueError for what cannot be read, has no layer with experts, or
    overflows.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    is_run = path.name == "checkpoint.npz" or (path / "checkpoint.npz").exists() or (path / "log.jsonl").exists()
    if is_run:
        model, step = load_checkpoint(folder)
        what = f"step {step:,}"
    elif path.suffix == ".npz":
        model, what = Transformer.load(path), "weights"
    elif path.is_dir() and not (path / "config.json").exists():
        raise ValueError(f"{path} holds no checkpoint.npz of a run and no config.json of published weights: give the "
                         "folder of one run, such as OUT/runs/D-seed0, or that of published weights")
    else:
        model, what = published.load(path), "published weights"
    c = model.config
    ours = is_run or path.suffix == ".npz"  # published weights with a larger vocabulary have tokens of their own
    has_bytes = c.vocab_size == 256 or c.vocab_size > 256 and ours
    if not c.moe_layers or c.seq_len < 2:
        raise ValueError(f"{path} has no layer with experts, or sequences below 2 tokens: there is nothing to probe")
    windows, words = _tokens(c, has_bytes, ids, text, trained_on=folder if is_run else None)
    n, length = windows[0].shape
    with np.errstate(all="ignore"):
        place = first_nonfinite(model, windows[0], windows[2])
    if place:
        raise ValueError(f"{path}: the numbers of this model are not finite from {place} on: there is nothing to probe")
    return Subject(model, *windows, f"{path}, {what}: {', '.join(c.routers)}; {n} sequences of {length} {words}")


def _tokens(config, has_bytes, ids, text, trained_on):
    """((ids, targets, domain), what they are in words). trained_on: the folder of a run, or None."""
    V, length = config.vocab_size, min(config.seq_len, LONGEST)
    if text is not None and (ids is not None or not has_bytes):
        raise ValueError(f"--text {text} goes neither with --ids nor where the {V} tokens are not bytes: leave it out")
    if ids is not None:
        return cut(read_ids(ids, V), length), f"ids of {ids}"
    if not has_bytes:
        drawn = np.random.default_rng(0).integers(0, V, SEQUENCES * length + 1)
        return cut(drawn, length), "random ids, weaker evidence than text (--ids FILE gives others)"
    split = config.seq_len  # on which the split depends where a text is short
    corpus = corpus_of(trained_on, split) if trained_on and text is None else load_corpus(text, split)
    return corpus.validation(2, length), "bytes of text"


def read_ids(path, vocab_size):
    """(n,) token ids of a file: a .npy array, or numbers as text. Raises ValueError unless they are from 0 to V - 1."""
    if not Path(path).is_file():
        raise ValueError(f"--ids {path} is not a file: check the path")
    try:
        ids = np.lib.format.open_memmap(path, mode="r") if str(path).endswith(".npy") else np.array(
            Path(path).read_text(encoding="utf-8").replace(",", " ").split(), dtype=np.int64)
        ids = ids.astype(np.int64, casting="safe").reshape(-1)
    except (ValueError, TypeError, EOFError, OverflowError):
        raise ValueError(f"--ids {path} must hold whole numbers: as text, or as a .npy array") from None
    if len(ids) < 6 or ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"--ids {path} must hold at least 6 numbers from 0 to {vocab_size - 1}")
    return ids


def cut(ids, length):
    """(ids, targets, None) of a stream of at least 5 ids: 2 to SEQUENCES windows (B, T), shorter if it is short."""
    length = min(length, (len(ids) - 1) // 2)
    n = min(SEQUENCES, (len(ids) - 1) // length) * length
    return ids[:n].reshape(-1, length), ids[1:n + 1].reshape(-1, length), None
