"""Averages of parameters that a run did not keep, made from those that it stored."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from conprediff_jax.runs.checkpoint import CheckpointError, Checkpoints
from conprediff_jax.tasks.power_averages import Profile, check_deviation, reconstruct

# Largest distance between the weights of an average and those it was to have; see `Reconstruction`.
LARGEST_ERROR = 0.1

_NEGLIGIBLE = 1e-8  # a factor that float32 does not see beside 1


def power_average(
    checkpoints: Checkpoints, deviations: Sequence[float], step: int, deviation: float, like: Any
) -> Any:
    """The average of any relative deviation at the step of a checkpoint.

    Args:
        checkpoints: The checkpoints of the run.
        deviations: Relative deviations of the averages that the run keeps.
        step: The step.
        deviation: The relative deviation, see `tasks.power_averages`.
        like: Arrays with the shapes, dtypes and shardings of the parameters.

    Raises:
        FieldError: There is no average of this relative deviation.
        CheckpointError: The stored averages do not allow this one.
    """
    check_deviation(deviation, "average")
    steps = checkpoints.snapshots(step) if deviations else []
    if step not in steps:
        raise CheckpointError(
            f"{checkpoints.folder / str(step)} holds no power-function averages, which other "
            "averages are made from: only training with config.train.power_averages stores them"
        )
    stored = [Profile(*pair) for pair in itertools.product(steps, deviations)]
    factors, error = reconstruct(stored, Profile(step, deviation))
    if error > LARGEST_ERROR:
        raise CheckpointError(
            f"{checkpoints.folder} does not allow an average of relative deviation {deviation} at "
            f"step {step}: the nearest is {error:.0%} off; stored are averages "
            f"of {', '.join(map(str, deviations))} at {len(steps)} steps, {steps[0]} to {steps[-1]}"
        )
    logging.info(
        "average of relative deviation %g at step %d: from %d stored averages, error %.2g %%",
        deviation, step, len(stored), 100 * error,
    )  # fmt: skip
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    abstract = dict.fromkeys(map(str, deviations), shapes)
    total = jax.tree.map(lambda x: np.zeros(x.shape), like)  # float64, on the host
    for snapshot, row in zip(steps, factors.reshape(len(steps), -1), strict=True):
        if abs(row).max() > _NEGLIGIBLE:
            averages = checkpoints.power_averages(snapshot, abstract)
            for name, factor in zip(abstract, row, strict=True):
                total = jax.tree.map(
                    lambda x, y, factor=factor: x + factor * np.asarray(y), total, averages[name]
                )
    return jax.tree.map(
        lambda x, place: jax.device_put(x.astype(place.dtype), place.sharding), total, like
    )
