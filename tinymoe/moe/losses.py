"""Auxiliary losses of a router: pure functions of one layer's Routing, each a scalar Tensor.

`LOSSES` is the table that the model, the log and the probes read. Published codes scale the balance loss by K or by the
number of layers. Here it is 1 at perfect balance whatever K is, and the model takes the mean over layers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..autograd import functional as F
from ..autograd.tensor import Tensor
from .routing import Routing

# The factor, besides the coefficient, of a layer's sum over e of E f_e P_e, with f_e = n_e / (N K).
CONVENTIONS = {
    "tinymoe": lambda n_layers, top_k: 1 / n_layers,  # mean over layers
    "switch": lambda n_layers, top_k: top_k,  # f_e = n_e / N; a loss for each layer, summed
    "megatron": lambda n_layers, top_k: 1,  # a loss for each layer, summed
    "hf_mixtral": lambda n_layers, top_k: top_k / n_layers,  # f_e = n_e / N; tokens of all layers in one mean
    "deepseek": lambda n_layers, top_k: 1,  # a loss for each layer, summed
}


def equivalent_coefficient(coefficient: float, source: str, target: str, n_layers: int, top_k: float) -> float:
    """The coefficient of the balance loss that gives `target` the gradient that `coefficient` gives `source`.

    source, target: names in CONVENTIONS, else ValueError; n_layers: MoE layers. For "hf_mixtral", which pools the
    layers before the product, it is exact where all layers have the same load.
    """
    for unknown in {source, target} - CONVENTIONS.keys():
        raise ValueError(f"unknown convention {unknown!r}: choose one of {', '.join(CONVENTIONS)}")
    if not (n_layers > 0 and top_k > 0):
        raise ValueError(f"n_layers {n_layers} and top_k {top_k} must be above 0")
    return coefficient * CONVENTIONS[source](n_layers, top_k) / CONVENTIONS[target](n_layers, top_k)


def load_balancing_loss(routing: Routing) -> Tensor:
    """E * sum over e of f_e * P_e (Switch, Fedus et al. 2021, eq. 4 to 6; GShard).

    f_e is the share of the assignments that went to e, before any capacity limit, and has no gradient. P_e is the mean
    over tokens of `probs`, the full softmax. Equals 1 at perfect balance and E / K where everything goes to K experts
    with certainty. 1 is not a lower bound.
    """
    return _balance(routing.wanted, routing.probs.mean(axis=0))


def sequence_balance_loss(routing: Routing, seq_len: int) -> Tensor:
    """The mean over sequences of load_balancing_loss within each; 1 where all balance (DeepSeek-V3, eq. 17 to 20).

    DeepSeek-V3 counts the best K without the bias in f; here f counts the assignments made. The N tokens are whole
    sequences of seq_len. Assignments that a capacity limit dropped do not count.
    """
    by_sequence = -1, seq_len, routing.n_experts
    return _balance(routing.mask().reshape(by_sequence).sum(axis=1), routing.probs.reshape(by_sequence).mean(axis=1))


def global_balance_loss(routing: Routing, before: np.ndarray, batches: int) -> Tensor:
    """load_balancing_loss with f_e counted over many batches (Qiu et al. 2025, arXiv 2501.11873).

    The paper adds up the counts of a global batch, over devices and accumulation steps; P_e is of the part at hand.
    Here f_e is `running_share`, a mean over training steps, this one included. With batches = 1 it is
    load_balancing_loss. Only a mean load that is uneven is punished, so one batch may use experts of its own.
    """
    return _balance(running_share(routing, before, batches), routing.probs.mean(axis=0))


def running_share(routing: Routing, before: np.ndarray, batches: int) -> np.ndarray:
    """(E,): before + (the batch's share of assignments - before) / batches; the share alone where before is all 0."""
    share = routing.wanted / max(1, routing.wanted.sum())
    return before + (share - before) / batches if before.any() else share


def device_balance_loss(routing: Routing, n_devices: int) -> Tensor:
    """D * sum over devices of f_d * P_d (DeepSeek-V2, eq. 26 to 28); 1 at balance.

    Experts lie on n_devices devices in equal runs, else ValueError. f_d: the share of the assignments that go to
    device d, without gradient; P_d: the sum of P_e over its experts.
    """
    return _balance(_by_device(routing.wanted, n_devices).sum(axis=1), _device_probs(routing, n_devices))


def communication_balance_loss(routing: Routing, n_devices: int, max_devices: int) -> Tensor:
    """D / M * sum over devices of f_d * P_d (DeepSeek-V2, eq. 29 to 31); 1 at balance with M devices a token.

    f_d: the share of the tokens that are sent to device d, without gradient; M = max_devices, the devices that a
    token may reach. Tokens that a capacity limit kept from a device do not count.
    """
    sent, probs = _by_device(routing.mask().T, n_devices).any(axis=1), _device_probs(routing, n_devices)  # (D, N), (D,)
    return n_devices * ((sent.mean(axis=1) / max_devices).astype(probs.dtype) * probs).sum()


def _balance(counts, probs):
    """The mean over rows of E * sum of f * P, f being the shares of counts (..., E) and P the probs (..., E)."""
    share = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    return probs.shape[-1] * (share.astype(probs.dtype) * probs).sum(axis=-1).mean()


def _by_device(per_expert, n_devices):
    """(E, ...) -> (devices, E / devices, ...)"""
    if len(per_expert) % n_devices:
        raise ValueError(f"n_devices {n_devices} must divide n_experts {len(per_expert)}")
    return per_expert.reshape(n_devices, -1, *per_expert.shape[1:])


def _device_probs(routing, n_devices):
    return _by_device(routing.probs.mean(axis=0), n_devices).sum(axis=1)


def z_loss(routing: Routing) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2: keeps the logits small (ST-MoE, Zoph et al. 2022, eq. 5)."""
    return (F.logsumexp(routing.logits) ** 2).mean()


def entropy_loss(routing: Routing) -> Tensor:
    """Mean over tokens of -sum p ln p of `probs` = softmax(logits): a small one makes tokens sure of their experts.

    Dynamic K needs it (Huang et al. 2024, arXiv 2403.07652, which writes it for one token). For logits of other scores
    it is that of their softmax.
    """
    return -(F.softmax(routing.logits) * F.log_softmax(routing.logits)).sum(axis=-1).mean()


def similarity_loss(weight: Tensor) -> Tensor:
    """Sum of |R^T R - I| over its E x E entries, for a router's weight R (D, E) (SimBal, Omi et al. 2025, 2506.14038).

    0 where the columns are orthonormal; the logits then keep the angles between tokens. The paper also starts R there.
    """
    gram = weight.T @ weight - np.eye(weight.shape[1], dtype=weight.dtype)
    return (gram * np.sign(gram.data)).sum()


def importance_loss(routing: Routing) -> Tensor:
    """CV^2 of the column sums of the gates (Shazeer et al. 2017, eq. 6 and 7)."""
    return _cv_squared(F.scatter_add(routing.gate, routing.expert, routing.n_experts))


def load_loss(routing: Routing) -> Tensor:
    """CV^2 of the router's smooth load (Shazeer et al. 2017, eq. 11). ValueError for a routing without one."""
    if routing.soft_load is None:
        raise ValueError("load_loss needs Routing.soft_load, which only noisy_top_k gives, while training: "
                         "use load_balancing_loss with this router")
    return _cv_squared(routing.soft_load)


def policy_loss(routing: Routing, nats: np.ndarray) -> Tensor:
    """Mean over tokens of (cost - mean cost of the other tokens) * ln p(chosen expert) (REINFORCE, Williams 1992).

    nats (N,): the cross-entropy of each token's prediction. The routing must have one expert a token, drawn from its
    probs. The gradient is that of the expected cost where a draw changes the cost of its own token alone. A draw also
    reaches later tokens through attention; the loss leaves that out.
    """
    n = len(nats)
    advantage = (nats - nats.mean()) * n / max(1, n - 1)
    return (F.log_softmax(routing.logits) * (routing.mask() * advantage[:, None]).astype(nats.dtype)).sum() * (1 / n)


def _cv_squared(x):
    """Squared coefficient of variation: population variance / (mean^2 + 1e-10)."""
    mean = x.mean()
    return ((x - mean) ** 2).mean() / (mean ** 2 + 1e-10)


@dataclass(frozen=True)
class LossContext:
    """What a loss may read besides the routing.

    seq_len: T, the length of the batch's sequences. n_devices, max_devices: as in ModelConfig. token_nats(): (N,), the
    cross-entropy of each token, outside the graph. recent_share (E,): `running_share` of the steps before, over
    balance_batches; None where the layer keeps none.
    """

    router: object
    seq_len: int
    n_devices: int = 1
    max_devices: int = 1
    token_nats: Callable[[], np.ndarray] | None = None
    recent_share: np.ndarray | None = None
    balance_batches: int = 1


@dataclass(frozen=True)
class Loss:
    """One row of LOSSES.

    of(routing, context): a scalar Tensor, or None where the loss does not apply. logged: computed, and so logged, even
    with a coefficient of 0.
    """

    meaning: str
    of: Callable[[Routing, LossContext], Tensor | None]
    logged: bool = False


# name -> Loss, in the order in which the model adds them. `--set losses.NAME=VALUE` trains with one. It is then logged,
# probed and reported.
LOSSES = {
    "balance": Loss("load balance (Switch); its coefficient is aux_coef", lambda r, c: load_balancing_loss(r), True),
    "z": Loss("router z-loss (ST-MoE)", lambda r, c: z_loss(r), True),
    "entropy": Loss("entropy of each token's probabilities (Huang 2024); 1e-4 by default for top_p",
                    lambda r, c: entropy_loss(r)),
    "similarity": Loss("the router's columns orthonormal (SimBal, Omi 2025)", lambda r, c:
                       similarity_loss(c.router.weight) if c.router.shapes.get("weight") == "DE" else None),
    "importance": Loss("CV^2 of the experts' summed gates (Shazeer 2017)", lambda r, c: importance_loss(r)),
    "load": Loss("CV^2 of the smooth load of noisy_top_k (Shazeer 2017)",
                 lambda r, c: None if r.soft_load is None else load_loss(r)),
    "sequence": Loss("load balance within each sequence (DeepSeek-V3)",
                     lambda r, c: sequence_balance_loss(r, c.seq_len)),
    "global_batch": Loss("load balance over many batches, see balance_batches (Qiu et al. 2025)", lambda r, c:
                   global_balance_loss(r, np.zeros(1) if c.recent_share is None else c.recent_share,
                                       c.balance_batches)),
    "device": Loss("load balance over devices (DeepSeek-V2)", lambda r, c: device_balance_loss(r, c.n_devices)),
    "communication": Loss("balance of what devices receive (DeepSeek-V2)",
                          lambda r, c: communication_balance_loss(r, c.n_devices, c.max_devices)),
    "policy": Loss("REINFORCE, for routers that draw; 1 by default there (Williams 1992)",
                   lambda r, c: policy_loss(r, c.token_nats()) if c.router.sampled else None),
}
