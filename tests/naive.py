"""Oracles for the kernels: plain loops that follow the equations one element at a time, in float64.

They import only NumPy.
"""
import math
from fractions import Fraction

import numpy as np

# -- dense layers and activations --

def linear(x, w, b):
    N, I = x.shape  # noqa: E741
    return np.array([[sum(x[n, i] * w[i, o] for i in range(I)) + (0.0 if b is None else b[o])
                      for o in range(w.shape[1])] for n in range(N)]).reshape(N, w.shape[1])


def linear_backward(dy, x, w):
    dx, dw, db = np.zeros(x.shape), np.zeros(w.shape), np.zeros(w.shape[1])
    for n in range(len(x)):
        for o in range(w.shape[1]):
            db[o] += dy[n, o]
            for i in range(w.shape[0]):
                dx[n, i] += dy[n, o] * w[i, o]
                dw[i, o] += dy[n, o] * x[n, i]
    return dx, dw, db


def activation(z, name):
    """One number."""
    if name == "gelu":
        return 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return z / (1 + math.exp(-z)) if name == "silu" else max(z, 0.0)


def activation_slope(z, name):
    if name == "gelu":
        u, du = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3), math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)
        return 0.5 * (1 + math.tanh(u)) + 0.5 * z * (1 - math.tanh(u)**2) * du
    if name == "silu":
        s = 1 / (1 + math.exp(-z))
        return s + z * s * (1 - s)
    return 1.0 if z > 0 else 0.0


GATED = {"geglu": "gelu", "swiglu": "silu"}


def hidden_of(before, name):
    """The activation of a vector; a gated one takes the halves of it."""
    if name not in GATED:
        return each(activation, before, name)
    half = len(before) // 2
    return each(activation, before[:half], GATED[name]) * before[half:]


def hidden_backward(d, before, name):
    if name not in GATED:
        return d * each(activation_slope, before, name)
    half, inner = len(before) // 2, GATED[name]
    return np.concatenate([d * before[half:] * each(activation_slope, before[:half], inner),
                           d * each(activation, before[:half], inner)])


def each(function, x, name):
    return np.array([function(float(z), name) for z in x.reshape(-1)]).reshape(x.shape)


def layer_norm(x, weight, bias, eps):
    y = np.zeros(x.shape)
    for n, row in enumerate(x):
        mean = sum(row) / len(row)
        variance = sum((z - mean)**2 for z in row) / len(row)
        y[n] = [(z - mean) / math.sqrt(variance + eps) * w + b for z, w, b in zip(row, weight, bias)]
    return y


def layer_norm_backward(dy, x, weight, eps):
    """With g = dy weight, z the normalised row and s its standard deviation: dx = (g - mean g - z mean(g z)) / s."""
    dx, dweight, dbias = np.zeros(x.shape), np.zeros(len(weight)), np.zeros(len(weight))
    for n, row in enumerate(x):
        mean, size = sum(row) / len(row), range(len(row))
        s = math.sqrt(sum((u - mean)**2 for u in row) / len(row) + eps)
        z, g = [(u - mean) / s for u in row], [dy[n, i] * weight[i] for i in size]
        for i in size:
            dx[n, i] = (g[i] - sum(g) / len(g) - z[i] * sum(a * b for a, b in zip(g, z)) / len(g)) / s
            dweight[i] += dy[n, i] * z[i]
            dbias[i] += dy[n, i]
    return dx, dweight, dbias


# -- attention --

def causal_attention(q, k, v):
    B, T, H, d = q.shape
    group = H // k.shape[2]
    out, probs = np.zeros((B, T, H, v.shape[3])), np.zeros((B, H, T, T))
    for b in range(B):
        for h in range(H):
            for t in range(T):
                scores = [math.exp(sum(q[b, t, h] * k[b, s, h // group]) / math.sqrt(d)) for s in range(t + 1)]
                for s in range(t + 1):
                    probs[b, h, t, s] = scores[s] / sum(scores)
                    out[b, t, h] += probs[b, h, t, s] * v[b, s, h // group]
    return out, probs


def causal_attention_backward(dout, q, k, v):
    """With dp = dout . v, the softmax gives the scores the gradient p (dp - sum(p dp))."""
    probs, group, root = causal_attention(q, k, v)[1], q.shape[2] // k.shape[2], math.sqrt(q.shape[3])
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for b, h, t in np.ndindex(q.shape[0], q.shape[2], q.shape[1]):
        g, past = h // group, range(t + 1)
        dp = [sum(dout[b, t, h] * v[b, s, g]) for s in past]
        inner = sum(probs[b, h, t, s] * dp[s] for s in past)
        for s in past:
            ds = probs[b, h, t, s] * (dp[s] - inner) / root
            dq[b, t, h] += ds * k[b, s, g]
            dk[b, s, g] += ds * q[b, t, h]
            dv[b, s, g] += probs[b, h, t, s] * dout[b, t, h]
    return dq, dk, dv


# -- experts --

def assignments(token, offsets):
    """(assignment, token, expert) for each assignment"""
    return [(a, token[a], e) for e in range(len(offsets) - 1) for a in range(offsets[e], offsets[e + 1])]


def experts(x, token, offsets, gate, w1, b1, w2, b2, name):
    y = np.zeros(x.shape)
    for a, n, e in assignments(token, offsets):
        hidden = hidden_of(x[n] @ w1[e] + b1[e], name)
        y[n] += gate[a] * (hidden @ w2[e] + b2[e])
    return y


def experts_backward(dy, x, token, offsets, gate, w1, b1, w2, b2, name):
    dx, dgate, dw1, db1, dw2, db2 = (np.zeros(z.shape) for z in (x, gate, w1, b1, w2, b2))
    for a, n, e in assignments(token, offsets):
        before = x[n] @ w1[e] + b1[e]
        hidden = hidden_of(before, name)
        dgate[a] = dy[n] @ (hidden @ w2[e] + b2[e])
        d_out = gate[a] * dy[n]
        d_before = hidden_backward(w2[e] @ d_out, before, name)
        dx[n] += w1[e] @ d_before
        dw1[e] += np.outer(x[n], d_before)
        db1[e] += d_before
        dw2[e] += np.outer(hidden, d_out)
        db2[e] += d_out
    return dx, dgate, dw1, db1, dw2, db2


# -- optimiser, scatter, gradients --

def adamw(parameter, gradient, m, v, lr, beta1, beta2, eps, weight_decay, step):
    """-> new parameter, m, v"""
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient**2
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    return parameter - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * parameter), m, v


def add_rows(out_rows, index, rows):
    out = np.zeros((out_rows, rows.shape[1]))
    for i, row in zip(index, rows):
        out[i] += row
    return out


def central_difference(function, x, dy, eps=1e-5):
    """The gradient of sum(function(x) dy), one element of x at a time."""
    gradient = np.zeros(x.shape)
    for at in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[at] += eps
        down[at] -= eps
        gradient[at] = np.sum((function(up) - function(down)) * dy) / (2 * eps)
    return gradient


# -- routing --

def noisy_load(clean, noisy, sigma, k):
    """(E,) Shazeer et al. 2017, eq. 8 to 10: the tokens that each expert can expect if its noise were drawn again."""
    load = np.zeros(clean.shape[1])
    for n, i in np.ndindex(clean.shape):
        threshold = sorted(np.delete(noisy[n], i))[-k]          # the k-th largest of the others
        load[i] += 0.5 * (1 + math.erf((clean[n, i] - threshold) / sigma[n, i] / math.sqrt(2)))
    return load


def prefix_choice(p, k):
    """p (T, E) of one sequence -> (T, E) bool: token t is among the best ceil(n k / E) of the first n = t + 1.

    The earlier token wins a tie.
    """
    T, E = p.shape
    chosen = np.zeros((T, E), bool)
    for t, e in np.ndindex(T, E):
        ranking = sorted(range(t + 1), key=lambda s: (-p[s, e], s))
        chosen[t, e] = ranking.index(t) < min(t + 1, math.ceil((t + 1) * Fraction(str(k)) / E))
    return chosen


# -- functions of Tensors --

def softmax(row):
    """One row of exact exponentials, shifted so that the largest is 1."""
    powers = [math.exp(z - max(row)) for z in row]
    return [p / sum(powers) for p in powers]


def cross_entropy(logits, targets):
    return sum(-math.log(softmax(row)[target]) for row, target in zip(logits, targets)) / len(targets)


def rms_norm(x, weight, eps):
    return np.array([[z / math.sqrt(sum(u * u for u in row) / len(row) + eps) * w for z, w in zip(row, weight)]
                     for row in x])
