"""Count parameters and FLOPs without allocating the model, part by part.

*Total* is every number of the model, tied embeddings once. *Active* is what one token uses: K of E experts, all shared
experts, the router, the norms, and the whole of embedding and head, which some papers leave out. FLOPs are those of the
forward pass of one token: two for each active weight of a matrix product, none for looking up an embedding, and
attention over `context` positions.
"""

import math
from dataclasses import dataclass

from ..autograd.functional import GATED
from ..moe import routers as known_routers
from ..moe.settings import COUNT, DEPTH, FLAG, NOT_NEGATIVE, WHOLE, Check
from .config import ModelConfig
from .config_checks import LAYERS, NAMES


@dataclass(frozen=True)
class Part:
    """A part of a model: its parameters in all and for one token, and the forward operations of one token."""

    name: str
    total: int
    active: float
    flops: float


def count(config: ModelConfig | dict | str, context: float = 0, experts_per_token: float | None = None,
          length: int | None = None) -> list[Part]:
    """The Parts of a model, then their sum, named "all". config: anything that `architecture` takes.

    context: positions that a token attends to. length: of a text instead; then the mean over its tokens counts.
    experts_per_token: the measured mean, for a router that does not fix K; None for top_k.
    Copy and zero experts have no parameters; without a measured mean they have their share of the choices, or what the
    option real_k of a router leaves them. Raises ValueError for a negative context, a length below 1, and for more
    experts_per_token than there are.
    """
    c = architecture(config)
    if not (context >= 0 and (length is None or length >= 1)):
        raise ValueError(f"context {context} must be at least 0, and length {length} at least 1")
    if experts_per_token is not None and not 0 <= experts_per_token <= c.n_experts:
        raise ValueError(f"experts_per_token {experts_per_token} must be from 0 to n_experts {c.n_experts}")
    D, n_moe = c.d_model, len(c.moe_layers)
    attention, dense, expert = _attention(c), _feed_forward(c, c.d_ff), _feed_forward(c, c.expert_width)
    shared = _feed_forward(c, c.shared_width) if c.n_shared else (0, 0)  # side by side, one wide layer
    shared = shared[0] + D * c.shared_gate, shared[1]
    norm, norms = 2 * D if c.norm == "layer" else D, 4 if c.post_norm else 2
    axes_of = {"D": D, "E": c.n_columns, "V": c.vocab_size, "R": _router_width(c)}
    shapes = [axes for layer in c.moe_layers for axes in known_routers.find(c.router_of(layer)).shapes.values()]
    sizes = [(math.prod(map(axes_of.get, axes)), axes in ("DE", "DR", "RE")) for axes in shapes]
    if c.losses.get("global_batch"):
        sizes += [(c.n_columns, False)] * n_moe  # the running mean of the load
    routers = sum(n for n, is_matrix in sizes if is_matrix), sum(n for n, is_matrix in sizes if not is_matrix)
    seen = sum(_positions(c.window_of(i), context, length) for i in range(c.n_layers))
    if experts_per_token is None:
        experts_per_token = c.top_k if c.n_columns == c.n_experts else _real_experts_per_token(c)
    second_head = 2 * D * D + (2 + norms) * norm + sum(attention) + sum(dense) if c.mtp_coef else 0

    def part(name, weights, others, copies=1, used=None, more_flops=0):
        """weights: in products of matrices; others: all else. used: the copies that a token uses; None for all."""
        used = copies if used is None else used
        return Part(name, copies * (weights + others), used * (weights + others), 2 * used * weights + more_flops)

    parts = [
        part("embedding", 0, (c.vocab_size + (c.seq_len if c.learned_positions else 0)) * D),
        part("attention", *attention, c.n_layers, more_flops=seen * _score_flops(c)),
        part("dense layers", *dense, c.n_layers - n_moe),
        part("experts", *expert, n_moe * c.n_experts, n_moe * experts_per_token),
        part("shared experts", *shared, n_moe),
        part("routers", *routers),
        part("norms", 0, norm, c.n_layers * norms + 1),
        part("head", 0, 0, more_flops=2 * c.vocab_size * D) if c.tied else part("head", c.vocab_size * D, 0),
        part("second head", 0, second_head, used=0)]
    return [*parts, Part("all", *(sum(getattr(p, field) for p in parts) for field in ("total", "active", "flops")))]


def _positions(window, context, length):
    """Positions that a token attends to in one layer; window: 0 for all."""
    if length is None:
        return min(context, window or context)
    window = min(window or length, length)
    return window - window * (window - 1) / (2 * length)  # token t sees min(t, window), itself included


def _attention(c):
    """(weights of matrix products, other parameters) of one attention layer."""
    D, H, G, d = c.d_model, c.n_heads, c.n_kv_heads or c.n_heads, c.head_width
    if c.attention == "latent":  # DeepSeek-V2, eq. 37 to 47; the latents are normalised
        v = c.v_dim or d
        queries = (D + H * (d + c.rope_dim)) * c.q_rank if c.q_rank else D * H * (d + c.rope_dim)
        return queries + D * (c.kv_rank + c.rope_dim) + c.kv_rank * H * (d + v) + H * v * D, c.q_rank + c.kv_rank
    biases = {"none": 0, "qkv": d * (H + 2 * G), "all": d * (H + 2 * G) + D}[c.attention_biases]
    norms = d * (2 if c.qk_norm == "head" else H + G) if c.qk_norm else 0
    return D * d * (2 * H + 2 * G), biases + norms + H * c.sinks


def _router_width(c):
    """R, the width of a router's projection, where one has the option; else 0."""
    found = (known_routers.find(name).options().get("router_width") for name in c.routers)
    return c.router_options.get("router_width", next((option.default for option in found if option), 0))


def _real_experts_per_token(c):
    """Of K choices those of experts, not of copies or zeros; the mean over MoE layers."""
    routers = [known_routers.find(c.router_of(layer)) for layer in c.moe_layers]
    options = [router.options().get("real_k") for router in routers]
    steered = [router.reachable(c.router_options.get("real_k", option.default), c.top_k, c.n_columns - c.n_experts)
               for router, option in zip(routers, options) if option]
    return (sum(steered) + (len(options) - len(steered)) * c.top_k * c.n_experts / c.n_columns) / max(1, len(options))


def _score_flops(c):
    """Operations of all heads of one layer for each position that a token attends to."""
    d = c.head_width
    return 2 * c.n_heads * (d + c.rope_dim + (c.v_dim or d) if c.attention == "latent" else 2 * d)


def _feed_forward(c, width):
    """(weights, biases) of one feed-forward layer or expert."""
    up = 2 * width if c.activation in GATED else width
    return c.d_model * (up + width), (up + c.d_model if c.bias else 0)


def require_size(config: ModelConfig, held: int) -> None:
    """Raise ValueError if a model that is not made yet needs more than ten times the numbers that its file holds.

    Smaller differences are found when the arrays are loaded by name. Routers are not counted, because a user's router
    may not give its shapes.
    """
    needed = sum(part.total for part in count(config)[:-1] if part.name != "routers")
    if needed > 10 * held:
        raise ValueError(f"the config asks for {needed:,} parameters, but the file holds {held:,} numbers")


MODERN = {"norm": "rms", "positions": "rotary", "bias": False}  # what the published models have in common
# Published models at their real sizes, to count. dataclasses.replace makes a small one of the same kind; then set
# aux_coef, losses, rope_theta and norm_eps yourself, which are the defaults here.
PRESETS = {
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
        **MODERN),
    "qwen1.5-moe-a2.7b": ModelConfig(  # Qwen team 2024; the architecture of Qwen2-MoE
        n_layers=24, moe_layers=tuple(range(24)), d_model=2048, d_ff=5632, d_expert=1408, n_heads=16,
        attention_bias="qkv", vocab_size=151936, seq_len=8192, n_experts=60, top_k=4, n_shared=1, d_shared=5632,
        shared_gate=True, router_options={"renormalise": False}, activation="swiglu", **MODERN),
    "qwen3-30b-a3b": ModelConfig(  # Yang et al. 2025
        n_layers=48, moe_layers=tuple(range(48)), d_model=2048, d_ff=6144, d_expert=768, n_heads=32, n_kv_heads=4,
        head_dim=128, qk_norm="head", vocab_size=151936, seq_len=40960, n_experts=128, top_k=8, activation="swiglu",
        **MODERN),
    "gpt-oss-20b": ModelConfig(  # OpenAI 2025
        n_layers=24, moe_layers=tuple(range(24)), d_model=2880, d_ff=2880, n_heads=64, n_kv_heads=8, head_dim=64,
        vocab_size=201088, seq_len=131072, n_experts=32, top_k=4, router="biased_top_k", activation="clamped_swiglu",
        windows=(128, 0) * 12, sinks=True, yarn={"factor": 32.0, "original_length": 4096, "truncate": False},
        norm="rms", positions="rotary"),
    "deepseek-v3": ModelConfig(  # DeepSeek-AI 2024, without its second head
        n_layers=61, moe_layers=tuple(range(3, 61)), d_model=7168, d_ff=18432, d_expert=2048, n_heads=128, head_dim=128,
        attention="latent", q_rank=1536, kv_rank=512, rope_dim=64, v_dim=128, vocab_size=129280, seq_len=4096,
        n_experts=256, n_shared=1, top_k=8, router="sigmoid_bias",
        router_options={"gate_scale": 2.5, "n_groups": 8, "group_limit": 4}, activation="swiglu", **MODERN),
}
KINDS = "mixtral olmoe qwen2_moe qwen3_moe gpt_oss grok-1 deepseek_v2 deepseek_v3 llama mistral".split()  # known
KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "intermediate_size")
LATENT = """num_experts_per_tok n_routed_experts n_shared_experts moe_intermediate_size kv_lora_rank qk_nope_head_dim
    qk_rope_head_dim v_head_dim first_k_dense_replace q_lora_rank"""
SIZES = {  # further keys that a published config.json needs: whole numbers, but for those of CHECKS
    "mixtral": "num_experts_per_tok num_key_value_heads num_local_experts", "olmoe": "num_experts_per_tok num_experts",
    "qwen2_moe": """num_experts_per_tok num_key_value_heads num_experts moe_intermediate_size
        shared_expert_intermediate_size""",
    "qwen3_moe": "num_experts_per_tok num_key_value_heads num_experts moe_intermediate_size",
    "gpt_oss": "num_experts_per_tok num_key_value_heads num_local_experts head_dim", "mistral": "num_key_value_heads",
    "grok-1": "num_experts_per_tok num_key_value_heads num_experts", "deepseek_v2": LATENT, "deepseek_v3": LATENT}
UNCOUNTED = ("attention_bias", "mlp_bias")  # keys of biases that are not counted
OBJECT = Check(lambda value: isinstance(value, dict), "an object: key to value")
CHECKS = {  # key -> what it may hold where it is there; null where that is the default
    key: check for keys, check in (
        ("num_hidden_layers", DEPTH), ("hidden_size num_attention_heads vocab_size moe_intermediate_size", WHOLE),
        ("decoder_sparse_step moe_layer_freq", WHOLE),
        ("first_k_dense_replace max_position_embeddings", COUNT), ("q_lora_rank n_group topk_group", WHOLE.or_none()),
        ("sliding_window num_nextn_predict_layers", COUNT.or_none()), ("routed_scaling_factor", NOT_NEGATIVE),
        ("attention_bias qkv_bias norm_topk_prob rope_interleave", FLAG),
        ("mlp_bias use_sliding_window tie_word_embeddings", FLAG.or_none()), ("mlp_only_layers", LAYERS.or_none()),
        ("layer_types", NAMES.or_none()), ("rope_scaling rope_parameters quantization_config", OBJECT.or_none()))
    for key in keys.split()}


def architecture(config: ModelConfig | dict | str) -> ModelConfig:
    """A ModelConfig as it is, that of a name in PRESETS, or that of a dict: its fields, or a published config.json.

    Of a config.json it has what can be counted; how its router makes gates is read by `interop.load`. Raises ValueError
    for others.
    """
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"unknown model {config!r}: choose one of {', '.join(PRESETS)}")
        return PRESETS[config]
    if isinstance(config, ModelConfig):
        return config
    if isinstance(config, dict) and "d_model" in config:
        return ModelConfig.from_dict(config)
    return architecture_of_published(checked(config))


def architecture_of_published(config: dict) -> ModelConfig:
    """The ModelConfig of a config.json that is `checked`. Raises ValueError for missing keys and unknown kinds."""
    get, kind = config.get, config.get("model_type")
    if missing := [key for key in (*KEYS, *SIZES.get(str(kind), "").split()) if key not in config]:
        raise ValueError(f"not a model's config: it lacks {', '.join(missing)} (or, for a tinymoe model, d_model)")
    if kind not in KINDS:
        raise ValueError(f"model_type {kind!r} is not understood: it must be one of {', '.join(KINDS)}")
    if biased := [key for key in UNCOUNTED if get(key) and kind not in ("qwen3_moe", "gpt_oss")]:
        raise ValueError(f"{biased[0]} {get(biased[0])!r}: a model with such biases is not counted right here")
    n_experts = get("n_routed_experts") or get("num_local_experts") or get("num_experts") or 0
    moe_layers = _moe_layers(config, n_experts)
    sizes = {"n_kv_heads": get("num_key_value_heads"), "head_dim": get("head_dim")}
    if get("kv_lora_rank"):
        sizes = {"attention": "latent", "q_rank": get("q_lora_rank") or 0, "kv_rank": get("kv_lora_rank"),
                 "head_dim": get("qk_nope_head_dim"), "rope_dim": get("qk_rope_head_dim"), "v_dim": get("v_head_dim")}
    if n_experts:
        sizes |= {"n_experts": n_experts, "top_k": get("num_experts_per_tok"), "n_shared": get("n_shared_experts") or 0,
                  "d_expert": get("moe_intermediate_size") or get("intermediate_size")}
    return ModelConfig(**{
        "n_layers": config["num_hidden_layers"], "moe_layers": moe_layers, "d_model": config["hidden_size"],
        "vocab_size": config["vocab_size"], "n_heads": config["num_attention_heads"], "d_ff": get("intermediate_size"),
        "activation": "swiglu", "tied": bool(get("tie_word_embeddings"))} | MODERN | sizes | _particulars(config, kind))


def checked(config: dict) -> dict:
    """A published config.json, its values checked, with the name that most files give to a key of newer ones.

    Raises ValueError for a value that its key cannot hold. Missing keys are not looked for.
    """
    OBJECT.require("a model's config", config)
    if config.get("model_type") in ("qwen3_moe", "grok-1") and "num_local_experts" in config:
        config = {"num_experts": config["num_local_experts"]} | config
    sizes = (*KEYS, *SIZES.get(str(config.get("model_type")), "").split())
    for key, check in (dict.fromkeys(sizes, COUNT) | CHECKS).items():
        if key in config:
            check.require(key, config[key])
    return config


def _particulars(config, kind):
    """The fields of ModelConfig in which a family differs from the others."""
    get = config.get
    if kind == "qwen2_moe":
        return {"attention_bias": "qkv" if get("qkv_bias", True) else "none", "n_shared": 1, "shared_gate": True,
                "d_shared": config["shared_expert_intermediate_size"]}
    if kind == "qwen3_moe":
        return {"attention_bias": "all" if get("attention_bias") else "none", "qk_norm": "head"}
    if kind == "gpt_oss":
        types = get("layer_types") or ["sliding_attention", "full_attention"] * (config["num_hidden_layers"] // 2 + 1)
        if "sliding_attention" in types:
            WHOLE.require("sliding_window", get("sliding_window"))
        return {"attention_bias": "all" if get("attention_bias", True) else "none", "bias": True, "sinks": True,
                "windows": [get("sliding_window") if name == "sliding_attention" else 0
                            for name in types[:config["num_hidden_layers"]]],
                "router": "biased_top_k", "activation": "clamped_swiglu"}
    if kind in ("mistral", "mixtral") and get("sliding_window"):
        return {"windows": [get("sliding_window")] * config["num_hidden_layers"]}
    return {"olmoe": {"qk_norm": True}, "grok-1": {"post_norm": True, "tied": get("tie_word_embeddings") is not False},
            "deepseek_v3": {"router": "sigmoid_bias"}}.get(kind, {})


def _moe_layers(config, n_experts):
    """The layers of a published config that have experts."""
    n_layers, first = config["num_hidden_layers"], config.get("first_k_dense_replace", 0)
    step, rest = config.get("decoder_sparse_step", 1), config.get("moe_layer_freq", 1)
    dense = config.get("mlp_only_layers") or []
    return tuple(i for i in range(first, n_layers)
                 if n_experts and (i + 1) % step == 0 and i % rest == 0 and i not in dense)
