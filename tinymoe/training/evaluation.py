"""One row of numbers about a model on the validation set: its loss, and what its routers do."""

from dataclasses import dataclass

import numpy as np

from ..autograd import functional as F
from ..moe import metrics
from ..moe.routing import merge
from ..autograd.tensor import no_grad


@dataclass(frozen=True)
class Validation:
    """Fixed windows. ids, targets (W, T); domain (W,) indices into names, interleaved so that batches mix them."""

    ids: np.ndarray
    targets: np.ndarray
    domain: np.ndarray
    names: tuple
    batch_size: int


def losses_and_routings(model, valid, causal):
    """(nats (W, T) of each byte, one list of batch Routings for each MoE layer)."""
    nats, by_layer = [], [[] for _ in model.config.moe_layers]
    with no_grad():
        for start in range(0, len(valid.ids), valid.batch_size):
            batch = slice(start, start + valid.batch_size)
            output = model.forward(valid.ids[batch], rng=np.random.default_rng([0, start]), causal=causal)
            log_probs = F.log_softmax(output.logits)
            nats.append(-F.gather(log_probs, valid.targets[batch][..., None]).data[..., 0])
            for layer, routing in zip(by_layer, output.routings):
                layer.append(routing)
    return np.concatenate(nats), by_layer


def evaluate(model, valid, initial_divergence, on_routings=lambda by_layer: None):
    """A JSON-able dict: the validation part of a row in log.jsonl.

    val_*: routing as in training. causal_*: routing decided on the prefix alone, the number that a
    language model may quote; the two are equal where every layer is causal.
    initial_divergence: weight divergence of each MoE layer at initialisation. on_routings(by_layer) is given the
    routings that val_* and the layers' numbers were measured on.
    """
    nats, by_layer = losses_and_routings(model, valid, causal=False)
    on_routings(by_layer)
    causal_nats = nats if model.causal else losses_and_routings(model, valid, causal=True)[0]
    divergence = map(metrics.weight_divergence, model.expert_banks(), initial_divergence)
    return {**_loss_numbers("val", nats, valid), **_loss_numbers("causal", causal_nats, valid),
            "validation_tokens": int(nats.size),
            "layers": [{"layer": i, "weight_divergence": value, **layer_numbers(routings, valid)}
                       for i, routings, value in zip(model.config.moe_layers, by_layer, divergence)]}


def snapshot(ids, domain, by_layer):
    """What tinymoe/view.py shows of windows ids (W, T), domain (W,): N = W * T bytes in each of L MoE layers.

    by_layer: a list of batch Routings for each layer, whose first N tokens are the windows'.
    Returns arrays: ids and domain as bytes; probs, gates (L, N, E) float16; chosen (L, N, E) bool.
    """
    wholes = [merge(routings) for routings in by_layer]

    def first(array_of, dtype):
        return np.stack([array_of(whole)[:ids.size] for whole in wholes]).astype(dtype)

    return {"ids": ids.astype(np.uint8), "domain": domain.astype(np.uint8),
            "probs": first(lambda r: r.probs.data, np.float16), "chosen": first(lambda r: r.mask(), bool),
            "gates": first(lambda r: r.to_dense().data, np.float16)}


def _loss_numbers(prefix, nats, valid):
    mean = float(nats.mean(dtype=float))
    by_domain = {name: float(nats[valid.domain == d].mean(dtype=float)) for d, name in enumerate(valid.names)}
    return {f"{prefix}_cross_entropy": mean, f"{prefix}_perplexity": float(np.exp(mean)),
            f"{prefix}_bits_per_byte": float(mean / np.log(2)), f"{prefix}_by_domain": by_domain}


def layer_numbers(routings, valid):
    """The routing metrics of one layer, from its Routings on the batches of the validation set."""
    whole = merge(routings)

    def measured(*names):
        return {name: getattr(metrics, name)(whole) for name in names}

    return {"load": whole.load.tolist(), **measured("load_cv", "max_violation"),
            "max_violation_batch": float(np.mean([metrics.max_violation(r) for r in routings])),
            **measured("load_entropy", "dead_experts", "router_entropy", "marginal_entropy", "drop_rate",
                       "token_coverage"),
            "repetition": metrics.repetition(whole, valid.ids.shape[1]), **_information(whole, valid)}


def _information(routing, valid):
    """I(expert; domain) and I(expert; byte), each with its mean under shuffled labels.

    Domains are shuffled over windows, since all bytes of a window share one; bytes over tokens.
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
            "byte_information_null": metrics.shuffled_information(mask, bytes_, n_bytes, rng)}
