"""Experiments that look into trained models: what experts know, what changes a route, and what a network would pay."""

from textwrap import fill

import numpy as np
from matplotlib.colors import PowerNorm

from ..study import measures
from ..study.experiment import ALL_WINDOWS, CANDIDATES, Claim, Effect, Experiment, Primary, Setting, against, contrasts
from ..study.figures import add_legend, at_the_end, captioned, log_lines, of_seeds, panel_grid, style_of
from ..study.maps import over_column_means, ratio_bar, ratio_map
from ..study.quantities import LOSS, title
from ..study.statistics import Contrast
from ..study.wording import INTERVALS
from .balancing import EXPERT_CHOICE

KNOWN = ("byte_excess", "class_information_excess", "position_information_excess", "mi_excess")
CHANGES = {"drop": "not used", "swap": "swapped", "force": "used alone"}


def say_specialise(r):
    """What a table without any network knows of the domain."""
    return ["**Without any network.** A table of byte pairs, counted in the training text, guesses the domain "
            f"of a byte with {r.mean('bigram_information_excess', 'top-2'):.3f} nats of information on it. Beside it "
            "stands the column of domain information, not that beyond the byte."]


@captioned("By how much the loss of each domain (down) rises if the routes of the last MoE layer change for one expert "
           "(across), first seed of three of the settings: it is not used, it swaps its bytes with the next one, or "
           "it serves all bytes. Each row of panels has a scale of its own; colours follow the root of the rise above "
           "its lowest cell.")
def counterfactual_tables(r):
    """Rise of the loss by expert and domain, last MoE layer, first seed: a row for each change, a column a setting."""
    names = ["top-1", "top-2", "expert-choice"]
    fig, grid = panel_grid(len(CHANGES), len(names), 5.0, sharex=True, sharey=True)
    for row, (change, what) in zip(grid, CHANGES.items()):
        tables = [np.array(r.groups[name][0].measured[f"{change}_table"]).T for name in names]  # (domains, E)
        least, most = min(0, *(t.min() for t in tables)), max(t.max() for t in tables)
        for axes, table in zip(row, tables):
            image = axes.imshow(table, aspect="auto", cmap="cividis", norm=PowerNorm(0.5, least, most))
            axes.set_yticks(range(len(table)), r.runs[0].config["domains"])
            axes.grid(False)
        fig.colorbar(image, ax=row, label=f"{what}: rise (nats)")
    for axes, name in zip(grid[0], names):
        axes.set_title(name)
    fig.supxlabel("expert", fontsize="medium")
    return fig


@captioned("How often bytes of a class (down) use each expert (across), over how often all classes do, last MoE layer, "
           "first seed: white is as often, orange more, blue less, black below an eighth.")
def class_by_expert(r):
    """p(expert | class of the byte) / p(expert) in the last MoE layer; None for rows of before it was measured."""
    if any("class_table" not in runs[0].measured for runs in r.groups.values()):
        return None
    tables = np.array([runs[0].measured["class_table"] for runs in r.groups.values()])  # (settings, classes, E)
    there = np.flatnonzero(tables.sum(axis=(0, 2)))
    fig, grid = panel_grid(1, len(tables), 2.2, sharey=True)
    for axes, name, table in zip(grid[0], r.groups, tables):
        rows = dict(enumerate(measures.CLASSES[i] for i in there))
        ratio_map(axes, over_column_means(table[there]), np.arange(table.shape[1]), rows)
        axes.set_title(name)
    ratio_bar(fig, grid, "use by the class / by all")
    fig.supxlabel("expert", fontsize="medium")
    return fig


specialise = Experiment(
    name="specialise", question="What do experts specialise in?", measure=measures.specialisation,
    settings=(Setting("top-1", "top-1, balance loss 0.01", model={"top_k": 1}),
              Setting("top-2", "top-2, balance loss 0.01"),
              Setting("expert-choice", "expert choice, 2 a byte", model=EXPERT_CHOICE, rate_of="top-2"),
              Setting("hash", "top-2 by a hash of the byte", model={"router": "hash"}),
              Setting("random", "2 at random", model={"router": "random"}, rate_of="hash")),
    metrics=(LOSS, *KNOWN, "domain_given_byte", "weight_divergence", "function_divergence",
             *(f"{change}_cost" for change in CHANGES), "drop_spread"),
    primary=(Primary(
        question="Do experts carry information on the domain that the byte does not?", margin=0.01,
        contrast=Contrast("domain_given_byte", "top-2", minus="random"),
        lower="Beyond the byte, experts of top-2 carry less information on the domain than experts drawn at random.",
        higher="The experts of top-2 carry information on the domain that the byte does not.",
        same="The experts of top-2 carry less than 0.01 nats on the domain that the byte does not."),),
    exploratory=(*contrasts(("function_divergence",), against("random", ("top-1", "top-2", "hash"))),
                 *contrasts(("mi_excess", "domain_given_byte"), (("top-1", "random"), ("top-2", "hash")))),
    say=say_specialise, seeds=8, steps=1000, rates=CANDIDATES, training=ALL_WINDOWS,
    figures={"information": at_the_end("byte_excess", "class_information_excess", "mi_excess", "domain_given_byte"),
             "class_by_expert": class_by_expert, "counterfactuals": counterfactual_tables},
    caution="Random routing carries no information: its numbers show the error of one draw, the same in every seed. "
            "Hash routing shows the information of a random table of bytes. Position means eighths of the window. A "
            "byte predicts its domain in part, so domain information above 0 does not prove topics; what is beyond "
            "the byte may come from the bytes before it. Information cannot exceed the entropy of the label, nor ln(8 "
            "/ K): 2.08 for top-1 and 1.39 for two experts a byte. Compare at equal K. The gate of a dropped expert "
            "is not given to the others, so its cost includes the missing share. Expert choice is routed over the "
            "batch here.",
    claims=(Claim(10, "Experts follow token identity more than topic: of what could be known, they tell a larger share "
                      "of the byte, given its domain, than of the domain, given the byte", "Jiang 2024; Xue 2024",
                  tuple(Effect("known_gap", name, ">", 0) for name in ("top-1", "top-2"))),))


batch = Experiment(
    name="batch", question="Does the output for a window depend on the other windows of its batch?",
    measure=measures.influence,
    settings=(Setting("dropless", "top-2, no limit"),
              Setting("capacity-order", "top-2, capacity factor 1, earlier bytes first", rate_of="dropless",
                      model={"capacity_factor": 1.0}),
              Setting("capacity-gate", "top-2, capacity factor 1, larger gates first", rate_of="dropless",
                      model={"capacity_factor": 1.0, "drop_policy": "gate"}),
              Setting("expert-choice", "expert choice, 2 a byte", model=EXPERT_CHOICE, rate_of="dropless")),
    metrics=("mates_rerouted", "mates_logits", "later_rerouted", "later_logits", "val_cross_entropy", LOSS),
    primary=(Primary(
        question="Does expert choice reroute more bytes than a capacity limit when the neighbours change?", margin=0.01,
        contrast=Contrast("mates_rerouted", "expert-choice", minus="capacity-order"),
        lower="When neighbours become random bytes, expert choice reroutes fewer bytes than a capacity factor of 1.",
        higher="When neighbours become random bytes, expert choice reroutes more bytes than a capacity factor of 1.",
        same="When neighbours become random bytes, expert choice reroutes as many bytes as a capacity factor of 1."),),
    exploratory=contrasts(("mates_rerouted",), [(name, "dropless") for name in (
        "capacity-order", "capacity-gate", "expert-choice")]),
    seeds=6, steps=1000, rates=CANDIDATES, training=ALL_WINDOWS,
    figures={"at_the_end": at_the_end("mates_rerouted", "later_rerouted", "mates_logits", "later_logits")},
    caution="All are routed as in training. The other windows of the batch, or the second half of a byte's own window, "
            "become random bytes, which route unlike text. A byte is rerouted where any layer routes it differently. A "
            "change of a logit below 1e-4 is rounding. Numbers are means over the 8 windows of a batch, each in its "
            "place. Dropping in order favours the first window, and a byte's first choice over all second ones: so a "
            "later byte can take the place of an earlier one.")


@captioned(lambda r: f"The simulated traffic of one layer by the number of devices{of_seeds(r, INTERVALS)}. Points are "
                     "moved apart sideways.")
def by_devices(r):
    """Each number of the traffic against the number of devices."""
    fig, (axes_of,) = panel_grid(1, 4, 2.6)
    devices = [n for n in measures.DEVICES if f"sent_{n}" in r.runs[0].measured]
    for axes, number in zip(axes_of, ("sent", "reach", "slowest", "path")):
        lines = [(devices, [r.interval(f"{number}_{n}", name) for n in devices], style_of(r.experiment, name))
                 for name in r.groups]
        log_lines(axes, lines, devices, x_label="devices",
                  y_label=fill(title(f"{number}_4").removesuffix(", 4 devices"), 24))
    add_legend(fig, r, r.groups)
    return fig


GROUPS = {"router_options": {"n_groups": 4, "group_limit": 2}, "n_devices": 4, "max_devices": 2}
traffic = Experiment(
    name="traffic", question="How much network traffic do the experts cause?", model={"n_experts": 16, "top_k": 4},
    measure=measures.traffic,
    settings=(Setting("none", "top-4 of 16, no balance loss", model={"aux_coef": 0.0}, width=0.5, rate_of="aux"),
              Setting("aux", "balance loss 0.01", width=0.5),
              Setting("capacity", "balance loss, capacity factor 1.25", model={"capacity_factor": 1.25}, width=0.5,
                      rate_of="aux"),
              Setting("groups", "balance loss, 2 of 4 groups", model=GROUPS, width=0.5, rate_of="aux"),
              Setting("groups-balanced", "the same, with device and communication balance, 0.01 each",
                      model=GROUPS | {"losses": {"device": 0.01, "communication": 0.01}}, width=0.5, rate_of="aux")),
    metrics=("val_cross_entropy", LOSS, "reach_4", "sent_4", "link_4", "slowest_4", "path_4", "sent_16", "slowest_16",
             "path_16"),
    primary=(Primary(
        question="Does a limit of 2 of 4 groups cost loss?", contrast=Contrast(LOSS, "groups-balanced", minus="aux"),
        lower="A limit on groups lowers the loss.", higher="A limit on groups raises the loss.",
        same="A limit on groups costs less than 0.01 nats.", published="little, from 3 of 8 groups on: DeepSeek-V2"),),
    exploratory=contrasts(("sent_4", "slowest_4", "val_cross_entropy"),
                          against("aux", ("none", "capacity", "groups", "groups-balanced"))),
    seeds=6, steps=1000, rates=CANDIDATES, training=ALL_WINDOWS,
    figures={"by_devices": by_devices, "at_the_end": at_the_end(LOSS, "sent_4", "slowest_4", reference="aux")},
    caution="The traffic is simulated from the routing of validation batches in one layer, with devices of "
            f"{measures.BANDWIDTH / 1e9:g} GB/s and {measures.FLOPS / 1e9:g} GFLOP/s. Bytes are sent to other devices "
            "and back, in the forward pass, 4 for each number of a state; numbers are means over both MoE layers. "
            "With a capacity limit the first choices of all bytes go before second ones, which is leaky. "
            "`groups-balanced` differs from `aux` by two more losses too, `groups` by the limit alone. A phase lasts "
            "until its busiest device is done, and nothing overlaps. Groups are laid on 4 devices and allow a byte to "
            "reach 2; on 16 each device has one expert.")
