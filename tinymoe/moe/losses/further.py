"""Further losses: balance by sequence, by device and over batches; entropy, similarity, and policy gradients."""

import numpy as np

from ...autograd import functional as F
from ...autograd.tensor import Tensor
from ..routing import Routing
from .standard import balance


def sequence_balance_loss(routing: Routing, seq_len: int) -> Tensor:
    """The mean over sequences of load_balancing_loss within each; 1 where each is balanced (DeepSeek-V3, eq. 17 to 20).

    DeepSeek-V3 counts the best K without the bias in f; here f counts the assignments made. The N tokens are whole
    sequences of seq_len. Assignments that a capacity limit dropped do not count.
    """
    by_sequence = -1, seq_len, routing.n_experts
    return balance(routing.mask().reshape(by_sequence).sum(axis=1), routing.probs.reshape(by_sequence).mean(axis=1))


def global_balance_loss(routing: Routing, before: np.ndarray, batches: int) -> Tensor:
    """load_balancing_loss with f_e counted over many batches (Qiu et al. 2025, arXiv 2501.11873).

    The paper adds up the counts of a global batch, over devices and accumulation steps; P_e is the mean over one
    micro-batch. Here f_e is `running_share`, a mean over training steps, this one included. With batches = 1 it is
    load_balancing_loss, if the batch has an assignment. Only a mean load that is uneven is punished, so one batch may
    use experts of its own.
    """
    return balance(running_share(routing, before, batches), routing.probs.mean(axis=0))


def running_share(routing: Routing, before: np.ndarray, batches: int) -> np.ndarray:
    """(E,): before + (the batch's share of assignments - before) / batches; the share alone where before is all 0.

    A batch without an assignment has no share, and leaves it as it was.
    """
    if not routing.demand.any():
        return before
    share = routing.demand / routing.demand.sum()
    return before + (share - before) / batches if before.any() else share


def device_balance_loss(routing: Routing, n_devices: int) -> Tensor:
    """n_devices * sum over devices of f_d * P_d (DeepSeek-V2, eq. 26 to 28); 1 at balance.

    Experts lie on n_devices devices in equal runs, else ValueError. f_d: the share of the assignments that go to
    device d, without gradient; P_d: the sum of P_e over its experts. Both are of the batch, the paper's of a sequence.
    """
    return balance(_by_device(routing.demand, n_devices).sum(axis=1), _device_probs(routing, n_devices))


def communication_balance_loss(routing: Routing, n_devices: int, max_devices: int) -> Tensor:
    """n_devices / M * sum over devices of f_d * P_d (DeepSeek-V2, eq. 29 to 31); 1 at balance with M devices a token.

    f_d: the share of the tokens that are sent to device d, without gradient; M = max_devices, the devices that a
    token may reach. Tokens that a capacity limit kept from a device do not count. The paper's f_d and P_d are of a
    sequence, not of the batch.
    """
    sent, probs = _by_device(routing.mask().T, n_devices).any(axis=1), _device_probs(routing, n_devices)
    # sent: (devices, N), probs: (devices,)
    return n_devices * ((sent.mean(axis=1) / max_devices).astype(probs.dtype) * probs).sum()


def _by_device(per_expert, n_devices):
    """(E, ...) -> (devices, E / devices, ...)"""
    if n_devices < 1 or len(per_expert) % n_devices:
        raise ValueError(f"n_devices {n_devices} must be at least 1 and divide n_experts {len(per_expert)}")
    return per_expert.reshape(n_devices, -1, *per_expert.shape[1:])


def _device_probs(routing, n_devices):
    return _by_device(routing.probs.mean(axis=0), n_devices).sum(axis=1)


def entropy_loss(routing: Routing) -> Tensor:
    """Mean over tokens of -sum p ln p of `probs` = softmax(logits): a small one makes tokens sure of their experts.

    Dynamic K needs it (Huang et al. 2024, arXiv 2403.07652, which writes it for one token). For routers whose
    probs are no softmax, such as sigmoid_bias, it is the entropy of softmax(logits) too.
    """
    p = F.softmax(routing.logits)
    return -(p * F.where(p.data > 0, F.log_softmax(routing.logits), 0.0)).sum(axis=-1).mean()  # 0 ln 0 is 0


def similarity_loss(weight: Tensor) -> Tensor:
    """Sum of |R^T R - I| over its E x E entries, for a router's weight R (D, E) (SimBal, Omi et al. 2025, 2506.14038).

    0 where the columns are orthonormal; the logits then keep the angles between tokens. The paper also starts R there.
    """
    return abs(weight.T @ weight - np.eye(weight.shape[1], dtype=weight.dtype)).sum()


def policy_loss(routing: Routing, nats: np.ndarray) -> Tensor:
    """Mean over tokens of (cost - mean cost of the other tokens) * ln p(chosen expert) (REINFORCE, Williams 1992).

    nats (N,): the cross-entropy of each token's prediction. The routing must have one expert a token, drawn from its
    probs. The gradient is that of the expected cost where a draw changes the cost of its own token alone. A draw also
    reaches later tokens through attention; the loss leaves that out. Draws that a capacity limit dropped do not count.
    The model takes the mean over its L layers that draw: a coefficient of L gives this gradient, 1 gives 1 / L of it.
    """
    n = len(nats)
    advantage = (nats - nats.mean()) * n / max(1, n - 1)
    chosen = F.where(routing.mask(), F.log_softmax(routing.logits), 0.0)  # (N, E)
    return (chosen * advantage[:, None].astype(nats.dtype)).sum() * (1 / n)
