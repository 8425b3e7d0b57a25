"""The laboratory: experiments by name. Each is data, a paragraph made from numbers, and figures (base.py).

To add one, make an Experiment in a file of this folder, import it here and name it in EXPERIMENTS:

    from .base import LOSS, Experiment, Setting, against, planned
    from .figures import at_the_end, over_steps

    jitter = Experiment(
        "jitter", "Does noise at the router's input help?",
        (Setting("none", "top-2"), Setting("jitter", "top-2, jitter 0.1", {"jitter": 0.1})),
        (LOSS, "load_cv"), planned((LOSS,), against("none", ("jitter",))),
        lambda r: [f"Loss: {r.show(LOSS)}; {r.differences(LOSS)}."],
        {"at_the_end": at_the_end(LOSS, "load_cv"), "over_steps": over_steps("none", "causal_cross_entropy")})
"""

from .architecture import dense, fine_grained, shared, surface, upcycle
from .balancing import balance, capacity, collapse, expert_choice
from ..study.experiment import SCALES, Claim, Dispute, Effect, Experiment, Results, Scale, Setting
from .choosing import frozen, rate, reinforce, unit
from .inside import batch, known, specialise, traffic

EXPERIMENTS = {experiment.name: experiment for experiment in (
    collapse, balance, capacity, expert_choice, shared, fine_grained, dense, surface, frozen, unit, specialise, rate,
    upcycle, reinforce, batch, traffic, known)}

__all__ = ["EXPERIMENTS", "SCALES", "Claim", "Dispute", "Effect", "Experiment", "Results", "Scale", "Setting"]
