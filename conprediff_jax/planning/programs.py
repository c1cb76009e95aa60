"""The programs of an experiment, lowered for devices that need not exist."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from conprediff_jax import parallel
from conprediff_jax.common.errors import UserError
from conprediff_jax.config.experiment import Experiment
from conprediff_jax.sampling.generate import make_generate
from conprediff_jax.sampling.model import DiffusionModel
from conprediff_jax.tasks.denoising import Denoising
from conprediff_jax.tasks.state import TrainState, abstract_state
from conprediff_jax.tasks.step import make_train_step


def abstract_batch(experiment: Experiment, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a batch as the train step reads it."""
    task = experiment.task
    batch, sharding = experiment.train.batch_size, parallel.batch_sharding(mesh)
    parts: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": (experiment.data.image_shape, jnp.uint8),
        "label": ((), jnp.int32),
    }
    if "latent" in task.batch_keys:
        parts["latent"] = (task.model.point_shape, jnp.float32)
    if "text" in task.batch_keys:
        parts["text"] = ((task.model.text.encoder.length,), jnp.int32)
    if "encoded" in task.batch_keys:
        parts["encoded"] = (
            (task.model.text.encoder.length, task.model.text.encoder.width),
            jnp.float16,
        )
    if "features" in task.batch_keys:
        parts["features"] = (task.features_shape, jnp.float16)
    return {
        key: jax.ShapeDtypeStruct((batch, *parts[key][0]), parts[key][1], sharding=sharding)
        for key in task.batch_keys
    }


def train_state(experiment: Experiment, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the train state."""
    optimizer = experiment.optimizer.make(experiment.train.steps)
    train = experiment.train
    return abstract_state(
        experiment.task, optimizer, mesh, train.power_averages, train.divide_update
    )


def lower_train_step(experiment: Experiment, mesh: Mesh) -> jax.stages.Lowered:
    """The train step that a run on this mesh would compile."""
    state = train_state(experiment, mesh)
    step = make_train_step(experiment.task, experiment.train, experiment.optimizer, state, mesh)
    return step.lower(state, abstract_batch(experiment, mesh))


def sampler_state(experiment: Experiment, mesh: Mesh) -> tuple[Any, Any]:
    """Shapes of the moving average and the frozen parameters, which sampling replicates.

    Raises:
        UserError: The experiment trains a first stage, which has no sampler.
    """
    networks = jax.eval_shape(_model_of(experiment).init, 0)
    return jax.tree.map(lambda leaf: _replicated(leaf.shape, leaf.dtype, mesh), networks)


def _model_of(experiment: Experiment) -> DiffusionModel:
    if not isinstance(experiment.task, Denoising):
        raise UserError(
            "config.task trains a first stage, which has no sampler: plan it with sampler=False"
        )
    return experiment.task.model


def lower_sampler(experiment: Experiment, mesh: Mesh, batch_size: int) -> jax.stages.Lowered:
    """The sampler of the config for batches of `batch_size` images; see `sampler_state`."""
    model = _model_of(experiment)
    params, frozen = sampler_state(experiment, mesh)
    indices = _replicated((batch_size,), jnp.int32, mesh)
    labels = indices if model.num_classes else None
    texts = None
    if model.text:
        texts = _replicated((batch_size, model.text.encoder.length), jnp.int32, mesh)
    seed = _replicated((), jnp.uint32, mesh)
    generate = make_generate(model, model.sampling, mesh)
    return generate.lower(params, frozen, seed, indices, labels, texts)


def _replicated(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=parallel.replicated(mesh))
