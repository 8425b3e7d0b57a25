"""Experiments on how experts are chosen: learned or not, for tokens or sequences, at which learning rate, by trial."""

from itertools import combinations

from scipy.stats import kendalltau

from ..study import measures
from ..study.experiment import Claim, Effect, Experiment, Primary, Setting, against, contrasts
from ..study.figures import at_the_end, lines_by, over_steps
from ..study.quantities import LOSS, TOKEN_BYTES
from ..study.statistics import Contrast
from .routers_a_to_f import routers_a_to_f


def say_frozen(r):
    """Perplexity against that of learned routing, of a byte and of about a token."""
    def worse(metric):
        learned = r.mean(metric, "learned")
        return ", ".join(f"`{name}` {r.mean(metric, name) / learned - 1:+.1%}"
                         for name in r.groups if name != "learned")

    return [f"**Perplexity of a byte against `learned`.** {worse('causal_perplexity')}.",
            f"**Perplexity over {TOKEN_BYTES} bytes against `learned`.** {worse('token_perplexity')}."]


frozen = Experiment(
    name="frozen", question="Must a router learn?",
    settings=(Setting("learned", "top-2"),
              Setting("frozen", "top-2 with a router that keeps its first weights", model={"router": "frozen"}),
              Setting("random", "drawn afresh for each byte and step", model={"router": "random"}),
              Setting("shuffled", "top-2, the choices given to other bytes: the same counts",
                      model={"router": "shuffled"}),
              Setting("hash", "by a random table of the byte", model={"router": "hash"})),
    metrics=(LOSS, "causal_perplexity", "load_cv", "mi_excess", "byte_excess"),
    primary=(Primary(
        question="Does routing by a hash beat a learned router?", contrast=Contrast(LOSS, "hash", minus="learned"),
        lower="A random table of the byte beats a learned router.",
        higher="A learned router beats a random table of the byte.",
        same="A random table of the byte is as good as a learned router.",
        not_known="Whether a random table of the byte beats a learned router is not known.",
        published="yes: Roller 2021; no: Clark 2022"),),
    exploratory=contrasts((LOSS,), against("learned", ("frozen", "random", "shuffled"))), say=say_frozen,
    crossings=((LOSS, "hash", "learned"),),
    figures={"at_the_end": at_the_end("causal_perplexity", "load_cv", "byte_excess"),
             "over_steps": over_steps("learned", LOSS)},
    caution="The gates of random and hash routing are the constant 1/2; those of the others follow the router. All "
            "have the balance loss; under a frozen router it moves the hidden states. At validation a random route is "
            "drawn again, and a shuffled byte takes the choice of an earlier byte of its window, or its own. Its "
            "choices are those of its own router, whose load need not be as even as that of `learned`. Papers "
            f"count perplexity by tokens of about {TOKEN_BYTES} bytes, and the claims are judged so: a ratio by the "
            "byte is the fourth root of that.",
    claims=(Claim(3, f"A frozen router comes within 10% of a learned one in perplexity over {TOKEN_BYTES} bytes; "
                     "routing drawn afresh is over 10% worse", "Fan 2024 (2402.13089), by tokens: +0.2% and about +19%",
                  (Effect("token_perplexity", "frozen", "<=", 1.1, over="learned"),
                   Effect("token_perplexity", "random", ">", 1.1, over="learned"))),
            Claim(4, "Balance alone is not enough: the same counts, shuffled, lose 10% or more in perplexity over "
                     f"{TOKEN_BYTES} bytes", "Fan 2024",
                  (Effect("token_perplexity", "shuffled", ">=", 1.1, over="learned"),))))

UNITS = {"token": ("each byte", {}), "layer": ("each prefix, in each layer", {"router": "sequence"}),
         "global": ("each prefix, once for all layers",
                    {"router": "sequence", "router_options": {"sequence_scope": "global"}})}
unit = Experiment(
    name="unit", question="Is it better to route tokens or sequences?",
    settings=tuple(Setting(f"{name}-K{k}", f"{what}, top-{k}", model=fields | {"top_k": k})
                   for k in (1, 2) for name, (what, fields) in UNITS.items()),
    metrics=(LOSS, "causal_perplexity", "mi_excess", "byte_excess", "repetition", "load_cv"),
    exploratory=contrasts((LOSS, "mi_excess", "byte_excess"),
                    [pair for k in (1, 2) for pair in against(f"token-K{k}", (f"layer-K{k}", f"global-K{k}"))]),
    figures={"at_the_end": at_the_end("causal_perplexity", "mi_excess", "byte_excess")},
    caution="Sequences are routed by the mean of the prefix so far, so that the model stays causal, and the route may "
            "change within a window; Fan et al. average the whole sequence.",
    claims=(Claim(8, "Routing tokens beats routing sequences at equal K",
                  "Fan 2024, table 1, perplexity by tokens: 9.9 against 10.7 and 11.6",
                  tuple(Effect(LOSS, f"{name}-K{k}", ">", 0, minus=f"token-K{k}")
                        for k in (1, 2) for name in ("layer", "global"))),))

RATES, CONFIGS = (5e-4, 1e-3, 2e-3), [s.id for s in routers_a_to_f.settings]


def say_rate(r):
    """The ranking at each rate, how alike the rankings are, and the best rate of each config."""
    orders = {rate: [name[0] for name in r.ranked(LOSS) if name.endswith(f"-{rate:g}")] for rate in RATES}
    places = {rate: [order.index(c) for c in CONFIGS] for rate, order in orders.items()}
    alike = ", ".join(f"{a:g} and {b:g}: {kendalltau(places[a], places[b])[0]:+.2f}" for a, b in combinations(RATES, 2))
    best = ", ".join(f"{c} {min(RATES, key=lambda rate: r.mean(LOSS, f'{c}-{rate:g}')):g}" for c in CONFIGS)
    faster = ", ".join(f"{c} {r.mean(LOSS, f'{c}-{RATES[-1]:g}') - r.mean(LOSS, f'{c}-{RATES[1]:g}'):+.3f}"
                       for c in CONFIGS)
    ranking = "; ".join(f"at {rate:g}: {', '.join(order)}" for rate, order in orders.items())
    return [f"**Ranking from the lowest mean loss to the highest.** {ranking}.",
            f"**Agreement of these rankings** (Kendall's tau; 1: the same, -1: reversed). {alike}.",
            f"**Best of the three rates.** {best}.",
            f"**Mean loss at {RATES[-1]:g} minus that at {RATES[1]:g}.** {faster}."]


rate = Experiment(
    name="rate", question="Does the ranking of the routers survive another learning rate?",
    settings=tuple(Setting(f"{c.id}-{rate:g}", "{router}, K = {top_k}, aux {aux_coef:g}, ".format_map(c.model) +
                           f"peak rate {rate:g}", model=c.model, training={"learning_rate": rate})
                   for c in routers_a_to_f.settings for rate in RATES),
    metrics=(LOSS, "causal_perplexity", "load_cv"),
    exploratory=contrasts((LOSS,), [(f"{first}-{rate:g}", f"D-{rate:g}") for rate in RATES for first in "BEF"]),
    say=say_rate,
    figures={"by_rate": lines_by({c: [f"{c}-{rate:g}" for rate in RATES] for c in CONFIGS},
                                 lambda name: float(name.split("-", 1)[1]), "peak learning rate", LOSS, "load_cv")},
    caution="A ranking of means ignores their intervals: neighbours in it need not differ. Where the largest rate is "
            "the best of the three, a larger one may be better still.")

reinforce = Experiment(
    name="reinforce", question="Can policy gradients train a router?", model={"top_k": 1},
    measure=measures.gradient_noise,
    settings=(Setting("top-k", "top-1, learned through its gate"),
              Setting("reinforce", "a draw, learned by REINFORCE with a baseline", model={"router": "reinforce"}),
              Setting("reinforce-0.1", "the same, policy coefficient 0.1",
                      model={"router": "reinforce", "losses": {"policy": 0.1}}),
              Setting("frozen-draw", "a draw, by a router that keeps its first weights",
                      model={"router": "reinforce", "losses": {"policy": 0.0}, "freeze": ("router",)}),
              Setting("frozen", "top-1 with a router that keeps its first weights", model={"router": "frozen"})),
    metrics=(LOSS, "causal_perplexity", "load_cv", "router_entropy", "byte_excess", "noise_share"),
    exploratory=contrasts((LOSS,), (("reinforce", "frozen-draw"), ("reinforce-0.1", "frozen-draw"),
                                    ("reinforce", "top-k"), ("frozen", "top-k"), ("frozen-draw", "frozen"))),
    figures={"over_steps": over_steps("top-k", LOSS, "load_cv", "router_entropy"),
             "at_the_end": at_the_end(LOSS, "noise_share")},
    caution="The gate of reinforce is the constant 1, that of top-1 its probability. A byte's choice is credited with "
            "that byte's loss alone; the baseline is the mean loss of the other bytes of the batch. Reinforce draws "
            "while training and takes the best at validation. The balance loss teaches all routers but the frozen "
            "ones. The share of noise is the variance over batches of the gradient (of the policy loss for reinforce, "
            "else of the cross-entropy) over that variance plus the squared mean, at each router's own last weights. "
            "It is 1 too for a router that has nothing more to learn. Router entropy is at most ln 8 = 2.079.")
