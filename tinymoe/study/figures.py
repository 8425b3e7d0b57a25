"""The kinds of figure, each a function of Results or a function that makes one; drawn from result rows.

A setting keeps one colour and one marker in all figures of its experiment, so that figures also read in grey. With more
settings than colours, those of the primary comparisons have colours, and names stand at the lines and points. Points
are means over seeds with 95% intervals, small marks the seeds. Lines over steps are means; bands show the range of the
seeds. Dashed lines and hollow marks are leaky: measured with a route that may depend on later bytes.
"""

import io
import math
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ..files import write_atomically
from ..training.trainer import TRAINING_NUMBERS
from .experiment import Experiment
from .markdown import joined
from .palette import COLOURS, MARKERS
from .quantities import LOSS, in_row, quantity, title
from .report import mark
from .results import Results
from .statistics import MARGIN, VERDICTS, Contrast, t_interval
from .wording import CURVES, INTERVALS

STYLE = {
    "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.5, "axes.axisbelow": True,
    "lines.linewidth": 1.2, "lines.markersize": 3.5, "lines.solid_capstyle": "butt",  # intervals end where they end
    "text.parse_math": False,  # a name with dollar signs is no formula
}
DOUBLE = 7.0  # width of two columns, in inches
GREY, SHADE = "#777777", "#DDDDDD"
HOLLOW = {"linestyle": "--", "markerfacecolor": "white"}
LEAKY_KEY = Line2D([], [], color=GREY, marker="o", label="hollow: leaky (route may see later bytes)", **HOLLOW)
APART = 1.07  # by which points at one place of a logarithmic axis are moved apart
SEED_KEYS = [Line2D([], [], color=GREY, marker="o", markersize=5, label="mean and 95% interval"),
             Line2D([], [], color=GREY, marker="|", linestyle="none", label="one seed")]
MARGIN_KEY = Patch(color=SHADE, label="within the margin")


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
            if fig is None:
                continue
            if not isinstance(fig, Figure):
                raise ValueError(f"figure {name}: its function must return a Figure, not {fig!r:.80}")
            paths.append(save(fig, results.folder / "figures" / f"{name}.png", mark(results, name)))
    return paths


def save(fig: Figure, path, text: str | None = None, follow: bool = False) -> Path:
    """Write a figure as PNG: the same bytes for the same figure. text: for its metadata. follow: see files.py."""
    image = io.BytesIO()
    fig.savefig(image, format="png", dpi=200, metadata={"Software": None, "Description": text})
    write_atomically(path, image.getvalue(), follow)
    return path


def captioned(text, metrics=(), settings=()):
    """A decorator that gives a drawing function its caption, which stands under the figure.

    text: a str, or a function of Results where the caption depends on the runs; `draw.caption` is always a function.
    metrics, settings: the quantities and the ids of settings that it needs (None counts for nothing), so that an
    Experiment can refuse unknown ones.
    """
    def decorate(draw):
        draw.caption, draw.metrics = text if callable(text) else lambda results: text, metrics
        draw.settings = [name for name in settings if name is not None]
        return draw
    return decorate


def listed(metrics, reference=None, results=None) -> str:
    """The titles of metrics as the beginning of a sentence; of losses with the reference whose loss is taken off."""
    said = [less_reference(reference, metric, results)[1].replace("\n", " ") for metric in metrics]
    text = joined(said)
    return text[0].upper() + text[1:]


def of_seeds(results, words) -> str:
    """What a caption says of several seeds, after a colon: `words`. One seed has no bands and no intervals."""
    return f": {words}" if results.several else ""


def measured_on(results, metrics) -> str:
    """What the caption of curves says of their points: of training, or measured on less text than the tables."""
    few, many = (row["validation_tokens"] for row in (results.runs[0].log[-1], results.runs[0].final))
    trained = [f"the {quantity(metric).words}" for metric in metrics if metric in TRAINING_NUMBERS]
    said = f" A point of {joined(trained)} is the mean over the steps since the point before." if trained else ""
    if few != many:
        said += f" {'Another' if trained else 'A'} point is measured on {few:,} validation bytes, a number of the " \
            f"tables on {many:,}."
    return said


def style_of(experiment: Experiment, name: str) -> dict:
    """Colour and marker of a setting by its place in the experiment, or in its primary comparisons; else grey."""
    ids = [s.id for s in experiment.settings]
    if len(ids) > len(COLOURS):
        ids = list(dict.fromkeys(id for one in experiment.primary for id in one.contrast.settings))
    return style_at(ids.index(name)) if name in ids else {"color": GREY, "marker": "."}


def style_at(place: int) -> dict:
    """Colour and marker of a place in a list; a colour that comes again has another marker."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]}


def panel_grid(n_rows, n_columns, height, **options):
    fig = Figure(figsize=(DOUBLE, height), layout="constrained")
    return fig, fig.subplots(n_rows, n_columns, squeeze=False, **options)


def layer_grid(results, n_rows, height, sharey):
    """(Figure, panels (n_rows, MoE layers), the numbers of the layers), which are named above the first row."""
    layers = sorted({layer["layer"] for runs in results.groups.values() for layer in runs[0].final["layers"]})
    fig, grid = panel_grid(n_rows, len(layers), 1.0 + height * n_rows, sharex=True, sharey=sharey)
    for axes, layer in zip(grid[0], layers):
        axes.set_title(f"layer {layer}")
    return fig, grid, layers


def add_legend(fig, results, names, *extra):
    """One legend below the panels, where it can cover no data; `extra` are handles after those of the settings."""
    handles = [Line2D([], [], label=fill(results.label(name), 34), **style_of(results.experiment, name))
               for name in names]
    if handles := [*handles, *extra]:
        n_rows = math.ceil(len(handles) / (3 if results.experiment.adjustable else 5))
        fig.legend(handles=handles, loc="outside lower center", ncols=math.ceil(len(handles) / n_rows))


def name_points(axes, results, points):
    """Names in the right margin, with a thin line to each of the points {setting id: (x, y)}; no two overlap."""
    points = {name: at for name, at in points.items() if np.isfinite(at).all()}
    if not points:
        return
    gap = 8.5 / (72 * axes.figure.get_size_inches()[1] * 0.75)  # the height of a name as a share of the axes
    low, high = axes.get_ylim()
    order = sorted(points, key=lambda name: points[name][1])
    places = [(points[name][1] - low) / (high - low) for name in order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    places[-1] = min(places[-1], 1)
    for i in reversed(range(len(places) - 1)):
        places[i] = min(places[i], places[i + 1] - gap)
    for name, y in zip(order, places):
        colour = style_of(results.experiment, name)["color"]
        axes.annotate(name, points[name], (1.05, y), textcoords="axes fraction", va="center", fontsize=6.5,
                      color=colour, arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.4, "shrinkA": 1,
                                                "linestyle": ":", "relpos": (0, 0.5)})


def less_reference(reference, metric, results=None):
    """(reference or None, title of the axis): only losses, which lie close together, are drawn less the reference's.

    results: where the reference must have runs; None where it names one of each setting's own.
    """
    base = reference if quantity(metric).is_loss and (not results or reference in results.groups) else None
    return base, title(metric) + (f"\nminus that of {base}" if base else "")


def half_widths(intervals):
    """For error bars; 0 where there is one seed."""
    return np.nan_to_num([one.half for one in intervals])


def points_of(results, name, metric, *, reference=None, layer=None):
    """(steps, numbers (steps, seeds)) of a setting's log. A grey setting has its mean over the seeds, (steps, 1).

    reference: subtract its numbers, seed by seed. layer: index of one MoE layer, None for the mean.
    """
    logs = {run.run_id: {row["step"]: row for row in run.log}
            for setting in (name, reference) if setting for run in results.groups[setting]}

    def at(step):
        return Contrast(metric, name, minus=reference).of(lambda _, setting: {
            run.seed: in_row(logs[run.run_id][step], metric, layer) for run in results.groups[setting]})

    common = sorted(set.intersection(*map(set, logs.values())))  # none for runs of other lengths
    found = {step: values for step in common if len(values := at(step)) and np.isfinite(values).all()}
    steps, numbers = np.array(list(found)), np.array(list(found.values()))
    grey = len(steps) and style_of(results.experiment, name)["color"] == GREY
    return steps, numbers.mean(axis=1, keepdims=True) if grey else numbers


def curve(axes, results, name, metric, *, reference=None, layer=None, **options):
    """Draw what `points_of` returns, and return it: the mean and the range over the seeds."""
    steps, values = points_of(results, name, metric, reference=reference, layer=layer)
    style, every = style_of(results.experiment, name), max(1, len(steps) // 8)
    offset = list(results.groups).index(name) % every  # so that markers of close curves do not hide each other
    if len(steps):
        axes.plot(steps, values.mean(axis=1), markevery=(offset, every), **style | options)
        axes.fill_between(steps, values.min(axis=1), values.max(axis=1), color=style["color"], alpha=0.12, lw=0)
    return steps, values


def frame_of(metric, curves):
    """(low, high) of the axis of a loss over the steps, from [(steps, numbers)] after the first fifth of the steps,
    before which differences are many times as large; None for another metric."""
    late = [values[steps >= steps[-1] / 5] for steps, values in curves if len(steps)]
    if not late or not has_frame(metric):
        return None
    low, high = min(map(np.min, late)), max(map(np.max, late))
    return low - 0.05 * (high - low) - 1e-6, high + 0.05 * (high - low) + 1e-6


def has_frame(metric):
    """Whether the axis of a metric over the steps is that of `frame_of`: a loss or a perplexity."""
    return "perplexity" in metric or quantity(metric).is_loss


def over_steps(reference, *metrics, names=None):
    """A panel for each metric, a curve for each setting (or for those named); losses less the reference setting's."""
    outside = " The first evaluations may lie outside the frame." if any(map(has_frame, metrics)) else ""

    @captioned(lambda r: f"{listed(metrics, reference, r)}, over the training steps{of_seeds(r, CURVES)}."
                         f"{measured_on(r, metrics)}{outside}", metrics, [reference, *(names or ())])
    def draw(results):
        shown, keys = names or list(results.groups), []
        many = len(shown) > len(COLOURS)
        fig, (axes_of,) = panel_grid(1, len(metrics), 3.4 if many else 2.9)
        for axes, metric in zip(axes_of, metrics):
            base, label = less_reference(reference, metric, results)
            curves = {name: curve(axes, results, name, metric, reference=base) for name in shown}
            leaky = [name for name in shown if metric == LOSS and results.groups[name][0].leaky]
            hollow = [curve(axes, results, name, "val_cross_entropy", reference=base, **HOLLOW) for name in leaky]
            keys = [LEAKY_KEY] if leaky else keys
            if frame := frame_of(metric, [*curves.values(), *hollow]):
                axes.set_ylim(*frame)
            if many:
                name_points(axes, results, {name: (steps[-1], values[-1].mean())
                                            for name, (steps, values) in curves.items() if len(steps)})
            axes.set(xlabel="training step", ylabel=label if "\n" in label else fill(label, 34))
        add_legend(fig, results, () if many else shown, *keys)
        return fig
    return draw


def by_layer(*metrics):
    """Curves over steps: a row of panels for each metric that is not always 0, a column for each MoE layer."""
    def shown_of(results):
        logs = [row for name in results.with_experts for run in results.groups[name] for row in run.log]
        return [metric for metric in metrics if any(in_row(row, metric) for row in logs)] or metrics[:1]

    @captioned(lambda r: f"{listed(shown_of(r))}, for each MoE layer over the training steps{of_seeds(r, CURVES)}."
                         f"{measured_on(r, metrics)}", metrics)
    def draw(results):
        names, shown = results.with_experts, shown_of(results)
        if not names:
            return None
        fig, grid, layers = layer_grid(results, len(shown), 1.7, sharey="row")
        own = {name: [layer["layer"] for layer in results.groups[name][0].final["layers"]] for name in names}
        for row, metric in zip(grid, shown):
            for axes, layer in zip(row, layers):
                for name in (name for name in names if layer in own[name]):
                    curve(axes, results, name, metric, layer=own[name].index(layer))
                axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            row[0].set_ylabel(fill(title(metric), 24))
        for axes in grid[-1]:
            axes.set_xlabel("training step")
        add_legend(fig, results, names)
        return fig
    return draw


def at_the_end(*metrics, reference=None, reference_of=None, experts_only=False):
    """A panel for each metric: the settings from top to bottom, a leaky number with a hollow mark below the causal one.

    Losses are less those of the reference setting, if there is one. reference_of: setting id -> id of its reference;
    `reference` then says in words which that is. experts_only: only settings with experts, no figure without any.
    """
    def chosen_of(results):
        """The settings, and the metrics of which one of them has a number."""
        chosen = results.with_experts if experts_only else list(results.groups)
        return chosen, [metric for metric in metrics if any(np.isfinite(results.mean(metric, name)) for name in chosen)]

    @captioned(lambda r: f"{listed(chosen_of(r)[1] or metrics, reference, None if reference_of else r)}, at the end of "
                         "training, for each setting.", metrics, () if reference_of else [reference])
    def draw(results):
        chosen, shown = chosen_of(results)
        if not shown:
            return None
        fig, (axes_of,) = panel_grid(1, len(shown), 1.0 + 0.3 * len(chosen), sharey=True)
        keys = dict.fromkeys(SEED_KEYS if results.several else ())
        for axes, metric in zip(axes_of, shown):
            base, label = less_reference(reference, metric, None if reference_of else results)
            if base and results.several:
                margin = margin_of(results, metric)
                axes.axvspan(-margin, margin, color=SHADE)
                keys[MARGIN_KEY] = None
            for y, name in enumerate(chosen):
                own = reference_of(name) if base and reference_of else base
                end_mark(axes, results, name, metric, y=y, reference=own)
                if metric.startswith("causal_") and results.groups[name][0].leaky:
                    end_mark(axes, results, name, metric.replace("causal", "val"), y=y + 0.3, reference=own,
                             markerfacecolor="white")
                    keys[LEAKY_KEY] = None
            axes.set(xlabel=fill(label, 72 // len(shown)), ylim=(len(chosen) - 0.4, -0.6))
            axes.set_yticks(range(len(chosen)), [fill(results.label(name), 34) for name in chosen])
            axes.xaxis.set_major_locator(MaxNLocator(4))
        add_legend(fig, results, (), *keys)
        return fig
    return draw


def margin_of(results, metric) -> float:
    """The margin of the primary comparison of a loss, the smallest of several; the default without one."""
    return min((one.margin for one in results.experiment.primary if one.contrast.metric == metric), default=MARGIN)


def end_mark(axes, results, name, metric, y, reference=None, **options):
    """Mean, interval and seeds of one setting at height y, less those of the reference if there is one."""
    seeds = Contrast(metric, name, minus=reference).of(results.numbers)
    interval, style = t_interval(seeds), style_of(results.experiment, name)
    axes.plot([interval.low, interval.high], [y, y], color=style["color"], lw=1.5)
    if results.several:
        beside = 0.2 if "markerfacecolor" in options else -0.2  # of a hollow mark below, else above the line
        axes.plot(seeds, [y + beside] * len(seeds), "|", color=style["color"], ms=4)
    axes.plot(interval.mean, y, linestyle="none", **style | {"markersize": 5} | options)
    if math.isnan(interval.mean):
        axes.annotate("no number", (0.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=6.5, color=GREY)


def forest(found: list[Results]) -> Figure | None:
    """The primary differences of several experiments, by verdict, in units of their margins, which are shaded: a bar
    for the 95% interval, a tick for each seed. The axis is linear up to two margins and logarithmic beyond."""
    rows = sorted(((results.experiment.name, one) for results in found for one in results.primary if one.tested),
                  key=lambda row: VERDICTS.index(row[1].verdict))
    if not rows:
        return None
    fig, ((axes,),) = panel_grid(1, 1, 1.0 + 0.32 * len(rows))
    axes.axvspan(-1, 1, color=SHADE)
    for y, (_, one) in enumerate(rows):
        colour = {"different": COLOURS[1], "same": COLOURS[0]}.get(one.verdict, GREY)
        interval = one.interval
        axes.plot(np.array([interval.low, interval.high]) / one.margin, [y, y], color=colour, lw=1.5)
        axes.plot(np.array(one.values) / one.margin, [y - 0.25] * one.n, "|", color=colour, ms=4)
        axes.plot(interval.mean / one.margin, y, "o", color=colour)
        axes.annotate(one.verdict, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=7)
    axes.set_xscale("symlog", linthresh=2)
    drawn = [x / one.margin for _, one in rows for x in (*one.values, one.interval.low, one.interval.high)]
    below, above = ([x for before, x in pairwise((0, 1, 2, 5, 10, 20, 50, 100, 1000, 10_000)) if before < max(end, 1)]
                    for end in (-min(drawn), max(drawn)))  # up to the first tick beyond the data
    ticks = [*(-x for x in reversed(below)), 0, *above]
    axes.set_xticks(ticks, [str(x).replace("-", "−") for x in ticks])
    axes.minorticks_off()
    axes.set(xlabel="(first − second) / margin; left of 0 the first is lower, which for a loss is better",
             xlim=(ticks[0], ticks[-1]), ylim=(len(rows) - 0.4, -0.6))
    fig.legend(handles=[*SEED_KEYS, MARGIN_KEY], loc="outside lower center", ncols=3)
    axes.set_yticks(range(len(rows)), [fill(f"{name}: {one.contrast}{_what(one)}".replace("`", ""), 52)
                                       for name, one in rows])
    return fig


def _what(found):
    one = quantity(found.contrast.metric)
    return "" if one.is_loss else f" ({one.words}; margin {found.margin:g})"


def draw_forest(found: list[Results], published) -> Path | None:
    """Draw `forest` into published/figures/primary.png; None without a tested primary comparison."""
    with default_style():
        fig, path = forest(found), Path(published, "figures", "primary.png")
        return save(fig, path) if fig else None


def one_against_other(x, y):
    """A point for each setting, with its intervals: metric y against metric x."""
    @captioned(lambda r: f"{listed([y])} against {title(x)} at the end of training{of_seeds(r, INTERVALS)}.", (x, y))
    def draw(results):
        many, points = len(results.groups) > len(COLOURS), {}
        fig, ((axes,),) = panel_grid(1, 1, 3.4)
        for name in results.groups:
            a, b = results.interval(x, name), results.interval(y, name)
            points[name] = a.mean, b.mean
            axes.errorbar(a.mean, b.mean, xerr=half_widths([a]), yerr=half_widths([b]), linestyle="none",
                          elinewidth=0.8, capsize=0, **style_of(results.experiment, name) | {"markersize": 5})
        axes.set(xlabel=title(x), ylabel=title(y))
        if many:
            name_points(axes, results, points)
        add_legend(fig, results, () if many else results.groups)
        return fig
    return draw


def log_lines(axes, lines, ticks, x_label, y_label):
    """Lines through intervals over a logarithmic axis, moved apart sideways so that none hides another.

    lines: [(x values, Intervals, options of the line)].
    """
    for place, (x, found, options) in enumerate(lines):
        x = np.array(x) * APART ** (place - (len(lines) - 1) / 2)
        axes.errorbar(x, [one.mean for one in found], yerr=half_widths(found), elinewidth=0.8, **options)
    axes.set(xlabel=x_label, ylabel=y_label, xscale="log")
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()


def lines_by(names_of, x_of, x_label, *metrics, reference=None, reference_of=None):
    """A panel for each metric, lines through settings: names_of = {line: setting ids}, x_of(setting id) -> x.

    Losses are less those of the reference setting, if there is one. reference_of: setting id -> id of its reference.
    """
    @captioned(lambda r: f"{listed(metrics, reference, None if reference_of else r)}, by {x_label}, at the end of "
                         f"training{of_seeds(r, INTERVALS)}. Points are moved apart sideways.", metrics,
               [*chain(*names_of.values()), None if reference_of else reference])
    def draw(results):
        fig, (axes_of,) = panel_grid(1, len(metrics), 2.8)
        ticks, keys = sorted({x_of(name) for names in names_of.values() for name in names}), {}
        for axes, metric in zip(axes_of, metrics):
            base, label = less_reference(reference, metric)
            if base and results.several:
                margin = margin_of(results, metric)
                axes.axhspan(-margin, margin, color=SHADE)
                keys[MARGIN_KEY] = None
            lines = []
            for place, (line, names) in enumerate(names_of.items()):
                of_each = [Contrast(metric, name, minus=base and reference_of(name) if reference_of else base)
                           for name in names]
                style = {"label": line} | style_at(place)
                if metric.startswith("val_") and any(results.groups[name][0].leaky for name in names):
                    style, keys[LEAKY_KEY] = style | HOLLOW, None
                lines.append((list(map(x_of, names)), [t_interval(one.of(results.numbers)) for one in of_each], style))
            log_lines(axes, lines, ticks, x_label=x_label, y_label=label)
        fig.legend(handles=[*axes.get_legend_handles_labels()[0], *keys], loc="outside lower center", ncols=8)
        return fig
    return draw
