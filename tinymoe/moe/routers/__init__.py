"""Routers: hidden states in, a Routing out. `ROUTERS` lists them by name.

A router scores every token against every expert, chooses places in that (N, E) matrix, and gives
each chosen place a gate. Choosing has no gradient; the language-model loss trains the router
through the gates alone, so a gate must depend on the scores (a renormalised top-1 gate is the
constant 1 and would never train).

To add a router, write `class Mine(Router, name="mine")` with `forward(x, context)` that returns a Routing, in
a file of this folder or in a program of your own: from then on its name is known everywhere.
"""

import importlib
import pkgutil

from ..routing import largest
from .base import ROUTERS, LinearRouter, RouteContext, Router, check, make
from .token_choice import Frozen, NoisyTopK, Reinforce, Shuffled, SigmoidBias, TopK  # noqa: I001 (the table's order)
from .expert_choice import ExpertChoice
from .fixed import Hash, Random
from .assignment import BaseAssignment, Sinkhorn, balanced_assignment, greedy_assignment, shortfall, sinkhorn_plan
from .sequence import Sequence

__all__ = ["ROUTERS", "BaseAssignment", "ExpertChoice", "Frozen", "Hash", "LinearRouter", "NoisyTopK", "Random",
           "Reinforce", "RouteContext", "Router", "Sequence", "Shuffled", "SigmoidBias", "Sinkhorn", "TopK",
           "balanced_assignment", "check", "greedy_assignment", "largest", "make", "shortfall", "sinkhorn_plan"]

for _file in pkgutil.iter_modules(__path__):  # those that are not named above
    importlib.import_module(f"{__name__}.{_file.name}")
