"""Each token chooses its K experts of largest probability.

With the default options `_jittered`, `_in_best_groups` and `_keeps_second` do nothing.
"""

from typing import Literal

import numpy as np

from ...autograd import functional as F
from ..routing import from_mask, largest, shares
from .base import LinearRouter
from .checks import check_choice


class TopK(LinearRouter, name="top_k"):
    """Each token takes its K experts of largest probability (Switch, Fedus et al. 2021; Mixtral, Jiang et al. 2024).

    A gate is the probability of its expert. For K = 1 it stays as it is (Switch eq. 2). For K > 1 the gates of a token
    are divided by their sum (Mixtral), which equals a softmax over the chosen logits alone.

    renormalise: whether a token's gates are divided by their sum; by default for K > 1 only. Grok-1 sets False. With
        K = 1, True makes every gate 1, and the router learns nothing from the language-model loss.
    jitter: while training, inputs are multiplied by noise from U(1 - jitter, 1 + jitter) (Switch).
    n_groups, group_limit: experts lie in n_groups equal groups, and a token may use its best group_limit groups. The
        score of a group is that of its best expert (DeepSeek-V2, section 2.2.2).
    second_expert: for K = 2, which second experts are kept while training: "all"; "random", each with probability
        gate / second_threshold (GShard, Lepikhin et al. 2020, algorithm 1); "threshold", those whose gate is above
        second_threshold (Mesh TensorFlow).
    second_threshold: the threshold in second_expert; null means 0.5 for "random" (GShard), 0.2 for "threshold" (Mesh
        TensorFlow, which has 0.2 for "random" too). For "threshold" it must be below 0.5: a second gate is at most 0.5.
    Raises ValueError for training with noise but without an rng.
    """

    paper = "Fedus 2021; Jiang 2024"
    formula = "p = softmax(x W); the K largest p; gates p / (sum of the chosen p), or p for K = 1"
    used_by = "Switch, Mixtral, Qwen3-MoE; Grok-1 and OLMoE (raw gates); DeepSeek-V2 (gates 16 p, experts in groups)"
    renormalise: bool | None = None
    jitter: float = 0.0
    n_groups: int = 1
    group_limit: int | None = None
    second_expert: Literal["all", "random", "threshold"] = "all"
    second_threshold: float | None = None

    def __init__(self, d_model, n_experts, top_k, rng, dtype, **options):
        super().__init__(d_model, n_experts, top_k, rng, dtype, **options)
        if self.renormalise is None:
            self.renormalise = top_k > 1
        if self.second_threshold is None:
            self.second_threshold = 0.2 if self.second_expert == "threshold" else 0.5

    def forward(self, x, context):
        logits = self.scores(self._jittered(x, context))
        return self._choose(logits, context)

    def _choose(self, logits, context, soft_load=None):
        probs = F.softmax(logits)
        chosen = self._select(self._in_best_groups(logits.data, n_best=1), context)
        gates = shares(probs, chosen) if self.renormalise else probs * chosen
        if context.training and self.second_expert != "all":
            chosen = chosen & self._keeps_second(gates.data, context)
        return from_mask(chosen, gates, logits, probs, soft_load=soft_load)

    def _select(self, scores, context):  # subclasses may choose otherwise
        return largest(scores, self.top_k)

    def _jittered(self, x, context):
        if not (self.jitter and context.training):
            return x
        noise = context.need("rng", self).uniform(1 - self.jitter, 1 + self.jitter, x.shape)
        return x * noise.astype(x.dtype)

    def _in_best_groups(self, scores, n_best):
        """Scores (N, E), with -inf outside each token's best groups (not 0: a biased score may be below 0).

        The value of a group is the sum of its n_best largest scores.
        """
        if self.group_limit is None:
            return scores
        grouped = scores.reshape(len(scores), self.n_groups, -1)
        value = np.sort(grouped, axis=-1)[..., -n_best:].sum(axis=-1)  # (N, groups)
        best = largest(value, self.group_limit)
        return np.where(np.repeat(best, grouped.shape[-1], axis=-1), scores, -np.inf)

    def _keeps_second(self, gates, context):
        """(N, E) bool: first choices, and the second choices that second_expert keeps."""
        limit = np.full(len(gates), self.second_threshold, float)
        if self.second_expert == "random":
            limit *= context.need("rng", self).random(len(gates))
        return largest(gates, 1) | (gates > limit[:, None])

    @classmethod
    def check(cls, n_experts, top_k, options):
        super().check(n_experts, top_k, options)
        names = "n_groups", "group_limit", "second_expert", "second_threshold", "jitter"
        check_choice(n_experts, top_k, **{name: options.get(name, getattr(cls, name)) for name in names})
