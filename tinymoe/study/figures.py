"""The figures of a study, drawn from its result rows alone.

Every config keeps one colour (Okabe and Ito's palette, safe for colour-blind readers) and one marker, so that
the figures also read in grey. A line is the mean over seeds and its band their range; a dashed line and a hollow
mark are leaky: measured with a route that may see later tokens. No pyplot, no global state.
"""

import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ..files import write_whole
from .results import coefficient_sweep, complete_runs, measure, over_seeds

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
STYLE = {
    "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.5, "axes.axisbelow": True,
    "lines.linewidth": 1.2, "lines.markersize": 3.5, "savefig.dpi": 200,
}
SINGLE, DOUBLE = 3.4, 7.0  # widths of one and of two columns, in inches
SHARE = PowerNorm(0.5, vmin=0.0, vmax=1.0)  # colours of a share, stretched where the small shares are
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def look(name):
    """Colour and marker of a config, by the letter of its id: the same in every figure of every study."""
    place = ord(name[0]) - ord("A")
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def draw_curve(axes, groups, name, number, layer=None, start=0, **style):
    """Mean over seeds as a line with markers, the seeds' range as a band, at the steps that all seeds logged."""
    series = [{row["step"]: measure(row, number, layer) for row in run.log} for run in groups[name]]
    steps = [step for step in sorted(set.intersection(*map(set, series))) if step >= start]
    values = np.array([[one[step] for step in steps] for one in series])  # (seeds, steps)
    every = max(len(groups), len(steps) // 8)
    offset = list(groups).index(name) % max(1, len(steps))  # so that markers of close curves do not hide each other
    axes.plot(steps, values.mean(axis=0), markevery=(offset, every), **look(name), **style)
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=look(name)["color"], alpha=0.18, lw=0)


def add_legend(fig, groups, *extra):
    """One legend below the panels, where it can cover no data; `extra` are handles after those of the configs."""
    handles = [Line2D([], [], label=runs[0].label, **look(name)) for name, runs in groups.items()]
    fig.legend(handles=[*handles, *extra], loc="outside lower center", ncols=3)


def panel_grid(groups, n_rows, height, sharey):
    """Figure and panels (n_rows, MoE layers), the layers named above the first row."""
    layers = max((runs[0].final["layers"] for runs in groups.values()), key=len)
    fig = Figure(figsize=(DOUBLE, 1.0 + height * n_rows), layout="constrained")
    panels = fig.subplots(n_rows, len(layers), squeeze=False, sharex=True, sharey=sharey)
    for axes, layer in zip(panels[0], layers):
        axes.set_title(f"layer {layer['layer']}")
    return fig, panels


def heatmaps(groups, share_of, bar_label, axis_label):
    """Shares as colours, for the first run of each config (down) and its MoE layers (across).

    share_of(run, index of the layer) -> (x of the columns, share (rows, columns), names of some rows, title).
    """
    fig, panels = panel_grid(groups, len(groups), 0.95, sharey=False)
    for row, runs in zip(panels, groups.values()):
        row[0].set_ylabel(runs[0].run_id.replace("-", "\n"), rotation=0, ha="right", va="center", fontweight="bold")
        for place, axes in enumerate(row[: len(runs[0].final["layers"])]):
            x, share, names, title = share_of(runs[0], place)
            axes.pcolormesh(x, np.arange(len(share)), share, shading="nearest", norm=SHARE, cmap="inferno")
            axes.set_yticks(list(names), names.values() if place == 0 else [""] * len(names))
            axes.set_title(title, fontsize=7, pad=2)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.grid(False)
    fair = 1 / len(runs[0].final["layers"][0]["load"])
    bar = fig.colorbar(ScalarMappable(SHARE, "inferno"), ax=panels, aspect=40, pad=0.01, label=bar_label)
    bar.set_ticks([0, fair, 0.25, 0.5, 1], labels=["0", f"fair {fair:.3g}", "0.25", "0.5", "1"], minor=False)
    bar.ax.minorticks_off()
    fig.supxlabel(axis_label, fontsize=8)
    return fig


def perplexity_over_steps(groups):
    """Validation perplexity: the whole run, and its last third enlarged."""
    fig = Figure(figsize=(DOUBLE, 3.0), layout="constrained")
    whole, end = fig.subplots(1, 2)
    last = max((row["step"] for runs in groups.values() for run in runs for row in run.log), default=0)
    for name, runs in groups.items():
        for axes, start in ((whole, 0), (end, last * 2 / 3)):
            draw_curve(axes, groups, name, "causal_perplexity", start=start)
            if runs[0].leaky:
                draw_curve(axes, groups, name, "val_perplexity", start=start, linestyle="--", markerfacecolor="white")
    whole.set(xlabel="training step", ylabel="validation perplexity (per byte)", yscale="log")
    whole.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    whole.yaxis.set_major_formatter(PLAIN)
    whole.yaxis.set_minor_locator(NullLocator())
    end.set(xlabel="training step", ylabel="the same, last third")
    add_legend(fig, groups, Line2D([], [], color="#555555", linestyle="--", marker="o", markerfacecolor="white",
                                   label="hollow: leaky (route sees later bytes)"))
    return fig


def final_perplexity(groups):
    """Final perplexity: mean and 95% interval over seeds, every seed a small mark."""
    fig = Figure(figsize=(SINGLE, 0.8 + 0.34 * len(groups)), layout="constrained")
    axes = fig.subplots()
    for place, (name, runs) in enumerate(groups.items()):
        causal, leaky = ("causal_perplexity", place, {}), ("val_perplexity", place + 0.3, {"mfc": "white"})
        for number, y, face in (causal, leaky) if runs[0].leaky else (causal,):
            interval, colour = over_seeds(runs, number), look(name)["color"]
            axes.plot([interval.low, interval.high], [y, y], color=colour, lw=1.5)
            axes.plot([measure(run.final, number) for run in runs], [y - 0.17] * len(runs), "|", color=colour, ms=4)
            axes.plot(interval.mean, y, linestyle="none", markersize=5, **look(name), **face)
    axes.set_yticks(range(len(groups)), [runs[0].label for runs in groups.values()])
    axes.set(ylim=(len(groups) - 0.4, -0.5), xlabel="final perplexity (per byte)")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    fig.supxlabel("filled: causal; hollow: leaky; bar: 95% over seeds, if several", fontsize=7)
    bits = axes.secondary_xaxis("top", functions=(lambda x: np.log2(np.maximum(x, 1e-9)), np.exp2))
    bits.set_xlabel("bits per byte")
    bits.xaxis.set_major_locator(MaxNLocator(5))
    return fig


def expert_load(groups):
    """Share of the assignments that each expert receives, over steps: bright is crowded, black is dead."""
    def share_of(run, place):
        load = np.array([row["layers"][place]["load"] for row in run.log], dtype=float)  # (steps, E)
        last = load.shape[1] - 1
        return ([row["step"] for row in run.log], (load / np.maximum(load.sum(axis=1, keepdims=True), 1)).T,
                {0: "expert 0", last: f"expert {last}"}, f"layer {run.final['layers'][place]['layer']}")

    return heatmaps(groups, share_of, "share of the assignments", "training step")


def domain_by_expert(groups):
    """Where each domain's assignments go at the end, and the information between expert and domain above its null."""
    def share_of(run, place):
        layer = run.final["layers"][place]
        load = np.array(layer["domain_load"], dtype=float)  # (domains, E)
        excess = measure(run.final, "mi_excess", place)
        return (np.arange(load.shape[1]), (load / np.maximum(load.sum(axis=1, keepdims=True), 1))[::-1],
                dict(enumerate(reversed(run.config["domains"]))), f"layer {layer['layer']}: {excess:.3f} nats")

    return heatmaps(groups, share_of, "share of the domain's assignments",
                    "expert (above each panel: mutual information minus its shuffled null)")


def imbalance(groups):
    """Imbalance by balance coefficient, every seed a mark; a line joins the configs that differ in nothing else."""
    fig = Figure(figsize=(DOUBLE, 2.9), layout="constrained")
    order = sorted(groups, key=lambda name: (groups[name][0].model["aux_coef"], name))
    ticks = [f"{groups[name][0].model['aux_coef']:g}\n{name}" for name in order]
    sweep = coefficient_sweep(groups)
    panels = {"load_cv": "load CV (std / mean)", "max_violation": "MaxVio, validation set",
              "max_violation_batch": "MaxVio, mean over batches"}
    for axes, (number, text) in zip(fig.subplots(1, len(panels)), panels.items()):
        means = [over_seeds(groups[name], number).mean for name in sweep]
        axes.plot([order.index(name) for name in sweep], means, color="#888888", linewidth=0.8, zorder=1)
        for name, runs in groups.items():
            values = [measure(run.final, number) for run in runs]
            axes.plot([order.index(name)] * len(runs), values, linestyle="none", **look(name))
        axes.set_yscale("symlog", linthresh=0.1, linscale=0.5)  # has a place for 0
        axes.yaxis.set_major_formatter(PLAIN)
        axes.set(xticks=range(len(order)), xticklabels=ticks, xlabel="balance coefficient, config", ylabel=text)
        axes.set_ylim(-0.01, 1.4 * max(axes.dataLim.y1, 0.1))
    add_legend(fig, groups, Line2D([], [], color="#888888", linewidth=0.8, label="only the coefficient differs"))
    return fig


def by_layer(groups, numbers):
    """Curves over steps: a row of panels for each of `numbers` {field: axis label}, a column for each MoE layer."""
    fig, panels = panel_grid(groups, len(numbers), 1.7, sharey="row")
    for row, (number, text) in zip(panels, numbers.items()):
        for place, axes in enumerate(row):
            for name in groups:
                draw_curve(axes, groups, name, number, place)
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        row[0].set_ylabel(text)
        row[0].set_ylim(max(row[0].get_ylim()[0], -0.002))  # none of the numbers can be negative
    for axes in panels[-1]:
        axes.set_xlabel("training step")
    add_legend(fig, groups)
    return fig


def any_limited(groups):
    """Whether a config has a capacity limit, without which nothing is dropped."""
    return any(runs[0].model.get("capacity_factor") is not None for runs in groups.values())


FOR_ALL = {"perplexity_over_steps": perplexity_over_steps, "final_perplexity": final_perplexity}
FOR_EXPERTS = {
    "expert_load": expert_load, "imbalance": imbalance, "domain_by_expert": domain_by_expert,
    "router_entropy": lambda groups: by_layer(groups, {
        "router_entropy_share": "entropy per token\n(share of ln E)",
        "marginal_entropy_share": "entropy of the mean\n(share of ln E)"}),
    "weight_divergence": lambda groups: by_layer(groups, {
        "weight_divergence": "weight divergence\n(1 = initialisation)"}),
    "coverage_and_drops": lambda groups: by_layer(groups, {
        "token_coverage": "share of tokens\nwith an expert",
        **({"drop_rate": "share of assignments\ndropped"} if any_limited(groups) else {})}),
}


def draw_all(study_dir, only=None):
    """Draw the figures of a study's finished runs into `study_dir/figures`; returns the paths written.

    `only` names some of them. Figures about experts are left out where no config has any. Each file is written
    whole or not at all. Raises ValueError without a finished run.
    """
    groups, paths = complete_runs(study_dir), []
    experts = {name: runs for name, runs in groups.items() if runs[0].is_moe}
    with matplotlib.rc_context(STYLE):
        for name, draw in (FOR_ALL | FOR_EXPERTS if experts else FOR_ALL).items():
            if only is None or name in only:
                paths.append(Path(study_dir, "figures", f"{name}.png"))
                save(draw(groups if name in FOR_ALL else experts), paths[-1])
    return paths


def save(fig, path):
    """Write a figure as PNG, whole or not at all, and the same bytes for the same figure."""
    image = io.BytesIO()
    fig.savefig(image, format="png", metadata={"Software": None})
    write_whole(path, image.getvalue())
