"""Experiments on how experts are chosen: learned or not, for tokens or sequences, at which learning rate, by trial."""

from itertools import combinations

import scipy

from ..study import measures
from ..study.experiment import ALL_WINDOWS, CANDIDATES, Claim, Effect, Experiment, Primary, Setting, against, contrasts
from ..study.figures import at_the_end, lines_by, one_against_other, over_steps
from ..study.quantities import LOSS
from ..study.statistics import MARGIN, Contrast
from .architecture import ONE_EXPERT
from .routers_a_to_f import routers_a_to_f

UNLEARNED = ["frozen", "random", "shuffled", "hash"]
frozen = Experiment(
    name="frozen", question="Must a router learn?",
    settings=(Setting("learned", "top-2"),
              Setting("frozen", "top-2 with a router that keeps its first weights", model={"router": "frozen"},
                      rate_of="learned"),
              Setting("random", "drawn afresh for each byte and step", model={"router": "random"}, rate_of="learned"),
              Setting("shuffled", "top-2, the choices given to other bytes: the same counts",
                      model={"router": "shuffled"}, rate_of="learned"),
              Setting("hash", "by a hash of the byte: a fixed random table", model={"router": "hash"}),
              Setting("dense", "one layer as large as the two active experts", model=ONE_EXPERT, width=2)),
    metrics=(LOSS, "causal_perplexity", "load_cv", "mi_excess", "byte_excess"),
    primary=(Primary(
        question="Is a frozen router as good as a learned one?", contrast=Contrast(LOSS, "frozen", minus="learned"),
        lower="A frozen router beats a learned one.", higher="A learned router beats a frozen one.",
        same="A frozen router is as good as a learned one.", published="nearly: Fan 2024"),),
    exploratory=contrasts((LOSS,), (*against("learned", (*UNLEARNED[1:], "dense")), *against("dense", UNLEARNED))),
    crossings=((LOSS, "hash", "learned"),), seeds=8, steps=1000, rates=CANDIDATES, training=ALL_WINDOWS,
    figures={"at_the_end": at_the_end(LOSS, "load_cv", "byte_excess", reference="learned"),
             "over_steps": over_steps("learned", LOSS)},
    caution="The gates of random and hash routing are the constant 1/2; those of the others follow the router. All "
            "mixtures have the balance loss; under a frozen router it moves the hidden states. At validation a random "
            "route is drawn again, and a shuffled byte takes the choice of an earlier byte of its window, or its own. "
            "The two gates of a mixture sum to 1, so it averages two experts where the dense layer, twice as wide, "
            "adds them. `shuffled` trains a router of its own, so its load need not be as even as that of `learned`. "
            "The claims are judged against what a mixture gains over a dense model. Random routing has the rate that "
            "`learned` chose. In the published `specialise` it has half of it. `again-top-2` asks the question again "
            "on other seeds.",
    claims=(Claim(3, "A frozen router keeps what a mixture gains over a dense model (it is within 0.01 nats of a "
                     "learned one, and better than dense); routing drawn afresh gains less than 0.01 nats",
                  "Fan 2024 (2402.13089), perplexity by tokens: +0.2% and about +19%",
                  (Effect(LOSS, "frozen", "<", MARGIN, minus="learned"), Effect(LOSS, "frozen", "<", 0, minus="dense"),
                   Effect(LOSS, "random", ">", -MARGIN, minus="dense"))),
            Claim(4, "Balance alone is not enough: with the same counts, shuffled, a mixture gains less than 0.01 nats "
                     "over a dense model", "Fan 2024", (Effect(LOSS, "shuffled", ">", -MARGIN, minus="dense"),))))

hash_routing = Experiment(
    name="hash", question="Does routing by a hash of the byte keep its lead?",
    settings=(Setting("learned", "a learned router in both layers", model={"router": ("top_k", "top_k")}),
              Setting("hash", "a hash of the byte in both layers", model={"router": ("hash", "hash")}),
              Setting("hash-then-learned", "a hash of the byte in layer 1, a learned router in layer 3",
                      model={"router": ("hash", "top_k")}, rate_of="learned"),
              Setting("learned-then-hash", "a learned router in layer 1, a hash of the byte in layer 3",
                      model={"router": ("top_k", "hash")}, rate_of="hash"),
              Setting("gated", "a hash with learned gates in both layers",
                      model={"router": ("hash_gated", "hash_gated")}, rate_of="hash"),
              Setting("gated-then-learned", "a hash with learned gates in layer 1, a learned router in layer 3",
                      model={"router": ("hash_gated", "top_k")}, rate_of="learned")),
    metrics=(LOSS, "causal_perplexity", "load_cv", "mi_excess", "byte_excess"),
    primary=(Primary(
        question="Is a hash in the early layer and a learned router in the late one as good as learned routers?",
        contrast=Contrast(LOSS, "hash-then-learned", minus="learned"),
        lower="A hash in the early layer beats learned routers in both layers.",
        higher="Learned routers in both layers beat a hash in the early one.",
        same="A hash in the early layer is as good as learned routers in both layers.",
        published="yes: DeepSeek-V4, with learned gates for the hash"),),
    exploratory=contrasts((LOSS,), (*against("learned", ("hash", "learned-then-hash", "gated", "gated-then-learned")),
                                    ("gated", "hash"))),
    crossings=((LOSS, "hash", "learned"), (LOSS, "hash-then-learned", "learned")),
    seeds=8, steps=4000, rates=CANDIDATES, training=ALL_WINDOWS | {"n_evaluations": 20},
    figures={"over_steps": over_steps("learned", LOSS),
             "at_the_end": at_the_end(LOSS, "load_cv", "byte_excess", reference="learned")},
    caution="The two MoE layers are layers 1 and 3 of four. A hash has the constant gate 1/2, a table with learned "
            "gates the scores of its experts, as in DeepSeek-V4: its form is that of `gated-then-learned`. Settings "
            "share the learning rate of `learned` or of `hash`; where these differ, the course of the curves may be "
            "that of the rates. In one seed `gated` and `hash` draw different tables, and so do `learned-then-hash` "
            "and `hash` in layer 3.")

UNITS = {"token": ("each byte", {}), "layer": ("each prefix, in each layer", {"router": "sequence"}),
         "global": ("each prefix, once for all layers",
                    {"router": "sequence", "router_options": {"sequence_scope": "global"}})}
unit = Experiment(
    name="unit", question="Is it better to route tokens or sequences?",
    settings=tuple(Setting(f"{name}-K{k}", f"{what}, top-{k}", model=fields | {"top_k": k},
                           rate_of=None if name == "token" else f"token-K{k}")
                   for k in (1, 2) for name, (what, fields) in UNITS.items()),
    metrics=(LOSS, "causal_perplexity", "mi_excess", "byte_excess", "repetition", "load_cv"),
    primary=(Primary(
        question="Is it better to route tokens or sequences?", contrast=Contrast(LOSS, "layer-K2", minus="token-K2"),
        lower="Top-2 by the mean of the prefix, in each layer, beats top-2 by the token.",
        higher="Top-2 by the token beats top-2 by the mean of the prefix, in each layer.",
        same="Top-2 by the mean of the prefix, in each layer, is as good as top-2 by the token.",
        published="tokens: Fan 2024"),),
    exploratory=(*contrasts((LOSS,), (("global-K2", "token-K2"), *against("token-K1", ("layer-K1", "global-K1")))),
                 *contrasts(("mi_excess", "byte_excess"), (("layer-K2", "token-K2"), ("global-K2", "token-K2")))),
    seeds=8, steps=1000, rates=CANDIDATES, training=ALL_WINDOWS,
    figures={"at_the_end": at_the_end(LOSS, "mi_excess", "byte_excess", reference="token-K2")},
    caution="Sequences are routed by the mean of the prefix so far, so that the model stays causal, and the route may "
            "change within a window; Fan et al. average the whole sequence. `again-top-2` asks the question again on "
            "other seeds.",
    claims=(Claim(8, "Routing tokens beats routing sequences at equal K",
                  "Fan 2024, table 1, perplexity by tokens: 9.9 against 10.7 and 11.6",
                  tuple(Effect(LOSS, f"{name}-K{k}", ">", 0, minus=f"token-K{k}")
                        for k in (1, 2) for name in ("layer", "global"))),))

CONFIGS = [s.id for s in routers_a_to_f.settings]


def say_rate(r):
    """The ranking at each rate, how alike the rankings are, and the best rate of each config."""
    orders = {rate: [name[0] for name in r.ranked(LOSS) if name.endswith(f"-{rate:g}")] for rate in CANDIDATES}
    places = {rate: [order.index(c) for c in CONFIGS] for rate, order in orders.items()}
    taus = {(a, b): scipy.stats.kendalltau(places[a], places[b]) for a, b in combinations(CANDIDATES, 2)}
    alike = ", ".join(f"{a:g} and {b:g}: {tau:+.2f} (p = {p:.2g})" for (a, b), (tau, p) in taus.items())
    best = ", ".join(f"{c} {min(CANDIDATES, key=lambda rate: r.mean(LOSS, f'{c}-{rate:g}')):g}" for c in CONFIGS)
    ranking = "; ".join(f"at {rate:g}: {', '.join(order)}" for rate, order in orders.items())
    return [f"**Ranking from the lowest mean loss to the highest.** {ranking}.",
            f"**Agreement of these rankings** (Kendall's tau; 1: the same, -1: reversed; p: by chance alone). {alike}.",
            f"**Best of the rates.** {best}."]


rate = Experiment(
    name="rate", question="Does the ranking of the routers survive another learning rate?",
    settings=tuple(Setting(f"{c.id}-{rate:g}", "{router}, K = {top_k}, aux {aux_coef:g}, ".format_map(c.model) +
                           f"peak rate {rate:g}", model=c.model, training={"learning_rate": rate})
                   for c in routers_a_to_f.settings for rate in CANDIDATES),
    metrics=(LOSS, "causal_perplexity", "load_cv"),
    primary=(Primary(
        question="Does noise on the scores cost loss at a learning rate of 0.004?",
        contrast=Contrast(LOSS, "F-0.004", minus="D-0.004"),
        lower="At 0.004 noise on the scores lowers the loss.", higher="At 0.004 noise on the scores raises the loss.",
        same="At 0.004 noise on the scores costs less than 0.01 nats."),),
    exploratory=contrasts((LOSS,), [(f"{first}-{rate:g}", f"D-{rate:g}") for rate in CANDIDATES for first in "BEF"
                                    if (first, rate) != ("F", 4e-3)]),
    seeds=6, steps=1000, say=say_rate, training=ALL_WINDOWS,
    figures={"by_rate": lines_by({c: [f"{c}-{rate:g}" for rate in CANDIDATES] for c in CONFIGS},
                                 lambda name: float(name.split("-", 1)[1]), "peak learning rate", LOSS, "load_cv",
                                 reference="D", reference_of=lambda name: f"D{name[1:]}")},
    caution="A ranking of means ignores their intervals: neighbours in it need not differ. A to G are the configs of "
            "the study: the gates of E and G are raw, those of D and F sum to 1.")

reinforce = Experiment(
    name="reinforce", question="Can policy gradients train a router?", model={"top_k": 1},
    measure=measures.gradient_noise,
    settings=(Setting("top-k", "top-1, learned through its gate"),
              Setting("reinforce", "a draw, learned by REINFORCE with a baseline", model={"router": "reinforce"}),
              Setting("reinforce-0.1", "the same, policy coefficient 0.1", rate_of="reinforce",
                      model={"router": "reinforce", "losses": {"policy": 0.1}}),
              Setting("frozen-draw", "a draw, by a router that keeps its first weights", rate_of="reinforce",
                      model={"router": "reinforce", "losses": {"policy": 0.0}, "freeze": ("router",)}),
              Setting("frozen", "top-1 with a router that keeps its first weights", model={"router": "frozen"},
                      rate_of="top-k")),
    metrics=(LOSS, "causal_perplexity", "load_cv", "router_entropy", "byte_excess", "noise_share"),
    primary=(Primary(
        question="Does REINFORCE teach a router anything?", contrast=Contrast(LOSS, "reinforce", minus="frozen-draw"),
        lower="REINFORCE with a coefficient of 1 helps: the loss is below that of a frozen router that draws.",
        higher="REINFORCE with a coefficient of 1 harms: the loss is above that of a frozen router that draws.",
        same="REINFORCE with a coefficient of 1 changes the loss of a frozen router that draws by less than 0.01 nats.",
        published="yes: Clark 2022"),),
    exploratory=contrasts((LOSS,), (("reinforce-0.1", "frozen-draw"), ("reinforce", "top-k"), ("frozen", "top-k"),
                                    ("frozen-draw", "frozen"))),
    seeds=6, steps=1000, rates=CANDIDATES, training=ALL_WINDOWS,
    figures={"over_steps": over_steps("top-k", LOSS, "load_cv", "router_entropy"),
             "at_the_end": at_the_end(LOSS, "noise_share", reference="frozen-draw")},
    caution="The gate of reinforce is the constant 1, that of top-1 its probability. A byte's choice is credited with "
            "that byte's loss alone; the baseline is the mean loss of the other bytes of the batch. The model takes "
            "the mean of the policy loss over L MoE layers, so a coefficient of L gives the gradient of the expected "
            "loss; here, with two, 1 gives half of it. Reinforce draws while training and takes the most probable "
            "expert at validation. The balance loss trains all routers but the frozen ones. The share of noise is the "
            "variance over batches of the gradient (of the policy loss for reinforce, else of the cross-entropy) over "
            "that variance plus the squared mean, at each router's own last weights. The variance of a mean over 16 "
            "batches is taken off its square, which then is at least 0. So the share is 1 where no signal was seen, "
            "and for a router that has nothing more to learn. Router entropy is at most ln 8 = 2.079.")

MODERN = {  # router, options, other fields, in words
    "biased": ("biased_top_k", {}, {}, "a learned bias in the logits (GPT-OSS)"),
    "normalised": ("normalised_top_k", {}, {}, "logits normalised for each byte (Skywork-MoE)"),
    "cosine": ("cosine_top_k", {}, {}, "cosines (X-MoE)"),
    "similarity": ("top_k", {}, {"aux_coef": 0.0, "losses": {"similarity": 0.1}}, "orthogonal router (SimBal)"),
    "global": ("top_k", {}, {"aux_coef": 0.0, "losses": {"global_batch": 0.01}}, "balance over many batches (Qwen3)"),
    "bias": ("sigmoid_bias", {}, {"aux_coef": 0.0}, "sigmoid scores and a bias (DeepSeek-V3)"),
    "sqrt-softplus": ("sigmoid_bias", {"score": "sqrt_softplus"}, {"aux_coef": 0.0}, "other scores (DeepSeek-V4)"),
    "quantile": ("quantile_bias", {}, {"aux_coef": 0.0}, "a bias that is solved for"),
    "top-p": ("top_p", {"steer": 0.1}, {}, "as many experts as a share of probability needs, 2 on average"),
    "remoe": ("remoe", {}, {"aux_coef": 0.0}, "every positive logit, steered to 2 on average (ReMoE)"),
    "threshold": ("expert_threshold", {}, {"aux_coef": 0.0}, "thresholds of experts, 2 a byte on average"),
    "sinkhorn": ("sinkhorn", {}, {"aux_coef": 0.0}, "Sinkhorn while training"),
    "base": ("base_assignment", {}, {"aux_coef": 0.0, "top_k": 1}, "balanced assignment while training, K = 1")}
modern = Experiment(
    name="modern", question="Is any router since top-2 better?",
    settings=(Setting("top-2", "top-2, balance loss 0.01"),
              *(Setting(name, what, model={"router": router, "router_options": options} | more, rate_of="top-2")
                for name, (router, options, more, what) in MODERN.items())),
    metrics=(LOSS, "max_violation", "effective_experts", "experts_per_token", "mi_excess", "byte_excess"),
    primary=(Primary(
        question="Is the router of DeepSeek-V3 better than top-2?", contrast=Contrast(LOSS, "bias", minus="top-2"),
        lower="Sigmoid scores with a bias beat top-2 with a balance loss of 0.01.",
        higher="Top-2 with a balance loss of 0.01 beats sigmoid scores with a bias.",
        same="Sigmoid scores with a bias are as good as top-2 with a balance loss of 0.01."),),
    exploratory=(*contrasts((LOSS,), against("top-2", [name for name in MODERN if name != "bias"])),
                 *contrasts(("max_violation",), against("top-2", MODERN))),
    seeds=8, steps=1000, rates=CANDIDATES, training=ALL_WINDOWS,
    figures={"balance_against_loss": one_against_other("max_violation", LOSS), "over_steps": over_steps("top-2", LOSS)},
    caution="All share the learning rate that top-2 chose. Where the number of experts of a byte is a mean, the table "
            "says what it was: more experts are more work, fewer are less. `remoe` is steered towards 2 and need not "
            "have reached it. Sinkhorn and the assignment balance only while training and are measured as top-K. "
            "`again-top-2` asks the question again on other seeds.")
