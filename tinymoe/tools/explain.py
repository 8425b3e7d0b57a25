"""One mixture-of-experts layer worked out on four tokens, with numbers small enough to check with a pencil."""

import inspect
import math
import textwrap

import numpy as np

from ..autograd import functional as F
from ..autograd.tensor import Tensor
from ..model.config import ModelConfig
from ..moe import losses, metrics
from ..moe.layer import MoELayer
from ..moe.routers import RouteContext, TopK, find
from ..moe.routers.token_choice import Scored
from ..moe.routing import limit_capacity

TEXT, SEED = "look", 902
SIZES = {"n_experts": 4, "d_model": 3, "d_ff": 2, "seq_len": len(TEXT)}
FIXED = {"n_heads": 1, "n_layers": 1, "moe_layers": (0,), "activation": "relu", "bias": False}
FREE = ("n_experts", "top_k", "d_model", "d_ff", "router", "router_options")  # what --set may change


def choose_by_hand(logits, k):
    """Gates (N, E) of top-K: the softmax, its k largest entries, divided by their sum."""
    gates = np.zeros_like(logits)
    for n, row in enumerate(logits):
        probs = np.exp(row) / np.exp(row).sum()
        best = np.argsort(-row, kind="stable")[:k]  # the largest logits have the largest probabilities
        gates[n, best] = probs[best] / (probs[best].sum() if k > 1 else 1)
    return gates


def layer_by_hand(x, gates, w1, w2):
    """y (N, D): the outputs of each token's experts, weighted by its gates and summed."""
    y = np.zeros_like(x)
    for n, e in zip(*np.nonzero(gates)):
        y[n] += gates[n, e] * (np.maximum(x[n] @ w1[e], 0) @ w2[e])
    return y


def gradient_by_hand(probs, load):
    """Gradient (N, E) of the balance loss on the logits: E / N * p_ne * (f_e - sum over j of f_j p_nj)."""
    f, (n_tokens, n_experts) = load / load.sum(), probs.shape
    return n_experts / n_tokens * probs * (f - (probs * f).sum(axis=1, keepdims=True))


class Example:
    """A layer with its four tokens. model: fields of FREE. Raises ValueError for others, and where ModelConfig does."""

    def __init__(self, model: dict, seed: int = SEED):
        if unknown := sorted(model.keys() - set(FREE)):
            raise ValueError(f"{', '.join(unknown)}: explain has no such setting; it can set {', '.join(FREE[:-1])} "
                             "and router.NAME, an option of the router")
        top_1 = find(model.get("router", "top_k")).top_1_only
        self.config = ModelConfig(**SIZES | FIXED | {"top_k": 1 if top_1 else 2} | model)
        self.seed = seed
        self.layer = MoELayer(self.config, rng=seed, dtype=np.float64)
        self.router, self.bank = self.layer.router, self.layer.experts
        self.ids = np.frombuffer(TEXT.encode(), np.uint8)[None].astype(np.int64)
        rng = np.random.default_rng(seed)  # the same numbers for every router
        x, weight, self.bank.w1.data, self.bank.w2.data = (_tenths(rng, shape) for shape in (
            (len(TEXT), self.config.d_model), (self.config.d_model, self.config.n_experts), self.bank.w1.shape,
            self.bank.w2.shape))
        x[2] = x[1]  # the two o's: one byte, one hidden state
        self.x, self.weight = Tensor(x), None
        if getattr(getattr(self.router, "weight", None), "shape", None) == weight.shape:
            self.weight = self.router.weight
            self.weight.data = weight
        context = RouteContext(self.ids, rng=np.random.default_rng(0), domain=np.zeros(1, int))
        self.routing = self.router(self.x, context)
        logits, probs = self.routing.logits.data, self.routing.probs.data
        self.linear = self.weight is not None and np.allclose(x @ self.weight.data, logits)
        self.has_logits = self.linear or self.router.learned  # those of a table or of chance only stand for its choice
        self.softmaxed = self.has_logits and np.allclose(F.softmax(Tensor(logits)).data, probs)
        self.labels = [f"{n} {character}" for n, character in enumerate(TEXT)]
        self.experts = [f"e{e}" for e in range(self.config.n_experts)]
        self.dims = [f"d{d}" for d in range(self.config.d_model)]

    def output(self, routing):
        return self.bank(self.x, routing).data

    def by_hand(self, routing):
        return layer_by_hand(self.x.data, routing.to_dense().data, self.bank.w1.data, self.bank.w2.data)

    def ran(self):
        """(N, E) bool, counted: which tokens an expert spoils when its weights are not numbers."""
        spoilt = []
        for e in range(self.config.n_experts):
            kept = self.bank.w2.data
            self.bank.w2.data = np.where(np.arange(len(kept))[:, None, None] == e, np.nan, kept)
            spoilt.append(np.isnan(self.output(self.routing)).any(axis=1))
            self.bank.w2.data = kept
        return np.stack(spoilt, axis=1)

    def parts(self):
        """The parts of the explanation, each a text in Markdown."""
        return (self.tokens(), self.scores(), self.choice(), self.who_ran(), self.one_token(), self.all_tokens(),
                self.balance(), self.capacity(), self.the_other_way())

    def tokens(self):
        c = self.config
        return _part(f"1. {len(TEXT)} tokens", f"""
            N = {len(TEXT)} tokens, the letters of "{TEXT}", reach a layer of E = {c.n_experts} experts. Each has a
            hidden state x of D = {c.d_model} numbers. All given numbers have one decimal, so that a pencil is enough.
            The two o's have the same hidden state.""", _matrix(self.x.data, self.labels, self.dims, "x", 1))

    def scores(self):
        about = f"The router {self.router.name}: {_first_line(self.router)}"
        how = about if self.has_logits else f"{about} It has no logits. Its probabilities:"
        if self.linear:
            how = ("The router multiplies x with its weights W (D, E). The products are the logits, one score for each "
                   "token and expert.")
        if self.softmaxed:
            how += " The softmax makes probabilities of the logits: each row sums to 1."
        elif isinstance(self.router, Scored):
            how += (f" The function {self.router.score} makes other scores of the logits. A probability is such a "
                    "score divided by the sum of its row.")
        elif self.has_logits:
            how += " Its probabilities are not the softmax of its logits."
        matrices = {"W": (self.linear, self.weight, self.dims, 1),
                    "logits": (self.has_logits, self.routing.logits, self.labels, 2),
                    "probability": (True, self.routing.probs, self.labels, 2)}
        return _part("2. What the router says", how, *(
            _matrix(values.data, rows, self.experts, name, digits)
            for name, (shown, values, rows, digits) in matrices.items() if shown))

    def choice(self):
        g, plain = self.routing.to_dense().data, type(self.router) is TopK and not self.config.router_options
        said = "Their probabilities, divided by their sum, are its gates." if plain and self.config.top_k > 1 else ""
        texts = [f"{_first_line(self.router)} {said} The chosen places and their gates are the gate matrix G (N, E); "
                 f"a dot is no assignment. Experts of each token: {_list(self.routing.coverage)}. Sum of its gates: "
                 f"{_list(g.sum(axis=1), '.2f')}.", self.gates(self.routing)]
        if plain:
            hand = choose_by_hand(self.routing.logits.data, self.config.top_k)
            texts += ["The same in plain NumPy:", _source(choose_by_hand),
                      f"Largest difference from G: {_difference(g, hand)}."]
        return _part("3. Who is chosen", *texts)

    def gates(self, routing):
        return _matrix(routing.to_dense().data, self.labels, self.experts, "G", shown=routing.mask())

    def who_ran(self):
        ran = self.ran()
        assert (ran == self.routing.mask()).all()
        return _part("4. Which experts ran", f"""
            Counted, not assumed: one expert at a time gets weights that are not numbers (NaN), and the layer runs
            again. The tokens whose output is spoilt are those that the expert served. Experts that ran for each token:
            {_list(ran.sum(axis=1))}. {ran.sum()} of the {ran.size} pairs of token and expert were computed.""",
                     _matrix(ran, self.labels, self.experts, "ran", 0, shown=ran))

    def one_token(self):
        n = int(self.routing.coverage.argmax())
        x, total, blocks = self.x.data[n], np.zeros(self.config.d_model), []
        for e in np.flatnonzero(self.routing.mask()[n]):
            gate, w1, w2 = self.routing.to_dense().data[n, e], self.bank.w1.data[e], self.bank.w2.data[e]
            hidden = np.maximum(x @ w1, 0)
            total += gate * (hidden @ w2)
            blocks.append(_matrix(w1, self.dims, [f"h{h}" for h in range(len(hidden))], f"W1 of e{e}", 1))
            blocks.append(_matrix(w2, [f"h{h}" for h in range(len(hidden))], self.dims, f"W2 of e{e}", 1))
            blocks.append("\n".join(("    hidden = max(0, x W1) = " + _list(hidden, ".3f"),
                                     "    output = hidden W2    = " + _list(hidden @ w2, ".4f"),
                                     f"    gate {gate:.4f} * output = " + _list(gate * (hidden @ w2), ".4f"))))
        return _part(f"5. Token {self.labels[n]} through its experts", f"""
            x = {_list(x, '.1f')}. An expert is a small network, FFN_e(x) = max(0, x W1) W2. The output of the layer is
            the sum of the outputs of the token's experts, each times its gate.""", *blocks,
                     f"The sum: y = {_list(total, '.4f')}.")

    def all_tokens(self):
        y, hand = self.output(self.routing), self.by_hand(self.routing)
        return _part("6. All tokens, and the same by hand", "The layer computes, for all tokens at once:",
                     _matrix(y, self.labels, self.dims, "y", 4), "The same in plain NumPy, one token at a time:",
                     _source(layer_by_hand), _matrix(hand, self.labels, self.dims, "by hand", 4),
                     f"Largest difference: {_difference(y, hand)}.")

    def balance(self):
        r, probs = self.routing, self.routing.probs.data
        f, mean = r.load / max(1, r.load.sum()), probs.mean(axis=0)
        loss = losses.load_balancing_loss(r)
        rows = np.stack([f, mean, len(f) * f * mean], axis=1)
        texts = [f"""The load of an expert is the number of its tokens, a column count of G: {_list(r.load)}.
            f is its share of all assignments, P its mean probability. The balance loss is
            E * sum of f * P = {loss.item():.4f}; at perfect balance it is 1. It can be below 1, because f counts
            choices and P averages probabilities. The loads' standard deviation over their mean (load CV) is
            {metrics.load_cv(r):.3f}.""",
                 _matrix(rows, self.experts, ["f", "P", "E f P"], "expert", 3)]
        if not r.logits.requires_grad:
            texts.append(f"The loss has no gradient: {self.router.name} does not learn.")
        elif (r.load == r.load[0]).all():
            texts.append("All f are equal, so its gradient on the logits is 0.")
        else:
            r.logits.retain_grad()
            loss.backward()
            hand = gradient_by_hand(probs, r.load)
            texts += ["Its gradient on the logits. Where it is above 0, training lowers the logit: experts with a "
                      "larger f than the mean of f under the token's probabilities lose, the others gain.",
                      _matrix(r.logits.grad, self.labels, self.experts, "gradient", 4)]
            if self.softmaxed:
                texts += ["By hand, E / N * p_e * (f_e - sum of f * p):", _source(gradient_by_hand),
                          f"Largest difference: {_difference(r.logits.grad, hand)}."]
        return _part("7. Load and balance", *texts)

    def capacity(self):
        k = self.config.top_k
        factor = self.config.n_experts / (len(TEXT) * k)
        limited = limit_capacity(self.routing, factor, k)
        lost = self.routing.mask() & ~limited.mask()
        names = ", ".join(f"{self.labels[n]} from e{e}" for n, e in np.argwhere(lost))
        return _part("8. A capacity of one token", f"""
            With a capacity factor of {factor:g} an expert holds ceil(factor * N * K / E) = 1 token.
            First choices come before second choices, then earlier tokens before later ones. Dropped:
            {limited.n_dropped} assignments ({names or 'none'}). Experts that are left for each token:
            {_list(limited.coverage)}. A dropped expert adds nothing; its gate is not given to the others. A token with
            none passes through the residual connection alone.""", self.gates(limited),
                     _matrix(self.output(limited), self.labels, self.dims, "y", 4))

    def the_other_way(self):
        name = "top_k" if self.router.chooses == "expert" else "expert_choice"
        sizes = {key: getattr(self.config, key) for key in ("n_experts", "d_model", "d_ff")}
        k = math.ceil(self.config.top_k)  # a mean may be a fraction
        other = Example(sizes | {"router": name, "top_k": k}, self.seed)
        r = other.routing
        uncovered = "" if r.coverage.all() else "A token with 0 has no expert."
        whole = f"Here K is a whole number, {k}." if k != self.config.top_k else ""
        return _part(f"9. The same tokens under {name.replace('_', ' ')}", f"""
            {_first_line(other.router)} Load: {_list(r.load)}. Experts of each token: {_list(r.coverage)}.
            {uncovered} {whole} Where two tokens tie, the earlier one is taken.""", other.gates(r),
                     _matrix(other.output(r), self.labels, self.dims, "y", 4),
                     f"Largest difference from the same by hand: {_difference(other.output(r), other.by_hand(r))}.")


def draw(example: Example):
    """A Figure: the token with the most experts, through router, gates and experts to the sum y; bold: chosen."""
    from matplotlib.colors import LinearSegmentedColormap

    from ..study.figures import default_style, panel_grid
    from ..study.palette import DIVERGING
    n, e = int(example.routing.coverage.argmax()), example
    chosen, gates = np.flatnonzero(e.routing.mask()[n]), e.routing.to_dense().data[n]
    hidden = np.maximum(e.x.data[n] @ e.bank.w1.data[chosen], 0)  # (chosen, F)
    outputs = (hidden[:, None] @ e.bank.w2.data[chosen])[:, 0]
    names = [e.experts[i] for i in chosen]
    parts = [("x, the\nhidden state", e.x.data[n:n + 1], e.dims, [""]),
             *([("logits\nof the router", e.routing.logits.data[n:n + 1], e.experts, [""])] if e.has_logits else []),
             ("probabilities\n(softmax)" if e.softmaxed else "probabilities", e.routing.probs.data[n:n + 1], e.experts,
              [""]),
             ("gates\nof the chosen", gates[None], e.experts, [""]),
             ("outputs of\nthe experts", outputs, e.dims, names),
             ("outputs times\ntheir gates", gates[chosen, None] * outputs, e.dims, names),
             ("y, their\nsum", gates[chosen] @ outputs[None], e.dims, [""])]
    parts = [part for part in parts if part[1].size]  # no outputs where the router chose nothing
    colours = LinearSegmentedColormap.from_list("signs", DIVERGING)
    with default_style():
        widths = [0.6 + 0.4 * len(columns) for *_, columns in parts]
        fig, (axes_of,) = panel_grid(1, len(parts), 2.2, width_ratios=widths)
        for axes, (title, values, rows, columns) in zip(axes_of, parts):
            axes.imshow(values.T, cmap=colours, vmin=-2.5, vmax=2.5, aspect="auto")
            for (column, row), value in np.ndenumerate(values):
                bold = rows is e.experts and row in chosen
                axes.text(column, row, f"{value:.2f}" if value else ".", ha="center", va="center", fontsize=6.5,
                          weight="bold" if bold else None, color="white" if abs(value) > 1.6 else "black")
            axes.set_xticks(range(len(columns)), columns)
            axes.set_yticks(range(len(rows)), rows)
            axes.set_title(title)
            axes.tick_params(length=0)
            axes.grid(False)
    return fig


def _tenths(rng, shape):
    """Random numbers from -0.9 to 0.9 with one decimal; none is 0."""
    return rng.integers(1, 10, shape) / 10 * rng.choice([-1, 1], shape)


def _part(title, *blocks):
    """A heading and paragraphs; a block that starts with four blanks is shown as it is."""
    texts = (b if b.startswith("    ") else
             textwrap.fill(" ".join(b.split()), 100, break_on_hyphens=False) for b in blocks)
    return "\n\n".join([f"## {title}", *texts]) + "\n"


def _matrix(values, rows, columns, name, digits=2, shown=None):
    """A matrix with its headings, indented; a dot where it is not `shown`."""
    width = max(8, *map(len, (name, *rows)))
    lines = [f"    {name:<{width}}" + "".join(f"{column:>9}" for column in columns)]
    for i, (label, row) in enumerate(zip(rows, np.round(np.asarray(values, float), digits) + 0.0)):
        cells = (f"{v:9.{digits}f}" if shown is None or shown[i][j] else f"{'.':>9}" for j, v in enumerate(row))
        lines.append(f"    {label:<{width}}" + "".join(cells))
    return "\n".join(lines)


def _source(function):
    """The code of a function, without its docstring, indented."""
    lines = inspect.getsource(function).splitlines()
    return textwrap.indent("\n".join([lines[0], *lines[2:]]), "    ")


def _list(numbers, form="d"):
    """Numbers with commas; never -0.00."""
    rounded = numbers if form == "d" else np.round(numbers, int(form[1:-1])) + 0.0
    return ", ".join(format(number, form) for number in rounded)


def _difference(a, b):
    largest = float(np.abs(a - b).max(initial=0))
    return "below 1e-12" if largest < 1e-12 else f"{largest:.1e}"


def _first_line(router):
    """The first sentence about a router, without its sources."""
    return inspect.cleandoc(router.__doc__ or router.name).splitlines()[0].split(" (")[0].rstrip(".") + "."
