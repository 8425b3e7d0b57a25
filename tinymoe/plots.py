"""The figures of a study, drawn from its result rows alone.

Every config keeps one colour (Okabe and Ito's palette, safe for colour-blind readers) and one marker, so that
the figures also read in grey. A line is the mean over seeds and its band their range; a dashed line and a hollow
mark are numbers measured with a route that may see later tokens. Figure objects only: no pyplot, no global state.
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
from matplotlib.transforms import ScaledTranslation

from .files import write_whole
from .rows import coefficient_sweep, complete_runs, measure, over_seeds

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
STYLE = {
    "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.5, "axes.axisbelow": True,
    "lines.linewidth": 1.2, "lines.markersize": 3.5, "savefig.dpi": 200,
}
SINGLE, DOUBLE = 3.4, 7.0  # widths of one and of two columns, in inches
SHARE = PowerNorm(0.5, vmin=0.0, vmax=1.0)  # colours of a share


def label(run):
    """A config's name in a legend: its id, router, experts per token and balance coefficient."""
    model = run.model
    if not run.is_moe:
        return f"{run.config_id} dense"
    return f"{run.config_id} {model['router'].replace('_', ' ')}, K={model['top_k']}, aux {model['aux_coef']:g}"


def look(groups, config_id):
    """Colour and marker of a config: its place among the study's configs."""
    place = list(groups).index(config_id)
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def moe_only(groups):
    """The configs that have MoE layers."""
    return {config_id: runs for config_id, runs in groups.items() if runs[0].is_moe}


def any_leaky(groups):
    """Whether any run's loss depends on whether routes may see later tokens."""
    return any(run.leaky for runs in groups.values() for run in runs)


def layer_numbers(groups):
    """Numbers of the MoE layers, as the config with the most of them has them."""
    return max(([layer["layer"] for layer in runs[0].final["layers"]] for runs in groups.values()), key=len)


def seed_curves(runs, name, layer=None):
    """Steps that all seeds logged, and the values there: (S,), (seeds, S)."""
    series = [{row["step"]: measure(row, name, layer) for row in run.log} for run in runs]
    steps = sorted(set.intersection(*(set(one) for one in series)))
    return np.array(steps), np.array([[one[step] for step in steps] for one in series])


def draw_curve(axes, groups, config_id, name, layer=None, leaky=False):
    """Mean over seeds as a line with markers, the seeds' range as a band."""
    steps, values = seed_curves(groups[config_id], name, layer)
    if not len(steps):
        return
    style = look(groups, config_id)
    every = max(len(steps) // 8, min(len(groups), max(1, len(steps) // 2)))
    offset = list(groups).index(config_id) % every  # so that the markers of close curves do not hide each other
    face = {"linestyle": "--", "markerfacecolor": "white"} if leaky else {}
    axes.plot(steps, values.mean(axis=0), markevery=(offset, every), **style, **face)
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.18, linewidth=0)


def add_legend(fig, groups, *extra):
    """One legend below the panels, where it can cover no data; `extra` are handles after those of the configs."""
    handles = [Line2D([], [], label=label(runs[0]), **look(groups, name)) for name, runs in groups.items()]
    fig.legend(handles=[*handles, *extra], loc="outside lower center", ncols=3)


def perplexity_axis(axes):
    """Logarithmic perplexity with plain numbers, wherever the range lies."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 3 * low else MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def perplexity_over_steps(groups):
    """Validation perplexity: the whole run, and its last third enlarged."""
    fig = Figure(figsize=(DOUBLE, 3.0), layout="constrained")
    whole, end = fig.subplots(1, 2)
    last = max(run.log[-1]["step"] for runs in groups.values() for run in runs if run.log)
    for axes in (whole, end):
        for config_id, runs in groups.items():
            draw_curve(axes, groups, config_id, "causal_perplexity")
            if any(run.leaky for run in runs):
                draw_curve(axes, groups, config_id, "val_perplexity", leaky=True)
        axes.set(xlabel="training step", ylabel="validation perplexity (per byte)")
    corners = [path.vertices for band in end.collections for path in band.get_paths()]
    shown = [y for x, y in np.concatenate(corners) if x >= last * 2 / 3] if corners else [1.0]
    end.set(xlim=(last * 2 / 3, last * 1.01 or 1), ylim=(min(shown) * 0.99, max(shown) * 1.01))
    perplexity_axis(whole)
    perplexity_axis(end)
    end.set_ylabel("the same, last third")
    leaky = Line2D([], [], color="#555555", linestyle="--", marker="o", markerfacecolor="white",
                   label="hollow: leaky (route sees later tokens)")
    add_legend(fig, groups, *[leaky] * any_leaky(groups))
    return fig


def final_perplexity(groups):
    """Final perplexity: mean and 95% interval over seeds (of the loss, then exponentiated), every seed a small mark."""
    fig = Figure(figsize=(SINGLE, 0.8 + 0.34 * len(groups)), layout="constrained")
    axes = fig.subplots()
    for place, (config_id, runs) in enumerate(groups.items()):
        numbers = [("causal_cross_entropy", 0.0)]
        if any(run.leaky for run in runs):
            numbers.append(("val_cross_entropy", 0.3))
        for name, shift in numbers:
            seeds = np.exp([measure(run.final, name) for run in runs])
            interval = over_seeds(runs, name)
            style = look(groups, config_id) | ({"markerfacecolor": "white"} if shift else {})
            if len(runs) > 1:
                axes.plot(np.exp([interval.low, interval.high]), [place + shift] * 2, color=style["color"], lw=1.5)
            axes.plot(seeds, [place + shift - 0.17] * len(seeds), "|", color=style["color"], markersize=4)
            axes.plot(np.exp(interval.mean), place + shift, linestyle="none", markersize=5, **look(groups, config_id)
                      | style)
    axes.set_yticks(range(len(groups)), [label(runs[0]) for runs in groups.values()])
    axes.set_ylim(len(groups) - 0.4, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("final perplexity (per byte)")
    interval = "bar: 95% over seeds" if max(map(len, groups.values())) > 1 else "one seed: no interval"
    fig.supxlabel("filled: causal; hollow: leaky; " * any_leaky(groups) + interval, fontsize=7)
    bits = axes.secondary_xaxis("top", functions=(_bits, lambda value: 2.0**value))
    bits.set_xlabel("bits per byte")
    bits.xaxis.set_major_locator(MaxNLocator(5))
    return fig


def _bits(perplexity):
    return np.log2(np.maximum(perplexity, 1e-9))


def _edges(steps):
    """Cell borders halfway between the steps, for a heatmap whose columns need not be evenly spaced."""
    if len(steps) == 1:
        return steps[0] + np.array([-0.5, 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])


def _panel_grid(groups, height):
    """A grid of panels, configs down and MoE layers across, with the config's name at the left of its row."""
    layers = layer_numbers(groups)
    fig = Figure(figsize=(DOUBLE, 1.0 + height * len(groups)), layout="constrained")
    panels = fig.subplots(len(groups), len(layers), squeeze=False, sharex=True, sharey=False)
    for row, runs in zip(panels, groups.values()):
        for axes in row[len(runs[0].final["layers"]) :]:
            axes.set_visible(False)
    return fig, panels, layers


def _share_bar(fig, panels, n_experts, text):
    """Colour bar of a share between 0 and 1, stretched where the small shares are, with the fair share marked."""
    bar = fig.colorbar(ScalarMappable(SHARE, "inferno"), ax=panels, aspect=40, pad=0.01)
    fair = 1 / n_experts
    bar.set_ticks([0, fair, 0.25, 0.5, 1], labels=["0", f"fair {fair:.3g}", "0.25", "0.5", "1"])
    bar.ax.minorticks_off()
    bar.set_label(text)


def expert_load(groups):
    """Share of the assignments that each expert receives, over steps: bright is crowded, black is dead."""
    groups = moe_only(groups)
    fig, panels, layers = _panel_grid(groups, 0.85)
    for row, runs in zip(panels, groups.values()):
        run = runs[0]
        steps = np.array([entry["step"] for entry in run.log])
        for place, axes in enumerate(row[: len(run.final["layers"])]):
            load = np.array([entry["layers"][place]["load"] for entry in run.log], dtype=float).T  # (E, S)
            share = load / np.maximum(load.sum(axis=0), 1)
            axes.pcolormesh(_edges(steps), np.arange(len(share) + 1) - 0.5, share, norm=SHARE, cmap="inferno")
            axes.set_xticks(steps[:: max(1, len(steps) // 4)])
            axes.set_yticks([0, len(share) - 1])
            axes.grid(False)
        row[0].set_ylabel(f"{run.config_id} expert")
    for place, axes in enumerate(panels[0]):
        axes.set_title(f"layer {layers[place]}")
    fig.supxlabel(f"training step (seed {run.seed})", fontsize=8)
    _share_bar(fig, panels, len(share), "share of the assignments")
    return fig


def _coefficient_axis(axes, coefficients):
    """The balance coefficients as ticks of a symmetric logarithm, which has a place for zero."""
    positive = sorted({x for x in coefficients if x > 0}) or [1.0]
    axes.set_xscale("symlog", linthresh=positive[0])
    axes.set_xticks([0, *positive], [f"{x:g}" for x in (0, *positive)])
    axes.set_xlim(-0.15 * positive[0], 2.5 * positive[-1])
    axes.minorticks_off()
    axes.set_xlabel("balance coefficient")


def imbalance(groups):
    """Imbalance against the balance coefficient: a line joins the configs that differ in nothing else."""
    groups = moe_only(groups)
    fig = Figure(figsize=(DOUBLE, 3.0), layout="constrained")
    coefficient = {name: runs[0].model["aux_coef"] for name, runs in groups.items()}
    joined = coefficient_sweep(groups)
    others = [name for name in groups if name not in joined]
    panels = {"load_cv": "load CV (std / mean)", "max_violation": "MaxVio, validation set",
              "max_violation_batch": "MaxVio, mean over batches"}
    for axes, (name, text) in zip(fig.subplots(1, len(panels)), panels.items()):
        path = [(coefficient[one], over_seeds(groups[one], name).mean) for one in joined]
        if path:
            axes.plot(*zip(*path), color="#888888", linewidth=0.8, zorder=1)
        for one in groups:
            shift = 7 * (others.index(one) + 1) if one in others else 0
            move = axes.transData + ScaledTranslation(shift / 72, 0, fig.dpi_scale_trans)
            values = [measure(run.final, name) for run in groups[one]]
            axes.plot([coefficient[one]] * len(values), values, linestyle="none", transform=move, **look(groups, one))
        highest = max(measure(run.final, name) for runs in groups.values() for run in runs)
        _coefficient_axis(axes, coefficient.values())
        axes.set_yscale("symlog", linthresh=0.1, linscale=0.5)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set(ylabel=text, ylim=(-0.01, 1.4 * max(highest, 0.1)))
    line = Line2D([], [], color="#888888", linewidth=0.8, label="only the coefficient differs")
    aside = Line2D([], [], linestyle="none", label="(others: for reference, moved right)")
    add_legend(fig, groups, line, aside)
    return fig


def _by_layer(groups, names):
    """Curves over steps: a row of panels for each number in `names` {field: axis label}, a column for each layer."""
    groups = moe_only(groups)
    layers = layer_numbers(groups)
    fig = Figure(figsize=(DOUBLE, 0.9 + 1.7 * len(names)), layout="constrained")
    panels = fig.subplots(len(names), len(layers), squeeze=False, sharex=True, sharey="row")
    for row, (name, text) in zip(panels, names.items()):
        for place, axes in enumerate(row):
            for config_id, runs in groups.items():
                if place < len(runs[0].final["layers"]):
                    draw_curve(axes, groups, config_id, name, place)
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        row[0].set_ylabel(text)
    for place, layer in enumerate(layers):
        panels[0][place].set_title(f"layer {layer}")
        panels[-1][place].set_xlabel("training step")
    add_legend(fig, groups)
    return fig


def router_entropy(groups):
    """Entropy of the router's distribution: of one token's, and of the mean over tokens. 1 is uniform."""
    return _by_layer(groups, {"router_entropy_share": "entropy per token\n(share of ln E)",
                              "marginal_entropy_share": "entropy of the mean\n(share of ln E)"})


def weight_divergence(groups):
    """Mean pairwise 1 - cosine of the experts' weights, relative to initialisation."""
    return _by_layer(groups, {"weight_divergence": "weight divergence\n(1 = initialisation)"})


def domain_by_expert(groups):
    """Where each domain's assignments go at the end, and the information between expert and domain above its null."""
    groups = moe_only(groups)
    fig, panels, layers = _panel_grid(groups, 0.95)
    for row, runs in zip(panels, groups.values()):
        run = runs[0]
        domains = run.config["domains"]
        for axes, layer in zip(row, run.final["layers"]):
            load = np.array(layer["domain_load"], dtype=float)  # (domains, E)
            share = load / np.maximum(load.sum(axis=1, keepdims=True), 1)
            axes.imshow(share, norm=SHARE, cmap="inferno", aspect="auto")
            excess = layer["mutual_information"] - layer["mutual_information_null"]
            axes.set_title(f"layer {layer['layer']}: {excess:.3f} nats", fontsize=7, pad=2)
            axes.set_yticks(*([range(len(domains)), domains] if axes is row[0] else [[]]))
            axes.set_xticks(range(load.shape[1]))
            axes.grid(False)
        row[0].set_ylabel(run.config_id, rotation=0, ha="right", va="center", fontweight="bold")
    fig.supxlabel(f"expert (seed {run.seed}; above each panel: mutual information minus its shuffled null)", fontsize=8)
    _share_bar(fig, panels, load.shape[1], "share of the domain's assignments")
    return fig


def coverage_and_drops(groups):
    """Share of tokens with an expert, and share of assignments that a capacity limit dropped; mean over layers."""
    groups = moe_only(groups)
    fig = Figure(figsize=(DOUBLE, 2.7), layout="constrained")
    names = {"token_coverage": "tokens with an expert (share)", "drop_rate": "assignments dropped (share)"}
    for axes, (name, text) in zip(fig.subplots(1, 2), names.items()):
        for config_id in groups:
            draw_curve(axes, groups, config_id, name)
        axes.set(xlabel="training step", ylabel=text)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.95) if name == "token_coverage" else -0.002, max(high, 1.005 if low > 0.5 else 0.05))
    add_legend(fig, groups)
    return fig


NEEDS_NO_EXPERTS = (perplexity_over_steps, final_perplexity)
NEEDS_EXPERTS = (expert_load, imbalance, router_entropy, weight_divergence, domain_by_expert, coverage_and_drops)


def draw_all(study_dir, only=None):
    """Draw the figures of a study's finished runs into `study_dir/figures`; returns the paths written.

    `only` names some of them (a function's name is its file's). Figures about experts are left out where
    no config has any. Each file is written whole or not at all. Raises ValueError without a finished run.
    """
    groups = complete_runs(study_dir)
    drawings = NEEDS_NO_EXPERTS + (NEEDS_EXPERTS if moe_only(groups) else ())
    paths = []
    with matplotlib.rc_context(STYLE):
        for draw in drawings:
            if only is None or draw.__name__ in only:
                image = io.BytesIO()
                draw(groups).savefig(image, format="png", metadata={"Software": None})
                paths.append(Path(study_dir, "figures", f"{draw.__name__}.png"))
                write_whole(paths[-1], image.getvalue())
    return paths
