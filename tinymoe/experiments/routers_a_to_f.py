"""The study: six routings of one model, configs A to F, which `python cli.py study` trains and writes up."""

from itertools import combinations

from ..study import measures
from ..study.experiment import CANDIDATES, Claim, Effect, Experiment, Primary, Scale, Setting, contrasts
from ..study.figures import at_the_end, by_layer, domain_by_expert, expert_load, over_steps
from ..study.quantities import LOSS
from ..study.statistics import Contrast

ON_THE_ANSWERS = (
    "Information cannot exceed the entropy of the load, so an uneven load can carry more of it. More information is "
    "not better routing. A byte alone predicts its domain in part, so domain information does not show that experts "
    "follow topics. D, E and F differ in their balance loss too: a difference belongs to the config, not to its router "
    "alone. D, E and F have equal K; D - F shows how far two routers differ without guaranteed balance. The leaky loss "
    "of E uses the rule of training, which routes the whole batch at once. Its causal loss uses another rule, which "
    "guarantees no balance. Their difference contains the leak and the change of rule.")

routers_a_to_f = Experiment(
    name="study", question="What do six routings do to one model?", adjustable=True,
    settings=tuple(Setting(name, what, model={"router": router, "top_k": k, "aux_coef": aux})
                   for name, router, k, aux, what in (
                       ("A", "top_k", 1, 0.0, "no load balancing"), ("B", "top_k", 1, 0.01, "light balancing"),
                       ("C", "top_k", 1, 0.1, "heavy balancing"), ("D", "top_k", 2, 0.01, "Mixtral and Grok-1 style"),
                       ("E", "expert_choice", 2, 0.0, "guaranteed balance"),
                       ("F", "noisy_top_k", 2, 0.01, "noise on the scores"))),
    training={}, scales={"quick": Scale({}, 200, 1), "default": Scale({}, 2000, 1)},
    metrics=(LOSS, "causal_perplexity", "causal_bits_per_byte", "load_cv", "max_violation", "max_violation_batch",
             "dead_experts", "mi_excess", "byte_excess", "repetition", "weight_divergence", "function_divergence",
             "token_coverage", "drop_rate", "excess"),
    primary=(
        Primary(question="Does balance cost loss?", contrast=Contrast(LOSS, "C", minus="A"),
                lower="Heavy balancing lowers the loss.", higher="Heavy balancing raises the loss.",
                same="Heavy balancing costs nothing.", not_known="Whether heavy balancing costs loss is not known."),
        Primary(question="Do experts specialise alike under token choice and expert choice?",
                contrast=Contrast("function_divergence", "E", minus="D"), margin=0.05,
                lower="Expert choice makes experts whose functions are more alike than those of token choice.",
                higher="Expert choice makes experts whose functions differ more than those of token choice.",
                same="The functions of the experts differ as much under expert choice as under token choice.",
                not_known="Whether experts differ more under expert choice or under token choice is not known."),
        Primary(question="What does guaranteed balance cost?", contrast=Contrast(LOSS, "E", minus="D"),
                lower="Expert choice, which guarantees balance in training, has a lower loss than top-2.",
                higher="Expert choice, which guarantees balance in training, has a higher loss than top-2.",
                same="Expert choice, which guarantees balance in training, is as good as top-2.",
                not_known="Whether guaranteed balance costs loss is not known.")),
    exploratory=(*contrasts(("load_cv", "mi_excess"), combinations("ABC", 2)),
                 *contrasts(("mi_excess", "byte_excess", "repetition", "weight_divergence"), combinations("DEF", 2)),
                 *contrasts((LOSS,), ("AB", "BC", "DF", "EF")),
                 Contrast("leak", "E"), Contrast("load_cv", "A", minus="B", times=3),
                 Contrast("byte_over_domain", tuple("ABCDEF"))),
    seeds=12, steps=2000, rates=CANDIDATES, measure=measures.divergence,
    say=lambda r: [r.layers_at_the_end([name for name in "ABC" if name in r.with_experts])], caution=ON_THE_ANSWERS,
    figures={"perplexity_over_steps": over_steps(None, "causal_perplexity", enlarged=True),
             "final_perplexity": at_the_end("causal_perplexity", "causal_bits_per_byte"),
             "expert_load": expert_load,
             "imbalance": at_the_end("load_cv", "max_violation", "max_violation_batch", experts_only=True),
             "domain_by_expert": domain_by_expert,
             "router_entropy": by_layer("router_entropy_share", "marginal_entropy_share"),
             "weight_divergence": by_layer("weight_divergence"),
             "coverage_and_drops": by_layer("token_coverage", "drop_rate")},
    claims=(Claim(None, "The loss is lower with the routing of training than with causal routing", "Zhou 2022",
                  (Effect("leak", "E", ">", 0),)),
            Claim(None, "Without a balance loss the load CV is over 3 times that of light balancing",
                  "Shazeer 2017, table 6", (Effect("load_cv", "A", ">", 0, minus="B", times=3),)),
            Claim(None, "In every config byte information is above domain information", "Jiang 2024; Xue 2024",
                  (Effect("byte_over_domain", tuple("ABCDEF"), ">", 0),)),
            Claim(None, "Expert choice has load CV 0 (below 0.01) and leaves bytes without an expert", "Zhou 2022",
                  (Effect("load_cv", "E", "<", 0.01, every_run=True),
                   Effect("token_coverage", "E", "<", 1, every_run=True)))))
