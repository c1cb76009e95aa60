"""Autoencoders to and from diffusers: names and layouts of parameters, and `config.json`.

Fits `VQModel` and `AutoencoderKL`. One table of names serves both directions; layouts are those of
`tensors.py`.

In diffusers' configs, `block_out_channels` are our `channels` times `channel_mult`, `vq_embed_dim`
is our `embed_dim`, and attention is in the blocks called `AttnDownEncoderBlock2D` and
`AttnUpDecoderBlock2D`. `scaling_factor` is the `scale` of our latents: pipelines divide by it
before they decode. It is 1 with the published VQ-f4, where diffusers' default is 0.18215.
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

# Our layers -> theirs, within a block, besides those of every network of diffusers.
_LAYERS = diffusers_blocks.LAYERS | {
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    "quantizer": "quantize.embedding",
}

_POINTWISE = ("shortcut", "quant_conv", "post_quant_conv")  # 1x1 convolutions there


def params_from_diffusers(
    state_dict: Mapping[str, np.ndarray], autoencoder: VQModel | AutoencoderKL
) -> dict:
    """The parameters of `autoencoder` out of a diffusers state dict.

    Args:
        state_dict: Tensors by diffusers' names, current ones or those from before 0.12.
        autoencoder: The model the weights are for.

    Returns:
        The tree under "params", float32 NumPy arrays.

    Raises:
        ValueError: If a tensor is missing, left over or of another shape than the model's.
    """
    theirs = diffusers_blocks.with_current_names(state_dict)
    in_channels = np.shape(theirs.get("encoder.conv_in.weight", np.empty((0, 1))))[1]
    return _table(autoencoder, in_channels).read(theirs)


def params_to_diffusers(
    params: Mapping, autoencoder: VQModel | AutoencoderKL
) -> dict[str, np.ndarray]:
    """The diffusers state dict of the parameters of `autoencoder`.

    Args:
        params: The tree under "params".
        autoencoder: The model the parameters are of.

    Returns:
        Contiguous float32 arrays by diffusers' names.

    Raises:
        ValueError: If a parameter is missing, left over or of another shape than the model's.
    """
    input_conv = params.get("encoder", {}).get("input_conv", {}).get("kernel", np.empty((0, 0, 1)))
    return _table(autoencoder, np.shape(input_conv)[2]).write(params)


def _table(autoencoder: VQModel | AutoencoderKL, in_channels: int) -> tensors.Table:
    """Where diffusers keeps the parameters of an autoencoder for images of so many channels."""
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
    """The config of a `VQModel` or `AutoencoderKL`.

    Args:
        model: The autoencoder.
        scale: What latents are multiplied by: `scaling_factor`, always written, since its default
            is not 1.
        image_size: Of the images.

    Raises:
        DiffusersError: diffusers has no such autoencoder.
    """
    if model.patch != 1:
        raise DiffusersError(f"the autoencoder has patches of {model.patch}: diffusers has none")
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
    """Class and fields of an autoencoder, and the scale of its latents.

    A `VQModel` that names no `scaling_factor` is from before there was one, and has 1; the default
    that diffusers would put in its place is the `AutoencoderKL`'s.

    Args:
        config: What its `config.json` holds.
        where: What to call it in errors.

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
            logging.warning("%s: names no scaling_factor; it is taken to be 1", where)
    else:
        options.expect(use_quant_conv=True, use_post_quant_conv=True, shift_factor=None)
        options.expect(latents_mean=None, latents_std=None)
        scale = options.take("scaling_factor", 0.18215)
    options.expect(norm_num_groups=GROUPS, in_channels=fields["out_channels"])
    options.activation()
    options.ignore("sample_size", "force_upcast")
    options.finish()
    return family, fields, float(scale)
