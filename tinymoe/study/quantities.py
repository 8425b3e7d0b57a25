"""The table of quantities: every number that tables and figures show of a run is defined here, once.

To add a metric, add one Quantity to the list. Without `of`, it is the field `name` of a log row, of the row's MoE
layers, or of what an experiment measured at the end of the run. With `of`, it is computed from what is stored.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..model.counting import architecture, count
from ..moe import metrics
from ..moe.losses import LOSSES
from ..moe.routing import capacity

LOSS = "causal_cross_entropy"
CHOICE_RULES = ("batch", "prefix", "threshold")  # of expert choice
DEVICES = (1, 2, 4, 8, 16)  # whose traffic an experiment may measure
TOKEN_BYTES = 4  # bytes of English in a token of the 50,000-token vocabularies that papers use


@dataclass(frozen=True)
class Quantity:
    """One number of a run. per: what `of` is given, "layer" or "row" (a dict of the log) or "run" (a RunRecord).

    A quantity per layer is averaged over the MoE layers of a row; one per run exists only at the end of a run.
    event: it says when something happens, and is nan where that never does.
    """

    name: str
    label: str = ""
    unit: str = ""
    digits: int = 3  # after the decimal point, in tables
    of: Callable | None = None
    per: str = "layer"
    event: bool = False

    @property
    def is_loss(self) -> bool:
        """Whether it is a loss, or a difference of losses, in nats a byte: what MARGIN is about."""
        return self.name.partition(":")[0].endswith("cross_entropy") or self.name.startswith("loss_by_") \
            or self.name in ("leak", "excess", "prefix_cost")

    @property
    def words(self) -> str:
        """The label, or without one the name."""
        return self.label or self.name.replace("_", " ")

    @property
    def title(self) -> str:
        """The words with the unit, as tables and axes show it."""
        return self.words + (f" ({self.unit})" if self.unit else "")

    @property
    def heading(self) -> str:
        """The title as the beginning of a sentence."""
        return self.title[0].upper() + self.title[1:]


def above_entropy(run):
    """Causal loss above the entropy rate of the text, in nats a byte; nan where that rate is unknown."""
    rates = [part.get("entropy_rate") for part in run.config["corpus"].values()]
    return math.nan if None in rates else run.final[LOSS] - float(np.mean(rates))


def prefix_cost(run):
    """Loss of expert choice by the prefix rule minus that by thresholds; nan for a run that measured neither."""
    by_prefix, by_threshold = (run.measured.get(f"loss_by_{rule}") for rule in ("prefix", "threshold"))
    return math.nan if None in (by_prefix, by_threshold) else by_prefix - by_threshold


def padding(run):
    """Share of the places kept by a capacity limit that stay empty; nan without a limit."""
    model, final = run.model, run.final
    if model.get("capacity_factor") is None or not final["layers"]:
        return math.nan
    n = run.config["training"]["batch_size"] * model["seq_len"]
    columns = len(final["layers"][0]["load"])  # experts, and those that copy their input or return 0
    places = columns * capacity(n, columns, model["top_k"], model["capacity_factor"]) / n
    return 1 - experts_per_token(final) / places


def experts_per_token(row, first=None):
    """Measured experts of a byte, the mean over MoE layers; nan for a dense model. Some routers do not fix K.

    first: count the first so many experts alone, without those that copy their input or return 0.
    """
    loads = [sum(layer["load"][:first]) for layer in row["layers"]]
    return float(np.mean(loads)) / row["validation_tokens"] if loads else math.nan


def effective_experts(layer):
    """metrics.effective_experts of a row's load."""
    return metrics.effective_experts(layer["load"])


def collapsed(layer):
    """Whether fewer than half of the experts are effective."""
    return effective_experts(layer) < len(layer["load"]) / 2


def collapse_step(run):
    """The first evaluation after which a layer has collapsed; nan for never."""
    return next((row["step"] for row in run.log if row["step"] and any(map(collapsed, row["layers"]))), math.nan)


def crossing(log, other, metric):
    """The last step at which the curves of two logs cross, on a straight line between evaluations; nan if nowhere."""
    rows = {row["step"]: row for row in other if row["step"]}
    found = [(row["step"], in_row(row, metric) - in_row(rows[row["step"]], metric)) for row in log
             if row["step"] in rows]
    found = [(step, difference) for step, difference in found if difference]  # where they meet, they need not cross
    crossed = [a + (b - a) * x / (x - y) for (a, x), (b, y) in zip(found, found[1:]) if x * y < 0]
    return float(crossed[-1]) if crossed else math.nan


def counted(run, field):
    """A field of the whole model's counting.Part in millions, for measured experts, the mean over a window of text.

    nan where the model is of another version.
    """
    try:
        measured = experts_per_token(run.final, run.model["n_experts"]) if run.is_moe else None
        parts = count(architecture(run.model), length=run.model["seq_len"], experts_per_token=measured)
        return getattr(parts[-1], field) / 1e6
    except (KeyError, TypeError, ValueError):
        return math.nan


def _share_of_ln_e(entropy):
    return lambda layer: layer[entropy] / math.log(max(2, len(layer["load"])))


def _excess(name):
    return lambda layer: layer[name] - layer[f"{name}_null"]


def _worst(name):
    return lambda run: max(in_row(row, name) for row in run.log if row["step"])


QUANTITIES = {quantity.name: quantity for quantity in (
    # losses
    Quantity(LOSS, "causal loss", "nats"),
    Quantity("causal_perplexity", "causal perplexity", digits=2),
    Quantity("causal_bits_per_byte", "causal loss", "bits"),
    Quantity("val_cross_entropy", "loss routed as in training", "nats"),
    Quantity("val_perplexity", "perplexity routed as in training", digits=2),
    Quantity("val_bits_per_byte", "loss routed as in training", "bits"),
    Quantity("leak", "causal loss - loss routed as in training", "nats", per="row",
             of=lambda row: row[LOSS] - row["val_cross_entropy"]),
    Quantity("prefix_cost", "loss by the prefix rule - loss by thresholds", "nats", of=prefix_cost, per="run"),
    Quantity("token_perplexity", f"causal perplexity over {TOKEN_BYTES} bytes", digits=2, per="row",
             of=lambda row: math.exp(min(TOKEN_BYTES * row[LOSS], 700))),
    Quantity("excess", "causal loss above the entropy of the text", "nats", of=above_entropy, per="run"),
    Quantity("cross_entropy", "training loss", "nats"),
    # load
    Quantity("load_cv", "load CV"),
    Quantity("effective_experts", "effective experts", digits=2, of=effective_experts),
    Quantity("collapse_step", "first evaluation with a collapsed layer", "step", digits=0, of=collapse_step, per="run",
             event=True),
    Quantity("worst_cv", "largest load CV while training", of=_worst("load_cv"), per="run"),
    Quantity("max_violation", "MaxVio of the validation set"),
    Quantity("max_violation_batch", "MaxVio of a batch"),
    Quantity("dead_experts", "dead experts in a layer"),
    Quantity("worst_dead", "most dead experts in a layer while training", of=_worst("dead_experts"), per="run"),
    Quantity("drop_rate", "share of assignments dropped"),
    Quantity("experts_per_token", "experts for a byte", digits=2, of=experts_per_token, per="row"),
    Quantity("padding", "padding", of=padding, per="run"),
    Quantity("token_coverage", "coverage", digits=4),
    Quantity("lost_all", "share of bytes without any expert", of=lambda layer: 1 - layer["token_coverage"]),
    Quantity("router_entropy", "router entropy", "nats"),
    Quantity("router_entropy_share", "entropy for a byte", "share of ln E", of=_share_of_ln_e("router_entropy")),
    Quantity("marginal_entropy_share", "entropy of the mean", "share of ln E", of=_share_of_ln_e("marginal_entropy")),
    # specialisation
    Quantity("mi_excess", "domain information", "nats", of=_excess("mutual_information")),
    Quantity("byte_excess", "byte information", "nats", of=_excess("byte_information")),
    Quantity("byte_over_domain", "byte information - domain information", "nats",
             of=lambda layer: _excess("byte_information")(layer) - _excess("mutual_information")(layer)),
    Quantity("domain_given_byte", "domain information beyond the byte", "nats"),
    Quantity("byte_given_domain", "byte information beyond the domain", "nats"),
    Quantity("byte_known", "byte information beyond the domain", "share of what could be known"),
    Quantity("domain_known", "domain information beyond the byte", "share of what could be known"),
    Quantity("known_gap", "share known of the byte - share known of the domain",
             of=lambda layer: layer["byte_known"] - layer["domain_known"]),
    Quantity("class_information_excess", "byte class information", "nats"),
    Quantity("position_information_excess", "position information", "nats"),
    Quantity("repetition", "repetition"),
    Quantity("weight_divergence", "weight divergence"),
    Quantity("function_divergence", "function divergence"),
    Quantity("drop_cost", "loss if an expert is dropped", "+ nats"),
    Quantity("drop_spread", "spread over domains of the cost of a dropped expert", "nats"),
    Quantity("swap_cost", "loss if two experts are swapped", "+ nats"),
    Quantity("force_cost", "loss if one expert serves all", "+ nats"),
    Quantity("noise_share", "share of noise in a batch's router gradient"),
    # influence of other bytes
    Quantity("mates_rerouted", "share of bytes rerouted by other neighbours"),
    Quantity("mates_logits", "largest change of a logit by other neighbours"),
    Quantity("later_rerouted", "share of bytes rerouted by later bytes"),
    Quantity("later_logits", "largest change of a logit by later bytes"),
    # one model of expert choice under each of its rules
    *(Quantity(f"{name}_by_{rule}", f"{label} by {rule}", unit) for rule in CHOICE_RULES
      for name, label, unit in (("loss", "loss, chosen", "nats"), ("load_cv", "load CV, chosen", ""))),
    # cost
    Quantity("parameters", "parameters", "millions", of=lambda run: run.config["parameters"]["total"] / 1e6, per="run"),
    Quantity("active_parameters", "active parameters", "millions", of=lambda run: counted(run, "active"), per="run"),
    Quantity("megaflops", "forward pass of a byte", "MFLOP", of=lambda run: counted(run, "flops"), per="run"),
    Quantity("seconds", "training time", "seconds", of=lambda run: run.summary["seconds"], per="run"),
    *(Quantity(f"{name}_{n}", f"{label}, {n} devices") for n in DEVICES for name, label in (
        ("reach", "devices a byte reaches"), ("sent", "bytes sent for a byte"),
        ("link", "bytes on the busiest link for a byte, one way"), ("slowest", "slowest device / mean load"),
        ("path", "microseconds for a batch and layer"))))}


BY_DOMAIN = {LOSS: "causal_by_domain", "val_cross_entropy": "val_by_domain"}  # `causal_cross_entropy:python`


# numbers of rows that have no entry, beside those of losses
OTHERS = ("train_loss", "gradient_norm", "learning_rate", "penalty", "multi_token", "validation_tokens", "load_entropy",
          "marginal_entropy", "mutual_information", "mutual_information_null", "byte_information",
          "byte_information_null")


def _known():
    return (*QUANTITIES, *OTHERS, *LOSSES)  # a user's file may add to them


def require_known(names) -> None:
    """ValueError for the first name that is neither in the table, nor a number of rows or a loss."""
    known = _known()
    for name in names:
        loss, _, domain = name.partition(":")
        if name not in known and not (domain and loss in BY_DOMAIN):
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"no quantity {name}: " + (f"did you mean {near[0]}?" if near else
                             "no row holds it; add an entry to QUANTITIES in study/quantities.py"))


def quantity(name: str) -> Quantity:
    """The Quantity of a name; `causal_cross_entropy:python` is the loss of one domain.

    A field of a row that has no entry, such as a new term of the loss, is read as it is.
    """
    loss, _, domain = name.partition(":")
    if domain and loss in BY_DOMAIN:
        return Quantity(name, f"{QUANTITIES[loss].label}, {domain}", "nats", per="row",
                        of=lambda row: row.get(BY_DOMAIN[loss], {}).get(domain, math.nan))
    return QUANTITIES.get(name) or Quantity(name)


def title(name: str) -> str:
    """What a quantity is called in tables and at axes."""
    return quantity(name).title


def in_row(row: dict, name: str, layer: int | None = None) -> float:
    """A quantity in a row of a log: the mean over its MoE layers, or the one at index `layer`; nan where it has none.

    Raises ValueError for a name that `require_known` does not know and the row lacks.
    """
    one = quantity(name)
    if one.per == "row":
        return float(one.of(row))
    if one.per == "run" and name not in row:
        raise ValueError(f"{name} belongs to a whole run: no row over the steps has it")
    layers = row.get("layers", []) if layer is None else row["layers"][layer:layer + 1]
    choosing = [each for each in layers if len(each.get("load", ())) != 1]  # one expert: nothing is chosen
    numbers = [row[name]] if name in row else [_in_layer(one, each) for each in choosing]
    if numbers and None not in numbers:
        return float(np.mean(numbers))
    if name not in row and layers == choosing:
        require_known([name])
    return math.nan


def _in_layer(one, layer):
    try:
        return one.of(layer) if one.of else layer.get(one.name)
    except (KeyError, TypeError):  # a row of before, or a part without a number
        return None


def value(run, name: str) -> float:
    """A quantity of a finished run: of the run, of what was measured at its end, or of its final row; nan for none.

    Numbers of training, such as a term of the loss, are means over the steps since the evaluation before the last.
    """
    one = quantity(name)
    if one.per == "run":
        return float(one.of(run))
    return in_row(next((row for row in (run.measured, run.final, run.log[-1]) if name in row), run.final), name)
