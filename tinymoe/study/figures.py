"""The kinds of figure, each a function of Results or a function that makes one; drawn from result rows alone.

A setting keeps one colour and one marker in all figures of its experiment, so that figures also read in grey. Points
are means over seeds with 95% intervals, small marks the seeds. Lines over steps are means; bands show the range of the
seeds. Dashed lines and hollow marks are leaky: measured with a route that may depend on later bytes.
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

from ..files import write_atomically
from .palette import COLOURS, MARKERS
from .quantities import in_row, title
from .results import Results
from .statistics import Contrast, t_interval

STYLE = {
    "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.5, "axes.axisbelow": True,
    "lines.linewidth": 1.2, "lines.markersize": 3.5, "savefig.dpi": 200,
    "text.parse_math": False,  # a name with dollar signs is no formula
}
DOUBLE = 7.0  # width of two columns, in inches
SHARE = PowerNorm(0.5, vmin=0.0, vmax=1.0)  # colours of a share, stretched where the small shares are
HOLLOW = {"linestyle": "--", "markerfacecolor": "white"}
LEAKY_KEY = Line2D([], [], color="#555555", marker="o", label="hollow: leaky (route sees later bytes)", **HOLLOW)


@contextmanager
def default_style():
    """Within it figures start from matplotlib's defaults and STYLE: a user's matplotlibrc has no effect."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def draw_all(results: Results) -> list[Path]:
    """Draw the figures of an experiment, none while it is not ready, into its folder's `figures`: the paths written."""
    paths = []
    with default_style():
        for name, draw in results.experiment.figures.items() if results.ready else ():
            fig = draw(results)
            if fig is not None:
                paths.append(results.folder / "figures" / f"{name}.png")
                save(fig, paths[-1])
    return paths


def save(fig: Figure, path):
    """Write a figure as PNG: the same bytes for the same figure."""
    image = io.BytesIO()
    fig.savefig(image, format="png", metadata={"Software": None})
    write_atomically(path, image.getvalue())


def style_of(results: Results, name: str) -> dict:
    """Colour and marker of a setting by its place in the experiment."""
    return style_at([s.id for s in results.experiment.settings].index(name))


def style_at(place: int) -> dict:
    """Colour and marker of a place in a list; a colour that comes again has another marker."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]}


def panel_grid(n_rows, n_columns, height, **options):
    fig = Figure(figsize=(DOUBLE, height), layout="constrained")
    return fig, fig.subplots(n_rows, n_columns, squeeze=False, **options)


def layer_grid(results, n_rows, height, sharey):
    """(Figure, panels (n_rows, MoE layers)), the layers named above the first row."""
    layers = max((runs[0].final["layers"] for runs in results.groups.values()), key=len)
    fig, grid = panel_grid(n_rows, len(layers), 1.0 + height * n_rows, sharex=True, sharey=sharey)
    for axes, layer in zip(grid[0], layers):
        axes.set_title(f"layer {layer['layer']}")
    return fig, grid


def add_legend(fig, results, names=None, *extra):
    """One legend below the panels, where it can cover no data; `extra` are handles after those of the settings."""
    handles = [Line2D([], [], label=results.label(name), **style_of(results, name)) for name in names or results.groups]
    fig.legend(handles=[*handles, *extra], loc="outside lower center", ncols=3 if results.experiment.adjustable else 5)


def less_reference(reference, metric):
    """(reference or None, title of the axis): only losses, which lie close together, are drawn less the reference's."""
    base = reference if metric.endswith("cross_entropy") else None
    return base, title(metric) + (f"\nless that of {base}" if base else "")


def half_widths(intervals):
    """For error bars; 0 where there is one seed."""
    return np.nan_to_num([one.half for one in intervals])


def curve(axes, results, name, metric, *, reference=None, layer=None, start=0, **options):
    """The log of a setting, less the reference's of the same seed if there is one: mean and range over the seeds.

    layer: index of one MoE layer, None for the mean. start: the first step.
    """
    logs = {run.run_id: {row["step"]: row for row in run.log}
            for setting in (name, reference) if setting for run in results.groups[setting]}

    def at(step):
        return Contrast(metric, name, minus=reference).of(lambda _, setting: {
            run.seed: in_row(logs[run.run_id][step], metric, layer) for run in results.groups[setting]})

    common = sorted(step for step in set.intersection(*map(set, logs.values())) if step >= start)
    found = {step: values for step in common if np.isfinite(values := at(step)).all()}
    if not found:  # runs of other lengths share no step
        return
    steps, values, style = list(found), np.array(list(found.values())), style_of(results, name)
    every = max(1, len(steps) // 8)
    offset = list(results.groups).index(name) % every  # so that markers of close curves do not hide each other
    axes.plot(steps, values.mean(axis=1), markevery=(offset, every), **style | options)
    axes.fill_between(steps, values.min(axis=1), values.max(axis=1), color=style["color"], alpha=0.15, lw=0)


def over_steps(reference, *metrics, names=None, enlarged=False):
    """A panel for each metric, a curve for each setting (or for those named); losses less the reference setting's.
    enlarged: the last third once more, in panels of their own."""
    def draw(results):
        last = max((row["step"] for run in results.runs for row in run.log), default=0)
        parts = [(metric, start) for start in ((0, last * 2 / 3) if enlarged else (0,)) for metric in metrics]
        fig, (axes_of,) = panel_grid(1, len(parts), 2.9)
        leaky = []
        for axes, (metric, start) in zip(axes_of, parts):
            base, label = less_reference(reference, metric)
            for name in names or results.groups:
                curve(axes, results, name, metric, reference=base, start=start)
                if metric == "causal_perplexity" and results.groups[name][0].leaky:
                    leaky = [LEAKY_KEY]
                    curve(axes, results, name, "val_perplexity", start=start, **HOLLOW)
            axes.set(xlabel="training step", ylabel=f"{label}, last third" if start else label)
            if metric.endswith("perplexity") and not start:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.yaxis.set_minor_locator(NullLocator())
        add_legend(fig, results, names, *leaky)
        return fig
    return draw


def by_layer(*metrics):
    """Curves over steps: a row of panels for each metric that is not always 0, a column for each MoE layer."""
    def draw(results):
        names = results.with_experts
        if not names:
            return None
        logs = [row for name in names for run in results.groups[name] for row in run.log]
        shown = [metric for metric in metrics if any(in_row(row, metric) for row in logs)] or metrics[:1]
        fig, grid = layer_grid(results, len(shown), 1.7, sharey="row")
        for row, metric in zip(grid, shown):
            for place, axes in enumerate(row):
                for name in (name for name in names if place < len(results.groups[name][0].final["layers"])):
                    curve(axes, results, name, metric, layer=place)
                axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            row[0].set_ylabel(fill(title(metric), 24))
        for axes in grid[-1]:
            axes.set_xlabel("training step")
        add_legend(fig, results, names)
        return fig
    return draw


def at_the_end(*metrics, experts_only=False):
    """A panel for each metric: the settings from top to bottom, a leaky number with a hollow mark below the causal one.
    experts_only: only settings with experts, and no figure without any."""
    def draw(results):
        chosen = results.with_experts if experts_only else list(results.groups)
        if not chosen:
            return None
        fig, (axes_of,) = panel_grid(1, len(metrics), 0.8 + 0.3 * len(chosen), sharey=True)
        for axes, metric in zip(axes_of, metrics):
            for y, name in enumerate(chosen):
                end_mark(axes, results, name, metric, y)
                if metric.startswith("causal_") and results.groups[name][0].leaky:
                    end_mark(axes, results, name, metric.replace("causal", "val"), y + 0.3, markerfacecolor="white")
                    fig.supxlabel("filled: causal; hollow: leaky", fontsize=7)
            axes.set(xlabel=fill(title(metric), 72 // len(metrics)), ylim=(len(chosen) - 0.4, -0.6))
            axes.set_yticks(range(len(chosen)), list(map(results.label, chosen)))
            axes.xaxis.set_major_locator(MaxNLocator(5))
        return fig
    return draw


def forest(found: list[Results]) -> Figure | None:
    """The primary differences of several experiments, in units of their margins, which are shaded: a bar for the 95%
    interval, a tick for each seed. The axis is linear up to two margins and logarithmic beyond."""
    rows = [(results.experiment.name, one) for results in found for one in results.primary if one.tested]
    if not rows:
        return None
    fig, ((axes,),) = panel_grid(1, 1, 1.0 + 0.32 * len(rows))
    axes.axvspan(-1, 1, color="#DDDDDD")
    for y, (_, one) in enumerate(rows):
        colour = {"different": COLOURS[1], "same": COLOURS[0]}.get(one.verdict, "#555555")
        interval = one.interval
        axes.plot(np.array([interval.low, interval.high]) / one.margin, [y, y], color=colour, lw=1.5)
        axes.plot(np.array(one.values) / one.margin, [y - 0.25] * one.n, "|", color=colour, ms=4)
        axes.plot(interval.mean / one.margin, y, "o", color=colour)
        axes.annotate(one.verdict, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=7)
    axes.set_xscale("symlog", linthresh=2)
    most = max(2.0, *(abs(end) / one.margin for _, one in rows for end in (one.interval.low, one.interval.high)))
    ticks = [x for x in (1, 2, 5, 10, 20, 50, 100, 1000) if x <= most]
    axes.set_xticks([*(-x for x in reversed(ticks)), 0, *ticks], [*(f"{-x}" for x in reversed(ticks)), "0",
                                                                  *map(str, ticks)])
    axes.minorticks_off()
    axes.set(xlabel="difference / margin (for losses the margin is 0.01 nats); grey: the same",
             ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), [f"{name}: {fill(str(one.contrast).replace('`', ''), 40)}" for name, one in rows])
    return fig


def draw_forest(found: list[Results], published) -> Path | None:
    """Draw `forest` into published/figures/primary.png; None without a tested primary comparison."""
    with default_style():
        fig, path = forest(found), Path(published, "figures", "primary.png")
        return save(fig, path) or path if fig else None


def end_mark(axes, results, name, metric, y, **options):
    """Mean, interval and seeds of one setting at height y."""
    interval, style = results.interval(metric, name), style_of(results, name)
    seeds = list(results.numbers(metric, name).values())
    axes.plot([interval.low, interval.high], [y, y], color=style["color"], lw=1.5)
    axes.plot(seeds, [y - 0.2] * len(seeds), "|", color=style["color"], ms=4)
    axes.plot(interval.mean, y, linestyle="none", markersize=5, **style | options)


def one_against_other(x, y):
    """A point for each setting, with its intervals: metric y against metric x."""
    def draw(results):
        fig, ((axes,),) = panel_grid(1, 1, 3.2)
        for name in results.groups:
            a, b = results.interval(x, name), results.interval(y, name)
            axes.errorbar(a.mean, b.mean, xerr=half_widths([a]), yerr=half_widths([b]), linestyle="none",
                          elinewidth=0.8, capsize=0, **style_of(results, name))
        axes.set(xlabel=title(x), ylabel=title(y))
        add_legend(fig, results)
        return fig
    return draw


def log_lines(axes, lines, ticks, x_label, y_label):
    """Lines through intervals over a logarithmic axis; lines: [(x values, Intervals, options of the line)]."""
    for x, found, options in lines:
        axes.errorbar(x, [one.mean for one in found], yerr=half_widths(found), elinewidth=0.8, **options)
    axes.set(xlabel=x_label, ylabel=y_label, xscale="log")
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()


def lines_by(names_of, x_of, x_label, *metrics, reference=None):
    """A panel for each metric, lines through settings: names_of = {line: setting ids}, x_of(setting id) -> x; losses
    less those of the reference setting, if there is one."""
    def draw(results):
        fig, (axes_of,) = panel_grid(1, len(metrics), 2.8)
        ticks = sorted({x_of(name) for names in names_of.values() for name in names})
        for axes, metric in zip(axes_of, metrics):
            base, label = less_reference(reference, metric)
            lines = [(list(map(x_of, names)),
                      [t_interval(Contrast(metric, name, minus=base).of(results.numbers)) for name in names],
                      {"label": line} | style_at(place)) for place, (line, names) in enumerate(names_of.items())]
            log_lines(axes, lines, ticks, x_label, label)
        fig.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6)
        return fig
    return draw


def heatmaps(results, share_of, bar_label, axis_label):
    """Shares as colours, for the first run of each setting with experts (down) and its MoE layers (across).

    share_of(run, index of the layer) -> (x of the columns, share (rows, columns), {row: name}, title).
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
        share = _row_shares([row["layers"][place]["load"] for row in run.log]).T  # (E, steps)
        last = len(share) - 1
        return ([row["step"] for row in run.log], share, {0: "expert 0", last: f"expert {last}"},
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
