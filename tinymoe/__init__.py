"""tinymoe: mixture-of-experts language models in NumPy, from the chain rule to the finished study.

The imports below are in reading order. A folder imports only from folders above it.

The import changes nothing else in the process. The first call of a kernel does: it holds BLAS at one thread, and with
numba it asks glibc to keep freed memory. TINYMOE_KEEP_THREADS=1 in the environment leaves both as they are.
"""
# ruff: noqa: F401, I001  (the imports are the public names, in reading order)

import importlib

from . import files, kernels
from .autograd import functional, tensor
from .autograd.gradcheck import GradcheckResult, gradcheck
from .autograd.tensor import Tensor, no_grad
from .layers import attention, nn
from .moe import devices as comm, experts, layer, losses, metrics, routers, routing
from .moe.experts import ExpertBank
from .moe.layer import MoELayer
from .moe.routers import RouteContext
from .moe.routing import Routing
from .model import config, counting as params, published as interop
from .model.config import ModelConfig
from .model.generate import generate
from .model.transformer import LossTerms, ModelOutput, Transformer
from .training import data, optim
from .training.data import load_corpus
from .training.loading import load_model
from .training.plan import RunPlan, TrainConfig
from .training.trainer import Trainer, train

__version__ = "0.1.0"


def __getattr__(name):
    """tm.study, tm.experiments and tm.tools: imported when they are first used, because they take long."""
    if name in ("study", "experiments", "tools"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"tinymoe has no {name!r}: dir(tinymoe) lists what it has")


def __dir__():
    return [*globals(), "study", "experiments", "tools"]
