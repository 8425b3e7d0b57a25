"""ModelConfig: everything that makes a model. config_checks.py says what its fields may hold."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..autograd.functional import ACTIVATIONS
from ..layers.attention_checks import BIASES
from ..layers.nn import NORMS
from ..moe import routers
from ..moe.experts import BACKENDS
from ..moe.losses import LOSSES
from ..moe.routing import DROP_POLICIES
from ..moe.settings import COUNT, DEPTH, EVEN, FLAG, NOT_NEGATIVE, POSITIVE, WHOLE, check_fields, one_of, setting
from . import config_checks as checks
from .former import current


@dataclass(frozen=True)
class ModelConfig:
    """Everything that makes a model. Raises ValueError where a value is wrong, or values do not fit together."""

    # the transformer
    vocab_size: int = setting(256, "number of different tokens; bytes need 256", WHOLE)
    n_layers: int = setting(6, "blocks of attention and feed-forward layer", DEPTH)
    d_model: int = setting(128, "width D of the hidden states", WHOLE)
    n_heads: int = setting(4, "attention heads", WHOLE)
    d_ff: int = setting(512, "hidden width of the dense feed-forward layers", WHOLE)
    seq_len: int = setting(128, "the longest sequence, in tokens", WHOLE)
    activation: str = setting("gelu", "of feed-forward layers and experts: " + ", ".join(ACTIVATIONS),
                              one_of(*ACTIVATIONS))
    norm: str = setting("layer", "layer (Ba et al. 2016) or rms (Zhang & Sennrich 2019)", one_of(*NORMS))
    norm_eps: float = setting(1e-5, "added to the variance, or to the mean square", POSITIVE)
    post_norm: bool = setting(False, "normalise a layer's output too, before it is added, as Grok-1 does", FLAG)
    positions: str = setting("learned", "learned embeddings, or rotary", one_of("learned", "rotary"))
    rope_theta: float = setting(10_000.0, "base of the rotary angles", POSITIVE)
    bias: bool = setting(True, "biases in linear layers and experts", FLAG)
    tied: bool = setting(False, "the output layer is the token embedding", FLAG)
    # attention
    attention: str = setting("multi_head", "multi_head, or latent (DeepSeek-V2)", one_of("multi_head", "latent"))
    head_dim: int | None = setting(None, "width of a head; by default d_model / n_heads", WHOLE.or_none())
    n_kv_heads: int | None = setting(None, "heads of keys and values; by default n_heads", WHOLE.or_none())
    qk_norm: bool | str = setting(False, "RMS-normalise queries and keys: true, all heads at once; \"head\", each head",
                                  checks.QK_NORM)
    attention_bias: str | None = setting(None, "biases of attention: none, qkv, or all (qkv and output); by default "
                                         "all where bias is true", one_of(*BIASES).or_none())
    windows: tuple = setting((), "positions that attention sees: a number for each layer, 0 or [] for all",
                             checks.LAYERS)
    sinks: bool = setting(False, "a learned logit of each head that only takes weight away (GPT-OSS)", FLAG)
    yarn: dict | None = setting(None, "stretched rotary positions: {\"factor\": 32, \"original_length\": 4096, ...}",
                                checks.YARN.or_none())
    q_rank: int = setting(0, "latent attention: width of the queries' latent; 0 for none", COUNT)
    kv_rank: int = setting(64, "latent attention: width of the latent of keys and values", WHOLE)
    rope_dim: int = setting(16, "latent attention: width of the rotary part of a head", EVEN)
    v_dim: int | None = setting(None, "latent attention: width of values; by default head_dim", WHOLE.or_none())
    latent_eps: float | None = setting(None, "norm_eps of the latents; by default norm_eps", POSITIVE.or_none())
    # the mixture
    moe_layers: tuple = setting((1, 3, 5), "layers with experts, counted from 0; [] for a dense model", checks.LAYERS)
    n_experts: int = setting(8, "experts E of each MoE layer", WHOLE)
    d_expert: int | None = setting(None, "hidden width of an expert; by default d_ff", WHOLE.or_none())
    n_copy: int = setting(0, "further columns of the router whose expert returns its input (MoE++)", COUNT)
    n_zero: int = setting(0, "further columns of the router whose expert returns 0 (MoE++)", COUNT)
    n_shared: int = setting(0, "further experts that serve every token", COUNT)
    d_shared: int | None = setting(None, "hidden width of a shared expert; by default d_expert", WHOLE.or_none())
    shared_gate: bool = setting(False, "multiply the shared experts by sigmoid(x w), as Qwen2-MoE does", FLAG)
    router: str | tuple = setting("top_k", "name of the router, or a list with one name for each MoE layer",
                                 checks.ROUTER)
    router_options: dict = setting(None, "options of the router; those not given have the router's defaults",
                                   checks.OPTIONS.or_none())
    top_k: float = setting(2, "experts K per token; a mean, perhaps a fraction, for routers that vary it", POSITIVE)
    capacity_factor: float | None = setting(None, "limit on an expert's load, divided by the mean load; null: no limit",
                                            POSITIVE.or_none())
    drop_policy: str = setting("order", "what a limit drops: later choices (order), or small gates (gate)",
                               one_of(*DROP_POLICIES))
    expert_backend: str = setting("numba", f"how experts are computed: {', '.join(BACKENDS)}", one_of(*BACKENDS))
    n_devices: int = setting(1, "simulated devices, which share the experts equally", WHOLE)
    max_devices: int = setting(1, "devices that a token may reach, for the communication loss", WHOLE)
    # the losses, besides the cross-entropy
    aux_coef: float = setting(0.01, "coefficient of the balance loss, the mean over MoE layers", NOT_NEGATIVE)
    losses: dict = setting(None, "coefficients of other losses, means over layers too", checks.COEFFICIENTS.or_none())
    balance_batches: int = setting(16, "batches of the running mean of the load in losses.global_batch", WHOLE)
    mtp_coef: float = setting(0.0, "coefficient of a second head that predicts the token after the next (DeepSeek-V3)",
                              NOT_NEGATIVE)
    freeze: tuple = setting((), "parameters that are not trained: parts of their names, such as router; a rule that "
                            "moves a bias stops where the weight of its router is frozen", checks.NAMES)

    def __post_init__(self):
        check_fields(self)
        checks.check_order(self)
        for name, value in (("moe_layers", tuple(sorted(set(map(int, self.moe_layers))))),
                            ("windows", tuple(map(int, self.windows))),
                            ("freeze", tuple(self.freeze)), ("losses", self.losses or {}),
                            ("router_options", self.router_options or {}),
                            ("router", self.router if isinstance(self.router, str) else tuple(self.router))):
            object.__setattr__(self, name, value)
        checks.check_together(self)

    @property
    def head_width(self) -> int:
        """The width of an attention head, without its rotary part in latent attention."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def attention_biases(self) -> str:
        """The linear layers of attention that have a bias: none, qkv or all."""
        return self.attention_bias or ("all" if self.bias and self.attention != "latent" else "none")

    def window_of(self, layer: int) -> int:
        """How many positions the attention of a layer sees; 0 for all."""
        return self.windows[layer] if self.windows else 0

    @property
    def learned_positions(self) -> bool:
        """Whether there is a table of position embeddings."""
        return self.positions == "learned" and self.attention != "latent"

    @property
    def expert_width(self) -> int:
        """The hidden width of an expert."""
        return self.d_expert or self.d_ff

    @property
    def shared_width(self) -> int:
        """The hidden width of all shared experts together."""
        return self.n_shared * (self.d_shared or self.expert_width)

    @property
    def n_columns(self) -> int:
        """Columns of the gate matrix: the experts, then copy experts, then zero experts."""
        return self.n_experts + self.n_copy + self.n_zero

    @property
    def routers(self) -> tuple[str, ...]:
        """The different routers, by name, in order."""
        return (self.router,) if isinstance(self.router, str) else tuple(dict.fromkeys(self.router))

    def router_of(self, layer: int) -> str | None:
        """The name of the router of a layer, counted from 0; None for a dense layer."""
        if layer not in self.moe_layers:
            return None
        return self.router if isinstance(self.router, str) else self.router[self.moe_layers.index(layer)]

    def options_of(self, router: str) -> dict[str, Any]:
        """The keyword arguments that a router takes from this config."""
        given = self.router_options | {"vocab_size": self.vocab_size, "n_real": self.n_experts}
        return {name: given[name] for name in routers.find(router).options() if name in given}

    def coefficients(self) -> dict[str, float]:
        """name -> coefficient of every loss of LOSSES; 0 where none is set."""
        needed = {name: value for router in self.routers for name, value in routers.find(router).losses.items()}
        return dict.fromkeys(LOSSES, 0.0) | {"balance": self.aux_coef} | needed | self.losses

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict that from_dict takes back."""
        return {name: list(value) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The config of a dict, of this version or an earlier one. Raises ValueError for keys it does not know."""
        values = current(values)
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown ModelConfig keys: {', '.join(unknown)}")
        return cls(**values)
