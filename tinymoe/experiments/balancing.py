"""Experiments on the load: does routing collapse, what balances it, and what do limits and guarantees cost?"""

from ..study.experiment import Claim, Effect, Experiment, Primary, Setting, against, contrasts
from ..study.figures import at_the_end, lines_by, one_against_other, over_steps
from ..study.quantities import LOSS
from ..study.statistics import Contrast

COEFFICIENTS = ["aux-0", "aux-0.001", "aux-0.01", "aux-0.1", "aux-0.3"]
collapse = Experiment(
    name="collapse", question="Does routing collapse without balancing, and what prevents it?",
    model={"router": "top_k", "top_k": 1},
    settings=tuple(Setting(name, f"top-1, balance coefficient {name[4:]}", model={"aux_coef": float(name[4:])})
                   for name in COEFFICIENTS),
    metrics=(LOSS, "load_cv", "worst_cv", "dead_experts", "worst_dead", "mi_excess"),
    primary=(Primary(
        question="Does a large balance coefficient hurt?", contrast=Contrast(LOSS, "aux-0.3", minus="aux-0"),
        lower="A balance coefficient of 0.3 lowers the loss.", higher="A balance coefficient of 0.3 raises the loss.",
        same="A balance coefficient of 0.3 does not hurt.",
        not_known="Whether a balance coefficient of 0.3 hurts is not known.",
        published="yes: Wang 2024; no: Shazeer 2017, table 6"),),
    exploratory=(*contrasts(("load_cv",), against("aux-0", COEFFICIENTS[1:])),
                 *contrasts((LOSS,), against("aux-0", COEFFICIENTS[1:-1]))),
    say=lambda r: [r.layers_at_the_end(COEFFICIENTS)],
    figures={"over_steps": over_steps("aux-0", "load_cv", "dead_experts", LOSS),
             "at_the_end": at_the_end("load_cv", "dead_experts", LOSS)},
    caution="More steps, a higher learning rate or more experts may give another answer.",
    claims=(Claim(2, "Without a balance loss experts collapse: the load CV is over 3 times that at 0.01, an expert is "
                     "dead at 0 and none at 0.1", "Shazeer 2017, table 6: CV 3.0 without, 0.05 with",
                  (Effect("load_cv", "aux-0", ">", 3, over="aux-0.01"),
                   Effect("dead_experts", "aux-0", ">", 0, every_run=True),
                   Effect("dead_experts", "aux-0.1", "<=", 0, every_run=True))),))

balance = Experiment(
    name="balance", question="Which way of balancing costs the least loss?", model={"top_k": 1, "aux_coef": 0.0},
    settings=(Setting("none", "top-1, no balancing"),
              Setting("aux-0.001", "balance loss, 0.001", model={"aux_coef": 0.001}),
              Setting("aux-0.01", "balance loss, 0.01", model={"aux_coef": 0.01}),
              Setting("sequence-0.01", "balance loss within each sequence, 0.01", model={"losses": {"sequence": 0.01}}),
              Setting("importance-load", "noisy top-1, importance and load losses, 0.1 each",
                      model={"router": "noisy_top_k", "losses": {"importance": 0.1, "load": 0.1}}),
              *(Setting(name, what, model={"router": "sigmoid_bias", "router_options": {"bias_rate": rate}})
                for name, what, rate in (("sigmoid", "sigmoid scores, no balancing", 0.0),
                                         ("bias-0.001", "the same with the loss-free bias, rate 0.001", 0.001),
                                         ("bias-0.01", "the same, rate 0.01", 0.01))),
              Setting("sinkhorn", "Sinkhorn while training", model={"router": "sinkhorn"}),
              Setting("base", "balanced assignment while training", model={"router": "base_assignment"})),
    metrics=(LOSS, "max_violation", "max_violation_batch", "load_cv", "dead_experts", "seconds"),
    exploratory=contrasts((LOSS, "max_violation"), (
        *against("none", ("aux-0.01", "sequence-0.01", "importance-load", "bias-0.01", "sinkhorn", "base")),
        ("bias-0.01", "sigmoid"))),
    figures={"balance_against_loss": one_against_other("max_violation_batch", LOSS),
             "over_steps": over_steps("none", "max_violation_batch", LOSS)},
    caution="Methods differ in their scores too (softmax, sigmoid, noise), so a difference belongs to the whole "
            "setting. Sinkhorn and the assignment balance only while training and are measured as top-1. Other "
            "programs ran at the same time: the seconds show only that exact assignment is slow.",
    claims=(Claim(6, "The loss-free bias, at either rate, has less than half the MaxVio of a small balance loss "
                     "(0.001), at no cost in loss (within 0.01 nats)", "Wang 2024; DeepSeek-V3: rate 0.001",
                  tuple(effect for name in ("bias-0.001", "bias-0.01") for effect in (
                      Effect("max_violation", name, "<", 0.5, over="aux-0.001"),
                      Effect(LOSS, name, "<", 0.01, minus="aux-0.001")))),))

FACTORS = (0.5, 0.75, 1, 1.25, 2)
BY_ORDER, BY_GATE = ([f"{f:g}-{policy}" for f in FACTORS] for policy in ("order", "gate"))
capacity = Experiment(
    name="capacity", question="What does a capacity limit cost?", model={"top_k": 1},
    settings=(Setting("none", "no limit"),
              *(Setting(f"{f:g}-{policy}", f"factor {f:g}, dropped by {policy}",
                        model={"capacity_factor": f, "drop_policy": policy})
                for policy in ("order", "gate") for f in FACTORS)),
    metrics=("val_cross_entropy", LOSS, "drop_rate", "lost_all", "padding", "load_cv"),
    exploratory=contrasts(("val_cross_entropy", LOSS), (
        *against("none", BY_ORDER), ("0.75-order", "1.25-order"), ("0.5-gate", "0.5-order"), ("1-gate", "1-order"))),
    figures={"by_factor": lines_by({"order": BY_ORDER, "gate": BY_GATE}, lambda name: float(name.split("-")[0]),
                                   "capacity factor", "drop_rate", "padding", "val_cross_entropy", LOSS,
                                   reference="none")},
    caution="The loss routed as in training has the limit; the causal loss is of the same weights without it. With K = "
            "1 a dropped byte has no expert. The limit holds within a batch of 8 windows; larger batches are more "
            "even. Where the smallest gates are dropped, a later byte can take the place of an earlier one: that loss "
            "is leaky, so only the causal loss compares the two policies.",
    claims=(Claim(5, "Drops fall with the capacity factor (0.75 > 1 > 1.25 >= 2) and are at least 25% at 0.75 for "
                     "top-1; loss at 0.75 is above that at 1.25", "GShard, Switch",
                  (Effect("drop_rate", "0.75-order", ">", 0, minus="1-order"),
                   Effect("drop_rate", "1-order", ">", 0, minus="1.25-order"),
                   Effect("drop_rate", "1.25-order", ">=", 0, minus="2-order"),
                   Effect("drop_rate", "0.75-order", ">=", 0.25),
                   Effect("val_cross_entropy", "0.75-order", ">", 0, minus="1.25-order"))),))

BY_K = (("c-1", "top-1"), ("c-2", "top-2"))
expert_choice = Experiment(
    name="expert-choice", question="What does guaranteed balance cost?",
    settings=(*(Setting(f"c-{c:g}", f"expert choice, K = {c:g} on average",
                        model={"router": "expert_choice", "top_k": c, "aux_coef": 0.0}) for c in (0.5, 1, 2)),
              Setting("top-1", "top-1, balance loss 0.01", model={"top_k": 1}),
              Setting("top-2", "top-2, balance loss 0.01")),
    metrics=(LOSS, "causal_perplexity", "val_cross_entropy", "val_perplexity", "leak", "token_coverage", "load_cv"),
    primary=(Primary(
        question="Is expert choice better than token choice?", contrast=Contrast(LOSS, "c-2", minus="top-2"),
        lower="Expert choice is better than token choice.", higher="Expert choice is worse than token choice.",
        same="Expert choice is as good as token choice.",
        not_known="Whether expert choice is better than token choice is not known.",
        published="yes: Zhou 2022; no: OLMoE (Muennighoff 2024)"),),
    exploratory=(*contrasts((LOSS,), (BY_K[0], ("c-0.5", "c-1"), ("c-1", "c-2"))),
                 *contrasts(("val_cross_entropy",), (*BY_K, ("c-0.5", "c-1"), ("c-1", "c-2")))),
    figures={"at_the_end": at_the_end(LOSS, "leak", "token_coverage"),
             "over_steps": over_steps("top-2", LOSS, "val_cross_entropy")},
    caution="The causal rule routes each byte by its prefix: the model was not trained with it, and it guarantees no "
            "balance. The rule of training guarantees balance and leaks. Their difference is the leak and the change "
            "of rule together, so neither loss is the price of balance alone.",
    claims=(Claim(1, "Expert choice has, by its construction, load CV 0 (below 0.01) and leaves bytes uncovered: "
                     "coverage(c = 1) < coverage(c = 2) < 1", "Zhou 2022",
                  (Effect("load_cv", "c-1", "<", 0.01), Effect("load_cv", "c-2", "<", 0.01),
                   Effect("token_coverage", "c-2", ">", 0, minus="c-1"),
                   Effect("token_coverage", "c-2", "<", 1, every_run=True))),))
