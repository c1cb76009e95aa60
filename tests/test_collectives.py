"""Tests of communication between devices: single collectives by hand, and the real train step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from conprediff_jax import parallel
from conprediff_jax.config import default_discrete, palette
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.parallel import sharding
from conprediff_jax.planning import programs
from conprediff_jax.planning.topology import Topology
from conprediff_jax.xla.collectives import by_axis, collectives, replica_groups
from conprediff_jax.xla.cost import program_cost
from conprediff_jax.xla.hlo import Module

MESH = {"data": 2, "fsdp": 4}


def on_mesh(function, spec, shape):
    """Collectives of a function of one array, per device, on a mesh of 2 x 4."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), tuple(MESH))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    struct = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    return collectives(Module(jax.jit(mapped).lower(struct).compile().as_text()), MESH)


BYTES = 4 * 16 * 32  # of the array on one device


@pytest.mark.parametrize(
    ("function", "kind", "axes", "traffic"),
    [
        (lambda x: jax.lax.psum(x, "data"), "all-reduce", ("data",), 2 * BYTES / 2),
        (lambda x: jax.lax.psum(x, "fsdp"), "all-reduce", ("fsdp",), 2 * BYTES * 3 / 4),
        (lambda x: jax.lax.psum(x, tuple(MESH)), "all-reduce", tuple(MESH), 2 * BYTES * 7 / 8),
        (lambda x: jax.lax.all_gather(x, "fsdp").sum(0), "all-gather", ("fsdp",), 3 * BYTES),
        (
            lambda x: jnp.tile(jax.lax.psum_scatter(x, "fsdp", tiled=True), (4, 1)),
            "reduce-scatter",
            ("fsdp",),
            BYTES * 3 / 4,
        ),
        (
            lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True),
            "all-to-all",
            ("data",),
            BYTES / 2,
        ),
        (
            lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 2), (2, 3), (3, 0)]),
            "collective-permute",
            ("fsdp",),
            BYTES,
        ),
    ],
)
def test_collectives_by_hand(function, kind, axes, traffic):
    (found,) = on_mesh(function, P(("data", "fsdp")), (8 * 16, 32))
    assert (found.kind, found.axes) == (kind, axes)
    assert found.payload == BYTES
    assert found.traffic == traffic


def test_collectives_in_loops_count_every_round():
    def rounds(x):
        return jax.lax.scan(lambda x, _: (jax.lax.psum(x * 2, "data"), None), x, None, length=5)[0]

    total = by_axis(on_mesh(rounds, P(("data", "fsdp")), (8 * 16, 32)))
    assert total == {"data": {"payload": 5 * BYTES, "traffic": 5 * BYTES, "operations": 5}}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [(0, 1), (2, 3)]),
        ("replica_groups={}, x", [(0, 1, 2, 3, 4, 5, 6, 7)]),
        ("replica_groups=[2,4]<=[8], x", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=4] {'a','b'}, x", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        (
            "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x",
            [(0, 1), (2, 3)],
        ),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("source_target_pairs={{0,1},{1,0},{2,2}}, x", [(0, 1), (1, 0)]),
    ],
)
def test_replica_groups_in_every_notation(text, groups):
    assert replica_groups(text, 8) == groups


# --- the train step -------------------------------------------------------------------------------


KINDS = ("all-gather", "all-reduce")


def parameter_bytes(config):
    params = jax.eval_shape(make_experiment(config).task.init)[0]
    return 4 * sum(leaf.size for leaf in jax.tree.leaves(params))


def compiled_step(devices, config=None, **axes):
    """The train step on a mesh of such axes, two examples a device."""
    config = config or tiny.get_config()
    config.train.batch_size = 2 * len(devices)
    mesh = parallel.make_mesh(parallel.MeshSpec(**axes), devices)
    program = programs.lower_train_step(make_experiment(config), mesh).compile()
    module = Module(program.as_text())
    return module, collectives(module, dict(mesh.shape))


def test_data_parallel_chips_exchange_gradients_only():
    """As many bytes on two chips as on eight: those of the parameters, and a few scalars."""
    config = tiny.get_config()
    config.train.divide_update = False
    gradients = parameter_bytes(config)
    for devices in (2, 8):
        _, found = compiled_step(jax.devices()[:devices], config)
        assert {(c.kind, c.axes) for c in found} == {("all-reduce", ("data",))}
        assert gradients <= sum(c.payload for c in found) <= gradients + 1024


def stacked():
    """A config whose blocks are one loop, with a batch that is large beside the parameters."""
    config = default_discrete(palette(3)).unlock()
    config.data.update(name="nowhere", image_size=8)
    config.model.update(width=32, num_layers=3, num_heads=2)
    config.context.update(weight=0.5, hidden=16, samples=4, iterations=5)
    return config


# The sums of the loss have some bytes, too.
@pytest.mark.parametrize(("make", "loss"), [(tiny.get_config, 4096), (stacked, 8192)])
def test_a_divided_update_gathers_parameters_once_and_no_activations(make, loss):
    parameters = parameter_bytes(make())
    module, found = compiled_step(jax.devices()[:8], make())
    sent = {kind: sum(c.payload for c in found if c.kind == kind) for kind in KINDS}
    assert {(c.kind, c.axes) for c in found} == {(kind, ("data",)) for kind in KINDS}
    assert sent["all-gather"] <= parameters  # small arrays are not divided
    assert parameters <= sent["all-reduce"] <= parameters + loss
    config = make()
    config.train.divide_update = False
    whole, _ = compiled_step(jax.devices()[:8], config)
    assert program_cost(module).flops < program_cost(whole).flops


def test_fsdp_moves_parameters_but_no_activations(monkeypatch):
    """ZeRO-3: parameters are gathered twice and gradients summed; every device does its share."""
    monkeypatch.setattr(sharding, "MIN_FSDP_SIZE", 1)
    config = tiny.get_config()
    config.train.divide_update = False
    data, _ = compiled_step(jax.devices()[:8], config)
    module, found = compiled_step(jax.devices()[:8], fsdp=8)
    kinds = {
        kind: sum(c.traffic for c in found if c.kind == kind) for kind in {c.kind for c in found}
    }
    once = 7 / 8 * parameter_bytes(tiny.get_config())
    assert kinds.keys() == set(KINDS)
    assert kinds["all-gather"] <= 2 * once and kinds["all-reduce"] <= 2 * once + 4096
    assert program_cost(module).flops < program_cost(data).flops


def test_gradients_are_summed_in_float32():
    pytest.importorskip("libtpu")
    config = tiny.get_config()
    config.dtype = "bfloat16"
    module, found = compiled_step(Topology.parse("v5e:2x2").devices(), config)
    sums = [visit.instruction for visit in module.visits() if "reduce" in visit.instruction.opcode]
    sums = [instruction for instruction in sums if instruction.opcode.startswith("all-reduce")]
    assert {shape.dtype for instruction in sums for shape in instruction.shapes} == {"f32"}
    # Nearly all: gradients that are zero by structure are not sent.
    assert sum(c.payload for c in found) >= 0.99 * parameter_bytes(config)
