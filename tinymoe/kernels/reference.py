"""Every kernel and its backward pass in plain NumPy. compiled/ computes the same, faster.

A backward pass takes dy, the gradient of the loss with respect to the output y, and returns dx for each input x.
Arrays are float32 or float64, and results have the dtype of the inputs. Axes: N tokens, D width, F hidden width,
E experts, A assignments of a token to an expert, B batch, T time steps, H heads, G groups of heads that share keys,
d entries of a query or key, dv of a value, I inputs and O outputs of a linear layer, M rows taken from a table of n.
"""
import numpy as np
from scipy.special import expit as sigmoid


def _gelu(x):
    """f = x s and f', with s = sigmoid(2u) = (1 + tanh u) / 2: the tanh form  (Hendrycks & Gimpel 2016)"""
    c, a = 2 * (2 / np.pi)**0.5, 0.044715                                  # 2u = c (x + a x^3)
    s = sigmoid(c * (x + a * x * x * x))
    return x * s, s + x * s * (1 - s) * c * (1 + 3 * a * x * x)


def _silu(x):
    """f = x s and f', with s = sigmoid(x), also called swish  (Hendrycks & Gimpel 2016)"""
    s = sigmoid(x)
    return x * s, s * (1 + x * (1 - s))


CURVES = {"gelu": _gelu, "silu": _silu, "relu": lambda x: (np.maximum(x, 0), np.heaviside(x, 0))}
GATED = {"geglu": "gelu", "swiglu": "silu"}                                # name -> f  (Shazeer 2020)
ACTIVATIONS = (*CURVES, *GATED)


def activation(x, name):
    """y = f(x), any shape; gated: y = f(a) b (...,F), where a and b are the halves of x (...,2F)"""
    a, b = np.split(x, 2, axis=-1) if name in GATED else (x, 1)
    return CURVES[GATED.get(name, name)](a)[0] * b


def activation_backward(dy, x, name):
    """dx = dy f'(x); gated: da = dy b f'(a) and db = dy f(a), side by side"""
    a, b = np.split(x, 2, axis=-1) if name in GATED else (x, 1)
    f, slope = CURVES[GATED.get(name, name)](a)
    da = dy * b * slope
    return np.concatenate([da, dy * f], axis=-1) if name in GATED else da


def linear(x, w, b):
    """y = x w + b: x (N,I), w (I,O), b (O,) or None -> y (N,O)"""
    return x @ w if b is None else x @ w + b


def linear_backward(dy, x, w):
    """dx = dy w^T, dw = x^T dy, db = sum over tokens of dy"""
    return dy @ w.T, x.T @ dy, dy.sum(axis=0)


def layer_norm(x, weight, bias, eps):
    """y = z weight + bias, with z = (x - mean) rstd and rstd = 1 / sqrt(variance + eps) of each row  (Ba et al. 2016)
    x (N,D), weight (D,), bias (D,) -> y (N,D), mean (N,), rstd (N,)"""
    mean, rstd = x.mean(axis=1), 1 / np.sqrt(x.var(axis=1) + x.dtype.type(eps))
    return (x - mean[:, None]) * rstd[:, None] * weight + bias, mean, rstd


def layer_norm_backward(dy, x, weight, mean, rstd):
    """With g = dy weight: dx = rstd (g - average(g) - z average(g z)), dweight = sum of dy z, dbias = sum of dy"""
    z, g = (x - mean[:, None]) * rstd[:, None], dy * weight
    dx = rstd[:, None] * (g - g.mean(axis=1, keepdims=True) - z * (g * z).mean(axis=1, keepdims=True))
    return dx, (dy * z).sum(axis=0), dy.sum(axis=0)


def causal_attention(q, k, v):
    """y = p v, with p = softmax(q k^T / sqrt(d)) over the positions up to the query's own  (Vaswani et al. 2017)
    Head h of q (B,T,H,d) reads group h // (H/G) of k (B,T,G,d) and v (B,T,G,dv) -> y (B,T,H,dv), p (B,H,T,T),
    packed in compiled/. An inf or NaN in v also spoils earlier rows of y (0 inf is NaN); in compiled/, of its block"""
    T, H, d = q.shape[1:]
    q, k, v = (x.repeat(H // x.shape[2], axis=2).swapaxes(1, 2) for x in (q, k, v))     # a matrix (T,d) for each head
    scores = np.where(np.tri(T, dtype=bool), q @ k.swapaxes(2, 3) * d**-0.5, -np.inf)
    p = np.exp(scores - scores.max(axis=3, keepdims=True, initial=-np.inf))             # initial: for T = 0
    p /= p.sum(axis=3, keepdims=True)
    return (p @ v).swapaxes(1, 2), p


def causal_attention_backward(dy, q, k, v, p):
    """dp = dy v^T, ds = p (dp - sum of p dp) / sqrt(d), dq = ds k; summed over a group: dk = ds^T q, dv = p^T dy"""
    (B, T, H, d), G = q.shape, k.shape[2]
    dy, q, k, v = (x.repeat(H // x.shape[2], axis=2).swapaxes(1, 2) for x in (dy, q, k, v))
    dp = dy @ v.swapaxes(2, 3)
    ds = p * (dp - (p * dp).sum(axis=3, keepdims=True)) * d**-0.5
    dk, dv = ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ dy
    dk, dv = (x.swapaxes(1, 2).reshape(B, T, G, H // G, x.shape[3]).sum(axis=3) for x in (dk, dv))
    return (ds @ k).swapaxes(1, 2), dk, dv


def experts_forward(x, token, offsets, gate, weights, name):
    """y[n] = sum over the assignments a of token n of gate[a] (f(x[n] w1[e] + b1[e]) w2[e] + b2[e])
    x (N,D); token (A,) sorted by expert, then token; expert e has assignments offsets[e]:offsets[e+1]; gate (A,);
    weights: w1 (E,D,F), b1 (E,F), w2 (E,F,D), b2 (E,D), w1 and b1 2F wide for a gated f -> y (N,D), saved arrays"""
    (w1, b1, w2, b2), rows = weights, x[token]
    before, out = np.empty((len(rows), w1.shape[2]), x.dtype), np.empty_like(rows)
    for e, s in enumerate(map(slice, offsets, offsets[1:])):
        before[s] = linear(rows[s], w1[e], b1[e])
        out[s] = linear(activation(before[s], name), w2[e], b2[e])
    return add_rows(len(x), token, gate[:, None] * out), (rows, before, out)


def experts_backward(dy, x, token, offsets, gate, weights, name, saved):
    """dgate[a] = dy[n] . out[a], out[a] the bracket in experts_forward; the expert's output has gradient gate[a] dy[n]
    -> dx, dgate, dw1, db1, dw2, db2: zero for an expert without assignments"""
    (w1, _, w2, _), (rows, before, out) = weights, saved
    dw1, db1, dw2, db2 = map(np.empty_like, weights)
    dout, drows = gate[:, None] * dy[token], np.empty_like(rows)
    for e, s in enumerate(map(slice, offsets, offsets[1:])):
        dafter, dw2[e], db2[e] = linear_backward(dout[s], activation(before[s], name), w2[e])
        drows[s], dw1[e], db1[e] = linear_backward(activation_backward(dafter, before[s], name), rows[s], w1[e])
    return add_rows(len(dy), token, drows), (dy[token] * out).sum(axis=1), dw1, db1, dw2, db2


def add_rows(n, index, rows):
    """y[index[i]] += rows[i], from zero: rows (M,D), index (M,) with repeats -> y (n,D), the gradient of a lookup"""
    y = np.zeros((n, rows.shape[1]), rows.dtype)
    np.add.at(y, index, rows)
    return y


def adamw(p, g, m, v, *, lr, betas, eps, weight_decay, step):
    """p -= lr (m_hat / (sqrt(v_hat) + eps) + weight_decay p), in place  (Loshchilov & Hutter 2019, algorithm 2)
    m and v: running means of the gradient g and of g^2. They start at 0, so m_hat = m / (1 - b1^step) and
    v_hat = v / (1 - b2^step), step 1, 2, ... The decay is times lr too, as in PyTorch."""
    b1, b2 = betas
    m[...] = b1 * m + (1 - b1) * g
    v[...] = b2 * v + (1 - b2) * (g * g)
    p -= lr * (m / (1 - b1**step) / (np.sqrt(v / (1 - b2**step)) + eps) + weight_decay * p)


def sum_of_squares(x):
    """The sum of x^2 over all entries, in float64"""
    return float(np.square(x, dtype=np.float64).sum())
