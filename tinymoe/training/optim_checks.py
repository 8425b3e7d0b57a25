"""What AdamW and gradient clipping take."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from ..autograd.tensor import Tensor
from ..moe.settings import NOT_NEGATIVE, POSITIVE, Check

BETAS = Check(lambda value: isinstance(value, (tuple, list)) and len(value) == 2 and all(
    NOT_NEGATIVE.fits(beta) and beta < 1 for beta in value), "two numbers from 0 to below 1, such as (0.9, 0.95)")


def require_parameters(parameters: Any) -> None:
    """TypeError unless it is a dict."""
    if not isinstance(parameters, Mapping):
        raise TypeError(f"parameters must be a dict of name -> Tensor, not {type(parameters).__name__}: give "
                        "model.parameters()")


def check_adamw(parameters: Any, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
                no_decay: Collection[str]) -> None:
    """Raise the errors that AdamW's docstring names."""
    require_parameters(parameters)
    for name, p in parameters.items():
        if not isinstance(p, Tensor):
            raise TypeError(f"parameter {name!r} must be a Tensor, not {type(p).__name__}: give model.parameters()")
    if not parameters:
        raise ValueError("AdamW got no parameters: give model.parameters() of a model that has some")
    first = {id(p): name for name, p in reversed(parameters.items())}
    if twice := [name for name, p in parameters.items() if first[id(p)] != name]:
        raise ValueError(f"parameter {twice[0]!r} is the same Tensor as {first[id(parameters[twice[0]])]!r}, and would "
                         "be updated twice: leave one out")
    NOT_NEGATIVE.require("lr", lr)
    NOT_NEGATIVE.require("weight_decay", weight_decay)
    POSITIVE.require("eps", eps)
    BETAS.require("betas", betas)
    if unknown := sorted(set(no_decay) - set(parameters)):
        raise ValueError(f"no_decay {unknown[0]!r} is not the name of a parameter: choose from {', '.join(parameters)}")


def require_norm(max_norm: float) -> None:
    """ValueError for a number below 0, or NaN; infinity limits nothing."""
    if not (NOT_NEGATIVE.fits(max_norm) or max_norm == math.inf):
        raise ValueError(f"max_norm {max_norm!r} must be a number of at least 0: give {math.inf} to clip nothing")
