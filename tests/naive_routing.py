"""Losses and metrics of a routing as plain loops over tokens and experts. Imports only numpy.

A routing is given as what it means: a boolean matrix (N tokens, E experts), and the probabilities beside it.
"""

import math
import operator
from fractions import Fraction

import numpy as np


def cv_squared(values, floor=0.0):
    """Population variance over (mean^2 + floor); 0 for a load of nothing."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    return variance / (mean ** 2 + floor) if variance else 0.0


def entropy(p):
    return -sum(q * math.log(q) for q in p if q > 0)


def mean_entropy(probs):
    return sum(map(entropy, probs)) / len(probs)


# -- losses --


def balance(load, probs):
    """E sum over e of (share of the assignments) (mean probability)."""
    n, e = probs.shape
    total = sum(load)
    return e * sum(load[i] / total * sum(probs[:, i]) / n for i in range(e)) if total else 0.0


def sequence_balance(mask, probs, length):
    starts = range(0, len(mask), length)
    parts = [balance(mask[s:s + length].sum(axis=0), probs[s:s + length]) for s in starts]
    return sum(parts) / len(parts)


def global_balance(loads, probs, batches):
    """Balance of the last batch's probs, with the shares of all batches in a running mean; loads: (E,) of each."""
    mean = None
    for load in loads:
        share = [n / sum(load) for n in load]
        mean = share if mean is None else [m + (s - m) / batches for m, s in zip(mean, share)]
    return balance(mean, probs)


def _experts_of(device, n_experts, n_devices):
    width = n_experts // n_devices
    return range(device * width, (device + 1) * width)


def device_balance(mask, probs, n_devices):
    n, e = mask.shape
    total, value = mask.sum(), 0.0
    for d in range(n_devices):
        experts = _experts_of(d, e, n_devices)
        share = sum(mask[t, i] for t in range(n) for i in experts) / max(1, total)
        value += share * sum(probs[t, i] for t in range(n) for i in experts) / n
    return n_devices * value


def communication(mask, probs, n_devices, max_devices):
    n, e = mask.shape
    value = 0.0
    for d in range(n_devices):
        experts = _experts_of(d, e, n_devices)
        sent = sum(any(mask[t, i] for i in experts) for t in range(n))
        value += sent / n * sum(probs[t, i] for t in range(n) for i in experts) / n
    return n_devices / max_devices * value


def z(logits):
    tops = [max(row) for row in logits]
    return sum((m + math.log(sum(math.exp(v - m) for v in row))) ** 2 for m, row in zip(tops, logits)) / len(logits)


def policy(mask, logits, nats):
    """Mean over tokens of (cost - mean cost of the others) ln p, for each assignment."""
    n, value = len(nats), 0.0
    for t in range(n):
        others = [nats[s] for s in range(n) if s != t]
        advantage = nats[t] - sum(others) / len(others) if others else 0.0
        top = max(logits[t])
        lse = top + math.log(sum(math.exp(v - top) for v in logits[t]))
        value += sum(advantage * (logits[t, i] - lse) for i in range(mask.shape[1]) if mask[t, i])
    return value / n


# -- thresholds of expert choice --


def thresholds(batches, n_chosen, decay):
    """The exponential mean over batches (N, E) of each expert's n-th largest score; the first batch sets it."""
    theta = None
    for scores in batches:
        now = [sorted(column, reverse=True)[n_chosen - 1] for column in scores.T]
        theta = now if theta is None else [decay * t + (1 - decay) * new for t, new in zip(theta, now)]
    return np.array(theta)


def top_p(probs, least):
    """The fewest experts of each row whose sum is at least `least`; ties go to the lowest index."""
    chosen = np.zeros(probs.shape, bool)
    for row, mine in zip(probs, chosen):
        total = 0.0
        for i in sorted(range(len(row)), key=lambda i: (-row[i], i)):
            if total < least:
                mine[i] = True
                total += row[i]
    return chosen


def normalised(logits, scale):
    """Each row with mean 0 and the sample standard deviation `scale`."""
    rows = [[v - sum(row) / len(row) for v in row] for row in logits.tolist()]
    return np.array([[scale * v / math.sqrt(sum(w * w for w in row) / (len(row) - 1)) for v in row] for row in rows])


def similarity(weight):
    """Sum of |R^T R - I|."""
    columns = [list(column) for column in weight.T]
    products = [(i == j, sum(map(operator.mul, a, b))) for i, a in enumerate(columns) for j, b in enumerate(columns)]
    return sum(abs(product - one) for one, product in products)


# -- biases that balance --


def momentum_bias(loads, rate, clamp, momentum):
    """The bias after steps with these loads (E,): a tanh of the violation, centred, in a running mean, added up."""
    bias = mean = [0.0] * len(loads[0])
    for load in loads:
        fair = sum(load) / len(load)
        step = [rate * math.tanh(clamp * (fair - n) / fair) for n in load]
        step = [s - sum(step) / len(step) for s in step]
        mean = [momentum * m + (1 - momentum) * s for m, s in zip(mean, step)]
        bias = [b + m for b, m in zip(bias, mean)]
    return np.array(bias)


def quantile_bias(scores, bias, k):
    """Minus the (N K / E + 1)-th largest of each column of scores - alpha, alpha the (K + 1)-th largest of a row; then
    centred."""
    n, e = scores.shape
    alpha = [sorted((s + b for s, b in zip(row, bias)), reverse=True)[k] for row in scores]
    place = capacity(n, e, k, 1)
    solved = [-sorted((scores[t, i] - alpha[t] for t in range(n)), reverse=True)[place] for i in range(e)]
    return np.array([b - sum(solved) / e for b in solved])


# -- metrics --


def violation(load):
    return max(load) / (sum(load) / len(load)) - 1 if sum(load) else 0.0


def load_entropy(load):
    total = sum(load)
    return entropy([n / total for n in load]) / math.log(len(load)) if total and len(load) > 1 else 1.0


def dead(load):
    fair = sum(load) / len(load)
    return sum(n < fair / 100 for n in load) if fair else len(load)


def covered(mask):
    return sum(any(row) for row in mask) / len(mask)


def repetition(mask, length):
    kept = asked = 0
    for t in range(len(mask)):
        if (t + 1) % length:  # not the last of its sequence
            asked += sum(mask[t])
            kept += sum(a and b for a, b in zip(mask[t], mask[t + 1]))
    return kept / asked if asked else 0.0


def saturation(then, final):
    both = sum(a and b for x, y in zip(then, final) for a, b in zip(x, y))
    return both / max(1, sum(map(sum, final)))


def co_activation(mask):
    e = mask.shape[1]
    out = np.zeros((e, e))
    for i in range(e):
        mine = [row for row in mask if row[i]]
        for j in range(e):
            out[i, j] = sum(row[j] for row in mine) / len(mine) if mine else 0.0
    return out


def label_load(mask, labels, n_labels):
    out = np.zeros((n_labels, mask.shape[1]), int)
    for row, label in zip(mask, labels):
        for i, chosen in enumerate(row):
            out[label, i] += bool(chosen)
    return out


def mutual_information(table):
    """In nats; 0 for an empty table."""
    total, value = table.sum(), 0.0
    for i, j in np.ndindex(table.shape):
        if table[i, j]:
            value += table[i, j] / total * math.log(table[i, j] * total / (table[i].sum() * table[:, j].sum()))
    return value


# -- capacity, devices, ties --


def capacity(n_tokens, n_experts, top_k, factor):
    """In fractions: a factor of 1.1 means 11/10."""
    exact = Fraction(str(factor)) * n_tokens * Fraction(str(top_k)) / n_experts
    return min(n_tokens, max(1, math.ceil(exact)))


def limited(mask, gates, limit, policy):
    """The mask that is left. "order": first choices first, then earlier tokens; "gate": large gates first."""
    kept = np.zeros(mask.shape, bool)
    for i in range(mask.shape[1]):
        def urgency(t, i=i):
            # experts of this token that it prefers: larger gates, or equal ones of lower experts
            before = [j for j in range(mask.shape[1]) if mask[t, j] and (-gates[t, j], j) < (-gates[t, i], i)]
            return (len(before), t) if policy == "order" else (-gates[t, i], t)
        for t in sorted((t for t in range(len(mask)) if mask[t, i]), key=urgency)[:limit]:
            kept[t, i] = True
    return kept


def traffic(mask, n_devices):
    """(rows sent from device to device, assignments that each computes)."""
    n, e = mask.shape
    rows, work = np.zeros((n_devices, n_devices), int), np.zeros(n_devices, int)
    for t in range(n):
        for d in range(n_devices):
            here = sum(mask[t, i] for i in _experts_of(d, e, n_devices))
            work[d] += here
            rows[t * n_devices // n, d] += here > 0
    return rows, work


def largest(scores, k):
    """The k largest of each row; ties go to the lowest index, NaN counts as -inf."""
    out = np.zeros(scores.shape, bool)
    for row, chosen in zip(scores, out):
        order = sorted(range(len(row)), key=lambda i: (-(-math.inf if math.isnan(row[i]) else row[i]), i))
        chosen[order[:k]] = True
    return out
