"""Maps from the published files of DiT and SiT, which have the same names, to ours.

    x_embedder.proj                             input, as a convolution
    pos_embed                                   fixed, and so none of our parameters
    t_embedder.mlp.{0,2}                        time_embedding_{in,out}
    y_embedder.embedding_table                  label_embedding; the last row is for no label
    blocks.{i}.attn.{qkv,proj}                  self_attention; query, key and value stacked
    blocks.{i}.mlp.{fc1,fc2}                    feed_forward/{in,out}
    blocks.{i}.adaLN_modulation.1               modulation
    final_layer.{adaLN_modulation.1,linear}     output_modulation, output

A published file holds this mapping alone. A file that a trainer wrote holds it twice, under "model"
and, as the moving average, under "ema"; the average is what was published. Models with a learned
variance return twice the channels of the points. Those of the prediction come first, and the others
are dropped.

Both models have the conventions of time and norms that are the defaults of `DiT`. SiT's time runs
in the other direction, from noise at 0 to points at 1, and the map does not change it. In our
direction, with points at 0, its model has the fields of `SIT_TIME`, and predicts the velocity with
the opposite sign.

Sources of the names: facebookresearch/DiT and willisma/SiT.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from conprediff_jax.models.dit import SIZES, DiT
from conprediff_jax.weights import dit as layout
from conprediff_jax.weights import tensors
from conprediff_jax.weights.tensors import Path

SIT_TIME: Mapping[str, float] = {"time_scale": -1.0, "time_shift": 1.0}

# The fields of a `DiT` that do not follow from the shapes in a file, by family.
_COMMON = {"time_endpoint": False, "mlp_norm_epsilon": 1e-6}
CONVENTIONS: Mapping[str, Mapping[str, float]] = {
    "dit": {"time_scale": 1.0, "time_shift": 0.0, **_COMMON},
    "sit": {**SIT_TIME, **_COMMON},
}

_OUTPUT = "final_layer.linear"

# Our layers -> theirs.
_LAYERS = {
    "input": "x_embedder.proj",
    "time_embedding_in": "t_embedder.mlp.0",
    "time_embedding_out": "t_embedder.mlp.2",
    "label_embedding": "y_embedder.embedding_table",
    "modulation": "adaLN_modulation.1",
    "self_attention/query": "attn.qkv",
    "self_attention/key": "attn.qkv",
    "self_attention/value": "attn.qkv",
    "self_attention/out": "attn.proj",
    "feed_forward/in": "mlp.fc1",
    "feed_forward/out": "mlp.fc2",
    "output_modulation": "final_layer.adaLN_modulation.1",
    "output": _OUTPUT,
}


def fields_from_original(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Finds the fields of a `DiT` from the shapes in a published file.

    Returns:
        The fields, without `out_channels` and dtype.

    Raises:
        ValueError: The file has none of the published sizes.
    """
    blocks = {match[1] for match in map(re.compile(r"blocks\.(\d+)\.").match, state_dict) if match}
    width, _, patch, _ = np.shape(state_dict.get("x_embedder.proj.weight", np.empty((0,) * 4)))
    for size in SIZES.values():
        if (size["width"], size["num_layers"]) == (width, len(blocks)):
            labels = len(state_dict["y_embedder.embedding_table.weight"])
            return {**size, "patch": patch, "num_classes": labels - 1, "learned_null": True}
    sizes = ", ".join(f"{name} {tuple(size.values())[:2]}" for name, size in SIZES.items())
    raise ValueError(f"width {width} and {len(blocks)} blocks are of no published size: {sizes}")


def side_from_original(state_dict: Mapping[str, np.ndarray]) -> int:
    """Finds the number of points along a side of the square grid that a published file is for.

    Raises:
        ValueError: There is no table of positions, which tells the number.
    """
    table = np.asarray(state_dict.get("pos_embed", ()))
    patch = np.shape(state_dict.get("x_embedder.proj.weight"))[-1:]
    if table.ndim != 3 or not patch:
        raise ValueError("pos_embed [1, positions, width] and x_embedder.proj.weight must be there")
    return math.isqrt(table.shape[1]) * patch[0]


def params_from_original(state_dict: Mapping[str, np.ndarray], dit: DiT) -> dict:
    """Reads the parameters of a DiT from a state dict of the original code.

    Args:
        state_dict: The tensors by their original names.
        dit: The DiT. If the file has twice its `out_channels`, the channels of a learned variance
            are dropped.

    Returns:
        The tree under "params", with float32 NumPy arrays.

    Raises:
        ValueError: A tensor is missing, left over, or does not have the DiT's shape; or the
            original code has no such DiT.
    """
    in_channels = np.shape(state_dict.get("x_embedder.proj.weight", np.empty((0, 1))))[1]
    state_dict = layout.without_variance(state_dict, dit, _OUTPUT)
    state_dict = layout.without_positions(state_dict, dit, "pos_embed")
    return layout.with_dense(_table(dit, in_channels).read(state_dict))


def with_turned_velocity(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a DiT, with the opposite sign of its prediction.

    Args:
        params: The tree under "params".
    """
    return {**params, "output": {name: -leaf for name, leaf in params["output"].items()}}


def _table(dit: DiT, in_channels: int) -> tensors.Table:
    """The table of a DiT's parameters in the original code, for `in_channels` input channels."""
    if dit.text_dim is not None:
        raise ValueError("the original code has no DiT with text")
    shapes = layout.shapes(dit, in_channels)
    names = {path: _their_name(path) for path in shapes}
    return tensors.Table(model="DiT", shapes=shapes, names=names)


def _their_name(path: Path) -> str:
    """The original name of one of our parameters."""
    block, layer, ending = tensors.split_path(path)
    prefix = [] if block is None else [f"blocks.{block}"]
    return ".".join([*prefix, _LAYERS[layer], ending])
