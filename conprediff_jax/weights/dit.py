"""What all readers of DiT's files share: the layout of the patches, and what is left out.

We embed a patch by a dense layer. In torch, the embedding is a strided convolution:

    ours    input/kernel [p p channels, out]
    theirs  input/kernel [p, p, channels, out], as a convolution of ours
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from conprediff_jax.models.dit import DiT
from conprediff_jax.models.patches import positions
from conprediff_jax.weights import tensors
from conprediff_jax.weights.model_shapes import Shapes

_PATCH = ("input", "kernel")

# The parameters that may share a tensor, in the order of their places in it.
_PARTS = ("query", "key", "value")


def shapes(dit: DiT, in_channels: int) -> Shapes:
    """The shapes of the parameters in torch's layout, with query, key and value in this order."""
    inputs = {
        "x": jnp.zeros((1, dit.patch, dit.patch, in_channels)),
        "t": jnp.zeros(1),
        "label": None if dit.num_classes is None else jnp.zeros(1, jnp.int32),
        "text": None if dit.text_dim is None else jnp.zeros((1, 1, dit.text_dim)),
    }
    params = jax.eval_shape(dit.init, jax.random.key(0), **inputs)["params"]
    found = tensors.parameter_shapes(params)
    found[_PATCH] = (dit.patch, dit.patch, in_channels, dit.width)
    order = sorted(found, key=lambda path: _PARTS.index(path[-2]) if path[-2] in _PARTS else 0)
    return {path: found[path] for path in order}


def with_convolution(params: Mapping, dit: DiT) -> dict:
    """Our parameters, with the embedding of patches as a convolution."""
    patch = np.asarray(params["input"]["kernel"])
    kernel = patch.reshape(dit.patch, dit.patch, -1, patch.shape[-1])
    return {**params, "input": {**params["input"], "kernel": kernel}}


def with_dense(params: Mapping) -> dict:
    """Our parameters, as the inverse of `with_convolution`."""
    kernel = params["input"]["kernel"]
    dense = kernel.reshape(-1, kernel.shape[-1])
    return {**params, "input": {**params["input"], "kernel": dense}}


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
