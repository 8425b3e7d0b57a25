"""Exercise 16: capacity limits, and none."""

from tinymoe.experiments import LOSS, Experiment, Setting, at_the_end

capacity = Experiment(
    name="exercise-capacity", question="What does a capacity limit drop, and what does it cost?", model={"top_k": 1},
    metrics=("val_cross_entropy", LOSS, "drop_rate", "padding", "load_cv"),
    settings=tuple(Setting(f"factor-{factor:g}", f"capacity factor {factor:g}", model={"capacity_factor": factor})
                   for factor in (0.5, 1.0, 1.5, 2.0)) + (Setting("none", "no limit"),),
    figures={"at_the_end": at_the_end("drop_rate", "val_cross_entropy")})
