"""Auxiliary losses of a router: scalar Tensors, pure functions of a layer's Routing and, for some, the LossContext.

`LOSSES` is the table that the model, the log and the probes read. The model takes the mean of a loss over MoE layers.
For a published sum over layers, multiply its coefficient by their number. The balance loss is 1 at balance for any K.
"""
# ruff: noqa: F401, I001  (the losses and equivalent_coefficient are public names of this package)

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...autograd.tensor import Tensor
from ..routing import Routing
from .conventions import equivalent_coefficient
from .further import communication_balance_loss, device_balance_loss, entropy_loss, global_balance_loss, policy_loss
from .further import running_share, sequence_balance_loss, similarity_loss
from .standard import importance_loss, load_balancing_loss, load_loss, z_loss


@dataclass(frozen=True)
class LossContext:
    """What a loss may read besides the routing.

    seq_len: T, the length of the batch's sequences. n_devices: devices that share the experts. max_devices: how many of
    these a token may reach. token_nats(): (N,), each token's cross-entropy, outside the graph. recent_share (E,):
    `running_share` of the steps before, over balance_batches; None where the layer keeps none.
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

    of(routing, context): a scalar Tensor, or None where this routing has no such loss. logged: computed, and so logged,
    even with a coefficient of 0. applies(router): whether a router, or its class, can have this loss.
    """

    meaning: str
    of: Callable[[Routing, LossContext], Tensor | None]
    logged: bool = False
    applies: Callable[[object], bool] = lambda router: True


# name -> Loss, in the order in which the model adds them. `--set losses.NAME=VALUE` trains with one. It is then logged,
# probed and reported.
LOSSES = {
    "balance": Loss("load balance (Switch); its coefficient is aux_coef", lambda r, c: load_balancing_loss(r), True),
    "z": Loss("router z-loss (ST-MoE)", lambda r, c: z_loss(r), True),
    "entropy": Loss("entropy of each token's probabilities (Huang 2024); 1e-4 by default for top_p",
                    lambda r, c: entropy_loss(r)),
    "similarity": Loss("the router's columns orthonormal (SimBal, Omi 2025)",
                       lambda r, c: similarity_loss(c.router.weight),
                       applies=lambda router: router.learned and router.shapes.get("weight") == "DE"),
    "importance": Loss("CV^2 of the experts' summed gates (Shazeer 2017)", lambda r, c: importance_loss(r)),
    "load": Loss("CV^2 of the smooth load of noisy_top_k (Shazeer 2017)",
                 lambda r, c: None if r.soft_load is None else load_loss(r),
                 applies=lambda router: router.has_soft_load),
    "sequence": Loss("load balance within each sequence (DeepSeek-V3)",
                     lambda r, c: sequence_balance_loss(r, c.seq_len)),
    "global_batch": Loss("load balance over many batches, see balance_batches (Qiu et al. 2025)", lambda r, c:
                   global_balance_loss(r, np.zeros(1) if c.recent_share is None else c.recent_share,
                                       c.balance_batches)),
    "device": Loss("load balance over devices (DeepSeek-V2)", lambda r, c: device_balance_loss(r, c.n_devices)),
    "communication": Loss("balance of what devices receive (DeepSeek-V2)",
                          lambda r, c: communication_balance_loss(r, c.n_devices, c.max_devices)),
    "policy": Loss("REINFORCE (Williams 1992), for routers that draw; coefficient 1 by default, and L for the exact "
                   "gradient of L layers", lambda r, c: policy_loss(r, c.token_nats()),
                   applies=lambda router: router.sampled),
}
