"""Exercise 18: bytes choose experts, or experts choose bytes."""

from tinymoe.experiments import LOSS, Experiment, Setting, at_the_end

choice = Experiment(
    name="exercise-choice", question="What changes when experts choose?",
    metrics=(LOSS, "val_cross_entropy", "leak", "load_cv", "token_coverage", "experts_per_token"),
    settings=(Setting("token-choice", "each byte takes two experts"),
              Setting("expert-choice", "each expert takes its share of the bytes",
                      model={"router": "expert_choice", "aux_coef": 0.0})),
    figures={"at_the_end": at_the_end("load_cv", "token_coverage", LOSS)})
