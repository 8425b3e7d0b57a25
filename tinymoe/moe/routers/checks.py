"""What goes into a router and what comes out of it, checked, with messages that say what to do."""

from ..routing import Routing
from ..settings import POSITIVE

CONTEXT = {"ids": "the tokens (B, T)", "rng": "a generator, because it draws while training",
           "domain": "the domain of each sequence (B,), which is known for the text of a run alone"}


class RouteError(ValueError):
    """A router lacks something of its context, or does not return a Routing. The message says what to do."""


def require_field(context, name: str, router: str):
    """The field ids, rng or domain of a RouteContext. Raises RouteError where it is None."""
    if getattr(context, name) is None:
        raise RouteError(f"{router} needs RouteContext.{name}: give it {CONTEXT[name]}")
    return getattr(context, name)


def check_input(router: str, x, context) -> None:
    """Raise RouteError unless x is (N, D), and ids (B, T) with B * T = N and domain (B,) fit where they are given."""
    if not hasattr(context, "ids"):
        raise RouteError(f"router {router} takes a RouteContext, not a {type(context).__name__}: write "
                         "RouteContext(ids=...)")
    if x.ndim != 2:
        raise RouteError(f"router {router} takes x (N, D), one row for each token, not {x.shape}: reshape it to "
                         f"(-1, {x.shape[-1] if x.ndim else 1})")
    ids, domain = context.ids, context.domain
    if ids is not None and not (ids.ndim == 2 and ids.size == len(x)):
        raise RouteError(f"router {router} has x {x.shape}, but RouteContext.ids {ids.shape}: they must be (B, T) with "
                         f"B * T = {len(x)}")
    if domain is None:
        return
    n = len(domain) if domain.ndim == 1 else -1
    fits = n == len(ids) if ids is not None else n == len(x) or n > 0 and len(x) % n == 0
    if not fits:
        raise RouteError(f"router {router} has RouteContext.domain {domain.shape} for {len(x)} tokens"
                         f"{'' if ids is None else f' of {len(ids)} sequences'}: give it one domain for each sequence")
    if domain.dtype.kind not in "iu" or domain.min(initial=0) < 0:
        raise RouteError(f"router {router} has RouteContext.domain {domain.tolist()[:3]}: give it integers from 0")


def check_output(router: str, routing, shape: tuple[int, int]) -> Routing:
    """The Routing that a router returned. Raises RouteError for something else, and unless its shape is (N, E)."""
    if not isinstance(routing, Routing):
        raise RouteError(f"router {router} returned a {type(routing).__name__}, not a Routing: make one with "
                         "from_mask(chosen, gates, logits, probs) of tinymoe.moe.routing")
    if routing.n_tokens != shape[0]:
        raise RouteError(f"router {router} returned a Routing of {routing.n_tokens} tokens for x of {shape[0]} rows: "
                         "each row needs one")
    if routing.n_experts != shape[1]:
        raise RouteError(f"router {router} returned a Routing of {routing.n_experts} experts, but has {shape[1]}")
    return routing


def check_top_k(router: type, n_experts: int, top_k: float) -> None:
    """Raise ValueError for a top_k that a class of routers cannot give."""
    fits = POSITIVE.fits(top_k) and top_k <= n_experts and (router.mean_k or top_k == int(top_k))
    if not fits or router.top_1_only and top_k != 1:
        kind = "a number" if router.mean_k else "a whole number"
        must = "1" if router.top_1_only else f"{kind} above 0 and at most n_experts {n_experts}"
        raise ValueError(f"top_k {top_k!r} must be {must} for {router.name}")


def check_choice(n_experts: int, top_k: float, *, n_groups: int, group_limit: int | None, second_expert: str,
                 second_threshold: float | None, jitter: float) -> None:
    """Raise ValueError for options of TopK that do not fit together."""
    if (n_groups > 1) != (group_limit is not None):
        raise ValueError(f"n_groups {n_groups} and group_limit {group_limit} go together: give both, or neither")
    if n_experts % n_groups or group_limit and group_limit > n_groups:
        raise ValueError(f"n_groups {n_groups} must divide n_experts {n_experts}, and group_limit {group_limit} be "
                         "from 1 to n_groups")
    if group_limit and top_k > (left := group_limit * (n_experts // n_groups)):
        raise ValueError(f"group_limit {group_limit} leaves {left} experts, fewer than top_k {top_k}")
    if second_expert != "all" and top_k != 2:
        raise ValueError(f"second_expert {second_expert!r} must be all unless top_k is 2")
    if second_expert == "threshold" and (second_threshold or 0) >= 0.5:
        raise ValueError(f"second_threshold {second_threshold} must be below 0.5, because no second gate is above it")
    if jitter >= 1:
        raise ValueError(f"jitter {jitter} must be at least 0 and below 1")


def check_name(router: type, taken: type | None) -> None:
    """Raise ValueError where a class of tinymoe, in another file, has the router's name already."""
    own = __name__.split(".")[0] + "."
    if taken and taken.__module__.startswith(own) and taken.__module__ != router.__module__:
        raise ValueError(f"tinymoe has a router named {router.name!r} already: give {router.__name__} another name")
