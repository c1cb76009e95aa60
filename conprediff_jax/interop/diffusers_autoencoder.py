"""Autoencoder parameters to and from the names and layouts of diffusers, as maps between trees.

Fits `VQModel` and `AutoencoderKL`. One table of names serves both directions; layouts are those of
`tensors.py`.

In diffusers' configs, `block_out_channels` are our `channels` times `channel_mult`, `vq_embed_dim`
is our `embed_dim`, and attention is in the blocks called `AttnDownEncoderBlock2D` and
`AttnUpDecoderBlock2D`. `scaling_factor` is not ours: it belongs to the diffusion, which divides by
it before decoding. It is 1.0 with the published VQ-f4, where diffusers' default is 0.18215.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from conprediff_jax.interop import diffusers_blocks, tensors
from conprediff_jax.models.autoencoder import AutoencoderKL, VQModel

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
    size = autoencoder.downsampling
    x = jnp.zeros((1, size, size, in_channels))
    tree = jax.eval_shape(autoencoder.init, jax.random.key(0), x)["params"]
    shapes = tensors.parameter_shapes(tree)
    levels = len(autoencoder.channel_mult)
    names = {
        path: diffusers_blocks.their_name(path, levels=levels, layers=_LAYERS, blocks=_BLOCKS)
        for path in shapes
    }
    model = type(autoencoder).__name__
    return tensors.Table(model=model, shapes=shapes, names=names, pointwise=_POINTWISE)
