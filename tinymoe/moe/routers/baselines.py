"""Routers that do not learn to choose: by a table of the token's id, by chance, by weights that stay as drawn."""

import numpy as np

from ...autograd import functional as F
from ...autograd.tensor import Tensor
from ..routing import from_mask, largest
from .base import Router
from .top_k import TopK


class Frozen(TopK, name="frozen"):
    """Top-K whose weights stay as they were drawn (Fan et al. 2024, arXiv 2402.13089).

    It tests whether a router must learn. Its gates still depend on the hidden states, so the layers below learn through
    them. `freeze=("router",)` in ModelConfig freezes any other router.
    """

    paper = "Fan 2024"
    formula = "as top_k, with W as it was drawn"
    used_by = "studies: Fan 2024"
    learned = False


class Shuffled(TopK, name="shuffled"):
    """Top-K whose choices are permuted over the tokens: the load is the same, but the choice ignores the token.

    It tests whether balance alone helps. With context.causal a token takes the choice of a random token of its own
    prefix. It draws from the context's generator, or without one from the same fixed seed in each call.
    Raises ValueError for context.causal without ids.
    """

    paper, used_by = Router.paper, "this study, as a baseline"
    formula = "the choices of top_k, permuted over the tokens; gates as in top_k, of the token's own p"
    chooses = "neither"
    causal = causal_training = False

    def _select(self, scores, context):
        chosen, rng = super()._select(scores, context), context.rng or np.random.default_rng(0)
        if not context.causal:
            return chosen[rng.permutation(len(chosen))]
        n_sequences, length = context.need("ids", self).shape
        place = np.tile(np.arange(length), n_sequences)
        back = (rng.random(len(chosen)) * (place + 1)).astype(int)  # 0 to place
        return chosen[np.arange(len(chosen)) - back]


class ByToken:
    """Part of a router whose choice is read from a random table of the token's id.

    vocab_size: ids run from 0 to vocab_size - 1; the model gives its own.
    """

    vocab_size: int = 256

    def __init__(self, d_model, n_experts, top_k, rng, dtype, **options):
        super().__init__(d_model, n_experts, top_k, rng, dtype, **options)
        chosen = largest(rng.random((self.vocab_size, n_experts)), top_k)
        self.table = Tensor(chosen.astype(dtype))  # (V, E), 1 at each id's experts; saved with the model

    def read(self, context):
        """(N, E) bool: the choice of each token. Raises RouteError without ids, and IndexError for an unknown id."""
        return F.embedding(self.table, context.need("ids", self).reshape(-1)).data > 0


class Hash(ByToken, Router, name="hash"):
    """A token's K experts are read from a random table of its id, wherever it stands (Roller et al. 2021).

    Gates are 1 / K. The load is as even as the ids are: a byte that makes up a sixth of the text overloads its
    experts. Logits are 0 at the chosen experts and -30 elsewhere, so that their softmax is the choice.
    Raises ValueError without RouteContext.ids.
    """

    paper = "Roller 2021"
    formula = "table[id], K experts drawn once for each id; gates 1 / K"
    used_by = "studies; with learned gates, the first layers of DeepSeek-V4"
    chooses = "neither"
    learned = False
    cost = "a lookup"
    shapes = {"table": "VE"}

    def forward(self, x, context):
        return constant(self.read(context), x.dtype)


class Oracle(Router, name="oracle"):
    """The domain of a sequence picks its K experts: those from d K on, modulo E, for all its tokens, with gates 1 / K.

    An upper bound for routers whose experts are to follow domains (Falke et al. 2026, arXiv 2604.07030, have such a
    reference router; which experts it gives a domain was not checked against the paper). It is told the domain, which
    no other part of the model is, from the first token on. Domains share no expert as long as their number times K is
    at most E. Raises ValueError without RouteContext.domain: texts without a known domain, such as a prompt, cannot be
    routed.
    """

    paper = "Falke 2026"
    formula = "domain d: the K experts from d K on, modulo E; gates 1 / K"
    used_by = "studies, as an upper bound"
    chooses = "neither"
    learned = False
    cost = "a lookup"

    def forward(self, x, context):
        first = np.asarray(context.need("domain", self), int) * self.top_k  # (B,)
        chosen = np.zeros((len(first), self.n_experts), bool)
        chosen[np.arange(len(first))[:, None], (first[:, None] + np.arange(self.top_k)) % self.n_experts] = True
        return constant(np.repeat(chosen, len(x) // max(1, len(chosen)), axis=0), x.dtype)


class Random(Router, name="random"):
    """A fresh uniform choice of K experts for each token in each call, with gates 1 / K.

    It draws from the context's generator, or without one from the same fixed seed in each call.
    """

    formula = "K experts drawn anew for each token; gates 1 / K"
    used_by = "THOR (Zuo 2021), with a loss that makes the experts drawn agree"
    chooses = "neither"
    balanced = "on average"
    learned = False
    cost = "N E random numbers"

    def forward(self, x, context):
        rng = context.rng or np.random.default_rng(0)
        return constant(largest(rng.random((len(x), self.n_experts)), self.top_k), x.dtype)


def constant(chosen, dtype):
    """The Routing of a choice (N, E) made without scores: gates 1 / K, without gradient."""
    probs = Tensor((chosen / chosen.sum(axis=1, keepdims=True)).astype(dtype))
    logits = Tensor(np.where(chosen, 0, -30).astype(dtype))
    return from_mask(chosen, probs, logits, probs)
