"""The transformer: its blocks and its loss."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from ..autograd import functional as F
from ..autograd.tensor import Tensor, no_grad
from ..files import CheckpointError, load_arrays, load_arrays_into, save_arrays
from ..layers.attention import CausalSelfAttention
from ..layers.latent_attention import LatentAttention
from ..layers.nn import INIT_STD, Embedding, FeedForward, Linear, Module, freeze
from ..layers.windowed_attention import WindowedAttention
from ..moe.experts import ExpertBank
from ..moe.layer import MoELayer
from ..moe.losses import LOSSES, LossContext
from ..moe.routers import RouteContext
from ..moe.routing import Routing
from .config import NORMS, ModelConfig
from .counting import count, require_size
from .former import with_thresholds


@dataclass(frozen=True)
class ModelOutput:
    """logits (B, T, V); routings: one for each MoE layer, in order; states (B, T, D): before the last norm."""

    logits: Tensor
    routings: list[Routing]
    states: Tensor | None = None


@dataclass(frozen=True)
class LossTerms:
    """The parts of a loss: total = cross_entropy + the sum of coefficient * term.

    terms: name -> scalar Tensor, the mean over MoE layers: those of losses.LOSSES that are logged or have a
    coefficient, "penalty" of routers that have one, "multi_token" of a second head. A term is also an attribute
    (`terms.balance`), None where it was not computed.
    """

    total: Tensor
    cross_entropy: Tensor
    terms: dict[str, Tensor]

    def __getattr__(self, name: str) -> Tensor | None:
        if name in (*LOSSES, "penalty", "multi_token"):
            return self.terms.get(name)
        raise AttributeError(name)


def make_attention(config: ModelConfig, rng: np.random.Generator, out_std: float, dtype, window: int = 0) -> Module:
    """The attention layer that a config describes, with this window."""
    c = config
    shared = dict(out_std=out_std, dtype=dtype, head_dim=c.head_dim, rope_theta=c.rope_theta)
    if c.attention == "latent":
        return LatentAttention(c.d_model, c.n_heads, rng, **shared, q_rank=c.q_rank, kv_rank=c.kv_rank,
                               rope_dim=c.rope_dim, v_dim=c.v_dim, norm_eps=c.latent_eps or c.norm_eps)
    shared |= dict(n_kv_heads=c.n_kv_heads, biases=c.attention_biases, rotary=c.positions == "rotary",
                   qk_norm=c.qk_norm, norm_eps=c.norm_eps)
    if window or c.sinks or c.yarn:
        return WindowedAttention(c.d_model, c.n_heads, rng, **shared, window=window, sinks=c.sinks, yarn=c.yarn)
    return CausalSelfAttention(c.d_model, c.n_heads, rng, **shared)


def make_norm(config: ModelConfig, dtype) -> Module:
    """The norm over the width D that a config describes."""
    return NORMS[config.norm](config.d_model, dtype, config.norm_eps)


class Block(Module):
    """Attention, then experts behind the named router (None: a dense layer), each normalised before and added."""

    def __init__(self, config: ModelConfig, router: str | None, rng: np.random.Generator, dtype, window: int = 0):
        out_std = INIT_STD / np.sqrt(2 * config.n_layers)  # 2L branches add up in the residual stream (GPT-2)
        self.is_moe = router is not None
        self.norm1, self.norm2 = make_norm(config, dtype), make_norm(config, dtype)
        self.attention = make_attention(config, rng, out_std, dtype, window)
        self.feed_forward = (MoELayer(config, router, rng, out_std, dtype) if self.is_moe else FeedForward(
            config.d_model, config.d_ff, rng, activation=config.activation, out_std=out_std, dtype=dtype,
            bias=config.bias))
        self.post1, self.post2 = (make_norm(config, dtype) if config.post_norm else unchanged for _ in range(2))

    def forward(self, x: Tensor, context: RouteContext) -> tuple[Tensor, Routing | None]:
        """(B, T, D) -> ((B, T, D), Routing, or None from a dense layer)."""
        x = x + self.post1(self.attention(self.norm1(x)))
        z, routing = self.norm2(x), None
        if self.is_moe:
            y, routing = self.feed_forward(z, context)
        else:
            y = self.feed_forward(z)
        return x + self.post2(y), routing


def unchanged(x: Tensor) -> Tensor:
    """x, in place of a norm that a config leaves out."""
    return x


def token_nats(logits: Tensor, targets: np.ndarray) -> np.ndarray:
    """(N,) array: the cross-entropy of each row of logits (N, V) with its target, outside the graph."""
    with no_grad():
        return -F.gather(F.log_softmax(logits), targets.reshape(-1, 1)).data[:, 0]


class NextButOne(Module):
    """A second head: the token after the next, from a state and the next token (DeepSeek-V3, eq. 21 to 24, depth 1).

    h' = block(W [norm(state), norm(next embedding)]), with a dense block. The last norm and head give its logits.
    """

    def __init__(self, config, rng, dtype):
        self.state_norm, self.next_norm = make_norm(config, dtype), make_norm(config, dtype)
        self.join = Linear(2 * config.d_model, config.d_model, rng, bias=False, dtype=dtype)
        self.block = Block(config, None, rng, dtype)

    def forward(self, states, following, context):
        """states (B, T, D) and the embeddings (B, T, D) of the tokens that follow them -> (B, T, D)."""
        joined = F.concatenate([self.state_norm(states), self.next_norm(following)], axis=2)
        return self.block(self.join(joined), context)[0]


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

    @classmethod
    def upcycle(cls, dense: "Transformer", config: ModelConfig, seed: int = 0) -> "Transformer":
        """A mixture that starts from a trained dense model (Komatsuzaki et al. 2022).

        Every expert is a copy of the dense feed-forward layer; routers are drawn anew. If the gates of each token sum
        to 1, the output at the start is that of the dense model.
        Raises ValueError unless `dense` has no MoE layers, and `config` is of the same sizes.
        """
        if config.dense_settings() != dense.config.dense_settings() or dense.config.moe_layers or config.n_shared \
                or config.expert_width != config.d_ff:
            raise ValueError("upcycling takes a dense model and a config of the same sizes, with experts as wide as "
                             "its feed-forward layers and none shared")
        model, known = cls(config, seed, dense.token_embedding.weight.dtype), dense.parameters()
        for name, p in model.parameters().items():
            if name in known:
                p.data = known[name].data.copy()
        for i in config.moe_layers:
            bank, layer = model.blocks[i].feed_forward.experts, dense.blocks[i].feed_forward
            for p, q in ((bank.w1, layer.up.weight), (bank.b1, layer.up.bias), (bank.w2, layer.down.weight),
                         (bank.b2, layer.down.bias)):
                if q is not None:
                    p.data = np.repeat(q.data[None], config.n_experts, axis=0)
        return model

    def moe_parts(self) -> list[MoELayer]:
        """The MoELayer of each block that has one, in order."""
        return [b.feed_forward for b in self.blocks if b.is_moe]

    def after_step(self, routings: list[Routing]) -> None:
        """Call `after_step` of each MoE layer with its Routing of this training step."""
        for layer, routing in zip(self.moe_parts(), routings, strict=True):
            layer.after_step(routing)

    def expert_banks(self) -> list[ExpertBank]:
        """The ExpertBank of each MoE layer, in order."""
        return [layer.experts for layer in self.moe_parts()]

    def count_parameters(self) -> dict[str, int]:
        """{"total", "active"}: all parameters, and those that a token uses."""
        total = sum(p.size for p in self.parameters().values())
        return {"total": total, "active": round(count(self.config)[-1].active)}

    @property
    def causal(self) -> bool:
        """Whether every token's route depends on the prefix of its own sequence alone."""
        return all(layer.causal for layer in self.moe_parts())

    def embed(self, ids: np.ndarray) -> Tensor:
        """(B, T) ids -> (B, T, D). Raises ValueError for no tokens, or sequences longer than config.seq_len."""
        ids = np.asarray(ids)
        if ids.ndim != 2 or not ids.size or ids.shape[1] > self.config.seq_len:
            raise ValueError(f"ids have shape {ids.shape}, but must be (B, T) with B at least 1 and T from 1 to "
                             f"seq_len {self.config.seq_len}")
        x = self.token_embedding(ids)
        return x if self.position_embedding is None else x + self.position_embedding(np.arange(ids.shape[1]))

    def read_out(self, x: Tensor) -> Tensor:
        """States (B, T, D) -> logits (B, T, V)."""
        x = self.norm(x)
        return F.linear(x, self.token_embedding.weight.T) if self.head is None else self.head(x)

    def forward(self, ids: np.ndarray, training: bool = False, rng: np.random.Generator | None = None,
                causal: bool = False, domain: np.ndarray | None = None) -> ModelOutput:
        """ids (B, T) integers -> ModelOutput. The other arguments are passed to the routers (RouteContext)."""
        context, routings = RouteContext(np.asarray(ids), training, rng, causal, domain=domain), []
        x = self.embed(ids)
        for block in self.blocks:
            x, routing = block(x, context)
            if routing is not None:
                routings.append(routing)
        return ModelOutput(self.read_out(x), routings, x)

    def loss(self, ids: np.ndarray, targets: np.ndarray, training: bool = False,
             rng: np.random.Generator | None = None, domain: np.ndarray | None = None) -> LossTerms:
        """LossTerms of predicting targets (B, T) from ids (B, T)."""
        return self.loss_terms(self.forward(ids, training, rng, domain=domain), targets)

    def loss_terms(self, output: ModelOutput, targets: np.ndarray) -> LossTerms:
        """LossTerms of a ModelOutput whose targets (B, T) are given."""
        c, logits, targets = self.config, output.logits.reshape(-1, self.config.vocab_size), np.asarray(targets)
        total = cross_entropy = F.cross_entropy(logits, targets.reshape(-1))
        terms = {}
        for name, coefficient, term in self._routing_terms(output, lambda: token_nats(logits, targets)):
            terms[name] = term
            total = total + coefficient * term if coefficient else total
        if c.mtp_coef and targets.shape[1] > 1:
            terms["multi_token"] = self.multi_token_loss(output.states, targets)
            total = total + c.mtp_coef * terms["multi_token"]
        return LossTerms(total, cross_entropy, terms)

    def _routing_terms(self, output, nats):
        """Yield (name, coefficient, mean over MoE layers) of the losses and of the routers' own penalties."""
        c, shared = self.config, cache(nats)
        layers = [(routing, LossContext(layer.router, seq_len=output.logits.shape[1], n_devices=c.n_devices,
                                        max_devices=c.max_devices, token_nats=shared,
                                        recent_share=getattr(layer.recent_share, "data", None),
                                        balance_batches=c.balance_batches))
                  for layer, routing in zip(self.moe_parts(), output.routings, strict=True)]
        coefficients = c.coefficients()
        wanted = [(name, coefficients[name], loss.of) for name, loss in LOSSES.items()
                  if loss.logged or coefficients[name]]
        wanted.append(("penalty", 1.0, lambda routing, context: context.router.penalty(routing, context)))
        for name, coefficient, of in wanted:
            found = [term for routing, context in layers if (term := of(routing, context)) is not None]
            if found:
                yield name, coefficient, sum(found) * (1 / len(found))

    def multi_token_loss(self, states: Tensor, targets: np.ndarray) -> Tensor:
        """Cross-entropy of the second head: from each state (B, T, D) and its target, the target after it."""
        following = self.token_embedding(targets[:, :-1])
        x = self.next_but_one(states[:, :-1], following, RouteContext(targets[:, :-1]))
        return F.cross_entropy(self.read_out(x).reshape(-1, self.config.vocab_size), targets[:, 1:].reshape(-1))

    def first_nonfinite(self, ids: np.ndarray, domain: np.ndarray | None = None) -> str | None:
        """The first place where a forward pass is not finite, such as "layer 3"; None if all of it is."""
        places = {f"parameter {name}": p for name, p in self.parameters().items()}
        with no_grad():
            x, context = self.embed(ids), RouteContext(np.asarray(ids), domain=domain)
            for i, block in enumerate(self.blocks):
                x, _ = block(x, context)
                places[f"layer {i}"] = x
            places["the head"] = self.read_out(x)
        return next((place for place, x in places.items() if not np.isfinite(x.data).all()), None)

    def save(self, path: str | Path) -> None:
        """Write the weights and the config to an .npz file, atomically."""
        save_arrays(path, {name: p.data for name, p in self.parameters().items()},
                    {"kind": "model", "config": self.config.to_dict()}, follow=True)

    @classmethod
    def load(cls, path: str | Path) -> "Transformer":
        """The model that `save` wrote. Raises files.CheckpointError for a truncated file or one of another program."""
        arrays, header = load_arrays(path, "model")
        try:
            return cls.from_arrays(header["config"], arrays)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path} does not describe a tinymoe model: {error}") from None

    @classmethod
    def from_arrays(cls, config: dict, arrays: dict[str, np.ndarray]) -> "Transformer":
        """The model of a config, given as a dict, with these weights. Raises ValueError where they do not fit."""
        config = ModelConfig.from_dict(config)
        require_size(config, sum(array.size for array in arrays.values()))
        model = cls(config, dtype=next(iter(arrays.values())).dtype)
        targets = {name: p.data for name, p in model.parameters().items()}
        load_arrays_into(targets, with_thresholds(arrays, targets))
        return model
