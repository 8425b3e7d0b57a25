"""docs/routers.md, the page of all routers, made from their classes."""

import inspect

from ..moe.routers import ROUTERS
from ..moe.routers.options import OF_THE_MODEL

HEAD = """# Routers

Made from the classes by `python cli.py routers --long > docs/routers.md`.

N tokens of sequences of length T, D width, E experts, K experts per token; x (N, D) states, W and V (D, E) weights, w
(D,) a vector of weights, P (D, R) a projection, c_e (R,) a vector of each expert, b (E,) biases, s scores, tau a
temperature, theta_e thresholds, f_e the share of the tokens that expert e serves, g_e gates, load_e the number of
tokens of expert e, lambda a coefficient, m (E,) a running mean, d the domain of a token. Options: rate (bias_rate),
clamp, logit_scale, top_p, real_k (how many real experts, of n_real that are not copies or zeros, a token is to have).
Causal: a token's route depends on its own prefix alone. `python cli.py probe NAME` tests a router, `--set
router=NAME` sets it, and `--set router.OPTION=VALUE` an option; `python cli.py options` says what each option means.
"""


def page() -> str:
    """The page in Markdown: what each router does, its formula, its source, who uses it, and its properties."""
    return "\n".join([HEAD, *map(_section, ROUTERS.values())])


def _section(router):
    what = " ".join(inspect.getdoc(router).split("\n\n")[0].split())
    options = ", ".join(name for name in router.options() if name not in OF_THE_MODEL)
    formula, users = (vars(router).get(name, "–") for name in ("formula", "used_by"))  # a parent's are not its own
    return f"""## `{router.name}`

{what}

- formula: {formula}
- source: {router.paper}
- used by: {users}
- causal: {causal(router)}; learned: {"yes" if router.learned else "no"}; equal load: {router.balanced}
- cost of a layer: {router.cost}
- options: {options or "none"}
"""


def causal(router) -> str:
    """When the routes of a router depend on the prefix alone."""
    return "no" if not router.causal else "yes" if router.causal_training else "not while training"
