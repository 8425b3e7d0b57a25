"""Experiments that look into trained models: what experts know, who depends on whom, what a network would pay, and
text whose truth is known."""

import numpy as np
from matplotlib.figure import Figure

from ..training.data import SYNTHETIC
from ..study.figures import DOUBLE
from ..study.results import over_seeds
from ..training.synthetic import N_SOURCES, blind_rate, entropy_rate, sources
from ..study import measures
from ..study.experiment import LOSS, Claim, Effect, Experiment, Setting, against, planned
from ..study.experiment_figures import at_the_end, legend, look, over_steps

EXPERT_CHOICE = {"router": "expert_choice", "aux_coef": 0.0}
KNOWN = ["byte_excess", "class_information_excess", "position_information_excess", "mi_excess"]
CHANGES = ("drop", "swap", "force")


def say_specialise(r):
    """Information with each label, divergence, counterfactuals."""
    told = "; ".join(f"`{name}` " + ", ".join(f"{round(r.mean(label, name), 3) + 0.0:.3f}" for label in KNOWN)
                     for name in r.groups)
    return ["Nats that the expert tells of a byte's value, its class, its position and its domain, each less its null: "
            f"{told}. Random routing tells nothing, so its numbers show the error of independent draws.",
            "For comparison, the likeliest domain by a table of byte pairs, counted in the training text without any "
            f"network, tells {r.mean('bigram_information_excess', 'top-2'):.3f} nats of the domain.",
            f"Domain information: {r.differences('mi_excess')}. Beyond what the byte itself tells: "
            f"{r.show('domain_given_byte')}.",
            f"Weight divergence: {r.show('weight_divergence')}; function divergence: {r.show('function_divergence')}.",
            f"Loss rises by {r.show('drop_cost')} nats where one expert is dropped, by {r.show('swap_cost')} where two "
            f"are swapped, by {r.show('force_cost')} where all bytes are forced to one.",
            "The cost of one dropped expert varies over the domains with a standard deviation of "
            f"{r.show('drop_spread')} nats."]


def counterfactual_tables(r):
    """Rise of the loss by expert and domain, last MoE layer, first seed: a row for each change, a column a setting."""
    names = ["top-1", "top-2", "expert-choice"]
    fig = Figure(figsize=(DOUBLE, 5.0), layout="constrained")
    panels = fig.subplots(len(CHANGES), len(names), squeeze=False, sharex=True, sharey=True)
    for row, change in zip(panels, CHANGES):
        tables = [np.array(r.groups[name][0].measured[f"{change}_table"]).T for name in names]  # (domains, E)
        least, most = min(0, *(t.min() for t in tables)), max(t.max() for t in tables)
        for axes, name, table in zip(row, names, tables):
            image = axes.imshow(table, aspect="auto", cmap="cividis", vmin=least, vmax=most)
            axes.set_title(f"{name}: {change}")
            axes.set_yticks(range(len(table)), r.runs[0].config["domains"])
            axes.grid(False)
        fig.colorbar(image, ax=row, label="+ nats a byte")
    fig.supxlabel("expert of the last MoE layer, first seed", fontsize="medium")
    return fig


specialise = Experiment(
    "specialise", "What do experts know?",
    (Setting("top-1", "top-1, balance loss 0.01", {"top_k": 1}), Setting("top-2", "top-2, balance loss 0.01"),
     Setting("expert-choice", "expert choice, 2 a byte", EXPERT_CHOICE),
     Setting("hash", "top-2 by a random table of the byte", {"router": "hash"}),
     Setting("random", "2 at random", {"router": "random"})),
    (LOSS, *KNOWN, "domain_given_byte", "weight_divergence", "function_divergence",
     *(f"{change}_cost" for change in CHANGES)),
    planned(("mi_excess",),
            (("top-1", "random"), ("top-2", "random"), ("hash", "random"), ("top-2", "hash"))),
    say_specialise, {"information": at_the_end("byte_excess", "class_information_excess", "mi_excess",
                                               "domain_given_byte"),
                     "counterfactuals": counterfactual_tables},
    "Position: eighths of the window. Function divergence: mean pairwise 1 - cosine of the experts' outputs on the "
    "same bytes. A byte gives its domain away in part, so domain information above 0 is no proof of topics; what is "
    "beyond the byte may come from the bytes before it. Hash routing shows what a random table of the byte tells; a "
    "table that is learned could tell more, up to what the byte itself does. Information with the domain cannot exceed "
    "the log of their number (ln 4 = 1.39), with the byte ln(8 / K), 2.08 for top-1 and 1.39 for two experts a byte: "
    "compare at equal K. A dropped expert's gate is not given to the others, so its cost is of the missing share too. "
    "Expert choice is routed over the batch here, as in training.",
    (Claim(10, "Experts follow token identity more than topic: information with the byte is above that with the domain",
           "Jiang 2024; Xue 2024",
           tuple(Effect("byte_over_domain", name, ">", 0) for name in ("top-1", "top-2"))),),
    measure=measures.specialisation)


def say_batch(r):
    """Who changes what."""
    def of(name, who):
        return (f"{r.mean(f'{who}_rerouted', name):.1%} of the bytes rerouted, largest change of a logit "
                f"{r.mean(f'{who}_logits', name):.2g}")

    return [f"`{name}`: by other batch mates {of(name, 'mates')}; by later bytes {of(name, 'later')}."
            for name in r.groups] + [
                "All routed as in training. A byte is rerouted where any layer routes it otherwise; below 1e-4 a "
                "change of a logit is rounding."]


batch = Experiment(
    "batch", "Does my output depend on my neighbours?",
    (Setting("dropless", "top-2, no limit"),
     Setting("capacity-order", "top-2, capacity factor 1, earlier bytes first", {"capacity_factor": 1.0}),
     Setting("capacity-gate", "top-2, capacity factor 1, larger gates first",
             {"capacity_factor": 1.0, "drop_policy": "gate"}),
     Setting("expert-choice", "expert choice, 2 a byte", EXPERT_CHOICE)),
    ("mates_rerouted", "mates_logits", "later_rerouted", "later_logits", "val_cross_entropy", LOSS),
    planned(("mates_rerouted",), against("dropless", ("capacity-order", "capacity-gate", "expert-choice"))),
    say_batch, {"at_the_end": at_the_end("mates_rerouted", "later_rerouted", "mates_logits", "later_logits")},
    "Mates, or the second half of its own window, are replaced by random bytes, which route unlike text. Means over "
    "the 8 windows of a batch, each in its place: dropping in order spares the first.",
    (Claim(7, "Expert choice leaks the future: a later byte changes an earlier byte's output; dropless top-K, by its "
              "construction, does not",
           "Zhou 2022; Wang 2024",
           (Effect("later_logits", "expert-choice", ">", 1e-4, every_run=True),
            Effect("later_logits", "dropless", "<", 1e-4, every_run=True),
            Effect("later_rerouted", "dropless", "<=", 0, every_run=True))),),
    measure=measures.influence)


def say_traffic(r):
    """Four devices in numbers."""
    return ["In one layer, on 4 devices: devices that a byte of text reaches, where groups allow at most 2: "
            f"{r.show('reach_4')}.",
            f"Bytes sent to other devices and back for a byte of text: {r.show('sent_4')}; {r.differences('sent_4')}.",
            f"Load of the slowest device, in units of the mean: {r.show('slowest_4')}; {r.differences('slowest_4')}.",
            f"Microseconds that the layer takes for a batch at {measures.BANDWIDTH / 1e9:g} GB/s and "
            f"{measures.FLOPS / 1e9:g} GFLOP/s: {r.show('path_4')}.",
            "Loss, routed as in training: " + r.differences("val_cross_entropy") + "."]


def by_devices(r):
    """Each number of the traffic against the number of devices."""
    numbers = {"sent": "bytes sent a byte of text", "reach": "devices a byte reaches",
               "slowest": "slowest device / mean load", "path": "microseconds a batch and layer"}
    fig = Figure(figsize=(DOUBLE, 2.6), layout="constrained")
    for axes, (number, label) in zip(fig.subplots(1, len(numbers)), numbers.items()):
        for place, (name, runs) in enumerate(r.groups.items()):
            devices = [n for n in measures.DEVICES if f"{number}_{n}" in runs[0].measured]
            found = [over_seeds(runs, f"{number}_{n}") for n in devices]
            axes.errorbar([n * 1.04 ** (place - 2) for n in devices], [one.mean for one in found],
                          yerr=np.nan_to_num([one.half for one in found]), elinewidth=0.8, **look(r, name))
        axes.set(xlabel="devices", ylabel=label, xscale="log")
        axes.set_xticks(devices, devices, minor=False)
        axes.minorticks_off()
    legend(fig, r)
    return fig


GROUPS = {"router_options": {"n_groups": 4, "group_limit": 2}, "n_devices": 4, "max_devices": 2}
traffic = Experiment(
    "traffic", "What does the network pay?",
    (Setting("none", "top-4 of 16, no balance loss", {"aux_coef": 0.0}, 0.5),
     Setting("aux", "balance loss 0.01", width=0.5),
     Setting("capacity", "balance loss, capacity factor 1.25", {"capacity_factor": 1.25}, 0.5),
     Setting("groups", "balance loss, 2 of 4 groups", GROUPS, 0.5),
     Setting("groups-balanced", "the same, with device and communication balance, 0.01 each",
             GROUPS | {"losses": {"device": 0.01, "communication": 0.01}}, 0.5)),
    ("val_cross_entropy", LOSS, "reach_4", "sent_4", "link_4", "slowest_4", "path_4", "sent_16", "slowest_16",
     "path_16"),
    planned(("sent_4", "slowest_4", "val_cross_entropy"),
            against("aux", ("none", "capacity", "groups", "groups-balanced"))),
    say_traffic, {"by_devices": by_devices},
    "Simulated from the routing of validation batches: a phase lasts until its busiest device is done, and nothing "
    "overlaps. Groups are laid on 4 devices; on 16 each device has one expert.",
    model={"n_experts": 16, "top_k": 4}, measure=measures.traffic)


def say_known(r):
    """The floor, and who finds the source."""
    blind = blind_rate() - entropy_rate(sources()[0].transitions())
    return [f"Loss above the entropy of the text: {r.show('excess')}; of the best reader who knows the letter before "
            f"and never the source: {blind:.3f}. {r.differences('excess')}.",
            f"Of the {np.log(N_SOURCES):.3f} nats that the source has, the expert tells, less its null: "
            f"{r.show('mi_excess')}; {r.differences('mi_excess')}.",
            f"Of the source to one who knows the letter: {r.show('domain_given_byte')}.",
            f"Of the letter, in nats: {r.show('byte_excess')}."]


MIXTURES = ["top-1", "top-2", "expert-choice", "hash"]
known = Experiment(
    "known", "Do experts find a source that is known to be there?",
    tuple(Setting(name, what, model, length=3) for name, what, model in (
        ("top-1", "top-1, balance loss 0.01", {"top_k": 1}), ("top-2", "top-2, balance loss 0.01", {}),
        ("expert-choice", "expert choice, 2 a byte", EXPERT_CHOICE),
        ("hash", "top-2 by a random table of the byte", {"router": "hash"}),
        ("dense", "no experts, layers as wide as one", {"moe_layers": ()}))),
    (LOSS, "excess", "mi_excess", "domain_given_byte", "byte_excess", "load_cv"),
    planned(("excess", "mi_excess"), (("top-1", "hash"), ("top-2", "hash"))) + (("excess", "top-2", "dense"),),
    say_known, {"over_steps": over_steps("top-2", "causal_cross_entropy", "mi_excess", names=MIXTURES),
                "at_the_end": at_the_end("excess", "mi_excess", "domain_given_byte")},
    "The text is synthetic: four Markov sources in which every letter is equally frequent, so that a letter alone says "
    "nothing of its source. A reader who knows the source pays the entropy; one who must find it out pays at most ln 4 "
    "nats more in a whole window. Runs are three times as long as those of other experiments. `top-1` and `dense` have "
    "fewer active parameters than the others; hash routing has constant gates.",
    text=SYNTHETIC, measure=measures.beyond_the_byte)
