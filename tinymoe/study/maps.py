"""Figures whose cells are colours: loads, domains and bytes by expert, phase diagrams, text on colours of experts.

Ratios are drawn as log2, on a scale that is white at 1 and whose low end is the darker one, also in grey.
"""

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ..files import load_arrays
from ..training.evaluation import first_choices
from .figures import captioned, layer_grid, panel_grid
from .palette import DIVERGING, EXPERTS, is_light, symbol
from .quantities import in_row

ROUTE_BYTES = 72  # of each domain, in the figure of routes
RATIO = Normalize(-3, 3)  # of log2(ratio)
RATIOS = LinearSegmentedColormap.from_list("ratios", DIVERGING).with_extremes(under="black")


def diagram(places, x_label, y_label):
    """Phase diagrams of the effective experts: a panel for each number of experts, a cell for each pair of two fields.

    places: {setting id: (number of experts, x, y)}, in ascending order.
    """
    @captioned(f"Effective experts at the end of training, the mean over layers and seeds, by {x_label} and {y_label}: "
               "white is half of the experts, blue is fewer. A question mark: the half lies within the 95% interval.",
               settings=places)
    def draw(results):
        sizes = list(dict.fromkeys(most for most, *_ in places.values()))
        fig, (axes_of,) = panel_grid(1, len(sizes), 2.6)
        for axes, size in zip(axes_of, sizes):
            found = {(y, x): results.interval("effective_experts", name)
                     for name, (most, x, y) in places.items() if most == size}
            ys, xs = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
            shares = np.reshape([found[y, x].mean / size for y in ys for x in xs], (len(ys), len(xs)))
            axes.pcolormesh(shares, vmin=0, vmax=1, cmap=RATIOS, edgecolor="white")
            for (row, column), share in np.ndenumerate(shares):
                one = found[ys[row], xs[column]]
                axes.text(column + 0.5, row + 0.5, f"{one.mean:.1f}{'?' if one.low < size / 2 < one.high else ''}",
                          ha="center", va="center", color="black" if is_light(to_hex(RATIOS(share))) else "white")
            axes.set_xticks(np.arange(len(xs)) + 0.5, [f"{x:g}" for x in xs])
            axes.set_yticks(np.arange(len(ys)) + 0.5, [f"{y:g}" for y in ys])
            axes.set(xlabel=x_label, ylabel=y_label, title=f"{size} experts")
            axes.grid(False)
        bar = fig.colorbar(ScalarMappable(Normalize(0, 1), RATIOS), ax=axes_of, label="effective experts / experts")
        bar.set_ticks([0, 0.5, 1])
        return fig
    return draw


def ratio_map(axes, ratios, x, rows):
    """Draw ratios (rows, columns) as colours of their log2, the first row on top; rows: {index: name}."""
    axes.pcolormesh(x, np.arange(len(ratios)), np.log2(np.maximum(ratios, 1e-9)), shading="nearest", norm=RATIO,
                    cmap=RATIOS)
    axes.set_yticks(list(rows), rows.values())
    axes.set_ylim(len(ratios) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(False)


def ratio_bar(fig, grid, label):
    """The colour bar of `ratio_map` beside the panels."""
    bar = fig.colorbar(ScalarMappable(RATIO, RATIOS), ax=grid, aspect=40, pad=0.01, label=label, extend="min")
    bar.set_ticks(range(-3, 4), labels=["1/8", "1/4", "1/2", "1", "2", "4", "8"])


def ratio_maps(results, ratios_of, bar_label, axis_label):
    """A `ratio_map` for the first run of each setting with experts (down) and its MoE layers (across).

    ratios_of(run, index of the layer) -> (ratios (rows, columns), x of the columns, {row: name}, title).
    """
    names = results.with_experts
    if not names:
        return None
    fig, grid, layers = layer_grid(results, len(names), 0.8, sharey=False)
    for row, run in zip(grid, (results.groups[name][0] for name in names)):
        row[0].set_ylabel(run.run_id.replace("-seed", "\nseed "), rotation=0, ha="right", va="center",
                          fontweight="bold")
        for place, layer in enumerate(run.final["layers"]):
            axes = row[layers.index(layer["layer"])]
            *drawn, above = ratios_of(run, place)
            ratio_map(axes, *drawn)
            axes.tick_params(labelleft=place == 0)
            axes.set_title(above, fontsize=7, pad=2)
    ratio_bar(fig, grid, bar_label)
    fig.supxlabel(axis_label, fontsize=8)
    return fig


def row_shares(counts):
    counts = np.array(counts, dtype=float)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def over_column_means(counts):
    """p(column | row) / p(column) of a table of counts (rows, columns), with every row of equal weight."""
    share = row_shares(counts)
    return share / np.maximum(share.mean(axis=0), 1e-9)


@captioned("Load of each expert over the training steps, first seed: white is the fair share, orange more, blue less, "
           "black below an eighth of it. Equal scores, such as those of a router that starts at 0, choose the first "
           "experts.")
def expert_load(results):
    """The load of each expert over the fair share, over steps."""
    def ratios_of(run, place):
        ratios = row_shares([row["layers"][place]["load"] for row in run.log]).T  # (E, steps)
        last = len(ratios) - 1
        return (ratios * len(ratios), [row["step"] for row in run.log], {0: "expert 0", last: f"expert {last}"},
                f"layer {run.final['layers'][place]['layer']}")

    return ratio_maps(results, ratios_of, "load / fair share", "training step")


@captioned("How often each domain uses each expert, over how often all do, at the end of training, first seed: "
           "white is as often, orange more, blue less, black below an eighth, or an expert without bytes; above a "
           "panel: domain information.")
def domain_by_expert(results):
    """p(expert | domain) / p(expert) at the end, and the information between expert and domain above its null."""
    def ratios_of(run, place):
        layer = run.final["layers"][place]
        ratios = over_column_means(layer["domain_load"])  # (domains, E)
        return (ratios, np.arange(ratios.shape[1]), dict(enumerate(run.config["domains"])),
                f"layer {layer['layer']}: {in_row(run.final, 'mi_excess', place):.3f} nats")

    return ratio_maps(results, ratios_of, "use by the domain / by all", "expert")


def routes(name):
    """Text of each domain, each byte on the colour of its expert with the largest gate, in each MoE layer.

    It is of the setting's first seed whose routings were kept, and not drawn if none were.
    """
    @captioned(f"The routes of one run of config {name} at the end of training: the colour and the number below a byte "
               "are its expert with the largest gate.", settings=[name])
    def draw(results):
        kept = [(run.run_id, path) for run in results.groups.get(name, ()) if (path := results.routings(run))]
        if not kept:
            return None
        (run_id, path), *_ = kept
        arrays, header = load_arrays(path, "routings")
        layers, windows = header["model"]["moe_layers"], arrays["ids"].shape
        first = first_choices(arrays["chosen"], arrays["gates"]).reshape(len(layers), *windows)
        fig, grid = panel_grid(len(header["names"]), 1, 0.3 * len(header["names"]) * (len(layers) + 1))
        for domain, (axes, said) in enumerate(zip(grid[:, 0], header["names"])):
            window = int(np.argmax(arrays["domain"] == domain))
            text = arrays["ids"][window, :ROUTE_BYTES].tolist()
            for y, experts in enumerate(first[:, window, :ROUTE_BYTES]):
                for x, (byte, expert) in enumerate(zip(text, experts.tolist())):
                    draw_byte(axes, x, y, byte, expert)
            axes.set(xlim=(0, len(text)), ylim=(len(layers), 0), xticks=[])
            axes.set_title(said, loc="left")
            axes.set_yticks(np.arange(len(layers)) + 0.5, [f"layer {layer}" for layer in layers])
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.grid(False)
        grid[0, 0].set_title(run_id, loc="right")
        return fig
    return draw


def draw_byte(axes, x, y, byte, expert):
    """One byte on its expert's colour, with the expert's number below it; on white for -1, no expert.

    The layout of the figure leaves it out, because hundreds of bytes would take most of its time.
    """
    colour = EXPERTS[expert % len(EXPERTS)] if expert >= 0 else "#FFFFFF"
    axes.add_artist(Rectangle((x, y), 1, 0.94, color=colour, lw=0, in_layout=False))
    ink = "black" if is_light(colour) else "white"
    centred = {"ha": "center", "va": "center", "color": ink, "in_layout": False}
    axes.text(x + 0.5, y + 0.32, symbol(byte), fontsize=6, family="monospace", **centred)
    axes.text(x + 0.5, y + 0.76, str(expert) if expert >= 0 else "–", fontsize=3.5, **centred)
