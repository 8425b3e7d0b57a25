"""What all routers share: the context they may read, and the base class with their table."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...autograd import functional as F
from ...autograd.tensor import Tensor
from ...layers.nn import INIT_STD, Module, normal, zeros
from ..losses import LossContext
from ..routing import Routing
from .checks import check_input, check_name, check_output, check_top_k, require_field
from .options import check_options, meaning_of, options_of

ROUTERS: dict[str, type["Router"]] = {}  # in the order of definition


@dataclass(frozen=True)
class RouteContext:
    """What a router may know besides the hidden states.

    ids: (B, T) tokens, N = B * T; rows of x follow them, sequence by sequence.
    training: turns on noise and other behaviour of training. rng: the generator for it.
    causal: decide each token's route from the prefix of its own sequence alone. Routers with causal and causal_training
        do so anyway; the others change their rule.
    domain: (B,) the domain of each sequence, an integer; known in training and evaluation, not for other texts.
    carried: values that a layer's router passes to the routers of later layers, within one forward pass.
    ids and domain may be lists, and rng a seed: `training=True, rng=0` in every step repeats the same noise.
    """

    ids: np.ndarray | None = None
    training: bool = False
    rng: np.random.Generator | None = None
    causal: bool = False
    carried: dict = field(default_factory=dict)
    domain: np.ndarray | None = None

    def __post_init__(self):
        for name, convert in ("ids", np.asarray), ("rng", np.random.default_rng), ("domain", np.asarray):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, convert(value))

    def need(self, name: str, router: "Router") -> Any:
        """The field `name`: ids, rng or domain. Raises RouteError, a ValueError, where it is None."""
        return require_field(self, name, router.name)


class Router(Module):
    """router(x (N, D) Tensor, RouteContext) -> Routing.

    A subclass `class Mine(Router, name="mine")` enters ROUTERS under its name. Its `forward(x, context)` takes x (N, D)
    and returns a Routing of N tokens; call the router itself, which checks both. Its options are annotated class
    attributes such as `jitter: float = 0.0`, or keyword arguments of an `__init__` of its own. The
    annotation checks the value: int is at least 1, float at least 0; for others see settings.check_of, or extend
    `check`. A line `NAME: meaning` of the docstring says what the option means. A subclass that sets an option of its
    parent without annotation fixes it. The class attributes below describe the router: `cli.py routers`
    prints them, and the model reads them, so no code depends on the name of a router.
    A Tensor attribute is a parameter, and saved (see Module); keep anything else as an array, which is not saved.
    """

    paper = "–"
    formula = used_by = "–"  # its choice and gates in one line, and who trains with it; a page shows none inherited
    chooses = "token"  # "token" chooses its experts, "expert" its tokens, "sequence" for its tokens, or "neither"
    balanced = "no"  # whether the load is equal by construction
    causal = True  # outside training, a token's route depends on its own prefix alone
    causal_training = True  # and while training
    learned = True
    cost = "2 N D E"  # floating-point operations and what else takes time
    shapes = {}  # parameter -> its axes: D width, E experts, V vocabulary, R the option router_width, "" a number
    losses = {}  # coefficients of losses.LOSSES that this router needs; they hold for all layers of its model
    mean_k = False  # top_k is only the mean over tokens and may be a fraction
    top_1_only = False
    sampled = False  # while training it draws from its probs, as the policy loss needs
    has_soft_load = False  # while training its Routing carries soft_load, which the load loss needs

    def __init__(self, d_model: int, n_experts: int, top_k: float, rng: np.random.Generator, dtype, **options):
        self.n_experts, self.top_k = n_experts, top_k
        vars(self).update(options)
        self.causal, self.causal_training = self.causal_with(options)

    def __call__(self, x: Tensor, context: RouteContext | None = None) -> Routing:
        """Run `forward`. Raises RouteError unless x is (N, D), ids and domain of the context fit it, and it returns a
        Routing of N tokens and E experts."""
        context = RouteContext() if context is None else context
        check_input(self.name, x, context)
        return check_output(self.name, super().__call__(x, context), (len(x), self.n_experts))

    def __init_subclass__(cls, name: str | None = None):
        super().__init_subclass__()
        cls.name = name or cls.__name__  # without a name it is not in the table
        if name is not None:
            check_name(cls, ROUTERS.get(name))
            ROUTERS[name] = cls

    @classmethod
    def options(cls) -> dict[str, inspect.Parameter]:
        """The options, as parameters with a default and an annotation."""
        return options_of(cls, Router)

    @classmethod
    def meaning(cls, option: str) -> str:
        """What an option means: the lines after its name in the docstring of the class, or of one above it."""
        return meaning_of(cls, option)

    @classmethod
    def check(cls, n_experts: int, top_k: float, options: dict[str, Any]) -> None:
        """Raise ValueError for a top_k that this router cannot give, an unknown option, or a value of a wrong type.

        A router whose options must fit together extends it; nothing is allocated.
        """
        check_top_k(cls, n_experts, top_k)
        check_options(cls, Router, options)

    @classmethod
    def causal_with(cls, options: dict[str, Any]) -> tuple[bool, bool]:
        """(causal, causal_training) of a router with these options."""
        return cls.causal, cls.causal_training

    @classmethod
    def rules(cls, options: dict[str, Any]) -> str:
        """The rule that these options choose, such as "by threshold"; "" where there is only one."""
        return ""

    def penalty(self, routing: Routing, context: LossContext) -> Tensor | None:
        """A term of the router's own, a scalar that the model adds to the loss (the mean over MoE layers)."""
        return None

    def after_step(self, routing: Routing) -> None:
        """Called after each training step with the step's Routing; for rules outside the gradient."""


class LinearRouter(Router):
    """A router whose scores are x @ weight, weight (D, E) ~ N(0, router_std^2).

    router_std: standard deviation of the initial weights; 0 starts them at zero.
    """

    shapes = {"weight": "DE"}
    router_std: float = INIT_STD

    def __init__(self, d_model, n_experts, top_k, rng, dtype, **options):
        super().__init__(d_model, n_experts, top_k, rng, dtype, **options)
        shape = d_model, n_experts
        self.weight = normal(rng, shape, self.router_std, dtype) if self.router_std else zeros(shape, dtype)
        self.weight.requires_grad = self.learned

    def scores(self, x: Tensor) -> Tensor:
        """(N, E): the logits, in the dtype of the model (float32 or float64, never less)."""
        return F.linear(x, self.weight)


def make(name: str, d_model: int, n_experts: int, top_k: float = 2, seed=0, dtype=np.float32, **options) -> Router:
    """The named router for d_model features and n_experts experts.

    seed: an integer or a NumPy Generator for the initial weights. Equal seeds give equal numbers, also to a router and
    its ExpertBank: give them different seeds, or one Generator. options: those of the class.
    Raises ValueError for an unknown name, an option the class does not take, or an impossible top_k.
    """
    cls = find(name)
    cls.check(n_experts, top_k, options)
    return cls(d_model, n_experts, top_k if cls.mean_k else int(top_k), np.random.default_rng(seed), dtype, **options)


def find(name: str) -> type[Router]:
    """The class of a router's name. ValueError for an unknown one."""
    if not isinstance(name, str) or name not in ROUTERS:
        raise ValueError(f"unknown router {name!r}: choose one of {', '.join(ROUTERS)}; if a file of yours defines it, "
                         "name that file with --import FILE.py")
    return ROUTERS[name]
