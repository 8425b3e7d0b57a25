"""Evaluation: the loss of a model on validation windows, and the metrics of its routers there."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..autograd.tensor import no_grad
from ..files import printable
from ..model.transformer import token_nats
from ..moe import metrics
from ..moe.routers import RouteContext
from ..moe.routing import merge
from .identity import RunError

ROUTING_METRICS = ("load_cv", "max_violation", "load_entropy", "dead_experts", "router_entropy", "marginal_entropy",
            "drop_rate", "token_coverage")  # metrics of a row that need the routing alone
RECORDED = 2  # windows of each domain whose routings are saved at every evaluation
N_STRETCHES = 24  # into which the validation windows of a domain are cut, see losses_by_part


@dataclass(frozen=True)
class Validation:
    """Fixed windows: ids, targets (W, T), domain (W,) an index into names. Domains take turns, so batches mix them."""

    ids: np.ndarray
    targets: np.ndarray
    domain: np.ndarray
    names: Sequence[str]
    batch_size: int


def losses_and_routings(model, valid: Validation, causal: bool):
    """(nats (W, T), routings): the loss of each byte, and for each MoE layer the list of its Routings, one per batch.

    causal: decide each route on the prefix alone.
    """
    nats, by_batch = [], []
    with no_grad():
        for first in range(0, len(valid.ids), valid.batch_size):
            batch = slice(first, first + valid.batch_size)
            output = model.forward(valid.ids[batch], rng=np.random.default_rng([0, first]), causal=causal,
                                   domain=valid.domain[batch])
            nats.append(token_nats(output.logits, valid.targets[batch]))
            by_batch.append(output.routings)
    return np.concatenate(nats), list(map(list, zip(*by_batch)))


def evaluate(model, valid: Validation, initial_divergence):
    """(row, routings, nats): the validation part of a row in log.jsonl, ready for JSON; the routings that it describes;
    and the causal loss of each byte, (W, T).

    val_*: routed over the whole batch and with the capacity limit, as in training, but without its noise, draws and
    plans. causal_*: routed on the prefix alone, which is the number to quote for a language model; both are equal if
    every layer is causal. A loss is the mean over the domains, which training draws equally
    often, of the mean over their bytes. initial_divergence: of the weights, for each MoE layer.
    """
    nats, by_layer = losses_and_routings(model, valid, causal=False)
    causal_nats = nats if model.causal else losses_and_routings(model, valid, causal=True)[0]
    banks = [layer.experts for layer in model.moe_parts()]
    divergence = map(metrics.weight_divergence, banks, initial_divergence)
    row = {**_loss_numbers("val", nats, valid), **_loss_numbers("causal", causal_nats, valid),
           "validation_tokens": int(nats.size),
           "layers": [{"layer": i, "weight_divergence": value, **layer_numbers(routings, valid)}
                      for i, routings, value in zip(model.config.moe_layers, by_layer, divergence)]}
    return row, by_layer, causal_nats


def losses_by_part(nats, valid: Validation) -> dict:
    """{domain: losses}: the mean loss of N_STRETCHES equal stretches of the domain's validation windows, in order.

    Neighbouring windows are alike, so a bootstrap over the text draws stretches and not windows.
    """
    windows = [nats[valid.domain == d] for d in range(len(valid.names))]
    return {name: [round(float(part.mean(dtype=float)), 5) for part in np.array_split(those, N_STRETCHES) if len(part)]
            for name, those in zip(valid.names, windows)}


def snapshot(ids, domain, by_layer) -> dict:
    """Arrays that say how L MoE layers routed the N = W * T bytes of windows ids (W, T), domain (W,).

    by_layer: for each layer a list of Routings whose first N tokens are those of the windows.
    Returns ids (W, T) uint8; domain (W,) int32; probs, gates (L, N, E) float16; chosen (L, N, E) bool.
    """
    routings, n = [merge(parts) for parts in by_layer], ids.size
    return {"ids": ids.astype(np.uint8), "domain": domain.astype(np.int32),
            "probs": np.stack([r.probs.data[:n] for r in routings]).astype(np.float16),
            "chosen": np.stack([r.mask()[:n] for r in routings]),
            "gates": np.stack([r.to_dense().data[:n] for r in routings]).astype(np.float16)}


def first_choices(chosen, gates):
    """(...): the expert with the largest gate, of chosen and gates (..., E); -1 where none is chosen."""
    return np.where(chosen.any(axis=-1), np.where(chosen, gates, -np.inf).argmax(axis=-1), -1)


def first_windows(valid: Validation, by_layer) -> dict:
    """The `snapshot` of the first RECORDED windows of each domain; {} for a dense model."""
    n = min(RECORDED * len(valid.names), len(valid.ids))
    first = [routings[:math.ceil(n / valid.batch_size)] for routings in by_layer]
    return snapshot(valid.ids[:n], valid.domain[:n], first) if first else {}


def by_domain(nats, valid: Validation) -> dict[str, float]:
    """{domain: mean of nats (W, T) over its windows}."""
    return {name: float(nats[valid.domain == d].mean(dtype=float)) for d, name in enumerate(valid.names)}


def _loss_numbers(prefix, nats, valid):
    means = by_domain(nats, valid)
    mean = float(np.mean(list(means.values())))
    return {f"{prefix}_cross_entropy": mean, f"{prefix}_perplexity": float(np.exp(mean)),
            f"{prefix}_bits_per_byte": float(mean / np.log(2)), f"{prefix}_by_domain": means}


def layer_numbers(routings, valid: Validation) -> dict:
    """The routing metrics of one MoE layer, from its Routings of the validation batches."""
    routing = merge(routings)
    return {"load": routing.load.tolist(), **{name: getattr(metrics, name)(routing) for name in ROUTING_METRICS},
            "max_violation_batch": float(np.mean([metrics.max_violation(r) for r in routings])),
            "repetition": metrics.repetition(routing, valid.ids.shape[1]), **_information(routing, valid)}


def _information(routing, valid):
    """I(expert; domain) and I(expert; byte), each with its mean under shuffled labels; and each given the other label.

    Domains are shuffled over windows, because all bytes of a window share one; bytes are shuffled over tokens.
    """
    mask, n_domains = routing.mask(), len(valid.names)
    by_window = mask.reshape(*valid.ids.shape, -1).sum(axis=1)
    domains = np.repeat(valid.domain, valid.ids.shape[1])
    domain_load = metrics.label_load(routing, domains, n_domains)
    bytes_, rng = valid.ids.reshape(-1), np.random.default_rng(0)
    n_bytes = int(bytes_.max()) + 1
    return {"domain_load": domain_load.tolist(),
            "mutual_information": metrics.mutual_information(domain_load),
            "mutual_information_null": metrics.shuffled_information(by_window, valid.domain, n_domains, rng),
            "byte_information": metrics.mutual_information(metrics.label_load(routing, bytes_, n_bytes)),
            "byte_information_null": metrics.shuffled_information(mask, bytes_, n_bytes, rng),
            **metrics.information_given(routing, valid.ids, valid.domain, rng)}


def first_nonfinite(model, ids: np.ndarray, domain: np.ndarray | None = None) -> str | None:
    """The first place where a forward pass over ids (B, T) is not finite, such as "layer 3"; None if all of it is."""
    places = {f"parameter {name}": p for name, p in model.parameters().items()}
    with no_grad():
        x, context = model.embed(ids), RouteContext(np.asarray(ids), domain=domain)
        for i, block in enumerate(model.blocks):
            x, _ = block(x, context)
            places[f"layer {i}"] = x
        places["the head"] = model.read_out(x)
    return next((place for place, x in places.items() if not np.isfinite(x.data).all()), None)


def measured(measure, trainer, final) -> dict:
    """What the `measure` of an experiment returns of a trained model, besides the numbers in its row `final`.

    Raises RunError where it fails, or where that is not a dict that JSON takes or has a name of `final`.
    """
    known = {*final, *(name for layer in final["layers"] for name in layer)}
    name = None
    try:
        found = dict(measure(trainer))
        for name, part in found.items():
            json.dumps({name: part}, allow_nan=False)
            if name in known:
                raise ValueError("every run has a number of this name")
        return found
    except SystemError:  # Ctrl-C in compiled code
        raise
    except Exception as error:
        what = "" if name is None else f" at {name!r:.80}, {found[name]!r:.80}"
        raise RunError(printable(f"measure failed{what} ({type(error).__name__}: {error!s:.200}): it must return a "
                                 "dict that JSON takes, without NaN or inf: correct it and start again")) from None
