"""Tests of plans: programs against counts by hand and XLA's own, slices, and sweeps."""

import functools
import json
import subprocess
import sys

import convert_tiny
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from quick import ROOT, environment

from conprediff_jax import parallel
from conprediff_jax.common.errors import UserError
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.planning import memory as memory_lib
from conprediff_jax.planning import plans, programs, sweep, tables
from conprediff_jax.planning.account import Account, Roofline, roofline
from conprediff_jax.planning.memory import Memory
from conprediff_jax.planning.topology import Topology
from conprediff_jax.xla import liveness
from conprediff_jax.xla.chips import CHIPS, peak_flops
from conprediff_jax.xla.cost import Cost, program_cost
from conprediff_jax.xla.hlo import Module, _shapes


def compiled(function, *shapes, dtype=jnp.float32):
    structs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jax.jit(function).lower(*structs).compile()


def account(program):
    return program_cost(Module(program.as_text()))


# --- FLOPs and bytes ------------------------------------------------------------------------------


def test_loops_count_as_often_as_they_run():
    """Five times three products of 64 x 64 matrices, and as many tanh."""

    def inner(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0]

    def outer(x, w):
        return jax.lax.scan(lambda x, _: (inner(x, w), None), x, None, length=5)[0]

    flops = account(compiled(outer, (64, 64), (64, 64))).flops
    products = 15 * 2 * 64**3
    assert products + 15 * 64**2 <= flops < 1.01 * products


def test_bytes_of_a_loop_are_those_of_its_slices():
    """A scan reads a row of the stacked inputs and writes one of the outputs in every round."""

    def run(x):
        return jax.lax.scan(lambda total, row: (total + row.sum(), row * 2), 0.0, x)[1]

    once = 4 * 1000 * 4096  # the whole input, read once
    total = account(compiled(run, (1000, 4096))).bytes
    assert 2 * once <= total < 10 * once  # not 1000 times


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1, 1), "padding": "SAME"},
        {"window_strides": (2, 2), "padding": ((0, 1), (2, 0))},
        {"window_strides": (1, 1), "padding": ((3, 3), (3, 3)), "rhs_dilation": (2, 3)},
        {"window_strides": (1, 1), "padding": ((1, 2), (1, 2)), "lhs_dilation": (2, 2)},
        {"window_strides": (2, 4), "padding": ((4, 3), (2, 5)), "lhs_dilation": (3, 6)},
        {"window_strides": (1, 1), "padding": "VALID", "feature_group_count": 4},
    ],
)
def test_convolutions_cost_what_xla_says(options):
    groups = options.get("feature_group_count", 1)
    convolve = functools.partial(
        jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )
    program = compiled(convolve, (2, 9, 11, 8), (3, 3, 8 // groups, 16))
    np.testing.assert_allclose(account(program).flops, program.cost_analysis()["flops"], rtol=0.02)


@pytest.mark.parametrize(
    ("target", "operands", "result"),
    [
        ("__cudnn$convForward", ("x", "w"), "y"),
        ("__cudnn$convBiasActivationForward", ("x", "w", "b"), "y"),
        ("__cudnn$convBackwardInput", ("y", "w"), "x"),
        ("__cudnn$convBackwardFilter", ("x", "y"), "w"),
    ],
)
def test_convolutions_of_cudnn_cost_what_they_cost_elsewhere(target, operands, result):
    """As GPUs' compiler leaves them, calls of a library: MFU counts them."""
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(2, 2),
        padding=((0, 1), (2, 0)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    shapes = {"x": (2, 9, 11, 8), "w": (3, 3, 8, 16), "y": (2, 4, 6, 16), "b": (16,)}
    assert (
        jax.eval_shape(convolve, *map(jnp.zeros, (shapes["x"], shapes["w"]))).shape == shapes["y"]
    )
    call = custom_call(
        [shapes[name] for name in operands], shapes[result],
        f'window={{size=3x3 stride=2x2 pad=0_1x2_0}}, dim_labels=b01f_01io->b01f, '
        f'custom_call_target="{target}", backend_config={{"operation_queue_id":"0"}}',
    )  # fmt: skip
    expected = account(compiled(convolve, shapes["x"], shapes["w"])).flops
    assert program_cost(call).flops == expected > 0


def test_products_of_cublas():
    call = custom_call(
        [(4, 128, 64), (4, 32, 64)], (4, 128, 32),
        'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":'
        '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],'
        '"rhs_contracting_dimensions":["2"],"lhs_batch_dimensions":["0"],'
        '"rhs_batch_dimensions":["0"]},"epilogue":"DEFAULT"}}',
    )  # fmt: skip
    assert program_cost(call).flops == 2 * 4 * 128 * 32 * 64
    other = custom_call([(4,)], (4,), 'custom_call_target="__gpu$TopK"')
    assert program_cost(other).flops == 0


def custom_call(operands, result, attributes):
    """A program of one call, whose result has a workspace beside it."""

    def shape(dims):
        return f"bf16[{','.join(map(str, dims))}]"

    lines = [f"  %p{i} = {shape(dims)} parameter({i})" for i, dims in enumerate(operands)]
    names = ", ".join(f"%p{i}" for i in range(len(operands)))
    types = ", ".join(f"p{i}: {shape(dims)}" for i, dims in enumerate(operands))
    out = f"({shape(result)}, u8[16])"
    root = f"  ROOT %call = {out} custom-call({names}), {attributes}"
    return Module("\n".join([f"ENTRY %main ({types}) -> {out} {{", *lines, root, "}", ""]))


def test_a_whole_train_step_costs_what_xla_says():
    """But for transcendental functions, which XLA counts apart, and what its loops repeat."""
    config = tiny.get_config()
    config.context.weight = 0.0
    config.model.channels = 64
    mesh = parallel.make_mesh(parallel.MeshSpec(), jax.devices()[:1])
    program = programs.lower_train_step(make_experiment(config), mesh).compile()
    analysis = program.cost_analysis()
    expected = analysis["flops"] + analysis["transcendentals"]
    np.testing.assert_allclose(account(program).flops, expected, rtol=0.1)


def test_shapes_are_padded_to_their_tiles():
    (small,) = _shapes("bf16[3,5]{1,0:T(8,128)(2,1)}")
    assert (small.payload, small.nbytes, small.memory) == (3 * 5 * 2, 8 * 128 * 2, 0)
    (turned,) = _shapes("f32[300,5]{0,1:T(8,128)S(1)}")  # the first dimension is the minor one
    assert (turned.nbytes, turned.memory) == (8 * 384 * 4, 1)
    pair = _shapes("(f32[]{:T(128)}, pred[7]{0})")
    assert [shape.payload for shape in pair] == [4, 7]


def test_limits_of_loops_are_read_from_their_conditions():
    """As a TPU's compiler leaves them: no count beside the loop, the limit carried along."""
    text = """
%body (p: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %p = (s32[], f32[8], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %twice = f32[8]{0} add(%x, %x)
  ROOT %next = (s32[], f32[8], s32[]) tuple(%i, %twice, %n)
}
%condition (q: (s32[], f32[8], s32[])) -> pred[] {
  %q = (s32[], f32[8], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %m = s32[] get-tuple-element(%q), index=2
  ROOT %less = pred[] compare(%j, %m), direction=DIRECTION
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %zero = s32[] constant(0)
  %limit = s32[] constant(12)
  %start = f32[8]{0} parameter(0)
  %begin = (s32[], f32[8], s32[]) tuple(%zero, %start, /*index=2*/%limit)
  %loop = (s32[], f32[8], s32[]) while(%begin), condition=%condition, body=%body
  ROOT %end = f32[8]{0} get-tuple-element(%loop), index=1
}
"""
    known = Module(text.replace("DIRECTION", "LT"))
    assert program_cost(known).flops == 12 * 8 and not known.unknown_loops
    unknown = Module(text.replace("DIRECTION", "NE"))
    assert program_cost(unknown).flops == 8 and unknown.unknown_loops == {"loop"}


def test_the_fullest_moment_by_hand():
    """h waits while b is made of a: three arrays of 32 bytes, two of them of the forward pass."""
    module = Module("""
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %h = f32[8]{0} tanh(%x), metadata={op_name="jit(f)/jvp(Net)/tanh"}
  %a = f32[8]{0} negate(%h), metadata={op_name="jit(f)/jvp(Net)/neg"}
  %b = f32[8]{0} exponential(%a), metadata={op_name="jit(f)/transpose(jvp(Net))/exp"}
  %s = f32[]{:S(1)} constant(1)
  %view = f32[2,4]{1,0} bitcast(%b)
  %c = f32[2,4]{1,0} add(%view, %view), metadata={op_name="jit(f)/transpose(jvp(Net))/add"}
  %d = f32[8]{0} bitcast(%c)
  ROOT %result = f32[8]{0} multiply(%d, %h), metadata={op_name="jit(f)/mul"}
}
""")
    assert liveness.peak(module) == liveness.Peak(total=96, activations=64)


# --- slices, memory, rooflines --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "slice_", "chips"),
    [
        ("v5e:4x4", "v5e:4x4", 16),
        ("v5e-16", "v5e:4x4", 16),
        ("v5e-256", "v5e:16x16", 256),
        ("v4-128", "v4:4x4x4", 64),  # TensorCores, two a chip
        ("v5p-64", "v5p:2x4x4", 32),
        ("v6e-8", "v6e:2x4", 8),
    ],
)
def test_slices_by_name(name, slice_, chips):
    topology = Topology.parse(name)
    assert (str(topology), topology.chips) == (slice_, chips)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100:8", "must name a TPU slice"),
        ("v5e", "such as v5e:4x4"),
        ("v5e-7", "choose v5e-4, v5e-8"),
        ("v4-5", "v4-8, v4-16"),
        ("v5e:4x4x4", "2 dimensions"),
        ("v4:4x4", "3 dimensions"),
    ],
)
def test_unknown_slices_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        Topology.parse(name)


def test_peaks_are_known_by_device_kind():
    assert peak_flops("TPU v5 lite") == CHIPS["v5e"].flops == 197e12
    assert peak_flops("TPU v5") == CHIPS["v5p"].flops
    assert peak_flops("cpu") is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 990e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40G", None),  # a name that begins like a known one is another card
        ("NVIDIA H100X", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_of_gpus_are_those_of_the_card(name, peak):
    assert peak_flops(name) == peak


def test_memory_of_arguments_is_that_of_their_shards():
    def given(*, divide_update=False, **axes):
        config = tiny.get_config()
        config.train.divide_update = divide_update
        experiment = make_experiment(config)
        mesh = parallel.make_mesh(parallel.MeshSpec(**axes), jax.devices()[:8])
        batch = programs.abstract_batch(experiment, mesh)
        return memory_lib.arguments(programs.train_state(experiment, mesh), batch)

    whole, divided = given(), given(fsdp=8)
    parameters = jax.tree.leaves(jax.eval_shape(make_experiment(tiny.get_config()).task.init)[0])
    assert whole.parameters == 4 * sum(leaf.size for leaf in parameters)
    assert 2 * whole.parameters <= whole.optimizer <= 2 * whole.parameters + 16
    assert whole.batch == 8 * 8 * 3  # one image
    assert divided.parameters < 0.4 * whole.parameters  # small arrays stay whole
    assert divided.batch == whole.batch
    held = given(divide_update=True)  # a device holds as much of the state as with fsdp
    assert held.parameters == divided.parameters and held.optimizer == divided.optimizer


def test_memory_is_read_from_the_compilers_error():
    error = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (48.00G) exceeds"
    assert memory_lib.needed(ValueError(error)) == 48 * 2**30
    used = "Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm."
    assert memory_lib.needed(ValueError(used)) == 20.5 * 2**30


def test_the_longest_of_three_times_bounds_a_step():
    chip = CHIPS["v5e"]
    cost = Cost(flops=197e12, bytes=3 * 819e9)
    times = roofline(Account(fits=True, memory=Memory(), needed=0, cost=cost), chip)
    assert times == Roofline(compute=1.0, memory=3.0, interconnect=0.0)
    assert (times.step, times.bound_by) == (3.0, "memory")


# --- sweeps and whole plans -----------------------------------------------------------------------


def fake_plan(config, topology, **_):
    """A chip holds two examples, four with remat, which costs a quarter more FLOPs."""
    examples, remat = config.train.batch_size // topology.chips, config.model.remat
    policy = config.model.remat_policy if remat else "off"
    flops = examples * (1.25 if remat else 1.0) * 1e12 + 1e12
    return plans.Plan(
        topology=topology,
        mesh={"data": 4, "fsdp": config.mesh.fsdp, "tensor": config.mesh.tensor},
        batch_size=config.train.batch_size,
        microbatches=1,
        remat=policy,
        attention=config.model.attention,
        divide_update=config.train.divide_update,
        train=Account(
            fits=examples <= (4 if remat else 2),
            memory=Memory(activations=examples),
            needed=examples,
            cost=Cost(flops, 1.0),
        ),
    )


def test_a_sweep_stops_where_memory_ends_and_finds_the_best(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "make_plan", fake_plan)
    found = sweep.sweep(
        tiny.get_config(),
        Topology.parse("v5e-16"),
        per_chip=[8, 1, 2, 4],
        fsdp=[1, 3],
        tensor=[4, 32],  # 1 x 4 divides 16 chips, no other does
        remat=["off", "products"],
    )
    assert {tuple(plan.mesh.values()) for plan in found} == {(4, 1, 4)}
    tried = [(plan.remat, plan.batch_size // 16, plan.train.fits) for plan in found]
    assert tried == [
        ("off", 1, True), ("off", 2, True), ("off", 4, False),
        ("products", 1, True), ("products", 2, True), ("products", 4, True), ("products", 8, False),
    ]  # fmt: skip
    # Two examples cost 3 TFLOP, four with remat 6: the same speed for each; less memory wins.
    assert tried[found.index(sweep.best(found))] == ("off", 2, True)
    assert sweep.best([plan for plan in found if not plan.train.fits]) is None
    sweep.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    lines = tables.markdown([tables.row(plan) for plan in found]).splitlines()
    assert len(lines) == 9 and len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--sweep_per_chip=1,0", "give whole numbers of at least 1"),
        ("--sweep_remat=on", "'on' is none of ['off', 'nothing', 'products']"),
        ("--sweep_attention=none", "'none' is none of ['auto', 'xla', 'cudnn', 'flash']"),
    ],
)
def test_a_sweep_of_what_is_not_there_is_refused_at_once(flag, said, tmp_path):
    sweeping = ["--config=configs/openmoji.py", "--topology=v5e-16", "--sweep", flag]
    ended = subprocess.run(
        [sys.executable, "-m", "conprediff_jax.plan", *sweeping, f"--out={tmp_path / 'plan.json'}"],
        cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == f"error: {flag}: {said}"
    assert not list(tmp_path.iterdir())


def test_a_plan_for_a_slice_without_the_machine():
    pytest.importorskip("libtpu")
    config = tiny.get_config()
    config.train.batch_size = 16
    plan = plans.make_plan(config, Topology.parse("v5e:2x2"))
    assert plan.train.fits and plan.mesh == {"data": 4, "fsdp": 1, "tensor": 1}
    assert plan.train.cost.flops > 0.9 * plan.train.xla.flops
    assert set(plan.train.traffic) == {"data"}
    share = plan.context_share
    assert 0 < share["FLOPs"] < 1 and share["collectives"] <= 0
    assert plan.sampler.cost.flops > 0 and not plan.train.unknown_loops
    text = tables.describe(plan)
    assert "train step: fits" in text and "images/s" in text and "sampler" in text
    read = json.loads(json.dumps(plan.as_dict()))
    assert read["chips"] == 4 and plans.Plan.from_dict(read) == plan


def reading_ahead():
    """Latents and captions are encoded before."""
    config = convert_tiny.reading(convert_tiny.vq(), "clip", null="learned", weights="nowhere")
    config.unlock().data.update(latents="nowhere", encoded_text=True)
    return config


@pytest.mark.parametrize(
    "make_config", [convert_tiny.reading_along, convert_tiny.reading_tokens, reading_ahead]
)
def test_plans_of_models_that_read_captions_need_no_vocabulary(make_config, monkeypatch):
    lowered = []

    def not_compiled(program, given, shape):
        lowered.append(program)
        return Account(fits=True, memory=given, needed=given.total)

    monkeypatch.setattr(plans, "compile_account", not_compiled)
    monkeypatch.setattr(Topology, "devices", lambda self: jax.devices()[: self.chips])
    config = make_config().unlock()
    config.text.update(vocabulary="", tokenizer="nowhere")  # a file that only a run needs
    config.train.batch_size = 16
    plans.make_plan(config, Topology.parse("v5e:2x2"), context_share=False)
    for program in lowered:
        shapes = [aval.shape[:2] for aval in jax.tree.leaves(program.in_avals)]
        assert (16, config.text.encoder.length) in shapes
    assert len(lowered) == 2  # train step and sampler


def test_a_plan_that_does_not_fit_says_so():
    pytest.importorskip("libtpu")
    config = tiny.get_config()
    config.data.image_size = 256
    config.train.batch_size = 4 * 8192
    plan = plans.make_plan(config, Topology.parse("v5e:2x2"), context_share=False, sampler=False)
    assert not plan.train.fits and plan.train.needed > CHIPS["v5e"].hbm_bytes
    assert plan.images_per_second == 0 and "DOES NOT FIT" in tables.describe(plan)
