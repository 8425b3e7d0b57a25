"""Experiments on what a mixture is made of: shared and small experts, dense layers, sizes, and where it starts."""

from ..study.experiment import ALL_WINDOWS, CANDIDATES, Claim, Effect, Experiment, Primary, Setting, against, contrasts
from ..study.figures import at_the_end, lines_by, one_against_other, over_steps
from ..study.quantities import LOSS
from ..study.statistics import Contrast

SECONDS = "Seconds depend on what else ran on the machine."
BOUNDS = "The bounds of load CV and information depend on the number of experts."
BORROWED = ("`4-of-16` takes the rate that `2-of-8` chose. In the published `traffic` the same model chose half of it, "
            "with a lower mean loss. So differences from it may come from the rate, and with its own it may be better.")
WITHOUT = {"2-of-8": "2-of-8", "1+1-of-7": "2-of-8", "4-of-16": "4-of-16", "1+3-of-15": "4-of-16"}
shared = Experiment(
    name="shared", question="Does a shared expert help?",
    settings=(Setting("2-of-8", "no shared expert"),
              Setting("1+1-of-7", "one shared, one of seven routed", model={"n_experts": 7, "top_k": 1, "n_shared": 1}),
              Setting("4-of-16", "half as wide, no shared expert", model={"n_experts": 16, "top_k": 4}, width=0.5,
                      rate_of="2-of-8"),
              Setting("1+3-of-15", "half as wide, one shared, three of fifteen routed", width=0.5, rate_of="1+1-of-7",
                      model={"n_experts": 15, "top_k": 3, "n_shared": 1})),
    metrics=(LOSS, "parameters", "megaflops", "load_cv", "mi_excess"),
    primary=(Primary(
        question="Does a shared expert help?", contrast=Contrast(LOSS, "1+3-of-15", minus="4-of-16"),
        lower="With a shared expert the loss is lower.", higher="With a shared expert the loss is higher.",
        same="A shared expert changes the loss by less than 0.01 nats.",
        published="yes: DeepSeekMoE (Dai 2024); no: OLMoE (Muennighoff 2024)"),),
    exploratory=(*contrasts((LOSS,), (("1+1-of-7", "2-of-8"),)),
                 *contrasts(("mi_excess",), (("1+1-of-7", "2-of-8"), ("1+3-of-15", "4-of-16")))),
    seeds=8, steps=1000, rates=CANDIDATES, training=ALL_WINDOWS,
    figures={"at_the_end": at_the_end(LOSS, "mi_excess", "load_cv", reference="the setting without a shared expert",
                                      reference_of=WITHOUT.get)},
    caution="Active and total parameters are equal. The gates differ: one routed expert has a raw gate, several have "
            f"gates that sum to 1, and the shared expert has none. {BORROWED} {BOUNDS}")

fine_grained = Experiment(
    name="fine-grained", question="Do many small experts beat few large ones?",
    settings=(Setting("2-of-8", "as wide as a dense layer"),
              Setting("4-of-16", "half as wide", model={"n_experts": 16, "top_k": 4}, width=0.5, rate_of="2-of-8"),
              Setting("8-of-32", "a quarter as wide", model={"n_experts": 32, "top_k": 8}, width=0.25)),
    metrics=(LOSS, "parameters", "megaflops", "seconds", "load_cv", "mi_excess"),
    primary=(Primary(
        question="Do many small experts beat few large ones?", contrast=Contrast(LOSS, "8-of-32", minus="2-of-8"),
        lower="Many small experts beat few large ones.", higher="Few large experts beat many small ones.",
        same="Many small experts are as good as few large ones.",
        published="yes: DeepSeekMoE (Dai 2024), OLMoE (Muennighoff 2024)"),),
    exploratory=(Contrast(LOSS, "4-of-16", minus="2-of-8"),
                 *contrasts(("mi_excess",), against("2-of-8", ("4-of-16", "8-of-32")))),
    seeds=8, steps=1000, rates=CANDIDATES, training=ALL_WINDOWS,
    figures={"at_the_end": at_the_end(LOSS, "mi_excess", reference="2-of-8")},
    caution=f"Active and total parameters are equal but for routers and biases (1%). {BORROWED} {BOUNDS} "
            f"{SECONDS}")

ONE_EXPERT = {"n_experts": 1, "top_k": 1, "aux_coef": 0.0}  # a dense layer
HASH = {"router": "hash", "aux_coef": 0.0}
dense = Experiment(
    name="dense", question="Is a mixture worth it?",
    settings=(Setting("mixture", "top-2 of 8 experts"),
              Setting("hash", "2 of 8 experts by a hash of the byte", model=HASH),
              Setting("dense-active", "one layer as large as the two active experts", model=ONE_EXPERT, width=2),
              Setting("dense-total", "one layer as large as all eight", model=ONE_EXPERT, width=8),
              Setting("dense-active-seconds", "as dense-active, trained for as long as the mixture takes",
                      model=ONE_EXPERT, width=2, length=1.07, rate_of="dense-active"),
              Setting("dense-total-seconds", "as dense-total, trained for as long as the mixture takes",
                      model=ONE_EXPERT, width=8, length=0.57, rate_of="dense-total")),
    metrics=(LOSS, "cross_entropy", "parameters", "active_parameters", "megaflops", "seconds"),
    primary=(
        Primary(question="Does a mixture beat a dense model with as many active parameters?",
                contrast=Contrast(LOSS, "mixture", minus="dense-active"),
                lower="At equal steps a mixture beats a dense model of equal active size.",
                higher="A dense model of equal active size beats a mixture.",
                same="A mixture is as good as a dense model of equal active size.",
                published="yes: Shazeer 2017; Clark 2022"),
        Primary(question="Does a dense model with as many parameters in all beat a mixture?",
                contrast=Contrast(LOSS, "dense-total", minus="mixture"),
                lower="A dense model of equal total size beats a mixture.",
                higher="At equal steps a mixture beats a dense model of equal total size.",
                same="A dense model of equal total size is as good as a mixture.",
                published="yes: Clark 2022")),
    exploratory=(*contrasts((LOSS,), against("mixture", ("hash", "dense-active-seconds", "dense-total-seconds"))),
        *contrasts(("cross_entropy",), (("mixture", "dense-active"), ("dense-total", "mixture")))),
    crossings=((LOSS, "dense-total", "mixture"),), seeds=12, steps=2000, rates=CANDIDATES,
    training=ALL_WINDOWS | {"n_evaluations": 20},
    figures={"over_steps": over_steps("dense-active", "cross_entropy", LOSS,
                                       names=["mixture", "hash", "dense-active", "dense-total"]),
             "loss_against_seconds": one_against_other("seconds", LOSS)},
    caution="A dense layer is a mixture of one expert. Two other things differ: only the mixture has a balance loss "
            "(0.01), and its two gates that sum to 1 average two experts where one layer twice as wide adds them. The "
            "training loss is the mean over the last twentieth of the steps. The lengths of the runs for equal seconds "
            "were set beforehand from the processor time of a step on one thread: 39 ms for the mixture, 38 with a "
            "hash, 37 for the small dense model and 69 for the large one. The mixture and the small dense model do the "
            "same work for a byte, so its 7% more steps make up for time that this code spends on routing. They are a "
            "run of its own, whose schedule is longer too; no mixture was trained for as many. A run that "
            "begins late to fall weighs much in a mean: look at the single seeds. Where the large dense model ends "
            "above the small one, it trains badly at these rates and steps, and its loss says little of what its size "
            f"is worth. {SECONDS}",
    claims=(Claim(9, "A mixture beats a dense model of equal active parameters on training loss",
                  "Shazeer 2017; Clark 2022", (Effect("cross_entropy", "mixture", "<", 0, minus="dense-active"),)),
            Claim(9, "A dense model of equal total parameters is better still on training loss",
                  "Clark 2022", (Effect("cross_entropy", "dense-total", "<", 0, minus="mixture"),))))

SURFACE = {f"E{e}-K{k}": (e, k) for k in (1, 2, 4) for e in (2, 4, 8, 16, 32) if e >= k}
surface = Experiment(
    name="surface", question="How do the loss and its cost depend on the numbers of experts and of active experts?",
    settings=tuple(Setting(name, f"top-{k} of {e}", model={"n_experts": e, "top_k": k},
                           rate_of=None if e == 8 else f"E8-K{k}") for name, (e, k) in SURFACE.items()),
    metrics=(LOSS, "parameters", "megaflops", "seconds", "load_cv", "dead_experts"),
    primary=(Primary(
        question="Do more experts of the same width lower the loss?", contrast=Contrast(
            LOSS, "E32-K2", minus="E4-K2"),
        lower="Eight times as many experts lower the loss.", higher="Eight times as many experts raise the loss.",
        same="Eight times as many experts change the loss by less than 0.01 nats.", published="yes: Clark 2022"),),
    exploratory=contrasts((LOSS,), (("E32-K1", "E4-K1"), ("E32-K4", "E4-K4"),
                                    *((f"E{e}-K4", f"E{e}-K1") for e in (4, 8, 16)))),
    seeds=6, steps=1000, rates=CANDIDATES, training=ALL_WINDOWS,
    figures={"by_experts": lines_by({f"K = {k}": [name for name in SURFACE if SURFACE[name][1] == k]
                                     for k in (1, 2, 4)},
                                    lambda name: SURFACE[name][0], "experts", LOSS, "megaflops")},
    caution="An expert has the same width in all settings, so more experts are more parameters and a larger K more "
            "active ones. K = 1 has raw gates, a larger K has gates that sum to 1. All settings of one K share the "
            f"learning rate that 8 experts chose. Where K = E there is no choice. {SECONDS}")

upcycle = Experiment(
    name="upcycle", question="Does it help to start from a dense model?",
    settings=(Setting("dense", "the dense start", model={"moe_layers": ()}),
              Setting("dense-on", "the dense model, trained further", model={"moe_layers": ()}, start="dense",
                      rate_of="dense"),
              Setting("upcycled", "a mixture of copies of its layers, trained further", start="dense",
                      rate_of="scratch"),
              Setting("scratch", "a mixture from scratch, for as many steps as `upcycled` adds"),
              Setting("scratch-long", "a mixture from scratch, for the steps of `dense` and `upcycled` together",
                      length=2, rate_of="scratch")),
    metrics=(LOSS, "causal_perplexity", "megaflops", "load_cv", "weight_divergence"),
    primary=(Primary(
        question="Is upcycling as good as training a mixture from scratch for as many steps in all?",
        contrast=Contrast(LOSS, "upcycled", minus="scratch-long"),
        lower="Upcycling beats a mixture trained from scratch for as many steps in all.",
        higher="A mixture trained from scratch for as many steps in all beats upcycling.",
        same="Upcycling is as good as a mixture trained from scratch for as many steps in all.",
        published="yes, for short further training: Komatsuzaki 2022"),),
    exploratory=contrasts((LOSS,), [("upcycled", other) for other in ("dense-on", "scratch")]),
    seeds=8, steps=1000, rates=CANDIDATES, training=ALL_WINDOWS,
    figures={"over_steps": over_steps("dense-on", LOSS, names=["dense-on", "upcycled"]),
             "at_the_end": at_the_end(LOSS, reference="scratch-long")},
    caution="`dense-on` and `upcycled` have as many steps of their own as `dense`, from which they start, and figures "
            "count from there; in these the learning rate warms up and falls again. In a mixture two experts, each as "
            "wide as the dense layer, serve a byte: more parameters and more operations. These runs compare at one "
            "length only. `upcycled` has the rate of `scratch` and `dense-on` that of `dense`: no setting chose its "
            "own for further or longer training. Copies start with a weight divergence of 0, so theirs is not divided "
            "by it.")
