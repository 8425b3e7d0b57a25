"""Experiments that look into trained models: what experts know, what changes a route, what a network would pay, and
text whose sources are known."""

import numpy as np

from ..study import measures
from ..study.experiment import Claim, Effect, Experiment, Setting, against, contrasts
from ..study.figures import add_legend, at_the_end, log_lines, over_steps, panel_grid, style_of
from ..study.quantities import LOSS, title
from ..training.data import SYNTHETIC
from ..training.synthetic import N_SOURCES, blind_rate, entropy_rate, sources

EXPERT_CHOICE = {"router": "expert_choice", "aux_coef": 0.0}
KNOWN = ("byte_excess", "class_information_excess", "position_information_excess", "mi_excess")
CHANGES = ("drop", "swap", "force")


def say_specialise(r):
    """What a table without any network knows of the domain."""
    return ["**Without any network.** A table of byte pairs, counted in the "
            f"training text, predicts the domain with {r.mean('bigram_information_excess', 'top-2'):.3f} nats."]


def counterfactual_tables(r):
    """Rise of the loss by expert and domain, last MoE layer, first seed: a row for each change, a column a setting."""
    names = ["top-1", "top-2", "expert-choice"]
    fig, grid = panel_grid(len(CHANGES), len(names), 5.0, sharex=True, sharey=True)
    for row, change in zip(grid, CHANGES):
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
    name="specialise", question="What do experts specialise in?", measure=measures.specialisation,
    settings=(Setting("top-1", "top-1, balance loss 0.01", model={"top_k": 1}),
              Setting("top-2", "top-2, balance loss 0.01"),
              Setting("expert-choice", "expert choice, 2 a byte", model=EXPERT_CHOICE),
              Setting("hash", "top-2 by a random table of the byte", model={"router": "hash"}),
              Setting("random", "2 at random", model={"router": "random"})),
    metrics=(LOSS, *KNOWN, "domain_given_byte", "weight_divergence", "function_divergence",
             *(f"{change}_cost" for change in CHANGES), "drop_spread"),
    exploratory=contrasts(("mi_excess",), (*against("random", ("top-1", "top-2", "hash")), ("top-2", "hash"))),
    say=say_specialise,
    figures={"information": at_the_end("byte_excess", "class_information_excess", "mi_excess", "domain_given_byte"),
             "counterfactuals": counterfactual_tables},
    caution="Random routing carries no information: its numbers show the error of one draw, the same in every seed. "
            "Hash routing shows the information of a random table of the byte. Position means eighths of the window. "
            "Function divergence is the mean of 1 - cosine over pairs of experts' outputs for the same bytes. A byte "
            "predicts its domain in part, so domain information above 0 does not prove topics; what is beyond the "
            "byte may come from the bytes before it. Information with the domain cannot exceed ln 4 = 1.39, with the "
            "byte ln(8 / K): 2.08 for top-1 and 1.39 for two experts a byte. Compare at equal K. The gate of a "
            "dropped expert is not given to the others, so its cost includes the missing share. Expert choice is "
            "routed over the batch here.",
    claims=(Claim(10, "Experts follow token identity more than topic: information with the byte is above that with the "
                      "domain", "Jiang 2024; Xue 2024",
                  tuple(Effect("byte_over_domain", name, ">", 0) for name in ("top-1", "top-2"))),))


batch = Experiment(
    name="batch", question="Does the output for a window depend on the other windows of its batch?",
    measure=measures.influence,
    settings=(Setting("dropless", "top-2, no limit"),
              Setting("capacity-order", "top-2, capacity factor 1, earlier bytes first",
                      model={"capacity_factor": 1.0}),
              Setting("capacity-gate", "top-2, capacity factor 1, larger gates first",
                      model={"capacity_factor": 1.0, "drop_policy": "gate"}),
              Setting("expert-choice", "expert choice, 2 a byte", model=EXPERT_CHOICE)),
    metrics=("mates_rerouted", "mates_logits", "later_rerouted", "later_logits", "val_cross_entropy", LOSS),
    exploratory=contrasts(("mates_rerouted",), [(name, "dropless") for name in (
        "capacity-order", "capacity-gate", "expert-choice")]),
    figures={"at_the_end": at_the_end("mates_rerouted", "later_rerouted", "mates_logits", "later_logits")},
    caution="All are routed as in training. The other windows of the batch, or the second half of a byte's own window, "
            "become random bytes, which route unlike text. A byte is rerouted where any layer routes it differently. A "
            "change of a logit below 1e-4 is rounding. Numbers are means over the 8 windows of a batch, each in its "
            "place. Dropping in order favours the first window.",
    claims=(Claim(7, "Expert choice leaks the future: a later byte changes an earlier byte's output; dropless top-K, "
                     "by its construction, does not", "Zhou 2022; Wang 2024",
                  (Effect("later_logits", "expert-choice", ">", 1e-4, every_run=True),
                   Effect("later_logits", "dropless", "<", 1e-4, every_run=True),
                   Effect("later_rerouted", "dropless", "<=", 0, every_run=True))),))


def by_devices(r):
    """Each number of the traffic against the number of devices."""
    fig, (axes_of,) = panel_grid(1, 4, 2.6)
    devices = [n for n in measures.DEVICES if f"sent_{n}" in r.runs[0].measured]
    for axes, number in zip(axes_of, ("sent", "reach", "slowest", "path")):
        lines = [([n * 1.04 ** (place - 2) for n in devices], [r.interval(f"{number}_{n}", name) for n in devices],
                  style_of(r, name)) for place, name in enumerate(r.groups)]
        log_lines(axes, lines, devices, "devices", title(f"{number}_4").removesuffix(", 4 devices"))
    add_legend(fig, r)
    return fig


GROUPS = {"router_options": {"n_groups": 4, "group_limit": 2}, "n_devices": 4, "max_devices": 2}
traffic = Experiment(
    name="traffic", question="How much network traffic do the experts cause?", model={"n_experts": 16, "top_k": 4},
    measure=measures.traffic,
    settings=(Setting("none", "top-4 of 16, no balance loss", model={"aux_coef": 0.0}, width=0.5),
              Setting("aux", "balance loss 0.01", width=0.5),
              Setting("capacity", "balance loss, capacity factor 1.25", model={"capacity_factor": 1.25}, width=0.5),
              Setting("groups", "balance loss, 2 of 4 groups", model=GROUPS, width=0.5),
              Setting("groups-balanced", "the same, with device and communication balance, 0.01 each",
                      model=GROUPS | {"losses": {"device": 0.01, "communication": 0.01}}, width=0.5)),
    metrics=("val_cross_entropy", LOSS, "reach_4", "sent_4", "link_4", "slowest_4", "path_4", "sent_16", "slowest_16",
             "path_16"),
    exploratory=contrasts(("sent_4", "slowest_4", "val_cross_entropy"),
                          against("aux", ("none", "capacity", "groups", "groups-balanced"))),
    figures={"by_devices": by_devices},
    caution="The traffic is simulated from the routing of validation batches in one layer, with devices of "
            f"{measures.BANDWIDTH / 1e9:g} GB/s and {measures.FLOPS / 1e9:g} GFLOP/s. Bytes are sent to other devices "
            "and back. A phase lasts until its busiest device is done, and nothing overlaps. Groups are laid on 4 "
            "devices and allow a byte to reach 2; on 16 each device has one expert.")


def say_known(r):
    """What the numbers are to be compared with."""
    blind = blind_rate() - entropy_rate(sources()[0].transitions())
    return [f"A model that ignores the source cannot get closer than {blind:.3f} nats to the entropy.",
            f"The source has {np.log(N_SOURCES):.3f} nats."]


MIXTURES = ["top-1", "top-2", "expert-choice", "hash"]
known = Experiment(
    name="known", question="Do experts separate sources that are known?", text=SYNTHETIC,
    settings=tuple(Setting(name, what, model=model, length=3) for name, what, model in (
        ("top-1", "top-1, balance loss 0.01", {"top_k": 1}), ("top-2", "top-2, balance loss 0.01", {}),
        ("expert-choice", "expert choice, 2 a byte", EXPERT_CHOICE),
        ("hash", "top-2 by a random table of the byte", {"router": "hash"}),
        ("dense", "no experts, layers as wide as one", {"moe_layers": ()}))),
    metrics=(LOSS, "excess", "mi_excess", "domain_given_byte", "byte_excess", "load_cv"),
    exploratory=contrasts(("excess", "mi_excess"), against("hash", ("top-1", "top-2"))) +
    contrasts(("excess",), (("top-2", "dense"),)), say=say_known,
    figures={"over_steps": over_steps("top-2", LOSS, "mi_excess", names=MIXTURES),
             "at_the_end": at_the_end("excess", "mi_excess", "domain_given_byte")},
    caution="The text is synthetic: four Markov sources in which every letter is equally frequent, so that a letter "
            "alone says nothing about its source. A model that must find the source out needs at most ln 4 nats more "
            "in a whole window than one that knows it. Runs are three times as long as those of other experiments. "
            "`top-1` and `dense` have fewer active parameters than the others; hash routing has constant gates.")
