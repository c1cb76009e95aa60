"""A run whose checkpoints need no model: a few arrays, a config and a stream of data."""

import functools

import grain
import jax
import jax.numpy as jnp
import numpy as np

from conprediff_jax.runs.batches import Batches
from conprediff_jax.runs.checkpoint import Checkpoints
from conprediff_jax.tasks.state import TrainState

CONFIG = {"task": "denoising", "seed": 3, "context": {"weight": 0.5}, "model": {"channels": 32}}


@functools.cache
def state_at(step):
    """A state in which every number is the step."""
    rng = np.random.default_rng(step)
    tree = {"kernel": rng.normal(size=(40, 50)), "bias": rng.normal(size=50), "scale": step + 0.5}
    tree = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), tree)
    ema, params, moments = (jax.tree.map(lambda x, i=i: x + i, tree) for i in range(3))
    task_state = {"history": jnp.full(3, step, jnp.int32)}
    return TrainState(jnp.int32(step), {"denoiser": params}, ema, (moments, None), task_state)


@functools.cache
def abstract():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state_at(0)
    )


def for_inference(config):
    return abstract().ema, abstract().task_state


def batches(seen=0):
    records = grain.MapDataset.range(1000).map(lambda index: {"index": index})
    iterator = iter(records.to_iter_dataset())
    for _ in range(seen):
        next(iterator)
    return Batches(iterator, (0, 1))


def write(workdir, *steps, **kept):
    """Writes checkpoints after the given steps, each of which has seen as many records."""
    with Checkpoints(str(workdir), **kept) as checkpoints:
        for step in steps:
            checkpoints.save(state_at(step), batches(step), CONFIG)
    return workdir
