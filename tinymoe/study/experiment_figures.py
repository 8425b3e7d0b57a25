"""The kinds of figure that experiments share, each a function of Results.

A setting keeps one colour and one marker within an experiment. Points are means over seeds with 95% intervals, small
marks the seeds; bands over steps are the seeds' range.
"""

from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .figures import COLOURS, DOUBLE, MARKERS
from .report import label
from .results import gap, measure, over_seeds, value


def look(results, name):
    """Colour and marker of a setting, by its place in the experiment; colours come again with another marker."""
    place = list(results.groups).index(name)
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]}


def legend(fig, results, names=None):
    """The settings below the panels."""
    handles = [Line2D([], [], label=name, **look(results, name)) for name in names or results.groups]
    fig.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)))


def over_steps(reference, *metrics, names=None):
    """Curves over the training steps: a panel for each metric, a line for each setting (or for those named).

    Losses, whose curves would lie on one another, are drawn less the reference setting's, seed by seed.
    """
    def draw(results):
        fig = Figure(figsize=(DOUBLE, 2.9), layout="constrained")
        for axes, metric in zip(fig.subplots(1, len(metrics), squeeze=False)[0], metrics):
            relative = metric.endswith("cross_entropy")
            for name in names or results.groups:
                steps, values = series(results, name, metric, reference if relative else None)
                axes.plot(steps, values.mean(axis=0), **look(results, name))
                axes.fill_between(steps, values.min(axis=0), values.max(axis=0), alpha=0.15, lw=0,
                                  color=look(results, name)["color"])
            axes.set(xlabel="training step", ylabel=label(metric) + (f"\nless that of {reference}" if relative else ""))
        legend(fig, results, names)
        return fig
    return draw


def series(results, name, metric, reference):
    """(steps, values (seeds, steps)) of a setting's log, less the reference's of the same seed if there is one.

    Steps that all runs logged with a number.
    """
    def logs(setting):
        return {run.seed: {row["step"]: measure(row, metric) for row in run.log} for run in results.groups[setting]}

    own, other = logs(name), logs(reference) if reference else None
    seeds = [seed for seed in own if other is None or seed in other]
    parts = [own[seed] for seed in seeds] + ([other[seed] for seed in seeds] if other else [])
    steps = [n for n in sorted(set.intersection(*map(set, parts))) if all(np.isfinite(one[n]) for one in parts)]
    return steps, np.array([[own[seed][n] - (other[seed][n] if other else 0) for n in steps] for seed in seeds])


def at_the_end(*metrics, names=None):
    """A panel for each metric: the settings from top to bottom, mean and interval, every seed a small mark."""
    def draw(results):
        chosen = names or list(results.groups)
        fig = Figure(figsize=(DOUBLE, 0.8 + 0.26 * len(chosen)), layout="constrained")
        for axes, metric in zip(fig.subplots(1, len(metrics), squeeze=False, sharey=True)[0], metrics):
            for y, name in enumerate(chosen):
                runs, style = results.groups[name], look(results, name)
                interval = over_seeds(runs, metric)
                axes.plot([interval.low, interval.high], [y, y], color=style["color"], lw=1.5)
                axes.plot([value(run, metric) for run in runs], [y - 0.25] * len(runs), "|", color=style["color"], ms=4)
                axes.plot(interval.mean, y, linestyle="none", markersize=5, **style)
            axes.set(xlabel=fill(label(metric), 72 // len(metrics)), ylim=(len(chosen) - 0.4, -0.6))
            axes.set_yticks(range(len(chosen)), chosen)
            axes.xaxis.set_major_locator(MaxNLocator(5))
        return fig
    return draw


def one_against_other(x, y):
    """A point for each setting, with its intervals: metric y against metric x."""
    def draw(results):
        fig = Figure(figsize=(DOUBLE, 3.2), layout="constrained")
        axes = fig.subplots()
        for name, runs in results.groups.items():
            a, b, style = over_seeds(runs, x), over_seeds(runs, y), look(results, name)
            axes.errorbar(a.mean, b.mean, xerr=np.nan_to_num(a.half), yerr=np.nan_to_num(b.half), linestyle="none",
                          elinewidth=0.8, capsize=0, **style)
        axes.set(xlabel=label(x), ylabel=label(y))
        legend(fig, results)
        return fig
    return draw


def lines_by(groups_of, x_of, x_label, *metrics, reference=None):
    """A panel for each metric, lines through settings: groups_of = {line: setting ids}, x_of(setting id) -> x.

    Losses are drawn less those of the reference setting, if there is one, seed by seed.
    """
    def draw(results):
        fig = Figure(figsize=(DOUBLE, 2.8), layout="constrained")
        for axes, metric in zip(fig.subplots(1, len(metrics), squeeze=False)[0], metrics):
            relative = reference is not None and metric.endswith("cross_entropy")
            for place, (line, names) in enumerate(groups_of.items()):
                found = [gap(results.groups, metric, name, reference) if relative else
                         over_seeds(results.groups[name], metric) for name in names]
                axes.errorbar([x_of(name) for name in names], [one.mean for one in found], label=line,
                              yerr=np.nan_to_num([one.half for one in found]), elinewidth=0.8,
                              color=COLOURS[place % len(COLOURS)], marker=MARKERS[place % len(MARKERS)])
            axes.set(xlabel=x_label, ylabel=label(metric) + (f"\nless that of {reference}" if relative else ""),
                     xscale="log")
            places = sorted({x_of(name) for names in groups_of.values() for name in names})
            axes.set_xticks(places, [f"{x:g}" for x in places])
            axes.minorticks_off()
        handles, labels = axes.get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
        return fig
    return draw
