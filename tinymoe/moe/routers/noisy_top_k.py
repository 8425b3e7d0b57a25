"""Each token chooses its K experts by scores with learned noise."""

import numpy as np

from ...autograd import functional as F
from ...autograd.tensor import Tensor
from ...layers.nn import zeros
from ..routing import largest
from .top_k import TopK, noise_source


class NoisyTopK(TopK, name="noisy_top_k"):
    """Top-K of logits with learned Gaussian noise while training (Shazeer et al. 2017, eq. 3 to 5).

    H = x W + epsilon * (softplus(x W_noise) + 0.01), epsilon ~ N(0, 1). At evaluation there is no noise.
    Both weights start at zero. While training, the Routing carries the smooth load of appendix A, which is not defined
    with groups and is left out there. Raises ValueError when training without an rng.
    """

    paper = "Shazeer 2017"
    cost = "4 N D E"
    shapes = {"weight": "DE", "noise": "DE"}
    has_soft_load = True

    def __init__(self, d_model, n_experts, top_k, rng, dtype, router_std: float = 0.0,
                 renormalise: bool | None = None, jitter: float = 0.0, n_groups: int = 1,
                 group_limit: int | None = None):
        super().__init__(d_model, n_experts, top_k, rng, dtype, renormalise, router_std, jitter, n_groups, group_limit)
        self.noise = zeros((d_model, n_experts), dtype)

    def forward(self, x, context):
        x = self._jittered(x, context)
        clean = self.scores(x)
        if not context.training:
            return self._choose(clean, context)
        sigma = F.softplus(F.linear(x, self.noise)) + 0.01
        epsilon = noise_source(self, context).standard_normal(clean.shape).astype(clean.dtype)
        noisy = clean + epsilon * sigma
        return self._choose(noisy, context, self._soft_load(clean, noisy, sigma) if self.n_groups == 1 else None)

    def _soft_load(self, clean, noisy, sigma):
        """(E,): the sum over tokens of P(expert i is in the top K when its noise is drawn again), eq. 8 to 10."""
        n, n_experts = clean.shape
        if self.top_k == n_experts:
            return Tensor(np.full(n_experts, n, clean.dtype))
        order = np.argsort(-noisy.data, axis=-1, kind="stable")
        kth, next_best = order[:, self.top_k - 1:self.top_k], order[:, self.top_k:self.top_k + 1]
        # the K-th largest among the others: the (K+1)-th of all for those inside, the K-th for those outside
        rival = np.where(largest(noisy.data, self.top_k), next_best, kth)
        return F.normal_cdf((clean - F.gather(noisy, rival)) / sigma).sum(axis=0)
