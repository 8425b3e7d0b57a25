"""Files of earlier versions: configs with the options of the router as fields, expert choice without thresholds."""

from typing import Any

import numpy as np

FORMER_OPTIONS = """renormalise router_std jitter n_groups group_limit second_expert second_threshold bias_rate
    gate_scale sinkhorn_iterations sequence_pool sequence_scope softmax_over""".split()
FORMER_LOSSES = "z importance load sequence device communication policy".split()


def current(values: dict[str, Any]) -> dict[str, Any]:
    """The dict of a config as this version writes it: version 0.1 had router options and coefficients as fields."""
    values = dict(values)
    options = {name: values.pop(name) for name in FORMER_OPTIONS if name in values}
    losses = {name: values.pop(f"{name}_coef") for name in FORMER_LOSSES if f"{name}_coef" in values}
    if losses.get("policy") == 1.0:  # written for every router; now the default of those that draw
        del losses["policy"]
    options = {name: value for name, value in options.items() if value is not None}
    losses = {name: value for name, value in losses.items() if value != 0 or name == "policy"}
    for key, found in (("router_options", options), ("losses", losses)):
        if found:
            values[key] = found | (values.get(key) or {})
    return values


def with_thresholds(arrays: dict[str, np.ndarray], targets: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of a model, with those thresholds of expert choice that a file without any leaves as they start."""
    return {name: start for name, start in targets.items()
            if name.endswith("router.threshold") and start.ndim == 1} | arrays  # that of top_p is a scalar
