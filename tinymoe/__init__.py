"""tinymoe: mixture-of-experts language models in NumPy, from the chain rule to the finished study.

The reading order is that of the imports below; each file imports only from files above it.
"""

import os

# One thread pool: numba's. A BLAS that starts threads of its own inside numba's fights it for the cores
# and loses both their time. Libraries not yet loaded read the environment; loaded ones are told.
for _name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ[_name] = "1"

import numpy  # noqa: E402
import scipy.linalg  # noqa: E402, F401  (the BLAS that numba's np.dot calls)
import threadpoolctl  # noqa: E402

threadpoolctl.threadpool_limits(1, user_api="blas")

from . import files, kernels  # noqa: E402
from .autograd import functional, tensor  # noqa: E402
from .autograd.gradcheck import GradcheckResult, gradcheck  # noqa: E402
from .autograd.tensor import Tensor, no_grad  # noqa: E402
from .layers import attention, nn  # noqa: E402
from .moe import devices as comm, experts, layer, losses, metrics, routers, routing  # noqa: E402
from .moe.experts import ExpertBank  # noqa: E402
from .moe.layer import MoELayer  # noqa: E402
from .moe.routers import RouteContext  # noqa: E402
from .moe.routing import Routing  # noqa: E402
from .model import config, counting as params, published as interop  # noqa: E402
from .model.config import ModelConfig  # noqa: E402
from .model.transformer import LossTerms, ModelOutput, Transformer  # noqa: E402
from .training import data, optim  # noqa: E402

__version__ = "0.1.0"
