"""AdamW, gradient clipping and the learning-rate schedule."""

import math
from collections.abc import Collection

import numpy as np

from .. import kernels
from ..autograd.tensor import Tensor
from .optim_checks import check_adamw, require_norm, require_parameters


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019); equations in reference.adamw.

    parameters: dict name -> Tensor, updated in place; those whose grad is None are left alone.
    lr, eps, weight_decay, betas: numbers, betas below 1; `lr` may be set before each step. no_decay: names of
        parameters to which weight_decay does not apply.
    Raises TypeError unless parameters is a dict of Tensors. Raises ValueError where it is empty or has a Tensor twice,
    for a number out of its range, and for a name in no_decay that no parameter has.
    """

    def __init__(self, parameters: dict[str, Tensor], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.95),
                 eps: float = 1e-8, weight_decay: float = 0.1, no_decay: Collection[str] = ()):
        no_decay = frozenset([no_decay] if isinstance(no_decay, str) else no_decay)
        check_adamw(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, no_decay=no_decay)
        self.parameters, self.lr, self.betas, self.eps = parameters, lr, betas, eps
        self.weight_decay, self.no_decay = weight_decay, no_decay
        self.m = {name: np.zeros(p.shape, p.dtype) for name, p in parameters.items()}
        self.v = {name: np.zeros(p.shape, p.dtype) for name, p in parameters.items()}
        self.steps = dict.fromkeys(parameters, 0)

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for name, p in self.parameters.items():
            if p.grad is None:
                continue
            self.steps[name] += 1
            decay = 0.0 if name in self.no_decay else self.weight_decay
            p.data = np.require(p.data, requirements="CW")  # the kernel writes into an array in C order
            kernels.adamw(p.data, p.grad, self.m[name], self.v[name], lr=self.lr, betas=self.betas, eps=self.eps,
                          weight_decay=decay, step=self.steps[name])
            p.mark_changed()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self.parameters.values():
            p.grad = None


def clip_gradients(parameters: dict[str, Tensor], max_norm: float) -> float:
    """Scale all gradients so that their common Euclidean norm is at most max_norm; returns the norm before.

    If the norm is not finite, the gradients stay as they are. Raises TypeError unless parameters is a dict, ValueError
    for a max_norm below 0.
    """
    require_parameters(parameters)
    require_norm(max_norm)
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    norm = math.sqrt(sum(kernels.sum_of_squares(g) for g in gradients))
    if max_norm < norm < math.inf:
        for g in gradients:
            g *= max_norm / norm
    return norm


def no_decay_names(parameters: dict[str, Tensor]) -> set[str]:
    """Names of biases, norms and embeddings: all but the weight matrices of linear layers, routers and experts."""
    return {name for name, p in parameters.items()
            if p.ndim < 2 or "embedding" in name or name.split(".")[-1] in ("b1", "b2")}  # of experts: (E, ...)


def learning_rate(step: int, steps: int, peak: float, warmup: float = 0.05, floor: float = 0.1) -> float:
    """The rate of step 1, 2, ...: linear warm-up over a share of the steps, a cosine to floor * peak, then constant."""
    rising = max(1, round(warmup * steps))
    if step <= rising:
        return peak * step / rising
    progress = min(1, (step - rising) / max(1, steps - rising))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
