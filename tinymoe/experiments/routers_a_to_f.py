"""The study: seven routings of one model, configs A to G, which `python cli.py study` trains and writes up."""

import math
from itertools import combinations

from ..study import measures
from ..study.experiment import CANDIDATES, Claim, Effect, Experiment, Primary, Scale, Setting, contrasts
from ..study.figures import at_the_end, by_layer, over_steps
from ..study.maps import domain_by_expert, expert_load, routes
from ..study.markdown import joined
from ..study.quantities import LOSS
from ..study.statistics import Contrast

ON_THE_ANSWERS = (
    "D, E, F and G have equal K. The gates of E are raw, so its loss is compared with that of G, top-2 with raw "
    "gates. Its function divergence is compared with that of D, which has other gates and another learning rate; the "
    "comparison with G is exploratory. D, F and G have a balance loss and E has none: a difference belongs to the "
    "whole config. E is trained by the batch rule, which guarantees balance and sees later bytes; its causal loss "
    "uses thresholds kept while training. Information cannot exceed the entropy of the load, so an uneven load can "
    "carry more of it. A byte alone predicts its domain in part, so domain information does not show that experts "
    "follow topics.")


def say_study(r):
    """How the layers of A, B and C ended, and what the seeds of the sweep say of the cost of balancing."""
    names = [name for name in "ABC" if name in r.with_experts]
    said = [r.layers_at_the_end(names)] if names else []
    none, heavy = (r.sweep.get(name, {}) for name in "AC")
    if rates := [rate for rate in none if math.isfinite(none[rate] + heavy.get(rate, math.inf))]:
        each = joined([f"{heavy[rate] - none[rate]:+.3f} at {rate:g}" for rate in rates])
        said.append("**At equal learning rates.** In the sweep, of two seeds, the loss of `C` less that of `A` is "
                    f"{each}. With the best rate of each it is {min(heavy.values()) - min(none.values()):+.3f} on "
                    f"these two seeds, and {r.primary[0].mean:+.3f} on those of the study. The answer to the first "
                    "question is for the chosen rates alone.")
    return said


routers_a_to_f = Experiment(
    name="study", question="What do seven routings do to one model?", adjustable=True,
    settings=(
        Setting("A", "no load balancing", model={"router": "top_k", "top_k": 1, "aux_coef": 0.0}),
        Setting("B", "light balancing", model={"router": "top_k", "top_k": 1, "aux_coef": 0.01}, rate_of="C"),
        Setting("C", "heavy balancing", model={"router": "top_k", "top_k": 1, "aux_coef": 0.1}),
        Setting("D", "top-2: Mixtral style", model={"router": "top_k", "top_k": 2, "aux_coef": 0.01}),
        Setting("E", "expert choice: guaranteed balance",
                model={"router": "expert_choice", "top_k": 2, "aux_coef": 0.0}),
        Setting("F", "noise on the scores", model={"router": "noisy_top_k", "top_k": 2, "aux_coef": 0.01}, rate_of="D"),
        Setting("G", "as D, with raw gates: Grok-1 style",
                model={"router": "top_k", "top_k": 2, "aux_coef": 0.01, "router_options": {"renormalise": False}})),
    training={"final_windows": 1000}, scales={
        "quick": Scale({}, 200, 1, {"n_evaluations": 4, "final_windows": 32}), "default": Scale({}, 2000, 1)},
    metrics=(LOSS, "causal_perplexity", "causal_bits_per_byte", "load_cv", "effective_experts", "max_violation",
             "max_violation_batch", "dead_experts", "mi_excess", "byte_excess", "repetition", "weight_divergence",
             "function_divergence", "token_coverage", "drop_rate", "excess"),
    primary=(
        Primary(question="Does balancing cost loss?", contrast=Contrast(LOSS, "C", minus="A"),
                lower="Heavy balancing lowers the loss.", higher="Heavy balancing raises the loss.",
                same="Heavy balancing costs less than 0.01 nats."),
        Primary(question="Do experts differ as much under expert choice as under token choice?",
                contrast=Contrast("function_divergence", "E", minus="D"), margin=0.05,
                lower="Under expert choice the functions of experts are more alike.",
                higher="Under expert choice the functions of experts differ more.",
                same="The functions of experts differ equally under both."),
        Primary(question="Is expert choice, judged by thresholds, as good as top-2 with the same kind of gates?",
                contrast=Contrast(LOSS, "E", minus="G"),
                lower="Expert choice is better than top-2 with the same kind of gates.",
                higher="Expert choice is worse than top-2 with the same kind of gates.",
                same="Expert choice is as good as top-2 with the same kind of gates.")),
    exploratory=(*contrasts(("load_cv", "mi_excess"), combinations("ABC", 2)),
                 *contrasts(("mi_excess", "byte_excess", "repetition", "function_divergence"), ("DF", "EF")),
                 *contrasts((LOSS,), ("AB", "BC", "BD", "DE", "DF", "DG")),
                 Contrast("function_divergence", "E", minus="G"), Contrast("leak", "E"), Contrast("prefix_cost", "E")),
    seeds=12, steps=2000, rates=CANDIDATES, measure=measures.divergence_by_rule,
    say=say_study, caution=ON_THE_ANSWERS,
    figures={"at_the_end": at_the_end(LOSS, "effective_experts", "function_divergence", reference="D"),
             "over_steps": over_steps("D", LOSS),
             "expert_load": expert_load,
             "imbalance": at_the_end("load_cv", "max_violation", "max_violation_batch", experts_only=True),
             "domain_by_expert": domain_by_expert,
             "routes": routes("D"),
             "router_entropy": by_layer("router_entropy_share", "marginal_entropy_share")},
    claims=(Claim(None, "The loss is lower with the routing of training than with causal routing", "Zhou 2022",
                  (Effect("leak", "E", ">", 0),)),
            Claim(None, "Without a balance loss fewer than half of the experts are in effect, with it more",
                  "our bound; Shazeer 2017, table 6", (Effect("effective_experts", "A", "<", 4),
                                            Effect("effective_experts", "C", ">", 4)))))
