"""The experiments: the study of configs A to G, and the laboratory by name. Each is data and sentences, no machinery.

To add one, make an Experiment in a file of this folder, import it here and name it in EXPERIMENTS.
"""

from ..moe.routers.user_files import run_file
from ..study.experiment import SCALES, Claim, Effect, Experiment, Primary, Scale, Setting, against, contrasts
from ..study.figures import at_the_end, over_steps
from ..study.quantities import LOSS
from ..study.results import Results
from ..study.statistics import Contrast
from .again import again_top_1, again_top_2
from .architecture import dense, fine_grained, shared, surface, upcycle
from .balancing import balance, capacity, collapse, expert_choice, phase, scope
from .choosing import frozen, hash_routing, modern, rate, reinforce, unit
from .inside import batch, specialise, traffic
from .routers_a_to_f import routers_a_to_f as STUDY

EXPERIMENTS = {experiment.name: experiment for experiment in (
    expert_choice, dense, hash_routing, scope, phase, balance, modern, collapse, capacity, shared, fine_grained,
    surface, frozen, unit, specialise, upcycle, reinforce, batch, traffic, rate, again_top_2,
    again_top_1)}

__all__ = ["EXPERIMENTS", "LOSS", "SCALES", "STUDY", "Claim", "Contrast", "Effect", "Experiment", "Primary", "Results",
           "Scale", "Setting", "against", "at_the_end", "contrasts", "from_file", "over_steps"]


def from_file(path) -> Experiment:
    """The Experiment that a Python file of the user's defines, such as docs/my_question.py; the file is run.

    Raises ValueError where the file cannot be run, and unless it defines exactly one, with a name of its own.
    """
    known = [STUDY, *EXPERIMENTS.values()]
    found = [one for one in vars(run_file(path)[0]).values() if isinstance(one, Experiment) and one not in known]
    if len(found) != 1:
        raise ValueError(f"{path} defines {len(found)} experiments: define one Experiment, see docs/my_question.py")
    if found[0].name in EXPERIMENTS:
        raise ValueError(f"{path}: tinymoe has an experiment {found[0].name} already: give yours another name")
    return found[0]
