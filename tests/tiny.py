"""A model that compiles in seconds, images for it, and a config file for the commands."""

import json
import pathlib

import jax
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from conprediff_jax import parallel
from conprediff_jax.config import default
from conprediff_jax.runs.first_stage import WEIGHTS
from conprediff_jax.tasks.state import abstract_state, init_state
from conprediff_jax.tasks.step import make_train_step
from conprediff_jax.weights.diffusers.autoencoder import params_to_diffusers


def get_config():
    config = default()
    config.data.update(name="/set/data.name", image_size=8, flip=True, threads=2)
    config.first_stage.patch = 2
    config.process.update(num_steps=20, prediction="v", schedule="cosine")
    config.model.update(channels=32, channel_mult=(1,), blocks_per_level=1, head_channels=16)
    config.context.update(weight=0.5, hidden=16, latent=4, samples=4, iterations=5, strides=(1, 2))
    config.context.warmup_steps = 0
    # Adam divides by the gradient: a larger epsilon keeps rounding from deciding tiny ones.
    config.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup_steps=2, epsilon=1e-3)
    config.train.update(steps=6, batch_size=8, log_every=1, checkpoint_every=3, ema_decay=0.9)
    config.sampling.update(num=4, steps=3)
    return config


def write_images(folder: pathlib.Path, count: int = 24) -> pathlib.Path:
    folder.mkdir(parents=True)
    values = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    for index, pixels in enumerate(values):
        Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return folder


def write_autoencoder(folder: pathlib.Path, model, seed: int = 0) -> pathlib.Path:
    """A diffusers folder of an autoencoder with random weights."""
    params = jax.jit(model.init)(jax.random.key(seed), np.zeros((1, 8, 8, 3)))["params"]
    folder.mkdir(parents=True)
    save_file(params_to_diffusers(params, model), folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps({"_class_name": type(model).__name__}))
    return folder


def mesh_of(devices=1, **axes):
    return parallel.make_mesh(parallel.MeshSpec(**axes), jax.devices()[:devices])


def run_steps(experiment, mesh, batch, steps=3, task_state=None):
    """Final state and trace of metrics of a few steps on one batch."""
    optimizer = experiment.optimizer.make(experiment.train.steps)
    train = experiment.train
    abstract = abstract_state(
        experiment.task, optimizer, mesh, train.power_averages, train.divide_update
    )
    state = init_state(experiment.task, optimizer, abstract)
    if task_state is not None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state.task_state)
        state = state.replace(task_state=jax.device_put(task_state, shardings))
    train_step = make_train_step(
        experiment.task, experiment.train, experiment.optimizer, abstract, mesh
    )
    batch, trace = parallel.to_global(batch, mesh), []
    for _ in range(steps):
        state, metrics = train_step(state, batch)
        trace.append(jax.device_get(metrics))
    assert train_step._cache_size() == 1  # one compilation
    return state, trace


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
