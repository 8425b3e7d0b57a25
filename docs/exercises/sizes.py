"""Exercise 20: the number of experts E and of experts a byte K, each changed alone."""

from tinymoe.experiments import LOSS, Experiment, Setting, at_the_end

sizes = Experiment(
    name="exercise-sizes", question="What do more experts bring, and what do more experts a byte?",
    metrics=(LOSS, "parameters", "active_parameters", "megaflops", "load_cv"),
    settings=tuple(Setting(f"E{e}-K{k}", f"top-{k} of {e}", model={"n_experts": e, "top_k": k})
                   for e, k in ((4, 2), (8, 2), (16, 2), (8, 1), (8, 4))),
    figures={"at_the_end": at_the_end(LOSS, "parameters", "active_parameters")})
