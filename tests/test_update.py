"""The update of parameters, divided over the devices that share a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import mesh_of

from conprediff_jax import parallel
from conprediff_jax.tasks.optimizer import OptimizerSpec
from conprediff_jax.tasks.spec import TrainSpec
from conprediff_jax.tasks.state import abstract_state, gathered, init_state
from conprediff_jax.tasks.step import make_train_step
from conprediff_jax.tasks.task import Step, Task

SIZE = 128


class Turning(Task):
    """A task of the trainer: a linear map that learns to turn its input round."""

    averaged, batch_keys = "net", ("x",)
    num_classes = tokenizer = None

    def init(self):
        kernel = jax.random.normal(jax.random.key(0), (SIZE, SIZE)) / SIZE**0.5
        return {"net": {"kernel": kernel, "bias": jnp.zeros(SIZE)}}, None

    def step(self, params, task_state, batch, step):
        def loss(params):
            net = params["net"]
            x = batch["x"].astype(net["kernel"].dtype)
            return jnp.square(x @ net["kernel"] + net["bias"] + batch["x"]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        return Step(grads, {"loss": value}, task_state)


def trained(mesh, steps=3, **settings):
    """The state after some steps, and the compiled step."""
    train = TrainSpec(steps=10, batch_size=8, ema_decay=0.9, **settings)
    optimizer = OptimizerSpec(learning_rate=1e-2, warmup_steps=0)
    abstract = abstract_state(Turning(), optimizer.make(10), mesh, (0.1,), train.divide_update)
    state = init_state(Turning(), optimizer.make(10), abstract)
    batch = {"x": np.random.default_rng(0).normal(size=(8, SIZE)).astype(np.float32)}
    batch = parallel.to_global(batch, mesh)
    compiled = (
        make_train_step(Turning(), train, optimizer, abstract, mesh).lower(state, batch).compile()
    )
    for _ in range(steps):
        state, _ = compiled(state, batch)
    return state, compiled


@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 4, "fsdp": 2}], ids=str)
def test_a_divided_update_gives_the_state_of_one_device_in_a_part_of_the_memory(axes):
    devices = int(np.prod(list(axes.values())))
    alone, _ = trained(mesh_of())
    mesh = mesh_of(devices, **axes)
    state, divided = trained(mesh)
    whole, everywhere = trained(mesh, divide_update=False)
    for other in (state, whole):
        for a, b in zip(*map(jax.tree.leaves, (alone, other)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    for tree in (state.params["net"], state.ema, state.power_averages["0.1"]):
        assert tree["kernel"].addressable_shards[0].data.size == SIZE**2 // devices
    sizes = [each.memory_analysis().argument_size_in_bytes for each in (divided, everywhere)]
    assert sizes[0] < 1.1 * sizes[1] / axes["data"]
    read = gathered(state.ema, mesh)
    assert read["kernel"].sharding == whole.ema["kernel"].sharding
    np.testing.assert_array_equal(read["kernel"], state.ema["kernel"])


def test_kernels_travel_in_the_dtype_that_is_asked_for():
    exact, _ = trained(mesh_of(4))
    rounded, step = trained(mesh_of(4), gather_dtype="bfloat16")
    assert "bf16[128,128]" in step.as_text()
    kernels = [np.asarray(state.params["net"]["kernel"]) for state in (exact, rounded)]
    assert 0 < np.abs(kernels[0] - kernels[1]).max() < 0.03
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded.params)} == {jnp.dtype("float32")}
