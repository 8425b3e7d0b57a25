"""What the fields of a ModelConfig may hold, alone and together."""

from ..layers.attention_checks import check_heads
from ..moe import routers
from ..moe.losses import LOSSES
from ..moe.routers.options import OF_THE_MODEL, why_not
from ..moe.settings import COUNT, FLAG, NOT_NEGATIVE, POSITIVE, Check
from .input_checks import require_losses

QK_NORM = Check(lambda value: FLAG.fits(value) or value == "head", 'true, false or "head"')
YARN_OPTIONS = {**dict.fromkeys(("factor", "original_length", "beta_fast", "beta_slow"), POSITIVE),
                "attention_factor": POSITIVE.or_none(), "truncate": FLAG}
NAMES = Check(lambda value: isinstance(value, (tuple, list)) and all(isinstance(one, str) for one in value),
              "a list of names")
LAYERS = Check(lambda value: isinstance(value, (tuple, list)) and all(map(COUNT.fits, value)),
               "a list of whole numbers of at least 0, such as [1, 3]")
YARN = Check(lambda value: isinstance(value, dict) and {"factor", "original_length"} <= value.keys() and all(
    name in YARN_OPTIONS and YARN_OPTIONS[name].fits(one) for name, one in value.items()),
    "an object with factor and original_length, and perhaps beta_fast, beta_slow, truncate and attention_factor")
ROUTER = Check(lambda value: isinstance(value, str) or NAMES.fits(value), "a name, or a list of names")
OPTIONS = Check(lambda value: isinstance(value, dict) and all(isinstance(name, str) for name in value),
                "an object: option name to value")
COEFFICIENTS = Check(lambda value: isinstance(value, dict) and all(map(NOT_NEGATIVE.fits, value.values())),
                     "an object: name of a loss to a finite number of at least 0")


def check_order(config) -> None:
    """Raise ValueError for a list of routers beside layers that do not rise: their pairs would change when sorted."""
    layers = list(config.moe_layers)
    if not isinstance(config.router, str) and layers != sorted(set(layers)):
        raise ValueError(f"moe_layers {layers} must rise where router is a list, one for each of them")


def check_together(config) -> None:
    """Raise ValueError where the values of a ModelConfig do not fit together."""
    _check_dense(config)
    _check_mixture(config)
    _check_routers(config)


def _refuse(c, name, wrong, expected):
    if wrong:
        raise ValueError(f"{name} {getattr(c, name)!r} must be {expected}")


def _check_dense(c):
    """Check the settings of layers and attention together."""
    head, latent = c.head_width, c.attention == "latent"
    _refuse(c, "moe_layers", any(i >= c.n_layers for i in c.moe_layers),
            f"a list of layers from 0 to n_layers - 1 = {c.n_layers - 1}")
    check_heads(c.d_model, c.n_heads, c.head_dim)
    _refuse(c, "n_kv_heads", c.n_kv_heads is not None and c.n_heads % c.n_kv_heads,
            f"a divisor of n_heads {c.n_heads}, or None")
    _refuse(c, "positions", c.positions == "rotary" and not latent and head % 2,
            f"learned where a head has an odd number of entries ({head})")
    _refuse(c, "windows", c.windows and len(c.windows) != c.n_layers,
            f"a list with one number for each of the {c.n_layers} layers")
    _refuse(c, "yarn", c.yarn and c.positions != "rotary", "left out without rotary positions")
    _refuse(c, "rope_theta", c.yarn and c.rope_theta <= 1, "above 1 where yarn stretches the positions")
    for name in ("n_kv_heads", "qk_norm", "attention_bias", "windows", "sinks", "yarn"):
        _refuse(c, name, getattr(c, name) and latent, "left out with latent attention")


def _check_mixture(c):
    """Check the settings of experts, losses and devices together."""
    _refuse(c, "n_devices", c.n_experts % c.n_devices, f"a divisor of n_experts {c.n_experts}")
    _refuse(c, "n_devices", c.n_devices > 1 and c.n_columns > c.n_experts,
            "1 where there are copy or zero experts")
    _refuse(c, "max_devices", c.max_devices > c.n_devices, f"at most n_devices {c.n_devices}")
    for name in ("d_shared", "shared_gate"):
        _refuse(c, name, getattr(c, name) and not c.n_shared, "left out where n_shared is 0")
    _check_losses(c)


def _check_losses(c):
    """Check the coefficients of losses. Some apply to some routers alone."""
    require_losses(LOSSES)
    for name, coefficient in c.losses.items():
        if name == "balance" or name not in LOSSES:
            known = ", ".join(one for one in LOSSES if one != "balance")
            raise ValueError(f"unknown loss {name!r}: choose one of {known}; the balance loss is set by aux_coef")
        if name in ("device", "communication") and coefficient and c.n_devices == 1:
            raise ValueError(f"losses.{name} {coefficient} must be 0 where n_devices is 1")
        fits = LOSSES[name].applies
        grouped = name == "load" and c.router_options.get("n_groups", 1) != 1
        if coefficient and (grouped or not any(fits(routers.find(router)) for router in c.routers)):
            fitting = ", ".join(router for router, cls in routers.ROUTERS.items() if fits(cls))
            raise ValueError(f"losses.{name} {coefficient} must be 0 unless the router is one of {fitting}"
                             f"{' without groups' if name == 'load' else ''}")


def _check_routers(c):
    """Check the options with the classes of the routers. No router is made, because its arrays may be large."""
    if not isinstance(c.router, str) and len(c.router) != len(c.moe_layers):
        raise ValueError(f"router {list(c.router)} must have one name for each of the {len(c.moe_layers)} "
                         "MoE layers")
    known = set().union(*(routers.find(name).options() for name in c.routers)) - OF_THE_MODEL
    for option in c.router_options.keys() - known:
        taken = ", ".join(sorted(known)) or "none"
        why = next(filter(None, (why_not(routers.find(name), routers.Router, option) for name in c.routers)), "")
        raise ValueError(f"{option} is no option of {', '.join(c.routers)}, which takes {taken}{why}")
    for name in c.routers:
        routers.find(name).check(c.n_columns, c.top_k, c.options_of(name))
