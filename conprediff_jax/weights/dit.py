"""Layouts that all readers of DiT's files share: blocks one by one, and patches as a convolution.

We stack the parameters of all blocks under `blocks/...`, and embed a patch by a dense layer. In
torch, each block has tensors of its own, and the embedding is a strided convolution. The tables of
names describe an unstacked form, with `block_{i}/...` for each block:

    ours       blocks/feed_forward/in/kernel [layers, in, out]    input/kernel [p p channels, out]
    unstacked  block_{i}/feed_forward/in/kernel [in, out]         input/kernel [p, p, channels, out]
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from conprediff_jax.models.dit import DiT
from conprediff_jax.models.patches import positions
from conprediff_jax.weights import tensors
from conprediff_jax.weights.model_shapes import Shapes
from conprediff_jax.weights.tensors import Path

BLOCKS = "blocks"
_PATCH = ("input", "kernel")

# The parameters that may share a tensor, in the order of their places in it.
_PARTS = ("query", "key", "value")


def shapes(dit: DiT, in_channels: int) -> Shapes:
    """The shapes of the unstacked parameters, with query, key and value in this order."""
    inputs = {
        "x": jnp.zeros((1, dit.patch, dit.patch, in_channels)),
        "t": jnp.zeros(1),
        "label": None if dit.num_classes is None else jnp.zeros(1, jnp.int32),
        "text": None if dit.text_dim is None else jnp.zeros((1, 1, dit.text_dim)),
    }
    params = jax.eval_shape(dit.init, jax.random.key(0), **inputs)["params"]
    found = {}
    for path, shape in tensors.parameter_shapes(params).items():
        found |= dict.fromkeys(_unstacked_paths(path, dit), shape[path[0] == BLOCKS :])
    found[_PATCH] = (dit.patch, dit.patch, in_channels, dit.width)
    order = sorted(found, key=lambda path: _PARTS.index(path[-2]) if path[-2] in _PARTS else 0)
    return {path: found[path] for path in order}


def unstack(params: Mapping, dit: DiT) -> dict:
    """Brings our parameters into the unstacked form."""
    flat = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        leaf = np.asarray(leaf)
        parts = leaf if path[0] == BLOCKS else (leaf,)
        flat |= zip(_unstacked_paths(path, dit), parts, strict=True)
    patch = flat[_PATCH]
    flat[_PATCH] = patch.reshape(dit.patch, dit.patch, -1, patch.shape[-1])
    return traverse_util.unflatten_dict(flat)


def stack(params: Mapping, dit: DiT) -> dict:
    """Brings unstacked parameters into our form, as the inverse of `unstack`."""
    params = dict(params)
    blocks = [params.pop(f"block_{i}") for i in range(dit.num_layers)]
    params[BLOCKS] = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    kernel = params["input"]["kernel"]
    params["input"] |= {"kernel": kernel.reshape(-1, kernel.shape[-1])}
    return params


def without_variance(
    state_dict: Mapping[str, np.ndarray], dit: DiT, output: str
) -> dict[str, np.ndarray]:
    """Removes the channels of a learned variance, which follow those of the prediction.

    Args:
        state_dict: The tensors by name.
        dit: The DiT.
        output: The name of the layer that makes the prediction. The channels are the last axis of
            its outputs.
    """
    state_dict, points = dict(state_dict), dit.patch**2
    for name in (f"{output}.weight", f"{output}.bias"):
        tensor = np.asarray(state_dict.get(name, ()))
        if len(tensor) == 2 * points * dit.out_channels:
            kept = tensor.reshape(points, -1, *tensor.shape[1:])[:, : dit.out_channels]
            state_dict[name] = kept.reshape(-1, *tensor.shape[1:])
    return state_dict


def without_positions(
    state_dict: Mapping[str, np.ndarray], dit: DiT, name: str
) -> dict[str, np.ndarray]:
    """Removes the table of positions, which is fixed, so that our DiT makes it for any grid.

    Args:
        state_dict: The tensors by name.
        dit: The DiT.
        name: The name of the table, [1, positions, width].

    Raises:
        ValueError: The table differs from ours for a square grid.
    """
    state_dict = dict(state_dict)
    table = np.asarray(state_dict.pop(name, np.empty((1, 0, dit.width))), np.float32)
    side = round(np.sqrt(table.shape[1]))
    if table.shape != (1, side**2, dit.width):
        raise ValueError(f"{name} is {table.shape}, not positions of a square grid of {dit.width}")
    if not np.allclose(table[0], positions(side, side, dit.width).reshape(table.shape), atol=1e-3):
        raise ValueError(f"{name} is not the fixed table of sines and cosines")
    return state_dict


def _unstacked_paths(path: Path, dit: DiT) -> list[Path]:
    """The paths of one of our parameters in the unstacked form."""
    if path[0] != BLOCKS:
        return [path]
    return [(f"block_{i}", *path[1:]) for i in range(dit.num_layers)]
