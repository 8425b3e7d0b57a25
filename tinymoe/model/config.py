"""ModelConfig: everything that makes a model, checked as a whole."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from ..moe.experts import ACTIVATIONS, BACKENDS
from ..layers.nn import LayerNorm, RMSNorm
from ..moe.routers import ROUTERS, check, make
from ..moe.routing import DROP_POLICIES


def whole(value, least=1):
    """Whether a setting is a whole number of at least `least`, and such that an array can have it as its length."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and least <= value < 2**31


WHOLE = "a whole number of at least 1 (and below 2**31)"


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
    norm_eps: float = 1e-5  # added to the variance, or to the mean square
    post_norm: bool = False  # normalise what a layer gives before it is added too, as Grok-1 does
    positions: str = "learned"  # seq_len embeddings, or "rotary"
    rope_theta: float = 10_000.0  # base of the rotary angles
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
    latent_eps: float | None = None  # norm_eps of the latents; None: norm_eps
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
    policy_coef: float = 1.0  # of the policy loss, where the router draws its choices (reinforce)
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
    softmax_over: str | None = None

    def __post_init__(self):
        sizes = "vocab_size n_layers d_model n_heads d_ff seq_len n_experts n_devices max_devices"
        require(self, sizes, whole, WHOLE)
        for name in sizes.split():
            object.__setattr__(self, name, int(getattr(self, name)))  # NumPy's integers are no JSON
        for name, known in (("norm", tuple(NORMS)), ("positions", ("learned", "rotary")),
                            ("attention", ("multi_head", "latent")), ("activation", ACTIVATIONS),
                            ("drop_policy", DROP_POLICIES),
                            ("expert_backend", BACKENDS), ("renormalise", (None, True, False))):
            require(self, name, lambda value: value in known and type(value) is not int,  # 1 is equal to True
                    f"one of {', '.join(map(str, known))}")
        self._check_dense()
        self._check_mixture()
        self._check_router()

    def _check_dense(self):
        """Layers, attention, norms, and what is frozen."""
        require(self, "moe_layers", lambda layers: isinstance(layers, (tuple, list)) and
                all(whole(i, 0) and i < self.n_layers for i in layers),
                f"a list of layers from 0 to n_layers - 1 = {self.n_layers - 1}")
        object.__setattr__(self, "moe_layers", tuple(sorted(set(map(int, self.moe_layers)))))
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}: change one of them")
        require(self, "head_dim v_dim", lambda n: n is None or whole(n), f"{WHOLE}, or None")
        require(self, "n_kv_heads", lambda n: n is None or whole(n) and self.n_heads % n == 0,
                f"a divisor of n_heads {self.n_heads}, or None")
        require(self, "q_rank", lambda n: whole(n, 0), "a whole number of at least 0")
        require(self, "kv_rank", whole, WHOLE)
        require(self, "rope_dim", lambda n: whole(n, 2) and n % 2 == 0, "an even number of at least 2")
        require(self, "norm_eps rope_theta", lambda x: finite(x) and x > 0, "a finite number above 0")
        require(self, "latent_eps", lambda x: x is None or finite(x) and x > 0, "a finite number above 0, or None")
        require(self, "post_norm bias tied qk_norm", lambda value: isinstance(value, bool), "true or false")
        head = self.head_dim or self.d_model // self.n_heads
        require(self, "positions", lambda p: p == "learned" or self.attention == "latent" or head % 2 == 0,
                f"learned where a head has an odd number of entries ({head})")
        require(self, "n_kv_heads qk_norm", lambda value: not value or self.attention != "latent",
                "left out with latent attention")
        require(self, "freeze", lambda parts: isinstance(parts, (tuple, list)) and
                all(isinstance(part, str) for part in parts),
                "a list of pieces of parameter names")
        object.__setattr__(self, "freeze", tuple(self.freeze))

    def _check_mixture(self):
        """Experts, losses and devices."""
        require(self, "d_expert", lambda width: width is None or whole(width), f"{WHOLE}, or None for d_ff")
        require(self, "n_shared", lambda n: whole(n, 0), "a whole number of at least 0")
        require(self, "top_k", finite, "a finite number above 0")
        require(self, "capacity_factor", lambda factor: factor is None or finite(factor) and factor > 0,
                "a number above 0, or None for no limit")
        require(self, "aux_coef z_coef importance_coef load_coef sequence_coef device_coef communication_coef "
                "policy_coef mtp_coef", finite, "a finite number of at least 0")
        require(self, "n_devices", lambda n: self.n_experts % n == 0, f"a divisor of n_experts {self.n_experts}")
        require(self, "max_devices", lambda n: n <= self.n_devices, f"at most n_devices {self.n_devices}")
        require(self, "device_coef communication_coef", lambda value: value == 0 or self.n_devices > 1,
                "0 where n_devices is 1")
        soft = [name for name, r in ROUTERS.items() if r.has_soft_load]
        require(self, "load_coef", lambda value: value == 0 or self.router in soft and self.n_groups in (None, 1),
                f"0 but for {', '.join(soft)} without groups")

    @property
    def expert_width(self):
        """The hidden width of an expert."""
        return self.d_ff if self.d_expert is None else self.d_expert

    def _check_router(self):
        """Make the router once, at a width of 1: it refuses what does not fit, numbers of another kind included."""
        known = {name for router in ROUTERS.values() for name in router.options}
        given = {field.name: value for field in dataclasses.fields(self)
                 if field.name in known and field.default is None and (value := getattr(self, field.name)) is not None}
        check(self.router, self.n_experts, self.top_k, given)
        for kind, fits, expected in ((int, whole, WHOLE),
                                     (float, finite, "a finite number of at least 0")):
            names = [f.name for f in dataclasses.fields(self) if f.name in given and f.type == kind | None]
            require(self, " ".join(names), fits, f"{expected}, or None")
        self.smallest_router()

    def smallest_router(self):
        """The router at a width of 1 and for a vocabulary of 2: what it refuses, and the shapes of its parameters."""
        options = self.router_options()
        if "vocab_size" in options:
            options["vocab_size"] = 2
        return make(self.router, 1, self.n_experts, self.top_k, **options)

    def router_options(self):
        """The keyword arguments that the router takes from this config."""
        wanted = ROUTERS[self.router].options
        return {name: value for name in wanted if (value := getattr(self, name, None)) is not None}

    def sizes(self):
        """What the dense parts follow from."""
        names = """vocab_size n_layers d_model n_heads d_ff seq_len activation norm norm_eps post_norm positions tied
            bias rope_theta attention head_dim n_kv_heads qk_norm q_rank kv_rank rope_dim v_dim latent_eps""".split()
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
