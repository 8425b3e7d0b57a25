"""An expert is drawn, and policy gradients teach the router."""

import numpy as np

from ...autograd import functional as F
from ...autograd.tensor import Tensor
from ..routing import from_mask, largest
from .base import LinearRouter
from .top_k import noise_source


class Reinforce(LinearRouter, name="reinforce"):
    """Top-1, learned by trial (REINFORCE, Williams 1992).

    While training an expert is drawn from softmax(x W); at evaluation the most probable one is taken. The gate is the
    constant 1, so the language-model loss gives the router no gradient. The loss "policy" does. Raises ValueError when
    training without an rng.
    """

    paper = "Williams 1992"
    top_1_only = True
    sampled = True
    losses = {"policy": 1.0}

    def forward(self, x, context):
        logits = self.scores(x)
        scores = logits.data
        if context.training:  # the largest of logit + Gumbel noise is a draw from the softmax
            scores = scores + noise_source(self, context).gumbel(size=scores.shape)
        return from_mask(largest(scores, 1), Tensor(np.ones_like(logits.data)), logits, F.softmax(logits))
