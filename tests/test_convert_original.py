"""Tests of checkpoints with original names, against torch models with these names.

The torch models load our state dicts with `strict`, so a wrong name or shape is an error, and a
tensor in the wrong place gives another output. Where diffusers can convert such files, the tests
also compare with its converter.
"""

import argparse
import math

import convert_originals as originals
import convert_tiny as tiny
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from convert_pipelines import to_torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from test_dit import TorchDiT, randomised

from conprediff_jax.common import blocks
from conprediff_jax.common.errors import UserError
from conprediff_jax.config import presets
from conprediff_jax.config.sections import section
from conprediff_jax.diffusion import schedules
from conprediff_jax.diffusion.flow import FlowProcess
from conprediff_jax.interop import formats
from conprediff_jax.interop.diffusers.files import write_part
from conprediff_jax.interop.diffusers.folder import latent_autoencoder
from conprediff_jax.interop.original import dit, published
from conprediff_jax.models.autoencoder import AutoencoderKL, VQModel
from conprediff_jax.models.transformer import TokenTransformer
from conprediff_jax.models.unet import UNet
from conprediff_jax.sampling.spec import FlowSampling
from conprediff_jax.weights import model_shapes, tensor_files
from conprediff_jax.weights.diffusers import autoencoder as diffusers_autoencoder
from conprediff_jax.weights.diffusers import unet as diffusers_unet
from conprediff_jax.weights.original import autoencoder as original_autoencoder
from conprediff_jax.weights.original import dit as original_dit
from conprediff_jax.weights.original import transformer as original_transformer
from conprediff_jax.weights.original import unet as original_unet

LDM = {
    "channels": 32,
    "channel_mult": (1, 2),
    "blocks_per_level": 2,
    "attention_downsampling": (2,),
    "head_channels": 16,
}
ADM = {
    "channels": 32,
    "channel_mult": (1, 2),
    "blocks_per_level": 1,
    "attention_downsampling": (1, 2),
    "num_heads": 4,
    "scale_shift_norm": True,
    "resblock_updown": True,
    "num_classes": 5,
}


def random_params(shapes):
    tree = tiny.traverse_util.unflatten_dict(
        {path: np.empty(shape, "f4") for path, shape in shapes.items()}
    )
    return tiny.random_like(tree, 0)


def loaded(module, state_dict):
    module.load_state_dict({k: torch.from_numpy(v) for k, v in state_dict.items()}, strict=True)
    return module.eval()


def unet_inputs(channels, classes=None):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 4, channels)).astype("f4")
    return x, np.array([1, 900]), None if classes is None else np.array([4, 1])


@pytest.mark.parametrize(("options", "new_order"), [(LDM, False), (ADM, False), (ADM, True)])
def test_original_unets_make_the_same_output(options, new_order):
    unet = UNet(out_channels=3, **options)
    params = random_params(model_shapes.of_unet(unet, 3))
    state_dict = originals.to_original(params, unet, new_attention_order=new_order)
    x, t, label = unet_inputs(3, unet.num_classes)
    with torch.no_grad():
        module = loaded(originals.OriginalUNet(unet, 3, new_order), state_dict)
        expected = module(
            torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
            torch.from_numpy(t),
            None if label is None else torch.from_numpy(label),
        )
    expected = expected.permute(0, 2, 3, 1).numpy()
    assert expected.std() > 0.1
    back = original_unet.params_from_original(state_dict, unet, new_attention_order=new_order)
    tiny.assert_equal(back, params)
    x, t, label = jax.tree.map(jnp.asarray, (x, t, label))
    run = jax.jit(lambda params: unet.apply({"params": params}, x, t, label=label).output)
    np.testing.assert_allclose(run(back), expected, atol=1e-4)
    # Trap: the other order of query, key and value has the same shapes, and makes other images.
    other = original_unet.params_from_original(state_dict, unet, new_attention_order=not new_order)
    assert np.abs(run(other) - expected).max() > 1e-2


def test_original_text_unets_are_what_diffusers_reads():
    unet = UNet(out_channels=4, **(LDM | {"head_channels": None, "num_heads": 4, "text_dim": 24}))
    params = random_params(model_shapes.of_unet(unet, 4))
    state_dict = originals.to_original(params, unet)
    whole = {f"model.diffusion_model.{k}": torch.from_numpy(v) for k, v in state_dict.items()}
    converted = convert_ldm_unet_checkpoint(whole, {"layers_per_block": 2})
    converted = {name: tensor.numpy() for name, tensor in converted.items()}
    tiny.assert_equal(diffusers_unet.params_from_diffusers(converted, unet), params)
    tiny.assert_equal(original_unet.params_from_original(state_dict, unet), params)


@pytest.mark.parametrize("family", [VQModel, AutoencoderKL])
def test_original_autoencoders_are_what_diffusers_reads(family):
    options = {"latent_channels": 4, "channels": 32, "channel_mult": (1, 2), "blocks_per_level": 2}
    model = family(**options, **({"num_codes": 7} if family is VQModel else {}))
    params = random_params(model_shapes.of_autoencoder(model, 3))
    state_dict = originals.to_original(params, model)
    theirs = {f"first_stage_model.{k}": torch.from_numpy(v) for k, v in state_dict.items()}
    blocks = ["DownEncoderBlock2D"] * 2
    converted = convert_ldm_vae_checkpoint(
        theirs, {"down_block_types": blocks, "up_block_types": blocks}
    )
    converted = {name: tensor.numpy() for name, tensor in converted.items()}
    if family is VQModel:  # which their converter does not know
        converted["quantize.embedding.weight"] = state_dict["quantize.embedding.weight"]
    tiny.assert_equal(diffusers_autoencoder.params_from_diffusers(converted, model), params)
    tiny.assert_equal(original_autoencoder.params_from_original(state_dict, model), params)


def test_attention_at_a_level_of_an_original_autoencoder():
    """taming's `down.{level}.attn.{i}` and `up.{level}.attn.{i}`, and ITHQ's codebook."""
    model = VQModel(
        channels=32,
        channel_mult=(1, 1),
        blocks_per_level=1,
        attention_downsampling=(2,),
        num_codes=7,
    )
    params = random_params(model_shapes.of_autoencoder(model, 3))
    state_dict = originals.to_original(params, model)
    attentions = {name.rsplit(".", 2)[0] for name in state_dict if ".q." in name}
    assert attentions == {
        *("encoder.down.1.attn.0", "encoder.mid.attn_1", "decoder.mid.attn_1"),
        *("decoder.up.1.attn.0", "decoder.up.1.attn.1"),
    }
    assert state_dict["encoder.down.1.attn.0.q.weight"].shape == (32, 32, 1, 1)
    assert "decoder.up.1.upsample.conv.weight" in state_dict
    assert "encoder.down.0.downsample.conv.weight" in state_dict
    state_dict["quantize.embedding"] = state_dict.pop("quantize.embedding.weight")
    tiny.assert_equal(original_autoencoder.params_from_original(state_dict, model), params)


@pytest.mark.parametrize(
    "options",
    [
        {"position_grid": (8, 8)},
        {"convolutional": True},
        {"num_classes": 3, "convolutional": True},
        {"text_dim": 6},
    ],
)
def test_original_transformers_make_the_same_output(options):
    model = TokenTransformer(
        num_codes=11, grid=(4, 4), width=16, num_layers=2, num_heads=2, num_steps=10, **options
    )
    separate = random_params(model_shapes.of_transformer(model))
    state_dict = originals.to_original(separate, model)
    rng = np.random.default_rng(0)
    x, t = rng.integers(0, 12, (2, 4, 4)), np.array([0, 7])
    label = np.array([2, 0]) if model.num_classes else None
    text = rng.normal(size=(2, 5, 6)).astype("f4") if model.text_dim else None
    with torch.no_grad():
        expected = loaded(originals.OriginalTransformer(model), state_dict)(
            *(
                None if array is None else torch.from_numpy(array)
                for array in (x.reshape(2, 16), t, label, text)
            )
        ).numpy()
    back = original_transformer.params_from_original(state_dict, model)
    tiny.assert_equal(back, blocks.stack(separate))
    x, t, label, text = jax.tree.map(jnp.asarray, (x, t, label, text))
    found = jax.jit(
        lambda x, t: model.apply({"params": back}, x, t, label=label, text=text).output
    )(x, t)
    np.testing.assert_allclose(found.reshape(2, 16, 11), expected, atol=1e-4)


def as_torch(tensors):
    return {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}


def ldm_checkpoint(model, **changes):
    """What CompVis' trainer writes: weights, their average, first stage, tables and its state."""
    diffusion, frozen = model.diffusion, model.frozen
    unet = originals.to_original(model.networks["denoiser"], diffusion.denoiser)
    averaged = {f"model_ema.{f'diffusion_model{k}'.replace('.', '')}": v for k, v in unet.items()}
    stale = {f"model.diffusion_model.{k}": v + 1 for k, v in unet.items()}
    first_stage = originals.to_original(frozen["autoencoder"], diffusion.first_stage.model)
    first_stage = {f"first_stage_model.{k}": v for k, v in first_stage.items()}
    betas = schedules.betas("scaled_linear", 20, 0.01, 0.2)
    tensors = {
        **averaged, **stale, **first_stage,
        "first_stage_model.loss.discriminator.main.0.weight": np.zeros(3),
        "model_ema.decay": np.float32(0.9999),
        "model_ema.num_updates": np.array(7),
        "scale_factor": np.float32(0.25),
        "betas": betas.astype("f4"),
        "alphas_cumprod": np.zeros(20, "f4"),
    }  # fmt: skip
    return {"state_dict": as_torch(tensors | changes), "global_step": 7, "epoch": 1}


def test_a_checkpoint_of_latent_diffusion(tmp_path):
    model, path = tiny.pretrained(tiny.kl()), tmp_path / "model.ckpt"
    torch.save(ldm_checkpoint(model), path)
    read = formats.read(str(path), "ldm", config=model.config)
    tiny.assert_equal(read.params, model.params)  # the average, not the weights
    tiny.assert_equal(read.frozen["autoencoder"], model.frozen["autoencoder"])
    assert read.frozen["scale"] == np.float32(0.25)  # the file's
    assert read.step == 7

    for changes, message in (
        (
            {"betas": np.linspace(0.01, 0.2, 20)},
            "0.2; the config's are scaled_linear",
        ),
        ({"cond_stage_model.x": np.zeros((2, 3))}, r"cond_stage_model.x \(2, 3\)"),
        ({"first_stage_model.stray": np.zeros(2)}, r"stray \(2,\) is left over"),
        ({"model_ema.stray": np.zeros(2)}, "model_ema.stray"),
        (
            {"first_stage_model.quant_conv.bias": np.zeros(3)},
            r"quant_conv.bias is \(3,\), not \(8,\)",
        ),
    ):
        torch.save(ldm_checkpoint(model, **changes), path)
        with pytest.raises(UserError, match=message) as error:
            formats.read(str(path), "ldm", config=model.config)
        assert "\n" not in str(error.value)


def test_a_checkpoint_of_adm(tmp_path):
    """Its variances are in the second half of the last convolution."""
    config = tiny.pixels().unlock()
    with config.model.ignore_type():
        config.model.update(num_classes=5)
    model, path = tiny.pretrained(config.lock()), tmp_path / "model.pt"
    weights = originals.to_original(model.params, model.diffusion.denoiser)
    learned = {
        name: np.concatenate([weights[name], np.ones_like(weights[name])])
        for name in ("out.2.weight", "out.2.bias")
    }
    for tensors in (weights, weights | learned):
        torch.save(as_torch(tensors), path)
        read = formats.read(str(path), "adm", config=config)
        tiny.assert_equal(read.params, model.params)
    torch.save(as_torch(weights | {"stray": np.zeros(2)}), path)
    with pytest.raises(UserError, match=r"stray \(2,\) is left over"):
        formats.read(str(path), "adm", config=config)


@pytest.fixture
def kl_folder(tmp_path):
    """The first stage of a tiny DiT, in a folder of its own, and its parameters."""
    model = tiny.pretrained(tiny.dit())
    write_part(tmp_path / "vae", *latent_autoencoder(model))
    return str(tmp_path / "vae"), model.frozen["autoencoder"]


def test_checkpoints_of_dit_and_sit(kl_folder, tmp_path):
    """What is published, and what the trainer writes, with the average beside the weights."""
    config, path = tiny.dit(time_endpoint=False, mlp_norm_epsilon=1e-6), tmp_path / "model.pt"
    folder, autoencoder = kl_folder
    module = randomised(TorchDiT(16, 2, 2, 2, 4, 1000, 2))
    theirs = module.state_dict()
    stale = {name: tensor + 1 for name, tensor in theirs.items()}
    arguments = argparse.Namespace(model="DiT-XL/2", global_seed=0)
    adam = {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 1e-4}]}
    trained = {"model": stale, "ema": theirs, "opt": adam, "args": arguments}
    for content in (theirs, trained):
        torch.save(content, path)
        read = formats.read(str(path), "dit", config=config, first_stage=folder)
        weights = {name: tensor.numpy() for name, tensor in theirs.items()}
        expected = original_dit.params_from_original(weights, read.diffusion.denoiser)
        tiny.assert_equal(read.params, expected)
        tiny.assert_equal(read.frozen["autoencoder"], autoencoder)
        assert read.frozen["scale"] == np.float32(0.3)

    for options, message in (
        ({"first_stage": folder}, "width 16 and 2 blocks are of no published size"),
        ({"config": tiny.kl()}, "the config must have the model.kind 'dit'"),
        ({"config": config}, "config.first_stage.weights is nowhere: put there a diffusers"),
        ({"name": "xl", "first_stage": folder}, "give no model or tokenizer"),
    ):
        with pytest.raises(UserError, match=message) as error:
            formats.read(str(path), "dit", **options)
        assert "\n" not in str(error.value)
    flow = config.copy_and_resolve_references().unlock()
    flow.process = section(FlowProcess, kind="flow", time_scale=1.0)
    flow.model.update(time_scale=-1.0, time_shift=1.0)
    flow.sampling = section(FlowSampling, guidance=4.0)
    read = formats.read(str(path), "sit", config=flow, first_stage=folder)
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype("f4")
    t, label = np.array([0.2, 0.9], "f4"), np.array([7, 999])
    with torch.no_grad():  # SiT's time is 1 - t, and its velocity, data - noise, is -v
        velocity = module(to_torch(x), torch.tensor(1 - t), torch.tensor(label))[:, :4]
    got = tiny.apply(read, x, t, label=jnp.array(label))
    np.testing.assert_allclose(got, -velocity.permute(0, 2, 3, 1), atol=1e-4)
    with pytest.raises(UserError, match="is a GaussianProcess; that of sit is a FlowProcess"):
        formats.read(str(path), "sit", config=config, first_stage=folder)
    with pytest.raises(UserError, match=r"config.model has .*; in sit it has .*'time_shift': 1.0"):
        flow.model.time_shift = 0.0
        formats.read(str(path), "sit", config=flow, first_stage=folder)
    torch.save(theirs | {"stray": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"stray \(2,\) is left over"):
        formats.read(str(path), "dit", config=config, first_stage=folder)
    with pytest.raises(UserError, match=r"^first_stage is there: models of ldm have their own"):
        formats.read(str(path), "ldm", first_stage="there")


@pytest.mark.parametrize(("side", "image_size"), [(16, 256), (32, 512)])
def test_published_sizes_of_dit(side, image_size):
    with torch.device("meta"):
        theirs = TorchDiT(1152, 28, 16, 2, 4, 1000, side).state_dict()
    shapes = {name: np.broadcast_to(np.float32(0), t.shape) for name, t in theirs.items()}
    assert sum(t.size for t in shapes.values()) - side**2 * 1152 == 674_834_720
    config = dit.published(shapes, "dit")
    model = tiny.make_experiment(dit.with_first_stage(config, "weights/kl-f8")).task.model
    assert model.point_shape == (image_size // 8, image_size // 8, 4)
    params, _ = jax.eval_shape(model.init, 0)
    variance = 4 * 4 * (1152 + 1)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 674_834_720 - variance
    with pytest.raises(UserError, match="first_stage is missing, since the file holds no first"):
        dit.with_first_stage(config, None)


def vq_diffusion_checkpoint(model, params, others=(), statistics=()):
    """What VQ-Diffusion's trainer writes: weights of transformer and codec, and the average."""
    diffusion = model.diffusion
    transformer = originals.to_original(params, diffusion.denoiser.clone(learned_null=False))
    codec = originals.to_original(model.frozen["autoencoder"], diffusion.first_stage.model)
    codec |= {f"quantize.{k}": v for k, v in dict(statistics).items()}
    encoding = ("encoder.", "quant_conv.", "quantize.")
    decoding = ("decoder.", "post_quant_conv.", "quantize.")
    log_kept = np.log(np.append(diffusion.process.alpha_bars, 1)).astype("f4")
    averaged = {f"transformer.{k}": v for k, v in transformer.items()} | {
        "log_cumprod_at": log_kept
    }
    averaged |= dict(others)
    return {
        "model": as_torch(
            {f"content_codec.enc.{k}": v for k, v in codec.items() if k.startswith(encoding)}
            | {f"content_codec.dec.{k}": v for k, v in codec.items() if k.startswith(decoding)}
            | {f"transformer.{k}": v + 1 for k, v in averaged.items()}
            | {"transformer.empty_text_embed": np.zeros((77, 512))}
        ),
        "ema": as_torch(averaged),
        "last_iter": 12,
    }


def test_a_checkpoint_of_vq_diffusion(tmp_path):
    config = tiny.tokens().unlock()
    with config.first_stage.ignore_type():
        config.first_stage.used_codes = None
    model, path = tiny.pretrained(config.lock()), tmp_path / "model.pth"
    codes = np.arange(11, dtype=np.int32)
    content = vq_diffusion_checkpoint(model, model.params)
    torch.save(content, path)
    read = formats.read(str(path), "vq-diffusion", config=config)
    tiny.assert_equal(read.params, model.params)
    tiny.assert_equal(read.frozen, {"autoencoder": model.frozen["autoencoder"], "codes": codes})
    assert read.step == 12
    whole = content["ema"]
    for changes, message in (
        ({"log_cumprod_at": whole["log_cumprod_at"][1:]}, "log_cumprod_at has 4 times"),
        ({"transformer.stray": torch.zeros(2)}, r"stray \(2,\) is left over"),
        ({"stray": torch.zeros(2)}, r"ema: nothing reads the tensors stray \(2,\)"),
    ):
        torch.save(content | {"ema": whole | changes}, path)
        with pytest.raises(UserError, match=message):
            formats.read(str(path), "vq-diffusion", config=config)
    del whole["transformer.to_logits.1.bias"]  # the average must be whole
    torch.save(content, path)
    with pytest.raises(UserError, match=r"to_logits.1.bias \(11,\) is missing"):
        formats.read(str(path), "vq-diffusion", config=config)


def halved(tree, dtype):
    """The same with all floats of half precision."""
    if isinstance(tree, dict):
        return {name: halved(value, dtype) for name, value in tree.items()}
    floating = isinstance(tree, torch.Tensor) and tree.is_floating_point()
    return tree.to(dtype) if floating else tree


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_checkpoints_of_half_precision(dtype, tmp_path):
    """Tables are then compared by the digits that they have, and others are still refused."""
    model, path = tiny.pretrained(tiny.kl()), tmp_path / "model.ckpt"
    content = halved(ldm_checkpoint(model), dtype)
    torch.save(content, path)
    found = formats.read(str(path), "ldm", config=model.config)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-7),
        found.params,
        model.params,
    )
    betas = torch.linspace(0.0103, 0.2, 20).to(dtype)
    torch.save(content | {"state_dict": content["state_dict"] | {"betas": betas}}, path)
    with pytest.raises(UserError, match="the config's are scaled_linear"):
        formats.read(str(path), "ldm", config=model.config)

    config = tiny.tokens().unlock()
    with config.first_stage.ignore_type():
        config.first_stage.used_codes = None
    discrete = tiny.pretrained(config.lock())
    torch.save(halved(vq_diffusion_checkpoint(discrete, discrete.params), dtype), path)
    assert formats.read(str(path), "vq-diffusion", config=config).step == 12


def test_names_with_a_common_prefix(tmp_path):
    wrapper = "module.model."  # of two trainers, one inside the other
    model, path = tiny.pretrained(tiny.kl()), tmp_path / "model.ckpt"
    content = ldm_checkpoint(model)
    wrapped = {wrapper + name: tensor for name, tensor in content["state_dict"].items()}
    torch.save({"state_dict": wrapped}, path)
    read = formats.read(str(path), "ldm", config=model.config)
    tiny.assert_equal(read.params, model.params)

    pixels = tiny.pretrained(tiny.pixels())
    weights = originals.to_original(pixels.params, pixels.diffusion.denoiser)
    torch.save(as_torch({wrapper + name: tensor for name, tensor in weights.items()}), path)
    tiny.assert_equal(formats.read(str(path), "adm", config=pixels.config).params, pixels.params)


def test_other_entries_of_published_files_are_ignored_or_refused(tmp_path):
    """Plain values beside the tensors; the average alone; nothing where tensors should be."""
    model, path = tiny.pretrained(tiny.kl()), tmp_path / "model.ckpt"
    content = ldm_checkpoint(model)
    tensors = content["state_dict"]
    average = {k: v for k, v in tensors.items() if not k.startswith("model.diffusion_model.")}
    for state_dict in (
        tensors | {"epoch": 3, "name": "kl", "best": None},
        average,
        tensors | {"scale_factor": 0.25},  # a plain number
    ):
        for whole in ({"state_dict": state_dict}, state_dict):
            torch.save(whole, path)
            read = formats.read(str(path), "ldm", config=model.config)
            tiny.assert_equal(read.params, model.params)
            assert read.frozen["scale"] == np.float32(0.25)

    for whole, message in (
        ({"state_dict": None}, "state_dict is None, not a dict of tensors"),
        ({"state_dict": {"epoch": 3}}, "there are no tensors in it"),
        ({"state_dict": tensors | {"other": [1, 2]}}, "other is a list, not a tensor"),
        ({"state_dict": average | {"model_ema.decay2": torch.ones(1)}}, "model_ema.decay2"),
        ({"state_dict": tensors | {"scale_factor": torch.ones(2)}}, "scale_factor holds 2 numbers"),
    ):
        torch.save(whole, path)
        with pytest.raises(UserError, match=message) as error:
            formats.read(str(path), "ldm", config=model.config)
        assert "\n" not in str(error.value)
    for content, message in (({"model": None}, "model is None"), ({"ema": {}}, "no 'model' in it")):
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            formats.read(str(path), "vq-diffusion", config=tiny.tokens())


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path):
    path, trace = tmp_path / "model.ckpt", tmp_path / "executed"
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "callbacks": Malicious(trace)}, path)
    with pytest.raises(UserError, match=r"refused, .*open") as error:
        tensor_files.read(path)
    assert "\n" not in str(error.value)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # what it would have done
    assert trace.exists()


def test_the_class_that_published_checkpoints_name_stays_inert(tmp_path, monkeypatch):
    """Lightning's state is keyed by a class that need not be there."""
    import sys
    import types

    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    with monkeypatch.context() as patch:
        for part in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, part, types.ModuleType(part))
        patch.setitem(sys.modules, name, module)
        torch.save(
            {
                "state_dict": {"w": torch.ones(2)},
                "callbacks": {module.ModelCheckpoint: {"epoch": 1}},
            },
            tmp_path / "model.ckpt",
        )
    content = tensor_files.read(tmp_path / "model.ckpt")
    np.testing.assert_array_equal(content["state_dict"]["w"], [1, 1])


def test_without_torch_the_message_says_what_to_do(tmp_path, monkeypatch):
    import sys

    path = tmp_path / "model.ckpt"
    torch.save({"w": torch.ones(2)}, path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="torch is not installed: pip install torch"):
        tensor_files.read(path)


@pytest.mark.parametrize(
    ("family", "name"), [(f, n) for f, models in published.MODELS.items() for n in models]
)
def test_published_configs_build(family, name):
    config = published.config(family, name)
    model = tiny.make_experiment(config).task.model
    model.check_sampling(model.sampling)
    assert config.dtype == "float32"


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # Published with twice the channels of the last convolution: 3 * 9 * channels + 3 less here.
        ("imagenet_64", 295_904_454 - (3 * 9 * 192 + 3)),
        ("imagenet_256", 553_838_086 - (3 * 9 * 256 + 3)),
        ("imagenet_256_uncond", 552_814_086 - (3 * 9 * 256 + 3)),
    ],
)
def test_published_sizes_of_adm(name, count):
    unet = tiny.make_experiment(published.config("adm", name)).task.model.denoiser
    shapes = model_shapes.of_unet(unet, 3)
    assert sum(math.prod(shape) for shape in shapes.values()) == count


def test_published_sizes_of_models_with_text():
    unet = tiny.make_experiment(published.config("ldm", "text2img")).task.model.denoiser
    count = sum(math.prod(shape) for shape in model_shapes.of_unet(unet, 4).values())
    assert count == 872_300_484
    transformer = tiny.make_experiment(published.config("vq-diffusion", "ithq")).task.model.denoiser
    count = sum(math.prod(shape) for shape in model_shapes.of_transformer(transformer).values())
    assert count == 1_359_274_624


def test_presets_are_the_published_ones():
    assert published.config("ldm", "celebahq").model == presets.ldm_4("x").model
    with pytest.raises(UserError, match="choose one of celebahq"):
        published.config("ldm", "cats")
