"""The transformer: embeddings, blocks, a head, and the loss with its terms."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from ..autograd import functional as F
from ..autograd.tensor import Tensor, no_grad
from ..layers.nn import Embedding, Linear, Module, freeze
from ..moe.layer import MoELayer
from ..moe.losses import LOSSES, Loss, LossContext
from ..moe.routers import RouteContext
from ..moe.routing import Routing
from . import input_checks as checks
from . import saving
from .block import Block, make_norm
from .config import ModelConfig
from .counting import count
from .second_head import NextButOne

PENALTY = Loss("a router's own", lambda routing, context: context.router.penalty(routing, context), logged=True)


@dataclass(frozen=True)
class ModelOutput:
    """logits (B, T, V); routings: one for each MoE layer, in order; states (B, T, D): before the last norm."""

    logits: Tensor
    routings: list[Routing]
    states: Tensor | None = None


@dataclass(frozen=True)
class LossTerms:
    """The parts of a loss: total = cross_entropy + the sum of coefficient * term.

    terms: name -> scalar Tensor, the mean over the MoE layers that have it: those of losses.LOSSES that are logged or
    have a coefficient, "penalty" of routers that have one, "multi_token" of a second head. A term is also an attribute
    (`terms.balance`), None where it was not computed.
    """

    total: Tensor
    cross_entropy: Tensor
    terms: dict[str, Tensor]

    def __getattr__(self, name: str) -> Tensor | None:
        return checks.term_named(name, vars(self).get("terms", {}))


def token_nats(logits: Tensor, targets: np.ndarray) -> np.ndarray:
    """The cross-entropy of logits (..., V) with each of the targets (...), an array (...) outside the graph."""
    with no_grad():
        return -F.gather(F.log_softmax(logits), targets[..., None]).data[..., 0]


class Transformer(Module):
    """A decoder-only language model over `config`. seed: an integer or Generator for the initial weights."""

    def __init__(self, config: ModelConfig, seed: int | np.random.Generator = 0, dtype=np.float32):
        rng = np.random.default_rng(seed)
        self.config = config
        self.token_embedding = Embedding(config.vocab_size, config.d_model, rng, dtype)
        self.position_embedding = (Embedding(config.seq_len, config.d_model, rng, dtype)
                                   if config.learned_positions else None)
        self.blocks = [Block(config, config.router_of(i), rng, dtype, config.window_of(i))
                       for i in range(config.n_layers)]
        self.norm = make_norm(config, dtype)
        self.head = None if config.tied else Linear(config.d_model, config.vocab_size, rng, bias=False, dtype=dtype)
        self.next_but_one = NextButOne(config, rng, dtype) if config.mtp_coef else None
        freeze(self, config.freeze)

    save, load, from_arrays = saving.save, classmethod(saving.load), classmethod(saving.from_arrays)

    def moe_parts(self) -> list[MoELayer]:
        """The MoELayer of each block that has one, in order."""
        return [b.feed_forward for b in self.blocks if b.is_moe]

    def after_step(self, routings: list[Routing]) -> None:
        """Call `after_step` of each MoE layer with its Routing of this training step."""
        for layer, routing in zip(self.moe_parts(), routings, strict=True):
            layer.after_step(routing)

    def count_parameters(self) -> dict[str, int]:
        """{"total", "active"}: all parameters, and those that a token uses."""
        total = sum(p.size for p in self.parameters().values())
        return {"total": total, "active": round(count(self.config)[-1].active)}

    @property
    def causal(self) -> bool:
        """Whether, outside training, every token's route depends on the prefix of its own sequence alone."""
        return all(layer.causal for layer in self.moe_parts())

    def embed(self, ids: np.ndarray) -> Tensor:
        """(B, T) ids -> (B, T, D).

        Raises ValueError for no tokens and sequences longer than config.seq_len, IndexError for ids that are no token.
        """
        ids = checks.require_ids(ids, self.config.seq_len, self.config.vocab_size)
        x = self.token_embedding(ids)
        return x if self.position_embedding is None else x + self.position_embedding(np.arange(ids.shape[1]))

    def read_out(self, x: Tensor) -> Tensor:
        """States (B, T, D) -> logits (B, T, V)."""
        x = self.norm(x)
        return F.linear(x, self.token_embedding.weight.T) if self.head is None else self.head(x)

    def forward(self, ids: np.ndarray, training: bool = False, rng: np.random.Generator | None = None,
                causal: bool = False, domain: np.ndarray | None = None) -> ModelOutput:
        """ids (B, T) integers -> ModelOutput. The other arguments are passed to the routers (RouteContext)."""
        x, routings = self.embed(ids), []
        context = RouteContext(ids, training, rng, causal, domain=domain)
        for block in self.blocks:
            x, routing = block(x, context)
            if routing is not None:
                routings.append(routing)
        return ModelOutput(self.read_out(x), routings, x)

    def loss(self, ids: np.ndarray, targets: np.ndarray, training: bool = False,
             rng: np.random.Generator | None = None, domain: np.ndarray | None = None) -> LossTerms:
        """LossTerms of predicting targets (B, T) from ids (B, T); errors as those of `loss_terms`."""
        return self.loss_terms(self.forward(ids, training, rng, domain=domain), targets)

    def loss_terms(self, output: ModelOutput, targets: np.ndarray) -> LossTerms:
        """LossTerms of a ModelOutput. Raises ValueError for targets of another shape than (B, T) or a wrong loss."""
        c, logits = self.config, output.logits.reshape(-1, self.config.vocab_size)
        targets = checks.require_targets(targets, output.logits)
        total = cross_entropy = F.cross_entropy(logits, targets.reshape(-1))
        terms = {}

        @cache
        def nats():  # only the policy loss needs it
            return token_nats(logits, targets.reshape(-1))

        for name, coefficient, term in self._routing_terms(output, nats):
            terms[name] = term
            if coefficient:
                total = total + coefficient * term
        if c.mtp_coef and targets.shape[1] > 1:
            terms["multi_token"] = self.next_but_one.loss(self, output.states, targets)
            total = total + c.mtp_coef * terms["multi_token"]
        return LossTerms(total, cross_entropy, terms)

    def _routing_terms(self, output, nats):
        """Yield (name, coefficient, mean over the MoE layers that have it) of the losses and the routers' penalties."""
        c, coefficients = self.config, self.config.coefficients() | {"penalty": 1.0}
        layers = [(routing, LossContext(layer.router, seq_len=output.logits.shape[1], n_devices=c.n_devices,
                                        max_devices=c.max_devices, token_nats=nats,
                                        recent_share=None if layer.recent_share is None else layer.recent_share.data,
                                        balance_batches=c.balance_batches))
                  for layer, routing in zip(self.moe_parts(), output.routings, strict=True)]
        checks.require_losses(LOSSES)
        for name, loss in (LOSSES | {"penalty": PENALTY}).items():
            coefficient = coefficients[name]
            if not (coefficient or loss.logged):
                continue
            terms = [loss.of(routing, context) for routing, context in layers if loss.applies(context.router)]
            checks.require_terms(name, terms)
            found = [term for term in terms if term is not None]
            if found:
                yield name, coefficient, sum(found) * (1 / len(found))
