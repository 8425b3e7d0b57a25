"""Exercises 6, 14 and 15: one expert a byte, without and with the balance loss."""

from tinymoe.experiments import LOSS, Experiment, Setting, over_steps
from tinymoe.study.figures import by_layer
from tinymoe.study.maps import expert_load

balance = Experiment(
    name="exercise-balance", question="Does routing collapse without the balance loss, and does the loss cure it?",
    model={"top_k": 1}, metrics=(LOSS, "load_cv", "max_violation", "dead_experts"),
    settings=(Setting("without", "no balance loss", model={"aux_coef": 0.0}),
              Setting("with", "balance loss, coefficient 0.01")),
    figures={"over_steps": over_steps(None, "load_cv", "dead_experts", LOSS), "busiest": by_layer("max_violation"),
             "expert_load": expert_load})
