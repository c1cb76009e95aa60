"""Tests of latents encoded ahead of time: they equal those of training, also after a stop."""

import dataclasses
import io
import json
import shutil
import string
import sys
import types

import jax
import numpy as np
import pytest
import tiny
import torch
import transformers
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from test_commands import ROOT, run

from conprediff_jax import config as config_lib
from conprediff_jax import data, parallel
from conprediff_jax.common.errors import ConfigError
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.data import latents, sources
from conprediff_jax.data.tfds import TfdsSource
from conprediff_jax.models.autoencoder import AutoencoderKL
from conprediff_jax.planning.programs import lower_train_step
from conprediff_jax.runs.first_stage import load_params
from conprediff_jax.train import frozen
from conprediff_jax.train.loop import train
from conprediff_jax.train.precompute import precompute

COUNT, BAD = 29, 17  # records, and the one that is no image
KINDS = ("latent", "mirrored")
FINGERPRINT = "[0-9a-f]{12}"
OPTIONS = {"channels": 32, "channel_mult": (1, 2), "blocks_per_level": 1, "latent_channels": 2}

CONFIG = """
import sys
sys.path.append("{tests}")
import tiny
from conprediff_jax.config import latents

def get_config():
    config = tiny.get_config()
    with config.unlocked():
        config.first_stage = latents("kl", "{weights}", **{options})
    return config
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny.write_autoencoder(
        tmp_path_factory.mktemp("weights") / "kl", AutoencoderKL(**OPTIONS), seed=0
    )


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory):
    return tiny.write_autoencoder(
        tmp_path_factory.mktemp("weights") / "kl", AutoencoderKL(**OPTIONS), seed=1
    )


@pytest.fixture(scope="module", autouse=True)
def captioned():
    """Data as in TFDS, with labels, several captions per image, and a file that is no image."""
    rng = np.random.default_rng(0)
    records = []
    for index in range(COUNT):
        file = io.BytesIO()
        size = (8 if index % 4 else 4, 12)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(file, "PNG")
        image = b"no image" if index == BAD else file.getvalue()
        captions = np.array([f"{index} {word}".encode() for word in "abc"], object)
        records.append({"image": image, "label": index % 3, "captions": captions})
    source = TfdsSource(
        records=records,
        title="captioned",
        label="label",
        class_names=("x", "y", "z"),
        keep={"caption": "captions"},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "open_source", lambda name, **options: source)
        yield


def config_of(weights, **overrides):
    config = tiny.get_config()
    with config.unlocked():
        config.first_stage = config_lib.latents("kl", str(weights), **OPTIONS)
    config.data.update(name="captioned", keep=("caption",))
    config.model.num_classes = 3
    config.context.weight = 0.0
    config.train.update(steps=4, checkpoint_every=4)
    config.update_from_flattened_dict(overrides)
    return config


@pytest.fixture(scope="module")
def encoded(weights, tmp_path_factory):
    """A folder of latents."""
    folder = tmp_path_factory.mktemp("encoded") / "latents"
    precompute(config_of(weights), str(folder), shard_size=8)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def with_latents(folder):
    return {"data.latents": str(folder)}


def test_latents_of_several_shapes_are_those_of_their_images(weights, tmp_path, monkeypatch):
    one, make_mesh = jax.devices()[:1], parallel.make_mesh  # where programs compile sooner
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    monkeypatch.setattr(parallel, "make_mesh", lambda spec, _=one: make_mesh(spec, one))
    shapes = {"data.aspect_step": 4, "data.max_aspect": 3.0, "data.flip": False}
    config = config_of(weights, **shapes, **{"train.steps": 2})
    precompute(config, str(tmp_path / "latents"), shard_size=8)
    first_stage = make_experiment(config).task.model.first_stage
    encode, params = jax.jit(first_stage.encode_unscaled), load_params(first_stage)
    images = data.make_iterator(make_experiment(config).data, batch_size=4, seed=1)
    config.update_from_flattened_dict(with_latents(tmp_path / "latents"))
    spec, seen = make_experiment(config).data, set()
    encoded = data.make_iterator(spec, batch_size=4, seed=1)
    for _ in range(12):
        image, latent = next(images)["image"], next(encoded)["latent"]
        seen.add(latent.shape)
        np.testing.assert_allclose(latent, encode(params, image), atol=1e-5)
    assert seen == {(4, 2, 6, 2), (4, 4, 4, 2)}
    train(config, str(tmp_path / "run"))
    with pytest.raises(data.DataError, match=r"aspect_step is 0; the latents in \S+ were .* 4"):
        data.open_data(dataclasses.replace(spec, aspect_step=0))


def test_batches_are_those_of_the_images_encoded(weights, encoded):
    first_stage = make_experiment(config_of(weights)).task.model.first_stage
    encode, params = jax.jit(first_stage.encode_unscaled), load_params(first_stage)
    mesh = parallel.make_mesh(parallel.MeshSpec())
    spec, latent_spec = (
        make_experiment(config_of(weights, **overrides)).data
        for overrides in ({}, with_latents(encoded))
    )
    images, latent = (
        data.make_iterator(s, batch_size=8, seed=1, process_index=1, process_count=2)
        for s in (spec, latent_spec)
    )
    for _ in range(6):  # several epochs, across the file that is no image
        state = latent.get_state()
        a, b = next(images), next(latent)
        assert set(a) - {"image"} == set(b) - {"latent"} == {"label", "caption"}
        for name in ("label", "caption"):
            np.testing.assert_array_equal(b[name], a[name])
        expected = encode(params, parallel.to_global({"image": a["image"]}, mesh)["image"])
        np.testing.assert_array_equal(b["latent"], expected)
        data.check_batch(b, latent_spec, batch_size=8, num_classes=3)
        latent.set_state(state)  # a resumed run sees the same batch
        np.testing.assert_array_equal(next(latent)["latent"], b["latent"])
    source = data.open_data(latent_spec)
    assert len(source) == COUNT and source.class_names == ("x", "y", "z")
    evaluated = next(data.evaluation_iterator(latent_spec, batch_size=4))  # images, all the same
    assert evaluated["image"].shape == (4, 8, 8, 3)
    assert "latent" not in source[BAD] and not np.array_equal(*map(source[0].get, KINDS))


def losses(config, workdir):
    """Losses and norms of gradients of a run, by step."""
    train(config, str(workdir))
    events = EventAccumulator(str(workdir), size_guidance={"tensors": 0}).Reload()
    return [
        [make_ndarray(event.tensor_proto).item() for event in events.Tensors(name)]
        for name in ("loss", "norm/gradient")
    ]


def test_training_is_the_same_and_knows_its_first_stage(weights, other_weights, encoded, tmp_path):
    on_the_fly = losses(config_of(weights), tmp_path / "images")
    ahead = losses(config_of(weights, **with_latents(encoded)), tmp_path / "latents")
    assert np.shape(ahead) == (2, 4)
    np.testing.assert_allclose(ahead, on_the_fly, rtol=0, atol=1e-6)

    both = rf"fingerprint {FINGERPRINT}; this run's has {FINGERPRINT}"
    with pytest.raises(data.DataError, match=both):  # a run that begins
        train(config_of(other_weights, **with_latents(encoded)), str(tmp_path / "wrong"))
    precompute(config_of(other_weights), str(tmp_path / "others"))
    with pytest.raises(data.DataError, match=both):  # and one that is resumed
        train(
            config_of(weights, **with_latents(tmp_path / "others"), **{"train.steps": 5}),
            str(tmp_path / "latents"),
        )


def test_captions_encoded_ahead_train_as_those_encoded_on_the_fly(weights, encoded, tmp_path):
    """Equal up to float16, in which latents are stored."""
    for seed in (0, 1):
        torch.manual_seed(seed)
        clip = transformers.CLIPTextConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=4,
        )  # fmt: skip
        transformers.CLIPTextModel(clip).save_pretrained(tmp_path / f"clip_{seed}")
    sizes = {"length": 4, "width": 16, "num_layers": 1, "num_heads": 2, "hidden": 16}
    tokenizer = data.Tokenizer.train([string.ascii_lowercase], vocab_size=64, length=4)

    def captioned_config(clip=0, **overrides):
        config = config_of(weights).unlock()
        folder = str(tmp_path / f"clip_{clip}")
        config.text = config_lib.text("clip", weights=folder, vocab_size=64, **sizes)
        config.text.vocabulary = tokenizer.to_json()
        config.data.text = "caption"
        config.condition.update(dropout=0.5, null="empty")
        config.model.num_classes = None
        config.update_from_flattened_dict(overrides)
        return config.lock()

    folder = {"data.latents": str(tmp_path / "ahead"), "data.encoded_text": True}
    precompute(captioned_config(**folder), folder["data.latents"], shard_size=8)
    on_the_fly = losses(captioned_config(), tmp_path / "images")
    ahead = losses(captioned_config(**folder), tmp_path / "run")
    np.testing.assert_allclose(ahead, on_the_fly, rtol=1e-3)

    with pytest.raises(data.DataError, match="holds captions of a text encoder with fingerprint"):
        train(captioned_config(clip=1, **folder), str(tmp_path / "wrong"))
    with pytest.raises(data.DataError, match=r"holds no encoded captions: run .*encoded_text=True"):
        train(captioned_config(**folder | with_latents(encoded)), str(tmp_path / "wrong"))
    trained_along = captioned_config(**folder, **{"text.weights": ""})
    with pytest.raises(ConfigError, match="only a frozen text encoder"):
        make_experiment(trained_along)


class Killed(BaseException):
    """Simulates the sudden end of a process."""


def test_an_interrupted_run_ends_where_the_uninterrupted_one_does(
    weights, encoded, tmp_path, monkeypatch
):
    folder, written = tmp_path / "latents", []

    class Mortal(latents.ArrayRecordWriter):
        def write(self, record):
            written.append(record)
            if len(written) == 8 + 8 + 3:
                raise Killed
            super().write(record)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(latents, "ArrayRecordWriter", Mortal)
        precompute(config_of(weights), str(folder), shard_size=8)
    whole = contents(encoded)
    found = contents(folder)
    assert len(found) == 4 and len(whole) == 5  # two shards, part of a third, the manifest
    assert found.pop("incomplete.json") == whole["latents.json"]
    with pytest.raises(
        data.DataError, match=r"incomplete, 2 of 4 .*precompute .*--out=.* again: it continues"
    ):
        data.open_data(make_experiment(config_of(weights, **with_latents(folder))).data)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}
    precompute(config_of(weights), str(folder), shard_size=8)
    assert contents(folder) == whole
    assert times == {path: path.stat().st_mtime_ns for path in times}  # nothing encoded twice
    (folder / "00001-of-00004.array_record").unlink()  # nor is a complete folder beyond repair
    precompute(config_of(weights), str(folder), shard_size=8)
    assert contents(folder) == whole


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"first_stage.weights": "{other}"}, f"fingerprint {FINGERPRINT} there, {FINGERPRINT} he"),
        ({"data.image_size": 16}, r"data.image_size 8 there, 16 here, shape \[4, 4, 2\] there"),
        ({"data.flip": False}, "flip True there, False here"),
        ({"first_stage.scale": 0.5}, "scale .* there, 0.5 here, scale_source measured"),
        ({"data.crop": "random"}, "config.data.crop is 'random': .*'center' crop"),
    ],
)
def test_another_run_is_refused_in_the_same_folder(
    overrides, message, weights, other_weights, encoded
):
    before = contents(encoded)
    filled = {
        k: v.format(other=other_weights) if k.endswith("weights") else v
        for k, v in overrides.items()
    }
    with pytest.raises((data.DataError, ConfigError), match=message) as caught:
        precompute(config_of(weights, **filled), str(encoded), shard_size=8)
    assert "\n" not in str(caught.value) and contents(encoded) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.image_size": 16}, "config.data.image_size is 16; .* were encoded with 8"),
        ({"data.split": "test"}, "config.data.split is 'test'; .* with 'train'"),
        ({"data.keep": ("title",)}, r"config.data.keep has title; .* with keep=\['caption'\]"),
        ({"data.crop": "random"}, "config.data: crop is 'random'"),
        ({"data.latents": "{empty}"}, "no latents there; run .*precompute .*--out="),
        ({"data.latents": "{unflipped}"}, "no latents of mirrored images"),
        ({"data.latents": "{damaged}"}, "damaged"),
        ({"data.latents": "{foreign}"}, "holds other things"),
    ],
)
def test_latents_that_do_not_fit_are_refused(overrides, message, weights, encoded, tmp_path):
    folders = {name: tmp_path / name for name in ("empty", "unflipped", "damaged", "foreign")}
    for name in ("unflipped", "damaged"):
        shutil.copytree(encoded, folders[name])
    manifest = json.loads((encoded / "latents.json").read_text()) | {"flip": False}
    (folders["unflipped"] / "latents.json").write_text(json.dumps(manifest))
    shard = folders["damaged"] / "00002-of-00004.array_record"
    shard.write_bytes(shard.read_bytes()[:100])
    tiny.write_images(folders["foreign"], 1)
    filled = {k: v.format(**folders) if isinstance(v, str) else v for k, v in overrides.items()}
    with pytest.raises((data.DataError, ConfigError), match=message) as caught:
        config = config_of(weights, **(with_latents(encoded) | filled))
        data.open_data(make_experiment(config).data)
    assert "\n" not in str(caught.value)


def test_only_a_denoiser_on_a_first_stage_has_latents(encoded):
    pixels, vq = tiny.get_config(), config_lib.default_first_stage("vq")
    for config, message in ((pixels, "kind is 'pixels'"), (vq, "config.task trains a first stage")):
        with pytest.raises(ConfigError, match=message):
            precompute(config, str(encoded))
        config.data.latents = str(encoded)
        with pytest.raises(ConfigError, match="only a denoiser with a trained first stage"):
            make_experiment(config)


def test_the_commands(weights, tmp_path):
    """Latents are encoded and trained on; losses on held-out images need none of these."""
    images, latent = tmp_path / "images", tmp_path / "latents"
    tiny.write_images(images / "train")
    tiny.write_images(images / "test", count=4)
    file = tmp_path / "latent.py"
    file.write_text(CONFIG.format(tests=ROOT / "tests", weights=weights, options=OPTIONS))
    configured = (f"--config={file}", f"--config.data.name={images}")

    def encode(*arguments):
        return run("precompute", *configured, *arguments)

    result = encode(f"--out={latent}", "--shard_size=20")
    assert result.returncode == 0, result.stderr
    for said in ("makes   points", "24/24 images in", f"config.data.latents={latent}"):
        assert said in result.stderr
    ahead = f"--config.data.latents={latent}"
    refused = encode(ahead)  # the same, by the config
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("error: ")
    assert "shard_size 20 there, 1024 here" in refused.stderr.splitlines()[-1]

    workdir, out = f"--workdir={tmp_path / 'run'}", tmp_path / "held_out.json"
    trained = run("main", *configured, ahead, workdir, "--config.train.steps=2")
    assert trained.returncode == 0, trained.stderr
    evaluated = run("held_out", workdir, "--split=test", "--times=2", f"--out={out}")
    assert evaluated.returncode == 0, evaluated.stderr
    (found,) = json.loads(out.read_text())
    assert found["settings"]["images"]["count"] == 4 and np.isfinite(found["losses"]).all()


def test_features_of_an_encoder_reach_the_term_that_reads_them(weights, tmp_path, monkeypatch):
    def encode(images):
        return np.asarray(images, np.float32).reshape(-1, 2, 4, 2, 4, 3).mean((2, 4)) / 255

    monkeypatch.setitem(sys.modules, "tiny_encoder", types.SimpleNamespace(encode=encode))
    named = {"data.features": "tiny_encoder:encode"}
    folder = tmp_path / "latents"
    assert precompute(config_of(weights, **named), str(folder)).features_shape == (2, 2, 3)
    config = config_of(weights, **named, **with_latents(folder))
    images, ahead = (
        next(data.make_iterator(make_experiment(c).data, batch_size=8, seed=1))
        for c in (config_of(weights), config)
    )
    # Half of the images are mirrored, and so are the images that the encoder saw.
    np.testing.assert_allclose(ahead["features"], encode(images["image"]), atol=1e-3)

    config = config.unlock()
    config.terms.repa = config_lib.term("encoder_alignment", shape=(2, 2, 3), hidden=8)
    experiment = make_experiment(config)
    program = lower_train_step(experiment, parallel.make_mesh(parallel.MeshSpec()))
    assert "8x2x2x3xf16" in program.as_text()
    config.terms.repa.shape = (4, 4, 3)
    task = make_experiment(config).task
    frozen_ = {"frozen": {"autoencoder": load_params(task.model.first_stage)}}
    with pytest.raises(data.DataError, match=r"of shape \(2, 2, 3\); config.terms.repa.shape is"):
        frozen.check_latents(task, frozen_)
    with pytest.raises(data.DataError, match=r"features is 'other:f'; .* holds those of"):
        data.open_data(
            make_experiment(
                config_of(weights, **{"data.features": "other:f"}, **with_latents(folder))
            ).data
        )
    with pytest.raises(
        ConfigError, match=r"config.data.features is 'nowhere:f': give 'module:func"
    ):
        precompute(config_of(weights, **{"data.features": "nowhere:f"}), str(tmp_path / "other"))
    config.data.features = ""
    with pytest.raises(ConfigError, match=r"config.terms.repa reads features: config.data.latents"):
        make_experiment(config)
