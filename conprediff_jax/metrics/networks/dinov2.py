"""DINOv2, a vision transformer whose features tell images apart as people do.

    x <- x + s_1 attention(LN(x)),   x <- x + s_2 MLP(LN(x))                               (1)

with learned scales s of every channel. The features of an image are the class token after the last
norm. FD-DINOv2, the Frechet distance of these features for ViT-L/14 and images of 224 x 224, agrees
better with people than FID does.

Sources: Oquab et al. 2023 (arXiv 2304.07193) for the network; Stein et al. 2023 (arXiv 2306.04675)
for the distance. `load` reads the folder of a checkpoint from the Hugging Face hub: `config.json`
and `model.safetensors` (or `pytorch_model.bin`).
"""

import json
import os
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, UInt8

from conprediff_jax.common import hub
from conprediff_jax.common.blocks import BLOCKS
from conprediff_jax.common.errors import UserError
from conprediff_jax.models import blocks
from conprediff_jax.weights import cached, tensors

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SIZE = 224

_EPSILON = 1e-6
_LAYERS = {
    ("attention_norm",): "norm1",
    ("query",): "attention.attention.query",
    ("key",): "attention.attention.key",
    ("value",): "attention.attention.value",
    ("out",): "attention.output.dense",
    ("mlp_norm",): "norm2",
    ("in",): "mlp.fc1",
    ("mlp_out",): "mlp.fc2",
}


class Block(nn.Module):
    """One block of the transformer, equation (1).

    Attributes:
        num_heads: The number of heads.
        hidden: The hidden channels of the feed-forward layers.
    """

    num_heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Maps tokens to tokens."""
        width = x.shape[-1]

        def scaled(h: Array, name: str) -> Array:
            return h * self.param(name, nn.initializers.ones, (width,))

        h = nn.LayerNorm(_EPSILON, name="attention_norm")(x)
        heads = (*h.shape[:-1], self.num_heads, width // self.num_heads)
        query, key, value = (
            nn.Dense(width, name=name)(h).reshape(heads) for name in ("query", "key", "value")
        )
        h = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
        x = x + scaled(nn.Dense(width, name="out")(h), "attention_scale")
        h = nn.LayerNorm(_EPSILON, name="mlp_norm")(x)
        h = nn.gelu(nn.Dense(self.hidden, name="in")(h), approximate=False)
        return x + scaled(nn.Dense(width, name="mlp_out")(h), "mlp_scale")


class DINOv2(nn.Module):
    """The network, from images to features; the defaults are ViT-L/14's.

    All matrix products are in full float32.

    Attributes:
        width: The number of channels.
        num_layers: The number of blocks.
        num_heads: The number of attention heads.
        hidden: The hidden channels of the feed-forward layers.
        patch_size: The side of a patch in pixels.
        trained_size: The side in pixels of the images for which positions have embeddings. For
            others, the embeddings are interpolated.
    """

    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    hidden: int = 4096
    patch_size: int = 14
    trained_size: int = 518

    @nn.compact
    def __call__(
        self, images: UInt8[Array, "batch height width 3"]
    ) -> Float[Array, "batch channels"]:
        """The features of images whose sides are multiples of the patch."""
        pixels = (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)
        patch = (self.patch_size, self.patch_size)
        with jax.default_matmul_precision("highest"):
            x = nn.Conv(self.width, patch, patch, name="patch_embedding")(pixels)
            rows, columns = x.shape[1:3]
            side = self.trained_size // self.patch_size
            init = nn.initializers.normal(0.02)
            first = self.param("class_token", init, (1, 1, self.width))
            places = self.param("position_embedding", init, (1, 1 + side**2, self.width))
            grid = rearrange(places[0, 1:], "(r c) w -> r c w", r=side)
            grid = jnp.einsum("ri,cj,ijw->rcw", cubic(side, rows), cubic(side, columns), grid)
            x = rearrange(x + grid, "b r c w -> b (r c) w")
            first = jnp.broadcast_to(first + places[:, :1], (len(x), 1, self.width))
            x = jnp.concatenate([first, x], axis=1)
            block = Block(self.num_heads, self.hidden, name=BLOCKS)
            x, _ = blocks.run(block, x, count=self.num_layers)
            return nn.LayerNorm(_EPSILON, name="output_norm")(x)[:, 0]


def cubic(old: int, new: int) -> Float[np.ndarray, "{new} {old}"]:
    """The matrix of torch's bicubic interpolation along one axis (a = -0.75, no antialiasing)."""
    if old == new:
        return np.eye(old, dtype=np.float32)
    at = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(at).astype(int) - 1
    distance = np.abs(at[:, None] - (first[:, None] + np.arange(4)))
    a = -0.75
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    weights = np.where(distance <= 1, near, far)
    matrix = np.zeros((new, old), np.float32)
    for tap in range(4):
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), weights[:, tap])
    return matrix


def resized(
    images: UInt8[Array, "batch height width 3"], size: int = SIZE
) -> UInt8[Array, "batch {size} {size} 3"]:
    """Images at the size that the network reads, by a bicubic filter as Pillow's, to one level."""
    if images.shape[1:3] == (size, size):
        return images
    for axis in (2, 1):  # columns first, and whole levels after each pass
        shape = [*images.shape[:axis], size, *images.shape[axis + 1 :]]
        pixels = jax.image.resize(images.astype(jnp.float32), shape, "cubic", antialias=True)
        images = jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)
    return images


def load(folder: str | os.PathLike, cache: str | os.PathLike) -> tuple[DINOv2, Any]:
    """Reads a checkpoint's folder: the network and its parameters, as NumPy arrays.

    Args:
        folder: The folder, or its address on the Hub; see the module.
        cache: The folder for converted weights.

    Raises:
        UserError: A file is missing, damaged, or of another network.
    """
    folder = pathlib.Path(hub.local(folder))
    try:
        model = make_model(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no DINOv2 with a readable config.json: {error}") from error
    state_dict = cached.read(weights_of(folder), cache)
    try:
        return model, params_from_transformers(state_dict, model)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error


def weights_of(folder: pathlib.Path) -> pathlib.Path:
    """The file of weights in a checkpoint's folder."""
    file = folder / "model.safetensors"
    return file if file.exists() else folder / "pytorch_model.bin"


def make_model(config: dict) -> DINOv2:
    """The model that a checkpoint's config describes.

    Raises:
        KeyError: The config lacks a field.
        ValueError: The config describes another model.
    """
    if config["model_type"] != "dinov2" or config.get("use_swiglu_ffn"):
        raise ValueError("it must have model_type dinov2, without use_swiglu_ffn")
    return DINOv2(
        width=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        hidden=int(config["hidden_size"] * config["mlp_ratio"]),
        patch_size=config["patch_size"],
        trained_size=config["image_size"],
    )


def params_from_transformers(state_dict: dict[str, np.ndarray], model: DINOv2) -> dict:
    """The parameters from a `transformers` state dict of Dinov2Model.

    Raises:
        ValueError: A tensor is missing or left over, or has another shape than the model's.
    """
    side = model.patch_size
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    tree = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    shapes = tensors.parameter_shapes(tree)
    table = tensors.Table(
        model="DINOv2", shapes=shapes, names={path: _their_name(path) for path in shapes}
    )
    return table.read({k: v for k, v in state_dict.items() if k != "embeddings.mask_token"})


def _their_name(path: tensors.Path) -> str:
    """The name that `transformers` gives a parameter."""
    alone = {
        ("class_token",): "embeddings.cls_token",
        ("position_embedding",): "embeddings.position_embeddings",
    }
    if path in alone:
        return alone[path]
    *layer, kind = path
    kind = "bias" if kind == "bias" else "weight"
    whole = {
        "patch_embedding": "embeddings.patch_embeddings.projection",
        "output_norm": "layernorm",
    }
    if layer[0] in whole:
        return f"{whole[layer[0]]}.{kind}"
    block = f"encoder.layer.{path[0].removeprefix('block_')}"
    scales = {"attention_scale": "layer_scale1", "mlp_scale": "layer_scale2"}
    if path[-1] in scales:
        return f"{block}.{scales[path[-1]]}.lambda1"
    return f"{block}.{_LAYERS[tuple(layer[1:])]}.{kind}"
