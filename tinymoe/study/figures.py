"""The kinds of figure, each a function of Results or a function that makes one; drawn from result rows alone.

A setting keeps one colour and one marker in all figures of its experiment, so that figures also read in grey. Points are
means over seeds with 95% intervals, small marks the seeds; lines over steps are means, bands the range of the seeds.
Dashed lines and hollow marks are leaky: measured with a route that may depend on later bytes. No pyplot, no global state.
"""

import io
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ..files import write_whole
from .palette import COLOURS, MARKERS
from .quantities import in_row, title
from .statistics import Contrast, t_interval

STYLE = {
    "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.5, "axes.axisbelow": True,
    "lines.linewidth": 1.2, "lines.markersize": 3.5, "savefig.dpi": 200,
}
DOUBLE = 7.0  # width of two columns, in inches
SHARE = PowerNorm(0.5, vmin=0.0, vmax=1.0)  # colours of a share, stretched where the small shares are
PLAIN_NUMBER = FuncFormatter(lambda value, _: f"{value:g}")
HOLLOW = {"linestyle": "--", "markerfacecolor": "white"}
LEAKY_KEY = Line2D([], [], color="#555555", marker="o", label="hollow: leaky (route sees later bytes)", **HOLLOW)


@contextmanager
def default_style():
    """Within it figures start from matplotlib's defaults and STYLE: a user's matplotlibrc has no effect."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def draw_all(results):
    """Draw the figures of an experiment into its folder's `figures`; returns the paths written.

    None while a setting without which the experiment says nothing is missing; a figure about experts is left out where
    no setting has any. Each file is written whole or not at all.
    """
    paths = []
    with default_style():
        for name, draw in results.experiment.figures.items() if results.ready else ():
            fig = draw(results)
            if fig is not None:
                paths.append(results.folder / "figures" / f"{name}.png")
                save(fig, paths[-1])
    return paths


def save(fig, path):
    """Write a figure as PNG, whole or not at all, and the same bytes for the same figure."""
    image = io.BytesIO()
    fig.savefig(image, format="png", metadata={"Software": None})
    write_whole(Path(path), image.getvalue())


# -- shared parts -------------------------------------------------------------------------------

def style_of(results, name):
    """Colour and marker of a setting by its place in the experiment; a colour that comes again has another marker."""
    return style_at([s.id for s in results.experiment.settings].index(name))


def style_at(place):
    """Colour and marker of a place in a list."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]}


def panel_grid(n_rows, n_columns, height, **options):
    """(Figure, panels (n_rows, n_columns))."""
    fig = Figure(figsize=(DOUBLE, height), layout="constrained")
    return fig, fig.subplots(n_rows, n_columns, squeeze=False, **options)


def panels(n, height, **options):
    """(Figure, n panels side by side)."""
    fig, grid = panel_grid(1, n, height, **options)
    return fig, grid[0]


def add_legend(fig, results, names=None, *extra):
    """One legend below the panels, where it can cover no data; `extra` are handles after those of the settings."""
    labels = {name: results.label(name) for name in names or results.groups}
    handles = [Line2D([], [], label=label, **style_of(results, name)) for name, label in labels.items()]
    fig.legend(handles=[*handles, *extra], loc="outside lower center", ncols=3 if max(map(len, labels.values())) > 20 else 5)


def axis_title(metric, reference=None):
    """The title of a quantity; losses may be drawn less those of a reference setting."""
    return title(metric) + (f"\nless that of {reference}" if reference else "")


def relative_to(reference, metric):
    """The reference for a loss, whose values would lie on one another; None for other quantities."""
    return reference if metric.endswith("cross_entropy") else None


def series(results, name, metric, reference=None, layer=None):
    """(steps, values (seeds, steps)) of a setting's log, less the reference's of the same seed if there is one.

    Steps that all runs logged with a number. layer: index of one MoE layer, None for the mean.
    """
    def logs(setting):
        return {run.seed: {row["step"]: in_row(row, metric, layer) for row in run.log} for run in results.groups[setting]}

    values, other = logs(name), logs(reference) if reference else None
    seeds = [seed for seed in values if other is None or seed in other]
    parts = [values[seed] for seed in seeds] + ([other[seed] for seed in seeds] if other else [])
    steps = [n for n in sorted(set.intersection(*map(set, parts))) if all(np.isfinite(one[n]) for one in parts)]
    return steps, np.array([[values[seed][n] - (other[seed][n] if other else 0) for n in steps] for seed in seeds])


def curve(axes, results, name, metric, *, reference=None, layer=None, start=0, **options):
    """Mean over seeds as a line with markers and the range of the seeds as a band, from a step on."""
    steps, values = series(results, name, metric, reference, layer)
    first = sum(step < start for step in steps)
    steps, values, style = steps[first:], values[:, first:], style_of(results, name)
    every = max(1, len(steps) // 8)
    offset = list(results.groups).index(name) % every  # so that markers of close curves do not hide each other
    axes.plot(steps, values.mean(axis=0), markevery=(offset, every), **style | options)
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15, lw=0)


def symmetric(intervals):
    """Half widths for error bars; none where there is one seed."""
    return np.nan_to_num([one.half for one in intervals])


# -- over the steps -----------------------------------------------------------------------------

def over_steps(reference, *metrics, names=None):
    """A panel for each metric, a curve for each setting (or for those named); losses less the reference setting's."""
    def draw(results):
        fig, axes_of = panels(len(metrics), 2.9)
        for axes, metric in zip(axes_of, metrics):
            base = relative_to(reference, metric)
            for name in names or results.groups:
                curve(axes, results, name, metric, reference=base)
            axes.set(xlabel="training step", ylabel=axis_title(metric, base))
        add_legend(fig, results, names)
        return fig
    return draw


def perplexity_over_steps(results):
    """Validation perplexity: the whole run, and its last third enlarged."""
    fig, (run, end) = panels(2, 3.0)
    last = max((row["step"] for one in results.runs for row in one.log), default=0)
    for name, runs in results.groups.items():
        for axes, start in ((run, 0), (end, last * 2 / 3)):
            curve(axes, results, name, "causal_perplexity", start=start)
            if runs[0].leaky:
                curve(axes, results, name, "val_perplexity", start=start, **HOLLOW)
    run.set(xlabel="training step", ylabel="validation perplexity (per byte)", yscale="log")
    run.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    run.yaxis.set_major_formatter(PLAIN_NUMBER)
    run.yaxis.set_minor_locator(NullLocator())
    end.set(xlabel="training step", ylabel="the same, last third")
    add_legend(fig, results, None, LEAKY_KEY)
    return fig


def by_layer(*metrics):
    """Curves over steps: a row of panels for each metric, a column for each MoE layer."""
    def draw(results):
        names = results.with_experts
        if not names:
            return None
        fig, grid = layer_grid(results, len(metrics), 1.7, sharey="row")
        for row, metric in zip(grid, metrics):
            for place, axes in enumerate(row):
                for name in (name for name in names if place < len(results.groups[name][0].final["layers"])):
                    curve(axes, results, name, metric, layer=place)
                axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            row[0].set_ylabel(fill(title(metric), 24))
            row[0].set_ylim(max(row[0].get_ylim()[0], -0.002))  # none of these numbers can be negative
        for axes in grid[-1]:
            axes.set_xlabel("training step")
        add_legend(fig, results, names)
        return fig
    return draw


# -- at the end ---------------------------------------------------------------------------------

def at_the_end(*metrics, names=None):
    """A panel for each metric: the settings from top to bottom, mean and interval, every seed a small mark.

    Where a causal number differs from the leaky one, that stands below it with a hollow mark.
    """
    def draw(results):
        chosen = names or list(results.groups)
        fig, axes_of = panels(len(metrics), 0.8 + 0.3 * len(chosen), sharey=True)
        for axes, metric in zip(axes_of, metrics):
            for y, name in enumerate(chosen):
                end_mark(axes, results, name, metric, y, mfc=style_of(results, name)["color"])
                if metric.startswith("causal_") and results.groups[name][0].leaky:
                    end_mark(axes, results, name, metric.replace("causal", "val"), y + 0.3, mfc="white")
            axes.set(xlabel=fill(title(metric), 72 // len(metrics)), ylim=(len(chosen) - 0.4, -0.6))
            axes.set_yticks(range(len(chosen)), map(results.label, chosen))
            axes.xaxis.set_major_locator(MaxNLocator(5))
        if any(results.groups[name][0].leaky for name in chosen) and any(m.startswith("causal_") for m in metrics):
            fig.supxlabel("filled: causal; hollow: leaky", fontsize=7)
        return fig
    return draw


def end_mark(axes, results, name, metric, y, mfc):
    """Mean, interval and seeds of one setting at height y."""
    interval, style = results.interval(metric, name), style_of(results, name)
    axes.plot([interval.low, interval.high], [y, y], color=style["color"], lw=1.5)
    seeds = list(results.numbers(metric, name).values())
    axes.plot(seeds, [y - 0.2] * len(seeds), "|", color=style["color"], ms=4)
    axes.plot(interval.mean, y, linestyle="none", markersize=5, mfc=mfc, **style)


def one_against_other(x, y):
    """A point for each setting, with its intervals: metric y against metric x."""
    def draw(results):
        fig, (axes,) = panels(1, 3.2)
        for name in results.groups:
            a, b = results.interval(x, name), results.interval(y, name)
            axes.errorbar(a.mean, b.mean, xerr=symmetric([a]), yerr=symmetric([b]), linestyle="none",
                          elinewidth=0.8, capsize=0, **style_of(results, name))
        axes.set(xlabel=title(x), ylabel=title(y))
        add_legend(fig, results)
        return fig
    return draw


def lines_by(names_of, x_of, x_label, *metrics, reference=None):
    """A panel for each metric, lines through settings: names_of = {line: setting ids}, x_of(setting id) -> x.

    Losses are drawn less those of the reference setting, if there is one.
    """
    def draw(results):
        fig, axes_of = panels(len(metrics), 2.8)
        for axes, metric in zip(axes_of, metrics):
            base = relative_to(reference, metric)
            for place, (line, names) in enumerate(names_of.items()):
                found = [t_interval(Contrast(metric, name, minus=base).of(results.numbers)) for name in names]
                axes.errorbar([x_of(name) for name in names], [one.mean for one in found], label=line,
                              yerr=symmetric(found), elinewidth=0.8, **style_at(place))
            axes.set(xlabel=x_label, ylabel=axis_title(metric, base), xscale="log")
            places = sorted({x_of(name) for names in names_of.values() for name in names})
            axes.set_xticks(places, [f"{x:g}" for x in places])
            axes.minorticks_off()
        handles, labels = axes.get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
        return fig
    return draw


def imbalance(sweep):
    """Imbalance by balance coefficient, every seed a mark; a line joins the settings of `sweep`, which differ in it alone."""
    def draw(results):
        names = results.with_experts
        if not names:
            return None
        coefficient = {name: results.groups[name][0].model["aux_coef"] for name in names}
        order = sorted(names, key=lambda name: (coefficient[name], name))
        joined = [name for name in order if name in sweep]
        fig, axes_of = panels(3, 2.9)
        for axes, metric in zip(axes_of, ("load_cv", "max_violation", "max_violation_batch")):
            axes.plot(list(map(order.index, joined)), [results.mean(metric, name) for name in joined], color="#888888",
                      linewidth=0.8, zorder=1)
            for place, name in enumerate(order):
                seeds = list(results.numbers(metric, name).values())
                axes.plot([place] * len(seeds), seeds, linestyle="none", **style_of(results, name))
            axes.set_yscale("symlog", linthresh=0.1, linscale=0.5)  # has a place for 0
            axes.yaxis.set_major_formatter(PLAIN_NUMBER)
            axes.set_xticks(range(len(order)), [f"{coefficient[name]:g}\n{name}" for name in order])
            axes.set(xlabel="balance coefficient, config", ylabel=title(metric))
            axes.set_ylim(-0.01, 1.4 * max(axes.dataLim.y1, 0.1))
        line = Line2D([], [], color="#888888", linewidth=0.8, label="only the coefficient differs")
        add_legend(fig, results, names, line)
        return fig
    return draw


# -- shares as colours --------------------------------------------------------------------------

def layer_grid(results, n_rows, height, sharey):
    """(Figure, panels (n_rows, MoE layers)), the layers named above the first row."""
    layers = max((runs[0].final["layers"] for runs in results.groups.values()), key=len)
    fig, grid = panel_grid(n_rows, len(layers), 1.0 + height * n_rows, sharex=True, sharey=sharey)
    for axes, layer in zip(grid[0], layers):
        axes.set_title(f"layer {layer['layer']}")
    return fig, grid


def heatmaps(results, share_of, bar_label, axis_label):
    """Shares as colours, for the first run of each setting with experts (down) and its MoE layers (across).

    share_of(run, index of the layer) -> (x of the columns, share (rows, columns), names of some rows, title).
    """
    names = results.with_experts
    if not names:
        return None
    fig, grid = layer_grid(results, len(names), 0.95, sharey=False)
    for row, run in zip(grid, (results.groups[name][0] for name in names)):
        row[0].set_ylabel(run.run_id.replace("-", "\n"), rotation=0, ha="right", va="center", fontweight="bold")
        for place, axes in enumerate(row[: len(run.final["layers"])]):
            x, share, row_names, above = share_of(run, place)
            axes.pcolormesh(x, np.arange(len(share)), share, shading="nearest", norm=SHARE, cmap="inferno")
            axes.set_yticks(list(row_names), row_names.values() if place == 0 else [""] * len(row_names))
            axes.set_title(above, fontsize=7, pad=2)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.grid(False)
    fair = 1 / len(run.final["layers"][0]["load"])
    bar = fig.colorbar(ScalarMappable(SHARE, "inferno"), ax=grid, aspect=40, pad=0.01, label=bar_label)
    bar.set_ticks([0, fair, 0.25, 0.5, 1], labels=["0", f"fair {fair:.3g}", "0.25", "0.5", "1"], minor=False)
    bar.ax.minorticks_off()
    fig.supxlabel(axis_label, fontsize=8)
    return fig


def _row_shares(counts):
    counts = np.array(counts, dtype=float)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def expert_load(results):
    """Share of the assignments that each expert receives, over steps: bright is crowded, black is dead."""
    def share_of(run, place):
        share = _row_shares([row["layers"][place]["load"] for row in run.log])  # (steps, E)
        last = share.shape[1] - 1
        return ([row["step"] for row in run.log], share.T, {0: "expert 0", last: f"expert {last}"},
                f"layer {run.final['layers'][place]['layer']}")

    return heatmaps(results, share_of, "share of the assignments", "training step")


def domain_by_expert(results):
    """Where each domain's assignments go at the end, and the information between expert and domain above its null."""
    def share_of(run, place):
        layer = run.final["layers"][place]
        share = _row_shares(layer["domain_load"])  # (domains, E)
        return (np.arange(share.shape[1]), share[::-1], dict(enumerate(reversed(run.config["domains"]))),
                f"layer {layer['layer']}: {in_row(run.final, 'mi_excess', place):.3f} nats")

    return heatmaps(results, share_of, "share of the domain's assignments",
                    "expert (above each panel: mutual information minus its shuffled null)")
