"""The state of a run as arrays and JSON, and a run that continues from them with the same bits."""

import operator

from ..files import load_arrays_into


def arrays(trainer) -> dict:
    """Every array of the state, by name: weights p/..., and the moments m/... and v/... of the optimizer."""
    parts = {"p": {name: p.data for name, p in trainer.parameters.items()}, "m": trainer.optimizer.m,
             "v": trainer.optimizer.v}
    return {f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()}


def header(trainer) -> dict:
    """The rest of the state, ready for JSON: the header of checkpoint.npz."""
    return {"kind": "checkpoint", "run_id": trainer.plan.run_id, "model": trainer.plan.model.to_dict(),
            "step": trainer.step, "seconds": trainer.seconds, "n_rows": len(trainer.rows),
            "wall_seconds": trainer.wall_seconds, "optimizer_steps": trainer.optimizer.steps,
            "generators": {name: g.bit_generator.state for name, g in trainer.generators.items()}}


def restore(trainer, found: dict, state: dict, rows: list) -> None:
    """Continue from the arrays, the header and the log of a checkpoint.

    Raises ValueError, TypeError or KeyError if they do not fit.
    """
    load_arrays_into(arrays(trainer), found)
    trainer.step, trainer.seconds, trainer.rows = operator.index(state["step"]), float(state["seconds"]), rows
    trainer.wall_started -= float(state.get("wall_seconds", trainer.seconds))
    trainer.optimizer.steps = {name: operator.index(state["optimizer_steps"][name]) for name in trainer.parameters}
    if not all(0 <= n <= trainer.step for n in trainer.optimizer.steps.values()):
        raise ValueError("its optimizer took other steps")
    for name, generator in trainer.generators.items():
        generator.bit_generator.state = state["generators"][name]
