"""The train state: everything that a step changes, and nothing else (no keys, no data)."""

from collections.abc import Iterable, Sequence
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
        power_averages: Power-function averages of the same branch by their relative deviations, as
            text; see `power_averages`.
    """

    step: Any
    params: dict[str, Any]
    ema: Any
    opt_state: Any
    task_state: Any
    power_averages: dict[str, Any] = struct.field(default_factory=dict)


def abstract_state(
    task: Task,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    power_averages: Sequence[float] = (),
    divide_update: bool = True,
) -> TrainState:
    """The state as shape structs that carry shape, dtype and sharding, as it is between steps.

    Args:
        task: What is trained.
        optimizer: The optimiser.
        mesh: The mesh to train on.
        power_averages: Relative deviations of the power-function averages to keep.
        divide_update: Whether the `data` axis divides what only the update reads and writes.
    """
    names = [str(deviation) for deviation in power_averages]
    shapes = jax.eval_shape(lambda: _initial(task, optimizer, names))
    shardings = parallel.tree_shardings(shapes, mesh, held=divide_update)
    shardings = shardings.replace(task_state=parallel.tree_shardings(shapes.task_state, mesh))
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def gathered(params: Any, mesh: Mesh) -> Any:
    """Parameters that the `data` axis divides between steps, as networks read them."""
    used = parallel.tree_shardings({"params": params}, mesh)["params"]
    if used == jax.tree.map(lambda leaf: leaf.sharding, params):
        return params
    return jax.jit(lambda tree: tree, out_shardings=used)(params)


def init_state(
    task: Task, optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """A fresh state, which is created sharded: no device ever holds more than its part."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        lambda: _initial(task, optimizer, abstract.power_averages), out_shardings=shardings
    )()


def _initial(
    task: Task, optimizer: optax.GradientTransformation, power_averages: Iterable[str]
) -> TrainState:
    params, task_state = task.init()
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy: the step donates its state, and no buffer can be donated twice.
        ema=jax.tree.map(jnp.copy, params[task.averaged]),
        opt_state=optimizer.init(params),
        task_state=task_state,
        # They start from nothing: the first step replaces them.
        power_averages={
            name: jax.tree.map(jnp.zeros_like, params[task.averaged]) for name in power_averages
        },
    )
