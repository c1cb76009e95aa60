"""The train state: everything a step changes, and nothing else (no keys, no data)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from conprediff_jax import parallel
from conprediff_jax.experiment import Experiment


class TrainState(struct.PyTreeNode):
    """What is trained.

    Attributes:
        step: number of steps done, int32.
        params: `{'denoiser': ..., 'context': ...}`, float32.
        ema: moving average of `params['denoiser']`; this is what is sampled from and handed on.
        opt_state: the optimiser's.
    """

    step: Any  # arrays, or shape structs or shardings in their place
    params: dict[str, Any]
    ema: Any
    opt_state: Any


def abstract_state(
    experiment: Experiment, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state as shape structs that carry shape, dtype and sharding."""
    shapes = jax.eval_shape(lambda: _initial(experiment, optimizer))
    shardings = parallel.tree_shardings(shapes, mesh)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def init_state(
    experiment: Experiment, optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """A fresh state, made in place: no device ever holds more than its part."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(lambda: _initial(experiment, optimizer), out_shardings=shardings)()


def _initial(experiment: Experiment, optimizer: optax.GradientTransformation) -> TrainState:
    params = experiment.init()
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy: the step donates its state, and no buffer can be donated twice.
        ema=jax.tree.map(jnp.copy, params["denoiser"]),
        opt_state=optimizer.init(params),
    )
