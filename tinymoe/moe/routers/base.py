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
from ..settings import check_of
from .options import meaning_of, options_of

ROUTERS: dict[str, type["Router"]] = {}  # in the order of definition


class RouteError(ValueError):
    """A router lacks something of its context, or does not return a Routing. The message says what to do."""


@dataclass(frozen=True)
class RouteContext:
    """What a router may know besides the hidden states.

    ids: (B, T) tokens, N = B * T; rows of x follow them, sequence by sequence.
    training: turns on noise and other behaviour of training. rng: the generator for it.
    causal: decide each token's route from the prefix of its own sequence alone. Routers with `causal = True` always
        do; the others change their rule.
    domain: (B,) the domain of each sequence, an integer; known in training and evaluation, not for other texts.
    carried: values that a layer's router passes to the routers of later layers, within one forward pass.
    """

    ids: np.ndarray | None = None
    training: bool = False
    rng: np.random.Generator | None = None
    causal: bool = False
    carried: dict = field(default_factory=dict)
    domain: np.ndarray | None = None

    def need(self, name: str, router: "Router") -> Any:
        """The field `name`: ids, rng or domain. Raises RouteError, a ValueError, where it is None."""
        if getattr(self, name) is None:
            reason = {"ids": "the tokens (B, T)", "rng": "a generator, because it draws while training",
                      "domain": "the domain of each sequence (B,), which is known for the text of a run alone"}[name]
            raise RouteError(f"{router.name} needs RouteContext.{name}: give it {reason}")
        return getattr(self, name)


class Router(Module):
    """router(x (N, D) Tensor, RouteContext) -> Routing.

    A subclass `class Mine(Router, name="mine")` with `forward(x, context)` enters ROUTERS under its name. Its options
    are annotated class attributes such as `jitter: float = 0.0`, or keyword arguments of an `__init__` of its own. A
    value is checked by the annotation, and a line `NAME: meaning` of the docstring says what the option means. A
    subclass that sets an option of its parent without annotation fixes it. The class attributes below describe the
    router: `cli.py routers` prints them, and the model reads them, so no code depends on the name of a router.
    A Tensor attribute is a parameter or saved state; keep anything else as an array, which is not saved.
    """

    paper = "–"
    formula = used_by = "–"  # its choice and gates in one line, and who trains with it; not inherited
    chooses = "token"  # "token" chooses its experts, "expert" its tokens, or "neither"
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

    def __call__(self, x: Tensor, context: RouteContext) -> Routing:
        """Run `forward`. Raises RouteError where it returns something else than a Routing."""
        routing = super().__call__(x, context)
        if not isinstance(routing, Routing):
            raise RouteError(f"router {self.name} returned a {type(routing).__name__}, not a Routing: make one with "
                             "from_mask(chosen, gates, logits, probs) of tinymoe.moe.routing")
        return routing

    def __init_subclass__(cls, name: str | None = None):
        super().__init_subclass__()
        if name is None:
            return
        taken, own = ROUTERS.get(name), __name__.split(".")[0] + "."
        if taken and taken.__module__.startswith(own) and taken.__module__ != cls.__module__:
            raise ValueError(f"tinymoe has a router named {name!r} already: give {cls.__name__} another name")
        cls.name, ROUTERS[name] = name, cls

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
        is_whole = cls.mean_k or top_k == int(top_k)
        if not (0 < top_k <= n_experts and is_whole and (top_k == 1 or not cls.top_1_only)):
            kind = "a number" if cls.mean_k else "a whole number"
            must = "1" if cls.top_1_only else f"{kind} above 0 and at most n_experts {n_experts}"
            raise ValueError(f"top_k {top_k} must be {must} for {cls.name}")
        known = cls.options()
        for name, value in options.items():
            if name not in known:
                raise ValueError(f"{name} is no option of {cls.name}, which takes {', '.join(known) or 'none'}")
            if check := check_of(known[name].annotation):
                check.require(name, value)

    @classmethod
    def causal_with(cls, options: dict[str, Any]) -> tuple[bool, bool]:
        """(causal, causal_training) of a router with these options."""
        return cls.causal, cls.causal_training

    @classmethod
    def rules(cls, options: dict[str, Any]) -> str:
        """By which rules its numbers are made, in a few words, where its options choose among several; else ""."""
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

    seed: an integer or a NumPy Generator for the initial weights. options: those of the class.
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
