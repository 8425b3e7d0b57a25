"""Exercise 19: sixteen experts on several devices; a byte may reach all of them, or two of four."""

from tinymoe.experiments import LOSS, Experiment, Setting, at_the_end
from tinymoe.study.measures import traffic

devices = Experiment(
    name="exercise-devices", question="What do experts on several devices cost, and what does a limit save?",
    model={"n_experts": 16, "top_k": 4}, measure=traffic,
    metrics=(LOSS, "reach_4", "sent_4", "slowest_4", "reach_16", "sent_16"),
    settings=(Setting("free", "any four of sixteen", width=0.5),
              Setting("limited", "two of four groups", width=0.5, model={
                  "router_options": {"n_groups": 4, "group_limit": 2}, "n_devices": 4, "max_devices": 2})),
    figures={"at_the_end": at_the_end("reach_4", "sent_4")})
