"""Tests of autoencoder training: adversarial gradients, codebook averages, and a whole run."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from flax import traverse_util
from PIL import Image
from safetensors.numpy import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from conprediff_jax import config as config_lib
from conprediff_jax import parallel
from conprediff_jax.common import random
from conprediff_jax.common.errors import ConfigError, UserError
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.interop import formats, pretrained
from conprediff_jax.metrics.networks import lpips
from conprediff_jax.models.autoencoder import VQModel
from conprediff_jax.models.discriminator import Discriminator
from conprediff_jax.models.first_stage import Pixels, Tokens, scaled
from conprediff_jax.parallel import sharding
from conprediff_jax.runs.checkpoint import Checkpoints
from conprediff_jax.runs.first_stage import load_params
from conprediff_jax.tasks import step as step_lib
from conprediff_jax.tasks.state import abstract_state, init_state
from conprediff_jax.train.loop import train


def tiny_config(kind, **overrides):
    config = config_lib.default_first_stage(kind)
    config.data.update(name="/set/data.name", image_size=8, threads=2)
    config.autoencoder.update(channels=32, channel_mult=(1,), blocks_per_level=1, patch=2)
    config.autoencoder.middle_attention = False
    config.optimizer.update(learning_rate=1e-3, epsilon=1e-3, b1=0.5, b2=0.9)
    config.train.update(steps=4, batch_size=8, log_every=1, checkpoint_every=2, ema_decay=0.9)
    config.loss.update(gan_channels=8, gan_layers=1)
    config.update_from_flattened_dict(overrides)
    return config


VQ_GAN = {
    "autoencoder.num_codes": 16,
    "loss.codebook_decay": 0.9,
    "loss.gan_weight": 0.5,
    "loss.gan_start": 2,
}


def make(kind, **overrides):
    return make_experiment(tiny_config(kind, **overrides))


def batch_of(size=8):
    """Images of two colours each, so that there is something to find in them."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (2, size, 1, 1, 3))
    mask = np.arange(8)[:, None] * rng.normal(size=(size, 1, 1)) > np.arange(8) - 4
    images = np.where(mask[..., None], *colours).astype(np.uint8)
    return {"image": jnp.asarray(images)}


def assert_close(a, b, rtol=1e-4):
    """Equal up to rounding, measured on the largest value of the tree."""
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(b))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=rtol * scale)


# --- the networks ---------------------------------------------------------------------------------


def test_discriminator_equals_torch():
    theirs = nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(8, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2),
        nn.Conv2d(16, 32, 4, 1, 1, bias=False), nn.BatchNorm2d(32), nn.LeakyReLU(0.2),
        nn.Conv2d(32, 1, 4, 1, 1),
    )  # fmt: skip
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = Discriminator(channels=8, layers=2)
    names = {"conv_0": 0, "conv_1": 2, "norm_1": 3, "conv_2": 5, "norm_2": 6, "output_conv": 8}
    params = {}
    for name, index in names.items():
        weight, bias = theirs[index].weight.detach().numpy(), theirs[index].bias
        norm = name.startswith("norm")
        params[name] = {"scale": weight} if norm else {"kernel": weight.transpose(2, 3, 1, 0)}
        if bias is not None:
            params[name]["bias"] = bias.detach().numpy()

    x = np.random.default_rng(0).normal(size=(3, 16, 12, 3)).astype(np.float32)
    initial = jax.eval_shape(ours.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, initial)
    expected = theirs.double()(torch.from_numpy(x).permute(0, 3, 1, 2).double())
    found = jax.jit(ours.apply)({"params": params}, x)
    assert_close(found, expected[:, 0].detach().numpy(), rtol=1e-5)
    smallest = jnp.zeros((1, ours.smallest_image, ours.smallest_image, 3))
    assert jax.eval_shape(ours.init_with_output, jax.random.key(0), smallest)[0].shape == (1, 1, 1)


def test_patches_are_pixels_rearranged():
    """An autoencoder of patches is one of as many more channels, on rearranged pixels."""
    options = {"channels": 32, "channel_mult": (1,), "blocks_per_level": 1, "num_codes": 5}
    patched, plain = VQModel(patch=2, **options), VQModel(out_channels=12, **options)
    images = batch_of(2)["image"]
    params = jax.jit(patched.init)(jax.random.key(0), scaled(images))
    points = Pixels(patch=2).encode({}, images)
    found = jax.jit(patched.apply)(params, scaled(images))[0]
    expected = jax.jit(plain.apply)(params, points)[0]
    assert found.shape == images.shape
    rearranged = found.reshape(2, 4, 2, 4, 2, 3).swapaxes(2, 3).reshape(2, 4, 4, 12)
    np.testing.assert_allclose(rearranged, expected, atol=1e-6)


# --- what a step computes -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played():
    """A step of a KL autoencoder with a discriminator: task, parameters, step before and after."""
    overrides = {"loss.gan_weight": 0.5, "loss.gan_start": 3, "loss.kl_weight": 0.01}
    task = make("kl", **overrides).task
    params, task_state = jax.jit(task.init)()
    step = jax.jit(lambda p, i: task.step(p, task_state, batch_of(), i))
    return task, params, step(params, jnp.int32(2)), step(params, jnp.int32(3))


def test_gradients_of_the_game_match_a_hand_computation(played):
    task, params, _, found = played
    x = scaled(batch_of()["image"])
    keys = random.example_keys(random.stream(0, "train/posterior", 3), jnp.arange(8))

    def logits(discriminator, images):
        return task.discriminator.apply({"params": discriminator}, images)

    def terms(autoencoder):
        x_, posterior = task.model.apply({"params": autoencoder}, x, keys)
        adversarial = -logits(params["discriminator"], x_).mean()
        return jnp.abs(x - x_).mean(), 0.01 * posterior.kl().mean() / 192, adversarial, x_

    @jax.jit
    def gradients(p):
        return [jax.grad(lambda p, i=i: terms(p)[i])(p) for i in range(3)]

    reconstruction, regulariser, adversarial = gradients(params["autoencoder"])
    last = (jnp.ravel(g["decoder"]["output_conv"]["kernel"]) for g in (reconstruction, adversarial))
    weight = 0.5 * np.divide(*(np.linalg.norm(g) for g in last))
    total = jax.tree.map(
        lambda a, b, c: a + b + weight * c, reconstruction, regulariser, adversarial
    )
    assert_close(found.grads["autoencoder"], total, rtol=1e-3)
    assert found.metrics["gan_weight"] == pytest.approx(weight, rel=1e-3)

    *values, x_ = jax.jit(terms)(params["autoencoder"])
    assert found.metrics["loss"] == pytest.approx(
        float(values[0] + values[1] + weight * values[2]), rel=1e-3
    )
    signal = 10 * np.log10(4 / np.square(np.clip(x_, -1, 1) - x).mean(axis=(1, 2, 3)))
    assert found.metrics["psnr"] == pytest.approx(float(signal.mean()), rel=1e-5)

    def hinge(discriminator):
        real, fake = logits(discriminator, x), logits(discriminator, x_)
        return (jnp.clip(1 - real, 0).mean() + jnp.clip(1 + fake, 0).mean()) / 2

    assert_close(found.grads["discriminator"], jax.jit(jax.grad(hinge))(params["discriminator"]))


def test_before_its_start_the_discriminator_neither_learns_nor_is_heard(played):
    _, _, before, after = played
    assert before.metrics["gan_weight"] == before.metrics["discriminator_loss"] == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(before.grads["discriminator"]))
    for metrics in (before.metrics, after.metrics):  # what a log line shows adds up
        terms = [float(value) for name, value in metrics.items() if name.startswith("loss/")]
        assert len(terms) == 3 and metrics["loss"] == pytest.approx(sum(terms), rel=1e-5)
    assert any(leaf.any() for leaf in jax.tree.leaves(after.grads["discriminator"]))


def test_microbatches_give_the_gradients_of_the_whole_batch():
    def results(parts):
        task = make("vq", **{"autoencoder.num_codes": 8, "train.microbatches": parts}).task
        params, task_state = jax.jit(task.init)()
        grads, metrics, *_ = jax.jit(task.step)(params, task_state, batch_of(), jnp.int32(0))
        return grads, metrics

    whole, parts = results(1), results(4)
    assert_close(parts[0], whole[0], rtol=1e-5)
    assert parts[1].keys() == whole[1].keys()
    for name, value in whole[1].items():
        assert parts[1][name] == pytest.approx(float(value), rel=1e-5)
    assert {"codebook/perplexity", "codebook/used", "psnr"} <= whole[1].keys()


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    """Files of random weights for AlexNet, as overrides of a config."""
    table, rng = lpips.table(lpips.LPIPS("alexnet")), np.random.default_rng(0)
    weights = {path: 0.05 * rng.normal(size=shape) for path, shape in table.shapes.items()}
    tensors = table.write(traverse_util.unflatten_dict(weights))
    overrides = {"loss.lpips_network": "alexnet", "loss.lpips_weight": 2.0, "data.image_size": 32}
    for name, prefix in [("trunk", "features"), ("heads", "lin")]:
        path = tmp_path_factory.mktemp("lpips") / f"{name}.safetensors"
        save_file({k: v for k, v in tensors.items() if k.startswith(prefix)}, path)
        overrides[f"loss.lpips_{name}"] = str(path)
    return overrides


def test_lpips_is_read_from_its_files_and_weighted(lpips_files):
    task = make("kl", **lpips_files).task
    task_state = task.with_perceptual_weights()
    _, abstract = jax.eval_shape(task.init)
    assert jax.tree.map(jnp.shape, task_state) == jax.tree.map(jnp.shape, abstract)
    x, x_ = np.random.default_rng(0).uniform(-1, 1, (2, 2, 32, 32, 3)).astype(np.float32)
    loss, terms = jax.jit(task.reconstruction_loss)(x_, x, task_state["lpips"])
    distance = jax.jit(lpips.LPIPS("alexnet").apply)({"params": task_state["lpips"]}, x, x_)
    assert terms["loss/lpips"] == pytest.approx(2 * float(distance.mean()), rel=1e-5)
    assert loss == pytest.approx(np.abs(x - x_).mean() + 2 * float(distance.mean()), rel=1e-5)

    without = make("kl", **lpips_files | {"loss.lpips_trunk": "", "loss.lpips_heads": ""}).task
    assert without.with_perceptual_weights() is None and without.init()[1] == {}
    missing = make("kl", **lpips_files | {"loss.lpips_trunk": "/none.pth"}).task
    with pytest.raises(UserError, match=r"/none.pth: there is no such weights file"):
        missing.with_perceptual_weights()


# --- training -------------------------------------------------------------------------------------


def run(experiment, devices=1, steps=4, **axes):
    """Final state and metrics of a few steps on one batch."""
    mesh = parallel.make_mesh(parallel.MeshSpec(**axes), jax.devices()[:devices])
    optimizer = experiment.optimizer.make(experiment.train.steps)
    abstract = abstract_state(experiment.task, optimizer, mesh)
    state = init_state(experiment.task, optimizer, abstract)
    train_step = step_lib.make_train_step(
        experiment.task, experiment.train, experiment.optimizer, abstract, mesh
    )
    batch, trace = parallel.to_global(jax.device_get(batch_of()), mesh), []
    for _ in range(steps):
        state, metrics = train_step(state, batch)
        trace.append(jax.device_get(metrics))
    return state, trace


@pytest.fixture(scope="module")
def followed():
    return run(make("vq", **VQ_GAN), steps=30)


def test_codes_follow_their_averages_and_are_used(followed):
    state, trace = followed
    codebook = state.params["autoencoder"]["quantizer"]["codebook"]
    usage, sums = state.task_state["averages"]
    np.testing.assert_array_equal(codebook, sums / usage[:, None])
    assert jnp.isfinite(codebook).all()
    # The first step finds all codes near zero; it moves those that it does not use.
    assert trace[0]["codebook/used"] < 1
    assert trace[-1]["codebook/used"] == 1 and 8 < trace[-1]["codebook/perplexity"] <= 16
    assert trace[-1]["psnr"] > trace[0]["psnr"] + 3


def test_any_mesh_gives_the_trace_of_one_device(followed, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_FSDP_SIZE", 1)
    state, trace = run(make("vq", **VQ_GAN), devices=4, fsdp=2)
    codebook = state.params["autoencoder"]["quantizer"]["codebook"]
    assert codebook.addressable_shards[0].data.size == codebook.size // 4  # by data and fsdp
    for expected, found in zip(followed[1], trace, strict=False):
        for name in expected:
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def test_a_run_writes_pairs_metrics_and_checkpoints(tmp_path, monkeypatch):
    one, make_mesh = jax.devices()[:1], parallel.make_mesh
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    monkeypatch.setattr(parallel, "make_mesh", lambda spec, devices=one: make_mesh(spec, devices))
    folder = tiny.write_images(tmp_path / "images")
    plain = {"autoencoder.patch": 1, "autoencoder.channel_mult": (1, 1)}  # as diffusers has them
    config = tiny_config("vq", **VQ_GAN, **plain, **{"data.name": str(folder)})
    state = train(config, str(tmp_path / "run"))
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0}).Reload()
    terms = ("l1", "codebook", "generator")
    expected = {"loss", "psnr", "codebook/perplexity", "codebook/used", "gan_weight"}
    expected.add("discriminator_loss")
    assert expected | {f"loss/{term}" for term in terms} <= set(events.Tags()["tensors"])
    grid = np.asarray(Image.open(tmp_path / "run" / "samples" / "step_0000004.png"))
    original = grid[2:66, 2:66]  # enlarged eightfold, one of the images of the folder
    files = [np.asarray(Image.open(path)) for path in folder.iterdir()]
    assert any((original[::8, ::8] == pixels).all() for pixels in files)
    with Checkpoints(str(tmp_path / "run"), read_only=True) as checkpoints:
        assert checkpoints.latest_step == int(state.step) == 4

    run = pretrained.open_run(str(tmp_path / "run"))
    formats.write_first_stage(run, "diffusers", str(tmp_path / "vqvae"))
    theirs = diffusers.VQModel.from_pretrained(tmp_path / "vqvae")
    x = np.stack(files[:2]).astype(np.float32) / 127.5 - 1
    expected, _ = run.task.model.apply({"params": run.params}, jnp.asarray(x))
    with torch.no_grad():
        found = theirs(torch.from_numpy(x).permute(0, 3, 1, 2)).sample.permute(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    tokens = Tokens(model=run.task.model, weights=str(tmp_path / "vqvae"))
    jax.tree.map(np.testing.assert_array_equal, load_params(tokens), run.params)


# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("vq", {"task": "gan"}, r"config.task is 'gan': choose one of \('denoising', 'vq', 'kl'\)"),
        ("vq", {"loss.codebook_decay": 1.0}, r"config.loss.codebook_decay is 1.0: it must lie in"),
        (
            "kl",
            {"loss.kl_weight": -1.0},
            r"config.loss.kl_weight is -1.0: it must not be negative",
        ),
        (
            "kl",
            {"loss.lpips_trunk": "a.pth"},
            r"config.loss: lpips_trunk and lpips_heads go togeth",
        ),
        ("kl", {"loss.lpips_network": "vgg"}, r"lpips_network is 'vgg': choose one of"),
        ("kl", {"loss.lpips_trunk": "a", "loss.lpips_heads": "b"}, r"8: LPIPS needs at least 16"),
        ("kl", {"loss.gan_weight": 1.0, "loss.gan_layers": 2}, r"Discriminator needs at least 12"),
        ("kl", {"loss.gan_weight": 1.0, "loss.gan_layers": 0}, r"config.loss: layers=0 must be at"),
        ("kl", {"autoencoder.patch": 3}, r"downsampling is 3: it must divide the image size 8"),
        (
            "kl",
            {"loss.gan_weight": 1.0, "train.microbatches": 2},
            r"microbatches is 2: it must be 1",
        ),
        ("vq", {"loss.codebook_decay": 0.9, "train.microbatches": 2}, r"it must be 1 with a discr"),
        ("vq", {"autoencoder.num_codes": 0}, r"config.autoencoder: num_codes=0 must be at least 1"),
    ],
)
def test_bad_values_are_named_before_anything_is_built(kind, overrides, message):
    with pytest.raises(ConfigError, match=message):
        make(kind, **overrides)
