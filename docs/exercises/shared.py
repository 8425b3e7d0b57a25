"""Exercise 17: two routed experts a byte, and one routed and one shared."""

from tinymoe.experiments import LOSS, Experiment, Setting, over_steps

shared = Experiment(
    name="exercise-shared", question="What does a shared expert change?",
    metrics=(LOSS, "parameters", "active_parameters", "load_cv"),
    settings=(Setting("2-of-8", "two of eight routed"),
              Setting("1+1-of-7", "one shared, one of seven routed",
                      model={"n_experts": 7, "top_k": 1, "n_shared": 1}),
              Setting("gate-1", "the same, and the routed expert has the gate 1", model={
                  "n_experts": 7, "top_k": 1, "n_shared": 1, "router_options": {"renormalise": True}})),
    figures={"over_steps": over_steps(None, LOSS)})
