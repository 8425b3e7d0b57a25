"""Experiments that look into trained models: what experts know, who depends on whom, what a network would pay, and text
whose truth is known."""

import numpy as np
from matplotlib.figure import Figure

from ..data import SYNTHETIC
from ..plots import DOUBLE
from ..rows import over_seeds
from . import measures
from .base import LOSS, Claim, Effect, Experiment, Setting, against, planned
from .figures import at_the_end, look, legend, over_steps

KNOWN = ("byte", "class", "position", "domain")


def say_specialise(r):
    parts = "; ".join(f"{name}: " + ", ".join(f"{label} {over_seeds(runs, f'{label}_information_excess').mean:.3f}" for label in KNOWN)
                      for name, runs in r.groups.items())
    return (f"Nats that the expert tells of a byte's value, class, position and domain, less the null: {parts}. A table of byte "
            f"pairs, without any network, tells {r.show('bigram_information_excess', 'top-2')} nats of the domain. "
            f"Random routing, whose information is 0 but for chance, gives the scale of the error. "
            f"Weight divergence: {r.show('weight_divergence')}; function divergence: {r.show('function_divergence')}. "
            f"Loss rises by {r.show('drop_cost')} nats where one expert is dropped, by {r.show('swap_cost')} where two are "
            f"swapped, by {r.show('force_cost')} where all bytes are forced to one; the rise for one dropped expert varies over the domains "
            f"with a standard deviation of {r.show('drop_spread')}. Domain information: {r.told_apart('domain_information_excess')}.")


def counterfactual_tables(r):
    """Rise of the loss by expert and domain, last layer, seed 0: a row for each change, a column for each setting."""
    names = [name for name in ("top-1", "top-2", "expert-choice") if name in r.groups]
    fig = Figure(figsize=(DOUBLE, 5.0), layout="constrained")
    panels = fig.subplots(3, len(names), squeeze=False, sharex=True, sharey=True)
    for row, change in zip(panels, ("drop", "swap", "force")):
        tables = [np.array(r.groups[name][0].measured[f"{change}_table"]).T for name in names]  # (domains, E)
        for axes, name, table in zip(row, names, tables):
            image = axes.imshow(table, aspect="auto", cmap="cividis", vmin=min(0, *(t.min() for t in tables)),
                                vmax=max(t.max() for t in tables))
            axes.set_title(f"{name}: {change}")
            axes.set_yticks(range(len(table)), r.runs[0].config["domains"])
            axes.grid(False)
        fig.colorbar(image, ax=row, label="+ nats a byte")
    for axes in panels[-1]:
        axes.set_xlabel("expert")
    return fig


specialise = Experiment(
    "specialise", "What do experts know?",
    (Setting("top-1", "top-1, balance loss 0.01", {"top_k": 1}), Setting("top-2", "top-2, balance loss 0.01"),
     Setting("expert-choice", "expert choice, 2 a byte", {"router": "expert_choice", "aux_coef": 0.0}),
     Setting("hash", "top-2 by a random table of the byte", {"router": "hash"}),
     Setting("random", "2 at random", {"router": "random"})),
    (LOSS, *(f"{name}_information_excess" for name in (*KNOWN, "bigram")), "weight_divergence", "function_divergence",
     "drop_cost", "swap_cost", "force_cost"),
    planned(("domain_information_excess",), (("top-1", "random"), ("top-2", "random"), ("hash", "random"), ("top-2", "hash"))),
    say_specialise, {"information": at_the_end(*(f"{name}_information_excess" for name in KNOWN)),
                     "counterfactuals": counterfactual_tables},
    "A byte gives its domain away in part, so domain information above 0 is no proof of topics: hash routing, which sees "
    "the byte alone, shows how much comes for free. Expert choice is routed over the batch here, as in training.",
    (Claim(10, "Experts follow token identity more than topic: information with the byte is above that with the domain",
           "Jiang 2024; Xue 2024",
           tuple(Effect(f"byte - domain, {name}", lambda of, name=name: of("byte_information_excess", name) -
                        of("domain_information_excess", name)) for name in ("top-1", "top-2"))),),
    measure=measures.specialisation)


def say_batch(r):
    rows = "; ".join(f"{name}: mates reroute {r.mean('mates_rerouted', name):.1%} of the bytes and change a logit by up to "
                     f"{r.mean('mates_logits', name):.1e}, later bytes {r.mean('later_rerouted', name):.1%} and {r.mean('later_logits', name):.1e}"
                     for name in r.groups)
    return (f"Other batch mates, and later bytes of the own sequence, as evaluated by the rule of training: {rows}. Below 1e-4 a "
            "change is rounding.")


batch = Experiment(
    "batch", "Does my output depend on my neighbours?",
    (Setting("dropless", "top-2, no limit"),
     Setting("capacity-order", "top-2, capacity factor 1, earlier bytes first", {"capacity_factor": 1.0}),
     Setting("capacity-gate", "top-2, capacity factor 1, larger gates first", {"capacity_factor": 1.0, "drop_policy": "gate"}),
     Setting("expert-choice", "expert choice, 2 a byte", {"router": "expert_choice", "aux_coef": 0.0})),
    ("mates_rerouted", "mates_logits", "later_rerouted", "later_logits", "val_cross_entropy", LOSS),
    planned(("mates_rerouted",), against("dropless", ("capacity-order", "capacity-gate", "expert-choice"))),
    say_batch, {"at_the_end": at_the_end("mates_rerouted", "later_rerouted", "mates_logits")},
    "Mates and later bytes are replaced by random bytes, which route unlike text.",
    (Claim(7, "Expert choice leaks the future: a later byte changes an earlier byte's output; dropless top-K does not",
           "Zhou 2022; Wang 2024",
           (Effect("change by later bytes, expert choice - 1e-4", lambda of: of("later_logits", "expert-choice") - 1e-4),
            Effect("1e-4 - change by later bytes, dropless", lambda of: 1e-4 - of("later_logits", "dropless")),
            Effect("-bytes rerouted by later bytes, dropless", lambda of: -of("later_rerouted", "dropless"), True))),),
    measure=measures.influence)

GROUPS = {"n_groups": 4, "group_limit": 2, "n_devices": 4, "max_devices": 2}


def say_traffic(r):
    return (f"On 4 devices a byte reaches {r.show('reach_4')} devices and sends {r.show('sent_4')} bytes to others and back; the "
            f"slowest device has {r.show('slowest_4')} times the mean load; a batch takes {r.show('path_4')} microseconds at "
            f"{measures.BANDWIDTH / 1e9:g} GB/s and {measures.FLOPS / 1e9:g} GFLOP/s. Sent: {r.told_apart('sent_4')}. "
            f"Loss: {r.told_apart(LOSS)}.")


def by_devices(r):
    """Each number of the traffic against the number of devices."""
    numbers = {"sent": "bytes sent a byte of text", "reach": "devices a byte reaches",
               "slowest": "slowest device / mean load", "path": "microseconds a batch"}
    fig = Figure(figsize=(DOUBLE, 2.6), layout="constrained")
    for axes, (number, label) in zip(fig.subplots(1, len(numbers)), numbers.items()):
        for name, runs in r.groups.items():
            devices = [n for n in measures.DEVICES if f"{number}_{n}" in runs[0].measured]
            axes.plot(devices, [over_seeds(runs, f"{number}_{n}").mean for n in devices], **look(r, name))
        axes.set(xlabel="devices", ylabel=label, xscale="log")
        axes.set_xticks(devices, devices, minor=False)
        axes.minorticks_off()
    legend(fig, r)
    return fig


traffic = Experiment(
    "traffic", "What does the network pay?",
    (Setting("none", "top-4 of 16, no balance loss", {"aux_coef": 0.0}, 0.5), Setting("aux", "balance loss 0.01", width=0.5),
     Setting("capacity", "balance loss, capacity factor 1.25", {"capacity_factor": 1.25}, 0.5),
     Setting("groups", "balance loss, 2 of 4 groups", GROUPS, 0.5),
     Setting("groups-balanced", "the same, with device and communication balance, 0.01 each",
             GROUPS | {"device_coef": 0.01, "communication_coef": 0.01}, 0.5)),
    (LOSS, "reach_4", "sent_4", "link_4", "slowest_4", "path_4", "sent_16", "slowest_16", "path_16"),
    planned(("sent_4", "slowest_4", LOSS), against("aux", ("none", "capacity", "groups", "groups-balanced"))),
    say_traffic, {"by_devices": by_devices},
    "Simulated from the routing of validation batches: a phase lasts until its busiest device is done, and nothing overlaps. "
    "Groups are laid on 4 devices; on 16 each device has one expert.",
    model={"n_experts": 16, "top_k": 4}, measure=measures.traffic)


def say_known(r):
    return (f"Loss above the entropy of the text: {r.show('excess')}. {r.differences('excess')}. Information between expert and true "
            f"source, less its null: {r.show('mi_excess')} nats of the {np.log(4):.3f} that there are; {r.told_apart('mi_excess')}. With "
            f"the letter: {r.show('byte_excess')}.")


known = Experiment(
    "known", "Do experts find a source that is known to be there?",
    (Setting("top-1", "top-1, balance loss 0.01", {"top_k": 1}), Setting("top-2", "top-2, balance loss 0.01"),
     Setting("expert-choice", "expert choice, 2 a byte", {"router": "expert_choice", "aux_coef": 0.0}),
     Setting("hash", "top-2 by a random table of the byte", {"router": "hash"}),
     Setting("dense", "no experts", {"moe_layers": ()})),
    (LOSS, "excess", "mi_excess", "byte_excess", "load_cv"),
    planned(("excess", "mi_excess"), (("top-1", "hash"), ("top-2", "hash"))) + (("excess", "top-2", "dense"),),
    say_known, {"over_steps": over_steps("causal_cross_entropy", "mi_excess", names=["top-1", "top-2", "expert-choice", "hash"]),
                "at_the_end": at_the_end("excess", "mi_excess", names=["top-1", "top-2", "expert-choice", "hash"])},
    "The text is synthetic: four Markov sources in which every letter is equally frequent, so that a letter alone says nothing of its "
    "source. A reader who knows the source pays the entropy; one who must find it out pays at most ln 4 nats more in a whole window.",
    text=SYNTHETIC)
