"""What all routers share: the context they may look at, and the base class with their table."""

from dataclasses import dataclass, field

import numpy as np

from ...autograd import functional as F
from ...layers.nn import INIT_STD, Module, normal, zeros

ROUTERS = {}  # name -> class, in the order of definition


@dataclass(frozen=True)
class RouteContext:
    """What a router may know besides the hidden states.

    ids: (B, T) tokens, N = B * T; rows of x follow them, sequence by sequence.
    training: noise and other training-only behaviour. rng: the generator for it.
    causal: decide each token's route from its own sequence's prefix alone. Routers with
        `causal = True` do so anyway; the others change their rule.
    shared: what one layer's router leaves for those of the layers above, within one forward pass.
    """

    ids: np.ndarray | None = None
    training: bool = False
    rng: np.random.Generator | None = None
    causal: bool = False
    shared: dict = field(default_factory=dict)


class Router(Module):
    """router(x (N, D) Tensor, RouteContext) -> Routing.

    A subclass `class Mine(Router, name="mine")` with `forward(x, context)` enters ROUTERS by its name.
    What it says of itself, as class attributes, is its line in `python cli.py routers`; ModelConfig and the
    layers ask these attributes, never a name.
    """

    paper = "–"
    chooses = "token"  # who picks: the token its experts, the expert its tokens, or neither
    balanced = "no"  # whether the load is equal by construction
    causal = True  # outside training, a token's route depends on its own prefix alone
    causal_training = True  # and while training
    learned = True
    cost = "2 N D E"  # floating-point operations and what else takes time
    options = ()  # ModelConfig fields that the class takes as keyword arguments
    mean_k = False  # top_k is only the mean over tokens and may be a fraction
    top_1_only = False
    sampled = False  # while training it draws from its probs, as the policy loss needs
    has_soft_load = False  # while training its Routing carries soft_load, which the load loss needs

    def __init_subclass__(cls, name=None):
        super().__init_subclass__()
        if name is not None:
            cls.name, ROUTERS[name] = name, cls

    @classmethod
    def check_top_k(cls, top_k, n_experts):
        """Raise ValueError for a top_k that this router cannot give."""
        whole = cls.mean_k or top_k == int(top_k)
        if not (0 < top_k <= n_experts and whole and (top_k == 1 or not cls.top_1_only)):
            kind = "1" if cls.top_1_only else "a number" if cls.mean_k else "a whole number"
            raise ValueError(f"top_k {top_k} must be {kind} above 0 and at most n_experts {n_experts} for {cls.name}")

    def after_step(self, routing):
        """Called after each training step with the Routing that the step used; for rules outside the gradient."""


class LinearRouter(Router):
    """A router whose scores are x @ weight, weight (D, E) ~ N(0, router_std^2)."""

    options = ("router_std",)

    def __init__(self, d_model, n_experts, top_k, rng, dtype, router_std=INIT_STD):
        shape = d_model, n_experts
        self.top_k, self.weight = top_k, normal(rng, shape, router_std, dtype) if router_std else zeros(shape, dtype)

    def scores(self, x):
        """(N, E): the logits, in the dtype of the model (float32 or float64, never less)."""
        return F.linear(x, self.weight)


def make(name, d_model, n_experts, top_k=2, seed=0, dtype=np.float32, **options):
    """The named router for d_model features and n_experts experts.

    seed: an integer or a NumPy Generator for the initial weights. options: those that the class lists.
    Raises ValueError for an unknown name, an option the class does not take, or an impossible top_k.
    """
    check(name, n_experts, top_k, options)
    top_k = top_k if ROUTERS[name].mean_k else int(top_k)
    return ROUTERS[name](d_model, n_experts, top_k, np.random.default_rng(seed), dtype, **options)


def check(name, n_experts, top_k, options):
    """Raise the ValueErrors of `make`, without making anything."""
    if name not in ROUTERS:
        raise ValueError(f"unknown router {name!r}: choose one of {', '.join(ROUTERS)}")
    router = ROUTERS[name]
    router.check_top_k(top_k, n_experts)
    for option in options:
        if option not in router.options:
            raise ValueError(f"{option} is no option of {name}, which takes {', '.join(router.options) or 'none'}")
