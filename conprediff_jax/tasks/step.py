"""The train step, which is the same for every task: gradients, AdamW and averages of parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh

from conprediff_jax import parallel
from conprediff_jax.tasks.optimizer import OptimizerSpec
from conprediff_jax.tasks.power_averages import exponent, share_of_newest
from conprediff_jax.tasks.spec import TrainSpec
from conprediff_jax.tasks.state import TrainState
from conprediff_jax.tasks.task import Batch, Metrics, Task

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    task: Task,
    train: TrainSpec,
    optimizer: OptimizerSpec,
    abstract: TrainState,
    mesh: Mesh,
) -> TrainStep:
    """The jitted train step. It donates its state and is compiled once.

    Args:
        task: What is trained.
        train: The number of steps, the batch size and the moving average's decay.
        optimizer: The optimiser.
        abstract: Shapes and shardings of the state.
        mesh: The mesh to train on.

    Returns:
        A function `(state, batch) -> (state, metrics)`; metrics are replicated float32 scalars.
    """
    learning_rates = optimizer.learning_rates(train.steps)
    transformation = optimizer.make(train.steps)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    gather, scatter = _exchange(abstract.params, mesh, train.gather_dtype)
    exponents = {name: exponent(float(name)) for name in abstract.power_averages}

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        params = gather(state.params)
        with parallel.divided_batch(mesh, train.batch_size // train.microbatches):
            stepped = task.step(params, state.task_state, batch, state.step)
        grads, metrics, task_state, assigned = stepped
        grads = scatter(grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = transformation.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        if assigned:
            params = traverse_util.unflatten_dict(traverse_util.flatten_dict(params) | assigned)
        step = state.step.astype(jnp.float32)
        decay = jnp.minimum(train.ema_decay, (1 + step) / (10 + step))
        metrics |= {
            "norm/gradient": optax.global_norm(grads),
            "norm/parameter": optax.global_norm(params),
            "norm/update": optax.global_norm(updates),
            "learning_rate": jnp.asarray(learning_rates(state.step), jnp.float32),
        }
        done, newest = state.step + 1, params[task.averaged]
        state = TrainState(
            step=done,
            params=params,
            ema=optax.incremental_update(newest, state.ema, 1 - decay),
            opt_state=opt_state,
            task_state=task_state,
            power_averages={
                name: optax.incremental_update(
                    newest, average, share_of_newest(done, exponents[name])
                )
                for name, average in state.power_averages.items()
            },
        )
        return state, metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, parallel.batch_sharding(mesh)),
        out_shardings=(shardings, parallel.replicated(mesh)),
        donate_argnums=0,
    )


def _exchange(
    held: Any, mesh: Mesh, dtype: str
) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """How parameters come to the devices that compute with them, and their gradients back.

    Args:
        held: Shapes and shardings of the parameters as they are between steps.
        mesh: The mesh.
        dtype: The dtype of kernels, and of the sums of their gradients, on the way.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, held)
    used = parallel.tree_shardings(held, mesh)
    if used == shardings:
        return lambda params: params, lambda grads: grads

    def gather(params: Any) -> Any:
        sent = jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params)
        return jax.lax.with_sharding_constraint(sent, used)

    def scatter(grads: Any) -> Any:
        # Summed first: if a product were asked for a part of its result alone, the compiler would
        # gather activations, or compute the product in as many pieces as there are devices.
        summed = jax.lax.with_sharding_constraint(grads, used)
        divided = jax.lax.with_sharding_constraint(summed, shardings)
        return jax.tree.map(lambda g, x: g.astype(x.dtype), divided, held)

    return gather, scatter
