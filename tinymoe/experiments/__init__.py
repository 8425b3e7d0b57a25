"""The experiments: the study of configs A to F, and the laboratory by name. Each is data and sentences, no machinery.

To add one, make an Experiment in a file of this folder, import it here and name it in EXPERIMENTS.
"""

from ..study.experiment import SCALES, Claim, Effect, Experiment, Primary, Scale, Setting
from ..study.results import Results
from .architecture import dense, fine_grained, shared, surface, upcycle
from .balancing import balance, capacity, collapse, expert_choice
from .choosing import frozen, rate, reinforce, unit
from .inside import batch, known, specialise, traffic
from .routers_a_to_f import routers_a_to_f as STUDY

EXPERIMENTS = {experiment.name: experiment for experiment in (
    collapse, balance, capacity, expert_choice, shared, fine_grained, dense, surface, frozen, unit, specialise, rate,
    upcycle, reinforce, batch, traffic, known)}

__all__ = ["EXPERIMENTS", "SCALES", "STUDY", "Claim", "Effect", "Experiment", "Primary", "Results", "Scale", "Setting"]
