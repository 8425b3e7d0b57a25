"""Routers: hidden states in, a Routing out. `ROUTERS` lists them by name.

A router scores every token against every expert, chooses places in that (N, E) matrix, and gives
each chosen place a gate. The choice itself has no gradient. The language-model loss trains the router
through the gates alone, so a gate must depend on the scores (a renormalised top-1 gate is the
constant 1 and would never train).

To add a router, write `class Mine(Router, name="mine")` with `forward(x, context)` that returns a Routing: in
a file of this folder, or in a file of your own that `--import` or `load_file` names.
"""

# ruff: noqa: F401, I001  (the imports are in the order of the table)
import importlib
import pkgutil

from ..routing import largest
from .base import ROUTERS, LinearRouter, RouteContext, Router, find, make
from .checks import RouteError
from .top_k import TopK
from .token_choice import NoisyTopK, Reinforce, SigmoidBias
from .baselines import Frozen, Hash, Oracle, Random, Shuffled
from .expert_choice import ExpertChoice, ExpertThreshold
from .assignment import BaseAssignment, Sinkhorn, balanced_assignment, greedy_assignment, shortfall, sinkhorn_plan
from .sequence import Sequence
from .modern import BiasedTopK, CosineTopK, HashGated, MixtureOfDepths, MomentumBias, NormalisedTopK, QuantileBias
from .modern import RealBias, ReMoE, TopP
from .user_files import load_file

for _file in pkgutil.iter_modules(__path__):  # files of this folder that are not named above
    importlib.import_module(f"{__name__}.{_file.name}")
