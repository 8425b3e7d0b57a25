"""The transformer: its configuration, its blocks, and its loss."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from . import functional as F
from . import losses
from .attention import CausalSelfAttention, LatentAttention
from .experts import ACTIVATIONS, BACKENDS
from .files import CheckpointError, load_arrays, save_arrays
from .moe import MoELayer
from .nn import INIT_STD, Embedding, FeedForward, LayerNorm, Linear, Module, RMSNorm, freeze
from .routers import ROUTERS, RouteContext, check, make
from .routing import DROP_POLICIES, Routing
from .tensor import Tensor, no_grad


def whole(value, least=1):
    """Whether a setting is a whole number of at least `least`."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= least


def finite(value):
    """Whether a setting is a finite number of at least 0."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return number and 0 <= value < np.inf


def require(config, names, fits, expected):
    """Raise a ValueError for the first of the named fields whose value does not fit; it says what was expected."""
    for name in names.split():
        if not fits(getattr(config, name)):
            raise ValueError(f"{name} {getattr(config, name)!r} must be {expected}")


NORMS = {"layer": LayerNorm, "rms": RMSNorm}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that makes a model. Raises ValueError where the numbers do not fit together."""

    vocab_size: int = 256
    n_layers: int = 6
    d_model: int = 128
    n_heads: int = 4
    d_ff: int = 512  # hidden width of the dense layers
    seq_len: int = 128  # the longest sequence
    activation: str = "gelu"
    norm: str = "layer"  # "layer" (Ba et al. 2016) or "rms" (Zhang & Sennrich 2019)
    post_norm: bool = False  # normalise what a layer gives before it is added too, as Grok-1 does
    positions: str = "learned"  # seq_len embeddings, or "rotary"
    bias: bool = True  # in linear layers and experts
    tied: bool = False  # the head is the token embedding
    attention: str = "multi_head"  # or "latent" (DeepSeek-V2), which has rotary positions of its own
    head_dim: int | None = None  # None: d_model / n_heads
    n_kv_heads: int | None = None  # groups of heads that share keys and values; None: n_heads
    qk_norm: bool = False  # RMS-normalise queries and keys
    q_rank: int = 0  # latent attention: of the queries' latent, 0 for none
    kv_rank: int = 64  # of the latent of keys and values
    rope_dim: int = 16  # of the rotary part of a head
    v_dim: int | None = None  # of a head's values; None: head_dim
    mtp_coef: float = 0.0  # of the loss of a second head that predicts the token after the next (DeepSeek-V3)
    moe_layers: tuple = (1, 3, 5)  # layers with experts, counted from 0; () is a dense model
    n_experts: int = 8
    d_expert: int | None = None  # hidden width of each expert; None: d_ff
    n_shared: int = 0  # experts that serve every token, ungated, besides the n_experts
    router: str = "top_k"
    top_k: int = 2  # experts per token; for expert_choice the mean, which may be a fraction
    capacity_factor: float | None = None  # None: no token is dropped
    drop_policy: str = "order"  # which assignments exceed the capacity: "order" or "gate"
    aux_coef: float = 0.01  # of the load-balancing loss, mean over MoE layers
    z_coef: float = 0.0  # of the router z-loss
    importance_coef: float = 0.0  # of the importance loss
    load_coef: float = 0.0  # of the smooth load loss (noisy_top_k)
    sequence_coef: float = 0.0  # of the balance loss within each sequence
    device_coef: float = 0.0  # of the balance loss over devices
    communication_coef: float = 0.0  # of the balance of what devices receive
    n_devices: int = 1  # that the experts lie on, in equal runs
    max_devices: int = 1  # that a token may reach: the group_limit of a router with as many groups
    expert_backend: str = "numba"
    freeze: tuple = ()  # parts that are not trained: pieces of parameter names, such as "router" or "experts"
    # options of the router, None for its own default; routers/ says what they do
    renormalise: bool | None = None
    router_std: float | None = None
    jitter: float | None = None
    n_groups: int | None = None
    group_limit: int | None = None
    second_expert: str | None = None
    second_threshold: float | None = None
    bias_rate: float | None = None
    gate_scale: float | None = None
    sinkhorn_iterations: int | None = None
    sequence_pool: str | None = None
    sequence_scope: str | None = None

    def __post_init__(self):
        sizes = "vocab_size n_layers d_model n_heads d_ff seq_len n_experts n_devices max_devices"
        require(self, sizes, whole, "a whole number of at least 1")
        for name in sizes.split():
            object.__setattr__(self, name, int(getattr(self, name)))  # NumPy's integers are no JSON
        require(self, "moe_layers", lambda layers: isinstance(layers, (tuple, list)) and
                all(whole(i, 0) and i < self.n_layers for i in layers),
                f"a list of layers from 0 to n_layers - 1 = {self.n_layers - 1}")
        object.__setattr__(self, "moe_layers", tuple(sorted(set(map(int, self.moe_layers)))))
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}: change one of them")
        require(self, "head_dim v_dim", lambda n: n is None or whole(n), "a whole number of at least 1, or None")
        require(self, "n_kv_heads", lambda n: n is None or whole(n) and self.n_heads % n == 0,
                f"a divisor of n_heads {self.n_heads}, or None")
        require(self, "q_rank", lambda n: whole(n, 0), "a whole number of at least 0")
        require(self, "kv_rank", whole, "a whole number of at least 1")
        require(self, "rope_dim", lambda n: whole(n, 2) and n % 2 == 0, "an even number of at least 2")
        require(self, "post_norm bias tied qk_norm", lambda value: isinstance(value, bool), "true or false")
        head = self.head_dim or self.d_model // self.n_heads
        require(self, "positions", lambda p: p == "learned" or self.attention == "latent" or head % 2 == 0,
                f"learned where a head has an odd number of entries ({head})")
        for name, known in (("norm", tuple(NORMS)), ("positions", ("learned", "rotary")),
                            ("attention", ("multi_head", "latent")), ("activation", ACTIVATIONS), ("drop_policy", DROP_POLICIES),
                            ("expert_backend", BACKENDS), ("renormalise", (None, True, False))):
            require(self, name, lambda value: value in known, f"one of {', '.join(map(str, known))}")
        require(self, "d_expert", lambda width: width is None or whole(width), "a whole number of at least 1, or None for d_ff")
        require(self, "n_shared", lambda n: whole(n, 0), "a whole number of at least 0")
        require(self, "top_k", finite, "a finite number above 0")
        self._check_router()
        require(self, "capacity_factor", lambda factor: factor is None or finite(factor) and factor > 0,
                "a number above 0, or None for no limit")
        require(self, "aux_coef z_coef importance_coef load_coef sequence_coef device_coef communication_coef mtp_coef", finite,
                "a finite number of at least 0")
        require(self, "n_devices", lambda n: self.n_experts % n == 0, f"a divisor of n_experts {self.n_experts}")
        require(self, "load_coef", lambda value: value == 0 or ROUTERS[self.router].has_soft_load,
                f"0 but for {', '.join(name for name, r in ROUTERS.items() if r.has_soft_load)}")
        require(self, "freeze", lambda parts: isinstance(parts, (tuple, list)) and all(isinstance(p, str) for p in parts),
                "a list of pieces of parameter names")
        object.__setattr__(self, "freeze", tuple(self.freeze))

    @property
    def expert_width(self):
        """The hidden width of an expert."""
        return self.d_ff if self.d_expert is None else self.d_expert

    def _check_router(self):
        """Make the router once, at a width of 1: it refuses what does not fit, numbers of another kind included."""
        given = {name: value for name in ROUTER_OPTIONS if (value := getattr(self, name)) is not None}
        check(self.router, self.n_experts, self.top_k, given)
        for kind, fits, expected in ((int, whole, "a whole number of at least 1"), (float, finite, "a finite number of at least 0")):
            names = [f.name for f in dataclasses.fields(self) if f.name in given and f.type == kind | None]
            require(self, " ".join(names), fits, f"{expected}, or None")
        make(self.router, 1, self.n_experts, self.top_k, **self.router_options())

    def router_options(self):
        """The keyword arguments that the router takes from this config."""
        wanted = ROUTERS[self.router].options
        return {name: value for name in wanted if (value := getattr(self, name, None)) is not None}

    def sizes(self):
        """What the dense parts follow from."""
        names = """vocab_size n_layers d_model n_heads d_ff seq_len activation norm post_norm positions bias tied attention head_dim
            n_kv_heads qk_norm q_rank kv_rank rope_dim v_dim""".split()
        return [getattr(self, name) for name in names]

    def to_dict(self):
        """A JSON-able dict that from_dict takes back."""
        return dataclasses.asdict(self) | {"moe_layers": list(self.moe_layers), "freeze": list(self.freeze)}

    @classmethod
    def from_dict(cls, values):
        """The config of a dict. Raises ValueError for keys it does not know."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown ModelConfig keys: {', '.join(unknown)}")
        return cls(**values)


ROUTER_OPTIONS = [field.name for field in dataclasses.fields(ModelConfig)]
ROUTER_OPTIONS = ROUTER_OPTIONS[ROUTER_OPTIONS.index("renormalise"):]


@dataclass(frozen=True)
class ModelOutput:
    """logits (B, T, V) Tensor; routings: one for each MoE layer, in order; states (B, T, D): before the last norm."""

    logits: Tensor
    routings: list[Routing]
    states: Tensor | None = None


@dataclass(frozen=True)
class LossTerms:
    """Scalar Tensors. total = cross_entropy + each coefficient * its term; the terms are means over MoE layers.

    balance and z are None in a dense model, the others also where their coefficient is 0.
    """

    total: Tensor
    cross_entropy: Tensor
    balance: Tensor | None = None
    z: Tensor | None = None
    importance: Tensor | None = None
    load: Tensor | None = None
    sequence: Tensor | None = None
    device: Tensor | None = None
    communication: Tensor | None = None
    multi_token: Tensor | None = None


def make_attention(config, rng, out_std, dtype):
    """The attention layer of a config."""
    c = config
    if c.attention == "latent":
        return LatentAttention(c.d_model, c.n_heads, rng, out_std, dtype, c.head_dim, c.q_rank, c.kv_rank, c.rope_dim, c.v_dim)
    return CausalSelfAttention(c.d_model, c.n_heads, rng, out_std, dtype, c.n_kv_heads, c.head_dim, c.bias,
                               c.positions == "rotary", c.qk_norm)


class Block(Module):
    """Attention, then a dense or mixture-of-experts feed-forward layer, each normalised before and added."""

    def __init__(self, config, is_moe, rng, dtype):
        out_std = INIT_STD / np.sqrt(2 * config.n_layers)  # 2L branches add up in the residual stream (GPT-2)
        self.is_moe, norm = is_moe, NORMS[config.norm]
        self.norm1, self.norm2 = norm(config.d_model, dtype), norm(config.d_model, dtype)
        self.attention = make_attention(config, rng, out_std, dtype)
        self.feed_forward = (MoELayer(config, rng, out_std, dtype) if is_moe else FeedForward(
            config.d_model, config.d_ff, rng, config.activation, out_std, dtype, config.bias))
        self.post1, self.post2 = (norm(config.d_model, dtype), norm(config.d_model, dtype)) if config.post_norm \
            else (same, same)

    def forward(self, x, context):
        """(B, T, D) -> ((B, T, D), Routing, or None from a dense layer)."""
        x = x + self.post1(self.attention(self.norm1(x)))
        if self.is_moe:
            y, routing = self.feed_forward(self.norm2(x), context)
            return x + self.post2(y), routing
        return x + self.post2(self.feed_forward(self.norm2(x))), None


def same(x):
    """x, where nothing is to be done to it."""
    return x


class NextButOne(Module):
    """A second head: the token after the next, from a state and the next token (DeepSeek-V3, eq. 21 to 24, depth 1).

    h' = block(W [norm(state), norm(embedding of the next token)]), with a dense block; the model's own last norm and
    head read it.
    """

    def __init__(self, config, rng, dtype):
        norm = NORMS[config.norm]
        self.state_norm, self.next_norm = norm(config.d_model, dtype), norm(config.d_model, dtype)
        self.join = Linear(2 * config.d_model, config.d_model, rng, bias=False, dtype=dtype)
        self.block = Block(config, False, rng, dtype)

    def forward(self, states, following, context):
        """states (B, T, D) and the embeddings (B, T, D) of the tokens that follow them -> (B, T, D)."""
        joined = F.concatenate([self.state_norm(states), self.next_norm(following)], axis=2)
        return self.block(self.join(joined), context)[0]


class Transformer(Module):
    """A decoder-only language model over `config`. seed: an integer or Generator for the initial weights."""

    def __init__(self, config, seed=0, dtype=np.float32):
        rng = np.random.default_rng(seed)
        self.config = config
        self.token_embedding = Embedding(config.vocab_size, config.d_model, rng, dtype)
        learned = config.positions == "learned" and config.attention != "latent"
        self.position_embedding = Embedding(config.seq_len, config.d_model, rng, dtype) if learned else None
        self.blocks = [Block(config, i in config.moe_layers, rng, dtype) for i in range(config.n_layers)]
        self.norm = NORMS[config.norm](config.d_model, dtype)
        self.head = None if config.tied else Linear(config.d_model, config.vocab_size, rng, bias=False, dtype=dtype)
        self.next_but_one = NextButOne(config, rng, dtype) if config.mtp_coef else None
        freeze(self, config.freeze)

    @classmethod
    def upcycle(cls, dense, config, seed=0):
        """A mixture that starts as a trained dense model (Komatsuzaki et al. 2023).

        Every expert is a copy of the dense feed-forward layer; routers are drawn anew. Where the gates of each token
        sum to 1, the output is the dense model's at the start.
        dense: a Transformer without MoE layers; config: a ModelConfig of the same sizes, with MoE layers.
        Raises ValueError where they do not fit together.
        """
        if config.sizes() != dense.config.sizes() or dense.config.moe_layers or config.n_shared \
                or config.expert_width != config.d_ff:
            raise ValueError("upcycling takes a dense model and a config of the same sizes, with experts as wide as "
                             "its feed-forward layers and none shared")
        model, known = cls(config, seed, dense.token_embedding.weight.dtype), dense.parameters()
        for name, p in model.parameters().items():
            if name in known:
                p.data = known[name].data.copy()
        for i, block in enumerate(model.blocks):
            if block.is_moe:
                bank, layer = block.feed_forward.experts, dense.blocks[i].feed_forward
                for p, q in ((bank.w1, layer.up.weight), (bank.b1, layer.up.bias), (bank.w2, layer.down.weight),
                             (bank.b2, layer.down.bias)):
                    p.data = np.repeat(q.data[None], config.n_experts, axis=0)
        return model

    def moe_parts(self):
        """The MoELayer of each block that has one, in order."""
        return [b.feed_forward for b in self.blocks if b.is_moe]

    def after_step(self, routings):
        """Tell each router the Routing (one for each MoE layer) of the training step that was just taken."""
        for layer, routing in zip(self.moe_parts(), routings, strict=True):
            layer.router.after_step(routing)

    def expert_banks(self):
        """The ExpertBank of each MoE layer, in order."""
        return [layer.experts for layer in self.moe_parts()]

    def count_parameters(self):
        """{"total", "active"}: all parameters, and those a token meets (K of E experts; embeddings included)."""
        total = sum(p.size for p in self.parameters().values())
        experts = sum(p.size for bank in self.expert_banks() for p in bank.parameters().values())
        idle = 1 - self.config.top_k / self.config.n_experts
        return {"total": total, "active": round(total - idle * experts)}

    @property
    def causal(self):
        """Whether no token's route depends on later tokens or on other sequences."""
        return all(layer.causal for layer in self.moe_parts())

    def embed(self, ids):
        """(B, T) ids -> (B, T, D). Raises ValueError for sequences longer than config.seq_len."""
        ids = np.asarray(ids)
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.config.seq_len:
            raise ValueError(f"ids have shape {ids.shape}, but must be (B, T) with T from 1 to "
                             f"seq_len {self.config.seq_len}")
        x = self.token_embedding(ids)
        return x if self.position_embedding is None else x + self.position_embedding(np.arange(ids.shape[1]))

    def read_out(self, x):
        """States (B, T, D) -> logits (B, T, V)."""
        x = self.norm(x)
        return F.linear(x, self.token_embedding.weight.T) if self.head is None else self.head(x)

    def forward(self, ids, training=False, rng=None, causal=False):
        """ids (B, T) integers -> ModelOutput.

        training and rng reach the routers; causal=True routes each token by its prefix alone (RouteContext).
        """
        context = RouteContext(np.asarray(ids), training, rng, causal)
        x, routings = self.embed(ids), []
        for block in self.blocks:
            x, routing = block(x, context)
            if routing is not None:
                routings.append(routing)
        return ModelOutput(self.read_out(x), routings, x)

    def loss(self, ids, targets, training=False, rng=None):
        """LossTerms of predicting targets (B, T) from ids (B, T)."""
        return self.loss_terms(self.forward(ids, training, rng), targets)

    def loss_terms(self, output, targets):
        """LossTerms of a ModelOutput whose targets (B, T) are given."""
        c = self.config
        logits = output.logits.reshape(-1, c.vocab_size)
        total = cross_entropy = F.cross_entropy(logits, np.asarray(targets).reshape(-1))
        terms, length = {}, output.logits.shape[1]
        soft = all(r.soft_load is not None for r in output.routings)  # only while training
        for name, wanted, coefficient, loss in (
                ("balance", True, c.aux_coef, losses.load_balancing_loss),
                ("z", True, c.z_coef, losses.z_loss),
                ("importance", False, c.importance_coef, losses.importance_loss),
                ("load", False, c.load_coef * soft, losses.load_loss),
                ("sequence", False, c.sequence_coef, lambda r: losses.sequence_balance_loss(r, length)),
                ("device", False, c.device_coef, lambda r: losses.device_balance_loss(r, c.n_devices)),
                ("communication", False, c.communication_coef,
                 lambda r: losses.communication_balance_loss(r, c.n_devices, c.max_devices))):
            if output.routings and (wanted or coefficient):
                terms[name] = sum(map(loss, output.routings)) * (1 / len(output.routings))
                total = total + coefficient * terms[name] if coefficient else total
        if c.mtp_coef:
            terms["multi_token"] = self.multi_token_loss(output.states, targets)
            total = total + c.mtp_coef * terms["multi_token"]
        return LossTerms(total, cross_entropy, **terms)

    def multi_token_loss(self, states, targets):
        """Cross-entropy of the second head: from each state (B, T, D) and its target, the target after it."""
        targets = np.asarray(targets)
        following = self.token_embedding(targets[:, :-1])
        x = self.next_but_one(states[:, :-1], following, RouteContext(targets[:, :-1]))
        return F.cross_entropy(self.read_out(x).reshape(-1, self.config.vocab_size), targets[:, 1:].reshape(-1))

    def first_nonfinite(self, ids):
        """The first place where a forward pass is not finite ("layer 3", say), or None."""
        for name, p in self.parameters().items():
            if not np.isfinite(p.data).all():
                return f"parameter {name}"
        context = RouteContext(np.asarray(ids))
        with no_grad():
            x = self.embed(ids)
            for i, block in enumerate(self.blocks):
                x, _ = block(x, context)
                if not np.isfinite(x.data).all():
                    return f"layer {i}"
            return None if np.isfinite(self.read_out(x).data).all() else "the head"

    def save(self, path):
        """Write the weights and the config to an .npz file, whole or not at all."""
        save_arrays(path, {name: p.data for name, p in self.parameters().items()},
                    {"kind": "model", "config": self.config.to_dict()})

    @classmethod
    def load(cls, path):
        """The model that `save` wrote. Raises files.CheckpointError for a truncated or foreign file."""
        arrays, header = load_arrays(path, "model")
        try:
            model = cls(ModelConfig.from_dict(header["config"]), dtype=next(iter(arrays.values())).dtype)
        except (ValueError, TypeError, KeyError, StopIteration) as error:
            raise CheckpointError(f"{path} does not describe a tinymoe model: {error}") from None
        parameters = model.parameters()
        if {n: a.shape for n, a in arrays.items()} != {n: p.shape for n, p in parameters.items()}:
            raise CheckpointError(f"{path} holds other arrays than its config needs: write it again with save")
        for name, p in parameters.items():
            p.data = arrays[name].astype(p.dtype)
        return model
