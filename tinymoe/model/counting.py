"""Count parameters and FLOPs without allocating the model, part by part.

*Total* is every number of the model, tied embeddings once. *Active* is what one token uses: K of E experts, all shared
experts, the router, the norms, and the whole of embedding and head, which some papers leave out. FLOPs are those of the
forward pass of one token: two for each active weight of a matrix product, none for looking up an embedding, and
attention over `context` positions.
"""

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass, field

from ..kernels import GATED
from ..moe.routers import find
from ..moe.settings import COUNT, check_of
from .config import ModelConfig


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder. Attention is grouped-query, or multi-head latent where kv_rank is not 0."""

    n_layers: int
    d_model: int
    vocab_size: int
    n_heads: int
    head_dim: int
    n_kv_heads: int
    d_ff: int = 0  # hidden width of dense layers
    n_dense: int = 0  # layers without experts
    n_experts: int = 0
    top_k: float = 0
    d_expert: int = 0
    n_shared: int = 0  # shared experts, each d_expert wide
    gated: bool = True  # a feed-forward layer of three matrices (SwiGLU, GEGLU) instead of two
    tied: bool = False  # the head is the embedding
    norms: int = 2  # in a layer
    qk_norm: bool = False  # over all queries and all keys of a token
    bias: bool = False  # biases in attention and feed-forward layers
    norm_shift: bool = False  # layer norm, which has a shift besides the scale
    second_head: bool = False  # tinymoe's multi-token prediction, of use in training alone
    n_positions: int = 0  # learned position embeddings
    q_rank: int = 0  # multi-head latent attention (DeepSeek-V2, eq. 9 to 19): the queries' latent
    kv_rank: int = 0  # the latent of keys and values
    rope_dim: int = 0  # of head_dim, the rotary part, whose key all heads share
    v_dim: int = 0  # of a head's values
    router_shapes: dict = field(default_factory=dict)  # axes of a router's parameter, such as "DE" -> layers with it

    def __post_init__(self):
        for one in dataclasses.fields(self):
            check = COUNT if one.type is int and one.default == 0 else check_of(one.type)
            if check:
                check.require(one.name, getattr(self, one.name))
        if self.n_heads % self.n_kv_heads or self.n_dense > self.n_layers:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} must divide n_heads {self.n_heads}, and at most all "
                             f"{self.n_layers} layers be dense, not {self.n_dense}")
        if self.n_dense < self.n_layers and not (0 < self.top_k <= self.n_experts and self.d_expert):
            raise ValueError(f"layers of {self.n_experts} experts need a width, not {self.d_expert}, and a number of "
                             f"experts for each token, not {self.top_k}")

    def attention(self):
        """(weights of matrix products, other parameters) of one attention layer."""
        D, H, G, d = self.d_model, self.n_heads, self.n_kv_heads, self.head_dim
        if not self.kv_rank:
            weights = D * d * (2 * H + 2 * G)
            return weights, self.bias * (d * (H + 2 * G) + D) + self.qk_norm * d * (H + G)
        queries = D * self.q_rank + self.q_rank * H * d if self.q_rank else D * H * d
        keys = D * (self.kv_rank + self.rope_dim) + self.kv_rank * H * (d - self.rope_dim + self.v_dim)
        return queries + keys + H * self.v_dim * D, self.q_rank + self.kv_rank  # the latents are normalised

    def feed_forward(self, width):
        """(weights, biases) of one feed-forward layer or expert."""
        up = 2 * width if self.gated else width
        return self.d_model * (up + width), self.bias * (up + self.d_model)


@dataclass(frozen=True)
class Part:
    """A part of a model: its parameters in all and for one token, and the forward operations of one token."""

    name: str
    total: int
    active: float
    flops: float


def count(a, context=0):
    """The Parts of an Architecture, then their sum, named "all". context: positions that a token attends to."""
    D, n_moe = a.d_model, a.n_layers - a.n_dense
    weights, others = a.attention()
    scores = 2 * context * a.n_heads * (a.head_dim + (a.v_dim or a.head_dim))
    dense, expert = sum(a.feed_forward(a.d_ff)), sum(a.feed_forward(a.d_expert))
    shared_width = a.n_shared * a.d_expert  # side by side they are one layer
    shared = sum(a.feed_forward(shared_width)) if a.n_shared else 0
    length = {"D": D, "E": a.n_experts, "V": a.vocab_size}
    routers = {shape: n * math.prod(map(length.get, shape)) for shape, n in a.router_shapes.items()}
    vector = (1 + a.norm_shift) * D
    block = weights + others + dense + a.norms * vector

    def part(name, total, active=None, multiplied=None):
        active = total if active is None else active
        return Part(name, total, active, 2 * (active if multiplied is None else multiplied))

    attention = part("attention", a.n_layers * (weights + others), None, a.n_layers * weights)
    parts = [
        part("embedding", a.vocab_size * D + a.n_positions * D, None, 0),
        dataclasses.replace(attention, flops=attention.flops + a.n_layers * scores),
        part("dense layers", a.n_dense * dense, None, a.n_dense * a.feed_forward(a.d_ff)[0]),
        part("experts", n_moe * a.n_experts * expert, n_moe * a.top_k * expert,
             n_moe * a.top_k * a.feed_forward(a.d_expert)[0]),
        part("shared experts", n_moe * shared, None, n_moe * a.feed_forward(shared_width)[0]),
        part("routers", sum(routers.values()), None, routers.get("DE", 0)),
        part("norms", a.n_layers * a.norms * vector + vector, None, 0),
        part("head", 0 if a.tied else a.vocab_size * D, None, a.vocab_size * D),
        part("second head", a.second_head * (2 * D * D + 2 * vector + block), 0)]
    return [*parts, Part("all", *(sum(getattr(p, field) for p in parts) for field in ("total", "active", "flops")))]


def require_size(config: ModelConfig, held: int, times: int = 1) -> None:
    """Raise ValueError if a model that is not made yet needs more than `times` the numbers that its file holds.

    Routers are left out: those that a user defines may not say their shapes.
    """
    needed = sum(part.total for part in count(architecture(config))[:-1] if part.name != "routers")
    if needed > times * held:
        raise ValueError(f"the config asks for {needed:,} parameters, but the file holds {held:,} numbers")


MODERN = {"norm": "rms", "positions": "rotary", "bias": False}  # what the published models have in common
PRESETS = {  # published models at their real sizes; dataclasses.replace makes a small one of the same kind
    "mixtral-8x7b": ModelConfig(  # Jiang et al. 2024
        n_layers=32, moe_layers=tuple(range(32)), d_model=4096, d_ff=14336, n_heads=32, n_kv_heads=8, vocab_size=32000,
        seq_len=32768, n_experts=8, top_k=2, activation="swiglu", **MODERN),
    "grok-1": ModelConfig(  # its published code, 2024
        n_layers=64, moe_layers=tuple(range(64)), d_model=6144, d_ff=32768, n_heads=48, n_kv_heads=8, head_dim=128,
        vocab_size=131072, seq_len=8192, n_experts=8, top_k=2, router_options={"renormalise": False},
        activation="geglu", post_norm=True, tied=True, **MODERN),
    "olmoe-1b-7b": ModelConfig(  # Muennighoff et al. 2024
        n_layers=16, moe_layers=tuple(range(16)), d_model=2048, d_ff=1024, n_heads=16, vocab_size=50304, seq_len=4096,
        n_experts=64, top_k=8, router_options={"renormalise": False}, activation="swiglu", qk_norm=True,
        losses={"z": 0.001}, **MODERN),
    "deepseek-v3": ModelConfig(  # DeepSeek-AI 2024, without its second head
        n_layers=61, moe_layers=tuple(range(3, 61)), d_model=7168, d_ff=18432, d_expert=2048, n_heads=128, head_dim=128,
        attention="latent", q_rank=1536, kv_rank=512, rope_dim=64, v_dim=128, vocab_size=129280, seq_len=4096,
        n_experts=256, n_shared=1, top_k=8, router="sigmoid_bias",
        router_options={"gate_scale": 2.5, "n_groups": 8, "group_limit": 4}, aux_coef=0.0, losses={"sequence": 0.0001},
        activation="swiglu", **MODERN),
}
KINDS = ("mixtral", "olmoe", "grok-1", "deepseek_v2", "deepseek_v3", "llama", "mistral")  # whose keys are understood
KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
UNCOUNTED = ("attention_bias", "mlp_bias")  # keys of biases that are not counted


def architecture(config: ModelConfig | dict, experts_per_token: float | None = None) -> Architecture:
    """The Architecture of a ModelConfig, of a dict of its fields, or of a dict with the keys of a published config.

    experts_per_token: the measured mean, for a ModelConfig whose router does not fix K; None for its top_k.
    Raises ValueError for a dict that is neither.
    """
    if isinstance(config, ModelConfig) or "d_model" in config:
        config = config if isinstance(config, ModelConfig) else ModelConfig.from_dict(config)
        return _of_model(config, experts_per_token)
    missing = [key for key in KEYS if key not in config]
    if missing:
        raise ValueError(f"not a model's config: it lacks {', '.join(missing)} (or, for a tinymoe model, d_model)")
    get, kind = config.get, config.get("model_type")
    if kind not in KINDS:
        raise ValueError(f"model_type {kind!r} is not understood: it must be one of {', '.join(KINDS)}")
    if biased := [key for key in UNCOUNTED if get(key)]:
        raise ValueError(f"{biased[0]} {get(biased[0])!r}: a model with such biases is not counted right here")
    n_experts = get("n_routed_experts") or get("num_local_experts") or get("num_experts") or 0
    n_layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    n_dense = get("first_k_dense_replace", 0) if n_experts else n_layers
    latent = get("kv_lora_rank") or 0
    rope = get("qk_rope_head_dim", 0) if latent else 0
    return Architecture(
        n_layers=n_layers, d_model=config["hidden_size"], vocab_size=config["vocab_size"], n_heads=heads,
        head_dim=get("qk_nope_head_dim", 0) + rope if latent else get("head_dim") or config["hidden_size"] // heads,
        n_kv_heads=get("num_key_value_heads") or heads, d_ff=get("intermediate_size", 0),
        n_dense=n_dense, n_experts=n_experts,
        top_k=get("num_experts_per_tok", 0), d_expert=get("moe_intermediate_size") or get("intermediate_size", 0),
        n_shared=get("n_shared_experts") or 0, tied=bool(get("tie_word_embeddings")),
        norms=4 if kind == "grok-1" else 2,
        qk_norm=kind == "olmoe", q_rank=get("q_lora_rank") or 0, kv_rank=latent,
        rope_dim=rope, v_dim=get("v_head_dim", 0) if latent else 0,
        router_shapes=dict.fromkeys(("DE", "E") if kind == "deepseek_v3" else ("DE",), n_layers - n_dense))


def _of_model(c, experts_per_token):
    shapes = (shape for i in c.moe_layers for shape in find(c.router_of(i)).shapes.values())
    latent, head_dim = c.attention == "latent", c.head_dim or c.d_model // c.n_heads
    top_k = c.top_k if experts_per_token is None else experts_per_token
    return Architecture(
        n_layers=c.n_layers, d_model=c.d_model, vocab_size=c.vocab_size, n_heads=c.n_heads,
        n_kv_heads=c.n_kv_heads or c.n_heads, head_dim=head_dim + c.rope_dim * latent, d_ff=c.d_ff,
        n_dense=c.n_layers - len(c.moe_layers), n_experts=c.n_experts, top_k=top_k, d_expert=c.expert_width,
        n_shared=c.n_shared, gated=c.activation in GATED, tied=c.tied, norms=4 if c.post_norm else 2,
        qk_norm=c.qk_norm, bias=c.bias, norm_shift=c.norm == "layer", second_head=c.mtp_coef > 0,
        n_positions=c.seq_len if c.positions == "learned" and not latent else 0,
        router_shapes=dict(Counter(shapes)),
        **(dict(q_rank=c.q_rank, kv_rank=c.kv_rank, rope_dim=c.rope_dim, v_dim=c.v_dim or head_dim) if latent else {}))
