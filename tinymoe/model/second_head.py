"""A second head, which predicts the token after the next (multi-token prediction)."""

import numpy as np

from ..autograd import functional as F
from ..autograd.tensor import Tensor
from ..layers.nn import Linear, Module
from ..moe.routers import RouteContext
from .block import Block, make_norm


class NextButOne(Module):
    """The token after the next, from a state and the next token (DeepSeek-V3, eq. 21 to 24, depth 1).

    h' = block(W [norm(state), norm(next embedding)]), with a dense block. The model's last norm and head give its
    logits.
    """

    def __init__(self, config, rng, dtype):
        self.state_norm, self.next_norm = make_norm(config, dtype), make_norm(config, dtype)
        self.join = Linear(2 * config.d_model, config.d_model, rng, bias=False, dtype=dtype)
        self.block = Block(config, None, rng, dtype)

    def forward(self, states, following, context):
        """states (B, T, D) and the embeddings (B, T, D) of the tokens that follow them -> (B, T, D)."""
        joined = F.concatenate([self.state_norm(states), self.next_norm(following)], axis=2)
        return self.block(self.join(joined), context)[0]

    def loss(self, model, states: Tensor, targets: np.ndarray) -> Tensor:
        """Mean cross-entropy: from each state (B, T, D) of the model and its target (B, T), the target after it.

        It is the mean over the T - 1 tokens of a sequence that have one; the paper divides their sum by T.
        """
        x = self(states[:, :-1], model.token_embedding(targets[:, :-1]), RouteContext(targets[:, :-1]))
        return F.cross_entropy(model.read_out(x).reshape(-1, model.config.vocab_size), targets[:, 1:].reshape(-1))
