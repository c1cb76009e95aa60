"""CLIP, which maps images and texts into one space.

Source: Radford et al. 2021 (arXiv 2103.00020), with the vision transformer. Both towers are
pre-norm transformers. The vector of an image is the output at the class token; that of a text is
the output at its end token, under a causal mask. The text tower is `models.text.CLIPText`. `load`
reads the folder of a checkpoint from the Hugging Face hub: `config.json`, `model.safetensors` (or
`pytorch_model.bin`), and `vocab.json` with `merges.txt`, or `tokenizer.json`.
"""

import json
import os
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from conprediff_jax.common import hub
from conprediff_jax.common.blocks import BLOCKS
from conprediff_jax.common.errors import UserError
from conprediff_jax.data.tokenizers import Tokenizer
from conprediff_jax.models import blocks
from conprediff_jax.models.text import CLIPText
from conprediff_jax.models.text.layers import Block
from conprediff_jax.weights import cached, tensors, transformers_text

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

_VISION_NAMES = transformers_text.Names(
    layers={
        "patch_embedding": "vision_model.embeddings.patch_embedding",
        "position_embedding": "vision_model.embeddings.position_embedding",
        "input_norm": "vision_model.pre_layrnorm",  # spelt like this in every checkpoint
        "output_norm": "vision_model.post_layernorm",
    },
    block="vision_model.encoder.layers.{}",
    block_layers=transformers_text.CLIP_BLOCK_LAYERS,
)


class VisionModel(nn.Module):
    """The image tower, from pixels to the normalised class token; the defaults are ViT-B/32's.

    Attributes:
        width: Channels.
        num_layers: Number of blocks.
        num_heads: Number of attention heads.
        hidden: Hidden channels of the feed-forward layers.
        activation: Activation of the feed-forward layers, as in `CLIPText`.
        patch_size: Side of a patch in pixels.
        image_size: Side of an image in pixels.
    """

    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    hidden: int = 3072
    activation: str = "quick_gelu"
    patch_size: int = 32
    image_size: int = 224

    @nn.compact
    def __call__(self, pixels: Float[Array, "batch height width 3"]) -> Float[Array, "batch _c"]:
        """The vector of every image, before the projection."""
        patch = (self.patch_size, self.patch_size)
        embed = nn.Conv(self.width, patch, patch, use_bias=False, name="patch_embedding")
        x = rearrange(embed(pixels), "b h w c -> b (h w) c")
        first = self.param("class_embedding", nn.initializers.normal(0.02), (self.width,))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, self.width)), x], axis=1)
        x = x + nn.Embed(x.shape[1], self.width, name="position_embedding")(jnp.arange(x.shape[1]))
        x = nn.LayerNorm(1e-5, name="input_norm")(x)
        block = Block(
            self.num_heads, self.width // self.num_heads, self.hidden, self.activation, name=BLOCKS
        )
        x, _ = blocks.run(block, x, count=self.num_layers)
        return nn.LayerNorm(1e-5, name="output_norm")(x[:, 0])


class CLIP(nn.Module):
    """Both towers and their projections; all matrix products are in full float32.

    Attributes:
        vision_model: The image tower.
        text_model: The text tower.
        projection_dim: Dimension of the shared space.
    """

    vision_model: VisionModel
    text_model: CLIPText
    projection_dim: int = 512

    def setup(self):
        """Makes the projections."""
        self.visual_projection = nn.Dense(self.projection_dim, use_bias=False)
        self.text_projection = nn.Dense(self.projection_dim, use_bias=False)

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return self.vision_model.image_size

    @property
    def length(self) -> int:
        """Number of tokens of a text."""
        return self.text_model.length

    def embed_images(
        self, images: UInt8[Array, "batch height width 3"]
    ) -> Float[Array, "batch projection_dim"]:
        """The vectors, of length 1, of images that `prepare` has resized to `image_size`."""
        pixels = (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)
        with jax.default_matmul_precision("highest"):
            return _unit(self.visual_projection(self.vision_model(pixels)))

    def embed_texts(
        self, tokens: Int[Array, "batch length"], end: int
    ) -> Float[Array, "batch projection_dim"]:
        """The vectors, of length 1, of texts; `end` is the token that ends a text."""
        with jax.default_matmul_precision("highest"):
            x = self.text_model(tokens)
            first_end = (tokens == end).argmax(axis=1)
            return _unit(self.text_projection(x[jnp.arange(len(x)), first_end]))

    def __call__(self, images: Array, tokens: Array) -> tuple[Array, Array]:
        """The vectors of images and texts; `init` calls this to see every parameter."""
        return self.embed_images(images), self.embed_texts(tokens, 0)


class Loaded(NamedTuple):
    """A CLIP ready for use.

    Attributes:
        model: The network.
        params: Its parameters, as NumPy arrays.
        tokenizer: The tokenizer of its text tower.
    """

    model: CLIP
    params: Any
    tokenizer: Tokenizer


def load(folder: str | os.PathLike, cache: str | os.PathLike) -> Loaded:
    """Reads a checkpoint's folder.

    Args:
        folder: The folder, or its address on the Hub; see the module.
        cache: Folder for converted weights.

    Raises:
        UserError: A file is missing, damaged, or of another network.
    """
    folder = pathlib.Path(hub.local(folder))
    try:
        config = json.loads((folder / "config.json").read_text())
        model = make_model(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no CLIP with a readable config.json: {error}") from error
    file = folder / "model.safetensors"
    state_dict = cached.read(file if file.exists() else folder / "pytorch_model.bin", cache)
    try:
        params = params_from_transformers(state_dict, model)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    return Loaded(model, params, Tokenizer.from_file(folder, length=model.length))


def make_model(config: dict) -> CLIP:
    """The model that a checkpoint's config describes; fields that it lacks are as in ViT-B/32.

    Raises:
        KeyError: A section of the config is missing.
        ValueError: The config describes another model.
    """
    vision = config["vision_config"]
    names = {
        "width": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "hidden": "intermediate_size",
        "activation": "hidden_act",
        "patch_size": "patch_size",
        "image_size": "image_size",
    }
    text = {"model_type": "clip", "text_config": config["text_config"]}
    return CLIP(
        vision_model=VisionModel(**{k: vision[v] for k, v in names.items() if v in vision}),
        text_model=transformers_text.encoder_from_config(text),
        projection_dim=config.get("projection_dim", 512),
    )


def params_from_transformers(state_dict: dict[str, np.ndarray], model: CLIP) -> dict:
    """The parameters from a `transformers` state dict; the temperature is not read.

    Raises:
        ValueError: A tensor is missing or left over, or has another shape than the model's.
    """
    image = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.uint8)
    tokens = jax.ShapeDtypeStruct((1, model.length), jnp.int32)
    tree = jax.eval_shape(model.init, jax.random.key(0), image, tokens)["params"]
    shapes = tensors.parameter_shapes(tree)
    table = tensors.Table(
        model="CLIP", shapes=shapes, names={path: _their_name(path) for path in shapes}
    )
    unread = ("logit_scale", "position_ids")
    return table.read({k: v for k, v in state_dict.items() if not k.endswith(unread)})


def _their_name(path: tensors.Path) -> str:
    """The name that `transformers` gives a parameter."""
    tower, *inner = path
    if inner == ["class_embedding"]:
        return "vision_model.embeddings.class_embedding"
    names = {"text_model": transformers_text.CLIP_NAMES, "vision_model": _VISION_NAMES}
    return names[tower](tuple(inner)) if tower in names else f"{tower}.weight"


def prepare(
    images: UInt8[np.ndarray, "batch height width 3"], size: int
) -> UInt8[np.ndarray, "batch size size 3"]:
    """The central square, resized by Pillow's bicubic filter as in CLIP's own code."""
    height, width = images.shape[1:3]
    shorter = min(height, width)
    shape = (width * size // shorter, height * size // shorter)
    left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
    box = (left, top, left + size, top + size)
    resized = [Image.fromarray(i).resize(shape, Image.Resampling.BICUBIC).crop(box) for i in images]
    return np.stack(resized)


def _unit(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
