"""UNet parameters to and from the names and layouts of diffusers, as pure maps between trees.

Fits `UNet2DModel` and, where the model has `text_dim`, `UNet2DConditionModel`. One table of names
serves both directions. Layouts are those of `tensors.py`, and

    GEGLU            theirs [2 x hidden, in]     ours two dense layers, "in" and "gate"

In diffusers' configs `attention_head_dim` is the channels per head of `UNet2DModel`, but the number
of heads of `UNet2DConditionModel`; and with `resnet_time_scale_shift="scale_shift"` the middle
attention has its norm only if `attn_norm_num_groups=32` is given.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from conprediff_jax.interop import diffusers_blocks, tensors
from conprediff_jax.models.unet import UNet

_BLOCKS = ((r"transformer_(\d+)/", r"transformer_blocks.\1."),)

# Our layers -> theirs, within a block, besides those of every network of diffusers.
_LAYERS = diffusers_blocks.LAYERS | {
    "time_embedding_in": "time_embedding.linear_1",
    "time_embedding_out": "time_embedding.linear_2",
    "label_embedding": "class_embedding",
    # Residual blocks.
    "time": "time_emb_proj",
    # Spatial transformers.
    "project_in": "proj_in",
    "project_out": "proj_out",
    "self_norm": "norm1",
    "self_attention/query": "attn1.to_q",
    "self_attention/key": "attn1.to_k",
    "self_attention/value": "attn1.to_v",
    "self_attention/out": "attn1.to_out.0",
    "cross_norm": "norm2",
    "cross_attention/query": "attn2.to_q",
    "cross_attention/key": "attn2.to_k",
    "cross_attention/value": "attn2.to_v",
    "cross_attention/out": "attn2.to_out.0",
    "feed_forward_norm": "norm3",
    "feed_forward/in": "ff.net.0.proj",
    "feed_forward/gate": "ff.net.0.proj",
    "feed_forward/out": "ff.net.2",
}

_POINTWISE = ("shortcut", "project_in", "project_out")  # 1x1 convolutions there


def params_from_diffusers(state_dict: Mapping[str, np.ndarray], unet: UNet) -> dict:
    """The parameters of `unet` out of a diffusers state dict.

    Args:
        state_dict: Tensors by diffusers' names, current ones or those from before 0.12.
        unet: The model the weights are for.

    Returns:
        The tree under "params", float32 NumPy arrays.

    Raises:
        ValueError: If a tensor is missing, left over or of another shape than the model's.
    """
    theirs = diffusers_blocks.with_current_names(state_dict)
    in_channels = np.shape(theirs.get("conv_in.weight", np.empty((0, 1))))[1]
    return _table(unet, in_channels).read(theirs)


def params_to_diffusers(params: Mapping, unet: UNet) -> dict[str, np.ndarray]:
    """The diffusers state dict of the parameters of `unet`.

    Args:
        params: The tree under "params".
        unet: The model the parameters are of.

    Returns:
        Contiguous float32 arrays by diffusers' names.

    Raises:
        ValueError: If a parameter is missing, left over or of another shape than the model's.
    """
    input_conv = params.get("input_conv", {}).get("kernel", np.empty((0, 0, 1)))
    return _table(unet, np.shape(input_conv)[2]).write(params)


def _table(unet: UNet, in_channels: int) -> tensors.Table:
    """Where diffusers keeps the parameters of a UNet for images of so many channels."""
    size = unet.downsampling
    inputs = {
        "x": jnp.zeros((1, size, size, in_channels)),
        "t": jnp.zeros((1,)),
        "label": None if unet.num_classes is None else jnp.zeros((1,), jnp.int32),
        "text": None if unet.text_dim is None else jnp.zeros((1, 1, unet.text_dim)),
    }
    tree = jax.eval_shape(unet.init, jax.random.key(0), **inputs)["params"]
    shapes = tensors.parameter_shapes(tree)
    layers = _LAYERS if unet.text_dim is None else _LAYERS | {"norm": "norm"}
    names = {
        path: diffusers_blocks.their_name(
            path, levels=len(unet.channel_mult), layers=layers, blocks=_BLOCKS
        )
        for path in sorted(shapes, key=lambda path: "gate" in path)  # "in" comes before "gate"
    }
    return tensors.Table(model="UNet", shapes=shapes, names=names, pointwise=_POINTWISE)
