"""Metrics of a routing: pure functions of a Routing (or of its load), of labels and of weights."""

import math

import numpy as np
from scipy.special import entr, rel_entr

from .experts import ExpertBank
from .routing import Routing

DEAD_SHARE = 0.01  # an expert is dead below this share of its fair share
N_SHUFFLES, FEW_SHUFFLES = 20, 4  # few: where each shuffle is of all bytes, and takes as long as a step

Load = Routing | np.ndarray | list  # a Routing, or its load (E,); all else is a ValueError


def _load(x: Load) -> np.ndarray:
    try:
        load = np.asarray(x.load if isinstance(x, Routing) else x, dtype=float)
    except (TypeError, ValueError):  # a list of Routings, or rows of several lengths
        load = np.empty(())
    if load.ndim != 1 or not load.size or not ((load >= 0) & (load < np.inf)).all():
        raise ValueError("a load is (E,) counts of at least 0, or one Routing, not "
                         f"{' '.join(repr(x).split())[:60]}: give one layer at a time")
    return load


def load_cv(routing: Load) -> float:
    """std / mean of the load: 0 at balance or without any assignment, sqrt(E - 1) where one expert has all."""
    load = _load(routing)
    return float(load.std() / load.mean()) if load.any() else 0.0


def max_violation(routing: Load) -> float:
    """MaxVio, max / mean - 1: 0 at balance, E - 1 where one expert has all (Wang et al. 2024)."""
    load = _load(routing)
    return float(load.max() / load.mean() - 1) if load.any() else 0.0


def load_entropy(routing: Load) -> float:
    """Entropy of the load divided by ln E: 1 at balance, 0 where one expert has all; 1 too for E = 1 or no load."""
    load = _load(routing)
    return float(entropy(load / load.sum()) / np.log(len(load))) if len(load) > 1 and load.any() else 1.0


def dead_experts(routing: Load) -> int:
    """How many experts have less than 1% of their fair share A / E."""
    load = _load(routing)
    return int((load < DEAD_SHARE * load.mean()).sum()) if load.any() else len(load)


def router_entropy(routing: Routing) -> float:
    """Mean over tokens of the entropy of the router's probabilities, in nats: ln E where all are equally probable."""
    return float(entropy(routing.probs.data.astype(float)).mean())


def marginal_entropy(routing: Routing) -> float:
    """Entropy of the mean probabilities, in nats: ln E where experts are equally probable on average."""
    return float(entropy(routing.probs.data.mean(axis=0, dtype=float)))


def drop_rate(routing: Routing) -> float:
    """Share of the assignments that a capacity limit removed."""
    return routing.n_dropped / max(1, len(routing.token) + routing.n_dropped)


def token_coverage(routing: Routing) -> float:
    """Share of the tokens that have at least one expert; `Routing.coverage` counts the experts of each token."""
    return float((routing.coverage > 0).mean())


def repetition(routing: Routing, seq_len: int) -> float:
    """Share of the assignments whose expert also serves the next token of the sequence; chance is about K / E.

    The routing's tokens are whole sequences of seq_len, one after the other.
    """
    chosen = routing.mask().reshape(-1, seq_len, routing.n_experts)
    kept = (chosen[:, :-1] & chosen[:, 1:]).sum()
    return float(kept / max(1, chosen[:, :-1].sum()))


def saturation(masks_then: np.ndarray, masks_final: np.ndarray) -> float:
    """Share of the tokens' final experts that they already had at an earlier step; chance is K / E.

    masks (..., E) bool of the same tokens at the two steps, as Routing.mask() gives them (OLMoE, Muennighoff et al.
    2024, section 5.1). Without any final assignment it is 0.
    """
    return float((masks_then & masks_final).sum() / max(1, masks_final.sum()))


def co_activation(routing: Routing) -> np.ndarray:
    """(E, E): the share of expert i's tokens that expert j serves too, N_ij / N_i (OLMoE, section 5.2).

    The diagonal is 1, and the row of an expert without tokens 0.
    """
    mask = routing.mask().astype(float)
    return mask.T @ mask / np.maximum(routing.load, 1)[:, None]


def weight_divergence(bank: ExpertBank, initial: float | None = None) -> float:
    """Mean over pairs of experts of 1 - cosine of their weights (w1 and w2 as one vector).

    initial: the value at initialisation, by which the result is divided: random experts are already nearly orthogonal.
    Experts that start as copies of one layer start at 0 up to rounding; for them the raw number is returned.
    """
    e = bank.n_experts
    if e == 1:
        return 0.0
    flat = np.concatenate([bank.w1.data.reshape(e, -1), bank.w2.data.reshape(e, -1)], axis=1).astype(float)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    divergence = float(1 - (unit @ unit.T)[np.triu_indices(e, 1)].mean())
    return divergence / initial if initial and initial > 1e-6 else divergence


def effective_experts(routing: Load) -> float:
    """exp(entropy of the load): E for equal loads, 1 where one expert serves all, 0 without any assignment."""
    load = _load(routing)
    return len(load) ** load_entropy(load) if load.any() else 0.0


def alarms(layer: int, load: np.ndarray, n_tokens: int, router) -> list[str]:
    """Warnings about one MoE layer, as sentences: dead experts, an expert with far too many tokens, no gradient.

    Far too many: over half of the tokens, and over 1.5 times the mean load. layer: its number. load (E,): of n_tokens
    tokens. router: after a backward pass, or None before the first.
    """
    warnings, load = [], np.asarray(load)
    dead = dead_experts(load)
    if dead:
        warnings.append(f"layer {layer}: {dead} of {len(load)} experts dead (under 1% of their fair share)")
    if load.max() > 0.5 * n_tokens and load.max() > 1.5 * load.mean():
        warnings.append(f"layer {layer}: expert {load.argmax()} serves {load.max() / n_tokens:.0%} of the tokens")
    learning = [p for p in router.parameters().values() if p.requires_grad] if router else []
    if learning and not any(p.grad is not None and p.grad.any() for p in learning):
        warnings.append(f"layer {layer}: the router's gradient is exactly zero")
    return warnings


def label_load(routing: Routing, labels: np.ndarray, n_labels: int) -> np.ndarray:
    """(n_labels, E) counts: assignments of the tokens with each label (N,) to each expert."""
    place = np.asarray(labels, int)[routing.token] * routing.n_experts + routing.expert
    return np.bincount(place, minlength=n_labels * routing.n_experts).reshape(n_labels, -1)


def mutual_information(counts: np.ndarray) -> float:
    """I(row; column) of a table of n counts, in nats; too large by about (rows - 1)(columns - 1) / 2n."""
    joint = counts / max(1, counts.sum())
    return float(rel_entr(joint, joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)).sum())


def shuffled_information(counts_by_unit: np.ndarray, labels: np.ndarray, n_labels: int, rng: np.random.Generator,
                         n_shuffles: int = N_SHUFFLES) -> float:
    """Mean mutual information between experts and labels (U,) that are shuffled over units: the value of chance.

    counts_by_unit: (U, E) assignments of each unit (a window, or a token) to each expert.
    """
    unit, expert = np.nonzero(counts_by_unit)
    counts = counts_by_unit[unit, expert]
    labels, n_experts, found = np.asarray(labels, int), counts_by_unit.shape[1], []
    for _ in range(n_shuffles):
        place = rng.permutation(labels)[unit] * n_experts + expert
        table = np.bincount(place, weights=counts, minlength=n_labels * n_experts)
        found.append(mutual_information(table.reshape(n_labels, n_experts)))
    return float(np.mean(found))


def information_given(routing: Routing, ids: np.ndarray, domain: np.ndarray, rng: np.random.Generator) -> dict:
    """What the experts say about a byte beyond its domain, and about the domain beyond the byte: four numbers.

    ids (W, T): the bytes of the routing's tokens; domain (W,): the domain of each window. X, Y and e are byte, domain
    and expert of an assignment. `byte_given_domain` is I(e; X | Y) = I(e; X, Y) - I(e; Y), and `domain_given_byte` is
    I(e; Y | X), in nats, each minus its mean under shuffled labels, which is what an estimate from counts finds by
    chance: bytes shuffled within their domain, domains over windows. Both leave the subtracted term as it is. Domains
    that are shuffled lose their link to the bytes too, so that null is too large: with 8 windows a domain
    `domain_given_byte` is too low by 0.02 to 0.035 nats, with 64 by 0.01, with 1,000 by 0.001. It is further
    off the more the experts say about the domain: by 0.12 nats with 16 windows where the route is the domain.

    `byte_known` and `domain_known` are the same as a share of what could be known, min(H(X | Y), c) and
    min(H(Y | X), c). The ceiling c is what the experts could carry, whatever the text: ln E less the mean over
    assignments of ln(experts of the token), so ln(E / K) where each token has K. For I(e; X | Y) <= H(e) - H(e | token)
    and, given its token, the expert of an assignment is one of the token's experts, each equally likely. A share is 0
    where nothing could be known.
    """
    domains, ids = np.repeat(domain, ids.shape[1]), ids.reshape(-1)
    n_bytes, n_domains = int(ids.max()) + 1, int(domain.max()) + 1

    def joint(bytes_, of_token):
        return label_load(routing, of_token * n_bytes + bytes_, n_domains * n_bytes)

    def shuffled_within():
        mixed = ids.copy()
        for d in range(n_domains):
            here = domains == d
            mixed[here] = rng.permutation(ids[here])
        return mixed

    table = joint(ids, domains)
    found = mutual_information(table)
    chance = {"byte": [joint(shuffled_within(), domains) for _ in range(FEW_SHUFFLES)],
              "domain": [joint(ids, np.repeat(rng.permutation(domain), len(ids) // len(domain)))
                         for _ in range(FEW_SHUFFLES)]}
    nats = {name: found - float(np.mean(list(map(mutual_information, those)))) for name, those in chance.items()}
    labels = table.sum(axis=1).reshape(n_domains, n_bytes) / max(1, table.sum())
    of_both, of_domain, of_byte = (float(entropy(p.reshape(-1))) for p in (labels, labels.sum(1), labels.sum(0)))
    ceiling = math.log(routing.n_experts) - float(np.log(routing.coverage[routing.token]).sum()) / max(1, table.sum())

    def share(name, uncertain):
        most = min(uncertain, ceiling)
        return nats[name] / most if most > 1e-9 else 0.0

    return {"byte_given_domain": nats["byte"], "domain_given_byte": nats["domain"],
            "byte_known": share("byte", of_both - of_domain), "domain_known": share("domain", of_both - of_byte)}


def entropy(p: np.ndarray) -> np.ndarray:
    """-sum p ln p over the last axis of p, in nats, with 0 ln 0 = 0."""
    return entr(p).sum(axis=-1)
