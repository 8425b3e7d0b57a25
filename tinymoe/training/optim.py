"""AdamW, gradient clipping and the learning-rate schedule."""

import math

import numpy as np

from .. import kernels


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019); equations in reference.adamw.

    parameters: dict name -> Tensor, updated in place; those whose grad is None are left alone.
    no_decay: names to which weight_decay does not apply.
    """

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, no_decay=()):
        self.parameters, self.lr, self.betas, self.eps = parameters, lr, betas, eps
        self.weight_decay, self.no_decay = weight_decay, frozenset(no_decay)
        self.m = {name: np.zeros(p.shape, p.dtype) for name, p in parameters.items()}
        self.v = {name: np.zeros(p.shape, p.dtype) for name, p in parameters.items()}
        self.steps = dict.fromkeys(parameters, 0)

    def step(self):
        """Update every parameter that has a gradient."""
        for name, p in self.parameters.items():
            if p.grad is None:
                continue
            self.steps[name] += 1
            decay = 0.0 if name in self.no_decay else self.weight_decay
            p.data = np.require(p.data, requirements="CW")
            kernels.adamw(p.data, p.grad, self.m[name], self.v[name], lr=self.lr, betas=self.betas, eps=self.eps,
                          weight_decay=decay, step=self.steps[name])
            p.mark_changed()

    def zero_grad(self):
        """Forget all gradients."""
        for p in self.parameters.values():
            p.grad = None


def clip_gradients(parameters, max_norm):
    """Scale all gradients so that their common Euclidean norm is at most max_norm; returns the norm before."""
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    norm = math.sqrt(sum(kernels.sum_of_squares(g) for g in gradients))
    if norm > max_norm:
        for g in gradients:
            g *= max_norm / norm
    return norm


def no_decay_names(parameters):
    """Names of biases, norms and embeddings: all but the weight matrices of linear layers, routers and experts."""
    return {name for name, p in parameters.items()
            if p.ndim < 2 or "embedding" in name or name.split(".")[-1] in ("b1", "b2")}  # of experts: (E, ...)


def learning_rate(step, steps, peak, warmup=0.05, floor=0.1):
    """The rate of step 1..steps: linear warm-up over a share of the steps, then a cosine from peak to floor * peak."""
    rising = max(1, round(warmup * steps))
    if step <= rising:
        return peak * step / rising
    progress = min(1, (step - rising) / max(1, steps - rising))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
