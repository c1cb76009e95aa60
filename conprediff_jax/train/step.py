"""The train step: objective = process loss + context loss, its gradient, AdamW, moving average.

    L = mean_batch L_denoise(x_0, t) + w(step) * lambda_t * mean_i sum_s w_s W_2^2(i, s)         (1)

Source: arXiv 2401.02015, section 3. With `context.weight = 0` there is no context decoder and the
program is that of the plain diffusion model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, Shaped

from conprediff_jax import parallel, random
from conprediff_jax.experiment import Experiment
from conprediff_jax.train.state import TrainState

Batch = dict[str, Shaped[Array, "batch ..."]]
Metrics = dict[str, Float[Array, ""]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class Keys(NamedTuple):
    """One key per example for every random stream of a step."""

    time: Key[Array, "batch"]
    noise: Key[Array, "batch"]
    context: Key[Array, "batch"]
    dropout: Key[Array, "batch"]


def make_train_step(
    experiment: Experiment,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    mesh: Mesh,
) -> TrainStep:
    """The jitted step. It donates its state and is compiled once.

    Args:
        experiment: what to train.
        optimizer: of `experiment.train.steps`.
        abstract: shapes and shardings of the state.
        mesh: where to train.

    Returns:
        `(state, batch) -> (state, metrics)`; metrics are replicated float32 scalars.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    learning_rates = experiment.optimizer.learning_rates(experiment.train.steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, metrics = gradients(experiment, state.params, batch, state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.step.astype(jnp.float32)
        decay = jnp.minimum(experiment.train.ema_decay, (1 + step) / (10 + step))
        metrics |= {
            "norm/gradient": optax.global_norm(grads),
            "norm/parameter": optax.global_norm(params),
            "norm/update": optax.global_norm(updates),
            "learning_rate": jnp.asarray(learning_rates(state.step), jnp.float32),
        }
        state = state.replace(
            step=state.step + 1,
            params=params,
            ema=optax.incremental_update(params["denoiser"], state.ema, 1 - decay),
            opt_state=opt_state,
        )
        return state, metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, parallel.batch_sharding(mesh)),
        out_shardings=(shardings, parallel.replicated(mesh)),
        donate_argnums=0,
    )


def gradients(
    experiment: Experiment, params: dict[str, Any], batch: Batch, step: Int[Array, ""]
) -> tuple[Any, Metrics]:
    """Gradient of (1) over the whole batch, in as many microbatches as configured.

    Returns:
        Gradients in the shape of `params`, float32, and the loss terms.
    """
    size = len(batch["image"])
    indices = jnp.arange(size)
    keys = Keys(
        *(
            random.example_keys(random.stream(experiment.seed, f"train/{name}", step), indices)
            for name in Keys._fields
        )
    )
    parts = experiment.train.microbatches
    grad = jax.grad(lambda p, b, k: objective(experiment, p, b, k, step), has_aux=True)
    if parts == 1:
        return grad(params, batch, keys)

    # Every device keeps its own examples: microbatch m takes each parts-th one, not a block.
    split = jax.tree.map(lambda x: rearrange(x, "(b m) ... -> m b ...", m=parts), (batch, keys))

    def accumulate(total, part):
        return jax.tree.map(jnp.add, total, grad(params, *part)), None

    shapes = jax.eval_shape(grad, params, *jax.tree.map(lambda x: x[0], split))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(accumulate, zeros, split)
    return jax.tree.map(lambda leaf: leaf / parts, total)


def objective(
    experiment: Experiment, params: dict[str, Any], batch: Batch, keys: Keys, step: Int[Array, ""]
) -> tuple[Float[Array, ""], Metrics]:
    """Equation (1) on one (micro)batch, and its terms."""
    x_0 = experiment.first_stage.encode(batch["image"])
    label = batch["label"] if experiment.denoiser.num_classes else None
    t = experiment.process.sample_time(keys.time)
    x_t, noise = experiment.process.corrupt(keys.noise, x_0, t)
    output, features = experiment.denoise(
        params["denoiser"], x_t, t, label=label, rng=keys.dropout[0]
    )
    denoise = experiment.process.loss(output, x_0, x_t, noise, t).mean()
    metrics = {"loss": denoise, "loss/denoise": denoise}
    context = experiment.context
    if context is None:
        return denoise, metrics
    h = features
    if context.source == "prediction":
        h = experiment.process.predict_x0(output, x_t, t)
    weighted, distance = context.loss(params["context"], h, x_0, t, keys.context)
    loss = denoise + context.warmup(step) * weighted.mean()
    metrics |= {"loss": loss, "loss/context": weighted.mean()}
    for index, stride in enumerate(context.strides):
        metrics[f"distance/stride_{stride}"] = distance[:, index].mean()
    return loss, metrics
