"""Tests of meshes and sharding rules: every mix of axes computes the same and divides its share."""

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from conprediff_jax import parallel
from conprediff_jax.models.transformer import TokenTransformer
from conprediff_jax.parallel import mesh as mesh_lib
from conprediff_jax.parallel import sharding
from conprediff_jax.runs import batches as batches_lib

MODEL = TokenTransformer(
    num_codes=16, grid=(2, 4), width=32, num_layers=1, num_heads=8, num_steps=10, text_dim=8
)
BATCH = 8


def inputs():
    rng = np.random.default_rng(0)
    return {
        "tokens": rng.integers(0, 16, (BATCH, 2, 4)).astype(np.int32),
        "t": rng.integers(0, 10, BATCH).astype(np.int32),
        "text": rng.normal(size=(BATCH, 3, 8)).astype(np.float32),
    }


def loss_of(params, batch):
    noisy = (batch["tokens"] + batch["t"][:, None, None]) % 17
    logits = MODEL.apply({"params": params}, noisy, batch["t"], text=batch["text"]).output
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"]).mean()


def init():
    batch = {name: value[:1] for name, value in inputs().items()}
    batch = jax.tree.map(jnp.asarray, batch)
    variables = MODEL.init(jax.random.key(0), batch["tokens"], batch["t"], text=batch["text"])
    return variables["params"]


def mesh_of(data, fsdp, tensor):
    spec = parallel.MeshSpec(data=data, fsdp=fsdp, tensor=tensor)
    return parallel.make_mesh(spec, jax.devices()[: data * fsdp * tensor])


OPTIMIZER = optax.adam(1e-2, eps=1e-3)


@pytest.fixture(scope="module")
def state():
    """Parameters and the moments of Adam, which are divided as they are."""
    return jax.device_get(jax.jit(lambda: (init(), OPTIMIZER.init(init())))())


def train(state, mesh, steps=3):
    """Losses and gradients of a few steps, and the parameters."""

    def step(params, moments, batch):
        with parallel.divided_batch(mesh, BATCH):
            loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, moments = OPTIMIZER.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, loss, grads

    shardings = parallel.tree_shardings(state, mesh)
    step = jax.jit(
        step,
        in_shardings=(*shardings, parallel.batch_sharding(mesh)),
        out_shardings=(*shardings, parallel.replicated(mesh), shardings[0]),
    )
    params, moments = jax.device_put(state, shardings)
    batch, trace = parallel.to_global(inputs(), mesh), []
    for _ in range(steps):
        params, moments, loss, grads = step(params, moments, batch)
        trace.append((float(loss), jax.device_get(grads)))
    return trace, params


# --- the same numbers -----------------------------------------------------------------------------

MIXES = [axes for axes in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(axes) == 8]


@pytest.fixture(scope="module")
def single_device(state):
    return train(state, mesh_of(1, 1, 1))[0]


@pytest.mark.parametrize("axes", MIXES, ids=lambda axes: "x".join(map(str, axes)))
def test_every_mix_gives_the_trace_and_gradients_of_one_device(
    axes, state, single_device, monkeypatch
):
    monkeypatch.setattr(sharding, "MIN_FSDP_SIZE", 1)
    trace, params = train(state, mesh_of(*axes))
    for (loss, grads), (expected, expected_grads) in zip(trace, single_device, strict=True):
        assert loss == pytest.approx(expected, abs=1e-5)
        for a, b in zip(*map(jax.tree.leaves, (grads, expected_grads)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    query = params["blocks"]["self_attention"]["query"]["kernel"]
    assert query.addressable_shards[0].data.size == query.size // (axes[1] * axes[2])


# --- what is divided ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"text_dim": 512}, {"num_classes": 1000}], ids=str)
@pytest.mark.parametrize("convolutional", [False, True])
def test_the_rules_divide_every_head_and_hidden_unit_of_the_transformer(options, convolutional):
    """At the size of the published model of 16 x 16 tokens, less its depth."""
    model = TokenTransformer(
        num_codes=2886, grid=(16, 16), width=1024, num_layers=2, num_heads=16,
        convolutional=convolutional, **options,
    )  # fmt: skip
    mesh = mesh_of(1, 4, 2)
    x, t = jnp.zeros((1, 16, 16), jnp.int32), jnp.zeros(1, jnp.int32)
    given = {
        "text": jnp.zeros((1, 77, 512)) if model.text_dim else None,
        "label": t if model.num_classes else None,
    }
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), x, t, **given))["params"]
    shardings = parallel.tree_shardings(params, mesh)
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shardings):
        found[sharding.path_name(path)] = leaf.spec
    columns = [s for p, s in found.items() if re.search(r"(query|key|value|/in)/kernel", p)]
    rows = [s for p, s in found.items() if re.search(r"(attention|feed_forward)/out/kernel", p)]
    attentions = 2 if model.text_dim else 1  # of each block; their parameters are stacked
    assert len(columns) == 3 * attentions + 1 and len(rows) == attentions + 1
    assert all(spec[0] is None for spec in columns + rows)
    assert all(spec[-1] == "tensor" and "fsdp" in spec for spec in columns)
    assert all(spec[-2] == "tensor" and "fsdp" in spec for spec in rows)
    # What neither divides is small: biases of layers that the tensor axis leaves whole.
    leaves = zip(*map(jax.tree.leaves, (params, shardings)), strict=True)
    local = sum(math.prod(sharding.shard_shape(leaf.shape)) for leaf, sharding in leaves)
    assert local < 0.251 * sum(leaf.size for leaf in jax.tree.leaves(params))


def forward(mesh):
    """Kinds of collectives, and FLOPs of a device, of the loss alone."""

    def loss(params, batch):
        with parallel.divided_batch(mesh, BATCH):
            return loss_of(params, batch)

    params = jax.eval_shape(init)
    shardings = parallel.tree_shardings(params, mesh), parallel.batch_sharding(mesh)
    program = jax.jit(loss, in_shardings=shardings).lower(params, inputs()).compile()
    kinds = r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
    return re.findall(kinds, program.as_text()), program.cost_analysis()["flops"]


def test_tensor_parallel_layers_do_their_share_and_meet_once_each():
    """Megatron's column and row pairs: one sum for each attention and MLP, and nothing else."""
    (_, whole), (collectives, share) = forward(mesh_of(1, 1, 1)), forward(mesh_of(1, 1, 8))
    assert collectives == ["all-reduce"] * 3  # self-attention, cross-attention, MLP
    assert share < whole / 4  # embeddings, norms and logits are everyone's


def test_fsdp_gathers_parameters_and_divides_all_the_work(monkeypatch):
    """ZeRO-3: the one sum is that of the loss; what is looked up of divided tables is exchanged."""
    monkeypatch.setattr(sharding, "MIN_FSDP_SIZE", 1)
    (_, whole), (collectives, share) = forward(mesh_of(1, 1, 1)), forward(mesh_of(1, 8, 1))
    assert collectives.count("all-reduce") == 1 and collectives.count("all-to-all") == 3
    assert set(collectives) == {"all-reduce", "all-to-all", "all-gather"}
    assert share < 1.02 * whole / 8


# --- hybrid meshes --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh looks at of a device."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "gpu"
    device_kind: str = "gpu"
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0


def cluster(slices=1, hosts=2, devices=4):
    """Devices of so many slices of so many hosts each."""
    return [
        Device(id=(s * hosts + h) * devices + d, process_index=s * hosts + h, slice_index=s)
        for s, h, d in itertools.product(range(slices), range(hosts), range(devices))
    ]


@pytest.mark.parametrize(
    ("spec", "devices", "crosses"),
    [
        ({}, cluster(slices=2), (2, 1, 1)),
        ({"fsdp": 8}, cluster(slices=2), (2, 1, 1)),
        ({"fsdp": 16}, cluster(slices=2), (1, 2, 1)),
        ({"fsdp": 4, "tensor": 2}, cluster(slices=2), (2, 1, 1)),
        ({"fsdp": 4, "dcn_data": 2}, cluster(slices=4, hosts=1), (2, 2, 1)),
        ({"fsdp": 4, "dcn_fsdp": 4}, cluster(slices=4, hosts=1), (1, 4, 1)),
        ({"fsdp": 4, "dcn_fsdp": 2}, cluster(hosts=2), (1, 2, 1)),  # hosts, since it says so
    ],
    ids=str,
)
def test_only_the_axes_named_cross_the_slow_network(spec, devices, crosses):
    mesh = mesh_lib.arrange(parallel.MeshSpec(**spec), devices)
    assert sorted(device.id for device in mesh.flat) == list(range(len(devices)))
    slices = len({device.slice_index for device in devices}) > 1
    place = np.vectorize(lambda d: d.slice_index if slices else d.process_index)(mesh)
    for axis, parts in enumerate(crosses):
        along = np.moveaxis(place, axis, 0).reshape(mesh.shape[axis], -1).T
        assert {len(set(line)) for line in along} == {parts}
        assert all((np.diff(line) >= 0).all() for line in along)  # neighbours stay neighbours


def torus(rows, columns, layers):
    """A TPU slice whose hosts have 2 x 2 chips."""
    hosts = (layers, rows // 2, columns // 2)
    return [
        Device(
            id=(layer * rows + r) * columns + c,
            process_index=int(np.ravel_multi_index((layer, r // 2, c // 2), hosts)),
            platform="tpu",
            device_kind="TPU v4",
            coords=(c, r, layer),
        )
        for layer, r, c in itertools.product(range(layers), range(rows), range(columns))
    ]


@pytest.mark.parametrize("sizes", [(4, 4, 1), (2, 4, 4), (4, 4, 4)], ids=str)
def test_every_mesh_lies_on_a_torus(sizes):
    devices = torus(*sizes)
    powers = [2**k for k in range(len(devices).bit_length())]
    for fsdp, tensor in itertools.product(powers, powers):
        if fsdp * tensor > len(devices):
            continue
        mesh = mesh_lib.arrange(parallel.MeshSpec(fsdp=fsdp, tensor=tensor), devices)
        assert mesh.shape == (len(devices) // fsdp // tensor, fsdp, tensor)
        assert sorted(device.id for device in mesh.flat) == list(range(len(devices)))
        parts, counts = zip(*shares(mesh), strict=True)
        assert set(parts) == set(range(counts[0]))  # hosts hold whole parts, and together all


@pytest.mark.parametrize(
    ("spec", "devices", "message"),
    [
        ({"tensor": 16}, cluster(slices=2), "dcn_data 1 x dcn_fsdp 2 does not fit 2 slices"),
        ({"dcn_data": 4}, cluster(slices=2), "does not fit 2 slices, data 16 and fsdp 1"),
        ({"dcn_data": 2}, cluster(hosts=1), "does not fit 1 slices"),
        ({"fsdp": 2, "dcn_fsdp": 4}, cluster(slices=4), "does not fit 4 slices"),
    ],
    ids=str,
)
def test_meshes_that_do_not_fit_are_refused(spec, devices, message):
    with pytest.raises(ValueError, match=message):
        mesh_lib.arrange(parallel.MeshSpec(**spec), devices)


# --- who reads what -------------------------------------------------------------------------------


def shares(devices):
    processes = sorted({device.process_index for device in devices.flat})
    return [sharding.share_of(process, devices) for process in processes]


def test_processes_read_the_part_of_the_batch_that_their_devices_hold():
    def mesh(hosts, per_host, **axes):
        devices = cluster(hosts=hosts, devices=per_host)
        return mesh_lib.arrange(parallel.MeshSpec(**axes), devices)

    assert shares(mesh(2, 4)) == [(0, 2), (1, 2)]
    assert shares(mesh(4, 2, fsdp=8)) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert shares(mesh(4, 2, fsdp=2, tensor=2)) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert shares(mesh(4, 2, tensor=4)) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert shares(mesh(4, 2, tensor=8)) == [(0, 1)] * 4
    with pytest.raises(ValueError, match="tensor is 3: it must divide the devices"):
        shares(mesh(3, 2, tensor=3))


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (3, 1), (2, 3)])
def test_another_number_of_readers_sees_the_rest_and_nothing_twice(before, after):
    """Readers of 12 places a step, three steps by some, and the rest by others."""
    seen, states = [], []
    for index in range(before):
        taken = 3 * 12 // before
        seen += [index + before * place for place in range(taken)]
        states.append({"share": [index, before], "stream": {"next_index": taken}})
    first = batches_lib.first_unseen(states)
    for index in range(after):
        state = batches_lib.starting_at(first, {"next_index": 0}, (index, after))
        seen += [index + after * place for place in range(state["next_index"], 100 // after)]
    assert len(seen) == len(set(seen))
    assert set(range(96)) <= set(seen)


def test_readers_that_have_run_ahead_are_waited_for():
    """An undecodable image made one reader take a place more; workers are anywhere."""
    ahead = [
        {"share": [0, 2], "stream": {"next_index": 5}},
        {"share": [1, 2], "stream": {"next_index": 4}},
    ]
    assert batches_lib.first_unseen(ahead) == 9
    workers = {"iterators_in_use_states": [{"next_index": 4}, {"next_index": 0}]}
    assert batches_lib.first_unseen([{"share": [0, 1], "stream": workers}]) == 1
    fresh = {"next_index_in_cycle": 0, "iterators_in_use_states": [{"next_index": 0}] * 2}
    state = batches_lib.starting_at(9, fresh, (1, 2))
    # Worker 0 has places 1, 5, 9, 13, ...; worker 1 has 3, 7, 11, ...
    assert state["iterators_in_use_states"] == [{"next_index": 2}, {"next_index": 2}]
    assert state["next_index_in_cycle"] == 0
