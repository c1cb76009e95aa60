"""Tests of latent diffusion: the CelebA-HQ config on real formats, and first-stage weights."""

import dataclasses
import importlib.util
import io
import json
import pathlib
import shutil
import tarfile

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from conprediff_jax import config as config_lib
from conprediff_jax import parallel
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.data import DataError, sources
from conprediff_jax.data.tfds import prepare
from conprediff_jax.models.autoencoder import AutoencoderKL, VQModel
from conprediff_jax.runs import restore
from conprediff_jax.runs.first_stage import WEIGHTS, FirstStageError, load_params
from conprediff_jax.sampling.generate import make_generate
from conprediff_jax.train.loop import train

SMALL = {"channels": 32, "channel_mult": (1, 2, 2), "blocks_per_level": 1, "num_codes": 16}


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny.write_autoencoder(tmp_path_factory.mktemp("weights") / "vq-f4", VQModel(**SMALL))


@pytest.fixture(scope="module")
def celeba(tmp_path_factory):
    """TFDS's own builder on a file of the format that it asks users to fetch by hand."""
    data_dir = tmp_path_factory.mktemp("tfds")
    manual = data_dir / "downloads" / "manual"
    manual.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with tarfile.open(manual / "data256x256.tar", "w") as tar:
        for index in range(12):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            file = io.BytesIO()
            coarse.resize((256, 256)).save(file, "PNG")
            entry = tarfile.TarInfo(f"{index:05}.png")
            entry.size = file.tell()
            file.seek(0)
            tar.addfile(entry, file)
    prepare("celeb_a_hq/256", str(data_dir))
    return data_dir


def shipped(name):
    path = pathlib.Path(__file__).parent.parent / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def small_celebahq(data_dir, weights, **overrides):
    """configs/celebahq.py with everything of it but the sizes."""
    config = shipped("celebahq")
    config.dtype = "float32"
    config.data.update(data_dir=str(data_dir), image_size=32)
    config.first_stage.weights = str(weights)
    config.first_stage.autoencoder.update(SMALL)
    config.model.update(
        channels=32, channel_mult=(1,), blocks_per_level=1, attention_downsampling=()
    )
    config.context.update(hidden=16, latent=4, samples=4, iterations=5, points_per_example=8)
    config.train.update(steps=2, batch_size=4, log_every=1)
    config.sampling.update(steps=4, num=2)
    config.update_from_flattened_dict(overrides)
    return config


@pytest.fixture(scope="module")
def finished(celeba, weights, one_device, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    state = train(small_celebahq(celeba, weights, **{"first_stage.scale": None}), str(workdir))
    return workdir, state


def test_celebahq_runs_from_the_manual_files_to_a_sample(finished):
    workdir, state = finished
    assert int(state.step) == 2
    assert np.asarray(Image.open(workdir / "samples" / "step_0000002.png")).std() > 0


def test_the_measured_scale_makes_latents_of_unit_variance(finished, celeba, weights):
    _, state = finished
    first_stage = make_experiment(small_celebahq(celeba, weights)).task.model.first_stage
    source = sources.open_source("celeb_a_hq/256", data_dir=str(celeba))
    files = [Image.open(io.BytesIO(source[i]["image"])).resize((32, 32)) for i in range(12)]
    points = first_stage.encode(state.task_state["frozen"], jnp.asarray(np.stack(files)))
    assert np.std(points) == pytest.approx(1, rel=0.1)
    assert float(state.task_state["frozen"]["scale"]) != 1


def test_a_checkpoint_carries_its_first_stage(finished, weights, tmp_path):
    """Samples need neither the weights' folder nor the data."""
    workdir, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    mesh = parallel.make_mesh(parallel.MeshSpec())
    model, params, stage, *_ = restore.load(str(tmp_path / "run"), mesh)
    stored = load_params(model.first_stage)
    jax.tree.map(np.testing.assert_array_equal, stage["autoencoder"], stored)
    generate = make_generate(model, model.sampling, mesh)
    images = generate(params, stage, 0, jnp.arange(2))
    assert images.shape == (2, 32, 32, 3)


def test_decoding_encoded_images_is_the_autoencoder(weights):
    model = VQModel(**SMALL)
    first_stage = make_experiment(small_celebahq(".", weights)).task.model.first_stage
    stage = {"autoencoder": load_params(first_stage), "scale": np.float32(0.7)}
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    found = first_stage.decode(stage, first_stage.encode(stage, jnp.asarray(images)))
    expected, _ = model.apply(
        {"params": stage["autoencoder"]}, jnp.asarray(images / np.float32(127.5) - 1)
    )
    expected = np.clip(np.round(np.asarray(expected) * 127.5 + 127.5), 0, 255)
    assert np.abs(np.asarray(found, int) - expected).max() <= 1


def as_shards(tensors, folder):
    names = [f"diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    places = {name: names[i % 2] for i, name in enumerate(tensors)}
    for name in names:
        part = {k: t.astype(np.float16) for k, t in tensors.items() if places[k] == name}
        save_file(part, folder / name)
    index = folder / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": places}))


def as_bfloat16(tensors, folder):
    half = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
    save_file(half, folder / "diffusion_pytorch_model.bf16.safetensors")


def as_torch_file(tensors, folder):
    wrapped = {f"module.{name}": torch.from_numpy(tensor) for name, tensor in tensors.items()}
    torch.save(wrapped | {"global_step": 12}, folder / "diffusion_pytorch_model.bin")


@pytest.mark.parametrize("write", [as_shards, as_bfloat16, as_torch_file])
def test_weights_are_read_from_the_files_that_people_have(write, weights, tmp_path):
    folder = tmp_path / "vq"
    folder.mkdir()
    shutil.copy(weights / "config.json", folder)
    write(load_file(weights / WEIGHTS), folder)
    model = make_experiment(small_celebahq(".", weights)).task.model.first_stage
    expected = load_params(model)
    found = load_params(dataclasses.replace(model, weights=str(folder)))
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-6)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))


def test_missing_files_are_named_with_their_places(celeba, weights, tmp_path):
    config = small_celebahq(tmp_path, weights)
    with pytest.raises(DataError, match=rf"{tmp_path}.*downloads/manual"):
        train(config, str(tmp_path / "run"))
    config = small_celebahq(celeba, tmp_path / "vq-f4")
    with pytest.raises(FirstStageError, match=rf"put there a diffusers VQModel .*{WEIGHTS}"):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_weights_of_another_family_or_shape_are_refused(weights, finished, tmp_path):
    def load(first_stage):
        config = shipped("celebahq").unlock()
        config.first_stage = first_stage
        load_params(make_experiment(config).task.model.first_stage)

    kl = {key: value for key, value in SMALL.items() if key != "num_codes"}
    with pytest.raises(FirstStageError, match=r"holds a VQModel.*asks for a AutoencoderKL"):
        load(config_lib.latents("kl", str(weights), **kl))
    with pytest.raises(FirstStageError, match=r"\(16, 3\).*\(32, 3\)|\(32, 3\).*\(16, 3\)"):
        load(config_lib.latents("vq", str(weights), **(SMALL | {"num_codes": 32})))
    with pytest.raises(FirstStageError, match=r"holds a Denoising.*asks for a VQModel"):
        load(config_lib.latents("vq", str(finished[0]), **SMALL))
    other = tiny.write_autoencoder(tmp_path / "kl", AutoencoderKL(**kl))
    with pytest.raises(FirstStageError, match="holds a AutoencoderKL"):
        load(config_lib.latents("vq", str(other), **SMALL))


@pytest.mark.parametrize(("kind", "channels"), [("kl", 1), ("vq", 4)])
def test_first_stages_of_diffusers_follow_the_channels_of_the_data(tmp_path, kind, channels):
    """Random weights of diffusers' own classes give the same latents and images."""
    family = diffusers.AutoencoderKL if kind == "kl" else diffusers.VQModel
    theirs = family(
        in_channels=channels, out_channels=channels, latent_channels=4, block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    config = config_lib.default()
    config.data.update(name="photos", image_size=16, channels=channels)
    sizes = {"channels": 32, "channel_mult": (1, 2), "blocks_per_level": 1, "latent_channels": 4}
    sizes |= {"num_codes": 256} if kind == "vq" else {}
    config.first_stage = config_lib.latents(kind, str(tmp_path), scale=1.0, **sizes)
    stage = make_experiment(config).task.model.first_stage
    frozen = {"autoencoder": load_params(stage), "scale": np.float32(1)}
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, channels), np.uint8)
    with torch.no_grad():
        x = torch.from_numpy(images / np.float32(127.5) - 1).permute(0, 3, 1, 2)
        encoded = theirs.encode(x)
        latents = encoded.latent_dist.mode() if kind == "kl" else encoded.latents
        decoded = theirs.decode(latents).sample.permute(0, 2, 3, 1).numpy()
    points = jax.jit(stage.encode)(frozen, jnp.asarray(images))
    np.testing.assert_allclose(points, latents.permute(0, 2, 3, 1), atol=1e-5)
    expected = np.clip((decoded + 1) * 127.5, 0, 255)
    assert np.abs(np.asarray(jax.jit(stage.decode)(frozen, points), float) - expected).max() < 0.51

    config.data.channels = 3
    line = rf"^{tmp_path}: in_channels is {channels}, and config.data.channels is 3: "
    with pytest.raises(FirstStageError, match=line):
        load_params(make_experiment(config).task.model.first_stage)
