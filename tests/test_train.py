"""Tests of the trainer: a step on any mesh, stopping, resuming, and refusals."""

import errno
import importlib.util
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tiny
from flax import traverse_util
from ml_collections import ConfigDict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import assert_same, mesh_of

from conprediff_jax import config as config_lib
from conprediff_jax import parallel
from conprediff_jax.cli import headers
from conprediff_jax.common import random
from conprediff_jax.common.errors import ConfigError, FieldError, UserError
from conprediff_jax.common.files import WriteError, absolute
from conprediff_jax.config.experiment import check_devices, make_experiment
from conprediff_jax.config.sections import changes
from conprediff_jax.interop import formats, pretrained
from conprediff_jax.parallel import sharding
from conprediff_jax.runs import checkpoint, restore
from conprediff_jax.runs.checkpoint import CheckpointError, Checkpoints
from conprediff_jax.sampling.generate import generate_batches, make_generate
from conprediff_jax.tasks import step as step_lib
from conprediff_jax.tasks.optimizer import decayed
from conprediff_jax.tasks.power_averages import exponent
from conprediff_jax.tasks.state import abstract_state
from conprediff_jax.train import loop, needs
from conprediff_jax.train.loop import train
from conprediff_jax.train.report import DivergedError

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.every_python]


DEVIATIONS = (0.05, 0.1)


def random_batch(size=8):
    images = np.random.default_rng(1).integers(0, 256, (size, 8, 8, 3), np.uint8)
    return {"image": images}


def make(**overrides):
    config = tiny.get_config()
    config.update_from_flattened_dict(overrides)
    return make_experiment(config)


def run(experiment, mesh, steps=3):
    return tiny.run_steps(experiment, mesh, random_batch(), steps)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def run_config(folder):
    config = tiny.get_config()
    config.data.name = str(folder)
    config.train.update(power_averages=DEVIATIONS, keep=1, keep_every=1)
    # A threshold above every cosine: context prediction fades out from the second step on.
    config.context.update(auto=True, cosine_every=2, auto_threshold=1.0, fall_off=0.6)
    return config


@pytest.fixture(scope="module")
def finished(run_config, one_device, tmp_path_factory):
    """An uninterrupted run: its workdir and final state."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, train(run_config, str(workdir))


# --- what a step computes -------------------------------------------------------------------------


def test_weight_zero_is_one_program_whatever_the_context_section_says():
    """The same program text gives the same parameters, bit for bit, after any number of steps."""

    def text(**context):
        experiment = make(**{f"context.{key}": value for key, value in context.items()})
        optimizer = experiment.optimizer.make(experiment.train.steps)
        abstract = abstract_state(experiment.task, optimizer, mesh_of())
        step = step_lib.make_train_step(
            experiment.task, experiment.train, experiment.optimizer, abstract, mesh_of()
        )
        return step.lower(abstract, random_batch()).as_text()

    plain = text(weight=0.0)
    assert plain == text(weight=0.0, strides=(3,), transport="exact", decoder="direct")
    assert plain != text(weight=0.5)


def test_weight_zero_trains_the_plain_model():
    """Compares with a plain trainer, written here without context prediction."""
    experiment = make(**{"context.weight": 0.0})
    state, _ = run(experiment, mesh_of())
    model = experiment.task.model
    denoiser, process = model.denoiser, model.process
    optimizer = experiment.optimizer.make(experiment.train.steps)
    params = jax.jit(make().task.init)()[0]["denoiser"]
    moments = optimizer.init(params)
    image = jnp.asarray(random_batch()["image"])

    @jax.jit
    def plain_step(params, moments, step):
        def loss(params):
            keys = [
                random.example_keys(random.stream(0, f"train/{name}", step), jnp.arange(8))
                for name in ("time", "noise", "dropout")
            ]
            x_0 = model.first_stage.encode({}, image)
            t = process.sample_time(keys[0]).t
            x_t, noise = process.corrupt(keys[1], x_0, t)
            output = denoiser.apply({"params": params}, x_t, t, train=True).output
            return process.loss(output, x_0, x_t, noise, t).mean()

        updates, moments_ = optimizer.update(jax.grad(loss)(params), moments, params)
        return optax.apply_updates(params, updates), moments_

    for step in range(3):
        params, moments = plain_step(params, moments, jnp.int32(step))
    assert set(state.params) == {"denoiser"}
    for a, b in zip(*map(jax.tree.leaves, (state.params["denoiser"], params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_context_gradients_reach_the_trunk():
    experiment = make()
    params, task_state = jax.jit(experiment.task.init)()
    batch = jax.tree.map(jnp.asarray, random_batch())

    def gradient(experiment):
        return jax.jit(experiment.task.step)(params, task_state, batch, jnp.int32(0)).grads

    plain = make(**{"context.weight": 0.0})
    difference = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()),
        gradient(experiment)["denoiser"],
        gradient(plain)["denoiser"],
    )
    assert difference["up_0_block_1"]["conv_out"]["kernel"] > 1e-4
    assert difference["output_norm"]["scale"] > 1e-4
    assert difference["output_conv"]["kernel"] < 1e-6  # behind the features


def test_microbatches_give_the_gradients_of_the_whole_batch():
    read = {"context.source": "prediction"}
    params, task_state = jax.jit(make(**read).task.init)()
    batch = jax.tree.map(jnp.asarray, random_batch())

    def gradient(parts):
        task = make(**read, **{"train.microbatches": parts}).task
        return jax.jit(task.step)(params, task_state, batch, jnp.int32(0))[:2]

    (whole, metrics), (parts, parts_metrics) = gradient(1), gradient(4)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    for name, value in metrics.items():
        assert parts_metrics[name] == pytest.approx(float(value), rel=1e-5)


@pytest.fixture(scope="module")
def single_device():
    return run(make(**{"train.power_averages": DEVIATIONS}), mesh_of())


def test_a_mesh_of_three_axes_gives_the_trace_of_one_device(single_device, monkeypatch):
    """`test_parallel` tries every mix of axes, on layers alone."""
    monkeypatch.setattr(sharding, "MIN_FSDP_SIZE", 1)
    mesh = mesh_of(8, data=2, fsdp=2, tensor=2)
    state, trace = run(make(**{"train.power_averages": DEVIATIONS}), mesh)
    for params in (state.params["denoiser"], state.power_averages["0.05"]):
        kernel = params["input_conv"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 4  # data and fsdp
    single_state, single_trace = single_device
    for expected, found in zip(single_trace, trace, strict=True):
        for name in expected:
            assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    averages, single_averages = (
        jax.tree.leaves((each.ema, each.power_averages)) for each in (state, single_state)
    )
    for a, b in zip(single_averages, averages, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_bfloat16_trains_close_to_float32(single_device):
    state, trace = run(make(dtype="bfloat16"), mesh_of())
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    for expected, found in zip(single_device[1], trace, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.05)


@pytest.mark.parametrize("dimensions", ["celebahq", "text"])
def test_sharding_rules_cover_every_parameter_and_divide_the_big_ones(dimensions):
    config = tiny.get_config()
    config.update_from_flattened_dict({"first_stage.patch": 1, "data.image_size": 64})
    config.model.update(channels=224, channel_mult=(1, 2, 3, 4), attention_downsampling=(2, 4, 8))
    mesh = mesh_of(8, fsdp=4, tensor=2)
    experiment = make_experiment(config)
    params, _ = jax.eval_shape(experiment.task.init)
    if dimensions == "text":
        unet = experiment.task.model.denoiser.clone(text_dim=64)
        text = jnp.zeros((1, 7, 64))
        params = jax.eval_shape(
            lambda: unet.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), jnp.zeros(1), text=text)
        )
    shardings = parallel.tree_shardings(params, mesh)

    def local_size(leaf, sharding):
        return int(np.prod(sharding.shard_shape(leaf.shape)))

    local = sum(jax.tree.leaves(jax.tree.map(local_size, params, shardings)))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert local < 0.27 * total  # fsdp alone divides by four
    query = shardings if dimensions == "celebahq" else shardings["params"]
    query = query["denoiser"] if dimensions == "celebahq" else query
    attention = query["middle_attention"]
    attention = attention.get("attention") or attention["transformer_0"]["self_attention"]
    assert attention["query"]["kernel"].spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    assert attention["out"]["kernel"].spec == jax.sharding.PartitionSpec("tensor", "fsdp")
    with pytest.raises(ConfigError, match="denoiser/mystery is covered by no sharding rule"):
        parallel.tree_shardings({"denoiser": {"mystery": jnp.zeros((8, 8))}}, mesh)


# --- sampling -------------------------------------------------------------------------------------


def test_sampling_never_sees_the_context_decoder(finished, tmp_path):
    workdir, state = finished
    mesh = mesh_of()
    whole = restore.load(str(workdir), mesh)
    assert_same(whole.params, state.ema)
    stripped = tmp_path / "stripped"
    shutil.copytree(workdir, stripped)
    shutil.rmtree(stripped / "checkpoints" / "6" / "train")  # where the decoder's parameters are
    found = restore.load(str(stripped), mesh)
    generate = make_generate(whole.model, whole.model.sampling, mesh)
    images = generate(whole.params, {}, 0, jnp.arange(4))
    assert_same(images, generate(found.params, {}, 0, jnp.arange(4)))
    text = generate.lower(whole.params, {}, 0, jnp.arange(4)).compile().as_text()
    assert "trunk" not in text and "log_sigma" not in text


def test_images_take_the_given_classes_in_turn():
    def draw(params, frozen, seed, indices, labels, texts):
        return labels

    settings = {"seed": 0, "num": 5, "batch_size": 3, "first": 1, "num_classes": 4}
    drawn = generate_batches(draw, None, None, label=[2, 0], **settings)
    assert np.concatenate(list(drawn)).tolist() == [0, 2, 0, 2, 0]
    drawn = generate_batches(draw, None, None, **settings)
    assert np.concatenate(list(drawn)).tolist() == [1, 2, 3, 0, 1]


def test_an_image_depends_on_seed_and_index_alone(finished):
    def load(mesh):
        model, params, *_ = restore.load(str(finished[0]), mesh)
        return make_generate(model, model.sampling, mesh), params

    one, params = load(mesh_of())
    alone = one(params, {}, 3, jnp.array([5]))
    four, params = load(mesh_of(4))
    batches = generate_batches(four, params, {}, seed=3, num=6, batch_size=8)
    images = np.concatenate(list(batches))
    assert len(images) == 6
    # One grey level: other batch sizes and devices round differently.
    assert np.abs(images[5].astype(int) - np.asarray(alone[0], int)).max() <= 1
    assert np.abs(images[4].astype(int) - images[5]).max() > 1


# --- stop and resume ------------------------------------------------------------------------------


def losses(workdir):
    events = EventAccumulator(str(workdir), size_guidance={"tensors": 0}).Reload()
    tags = [tag for tag in events.Tags()["tensors"] if tag.startswith(("loss", "norm"))]
    return {
        tag: {e.step: float(np.frombuffer(e.tensor_proto.tensor_content or np.float32(
            e.tensor_proto.float_val[0]).tobytes(), np.float32)[0]) for e in events.Tensors(tag)}
        for tag in tags
    }  # fmt: skip


def rows(workdir):
    """The lines of metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k != "time" and not k.startswith("speed/")}
        for line in lines
    ]


def test_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(finished, run_config, tmp_path):
    workdir, state = finished
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(workdir / "checkpoints" / "3", tmp_path / "checkpoints" / "3")
    # As a run leaves it that was killed in step 6, within a line.
    text = (workdir / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text[: text.index("loss", text.index('"step": 6'))])
    assert_same(train(run_config, str(tmp_path)), state)
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4, 5, 6]
    assert rows(tmp_path) == rows(workdir)
    whole, resumed = losses(workdir), losses(tmp_path)
    assert {"loss", "loss/denoise", "loss/context", "norm/gradient"} <= whole.keys()
    context = state.task_state["terms"]["context"]
    assert float(context["stopped"]) == 1 and whole["loss/context"][6] == 0
    for tag, values in resumed.items():
        assert values == {step: whole[tag][step] for step in (4, 5, 6)}
        assert values == {row["step"]: np.float32(row[tag]) for row in rows(tmp_path)[3:]}
    assert (workdir / "samples" / "step_0000006.png").exists()
    # A finished run has nothing to do and changes nothing.
    assert_same(train(run_config, str(tmp_path)), state)


def test_small_evaluations_are_logged_and_change_nothing(
    finished, run_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "EVALUATED", 64)
    workdir, state = finished
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(workdir / "checkpoints" / "3", tmp_path / "checkpoints" / "3")
    config = run_config.copy_and_resolve_references()
    config.train.eval_every = 6
    assert_same(train(config, str(tmp_path), command="the command"), state)
    events = EventAccumulator(str(tmp_path)).Reload()
    for name, said in {
        "command": "the command",
        "changes": "config.train.eval_every is 6, and was 0",
        "config": "model.channels = 32",
    }.items():
        (event,) = events.Tensors(name)
        assert event.step == 3 and said in event.tensor_proto.string_val[0].decode()
    written = ConfigDict(json.loads((tmp_path / "config.json").read_text()))
    assert changes(config, written) == []
    assert [e.step for e in events.Tensors("eval/FD-random-VGG16")] == [6]
    (row,) = json.loads((tmp_path / "evaluation" / "while_training.json").read_text())
    assert np.isfinite(row["metrics"]["FD-random-VGG16"]["value"])
    assert (row["settings"]["step"], row["settings"]["num"]) == (6, 64)
    assert row["settings"]["reference"]["count"] > 0
    first_stage = config_lib.default_first_stage("kl")
    first_stage.train.eval_every = 6
    with pytest.raises(ConfigError, match="a first stage has 0"):
        make_experiment(first_stage)


def test_unreadable_checkpoints_are_moved_aside(finished, run_config, tmp_path):
    workdir, state = finished
    shutil.copytree(workdir, tmp_path / "run")
    for file in (tmp_path / "run/checkpoints/6").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"damaged")
    # Reading falls back to the older one and changes nothing; training moves the damaged one aside.
    assert restore.load(str(tmp_path / "run"), mesh_of()).step == 5
    assert (tmp_path / "run/checkpoints/6").exists()
    assert_same(train(run_config, str(tmp_path / "run")), state)
    assert (tmp_path / "run/checkpoints/unreadable-6").exists()
    assert restore.load(str(tmp_path / "run"), mesh_of()).step == 6


def test_without_room_the_last_good_checkpoint_is_named(
    finished, run_config, tmp_path, monkeypatch
):
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(finished[0] / "checkpoints" / "3", tmp_path / "checkpoints" / "3")

    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    said = f"cannot write {tmp_path}/checkpoints/4: No space left on device; last good checkpoint: "
    # Other data continue at the place that the checkpoint holds.
    config = run_config.copy_and_resolve_references()
    config.data.name = str(tiny.write_images(tmp_path / "others", 5))
    config.seed = 1
    with pytest.raises(WriteError, match=f"^{said}{tmp_path}/checkpoints/3$"):
        train(config, str(tmp_path), allow_changes=True)


def test_averages_of_a_run_are_those_of_its_parameters(finished, tmp_path):
    """Compares with sums over the parameters after each of the six steps."""
    workdir, state = finished
    folder = workdir / "checkpoints"
    assert sorted(os.listdir(folder)) == list("123456")
    with ocp.StandardCheckpointer() as reader:
        trained = [
            reader.restore(folder / f"{i}" / "train")["params"]["denoiser"] for i in range(1, 7)
        ]
        fourth = reader.restore(folder / "4" / "power_averages")

    def expected(deviation):
        weights = np.diff((np.arange(7) / 6) ** (exponent(deviation) + 1))
        return jax.tree.map(lambda *values: np.tensordot(weights, np.stack(values), 1), *trained)

    def farthest(a, b):
        return max(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))

    for deviation in DEVIATIONS:
        assert farthest(state.power_averages[str(deviation)], expected(deviation)) < 1e-6
    averaged = pretrained.open_folder(str(workdir), 4, 0.1)
    assert_same(averaged.params, fourth["0.1"])
    formats.write(averaged, "inference", str(tmp_path / "averaged"))
    said = "| average of parameters | power function, relative deviation 0.1 |"
    assert said in (tmp_path / "averaged" / "README.md").read_text()


def test_a_storage_error_moves_no_checkpoint_aside(finished, monkeypatch):
    with Checkpoints(str(finished[0]), read_only=True) as checkpoints:

        def unanswered(path, items):
            raise ValueError(f"UNAVAILABLE: {path}: Error reading gs://: HTTP response code: 503")

        monkeypatch.setattr(checkpoint, "_open", unanswered)
        with pytest.raises(ValueError, match="503"):
            checkpoints.restore_for_inference(lambda config: (None, None))


def test_checkpoints_of_a_bucket_stay_there():
    assert str(absolute("gs://bucket/run") / "checkpoints") == "gs://bucket/run/checkpoints"
    assert str(absolute("~/run")) == os.path.expanduser("~/run")


def test_another_model_is_refused(finished, run_config):
    other = run_config.copy_and_resolve_references()
    other.update_from_flattened_dict({"model.blocks_per_level": 2, "context.hidden": 32})
    with pytest.raises(CheckpointError, match=r"config.context.hidden, config.model.blocks_per"):
        train(other, str(finished[0]))
    with Checkpoints(str(finished[0]), read_only=True) as checkpoints:
        assert checkpoints.latest_step == 6
    other = run_config.copy_and_resolve_references()
    other.update_from_flattened_dict({"data.name": "./others", "seed": 1, "train.batch_size": 4})
    said = r"config.data.name is './others', and was '[^;]*; config.seed is 1, and was 0\. Give"
    with pytest.raises(FieldError, match=f"^allow_changes is not set, and .*: {said}"):
        train(other, str(finished[0]))


def test_divergence_stops_the_run_and_saves_nothing_bad(run_config, tmp_path):
    config = run_config.copy_and_resolve_references()
    config.update_from_flattened_dict(
        {"optimizer.learning_rate": 1e15, "optimizer.warmup_steps": 0, "train.checkpoint_every": 1}
    )
    with pytest.raises(DivergedError, match=r"step \d is not finite: loss .*last good checkpoint"):
        train(config, str(tmp_path))
    with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
        params, task_state = jax.eval_shape(make_experiment(config).task.init)
        _, _, ema, _ = checkpoints.restore_for_inference(
            lambda _: (params["denoiser"], task_state), checkpoints.latest_step
        )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ema))


# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"process.schedule": "sigmoid"}, r"config.process.schedule is 'sigmoid'"),
        ({"context.transport": "emd"}, r"config.context: transport is 'emd': choose one of"),
        ({"sampling.sampler": "euler"}, r"config.sampling.sampler is 'euler', which does not fit"),
        ({"dtype": "float16"}, r"config.dtype is 'float16': choose one of"),
        ({"first_stage.patch": 3}, r"config.first_stage.patch is 3: it must divide the image"),
        ({"model.channel_mult": (1, 2, 2, 2)}, r"image_size is 8: it must be a multiple of 16"),
        ({"train.microbatches": 3}, r"microbatches is 3: it must divide batch_size 8"),
        ({"model.head_channels": 5}, r"config.model: head_channels=5 must divide 32"),
    ],
)
def test_bad_values_are_named_before_anything_is_built(overrides, message):
    with pytest.raises(ConfigError, match=message):
        make(**overrides)


def test_unknown_keys_are_named_with_the_nearest_known_one():
    config = tiny.get_config()
    with config.unlocked():
        config.context.stride = 3
    with pytest.raises(ConfigError, match=r"config.context has no key 'stride': did you mean"):
        make_experiment(config)


def test_batch_and_mesh_must_fit_the_machine():
    with pytest.raises(ConfigError, match=r"does not match the 8 devices"):
        check_devices(make(**{"mesh.fsdp": 3}), 8, 1)
    with pytest.raises(ConfigError, match=r"batch_size is 8: it must be a multiple of 16"):
        check_devices(make(), 16, 1)
    check_devices(make(), 8, 2)


def test_every_default_can_be_built():
    context = make_experiment(config_lib.default()).task.context
    assert (context.strides, context.weight, context.warmup_steps) == ((1, 2, 3), 0.09, 500)


@pytest.mark.parametrize("lacking", ["context", "weight"])
def test_configs_of_older_versions_keep_their_context_loss(lacking):
    config = config_lib.default().unlock()
    del config.context.warmup_steps
    del (config if lacking == "context" else config.context)[lacking]
    context = make_experiment(config).task.context
    assert (context.weight, context.warmup_steps) == (1.0, 0)


def shipped_configs():
    root = pathlib.Path(__file__).parent.parent / "configs"
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))


# As published: google/ddpm-cifar10-32, LDM-4 and LDM-8, DiT-XL/2, the text-to-image model of latent
# diffusion with its text encoder, VQ-Diffusion (and its null text), VQ-f4 and KL-f8.
SIZES = {
    "cifar10.py": 35_746_307,
    "celebahq.py": 274_056_163,
    "ffhq.py": 274_056_163,
    "lsun_bedrooms.py": 274_056_163,
    "lsun_churches.py": 294_966_916,
    "imagenet_dit_xl2.py": 674_834_720 - 16 * 1153,  # without the learned variance
    "imagenet_sit_xl2.py": 674_834_720 - 16 * 1153,
    "imagenet_sit_b2.py": 130_315_808 - 16 * 769,
    "coco.py": 872_300_484 + 542_895_360,
    "coco_discrete.py": 388_780_871 + 77 * 512,
    "first_stage/vq_f4.py": 55_322_782,
    "first_stage/kl_f8.py": 83_653_863,
}


def test_all_that_is_missing_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = shipped("coco_discrete.py").get_config()
    config.data.name = "./photos"
    how = {config.text.weights: "fetch it"}
    with pytest.raises(needs.MissingError) as raised:
        needs.check(config, None, how)
    first, *things, _ = str(raised.value).splitlines()
    assert first == "this config needs 3 things that are missing; get them in this order:"
    assert things[0] == "  ./photos (config.data.name): ./photos: there is no such folder"
    assert things[1].startswith("  weights/vqgan-f8-openimages (config.first_stage.weights): ")
    assert things[2] == "  weights/clip-vit-base-patch32 (config.text.weights): fetch it"

    latent = shipped("openmoji_latent.py").get_config()
    latent.first_stage.weights = "kl"
    with pytest.raises(UserError, match=r"config.first_stage.weights is kl: put there a diffusers"):
        needs.check(latent, None, {}, encode=True)
    with pytest.raises(
        needs.MissingError, match=r"needs kl \(config.first_stage.weights\): train it"
    ):
        needs.check(latent, None, {"kl": "train it"}, encode=True)
    pathlib.Path("kl/checkpoints").mkdir(parents=True)
    needs.check(latent, None, {}, encode=True)


def shipped(name):
    path = pathlib.Path(__file__).parent.parent / "configs" / name
    spec = importlib.util.spec_from_file_location("shipped", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys_of_no_type(config, prefix="config"):
    """The keys that the command line could not set."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from keys_of_no_type(value, f"{prefix}.{key}")
        elif config.get_type(key) is type(None):
            yield f"{prefix}.{key}"


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_build_models_of_the_published_size(name):
    module = shipped(name)
    assert f"--config=configs/{name}" in module.__doc__
    config = module.get_config()
    assert not list(keys_of_no_type(config))
    experiment = make_experiment(config)
    check_devices(experiment, 1, 1)
    params, _ = jax.eval_shape(experiment.task.init)
    parallel.tree_shardings(params, mesh_of(8, fsdp=2, tensor=2))
    decays = traverse_util.flatten_dict(decayed(params))
    for path, leaf in traverse_util.flatten_dict(params).items():
        axes = leaf.ndim - ("blocks" in path)  # a DiT stacks its blocks along the first axis
        assert decays[path] == (axes > 1), path
    size = sum(leaf.size for leaf in jax.tree.leaves(params[experiment.task.averaged]))
    assert size == SIZES.get(name, size)
    header, side = headers.read(pathlib.Path(module.__file__)), experiment.data.image_size
    assert not header.lacking, f"cli/headers.py shows how a docstring says {header.lacking}"
    places = {need.place for need in needs.needs_of(experiment)}
    assert set(header.needs) == places, f"its docstring has to say how to get {places}"
    assert header.size == f"{side} x {side}, {size / 1e6:.1f} M parameters."
