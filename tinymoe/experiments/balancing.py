"""Experiments on the load: does routing collapse, what balances it, and what do limits and guarantees cost?"""

from ..study.report import first_in_use, layer_states
from ..study.results import coefficient_sweep
from ..study.experiment import LOSS, Claim, Dispute, Effect, Experiment, Setting, against, planned
from ..study.experiment_figures import at_the_end, lines_by, one_against_other, over_steps

COEFFICIENTS = (0, 0.001, 0.01, 0.1, 0.3)


def say_collapse(r):
    """States of the layers, load, and what the cure costs."""
    states = "; ".join(f"`{name}` " + ", ".join(f"{n} {state}" for state, n in layer_states(runs).items())
                       for name, runs in r.groups.items())
    alive = first_in_use(r.groups, coefficient_sweep(r.groups))
    return [f"The layers of all runs ended so: {states}. The smallest coefficient with every layer in use: "
            f"{f'`{alive}`' if alive else 'none of these'}.",
            f"Load CV at the end: {r.show('load_cv')}; at the worst of the evaluations while training: "
            f"{r.show('worst_cv')}.",
            f"Dead experts a layer at the end: {r.show('dead_experts')}; at the worst: "
            f"{r.show('worst_dead')}.",
            f"Loss: {r.show(LOSS)}; {r.told_apart(LOSS)}."]


collapse = Experiment(
    "collapse", "Does routing collapse without balancing, and what cures it?",
    tuple(Setting(f"aux-{c:g}", f"top-1, balance coefficient {c:g}", {"aux_coef": c}) for c in COEFFICIENTS),
    (LOSS, "load_cv", "worst_cv", "dead_experts", "worst_dead", "mi_excess"),
    planned(("load_cv", LOSS), against("aux-0", [f"aux-{c:g}" for c in COEFFICIENTS[1:]])),
    say_collapse, {"over_steps": over_steps("aux-0", "load_cv", "dead_experts", "causal_cross_entropy"),
                   "at_the_end": at_the_end("load_cv", "dead_experts", LOSS)},
    "A longer run, a higher learning rate or more experts may collapse where these did not, and the other way about.",
    (Claim(2, "Without a balance loss experts collapse: the load CV is over 3 times that at 0.01, an expert is dead at "
              "0 and none at 0.1", "Shazeer 2017, table 6: CV 3.0 without, 0.05 with",
           (Effect("load_cv", "aux-0", ">", 3, over="aux-0.01"),
            Effect("dead_experts", "aux-0", ">", 0, every_run=True),
            Effect("dead_experts", "aux-0.1", "<=", 0, every_run=True))),),
    (Dispute("Does a large balance coefficient hurt?", "yes: Wang 2024; no: Shazeer 2017, table 6",
             against("aux-0", ("aux-0.1", "aux-0.3"))),),
    model={"router": "top_k", "top_k": 1})


def say_balance(r):
    """From the most even to the least, and from the lowest loss to the highest."""
    even = r.ranked("max_violation_batch")
    return [f"MaxVio of a batch, from the most even: {r.show('max_violation_batch', *even)}.",
            f"Loss, from the lowest: {r.show(LOSS, *r.ranked(LOSS))}.",
            f"Loss: {r.differences(LOSS)}.",
            f"MaxVio of the validation set: {r.differences('max_violation')}."]


balance = Experiment(
    "balance", "Which balancing is the cheapest?",
    (Setting("none", "top-1, nothing", {"aux_coef": 0.0}),
     Setting("aux-0.001", "balance loss, 0.001", {"aux_coef": 0.001}),
     Setting("aux-0.01", "balance loss, 0.01"),
     Setting("sequence-0.01", "balance loss within each sequence, 0.01", {"aux_coef": 0.0, "losses": {"sequence": 0.01}}),
     Setting("importance-load", "noisy top-1, importance and load losses, 0.1 each",
             {"aux_coef": 0.0, "router": "noisy_top_k", "losses": {"importance": 0.1, "load": 0.1}}),
     Setting("sigmoid", "sigmoid scores, nothing", {"aux_coef": 0.0, "router": "sigmoid_bias", "router_options": {"bias_rate": 0.0}}),
     Setting("bias-0.001", "the same with the loss-free bias, rate 0.001",
             {"aux_coef": 0.0, "router": "sigmoid_bias", "router_options": {"bias_rate": 0.001}}),
     Setting("bias-0.01", "the same, rate 0.01", {"aux_coef": 0.0, "router": "sigmoid_bias", "router_options": {"bias_rate": 0.01}}),
     Setting("sinkhorn", "Sinkhorn while training", {"aux_coef": 0.0, "router": "sinkhorn"}),
     Setting("base", "balanced assignment while training", {"aux_coef": 0.0, "router": "base_assignment"})),
    (LOSS, "max_violation", "max_violation_batch", "load_cv", "dead_experts", "seconds"),
    planned((LOSS, "max_violation"), (*against("none", ("aux-0.01", "sequence-0.01", "importance-load", "bias-0.01",
                                                        "sinkhorn", "base")), ("bias-0.01", "sigmoid"))),
    say_balance, {"balance_against_loss": one_against_other("max_violation_batch", LOSS),
                  "over_steps": over_steps("none", "max_violation_batch", "causal_cross_entropy")},
    "Methods differ in their scores too (softmax, sigmoid, noise), so a difference belongs to the whole setting; "
    "Sinkhorn and the assignment balance only while training and are measured as plain top-1. Cheap means in loss; the "
    "seconds were taken on a machine with other work, and show little but what an exact assignment takes.",
    (Claim(6, "The loss-free bias, at either rate, has less than half the MaxVio of a small balance loss (0.001), at "
              "no cost in loss (within 0.01 nats)", "Wang 2024; DeepSeek-V3: rate 0.001",
           tuple(effect for name in ("bias-0.001", "bias-0.01") for effect in (
               Effect("max_violation", name, "<", 0.5, over="aux-0.001"),
               Effect(LOSS, name, "<", 0.01, minus="aux-0.001")))),),
    model={"top_k": 1})


FACTORS = (0.5, 0.75, 1, 1.25, 2)
BY_ORDER, BY_GATE = ([f"{f:g}-{policy}" for f in FACTORS] for policy in ("order", "gate"))


def say_capacity(r):
    """Drops, padding, and the loss with the limit and without."""
    return [f"Share of the assignments dropped, in order: {r.show('drop_rate', *BY_ORDER)}; lowest gates first: "
            f"{r.show('drop_rate', *BY_GATE)}. With one expert a byte, a byte that is dropped has lost all.",
            f"Padding: {r.show('padding', *BY_ORDER)}.",
            f"Loss with the limit on: {r.differences('val_cross_entropy')}.",
            f"Loss of the same weights without it: {r.differences(LOSS)}."]


capacity = Experiment(
    "capacity", "What does a capacity limit cost?",
    (Setting("none", "no limit"),
     *(Setting(f"{f:g}-{policy}", f"factor {f:g}, dropped by {policy}", {"capacity_factor": f, "drop_policy": policy})
       for policy in ("order", "gate") for f in FACTORS)),
    ("val_cross_entropy", LOSS, "drop_rate", "lost_all", "padding", "load_cv"),
    planned(("val_cross_entropy", LOSS),
            (*against("none", BY_ORDER), ("0.75-order", "1.25-order"), ("0.5-gate", "0.5-order"),
             ("1-gate", "1-order"))),
    say_capacity, {"by_factor": lines_by({"order": BY_ORDER, "gate": BY_GATE}, lambda name: float(name.split("-")[0]),
                                         "capacity factor", "drop_rate", "padding", "val_cross_entropy", LOSS,
                                         reference="none")},
    "The limit holds within a batch of 8 windows: larger batches are more even. Without it every byte is served. Where "
    "the lowest gates are dropped first, a later byte can take an earlier one's place: with the limit on that loss is "
    "leaky, and only the loss without it compares the two policies.",
    (Claim(5, "Drops fall with the capacity factor (0.75 > 1 > 1.25 >= 2) and are at least 25% at 0.75 for top-1; loss "
              "at 0.75 is above that at 1.25", "GShard, Switch",
           (Effect("drop_rate", "0.75-order", ">", 0, minus="1-order"),
            Effect("drop_rate", "1-order", ">", 0, minus="1.25-order"),
            Effect("drop_rate", "1.25-order", ">=", 0, minus="2-order"), Effect("drop_rate", "0.75-order", ">=", 0.25),
            Effect("val_cross_entropy", "0.75-order", ">", 0, minus="1.25-order"))),),
    model={"top_k": 1})


def say_expert_choice(r):
    """Coverage, the leak, and the cost at equal mean K."""
    chosen = [name for name in r.groups if name.startswith("c-")]
    return [f"Coverage, routed over the batch as in training: {r.show('token_coverage', *chosen)}; load CV "
            f"{r.show('load_cv')}.",
            f"Perplexity: {r.show('causal_perplexity')}.",
            f"Loss, each byte routed on its prefix: {r.differences(LOSS)}.",
            f"Loss routed over the batch as in training, where later bytes leak: {r.differences('val_cross_entropy')}.",
            f"The one less the other: {r.show('leak', *chosen)} nats, which is the leak and the change of rule "
            "together."]


expert_choice = Experiment(
    "expert-choice", "What does guaranteed balance cost?",
    (*(Setting(f"c-{c:g}", f"expert choice, K = {c:g} on average",
               {"router": "expert_choice", "top_k": c, "aux_coef": 0.0}) for c in (0.5, 1, 2)),
     Setting("top-1", "top-1, balance loss 0.01", {"top_k": 1}), Setting("top-2", "top-2, balance loss 0.01")),
    (LOSS, "causal_perplexity", "leak", "token_coverage", "load_cv"),
    planned((LOSS, "val_cross_entropy"), (("c-1", "top-1"), ("c-2", "top-2"), ("c-0.5", "c-1"), ("c-1", "c-2"))),
    say_expert_choice, {"at_the_end": at_the_end(LOSS, "leak", "token_coverage"),
                        "over_steps": over_steps("top-2", "causal_cross_entropy", "val_cross_entropy")},
    "The causal rule decides each byte on its prefix, which the model was not trained with, and guarantees no balance; "
    "the rule of training does, and leaks. Neither loss is the price of balance alone.",
    (Claim(1, "Expert choice has, by its construction, load CV 0 (below 0.01) and leaves bytes uncovered: "
              "coverage(c = 1) < coverage(c = 2) < 1", "Zhou 2022",
           (Effect("load_cv", "c-1", "<", 0.01), Effect("load_cv", "c-2", "<", 0.01),
            Effect("token_coverage", "c-2", ">", 0, minus="c-1"),
            Effect("token_coverage", "c-2", "<", 1, every_run=True))),),
    (Dispute("Is expert choice better than token choice?", "yes: Zhou 2022; no: OLMoE (Muennighoff 2024)",
             (("c-1", "top-1"), ("c-2", "top-2"))),))
