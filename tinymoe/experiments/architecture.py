"""Experiments on what a mixture is made of: shared and small experts, dense layers, sizes, and where it starts."""

from ..study.experiment import CANDIDATES, Claim, Effect, Experiment, Primary, Setting, against, contrasts
from ..study.figures import at_the_end, lines_by, one_against_other, over_steps
from ..study.quantities import LOSS
from ..study.statistics import Contrast

SECONDS = "Seconds were measured on one thread while another run used the machine."
BOUNDS = "The bounds of load CV and information depend on the number of experts."
SHARED_OR_NOT = (("1+1-of-7", "2-of-8"), ("1+3-of-15", "4-of-16"))
shared = Experiment(
    name="shared", question="Does a shared expert help?",
    settings=(Setting("2-of-8", "no shared expert"),
              Setting("1+1-of-7", "one shared, one of seven routed", model={"n_experts": 7, "top_k": 1, "n_shared": 1}),
              Setting("4-of-16", "half as wide, no shared expert", model={"n_experts": 16, "top_k": 4}, width=0.5),
              Setting("1+3-of-15", "half as wide, one shared, three of fifteen routed",
                      model={"n_experts": 15, "top_k": 3, "n_shared": 1}, width=0.5)),
    metrics=(LOSS, "parameters", "megaflops", "load_cv", "mi_excess"),
    primary=(Primary(
        question="Does a shared expert help?", contrast=Contrast(LOSS, "1+1-of-7", minus="2-of-8"),
        lower="A shared expert lowers the loss.", higher="A shared expert raises the loss.",
        same="A shared expert changes nothing.", not_known="Whether a shared expert helps is not known.",
        published="yes: DeepSeekMoE (Dai 2024); no: OLMoE (Muennighoff 2024)"),),
    exploratory=(*contrasts((LOSS,), SHARED_OR_NOT[1:]), *contrasts(("mi_excess",), SHARED_OR_NOT)),
    figures={"at_the_end": at_the_end(LOSS, "mi_excess", "load_cv")},
    caution="Active and total parameters are equal. The gates differ: one routed expert has a raw gate, several have "
            f"gates that sum to 1, and the shared expert has none. {BOUNDS}")

fine_grained = Experiment(
    name="fine-grained", question="Do many small experts beat few large ones?",
    settings=(Setting("2-of-8", "as wide as a dense layer"),
              Setting("4-of-16", "half as wide", model={"n_experts": 16, "top_k": 4}, width=0.5),
              Setting("8-of-32", "a quarter as wide", model={"n_experts": 32, "top_k": 8}, width=0.25)),
    metrics=(LOSS, "parameters", "megaflops", "seconds", "load_cv", "mi_excess"),
    exploratory=contrasts((LOSS, "mi_excess"), against("2-of-8", ("4-of-16", "8-of-32"))),
    figures={"at_the_end": at_the_end(LOSS, "mi_excess", "seconds")},
    caution="Active and total parameters are equal but for routers and biases (1%). DeepSeekMoE and OLMoE report a "
            f"gain at other scales. {BOUNDS} {SECONDS}")

ONE_EXPERT = {"n_experts": 1, "top_k": 1, "aux_coef": 0.0}  # a dense layer
dense = Experiment(
    name="dense", question="Is a mixture better than a dense model?",
    settings=(Setting("mixture", "top-2 of 8 experts"),
              Setting("dense-active", "one layer as large as the two active experts", model=ONE_EXPERT, width=2),
              Setting("dense-total", "one layer as large as all eight", model=ONE_EXPERT, width=8)),
    metrics=(LOSS, "cross_entropy", "parameters", "megaflops", "seconds"),
    primary=(
        Primary(question="Is a mixture better than a dense model with as many active parameters?",
                contrast=Contrast(LOSS, "mixture", minus="dense-active"),
                lower="A mixture is better than a dense model of equal active size.",
                higher="A mixture is worse than a dense model of equal active size.",
                same="A mixture is as good as a dense model of equal active size.",
                not_known="Whether a mixture is better than a dense model of equal active size is not known."),
        Primary(question="Is a dense model with as many parameters in all better than a mixture?",
                contrast=Contrast(LOSS, "dense-total", minus="mixture"),
                lower="A dense model of equal total size is better than a mixture.",
                higher="A dense model of equal total size is worse than a mixture.",
                same="A dense model of equal total size is as good as a mixture.",
                not_known="Whether a dense model of equal total size is better than a mixture is not known.")),
    exploratory=contrasts(("cross_entropy",), (("mixture", "dense-active"), ("dense-total", "mixture"))),
    crossings=((LOSS, "dense-total", "mixture"),), seeds=12, steps=2000, rates=CANDIDATES,
    figures={"over_steps": over_steps("dense-active", "cross_entropy", LOSS),
             "loss_against_work": one_against_other("megaflops", LOSS)},
    caution="A dense layer is a mixture of one expert. Two other things differ: only the mixture has a balance loss "
            "(0.01), and its two gates that sum to 1 average two experts where one layer twice as wide adds them. The "
            "training loss is the mean over the last tenth of the steps. Steps, not seconds, are equal; the larger "
            f"dense model may need more of them or another learning rate. {SECONDS}",
    claims=(Claim(9, "A mixture beats a dense model of equal active parameters on training loss, and one of equal "
                     "total parameters is better still", "Shazeer 2017; Clark 2022",
                  (Effect("cross_entropy", "mixture", "<", 0, minus="dense-active"),
                   Effect("cross_entropy", "dense-total", "<", 0, minus="mixture"))),))

SURFACE = {f"E{e}-K{k}": (e, k) for k in (1, 2, 4) for e in (2, 4, 8, 16, 32) if e >= k}
surface = Experiment(
    name="surface", question="How do the loss and its cost depend on the numbers of experts and of active experts?",
    settings=tuple(Setting(name, f"top-{k} of {e}", model={"n_experts": e, "top_k": k})
                   for name, (e, k) in SURFACE.items()),
    metrics=(LOSS, "parameters", "megaflops", "seconds", "load_cv", "dead_experts"),
    exploratory=contrasts((LOSS,), (*((f"E32-K{k}", f"E4-K{k}") for k in (1, 2, 4)),
                                    *((f"E{e}-K4", f"E{e}-K1") for e in (4, 8, 16)))),
    figures={"by_experts": lines_by({f"K = {k}": [name for name in SURFACE if SURFACE[name][1] == k]
                                     for k in (1, 2, 4)},
                                    lambda name: SURFACE[name][0], "experts", LOSS, "parameters", "seconds")},
    caution="An expert has the same width in all settings, so more experts are more parameters and a larger K more "
            "active ones. K = 1 has raw gates, a larger K has gates that sum to 1, and one learning rate need not suit "
            f"all. Where K = E there is no choice. {SECONDS}")

upcycle = Experiment(
    name="upcycle", question="Does it help to start from a dense model?",
    settings=(Setting("dense", "the dense start", model={"moe_layers": ()}),
              Setting("dense-on", "the dense model, trained further", model={"moe_layers": ()}, start="dense"),
              Setting("upcycled", "a mixture of copies of its layers, trained further", start="dense"),
              Setting("scratch", "a mixture from scratch, as many steps as the further ones"),
              Setting("scratch-long", "a mixture from scratch, the steps of both", length=2)),
    metrics=(LOSS, "causal_perplexity", "megaflops", "load_cv", "weight_divergence"),
    exploratory=contrasts((LOSS,), [("upcycled", other) for other in ("dense-on", "scratch", "scratch-long")]),
    figures={"over_steps": over_steps("dense-on", LOSS, names=["dense-on", "upcycled"]),
             "at_the_end": at_the_end(LOSS)},
    caution="`dense-on` and `upcycled` have as many steps of their own as `dense`, from which they start; in these the "
            "learning rate warms up and falls again. In a mixture two experts, each as wide as the dense layer, serve "
            "a byte: more parameters and more operations. Komatsuzaki et al. (2022) ask when training from scratch "
            "overtakes upcycling: these runs compare at one length only. The weight divergence of copies is absolute.")
