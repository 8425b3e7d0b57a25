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

from . import files, tensor  # noqa: E402
from .tensor import Tensor, no_grad  # noqa: E402
from . import kernels, functional  # noqa: E402
from .gradcheck import GradcheckResult, gradcheck  # noqa: E402
from . import nn, attention, routing, routers, losses, experts, comm, config, moe, model, params, interop  # noqa: E402
from .routing import Routing  # noqa: E402
from .routers import RouteContext  # noqa: E402
from .experts import ExpertBank  # noqa: E402
from .config import ModelConfig  # noqa: E402
from .moe import MoELayer  # noqa: E402
from .model import LossTerms, ModelOutput, Transformer  # noqa: E402
from . import data, optim, metrics  # noqa: E402

__version__ = "0.1.0"
