"""The train state: everything that a step changes, and nothing else (no keys, no data)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from conprediff_jax import parallel
from conprediff_jax.tasks.task import Task


class TrainState(struct.PyTreeNode):
    """The state of a run. Leaves are arrays, or shape structs or shardings in their place.

    Attributes:
        step: Number of steps done, int32.
        params: Parameters, float32, with one branch for every network of the task.
        ema: Moving average of the branch `Task.averaged`, which is sampled and exported.
        opt_state: State of the optimiser.
        task_state: State of the task, such as parameters that are not trained; None if it has none.
    """

    step: Any
    params: dict[str, Any]
    ema: Any
    opt_state: Any
    task_state: Any


def abstract_state(task: Task, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state as shape structs that carry shape, dtype and sharding."""
    shapes = jax.eval_shape(lambda: _initial(task, optimizer))
    shardings = parallel.tree_shardings(shapes, mesh)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def init_state(
    task: Task, optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """A fresh state, which is created sharded: no device ever holds more than its part."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(lambda: _initial(task, optimizer), out_shardings=shardings)()


def _initial(task: Task, optimizer: optax.GradientTransformation) -> TrainState:
    params, task_state = task.init()
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy: the step donates its state, and no buffer can be donated twice.
        ema=jax.tree.map(jnp.copy, params[task.averaged]),
        opt_state=optimizer.init(params),
        task_state=task_state,
    )
