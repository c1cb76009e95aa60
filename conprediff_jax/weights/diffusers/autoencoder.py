"""Maps between diffusers' autoencoders and ours: names and layouts of parameters, and configs.

They fit `VQModel` and `AutoencoderKL`. One table of names serves both directions. The layouts are
those of `tensors.py`.

In diffusers' configs, `block_out_channels` are our `channels` times `channel_mult`, `vq_embed_dim`
is our `embed_dim`, and the blocks called `AttnDownEncoderBlock2D` and `AttnUpDecoderBlock2D` have
attention. `scaling_factor` is the `scale` of our latents, by which pipelines divide before they
decode. The published VQ-f4 has a scale of 1, although diffusers' default is 0.18215.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from conprediff_jax.models.autoencoder import AutoencoderKL, VQModel
from conprediff_jax.models.layers import GROUPS
from conprediff_jax.weights import model_shapes, tensors
from conprediff_jax.weights.diffusers import blocks as diffusers_blocks
from conprediff_jax.weights.diffusers.options import DiffusersError, Options, multiples

_BLOCKS = ((r"^(encoder|decoder)/", r"\1."),)

# Our layers -> theirs, in a block. `LAYERS` has those that all of diffusers' networks share.
_LAYERS = diffusers_blocks.LAYERS | {
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    "quantizer": "quantize.embedding",
}

_POINTWISE = ("shortcut", "quant_conv", "post_quant_conv")  # 1x1 convolutions in diffusers


def params_from_diffusers(
    state_dict: Mapping[str, np.ndarray], autoencoder: VQModel | AutoencoderKL
) -> dict:
    """Reads the parameters of an autoencoder from diffusers' state dict.

    Args:
        state_dict: The tensors by diffusers' names, either today's or those before 0.12.
        autoencoder: The autoencoder.

    Returns:
        The tree under "params", with float32 NumPy arrays.

    Raises:
        ValueError: A tensor is missing, left over, or does not have the autoencoder's shape.
    """
    theirs = diffusers_blocks.with_current_names(state_dict)
    in_channels = np.shape(theirs.get("encoder.conv_in.weight", np.empty((0, 1))))[1]
    return _table(autoencoder, in_channels).read(theirs)


def params_to_diffusers(
    params: Mapping, autoencoder: VQModel | AutoencoderKL
) -> dict[str, np.ndarray]:
    """Writes the parameters of an autoencoder as diffusers' state dict.

    Args:
        params: The tree under "params".
        autoencoder: The autoencoder.

    Returns:
        Contiguous float32 arrays by diffusers' names.

    Raises:
        ValueError: A parameter is missing, left over, or does not have the autoencoder's shape.
    """
    input_conv = params.get("encoder", {}).get("input_conv", {}).get("kernel", np.empty((0, 0, 1)))
    return _table(autoencoder, np.shape(input_conv)[2]).write(params)


def _table(autoencoder: VQModel | AutoencoderKL, in_channels: int) -> tensors.Table:
    """The table of an autoencoder's parameters in diffusers, for `in_channels` input channels."""
    shapes = model_shapes.of_autoencoder(autoencoder, in_channels)
    levels = len(autoencoder.channel_mult)
    names = {
        path: diffusers_blocks.their_name(path, levels=levels, layers=_LAYERS, blocks=_BLOCKS)
        for path in shapes
    }
    model = type(autoencoder).__name__
    return tensors.Table(model=model, shapes=shapes, names=names, pointwise=_POINTWISE)


def config_to_diffusers(
    model: VQModel | AutoencoderKL, scale: float, image_size: int
) -> dict[str, Any]:
    """The config of diffusers' `VQModel` or `AutoencoderKL`.

    Args:
        model: The autoencoder.
        scale: The factor by which latents are multiplied. It is always written, as
            `scaling_factor`, since diffusers' default is not 1.
        image_size: The side of the images in pixels.

    Raises:
        DiffusersError: diffusers has no such autoencoder.
    """
    if model.patch != 1:
        raise DiffusersError(
            f"the autoencoder reads patches of {model.patch} x {model.patch} pixels, and those of "
            "diffusers do not: train one with patch 1"
        )
    levels = range(len(model.channel_mult))
    attended = ["Attn" * (2**level in model.attention_downsampling) for level in levels]
    config = {
        "_class_name": type(model).__name__,
        "sample_size": image_size,
        "in_channels": model.out_channels,
        "out_channels": model.out_channels,
        "block_out_channels": [model.channels * mult for mult in model.channel_mult],
        "layers_per_block": model.blocks_per_level,
        "down_block_types": [f"{a}DownEncoderBlock2D" for a in attended],
        "up_block_types": [f"{a}UpDecoderBlock2D" for a in reversed(attended)],
        "latent_channels": model.latent_channels,
        "mid_block_add_attention": model.middle_attention,
        "norm_num_groups": GROUPS,
        "act_fn": "silu",
        "scaling_factor": scale,
        "force_upcast": False,
    }
    if isinstance(model, VQModel):
        return config | {"num_vq_embeddings": model.num_codes, "vq_embed_dim": model.latent_dim}
    if model.latent_dim != model.latent_channels:
        raise DiffusersError(
            f"embed_dim is {model.latent_dim} and latent_channels {model.latent_channels}: they "
            "are equal in diffusers' AutoencoderKL"
        )
    return config


def fields_from_diffusers(
    config: Mapping[str, Any], where: str
) -> tuple[type[VQModel | AutoencoderKL], dict[str, Any], float]:
    """The class and fields of an autoencoder, and the scale of its latents.

    A `VQModel` without a `scaling_factor` is older than this option, and has a scale of 1. The
    default that diffusers would take is the one of `AutoencoderKL`.

    Args:
        config: The content of `config.json`.
        where: The name of the config in errors.

    Raises:
        DiffusersError: There is no such autoencoder here; the message names the option.
    """
    families = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}
    family = families.get(config.get("_class_name"))
    if family is None:
        raise DiffusersError(
            f"{where}: holds a {config.get('_class_name')}; {' and '.join(families)} are read"
        )
    options = Options(config, where)
    channels, mult = multiples(options.take("block_out_channels", (64,)), where)
    down = options.take("down_block_types", ("DownEncoderBlock2D",))
    up = options.take("up_block_types", ("UpDecoderBlock2D",))
    attended = [kind == "AttnDownEncoderBlock2D" for kind in down]
    mirrored = [f"{'Attn' * a}UpDecoderBlock2D" for a in reversed(attended)]
    plain = {"DownEncoderBlock2D", "AttnDownEncoderBlock2D"}
    if not set(down) <= plain or list(up) != mirrored or len(down) != len(mult):
        raise DiffusersError(
            f"{where}: blocks {down} and {up}; here they are (Attn)DownEncoderBlock2D, mirrored by "
            "(Attn)UpDecoderBlock2D"
        )
    fields = {
        "channels": channels,
        "channel_mult": mult,
        "out_channels": options.take("out_channels", 3),
        "blocks_per_level": options.take("layers_per_block", 1),
        "attention_downsampling": tuple(2**i for i, has in enumerate(attended) if has),
        "middle_attention": options.take("mid_block_add_attention", True),
        "latent_channels": options.take("latent_channels", 3 if family is VQModel else 4),
    }
    if family is VQModel:
        fields["num_codes"] = options.take("num_vq_embeddings", 256)
        fields["embed_dim"] = options.take("vq_embed_dim", None, int)
        options.expect(norm_type="group", lookup_from_codebook=False)
        scale = options.take("scaling_factor", 1.0)
        if "scaling_factor" not in config:
            logging.warning("%s: there is no scaling_factor, so it is taken to be 1", where)
    else:
        options.expect(use_quant_conv=True, use_post_quant_conv=True, shift_factor=None)
        options.expect(latents_mean=None, latents_std=None)
        scale = options.take("scaling_factor", 0.18215)
    options.expect(norm_num_groups=GROUPS, in_channels=fields["out_channels"])
    options.activation()
    options.ignore("sample_size", "force_upcast")
    options.finish()
    return family, fields, float(scale)
