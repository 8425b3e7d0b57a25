"""Five questions that other experiments left open, asked again on other seeds.

Their seeds separate a difference of 0 from one of the margin with 80% power, at 5% over the number of comparisons, if
differences scatter as before. That scatter is of 6 to 12 seeds, so the power may be less.
"""

from dataclasses import replace

from ..study.experiment import ALL_WINDOWS, Experiment, Setting
from ..study.figures import at_the_end
from ..study.quantities import LOSS
from .balancing import balance, capacity
from .choosing import frozen, modern, unit


def once_more(experiment, first, second):
    """The Primary of an experiment, between the settings of these names."""
    (one,) = experiment.primary
    return replace(one, contrast=replace(one.contrast, setting=first, minus=second))


again_top_2 = Experiment(
    name="again-top-2", question="What do more seeds say about three open questions on top-2?",
    settings=(Setting("top-2", "top-2, balance loss 0.01"),
              Setting("frozen", "top-2 with a router that keeps its first weights", model={"router": "frozen"}),
              Setting("bias", "sigmoid scores and a bias (DeepSeek-V3)",
                      model={"router": "sigmoid_bias", "aux_coef": 0.0}),
              Setting("sequence", "one choice for each prefix, in each layer", model={"router": "sequence"})),
    metrics=(LOSS, "causal_perplexity", "load_cv", "max_violation_batch", "byte_excess"),
    primary=(once_more(frozen, "frozen", "top-2"), once_more(modern, "bias", "top-2"),
             once_more(unit, "sequence", "top-2")),
    first_seed=200, seeds=50, steps=1000, training=ALL_WINDOWS | {"learning_rate": 8e-3},
    figures={"at_the_end": at_the_end(LOSS, "load_cv", "byte_excess", reference="top-2")},
    caution="Settings, steps and learning rate are those of `frozen`, `modern` and `unit`; no seed of theirs is used. "
            "The rate is the largest that they tried. All comparisons share top-2, so they are not independent. The "
            "number of seeds was planned by the scatter of 8 seeds, so the power may be below 80%. No setting is a "
            "dense model: the experiment `frozen` shows what a mixture gains over one. `sequence` routes by the mean "
            "of the prefix so far, so its routes may change within a window; Fan et al. average the whole sequence.")


again_top_1 = Experiment(
    name="again-top-1", question="What do more seeds say about two open questions on top-1?",
    model={"top_k": 1},
    settings=(Setting("none", "balance loss 0.01, no limit"),
              Setting("limit", "the same, capacity factor 1.25, dropped by order",
                      model={"capacity_factor": 1.25, "drop_policy": "order"}),
              Setting("aux-0.001", "balance loss 0.001", model={"aux_coef": 0.001}),
              Setting("bias", "bias, rule sign, scores: sigmoid", model={
                  "router": "sigmoid_bias", "aux_coef": 0.0, "router_options": {"score": "sigmoid"}})),
    metrics=("val_cross_entropy", LOSS, "load_cv", "max_violation_batch", "drop_rate"),
    primary=(once_more(capacity, "limit", "none"), once_more(balance, "bias", "aux-0.001")),
    first_seed=200, seeds=45, steps=1000, training=ALL_WINDOWS | {"learning_rate": 4e-3},
    figures={"at_the_end": at_the_end("val_cross_entropy", LOSS, "load_cv", reference="none")},
    caution="Settings, steps and learning rate are those of `capacity` and `balance`; no seed of theirs is used. The "
            "loss routed as in training has the limit; the causal loss is of the same weights without it. The number "
            "of seeds was planned by the scatter of 6 and 12 seeds, so the power may be below 80%.")
