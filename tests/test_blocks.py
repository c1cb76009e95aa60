"""Tests of stacks of blocks: how their parameters are stacked, and how older checkpoints open."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from jax.sharding import PartitionSpec
from small_run import CONFIG, batches
from tiny import assert_same

from conprediff_jax.common import blocks
from conprediff_jax.config import default_discrete, palette
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.parallel import sharding
from conprediff_jax.runs.checkpoint import Checkpoints
from conprediff_jax.tasks.state import abstract_state, init_state


def tree(layers):
    """A model with blocks of its own, and a part that has blocks, too."""
    rng = np.random.default_rng(0)
    return {
        "blocks": {
            "in": {"kernel": rng.normal(size=(layers, 2, 3))},
            "scale": np.ones((layers, 1)),
        },
        "output": {"kernel": rng.normal(size=(3, 4))},
        "text": {"blocks": {"bias": rng.normal(size=(2, 5))}, "norm": np.zeros(5)},
    }


def test_blocks_are_taken_apart_and_stacked_in_their_order():
    whole = tree(layers=12)  # block_10 comes after block_9
    moments = (whole, [None, whole])
    apart = blocks.separate(moments)
    assert set(apart[0]) == {"output", "text", *(f"block_{i}" for i in range(12))}
    np.testing.assert_array_equal(
        apart[1][1]["block_10"]["in"]["kernel"], whole["blocks"]["in"]["kernel"][10]
    )
    assert set(apart[0]["text"]) == {"norm", "block_0", "block_1"}
    assert_same(blocks.stack(apart), moments)
    assert blocks.are_separate(apart) and not blocks.are_stacked(apart)
    assert blocks.are_stacked(moments) and not blocks.are_separate(moments)


def test_a_checkpoint_with_separate_blocks_opens_on_any_mesh(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_FSDP_SIZE", 1)
    config = default_discrete(palette(3)).unlock()
    config.data.update(name="nowhere", image_size=4)
    config.model.update(width=16, num_layers=3, num_heads=2)
    experiment = make_experiment(config)
    optimizer = experiment.optimizer.make(10)
    one = abstract_state(experiment.task, optimizer, tiny.mesh_of())
    state = init_state(experiment.task, optimizer, one)
    older = blocks.separate(state.replace(step=jnp.int32(3)))
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(older, batches(3), CONFIG)
    mesh = tiny.mesh_of(8, data=2, fsdp=2, tensor=2)
    abstract = abstract_state(experiment.task, optimizer, mesh)
    with Checkpoints(str(tmp_path)) as checkpoints:
        found = checkpoints.restore(abstract, batches(), CONFIG)
    assert_same(found, state.replace(step=jnp.int32(3)))
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == jax.tree.map(
        lambda leaf: leaf.sharding, abstract
    )
    query = found.params["denoiser"]["blocks"]["self_attention"]["query"]["kernel"]
    assert query.sharding.spec == PartitionSpec(None, ("fsdp", "data"), "tensor")
