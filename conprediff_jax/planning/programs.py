"""The programs of an experiment, compiled for devices that need not be there."""

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
    """A batch as the train step reads it, without data."""
    task, size = experiment.task, experiment.data.image_size
    batch, sharding = experiment.train.batch_size, parallel.batch_sharding(mesh)
    parts: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": ((size, size, 3), jnp.uint8),
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
    return {
        key: jax.ShapeDtypeStruct((batch, *parts[key][0]), parts[key][1], sharding=sharding)
        for key in task.batch_keys
    }


def train_state(experiment: Experiment, mesh: Mesh) -> TrainState:
    """The state's shapes and shardings."""
    optimizer = experiment.optimizer.make(experiment.train.steps)
    return abstract_state(experiment.task, optimizer, mesh)


def lower_train_step(experiment: Experiment, mesh: Mesh) -> jax.stages.Lowered:
    """The train step that a run on this mesh would compile."""
    optimizer = experiment.optimizer.make(experiment.train.steps)
    state = abstract_state(experiment.task, optimizer, mesh)
    step = make_train_step(experiment.task, experiment.train, experiment.optimizer, state, mesh)
    return step.lower(state, abstract_batch(experiment, mesh))


def sampler_state(experiment: Experiment, mesh: Mesh) -> tuple[Any, Any]:
    """Moving average and frozen networks, whole on every device as `sample.py` has them.

    Raises:
        UserError: the experiment trains a first stage, which is not sampled.
    """
    networks = jax.eval_shape(_model_of(experiment).init, 0)
    return jax.tree.map(lambda leaf: _replicated(leaf.shape, leaf.dtype, mesh), networks)


def _model_of(experiment: Experiment) -> DiffusionModel:
    if not isinstance(experiment.task, Denoising):
        raise UserError("config.task trains a first stage, which is not sampled: plan it without")
    return experiment.task.model


def lower_sampler(experiment: Experiment, mesh: Mesh, batch_size: int) -> jax.stages.Lowered:
    """The sampler of the config, drawing so many images at a time; see `sampler_state`."""
    model = _model_of(experiment)
    params, frozen = sampler_state(experiment, mesh)
    each = _replicated((batch_size,), jnp.int32, mesh)
    labels = each if model.num_classes else None
    texts = None
    if model.text:
        texts = _replicated((batch_size, model.text.encoder.length), jnp.int32, mesh)
    seed = _replicated((), jnp.uint32, mesh)
    generate = make_generate(model, model.sampling, mesh)
    return generate.lower(params, frozen, seed, each, labels, texts)


def _replicated(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=parallel.replicated(mesh))
