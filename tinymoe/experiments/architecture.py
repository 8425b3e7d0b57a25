"""Experiments on what a mixture is made of: shared and small experts, dense layers, sizes, and where it starts."""

from ..study.experiment import LOSS, Claim, Dispute, Effect, Experiment, Setting, planned
from ..study.experiment_figures import at_the_end, lines_by, one_against_other, over_steps


def say_loss_and_domains(r):
    """Loss and specialisation, with the planned differences."""
    return [f"Loss, from the lowest: {r.show(LOSS, *r.ranked(LOSS))}; {r.differences(LOSS)}.",
            f"Domain information: {r.show('mi_excess')}; {r.differences('mi_excess')}."]


SHARED_OR_NOT = (("1+1-of-7", "2-of-8"), ("1+3-of-15", "4-of-16"))
shared = Experiment(
    "shared", "Does a shared expert help?",
    (Setting("2-of-8", "no shared expert"),
     Setting("1+1-of-7", "one shared, one of seven routed", {"n_experts": 7, "top_k": 1, "n_shared": 1}),
     Setting("4-of-16", "half as wide, no shared expert", {"n_experts": 16, "top_k": 4}, 0.5),
     Setting("1+3-of-15", "half as wide, one shared, three of fifteen routed",
             {"n_experts": 15, "top_k": 3, "n_shared": 1}, 0.5)),
    (LOSS, "parameters", "megaflops", "load_cv", "mi_excess"),
    planned((LOSS, "mi_excess"), SHARED_OR_NOT),
    say_loss_and_domains, {"at_the_end": at_the_end(LOSS, "mi_excess", "load_cv")},
    "At equal active and total parameters. Published results disagree: DeepSeekMoE for a shared expert, OLMoE against. "
    "With one routed expert the gate is raw, with several it is renormalised, and the shared expert has none: that "
    "differs too. Load CV and "
    "information have other bounds with another number of experts.",
    disputes=(Dispute("Does a shared expert help?", "yes: DeepSeekMoE (Dai 2024); no: OLMoE (Muennighoff 2024)",
                      SHARED_OR_NOT),))

fine_grained = Experiment(
    "fine-grained", "Do many small experts beat few large ones?",
    (Setting("2-of-8", "as wide as a dense layer"),
     Setting("4-of-16", "half as wide", {"n_experts": 16, "top_k": 4}, 0.5),
     Setting("8-of-32", "a quarter as wide", {"n_experts": 32, "top_k": 8}, 0.25)),
    (LOSS, "parameters", "megaflops", "seconds", "load_cv", "mi_excess"),
    planned((LOSS, "mi_excess"), (("4-of-16", "2-of-8"), ("8-of-32", "2-of-8"))),
    say_loss_and_domains, {"at_the_end": at_the_end(LOSS, "mi_excess", "seconds")},
    "At equal active and total parameters but for routers and biases (1%). DeepSeekMoE and OLMoE report a gain, at "
    "other scales. Load CV and information have other bounds with another number of experts. Seconds are of one thread "
    "beside another run.")


def say_dense(r):
    """Loss beside what it costs."""
    sizes = "; ".join(f"`{name}` {r.mean('parameters', name):.3f} million parameters, "
                      f"{r.mean('megaflops', name):.2f} MFLOP a byte, {r.mean('seconds', name):.0f} s of training"
                      for name in r.groups)
    return [f"Training loss over the last tenth of the steps: {r.show('train_cross_entropy')}; "
            f"{r.differences('train_cross_entropy')}.",
            f"Validation loss: {r.show(LOSS)}; {r.differences(LOSS)}.", f"What it takes: {sizes}."]


ONE_EXPERT = {"n_experts": 1, "top_k": 1, "aux_coef": 0.0}  # a dense layer
dense = Experiment(
    "dense", "Is a mixture worth it?",
    (Setting("mixture", "top-2 of 8 experts"),
     Setting("dense-active", "one layer as large as the two active experts", ONE_EXPERT, 2),
     Setting("dense-total", "one layer as large as all eight", ONE_EXPERT, 8)),
    (LOSS, "train_cross_entropy", "parameters", "megaflops", "seconds"),
    planned(("train_cross_entropy", LOSS), (("mixture", "dense-active"), ("mixture", "dense-total"))),
    say_dense, {"over_steps": over_steps("dense-active", "cross_entropy", "causal_cross_entropy"),
                "loss_against_work": one_against_other("megaflops", LOSS)},
    "A dense layer is a mixture of one expert. Two things differ besides: the balance loss (0.01, here 0), and the "
    "scale, as two gates that sum to 1 average two experts where one layer twice as wide adds them up. Seconds are of "
    "one thread beside another run; steps, not seconds, are equal. So few steps at one learning rate may not serve the "
    "larger dense model.",
    (Claim(9, "A mixture beats a dense model of equal active parameters on training loss, and one of equal total "
              "parameters is better still", "Shazeer 2017; Clark 2022",
           (Effect("train_cross_entropy", "mixture", "<", 0, minus="dense-active"),
            Effect("train_cross_entropy", "dense-total", "<", 0, minus="mixture"))),))


SURFACE = {k: [f"E{e}-K{k}" for e in (2, 4, 8, 16, 32) if e >= k] for k in (1, 2, 4)}
MORE_EXPERTS = tuple((f"E32-K{k}", f"E4-K{k}") for k in SURFACE)
MORE_ACTIVE = tuple((f"E{e}-K4", f"E{e}-K1") for e in (4, 8, 16))


def n_experts(name):
    """8 of E8-K2."""
    return int(name.split("-")[0][1:])


def say_surface(r):
    """The ends of the surface, and what more experts and more active experts bring."""
    best, sizes = r.ranked(LOSS), r.ranked("parameters")
    return [f"Lowest loss: {r.show(LOSS, *best[:3])}; highest: {r.show(LOSS, *best[-3:])}.",
            f"More experts: {r.differences(LOSS, MORE_EXPERTS)}.",
            f"More active experts: {r.differences(LOSS, MORE_ACTIVE)}.",
            f"From {r.mean('parameters', sizes[0]):.2f} to {r.mean('parameters', sizes[-1]):.2f} million parameters."]


surface = Experiment(
    "surface", "How do the number of experts and of active experts trade?",
    tuple(Setting(name, f"top-{k} of {n_experts(name)}", {"n_experts": n_experts(name), "top_k": k})
          for k, names in SURFACE.items() for name in names),
    (LOSS, "parameters", "megaflops", "seconds", "load_cv", "dead_experts"),
    planned((LOSS,), MORE_EXPERTS + MORE_ACTIVE),
    say_surface, {"by_experts": lines_by({f"K = {k}": names for k, names in SURFACE.items()}, n_experts, "experts",
                                         LOSS, "parameters", "seconds")},
    "Every expert is as wide as before, so more experts are more parameters and a larger K more active ones. K = 1 has "
    "raw gates, K > 1 renormalised ones, and one learning rate need not suit all. Where K = E nothing is "
    "chosen. Seconds are of one thread beside another run.")


def say_upcycle(r):
    """The ends, and the planned differences."""
    return [f"Loss at the end: {r.show(LOSS)}.", f"{r.differences(LOSS)}.",
            "`dense-on` and `upcycled` have had the steps of the dense model they start from, and as many of their "
            "own; `scratch-long` as many from scratch as both; `dense` and `scratch` half of them."]


upcycle = Experiment(
    "upcycle", "Start from a dense model?",
    (Setting("dense", "the dense start", {"moe_layers": ()}),
     Setting("dense-on", "the dense model, further", {"moe_layers": ()}, start="dense"),
     Setting("upcycled", "a mixture of copies of its layers, further", start="dense"),
     Setting("scratch", "a mixture from scratch, as many steps as the further ones"),
     Setting("scratch-long", "a mixture from scratch, the steps of both", length=2)),
    (LOSS, "causal_perplexity", "megaflops", "load_cv", "weight_divergence"),
    planned((LOSS,), (("upcycled", "dense-on"), ("upcycled", "scratch"), ("upcycled", "scratch-long"))),
    say_upcycle, {"over_steps": over_steps("dense-on", "causal_cross_entropy", names=["dense-on", "upcycled"]),
                  "at_the_end": at_the_end(LOSS)},
    "In the mixtures two experts, each as wide as the dense layer, work for a byte: more parameters, and more "
    "operations, than the dense model has. The learning rate warms up and falls again in the further steps. The "
    "crossover of Komatsuzaki et al. (2022), where training from scratch catches up, is not to be expected at this "
    "scale. The weight divergence of copies is absolute.")
