"""Each expert chooses its tokens."""

from typing import Literal

import numpy as np

from ...autograd import functional as F
from ...autograd.tensor import Tensor, primitive
from ..routing import capacity, from_mask, largest, shares
from .base import LinearRouter


class ExpertChoice(LinearRouter, name="expert_choice"):
    """Each expert takes the C = ceil(N * K / E) tokens of largest probability (Zhou et al. 2022, eq. 1 to 3).

    K is the mean number of experts of a token (the paper's c) and may be a fraction; a token may have none. A gate is
    the softmax over experts. One of three rules chooses the tokens of an expert:

    - "batch", the paper's: the C best of the batch. The load is equal by construction, but a token's route depends on
      later tokens and on its neighbours in the batch.
    - "prefix": a token is taken if it is among the best ceil(n * K / E) of the n tokens of its own sequence so far.
    - "threshold" (Expert Threshold, Sun et al. 2026, arXiv 2603.11535): a token is taken if p >= theta_e. After each
      training step, whatever its rule, theta_e <- decay * theta_e + (1 - decay) * (C-th largest p of the batch); the
      first batch sets it. The paper writes p > theta_e, its code has >=: the batch that sets theta then has exactly C
      tokens an expert (but for ties). The thresholds are saved with the model. Before the first step the rule is
      "prefix". The thresholds of a frozen router move too, because evaluation needs them.

    The second and third rule are causal. Shazeer et al. (2017, appendix F) choose by batch, and by learned thresholds
    at inference.

    rule: among which tokens an expert chooses: "batch", those of the whole batch; "prefix", those of the same
        sequence up to now; "threshold", by a running threshold. Only the last two are causal.
    causal_rule: the rule of causal evaluation where `rule` is "batch".
    threshold_decay: weight of the earlier batches in the thresholds; 0.97 is a mean over about 33 batches. It is a
        choice for short runs: the paper's code has 0.99.
    renormalise: whether the gates of a token are divided by their sum. The paper does not.
    softmax_over: "experts", as in the paper, or "tokens". With "tokens" an expert ranks tokens by its logit, and its
        gates are the softmax over all tokens of the batch (with a causal rule, over the sequence so far), times their
        number, so that the mean gate is 1 for any number of tokens.
    Raises ValueError without ids where the rule, or the softmax, needs the sequences.
    """

    paper = "Zhou 2022"
    formula = "p = softmax(x W); each expert takes the N K / E tokens of largest p, or those above a threshold; gates p"
    used_by = "EC-DIT (Sun 2024), which generates images"
    chooses = "expert"
    balanced = "yes"
    causal = causal_training = False
    shapes = {"weight": "DE", "threshold": "E"}
    mean_k = True
    rule: Literal["batch", "prefix", "threshold"] = "batch"
    causal_rule: Literal["prefix", "threshold"] = "threshold"
    threshold_decay: float = 0.97
    renormalise: bool = False
    softmax_over: Literal["experts", "tokens"] = "experts"

    def __init__(self, d_model, n_experts, top_k, rng, dtype, **options):
        super().__init__(d_model, n_experts, top_k, rng, dtype, **options)
        self.threshold = Tensor(np.zeros(n_experts, dtype))  # all zero: not set yet

    @classmethod
    def check(cls, n_experts, top_k, options):
        super().check(n_experts, top_k, options)
        if options.get("threshold_decay", 0) >= 1:
            raise ValueError(f"threshold_decay {options['threshold_decay']} must be at least 0 and below 1")

    @classmethod
    def causal_with(cls, options):
        return (options.get("rule", cls.rule) != "batch",) * 2

    @classmethod
    def rules(cls, options):
        rule, causal = (options.get(name, getattr(cls, name)) for name in ("rule", "causal_rule"))
        return f"by {rule}" + (f", causal by {causal}" if rule == "batch" else "")

    def forward(self, x, context):
        logits = self.scores(x)
        probs, over_tokens = F.softmax(logits), self.softmax_over == "tokens"
        rule = self.causal_rule if context.causal and self.rule == "batch" else self.rule
        gates = self._softmax_over_tokens(logits, context, rule) if over_tokens else probs
        scores = logits.data if over_tokens else probs.data
        if rule == "batch":
            chosen = largest(scores, capacity(*scores.shape, self.top_k), axis=0)
        elif rule == "threshold" and self.threshold.data.any():
            chosen = (scores >= self.threshold.data) & (gates.data > 0)  # a threshold can underflow
        else:
            chosen = self._prefix_choice(scores, context)
        if self.renormalise:
            gates = shares(gates, chosen)
        return from_mask(chosen, gates, logits, probs)

    def after_step(self, routing):
        scores = (routing.logits if self.softmax_over == "tokens" else routing.probs).data
        if not len(scores):
            return
        place, before = len(scores) - capacity(*scores.shape, self.top_k), self.threshold.data
        now = np.partition(scores, place, axis=0)[place]  # the C-th largest of each column
        mean = self.threshold_decay * before + (1 - self.threshold_decay) * now if before.any() else now
        self.threshold.data = mean.astype(before.dtype)

    def _softmax_over_tokens(self, logits, context, rule):
        if rule == "batch":
            return F.softmax(logits, axis=0) * len(logits)
        length = context.need("ids", self).shape[1]
        sequences = logits.reshape(-1, length, logits.shape[1])  # (B, T, E)
        return prefix_softmax(sequences).reshape(logits.shape)

    def _prefix_choice(self, p, context):
        length, n_experts = context.need("ids", self).shape[1], p.shape[1]
        room = np.array([capacity(t + 1, n_experts, self.top_k) for t in range(length)])
        chosen = np.empty((len(p) // length, length, n_experts), bool)
        for sequence, scores in zip(chosen, p.reshape(chosen.shape)):
            for t in range(length):  # an earlier token wins a tie, as in the batch form
                sequence[t] = (scores[:t] >= scores[t]).sum(axis=0) < room[t]
        return chosen.reshape(-1, n_experts)


class ExpertThreshold(ExpertChoice, name="expert_threshold"):
    """Expert choice by thresholds, while training and at evaluation (Sun et al. 2026, arXiv 2603.11535).

    expert_choice with rule "threshold": causal, and balanced as far as the thresholds fit the batch. Scores and gates
    are those of expert_choice, so that the two differ in the rule alone. The paper's gates are sigmoids of the logits,
    its thresholds are of logits, their mean is corrected for its start at 0 as in Adam, and training begins with the
    rule "batch".
    """

    paper = "Sun 2026"
    formula = "p = softmax(x W); expert e takes every token with p_e >= theta_e; gates p"
    used_by = "studies: Sun 2026"
    balanced = "nearly"
    causal = causal_training = True
    rule, causal_rule = "threshold", "threshold"  # fixed


def prefix_softmax(x: Tensor) -> Tensor:
    """out[:, t] = exp(x[:, t]) / (mean of exp(x[:, s]) over s <= t), for x (B, T, E); no later entry takes part."""
    T, total = x.shape[1], np.logaddexp.accumulate(x.data, axis=1)
    value = np.arange(1, T + 1, dtype=x.dtype)[:, None] * np.exp(x.data - total)

    def vjp(g):
        h, past = g * value, np.tri(T, dtype=bool)[:, :, None]
        share = np.exp(np.where(past, x.data[:, None] - total[:, :, None], -np.inf))  # (B, t, s, E)
        return h - (share * h[:, :, None]).sum(axis=1)

    return primitive(value, (x, vjp))
