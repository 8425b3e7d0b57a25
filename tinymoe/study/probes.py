"""Tests of what a router does to a model, as `python cli.py probe ROUTER` runs them on a briefly trained model.

Does a later token, or another sequence of the batch, change the output for an earlier one? Which terms of the loss
give the router a gradient? Has routing collapsed?
"""

from dataclasses import dataclass

import numpy as np

from ..autograd.tensor import no_grad
from ..model.transformer import Transformer
from ..moe import metrics
from ..moe.routers import greedy_assignment, shortfall, sinkhorn_plan
from ..moe.routing import largest
from ..training.evaluation import Validation, losses_and_routings
from ..training.plan import RunPlan
from ..training.trainer import Trainer


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
        chosen = [keep(r.mask().reshape(*ids.shape, -1)) for r in output.routings]
        return np.concatenate(chosen, axis=-1), keep(output.logits.data)

    (chosen, logits), (other_chosen, other_logits) = outcome(ids), outcome(other_ids)
    return Influence(float((chosen != other_chosen).any(axis=-1).mean()), float(np.abs(logits - other_logits).max()))


def causality(model, ids: np.ndarray, causal: bool = False, training: bool = False, domain=None) -> Influence:
    """The Influence of the second half of each sequence on its first half: none, where routing is causal.

    ids (B, T); their second halves become random tokens. training: route as a training step does, with the same noise
    both times. Attention is causal, so any change comes through the routers.
    """
    half, other = ids.shape[1] // 2, ids.copy()
    other[:, half:] = np.random.default_rng(0).integers(0, model.config.vocab_size, ids[:, half:].shape)
    return compared(model, ids, other, lambda x: x[:, :half], domain, causal=causal, training=training)


def batch_independence(model, ids: np.ndarray, domain=None) -> dict[str, Influence]:
    """The Influence of the other sequences on the first sequence of ids (B, T): dict of Influences.

    "alone": they are left out. "other neighbours": random tokens replace them.
    """
    other = ids.copy()
    other[1:] = np.random.default_rng(0).integers(0, model.config.vocab_size, ids[1:].shape)
    return {name: compared(model, ids, those, lambda x: x[0], domain)
            for name, those in (("alone", ids[:1]), ("other neighbours", other))}


def flattery(model, ids: np.ndarray, targets: np.ndarray, domain=None) -> float:
    """Loss routed on the prefix alone minus loss routed over the batch, in nats; 0 for a causal router."""
    domain = np.zeros(len(ids), int) if domain is None else domain
    valid = Validation(ids, targets, domain, names=("text",), batch_size=len(ids))
    leaky, causal = (losses_and_routings(model, valid, c)[0].mean(dtype=float) for c in (False, True))
    return float(causal - leaky)


def gradient_path(model, ids: np.ndarray, targets: np.ndarray, domain=None) -> dict[str, tuple]:
    """The gradient that each term of the loss gives to all routers' weights: dict term -> (coefficient, norm).

    The coefficient is the config's, or 1 where that is 0: what the term would do. A norm of 0.0 is exactly zero: the
    router learns nothing from the term.
    """
    terms = model.loss(ids, targets, training=True, rng=np.random.default_rng(0), domain=domain)
    coefficients = {**model.config.coefficients(), "multi_token": model.config.mtp_coef}
    weights = [p for layer in model.moe_parts() for p in layer.router.parameters().values() if p.requires_grad]
    norms = {}
    for name, term in {"cross_entropy": terms.cross_entropy, **terms.terms}.items():
        coefficient = coefficients.get(name) or 1.0  # neither the cross-entropy nor a penalty has one of its own
        _clear_gradients(model)
        if term.requires_grad:
            (coefficient * term).backward()
        squares = sum((p.grad.astype(float) ** 2).sum() for p in weights if p.grad is not None)
        norms[name] = coefficient, float(np.sqrt(squares))
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


def alarms(model, ids: np.ndarray, targets: np.ndarray, domain=None) -> list[str]:
    """Warnings about the model's layers, as sentences: dead or crowded experts, routers without a gradient."""
    model.loss(ids, targets, training=True, rng=np.random.default_rng(0), domain=domain).total.backward()
    layers = zip(model.config.moe_layers, model.moe_parts(), model.forward(ids, domain=domain).routings)
    return [warning for i, part, routing in layers
            for warning in metrics.alarms(i, routing.load, routing.n_tokens, part.router)]


def trained(config, corpus, steps, training):
    """A model after so many training steps; validation ids and targets (8, T) of all domains, and domains (8,)."""
    plan = RunPlan("probe", purpose="probe", seed=0, model=config, training=training)
    trainer = Trainer(Transformer(config), plan, corpus)
    for _ in range(steps):
        trainer.advance()
    return trainer.model, *corpus.validation(2, config.seq_len)
