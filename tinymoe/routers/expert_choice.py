"""Each expert chooses its tokens."""

import numpy as np

from .. import functional as F
from ..routing import capacity, from_mask
from .base import LinearRouter, largest


class ExpertChoice(LinearRouter, name="expert_choice"):
    """Each expert takes the C = N * K / E tokens of largest probability (Zhou et al. 2022, eq. 1 to 3).

    K is the mean number of experts a token gets (the paper's c) and may be a fraction; a token may
    get none. Gates are the softmax over experts, not renormalised. Load is equal by construction,
    but a token's route depends on later tokens and on its neighbours in the batch. With
    context.causal, a token is taken by an expert where it is among the best ceil(n * K / E) of the
    n tokens of its own sequence so far.
    """

    paper = "Zhou 2022"
    chooses = "expert"
    balanced = "yes"
    causal = causal_training = False
    mean_k = True

    def forward(self, x, context):
        logits = self.scores(x)
        probs = F.softmax(logits)
        chosen = self._prefix_choice(probs.data, context) if context.causal else self._batch_choice(probs.data)
        return from_mask(chosen, probs, logits, probs)

    def _batch_choice(self, p):
        return largest(p, capacity(*p.shape, self.top_k), axis=0)

    def _prefix_choice(self, p, context):
        if context.ids is None:
            raise ValueError("causal expert choice needs RouteContext.ids to know where sequences begin")
        length, n_experts = context.ids.shape[1], p.shape[1]
        room = np.array([capacity(t + 1, n_experts, self.top_k) for t in range(length)])
        chosen = np.empty((len(p) // length, length, n_experts), bool)
        for sequence, p in zip(chosen, p.reshape(chosen.shape)):
            for t in range(length):  # an earlier token wins a tie, as in the batch form
                sequence[t] = (p[:t] >= p[t]).sum(axis=0) < room[t]
        return chosen.reshape(-1, n_experts)
