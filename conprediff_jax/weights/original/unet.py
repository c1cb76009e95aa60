"""Maps from the UNets of ADM's and latent diffusion's original code to ours.

Both number the blocks of the down path, `input_blocks`, and of the up path, `output_blocks`, in the
order in which they run. With `L` levels and `R` residual blocks in each, our blocks are:

    input_blocks.0.0                       input_conv
    input_blocks.{1 + level (R + 1) + i}   .0 down_{level}_block_{i},  .1 its attention
    input_blocks.{(level + 1) (R + 1)}     .0 down_{level}_resample
    middle_block                           .0 block, .1 attention, .2 block
    output_blocks.{(L - 1 - level) (R + 1) + i}
                                           .0 up_{level}_block_{i},  .1 its attention; the last
                                           one of a level ends with up_{level}_resample

Query, key and value are one convolution, `qkv`. Its channels are interleaved by head, except under
ADM's `use_new_attention_order`, which stacks them. Both orders have the same shape, and only the
one that the model was trained with makes images. The layouts are those of `tensors.py`.

Sources of the names: openai/guided-diffusion and CompVis/latent-diffusion.
"""

import re
from collections.abc import Mapping

import numpy as np

from conprediff_jax.models.unet import UNet
from conprediff_jax.weights import model_shapes, tensors
from conprediff_jax.weights.tensors import Path

# Our modules outside the blocks -> theirs.
_ENDS = {
    "time_embedding_in": "time_embed.0",
    "time_embedding_out": "time_embed.2",
    "label_embedding": "label_emb",
    "input_conv": "input_blocks.0.0",
    "output_norm": "out.0",
    "output_conv": "out.2",
}

# Our layers within a block -> theirs.
_LAYERS = {
    # Residual blocks.
    "norm_in": "in_layers.0",
    "conv_in": "in_layers.2",
    "time": "emb_layers.1",
    "norm_out": "out_layers.0",
    "conv_out": "out_layers.3",
    "shortcut": "skip_connection",
    # Self-attention.
    "norm": "norm",
    "attention/query": "qkv",
    "attention/key": "qkv",
    "attention/value": "qkv",
    "attention/out": "proj_out",
    # Spatial transformers.
    "project_in": "proj_in",
    "project_out": "proj_out",
    "self_norm": "norm1",
    "cross_norm": "norm2",
    "feed_forward_norm": "norm3",
    "feed_forward/in": "ff.net.0.proj",
    "feed_forward/gate": "ff.net.0.proj",
    "feed_forward/out": "ff.net.2",
    **{
        f"{ours}_attention/{part}": f"{theirs}.{name}"
        for ours, theirs in (("self", "attn1"), ("cross", "attn2"))
        for part, name in (
            ("query", "to_q"),
            ("key", "to_k"),
            ("value", "to_v"),
            ("out", "to_out.0"),
        )
    },
}

# Parameters that share a tensor, in the order of their places in it.
_PARTS = ("query", "key", "value", "in", "gate")


def params_from_original(
    state_dict: Mapping[str, np.ndarray], unet: UNet, *, new_attention_order: bool = False
) -> dict:
    """Reads the parameters of a UNet from a state dict of the original code.

    Args:
        state_dict: The tensors by their original names.
        unet: The UNet.
        new_attention_order: ADM's `use_new_attention_order`.

    Returns:
        The tree under "params", with float32 NumPy arrays.

    Raises:
        ValueError: A tensor is missing, left over, or does not have the UNet's shape.
    """
    in_channels = np.shape(state_dict.get("input_blocks.0.0.weight", np.empty((0, 1))))[1]
    return table(unet, in_channels, new_attention_order).read(state_dict)


def tensor_names(unet: UNet) -> set[str]:
    """The original names of all tensors of a UNet."""
    return set(table(unet, unet.out_channels, False).names.values())


def table(unet: UNet, in_channels: int, new_attention_order: bool) -> tensors.Table:
    """The table of a UNet's parameters in the original code, for `in_channels` input channels."""
    shapes = model_shapes.of_unet(unet, in_channels)
    order = sorted(shapes, key=lambda path: _PARTS.index(path[-2]) if path[-2] in _PARTS else 0)
    names = {path: _their_name(path, unet) for path in order}
    text = unet.text_dim is not None
    heads = {}
    if not text and not new_attention_order:
        for path, name in names.items():
            if ".qkv." in name:
                width = shapes[path][-1]
                heads[name] = unet.num_heads or width // unet.head_channels
    return tensors.Table(
        model="UNet",
        shapes=shapes,
        names=names,
        pointwise=("shortcut", "project_in", "project_out"),
        sequence=() if text else ("query", "key", "value", "out"),
        heads=heads,
    )


def _their_name(path: Path, unet: UNet) -> str:
    """The original name of one of our parameters."""
    block, *rest, leaf = path
    ending = "bias" if leaf == "bias" else "weight"
    if block in _ENDS:
        return f"{_ENDS[block]}.{ending}"
    place = _place(block, unet)
    if rest[0] == "conv":  # in a resampling block
        return f"{place}.{'op' if block.startswith('down') else 'conv'}.{ending}"
    if rest[0].startswith("transformer_"):
        place += f".transformer_blocks.{rest.pop(0).removeprefix('transformer_')}"
    return f"{place}.{_LAYERS['/'.join(rest)]}.{ending}"


def _place(block: str, unet: UNet) -> str:
    """The original name of one of our blocks."""
    middle = {"middle_block_0": 0, "middle_attention": 1, "middle_block_1": 2}
    if block in middle:
        return f"middle_block.{middle[block]}"
    direction, level, kind, *index = re.fullmatch(
        r"(down|up)_(\d+)_(block|attention|resample)(?:_(\d+))?", block
    ).groups()
    level, levels, blocks = int(level), len(unet.channel_mult), unet.blocks_per_level
    attended = 2**level in unet.attention_downsampling
    if direction == "down":
        if kind == "resample":
            return f"input_blocks.{(level + 1) * (blocks + 1)}.0"
        return f"input_blocks.{1 + level * (blocks + 1) + int(index[0])}.{int(kind == 'attention')}"
    first = (levels - 1 - level) * (blocks + 1)
    if kind == "resample":
        return f"output_blocks.{first + blocks}.{1 + attended}"
    return f"output_blocks.{first + int(index[0])}.{int(kind == 'attention')}"
