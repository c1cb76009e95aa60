"""Tests of diffusers pipelines that are written and read: same weights, outputs and images."""

import json

import convert_tiny as tiny
import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from convert_pipelines import assert_same_images, randomised, their_unet, theirs, to_torch

from conprediff_jax.common.errors import UserError
from conprediff_jax.config import presets
from conprediff_jax.interop import formats, model_card
from conprediff_jax.interop.diffusers import files as diffusers_files
from conprediff_jax.interop.diffusers import pipeline as diffusers_pipeline
from conprediff_jax.models.autoencoder import VQModel
from conprediff_jax.models.unet import UNet
from conprediff_jax.weights.diffusers import autoencoder as diffusers_autoencoder
from conprediff_jax.weights.diffusers import schedulers as diffusers_schedulers
from conprediff_jax.weights.diffusers import unet as diffusers_unet

MODELS = {
    "DDIM": (tiny.pixels, {}),
    "DDPM": (tiny.pixels, {"sampler": "ddpm"}),
    "original DDPM": (tiny.original_ddpm, {}),
    "DPM-Solver": (tiny.pixels, {"sampler": "dpm_solver", "clip": 0.0, "spacing": "linspace"}),
    "flow": (tiny.flow, {}),
    "VQ": (tiny.vq, {}),
    "KL": (tiny.kl, {}),
    "DiT": (tiny.dit, {}),
    "tokens": (tiny.tokens, {}),
}


def made(name):
    config, settings = MODELS[name]
    return tiny.pretrained(config()).resampled(**settings)


@pytest.mark.parametrize("name", MODELS)
def test_exported_models_open_in_diffusers_and_return(name, tmp_path, monkeypatch):
    model = made(name)
    formats.write(model, "diffusers", str(tmp_path / "out"))
    labels = [7, 999] if name == "DiT" else None
    found, pipeline = theirs(monkeypatch, tmp_path / "out", model, 2, labels=labels)
    assert_same_images(tiny.draw(model, 2, labels), found)

    back = diffusers_pipeline.read(str(tmp_path / "out"))
    tiny.assert_equal(back.params, model.params)
    if name == "tokens":  # of all codes, those that are used go
        expected = model.frozen["autoencoder"]["quantizer"]["codebook"][model.frozen["codes"]]
        codebook = back.frozen["autoencoder"]["quantizer"]["codebook"]
        np.testing.assert_array_equal(codebook, expected)
    else:
        tiny.assert_equal(back.frozen, model.frozen)
    assert back.config.data.class_names == model.config.data.class_names
    for section in ("process", "model", "sampling"):
        expected = model.config[section].to_dict() | {"steps": 50, "num": 64}
        got = back.config[section].to_dict() | {"steps": 50, "num": 64}
        assert got == expected, section

    if name != "tokens":
        x = np.random.default_rng(0).normal(size=(2, *model.diffusion.point_shape)).astype("f4")
        given = (to_torch(x), torch.tensor([3, 17]))
        with torch.no_grad():
            if name == "DiT":
                output = pipeline.transformer(*given, torch.tensor(labels)).sample
                assert pipeline.get_label_ids(["class 7", "also -999"]) == labels
            else:
                output = pipeline.unet(*given).sample
        condition = {"label": jnp.array(labels)} if labels else {}
        t = jnp.array([3, 17])
        ours = tiny.apply(model, x, t / 1000 if name == "flow" else t, **condition)
        np.testing.assert_allclose(ours, output.permute(0, 2, 3, 1), atol=1e-4)


@pytest.mark.parametrize(("name", "shelf"), [("VQ", "LDM"), ("tokens", "VQDiffusion")])
def test_custom_pipelines_draw_what_those_of_diffusers_draw(name, shelf, tmp_path, monkeypatch):
    """Without the pipeline that diffusers has put on its deprecated shelf."""
    model, out = made(name), tmp_path / "out"
    formats.write(model, "diffusers", str(out))
    settings = {"num_inference_steps": model.diffusion.sampling.steps, "output_type": "np"}
    if name == "tokens":
        settings |= {"prompt": ["", ""], "guidance_scale": 2.0, "truncation_rate": 0.7}
    else:
        settings |= {"batch_size": 2}
    expected = diffusers.DiffusionPipeline.from_pretrained(out)
    torch.manual_seed(0)
    expected = expected(**settings).images
    monkeypatch.delattr(diffusers, f"{shelf}Pipeline")
    custom = {"custom_pipeline": str(out), "trust_remote_code": True}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(out, **custom)
    assert "deprecated" not in type(pipeline).__module__
    torch.manual_seed(0)
    np.testing.assert_allclose(pipeline(**settings).images, expected, atol=1e-5)


def test_the_custom_pipeline_of_pixels_fills_holes_as_repaint_does(tmp_path):
    from diffusers import RePaintPipeline, RePaintScheduler
    from PIL import Image

    formats.write(made("DDPM"), "diffusers", str(tmp_path / "out"))
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
    right = np.zeros((32, 32), np.uint8)
    right[:, 16:] = 255
    mask = Image.fromarray(right)
    settings = {"num_inference_steps": 5, "jump_length": 2, "jump_n_sample": 2, "output_type": "np"}
    custom = {"custom_pipeline": str(tmp_path / "out"), "trust_remote_code": True}
    ours = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", **custom)
    scheduler = RePaintScheduler.from_config(ours.scheduler.config)
    theirs = RePaintPipeline(unet=ours.unet, scheduler=scheduler)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    filled = ours(image, mask, generator=generators[0], **settings).images
    expected = theirs(image, mask, generator=generators[1], **settings).images
    np.testing.assert_allclose(filled, expected, atol=1e-6)
    known = np.asarray(image)[:, 16:] / 255
    assert np.abs(filled[0, :, 16:] - known).max() < 0.1


def their_ldm(family=diffusers.VQModel, **options):
    first_stage = randomised(
        family(
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=3,
            **options,
        )
    )
    return diffusers.LDMPipeline(
        vqvae=first_stage,
        unet=their_unet(3),
        scheduler=diffusers.DDIMScheduler(
            num_train_timesteps=20,
            beta_schedule="scaled_linear",
            beta_start=0.01,
            beta_end=0.2,
            clip_sample=False,
            steps_offset=1,
            set_alpha_to_one=False,
        ),
    )


@pytest.mark.parametrize("family", [diffusers.VQModel, diffusers.AutoencoderKL])
def test_latent_models_of_diffusers_are_read(family, tmp_path, monkeypatch):
    their_ldm(family, scaling_factor=0.7).save_pretrained(tmp_path / "theirs")
    model = diffusers_pipeline.read(str(tmp_path / "theirs")).resampled(steps=3)
    found, _ = theirs(monkeypatch, tmp_path / "theirs", model, 2)
    assert_same_images(tiny.draw(model, 2), found)


def train_unconditional():
    """What diffusers' example train_unconditional.py makes by default, but narrow."""
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon"
    )
    return diffusers.DDPMPipeline(unet=randomised(unet), scheduler=scheduler)


def google_ddpm():
    """The options of google/ddpm-cifar10-32, whose files are of diffusers 0.0.4."""
    unet = their_unet(
        3,
        act_fn="silu",
        attention_head_dim=None,
        center_input_sample=False,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        mid_block_scale_factor=1,
        norm_eps=1e-6,
        sample_size=8,
    )
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large", clip_sample=True)
    return diffusers.DDPMPipeline(unet=unet, scheduler=scheduler)


@pytest.mark.parametrize("make", [train_unconditional, google_ddpm])
def test_models_of_pixels_from_elsewhere_are_read_and_go_back(make, tmp_path, monkeypatch):
    pipeline = make()
    pipeline.save_pretrained(tmp_path / "theirs")
    model = diffusers_pipeline.read(str(tmp_path / "theirs"))
    assert model.diffusion.sampling.steps == 1000
    model = model.resampled(steps=4)
    found, _ = theirs(monkeypatch, tmp_path / "theirs", model, 2)
    assert_same_images(tiny.draw(model, 2), found)
    formats.write(model, "diffusers", str(tmp_path / "back"))
    back = diffusers.DDPMPipeline.from_pretrained(tmp_path / "back")
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(back.unet.state_dict()[name], tensor), name
    ours, their = dict(back.scheduler.config), dict(pipeline.scheduler.config)
    assert all(ours[key] == value for key, value in their.items() if not key.startswith("_"))


def test_a_vq_model_without_a_scale_has_one(tmp_path):
    """Trap: the published VQ-f4 names no scale, and diffusers then divides by a KL model's."""
    their_ldm().save_pretrained(tmp_path / "theirs")
    config = tmp_path / "theirs" / "vqvae" / "config.json"
    content = json.loads(config.read_text())
    assert content.pop("scaling_factor") == 0.18215
    config.write_text(json.dumps(content))
    model = diffusers_pipeline.read(str(tmp_path / "theirs"))
    assert model.frozen["scale"] == 1
    # Nor is it left to the default on the way out.
    written = diffusers_autoencoder.config_to_diffusers(VQModel(), 1.0, 256)
    assert (
        diffusers.VQModel.from_config(written | {"block_out_channels": [32, 32, 32]}).config[
            "scaling_factor"
        ]
        == 1.0
    )
    kl = content | {"_class_name": "AutoencoderKL"}
    kl = {k: v for k, v in kl.items() if k in diffusers.AutoencoderKL.__init__.__annotations__}
    _, _, scale = diffusers_autoencoder.fields_from_diffusers(
        kl | {"_class_name": "AutoencoderKL"}, "kl"
    )
    assert scale == 0.18215


def test_the_steps_of_the_original_code_are_kept():
    """Trap: `range(0, T, c) + 1` down to alpha_bar_0, which are not diffusers' defaults."""
    config = presets.ldm_4("weights")
    config.first_stage.autoencoder.update(tiny.AUTOENCODER)
    model = tiny.make_experiment(config).task.model
    written = diffusers_schedulers.gaussian_to_diffusers(model.process, model.sampling)
    scheduler = diffusers.DDIMScheduler.from_config(written)
    scheduler.set_timesteps(200)
    np.testing.assert_array_equal(scheduler.timesteps, np.arange(0, 1000, 5)[::-1] + 1)
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0] < 1


def test_heads_of_a_conditional_unet_are_a_number_of_heads():
    """Trap: `attention_head_dim=4` is four heads there, and four channels in UNet2DModel."""
    module = randomised(
        diffusers.UNet2DConditionModel(
            in_channels=3,
            out_channels=3,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=4,
        )
    )
    unet = UNet(
        **diffusers_unet.fields_from_diffusers(
            {**module.config, "_class_name": "UNet2DConditionModel"}, "unet"
        )
    )
    state_dict = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    params = diffusers_unet.params_from_diffusers(state_dict, unet)
    rng = np.random.default_rng(0)
    x, text = (rng.normal(size=shape).astype("f4") for shape in ((2, 4, 4, 3), (2, 5, 24)))
    with torch.no_grad():
        expected = module(to_torch(x), torch.tensor([1, 9]), torch.from_numpy(text)).sample
    found = jax.jit(unet.apply)(
        {"params": params}, jnp.asarray(x), jnp.array([1, 9]), text=jnp.asarray(text)
    ).output
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1), atol=1e-4)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"freq_shift": 2}, "freq_shift is 2; only 0 and 1"),
        ({"flip_sin_to_cos": 1}, "flip_sin_to_cos is 1; it must be of type bool"),
        ({"downsample_padding": 2}, "downsample_padding is 2; only 0 and 1"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'; only"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups is None"),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "SkipDownBlock2D"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "do not mirror"),
        ({"downsample_type": "resnet"}, None),  # the lowest level changes nothing
        ({"act_fn": "swish"}, None),  # which is silu
        ({"act_fn": "gelu"}, "act_fn is 'gelu'; only 'silu'"),
        ({"attention_head_dim": 24}, "attention_head_dim is 24 at a level of 64 channels"),
        ({"block_out_channels": [64, 96]}, "multiples of the first"),
        ({"new_option": 3}, "no counterpart for new_option=3"),
    ],
)
def test_options_that_would_make_another_unet_are_refused(option, message):
    config = dict(their_unet(3).config) | option
    if message is None:
        assert not diffusers_unet.fields_from_diffusers(config, "unet")["resblock_updown"]
        return
    with pytest.raises(UserError, match=f"^unet: .*{message}"):
        diffusers_unet.fields_from_diffusers(config, "unet")


def with_model(**model):
    config = tiny.pixels().unlock()
    with config.model.ignore_type():
        config.model.update(model)
    return config.lock()


def patched():
    config = tiny.pixels().unlock()
    config.first_stage.patch = 2
    return config.lock()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: with_model(num_classes=3), "3 classes: none of diffusers' pipelines"),
        (patched, "patches of 2 x 2 pixels: none of diffusers' pipelines"),
        (
            lambda: with_model(num_heads=2, head_channels=None, attention_downsampling=(1, 2)),
            r"num_heads is 2 at levels of \[32, 64\] channels",
        ),
        (lambda: tiny.pixels(sampler="dpm_solver"), "clip is 1.0 with dpm_solver"),
        (lambda: tiny.pixels(spacing="trailing", steps=7), "take steps that divide 20"),
        (lambda: tiny.pixels(steps_offset=3, steps=9), "moves by 2 at every step"),
        (
            lambda: tiny.pixels(time_limit=19, spacing="linspace"),
            "time_limit is 19: only diffusers' DPM-Solver",
        ),
        (
            lambda: tiny.continuous(tiny.kl().first_stage, clip=1.0),
            "LDMPipeline cannot recompute a clipped epsilon",
        ),
    ],
)
def test_models_without_a_pipeline_are_reported_in_one_line(config, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        formats.write(tiny.pretrained(config()), "diffusers", str(tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_every_tensor_of_a_pipeline_is_accounted_for(tmp_path):
    from safetensors.numpy import load_file, save_file

    formats.write(made("DDIM"), "diffusers", str(tmp_path / "out"))
    file = tmp_path / "out" / "unet" / diffusers_files.WEIGHTS
    weights = load_file(file)
    changed = {
        r"conv_out.bias \(3,\) is missing": {
            k: v for k, v in weights.items() if k != "conv_out.bias"
        },
        r"stray \(2, 2\) is left over": weights | {"stray": np.zeros((2, 2), "f4")},
        r"conv_out.bias is \(4,\), not \(3,\)": weights | {"conv_out.bias": np.zeros(4, "f4")},
    }
    for message, tensors in changed.items():
        save_file(tensors, file)
        with pytest.raises(UserError, match=message):
            diffusers_pipeline.read(str(tmp_path / "out"))


def rewrite(folder, dtype, shards):
    """The weights in a folder as `save_pretrained` writes them for a variant or in parts."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / diffusers_files.WEIGHTS)
    (folder / diffusers_files.WEIGHTS).unlink()
    variant = {None: "", torch.float16: ".fp16", torch.bfloat16: ".bf16"}[dtype]
    stem = diffusers_files.WEIGHTS.removesuffix(".safetensors")
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / f"{stem}{variant}.safetensors")
        return
    names = [f"{stem}{variant}-{part}-of-{shards}.safetensors" for part in range(shards)]
    places = {name: names[index % shards] for index, name in enumerate(tensors)}
    for file in names:
        part = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        save_file(part, folder / file)
    index = folder / f"{stem}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 2])
def test_weights_of_half_precision_and_in_shards(dtype, shards, tmp_path):
    model, out = made("VQ"), tmp_path / "out"
    formats.write(model, "diffusers", str(out))
    for part in ("unet", "vqvae"):
        rewrite(out / part, dtype, shards)
    back = diffusers_pipeline.read(str(out))
    close = {None: 0, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=close, atol=close * 1e-4),
        (back.params, back.frozen),
        (model.params, model.frozen),
    )
    if shards == 2:
        next((out / "unet").glob("*-1-of-2*")).unlink()
        with pytest.raises(UserError, match=r"1-of-2\.safetensors: there is no such file"):
            diffusers_pipeline.read(str(out))
        for index in (out / "unet").glob("*index*"):
            index.write_text("{}")
        with pytest.raises(UserError, match="not an index of shards with a weight_map"):
            diffusers_pipeline.read(str(out))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model_index.json", [], "holds a list, not a JSON object"),
        ("model_index.json", {"unet": None}, "unet: holds a None in a DDIMPipeline"),
        ("model_index.json", {"movq": ["diffusers", "VQModel"]}, "movq: no part of a DDIMPipeline"),
        ("unet/config.json", {"sample_size": [8, 16]}, r"sample_size is \[8, 16\]; one number"),
        ("unet/config.json", {"dropout": "none"}, "dropout is 'none'; it must be of type float"),
        ("unet/config.json", {"block_out_channels": [48, 96]}, "positive multiple of 32"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_steps is 0"),
        ("scheduler/scheduler_config.json", {"steps_offset": 900}, "the times visited are 9"),
        ("scheduler/scheduler_config.json", {"stray": 1}, "no counterpart for stray=1"),
    ],
)
def test_invalid_files_are_reported_in_one_line(file, content, message, tmp_path):
    formats.write(made("DDIM"), "diffusers", str(tmp_path / "out"))
    path = tmp_path / "out" / file
    if isinstance(content, dict):
        content = json.loads(path.read_text()) | content
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        diffusers_pipeline.read(str(tmp_path / "out"))
    assert "\n" not in str(error.value)


def test_the_card_of_a_token_model_visits_every_time(tmp_path):
    """Trap: diffusers' scheduler does not stride, so fewer steps would begin in the middle."""
    model = made("tokens").resampled(steps=2)
    model_card.write(model, tmp_path, kind="VQDiffusionPipeline", name="out")
    assert "num_inference_steps=5" in (tmp_path / "README.md").read_text()
    scheduler = diffusers.VQDiffusionScheduler(7, num_train_timesteps=5)
    scheduler.set_timesteps(2)
    assert list(scheduler.timesteps) == [1, 0]  # the trap itself
