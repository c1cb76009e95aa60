"""UNet parameters to and from the names and layouts of diffusers, as pure maps between trees.

Fits `UNet2DModel` and, where the model has `text_dim`, `UNet2DConditionModel`. One table of names
serves both directions. Layouts:

    convolution      theirs [out, in, h, w]      ours [h, w, in, out]
    dense            theirs [out, in]            ours [in, out]
    1x1 convolution  theirs [out, in, 1, 1]      ours a dense layer, [in, out]
    GEGLU            theirs [2 x hidden, in]     ours two dense layers, "in" and "gate"

In diffusers' configs `attention_head_dim` is the channels per head of `UNet2DModel`, but the number
of heads of `UNet2DConditionModel`; and with `resnet_time_scale_shift="scale_shift"` the middle
attention has its norm only if `attn_norm_num_groups=32` is given.
"""

import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from conprediff_jax.models.unet import UNet

# Our blocks -> theirs. Levels of the up path are counted the other way round, see `_their_name`.
_BLOCKS = (
    (r"^(down|up)_(\d+)_block_(\d+)/", r"\1_blocks.\2.resnets.\3."),
    (r"^(down|up)_(\d+)_attention_(\d+)/", r"\1_blocks.\2.attentions.\3."),
    (r"^(down|up)_(\d+)_resample/", r"\1_blocks.\2.\1samplers.0."),
    (r"^middle_block_(\d+)/", r"mid_block.resnets.\1."),
    (r"^middle_attention/", "mid_block.attentions.0."),
    (r"transformer_(\d+)/", r"transformer_blocks.\1."),
)

# Our layers -> theirs, within a block.
_LAYERS = {
    "input_conv": "conv_in",
    "output_norm": "conv_norm_out",
    "output_conv": "conv_out",
    "time_embedding_in": "time_embedding.linear_1",
    "time_embedding_out": "time_embedding.linear_2",
    "label_embedding": "class_embedding",
    # Residual blocks and resampling.
    "norm_in": "norm1",
    "conv_in": "conv1",
    "time": "time_emb_proj",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "shortcut": "conv_shortcut",
    "conv": "conv",
    # Self-attention blocks.
    "attention/query": "to_q",
    "attention/key": "to_k",
    "attention/value": "to_v",
    "attention/out": "to_out.0",
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

# Self-attention in files written before diffusers 0.12, as the published unconditional ones are.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_Path = tuple[str, ...]


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
    old = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.")
    theirs = {
        old.sub(lambda match: f"{match[1]}.{_OLD_NAMES[match[2]]}.", name): np.asarray(
            tensor, np.float32
        )
        for name, tensor in state_dict.items()
    }
    in_channels = np.shape(theirs.get("conv_in.weight", np.empty((0, 1))))[1]
    shapes = _shapes(unet, in_channels)
    rows = _rows(shapes, unet)
    expected = {name: _their_shape(paths, shapes) for name, paths in rows.items()}
    _check(expected, {name: tensor.shape for name, tensor in theirs.items()})
    params = {}
    for name, paths in rows.items():
        for path, part in zip(paths, np.split(theirs[name], len(paths)), strict=True):
            params[path] = _to_ours(path, part)
    return traverse_util.unflatten_dict(params)


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
    ours = {
        path: np.asarray(leaf, np.float32)
        for path, leaf in traverse_util.flatten_dict(params).items()
    }
    in_channels = np.shape(ours.get(("input_conv", "kernel"), np.empty((0, 0, 1))))[2]
    shapes = _shapes(unet, in_channels)
    _check(
        {"/".join(path): shape for path, shape in shapes.items()},
        {"/".join(path): leaf.shape for path, leaf in ours.items()},
    )
    return {
        name: np.ascontiguousarray(np.concatenate([_to_theirs(path, ours[path]) for path in paths]))
        for name, paths in _rows(shapes, unet).items()
    }


def _shapes(unet: UNet, in_channels: int) -> dict[_Path, tuple[int, ...]]:
    """The shape of every parameter, by path."""
    size = unet.downsampling
    inputs = {
        "x": jnp.zeros((1, size, size, in_channels)),
        "t": jnp.zeros((1,)),
        "label": None if unet.num_classes is None else jnp.zeros((1,), jnp.int32),
        "text": None if unet.text_dim is None else jnp.zeros((1, 1, unet.text_dim)),
    }
    tree = jax.eval_shape(unet.init, jax.random.key(0), **inputs)["params"]
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()}


def _rows(paths: Iterable[_Path], unet: UNet) -> dict[str, list[_Path]]:
    """The paths of ours that make up each tensor of theirs, stacked along its first axis."""
    rows = {}
    for path in sorted(paths, key=lambda path: "gate" in path):  # "in" comes before "gate"
        rows.setdefault(_their_name(path, unet), []).append(path)
    return rows


def _their_name(path: _Path, unet: UNet) -> str:
    """The name in diffusers of one of our parameters."""
    *modules, leaf = path
    last = len(unet.channel_mult) - 1
    module = re.sub(r"^up_(\d+)", lambda match: f"up_{last - int(match[1])}", "/".join(modules))
    for ours, theirs in _BLOCKS:
        module = re.sub(ours, theirs, module)
    *block, layer = module.rsplit(".", 1)
    norm = {"norm": "group_norm" if unet.text_dim is None else "norm"}
    return ".".join([*block, (_LAYERS | norm)[layer], "bias" if leaf == "bias" else "weight"])


def _to_theirs(path: _Path, leaf: np.ndarray) -> np.ndarray:
    """Our layout -> theirs."""
    if path[-1] != "kernel":
        return leaf
    if leaf.ndim == 4:
        return leaf.transpose(3, 2, 0, 1)
    return leaf.T[..., None, None] if path[-2] in _POINTWISE else leaf.T


def _to_ours(path: _Path, tensor: np.ndarray) -> np.ndarray:
    """Their layout -> ours."""
    if path[-1] != "kernel":
        return tensor
    if path[-2] in _POINTWISE:
        tensor = tensor[..., 0, 0]
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _their_shape(paths: Iterable[_Path], shapes: Mapping[_Path, tuple]) -> tuple[int, ...]:
    """The shape of the tensor of theirs that holds these of ours."""
    first, *rest = (
        _to_theirs(path, np.broadcast_to(np.float32(0), shapes[path])).shape for path in paths
    )
    return (first[0] + sum(shape[0] for shape in rest), *first[1:])


def _check(expected: Mapping[str, tuple], given: Mapping[str, tuple]) -> None:
    """Raises ValueError, on one line, unless both have the same names and shapes."""
    problems = [f"{name} {expected[name]} is missing" for name in expected.keys() - given.keys()]
    problems += [f"{name} {given[name]} is left over" for name in given.keys() - expected.keys()]
    problems += [
        f"{name} is {given[name]}, not {expected[name]}"
        for name in expected.keys() & given.keys()
        if expected[name] != given[name]
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError("weights do not fit the UNet: " + "; ".join(sorted(problems)[:8]) + more)
