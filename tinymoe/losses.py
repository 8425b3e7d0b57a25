"""Auxiliary losses of a router: pure functions of one layer's Routing, each a scalar Tensor.

Published codes scale the balance loss differently (by K, or by the number of layers). Here it is 1
at perfect balance whatever K is, one value for each layer; the model takes the mean over layers.
"""

from . import functional as F


def load_balancing_loss(routing):
    """E * sum over e of f_e * P_e (Switch, Fedus et al. 2021, eq. 4 to 6; GShard).

    f_e is the share of the assignments that went to e, before any capacity limit, and has no
    gradient; P_e is the mean over tokens of the full softmax. Equals 1 at perfect balance and E where
    everything goes to one expert with certainty. 1 is not a lower bound.
    """
    demand = routing.load if routing.demand is None else routing.demand
    share = (demand / max(demand.sum(), 1)).astype(routing.probs.dtype)
    return routing.n_experts * (share * routing.probs.mean(axis=0)).sum()


def z_loss(routing):
    """Mean over tokens of logsumexp(logits)^2: keeps the logits small (ST-MoE, Zoph et al. 2022, eq. 5)."""
    return (F.logsumexp(routing.logits) ** 2).mean()


def importance_loss(routing):
    """CV^2 of the column sums of the gates (Shazeer et al. 2017, eq. 6 and 7)."""
    return _cv_squared(F.scatter_add(routing.gate, routing.expert, routing.n_experts))


def load_loss(routing):
    """CV^2 of the router's smooth load (Shazeer et al. 2017, eq. 11).

    Raises ValueError for a routing without one: only noisy_top_k makes it, while training.
    """
    if routing.soft_load is None:
        raise ValueError("load_loss needs Routing.soft_load, which only noisy_top_k gives, while training: "
                         "use load_balancing_loss with this router")
    return _cv_squared(routing.soft_load)


def _cv_squared(x):
    """Squared coefficient of variation: population variance / (mean^2 + 1e-10)."""
    mean = x.mean()
    return ((x - mean) ** 2).mean() / (mean ** 2 + 1e-10)
