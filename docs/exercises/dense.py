"""Exercises 10, 12 and 13: a mixture, and a dense layer as large as the two experts that a byte uses."""

from tinymoe.experiments import LOSS, Experiment, Setting, over_steps

dense = Experiment(
    name="exercise-dense", question="What does a mixture gain over a dense layer of equal active size?",
    metrics=(LOSS, "parameters", "active_parameters", "megaflops", "seconds"),
    settings=(Setting("mixture", "top-2 of 8 experts"),
              Setting("dense", "one layer of the size of two experts", width=2,
                      model={"n_experts": 1, "top_k": 1, "aux_coef": 0.0})),
    figures={"over_steps": over_steps(None, LOSS)})
