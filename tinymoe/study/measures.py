"""What an experiment measures in a trained model besides its validation row: measure(trainer) -> {name: number}."""

import string

import numpy as np

from ..autograd.functional import GATED
from ..autograd.tensor import Tensor, no_grad
from ..moe import devices, metrics
from ..moe.routing import from_mask, merge
from ..training.evaluation import by_domain, losses_and_routings
from .probes import compared, observed, rerouted
from .quantities import CHOICE_RULES, DEVICES

WINDOWS = 16  # of each domain
N_BATCHES = 16  # of which the noise of the gradient is measured
BANDWIDTH, FLOPS = 1e9, 1e11  # bytes and floating-point operations a second of one simulated device
CLASSES = ("lower case", "upper case", "digit", "space", "punctuation", "other")
CLASS_BYTES = string.ascii_lowercase, string.ascii_uppercase, string.digits, " \t\n\r", string.punctuation  # not other


def influence(trainer) -> dict[str, float]:
    """How the other windows of a batch (mates), and later bytes of the same window, change a window's output.

    The largest change of a logit and the share of bytes routed differently: means over the windows of one batch.
    """
    model, size = trainer.model, trainer.plan.training.batch_size
    valid = trainer.validation(max(4, -(-size // len(trainer.corpus.names))))
    ids, domain = valid.ids[:size], valid.domain[:size]
    noise = np.random.default_rng(0).integers(0, min(256, model.config.vocab_size), ids.shape)
    half = -(-ids.shape[1] // 2)
    late, found = np.arange(ids.shape[1]) >= half, []
    for w in range(len(ids)):
        this = np.arange(len(ids))[:, None] == w
        mates = compared(model, ids, np.where(this, ids, noise), lambda x, w=w: x[w], domain)
        later = compared(model, ids, np.where(this & late, noise, ids), lambda x, w=w: x[w, :half], domain)
        found.append((mates.logits, mates.tokens, later.logits, later.tokens))
    names = ("mates_logits", "mates_rerouted", "later_logits", "later_rerouted")
    return dict(zip(names, np.mean(found, axis=0).tolist()))


def traffic(trainer) -> dict[str, float]:
    """The traffic of one layer's forward pass for each number of devices that divides experts and tokens: means over
    layers and batches, of what quantities.py describes."""
    config, found = trainer.plan.model, {}
    _, by_layer = losses_and_routings(trainer.model, trainer.validation(WINDOWS), causal=False)
    routings = [routing for layer in by_layer for routing in layer]
    flops = 2 * config.d_model * config.expert_width * (3 if config.activation in GATED else 2)
    for n in (n for n in DEVICES if all(r.n_experts % n == r.n_tokens % n == 0 for r in routings)):
        parts = [devices.traffic(routing, n, config.d_model) for routing in routings]
        numbers = {"sent": [t.total_bytes / len(t.reach) for t in parts], "slowest": [t.slowest for t in parts],
                   "link": [t.largest_link / len(t.reach) for t in parts], "reach": [t.reach.mean() for t in parts],
                   "path": [1e6 * t.seconds(BANDWIDTH, FLOPS, flops) for t in parts]}
        found |= {f"{name}_{n}": float(np.mean(values)) for name, values in numbers.items()}
    return found


def by_rule(trainer) -> dict[str, float | None]:
    """Loss and load CV of the final validation windows under each rule of expert choice, of the same weights.

    None for models with another router.
    """
    model, valid = trainer.model, trainer.validation(trainer.plan.training.final_windows)
    routers = [layer.router for layer in model.moe_parts()]
    if not routers or not all(hasattr(router, "rule") for router in routers):
        return dict.fromkeys(f"{name}_by_{rule}" for rule in CHOICE_RULES for name in ("loss", "load_cv"))
    before, found = [router.rule for router in routers], {}
    try:
        for rule in CHOICE_RULES:
            for router in routers:
                router.rule = rule
            nats, by_layer = losses_and_routings(model, valid, causal=False)
            found[f"loss_by_{rule}"] = float(np.mean(list(by_domain(nats, valid).values())))
            found[f"load_cv_by_{rule}"] = float(np.mean([metrics.load_cv(merge(parts)) for parts in by_layer]))
    finally:
        for router, rule in zip(routers, before):
            router.rule = rule
    return found


def gradient_noise(trainer) -> dict[str, float | None]:
    """How noisy the routers' gradient on one batch is: its variance over batches, its squared mean, and the share of
    the variance in their sum. None for a router that does not learn.

    The gradient is that of the policy loss for a router that draws, elsewhere that of the cross-entropy.
    """
    c, model, rng = trainer.plan.training, trainer.model, np.random.default_rng([trainer.plan.seed, 3])
    weights = [getattr(layer.router, "weight", None) for layer in model.moe_parts()]
    seen = []
    if not weights or not all(w is not None and w.requires_grad for w in weights):
        return dict.fromkeys(("gradient_variance", "gradient_signal", "noise_share"))
    for _ in range(N_BATCHES):
        ids, targets, domain = trainer.corpus.labelled_batch(rng, c.batch_size, model.config.seq_len)
        terms = model.loss(ids, targets, training=True, rng=rng, domain=domain)
        trainer.optimizer.zero_grad()
        (terms.cross_entropy if terms.policy is None else terms.policy).backward()
        seen.append(np.concatenate([np.zeros(w.size) if w.grad is None else w.grad.ravel() for w in weights],
                                   dtype=float))
    trainer.optimizer.zero_grad()
    mean = np.mean(seen, axis=0)
    variance = ((seen - mean) ** 2).sum() / (N_BATCHES - 1)
    signal = max((mean**2).sum() - variance / N_BATCHES, 0.0)  # the squared mean of n batches is too large by this
    return {"gradient_variance": float(variance), "gradient_signal": float(signal),
            "noise_share": float(variance / (variance + signal)) if variance else 0.0}


def specialisation(trainer) -> dict:
    """How well experts predict a byte's class and position, how far their functions differ, and what changed
    routes cost: means over layers, and the tables of the last layer."""
    valid, model = trainer.validation(WINDOWS), trainer.model
    nats, by_layer = losses_and_routings(model, valid, causal=False)
    layers = [information(merge(routings), valid) for routings in by_layer]
    found = {name: float(np.mean([layer[name] for layer in layers])) for name in layers[0]}
    classes = metrics.label_load(merge(by_layer[-1]), byte_class(valid.ids).ravel(), len(CLASSES))
    return (found | bigram_classifier(trainer.corpus, valid) | divergence(trainer)
            | counterfactuals(model, valid, nats) | {"class_table": classes.tolist()})


def divergence(trainer) -> dict[str, float | None]:
    """`function_divergence`, the mean over layers of how far the experts' functions differ; None without experts."""
    valid = trainer.validation(WINDOWS)
    found = [function_divergence(layer, trainer.model, valid) for layer in trainer.model.moe_parts()
             if layer.experts.n_experts > 1]
    return {"function_divergence": float(np.mean(found)) if found else None}


def divergence_by_rule(trainer) -> dict[str, float | None]:
    """What `divergence` and `by_rule` measure."""
    return divergence(trainer) | by_rule(trainer)


def byte_class(ids):
    """Indices into CLASSES of bytes."""
    table = np.full(256, len(CLASS_BYTES))
    for i, letters in enumerate(CLASS_BYTES):
        table[list(letters.encode())] = i
    return table[ids]


def information(routing, valid):
    """I(expert; label) minus its mean under shuffled labels, for a byte's class and its position (in eighths of the
    window). Every validation row already has the byte's value and its domain."""
    n_windows, length = valid.ids.shape
    labels = {"class": byte_class(valid.ids).ravel(), "position": np.tile(np.arange(length) * 8 // length, n_windows)}
    rng = np.random.default_rng(0)
    return {f"{name}_information_excess": _above_chance(routing.mask(), label, rng) for name, label in labels.items()}


def _above_chance(counts, labels, rng):
    """Information minus null of labels (U,) and a table (U, E) of how often each unit has each expert."""
    n = int(labels.max()) + 1
    table = np.stack([counts[labels == i].sum(axis=0) for i in range(n)])
    return metrics.mutual_information(table) - metrics.shuffled_information(counts, labels, n, rng)


def bigram_classifier(corpus, valid):
    """How well a table of byte pairs, counted in the training text, predicts the domain of each validation byte: its
    information minus null, and its accuracy."""
    counts = np.stack([np.bincount(np.concatenate([_pairs(d.tokens[a:b].astype(int)) for a, b in d.train]),
                                   minlength=65536) + 1.0 for d in corpus.domains])
    guess = (counts / counts.sum(axis=1, keepdims=True)).argmax(axis=0)[_pairs(valid.ids)]  # (W, T - 1)
    by_window = np.stack([(guess == d).sum(axis=1) for d in range(len(counts))], axis=1)
    return {"bigram_information_excess": _above_chance(by_window, valid.domain, np.random.default_rng(0)),
            "bigram_accuracy": float((guess == valid.domain[:, None]).mean())}


def _pairs(ids):
    return ids[..., :-1] * 256 + ids[..., 1:]


def _change(of):
    """A change of routings: of((N, E) array) gives their new choices, and their new gates."""
    def change(routing, _):
        mask, gates = of(routing.mask()), of(routing.to_dense().data)
        return from_mask(mask.astype(bool), Tensor(gates.astype(routing.gate.dtype)), routing.logits, routing.probs)
    return change


def force(e):
    """A change: every token goes to expert e alone, with the sum of its gates."""
    return _change(lambda x: np.where(np.arange(x.shape[1]) == e, x.sum(axis=1, keepdims=True), 0))


def drop(e):
    """A change: no token goes to expert e."""
    return _change(lambda x: np.where(np.arange(x.shape[1]) == e, 0, x))


def swap(e):
    """A change: the tokens of expert e go to the next expert, and the reverse."""
    def of(x):
        order = np.arange(x.shape[1])
        other = (e + 1) % len(order)
        order[[e, other]] = other, e
        return x[:, order]
    return _change(of)


def counterfactuals(model, valid, nats):
    """By how much each change raises the loss, in nats a byte: means over experts and layers, the spread of one
    expert's cost over the domains, and for the last layer a table (E, domains)."""
    found = {}

    def costs(layer, change):
        with rerouted(change, layer):
            rise = losses_and_routings(model, valid, causal=False)[0] - nats
        return list(by_domain(rise, valid).values())

    for name, change in (("drop", drop), ("swap", swap), ("force", force)):
        tables = [[costs(layer, change(e)) for e in range(model.config.n_experts)] for layer in model.moe_parts()]
        found[f"{name}_cost"] = float(np.mean(tables))
        found[f"{name}_spread"] = float(np.std(tables, axis=2).mean())
        found[f"{name}_table"] = tables[-1]
    return found


def function_divergence(layer, model, valid):
    """Mean over pairs of experts of 1 - cosine of their outputs for the same tokens, those of the first batch."""
    with observed(layer) as seen, no_grad():
        model.forward(valid.ids[:valid.batch_size], domain=valid.domain[:valid.batch_size])
        _, x = seen[0]
        outputs = layer.experts.each(x).data.astype(float)  # (E, N, D)
    unit = outputs / np.maximum(np.linalg.norm(outputs, axis=2, keepdims=True), 1e-30)
    cosines = np.einsum("end,fnd->ef", unit, unit) / unit.shape[1]
    return float(1 - cosines[np.triu_indices(len(unit), 1)].mean())
