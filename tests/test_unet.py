"""Tests of the UNet against published sizes and diffusers, and of its properties."""

import functools
import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from conprediff_jax.models import layers
from conprediff_jax.models.denoiser import Denoised
from conprediff_jax.models.unet import UNet
from conprediff_jax.weights.diffusers.unet import params_from_diffusers, params_to_diffusers

TINY = {"out_channels": 3, "channels": 32, "channel_mult": (1,), "blocks_per_level": 1}


@pytest.mark.parametrize(
    ("count", "in_channels", "options"),
    [
        pytest.param(
            274_056_163,
            3,
            {
                "channels": 224,
                "channel_mult": (1, 2, 3, 4),
                "attention_downsampling": (2, 4, 8),
                "head_channels": 32,
            },
            id="celebahq",
        ),
        pytest.param(
            872_300_484,
            4,
            {
                "channels": 320,
                "channel_mult": (1, 2, 4, 4),
                "attention_downsampling": (1, 2, 4),
                "num_heads": 8,
                "text_dim": 1280,
            },
            id="text-to-image",
        ),
        pytest.param(
            294_966_916,
            4,
            {
                "channels": 192,
                "channel_mult": (1, 2, 2, 4, 4),
                "attention_downsampling": (1, 2, 4, 8),
                "num_heads": 8,
                "scale_shift_norm": True,
                "resblock_updown": True,
            },
            id="churches",
        ),
    ],
)
def test_published_parameter_counts(count, in_channels, options):
    unet = UNet(out_channels=in_channels, **options)
    x = jnp.zeros((1, unet.downsampling, unet.downsampling, in_channels))
    text = None if unet.text_dim is None else jnp.zeros((1, 77, unet.text_dim))
    variables = jax.eval_shape(unet.init, jax.random.key(0), x, jnp.zeros(1), text=text)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables)) == count


def latent_diffusion():
    """Channels per head, attention at the lower resolution, convolutions between levels."""
    theirs = diffusers.UNet2DModel(
        in_channels=5,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
    )
    ours = UNet(
        out_channels=3,
        channels=32,
        channel_mult=(1, 2),
        blocks_per_level=2,
        attention_downsampling=(2,),
        head_channels=16,
    )
    return theirs, ours


def guided_diffusion():
    """Labels, scale and shift, attention at the full resolution, residual resampling."""
    theirs = diffusers.UNet2DModel(
        in_channels=5,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=32,
        attention_head_dim=8,
        num_class_embeds=7,
    )
    ours = UNet(
        out_channels=3,
        channels=32,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_downsampling=(1,),
        head_channels=8,
        scale_shift_norm=True,
        resblock_updown=True,
        num_classes=7,
    )
    return theirs, ours


def text_to_image():
    """Spatial transformers of two blocks. Here `attention_head_dim` is the number of heads."""
    theirs = diffusers.UNet2DConditionModel(
        in_channels=5,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        transformer_layers_per_block=2,
    )
    ours = UNet(
        out_channels=3,
        channels=32,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_downsampling=(1,),
        num_heads=4,
        text_dim=24,
        transformer_depth=2,
    )
    return theirs, ours


def random_state_dict(model):
    """Moves every weight, also those of norms, off its initial value, and returns all weights."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.03 * torch.randn(weight.shape, generator=generator)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("models", [latent_diffusion, guided_diffusion, text_to_image])
def test_matches_diffusers(models):
    theirs, ours = models()
    state_dict = random_state_dict(theirs)
    params = params_from_diffusers(state_dict, ours)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 12, 5)).astype(np.float32)
    t = np.array([3, 977])
    label = None if ours.num_classes is None else np.array([6, 1])
    text = None if ours.text_dim is None else rng.normal(size=(2, 9, 24)).astype(np.float32)

    condition = {"class_labels": None if label is None else torch.from_numpy(label)}
    if text is not None:
        condition["encoder_hidden_states"] = torch.from_numpy(text)
    lowest = len(ours.channel_mult) - 1
    ups = [f"up_{level}_in" for level in reversed(range(lowest))]
    tapped = dict(zip(["middle", *ups, "up_0"], [theirs.mid_block, *theirs.up_blocks], strict=True))
    features = {}
    for name, module in {"output": theirs.conv_act, **tapped}.items():
        module.register_forward_hook(lambda *call, name=name: features.update({name: call[-1]}))
    with torch.no_grad():
        x_torch = torch.from_numpy(x).permute(0, 3, 1, 2)
        output = theirs(x_torch, torch.from_numpy(t), **condition).sample
    features = {name: a.permute(0, 2, 3, 1).numpy() for name, a in features.items()}
    output = output.permute(0, 2, 3, 1).numpy()
    expected = Denoised(output, features.pop("output"), features)

    apply = jax.jit(functools.partial(ours.apply, taps=tuple(features)))
    got = apply({"params": params}, x, t, label=label, text=text)
    for ours_array, theirs_array in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        # Float32 noise: diffusers itself is this far from its float64 result.
        tolerance = 3e-6 * np.abs(theirs_array).max()
        np.testing.assert_allclose(ours_array, theirs_array, rtol=0, atol=tolerance)

    back = params_to_diffusers(params, ours)
    assert back.keys() == state_dict.keys()
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, state_dict[name], err_msg=name)
        assert tensor.flags.c_contiguous


def test_reads_the_attention_names_of_old_files():
    theirs, ours = latent_diffusion()
    state_dict = random_state_dict(theirs)
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in state_dict.items():
        for new_part, old_part in old_names.items():
            name = name.replace(f".{new_part}.", f".{old_part}.")
        old[name] = tensor
    assert old.keys() != state_dict.keys()
    jax.tree.map(
        np.testing.assert_array_equal,
        params_from_diffusers(old, ours),
        params_from_diffusers(state_dict, ours),
    )


def test_accounts_for_every_tensor():
    theirs, ours = latent_diffusion()
    state_dict = random_state_dict(theirs)
    params = params_from_diffusers(state_dict, ours)
    without = {name: tensor for name, tensor in state_dict.items() if name != "conv_out.bias"}
    with pytest.raises(ValueError, match=r"conv_out.bias \(3,\) is missing"):
        params_from_diffusers(without, ours)
    with pytest.raises(ValueError, match=r"extra \(2,\) is left over"):
        params_from_diffusers(state_dict | {"extra": np.zeros(2)}, ours)
    with pytest.raises(ValueError, match=r"conv_out.bias is \(4,\), not \(3,\)"):
        params_from_diffusers(state_dict | {"conv_out.bias": np.zeros(4)}, ours)
    with pytest.raises(ValueError, match=r"conv_in.weight .* is missing"):
        params_from_diffusers({}, ours)
    with pytest.raises(ValueError, match=r"label_embedding/embedding \(7, 128\) is left over"):
        params_to_diffusers(params | {"label_embedding": {"embedding": np.zeros((7, 128))}}, ours)


def test_timestep_embedding_matches_diffusers():
    t = np.array([0.0, 0.5, 17.25, 999.0], np.float32)
    got = layers.timestep_embedding(jnp.array(t), 64)
    expected = get_timestep_embedding(
        torch.from_numpy(t), 64, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    # At t = 999 one rounding of a frequency is 6e-5 radians.
    np.testing.assert_allclose(got, expected, atol=1e-4)
    np.testing.assert_allclose(got[:3], expected[:3], atol=2e-6)


def initialised(**options):
    """A tiny UNet with all parameters random, and its inputs."""
    unet = UNet(**(TINY | {"num_heads": 4, "attention_downsampling": (1,)} | options))
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    t = jnp.array([1, 50])
    params = jax.eval_shape(unet.init, jax.random.key(1), x, t)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype("f4"), params)
    return unet, params, x, t


@pytest.mark.parametrize(
    ("block", "conditions"),
    [
        (layers.ResidualBlock(32), [(2, 128)]),
        (layers.SelfAttentionBlock(4), []),
        (layers.SpatialTransformer(4), [(2, 3, 5)]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_blocks_start_as_the_identity(block, conditions):
    h = jax.random.normal(jax.random.key(2), (2, 4, 4, 32))
    initialise = jax.jit(block.init_with_output)
    output, _ = initialise(jax.random.key(3), h, *(jnp.ones(shape) for shape in conditions))
    np.testing.assert_array_equal(output, h)


def test_output_starts_at_zero():
    unet, _, x, t = initialised()
    initialise = jax.jit(lambda: unet.init(jax.random.key(0), x, t)["params"]["output_conv"])
    assert not any(leaf.any() for leaf in jax.tree.leaves(initialise()))


def test_bfloat16_activations():
    unet, params, x, t = initialised()
    half = unet.clone(dtype=jnp.bfloat16)
    exact = jax.jit(unet.apply)(params, x, t).output
    output, features, _ = jax.jit(half.apply)(params, x, t)
    assert (output.dtype, features.dtype) == (jnp.float32, jnp.bfloat16)
    assert jnp.linalg.norm(output - exact) < 0.03 * jnp.linalg.norm(exact)
    dtypes = jax.tree.map(
        lambda leaf: leaf.dtype, jax.eval_shape(half.init, jax.random.key(1), x, t)
    )
    assert set(jax.tree.leaves(dtypes)) == {jnp.dtype("float32")}


def test_remat_changes_nothing():
    unet, params, x, t = initialised(dropout=0.3)

    @jax.jit
    def gradients(params):
        def loss(params, model):
            rngs = {"dropout": jax.random.key(5)}
            return jnp.mean(jnp.square(model.apply(params, x, t, train=True, rngs=rngs).output))

        others = {"remat": True}, {"remat": True, "remat_policy": "products"}
        return [jax.value_and_grad(loss)(params, unet.clone(**it)) for it in ({}, *others)]

    plain, *others = gradients(params)
    scale = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(plain))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6 * scale)
    for other in others:
        jax.tree.map(close, plain, other)


def test_dropout_acts_in_training_only():
    unet, params, x, t = initialised(dropout=0.5)
    denoise = jax.jit(unet.apply, static_argnames="train")
    plain = unet.clone(dropout=0.0)
    still = denoise(params, x, t).output
    np.testing.assert_array_equal(still, jax.jit(plain.apply)(params, x, t).output)
    first, again, other = (
        denoise(params, x, t, train=True, rngs={"dropout": jax.random.key(seed)}).output
        for seed in [0, 0, 1]
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, still)
    assert not np.allclose(first, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 48}, "multiple of 32"),
        ({"channel_mult": ()}, "multiple of 32"),
        ({"attention_downsampling": (16,)}, r"attention_downsampling=\(16,\): choose among \[1\]"),
        ({"head_channels": 8}, "give exactly one"),
        ({"num_heads": None}, "give exactly one"),
        ({"num_heads": 5}, "num_heads=5 must divide 32"),
        ({"num_heads": 0}, "num_heads=0 must divide 32"),
        ({"blocks_per_level": 0}, "blocks_per_level=0 must be at least 1"),
        ({"num_classes": 0}, "num_classes=0 must be None or at least 1"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
    ],
)
def test_refuses_contradicting_options(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(**(TINY | {"num_heads": 4} | options))


@pytest.mark.parametrize(
    ("options", "shape", "condition", "message"),
    [
        ({"channel_mult": (1, 1)}, (1, 3, 4, 3), {}, "multiples of 2"),
        ({"num_classes": 2}, (1, 4, 4, 3), {}, "label is missing, but the model has num_classes=2"),
        ({}, (1, 4, 4, 3), {"text": jnp.zeros((1, 2, 5))}, "text is given"),
        ({"text_dim": 4}, (1, 4, 4, 3), {"text": jnp.zeros((1, 2, 5))}, "text of 5 channels"),
    ],
)
def test_refuses_inputs_that_do_not_fit(options, shape, condition, message):
    unet = UNet(**(TINY | {"num_heads": 4} | options))
    with pytest.raises(ValueError, match=message):
        unet.init(jax.random.key(0), jnp.zeros(shape), jnp.zeros(shape[0]), **condition)
