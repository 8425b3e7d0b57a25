"""Experiments on how experts are chosen: learned or not, for tokens or sequences, at which learning rate, by trial."""

from itertools import combinations

from scipy.stats import kendalltau

from ..study.results import TOKEN_BYTES
from ..study.runner import CONFIGS
from ..study import measures
from ..study.experiment import LOSS, Claim, Dispute, Effect, Experiment, Setting, against, planned
from ..study.experiment_figures import at_the_end, lines_by, over_steps


def say_frozen(r):
    """Perplexity, of a byte and of about a token, against learned routing's, and the loss."""
    def worse(metric):
        learned = r.mean(metric, "learned")
        return ", ".join(f"`{name}` {r.mean(metric, name) / learned - 1:+.1%}"
                         for name in r.groups if name != "learned")

    return [f"Perplexity a byte: {r.show('causal_perplexity')}.",
            f"Against learned routing: {worse('causal_perplexity')}; over {TOKEN_BYTES} bytes: "
            f"{worse('token_perplexity')}.",
            f"Loss: {r.differences(LOSS)}."]


frozen = Experiment(
    "frozen", "Must a router learn?",
    (Setting("learned", "top-2"), Setting("frozen", "top-2 with the first weights for ever", {"router": "frozen"}),
     Setting("random", "drawn afresh for each byte and step", {"router": "random"}),
     Setting("shuffled", "top-2, the choices dealt out to other bytes: the same counts", {"router": "shuffled"}),
     Setting("hash", "by a random table of the byte", {"router": "hash"})),
    (LOSS, "causal_perplexity", "load_cv", "mi_excess", "byte_excess"),
    planned((LOSS,), against("learned", ("frozen", "random", "shuffled", "hash"))),
    say_frozen, {"at_the_end": at_the_end("causal_perplexity", "load_cv", "byte_excess"),
                 "over_steps": over_steps("learned", "causal_cross_entropy")},
    "Gates of random and hash routing are the constant 1/2; those of the others follow the router. The balance loss is "
    "on for all; under a frozen router it moves the hidden states. A random or shuffled route is drawn again at "
    "validation, where a shuffled byte takes the choice of an earlier byte of its own window, or its own; the choices "
    "are those of its own router, which need not be as even as learned routing's. Papers count perplexity by tokens of "
    f"about {TOKEN_BYTES} bytes, and the claims are judged so: a ratio by the byte is the fourth root of that.",
    (Claim(3, f"A frozen router comes within 10% of a learned one in perplexity over {TOKEN_BYTES} bytes; routing "
              "drawn afresh is over 10% worse", "Fan 2024 (2402.13089), by tokens: +0.2% and about +19%",
           (Effect("token_perplexity", "frozen", "<=", 1.1, over="learned"),
            Effect("token_perplexity", "random", ">", 1.1, over="learned"))),
     Claim(4, "Balance alone is not enough: the same counts, shuffled, lose 10% or more in perplexity over "
              f"{TOKEN_BYTES} bytes", "Fan 2024",
           (Effect("token_perplexity", "shuffled", ">=", 1.1, over="learned"),))),
    (Dispute("Does routing by a hash beat a learned router?", "yes: Roller 2021; no: Clark 2022",
             (("hash", "learned"),)),))


UNITS = {"token": ("each byte", {}), "layer": ("each prefix, in each layer", {"router": "sequence"}),
         "global": ("each prefix, once for all layers", {"router": "sequence", "router_options": {"sequence_scope": "global"}})}


def say_unit(r):
    """Loss, topic and syntax."""
    return [f"Perplexity: {r.show('causal_perplexity')}. Loss: {r.differences(LOSS)}.",
            f"Topic, as domain information: {r.show('mi_excess')}; {r.told_apart('mi_excess')}.",
            f"Byte identity, as byte information: {r.show('byte_excess')}; {r.told_apart('byte_excess')}."]


unit = Experiment(
    "unit", "Route tokens or sequences?",
    tuple(Setting(f"{name}-K{k}", f"{what}, top-{k}", fields | {"top_k": k})
          for k in (1, 2) for name, (what, fields) in UNITS.items()),
    (LOSS, "causal_perplexity", "mi_excess", "byte_excess", "repetition", "load_cv"),
    planned((LOSS, "mi_excess", "byte_excess"),
            [pair for k in (1, 2) for pair in against(f"token-K{k}", (f"layer-K{k}", f"global-K{k}"))]),
    say_unit, {"at_the_end": at_the_end("causal_perplexity", "mi_excess", "byte_excess")},
    "Sequences are routed on the mean of the prefix so far, which keeps the model causal and lets the route change "
    "within a window; Fan et al. pool the whole sequence.",
    (Claim(8, "Routing tokens beats routing sequences at equal K",
           "Fan 2024, table 1, perplexity by tokens: 9.9 against 10.7 and 11.6",
           tuple(Effect(LOSS, f"{name}-K{k}", ">", 0, minus=f"token-K{k}")
                 for k in (1, 2) for name in ("layer", "global"))),))


RATES = (5e-4, 1e-3, 2e-3)


def say_rate(r):
    """The ranking at each rate, and how alike the rankings are."""
    orders = {rate: [name[0] for name in r.ranked(LOSS) if name.endswith(f"-{rate:g}")] for rate in RATES}
    places = {rate: [order.index(c) for c in CONFIGS] for rate, order in orders.items()}
    alike = ", ".join(f"{a:g} and {b:g}: {kendalltau(places[a], places[b])[0]:+.2f}" for a, b in combinations(RATES, 2))
    best = ", ".join(f"{c} {min(RATES, key=lambda rate: r.mean(LOSS, f'{c}-{rate:g}')):g}" for c in CONFIGS)
    faster = ", ".join(f"{c} {r.mean(LOSS, f'{c}-{RATES[-1]:g}') - r.mean(LOSS, f'{c}-{RATES[1]:g}'):+.3f}"
                       for c in CONFIGS)
    ranking = "; ".join(f"at {rate:g}: {', '.join(order)}" for rate, order in orders.items())
    return [f"From the lowest mean loss to the highest, {ranking}.",
            f"Kendall's tau between these rankings (1: the same, -1: reversed), {alike}.",
            f"The best of the three rates: {best}. Mean loss at {RATES[-1]:g} less that at {RATES[1]:g}: {faster}.",
            f"Loss: {r.differences(LOSS)}."]


rate = Experiment(
    "rate", "Does the ranking of the routers survive another learning rate?",
    tuple(Setting(f"{c.id}-{rate:g}", f"{c.router}, K = {c.top_k}, aux {c.aux_coef:g}, peak rate {rate:g}",
                  c.model, training={"learning_rate": rate})
          for c in CONFIGS.values() for rate in RATES),
    (LOSS, "causal_perplexity", "load_cv"),
    planned((LOSS,), [(f"{first}-{rate:g}", f"D-{rate:g}") for rate in RATES for first in "BEF"]),
    say_rate, {"by_rate": lines_by({c: [f"{c}-{rate:g}" for rate in RATES] for c in CONFIGS},
                                   lambda name: float(name.split("-", 1)[1]), "peak learning rate", LOSS, "load_cv")},
    "A ranking of means ignores their intervals: neighbours in it need not differ. Where the largest of the rates is "
    "the best, a larger one may be better still.")


def say_reinforce(r):
    """Loss, and how noisy a lesson is."""
    learned = [name for name in r.groups if not name.startswith("frozen")]
    return [f"Loss: {r.show(LOSS)}. {r.differences(LOSS)}.",
            "Share of noise in the gradient that one batch gives a router (variance over batches / (variance + squared "
            f"mean)), each at its own weights at the end: {r.show('noise_share', *learned)}.",
            f"Load CV: {r.show('load_cv')}; router entropy, of at most ln 8 = 2.079 nats: {r.show('router_entropy')}."]


reinforce = Experiment(
    "reinforce", "Can policy gradients train a router?",
    (Setting("top-k", "top-1, learned through its gate"),
     Setting("reinforce", "a draw, learned by REINFORCE with a baseline", {"router": "reinforce"}),
     Setting("reinforce-0.1", "the same, policy coefficient 0.1", {"router": "reinforce", "losses": {"policy": 0.1}}),
     Setting("frozen-draw", "a draw, by the first weights for ever",
             {"router": "reinforce", "losses": {"policy": 0.0}, "freeze": ("router",)}),
     Setting("frozen", "top-1 with the first weights for ever", {"router": "frozen"})),
    (LOSS, "causal_perplexity", "load_cv", "router_entropy", "byte_excess", "noise_share"),
    planned((LOSS,), (("reinforce", "frozen-draw"), ("reinforce-0.1", "frozen-draw"), ("reinforce", "top-k"),
                      ("frozen", "top-k"), ("frozen-draw", "frozen"))),
    say_reinforce, {"over_steps": over_steps("top-k", "causal_cross_entropy", "load_cv", "router_entropy"),
                    "at_the_end": at_the_end(LOSS, "noise_share")},
    "The gate of reinforce is the constant 1, that of top-1 its probability: they differ in that too. A byte's choice "
    "is credited with that byte's loss alone; the baseline is the mean loss of the other bytes of the batch. Reinforce "
    "draws while training and takes the best at validation. The balance loss teaches all routers but the frozen ones. "
    "The gradient is of the cross-entropy for top-k and of the policy loss for reinforce. A router that has nothing "
    "more to learn has a share of noise of 1 too, and so has one whose squared mean gradient is estimated below 0.",
    model={"top_k": 1}, measure=measures.gradient_noise)
