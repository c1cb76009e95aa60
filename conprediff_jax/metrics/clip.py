"""CLIP: images and texts in one space.

Source: Radford et al. 2021 (arXiv 2103.00020), with the vision transformer. Both towers are
pre-norm transformers; the image is read off the class token, the text off its end token, under a
causal mask. Layers and names follow the checkpoints on the Hugging Face hub, of which `load` reads
a folder: `config.json`, `model.safetensors` (or `pytorch_model.bin`), `vocab.json`, `merges.txt`.
"""

import dataclasses
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from conprediff_jax.errors import UserError
from conprediff_jax.interop import tensors
from conprediff_jax.metrics import tokenizer, weights

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}

_EMBEDDINGS = ("class_embedding", "patch_embedding", "position_embedding", "token_embedding")
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
    """Sizes of one transformer.

    Attributes:
        hidden_size: channels.
        intermediate_size: hidden units of the feed-forward layers.
        num_hidden_layers: blocks.
        num_attention_heads: heads.
        hidden_act: a key of `ACTIVATIONS`.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int = 12
    num_attention_heads: int
    hidden_act: str = "quick_gelu"

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act is {self.hidden_act!r}: choose one of {tuple(ACTIVATIONS)}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}: it must divide hidden_size "
                f"{self.hidden_size}"
            )


class _Attention(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x: Array, causal: bool) -> Array:
        def project(name: str, x: Array) -> Array:
            return nn.Dense(x.shape[-1], precision="highest", name=f"{name}_proj")(x)

        q, k, v = (
            rearrange(project(name, x), "b n (h c) -> b n h c", h=self.heads) for name in "qkv"
        )
        mask = nn.make_causal_mask(x[..., 0]) if causal else None
        attended = nn.dot_product_attention(q, k, v, mask=mask, precision="highest")
        return project("out", rearrange(attended, "b n h c -> b n (h c)"))


class _FeedForward(nn.Module):
    tower: Tower

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Dense(self.tower.intermediate_size, precision="highest", name="fc1")(x)
        x = ACTIVATIONS[self.tower.hidden_act](x)
        return nn.Dense(self.tower.hidden_size, precision="highest", name="fc2")(x)


class _Layer(nn.Module):
    tower: Tower

    @nn.compact
    def __call__(self, x: Array, causal: bool) -> Array:
        h = nn.LayerNorm(1e-5, name="layer_norm1")(x)
        x = x + _Attention(self.tower.num_attention_heads, name="self_attn")(h, causal)
        return x + _FeedForward(self.tower, name="mlp")(nn.LayerNorm(1e-5, name="layer_norm2")(x))


class _Encoder(nn.Module):
    tower: Tower

    @nn.compact
    def __call__(self, x: Array, causal: bool) -> Array:
        for number in range(self.tower.num_hidden_layers):
            x = _Layer(self.tower, name=f"layers_{number}")(x, causal)
        return x


class VisionModel(nn.Module):
    """From pixels to the normed class token."""

    tower: Tower
    patch_size: int

    @nn.compact
    def __call__(self, pixels: Float[Array, "batch height width 3"]) -> Float[Array, "batch _c"]:
        """The vector of every image, before the projection."""
        channels, patch = self.tower.hidden_size, (self.patch_size, self.patch_size)
        embed = nn.Conv(
            channels, patch, patch, use_bias=False, precision="highest", name="patch_embedding"
        )
        x = rearrange(embed(pixels), "b h w c -> b (h w) c")
        first = self.param("class_embedding", nn.initializers.normal(0.02), (channels,))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, channels)), x], axis=1)
        x = x + nn.Embed(x.shape[1], channels, name="position_embedding")(jnp.arange(x.shape[1]))
        x = nn.LayerNorm(1e-5, name="pre_layrnorm")(x)  # so it is spelt in every checkpoint
        x = _Encoder(self.tower, name="encoder")(x, causal=False)
        return nn.LayerNorm(1e-5, name="post_layernorm")(x[:, 0])


class TextModel(nn.Module):
    """From tokens to the normed end token."""

    tower: Tower
    vocab_size: int

    @nn.compact
    def __call__(self, tokens: Int[Array, "batch length"], end: int) -> Float[Array, "batch _c"]:
        """The vector of every text, before the projection; `end` is the token that ends a text."""
        channels, length = self.tower.hidden_size, tokens.shape[1]
        x = nn.Embed(self.vocab_size, channels, name="token_embedding")(tokens)
        x = x + nn.Embed(length, channels, name="position_embedding")(jnp.arange(length))
        x = _Encoder(self.tower, name="encoder")(x, causal=True)
        x = nn.LayerNorm(1e-5, name="final_layer_norm")(x)
        return x[jnp.arange(len(x)), (tokens == end).argmax(axis=1)]


class CLIP(nn.Module):
    """Both towers and their projections.

    Attributes:
        vision: sizes of the image tower.
        text: sizes of the text tower.
        projection_dim: size of the space they share.
        patch_size: pixels a side of a patch.
        image_size: pixels a side of an image.
        vocab_size: tokens there are.
        length: tokens of a text.
    """

    vision: Tower
    text: Tower
    projection_dim: int = 512
    patch_size: int = 32
    image_size: int = 224
    vocab_size: int = 49408
    length: int = 77

    def setup(self):
        """Makes the layers."""
        self.vision_model = VisionModel(self.vision, self.patch_size)
        self.text_model = TextModel(self.text, self.vocab_size)
        options = {"use_bias": False, "precision": "highest"}
        self.visual_projection = nn.Dense(self.projection_dim, **options)
        self.text_projection = nn.Dense(self.projection_dim, **options)

    def embed_images(
        self, images: UInt8[Array, "batch height width 3"]
    ) -> Float[Array, "batch projection_dim"]:
        """Vectors of length 1 of images of `image_size`, as `prepare` makes them."""
        pixels = (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)
        return _unit(self.visual_projection(self.vision_model(pixels)))

    def embed_texts(
        self, tokens: Int[Array, "batch length"], end: int
    ) -> Float[Array, "batch projection_dim"]:
        """Vectors of length 1; `end` is the token that ends a text."""
        return _unit(self.text_projection(self.text_model(tokens, end)))

    def __call__(self, images: Array, tokens: Array) -> tuple[Array, Array]:
        """Both, so that `init` sees every parameter."""
        return self.embed_images(images), self.embed_texts(tokens, 0)


class Loaded(NamedTuple):
    """A CLIP ready for use."""

    model: CLIP
    params: Any
    tokenizer: tokenizer.Tokenizer


def load(folder: str | os.PathLike, cache: str | os.PathLike) -> Loaded:
    """Reads a checkpoint's folder.

    Args:
        folder: see the module docstring.
        cache: where converted weights are kept.

    Raises:
        UserError: a file is missing, damaged, or of another network.
    """
    folder = pathlib.Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        model = make_model(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no CLIP with a readable config.json: {error}") from error
    file = folder / "model.safetensors"
    state_dict = weights.read(file if file.exists() else folder / "pytorch_model.bin", cache)
    try:
        params = params_from_transformers(state_dict, model)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    return Loaded(model, params, tokenizer.load(folder, model.length))


def make_model(config: dict) -> CLIP:
    """The model that a checkpoint's config describes; what it leaves out is as in ViT-B/32."""
    text, vision = config["text_config"], config["vision_config"]
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    wide = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    names = [field.name for field in dataclasses.fields(Tower)]
    towers = [
        Tower(**default | {name: given[name] for name in names if name in given})
        for given, default in ((text, sizes), (vision, wide))
    ]
    return CLIP(
        text=towers[0],
        vision=towers[1],
        projection_dim=config.get("projection_dim", 512),
        patch_size=vision.get("patch_size", 32),
        image_size=vision.get("image_size", 224),
        vocab_size=text.get("vocab_size", 49408),
        length=text.get("max_position_embeddings", 77),
    )


def params_from_transformers(state_dict: dict[str, np.ndarray], model: CLIP) -> dict:
    """The parameters out of a `transformers` state dict; the temperature is left aside.

    Raises:
        ValueError: a tensor is missing, left over or of another shape than the model's.
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
    """The name in `transformers` of one of our parameters."""
    name = re.sub(r"layers_(\d+)", r"layers.\1", ".".join(path[:-1]))
    if path[-1] == "class_embedding":
        return f"{name}.embeddings.class_embedding"
    if path[1] in _EMBEDDINGS:
        name = name.replace(path[1], f"embeddings.{path[1]}")
    return f"{name}.{_LEAVES.get(path[-1], path[-1])}"


def prepare(
    images: UInt8[np.ndarray, "batch height width 3"], size: int
) -> UInt8[np.ndarray, "batch size size 3"]:
    """The central square, resized by Pillow's bicubic filter, as CLIP's own code does it."""
    height, width = images.shape[1:3]
    shorter = min(height, width)
    shape = (width * size // shorter, height * size // shorter)
    left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
    box = (left, top, left + size, top + size)
    resized = [Image.fromarray(i).resize(shape, Image.Resampling.BICUBIC).crop(box) for i in images]
    return np.stack(resized)


def _unit(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
