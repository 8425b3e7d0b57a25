"""Which expert each byte goes to, in the terminal and as one HTML page (its template is view.html)."""

import base64
import json
import math
import os
from pathlib import Path

import click
import numpy as np

from ..autograd.tensor import no_grad
from ..files import CheckpointError, load_arrays
from ..model.config import ModelConfig
from ..model.generate import require_finite
from ..moe import metrics
from ..moe.routers import ROUTERS
from ..moe.routing import merge
from ..study.palette import EXPERTS, INKS, is_light, rgb, symbol
from ..study.probes import observed
from ..study.rows import COMPACT
from ..training.data import CorpusError
from ..training.evaluation import RECORDED, first_choices, snapshot
from ..training.loading import corpus_of, execute_recorded_of, load_model
from ..training.run_folder import FILES, ROUTINGS, saved_routings

BARS = "▁▂▃▄▅▆▇█"
MAX_WINDOWS = 8  # shown of a user's text
DOCUMENTS = ("FINDINGS.md", "summary.csv", "report.html")  # of results
MAX_VALUES = 900_000  # probabilities in a page, so that it stays below 3 MB; also bytes of the last step's outputs


def note(config):
    """Sentences on where a route depends on more than its prefix; "" for a causal router without a capacity limit."""
    said = []
    for name in config.routers:
        causal, causal_training = ROUTERS[name].causal_with(config.options_of(name))
        if not causal:
            said.append(f"{name} looks at later bytes too, so a byte's expert may depend on them.")
        elif not causal_training:
            said.append(f"{name} looks at later bytes too while training.")
    if config.capacity_factor is not None:
        said.append("Which bytes lose an expert to the capacity limit depends on the whole batch.")
    return " ".join(said)


@np.errstate(all="ignore")  # numbers that are not finite are found below
def prefix_routings(model, text):
    """One Routing of the N bytes of text (bytes) for each MoE layer, routed on the prefix alone.

    The model sees one window of seq_len bytes at a time.
    """
    by_window, ids = [], np.frombuffer(text, np.uint8).astype(np.int64)[None]
    with no_grad():
        for start in range(0, len(text), model.config.seq_len):
            window = ids[:, start:start + model.config.seq_len]
            by_window.append(model.forward(window, rng=np.random.default_rng([0, start]), causal=True).routings)
    return _finite([merge(routings) for routings in zip(*by_window)])


def _finite(routings):
    """The same Routings. Raises CheckpointError where a number of theirs is not finite."""
    for routing in routings:
        require_finite(routing.probs.data)
        require_finite(routing.gate.data)
    return routings


def lines(text, routing, colour, width, gate=False, entropy=False):
    """Yield the lines of one layer: the text, and below each byte the number of its first expert, read downwards.

    gate: add bars for the gate of the first choice. entropy: add bars for the entropy of the router's probabilities, as
    a share of ln E.
    """
    n_experts, gates = routing.n_experts, routing.to_dense().data
    first = first_choices(routing.mask(), gates)
    digits = len(str(n_experts - 1))
    numbers = [f"{e:{digits}}" if e >= 0 else "-".rjust(digits) for e in first]
    rows = [("expert" if d == 0 else "", [number[d] for number in numbers]) for d in range(digits)]
    if gate:
        rows.append(("gate", [_bar(g) if e >= 0 else " " for g, e in zip(gates.max(axis=1), first)]))
    if entropy:
        highest = max(math.log(n_experts), 1e-9)
        rows.append(("entropy", [_bar(h / highest) for h in metrics.entropy(routing.probs.data)]))
    cells = [_coloured(symbol(byte), e) if colour and e >= 0 else symbol(byte) for byte, e in zip(text, first)]
    step = max(8, width - 8)
    for start in range(0, len(text), step):
        for name, row in [("text", cells), *rows]:
            yield f"{name:8}" + "".join(row[start:start + step])
        yield ""


def load_lines(routing):
    """Yield the lines of one layer's histogram: bytes of each expert, and how many bytes have how many experts."""
    load, digits, counts = routing.load, len(str(routing.n_experts - 1)), np.bincount(routing.coverage)
    for e, n in enumerate(load.tolist()):
        bar = "█" * round(40 * n / max(1, load.max()))
        yield f"expert {e:>{digits}}  {bar:40} {n:6}  {n / max(1, load.sum()):6.1%}"
    counted = (f"{k} for {n} byte{'s' if n > 1 else ''}" for k, n in enumerate(counts) if n)
    yield f"experts of a byte: {', '.join(counted)}"
    yield ""


def _bar(share):
    return BARS[int(np.clip(share * len(BARS), 0, len(BARS) - 1))]


def _coloured(character, expert):
    colour = EXPERTS[expert % len(EXPERTS)]
    return click.style(character, fg="black" if is_light(colour) else "bright_white", bg=rgb(colour))


def page(folder, text=None):
    """The HTML page of a run folder, as text.

    It shows the routings that were saved while training. If there are none, or for the first bytes of a file `text`, it
    shows what the last checkpoint does. Raises CheckpointError, CorpusError or OSError if there is nothing to show.
    """
    paths = [] if text is not None else saved_routings(folder)
    execute_recorded_of(folder)
    steps = [load_arrays(path, "routings") for path in paths] or [_of_checkpoint(folder, text)]
    template = Path(__file__).with_name("view.html").read_text(encoding="utf-8")
    try:
        data = json.dumps(_data(steps) | _inside(folder, steps[-1][0]), allow_nan=False)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{Path(folder, ROUTINGS)} holds routings of another version or of several runs "
                              f"({type(error).__name__}): move it away") from None
    for character in "<>&":  # a text must not end the script element
        data = data.replace(character, f"\\u{ord(character):04x}")
    return template.replace("__DATA__", data)


def belongs_to_a_run(path):
    """Whether a file at this path would replace one of a run, of results, or of their documents. Follows links."""
    place = Path(os.path.realpath(path))
    return (place.name in (*FILES, ".lock", COMPACT, *DOCUMENTS) or place.name.startswith(".lease")
            or place.parent.name == ROUTINGS)


@np.errstate(all="ignore")
def _of_checkpoint(folder, text):
    """(arrays, header) of what the last checkpoint does, in the form of a file of saved routings."""
    model = load_model(folder)
    length = model.config.seq_len
    if text is not None:
        names, ids = ["text"], _windows(text, length)
        domain = np.zeros(len(ids), int)
    else:
        corpus = corpus_of(folder, length)
        names, (ids, _, domain) = corpus.names, corpus.validation(RECORDED, length)
    with no_grad():
        known = domain if text is None else None
        routings = _finite(model.forward(ids, rng=np.random.default_rng([0, 0]), domain=known).routings)
    if not routings:
        raise CorpusError(f"{folder} is a model without a mixture-of-experts layer: it routes nothing")
    header = {"run_id": Path(folder).resolve().name, "model": model.config.to_dict(), "step": None, "names": names}
    return snapshot(ids, domain, [[r] for r in routings]), header


def _windows(path, length):
    """(W, T) of the first bytes of a file: at most MAX_WINDOWS whole windows, or one shorter."""
    with open(path, "rb") as f:
        raw = np.frombuffer(f.read(MAX_WINDOWS * length), np.uint8).astype(np.int64)
    if not len(raw):
        raise CorpusError(f"{path} is empty: give a file with text")
    return raw[:len(raw) // length * length].reshape(-1, length) if len(raw) >= length else raw[None]


def _data(steps):
    """What the page's script reads, ready for JSON. Arrays (L, N, E) of each step are bytes in base64.

    A gate is 0 where the expert is not chosen; otherwise 1 to 255 stands for the lowest to the largest gate of the
    page, the lowest being 0 unless a gate is negative.
    perByte: experts of a byte, as counted over the last step. limited: whether a byte with fewer than topK experts has
    lost one to the capacity limit, since its router always chooses topK.
    """
    final, header = steps[-1]
    every = math.ceil(len(steps) * final["probs"].size / MAX_VALUES)
    steps = steps[::-every][::-1]  # keeps the last one
    config = ModelConfig.from_dict(header["model"])
    shape = len(config.moe_layers), final["ids"].size, config.n_columns  # (L, N, E)
    for array in (arrays[name] for arrays, _ in steps for name in ("probs", "gates", "chosen")):
        if array.shape != shape or not np.isfinite(array).all():
            raise ValueError(f"an array that is not finite, or of another shape than {shape}")
    low = min(0.0, *(float(arrays["gates"].min()) for arrays, _ in steps))
    scale = max(float(arrays["gates"].max()) for arrays, _ in steps) - low or 1.0
    return {
        "run": header["run_id"], "router": ", ".join(config.routers), "topK": config.top_k, "experts": config.n_columns,
        "perByte": float(final["chosen"].sum(axis=2).mean()), "layers": config.moe_layers,
        "names": header["names"], "domain": final["domain"].tolist(), "length": final["ids"].shape[1],
        "text": _base64(final["ids"]), "colours": EXPERTS, "inks": INKS,
        "note": note(config), "steps": [header["step"] for _, header in steps],
        "limited": config.capacity_factor is not None and all(ROUTERS[r].chooses == "token" and not ROUTERS[r].mean_k
                                                              for r in config.routers),
        "saturation": [[metrics.saturation(*pair) for pair in zip(arrays["chosen"], final["chosen"])]
                       for arrays, _ in steps],
        "probs": [_base64(arrays["probs"].astype(float) * 255) for arrays, _ in steps],
        "gateLow": low, "gateScale": scale,
        "gates": [_base64(np.where(arrays["chosen"], 1 + 254 * (arrays["gates"].astype(float) - low) / scale, 0))
                  for arrays, _ in steps]}


def _inside(folder, final):
    """What the last checkpoint computes at each byte, for the page: {} without a checkpoint, or for a large page.

    logits, sizes: float32 (L, N, E) in base64; a size is the norm of an expert's output. total: (L, N), the norm of
    the weighted sum. They are nan where the last checkpoint, given these windows alone, chooses other experts.
    """
    if 8 * final["probs"].size > MAX_VALUES:
        return {}
    try:
        model = load_model(folder)
    except CheckpointError:
        return {}
    parts = model.moe_parts()
    with observed(*parts) as seen, no_grad():
        model.forward(final["ids"].astype(np.int64), rng=np.random.default_rng([0, 0]), domain=final["domain"])
        sizes, total = zip(*(_outputs(part, x, routing) for part, (routing, x) in zip(parts, seen)))
    same = (np.stack([r.mask() for r, _ in seen]) == final["chosen"]).all(axis=2)
    arrays = {"logits": np.stack([r.logits.data for r, _ in seen]), "sizes": np.stack(sizes), "total": np.stack(total)}
    return {name: _base64(np.where(same if a.ndim == 2 else same[..., None], a, np.nan), np.float32)
            for name, a in arrays.items()}


def _outputs(part, x, routing):
    """(norms (N, E) of the experts' outputs, 0 where not chosen; norms (N,) of the weighted sums)."""
    sizes, n = np.zeros(routing.probs.shape), part.experts.n_experts
    sizes[:, :n] = np.linalg.norm(part.experts.each(x).data, axis=2).T
    sizes[:, n:n + part.n_copy] = np.linalg.norm(x.data, axis=1, keepdims=True)  # the rest are zero experts
    return sizes * routing.mask(), np.linalg.norm(part.weighted_sum(x, routing).data, axis=1)


def _base64(array, dtype=np.uint8):
    """The bytes of an array in base64; rounded, for whole numbers."""
    return base64.b64encode((np.rint(array) if dtype == np.uint8 else array).astype(dtype).tobytes()).decode()
