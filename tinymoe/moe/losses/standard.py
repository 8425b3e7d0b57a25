"""The classic losses: load balance (Switch), z-loss (ST-MoE), importance and load (Shazeer)."""

import numpy as np

from ...autograd import functional as F
from ...autograd.tensor import Tensor
from ..routing import Routing


def load_balancing_loss(routing: Routing) -> Tensor:
    """E * sum over e of f_e * P_e (Switch, Fedus et al. 2021, eq. 4 to 6; in GShard f counts first choices alone).

    f_e is the share of the assignments that went to e, before any capacity limit, and has no gradient. P_e is the mean
    over tokens of `probs`. Equals 1 at perfect balance and E / K where everything goes to K experts
    with certainty. It can fall below 1: f counts choices and P averages probabilities, and an expert that is chosen
    often may have a small mean probability.
    """
    return balance(routing.demand, routing.probs.mean(axis=0))


def balance(counts, probs):
    """The mean over rows of E * sum of f * P, f being the shares of counts (..., E) and P the probs (..., E)."""
    share = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    return probs.shape[-1] * (share.astype(probs.dtype) * probs).sum(axis=-1).mean()


def z_loss(routing: Routing) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2: keeps the logits small (ST-MoE, Zoph et al. 2022, eq. 5)."""
    return (F.logsumexp(routing.logits) ** 2).mean()


def importance_loss(routing: Routing) -> Tensor:
    """CV^2 of the column sums of the gates (Shazeer et al. 2017, eq. 6 and 7); those that were dropped do not count."""
    return _cv_squared(F.scatter_add(routing.gate, routing.expert, routing.n_experts))


def load_loss(routing: Routing) -> Tensor:
    """CV^2 of the router's smooth load (Shazeer et al. 2017, eq. 11). ValueError for a routing without one."""
    if routing.soft_load is None:
        raise ValueError("load_loss needs Routing.soft_load, which only noisy_top_k gives, while training: "
                         "use load_balancing_loss with this router")
    return _cv_squared(routing.soft_load)


def _cv_squared(x):
    """Squared coefficient of variation: population variance / (mean^2 + 1e-10)."""
    mean = x.mean()
    return ((x - mean) ** 2).mean() / (mean ** 2 + 1e-10)
