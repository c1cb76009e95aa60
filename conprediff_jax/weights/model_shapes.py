"""The shapes of a model's parameters, found without making any array."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from conprediff_jax.models.autoencoder import AutoencoderKL, VQModel
from conprediff_jax.models.transformer import TokenTransformer
from conprediff_jax.models.unet import UNet
from conprediff_jax.weights.tensors import Path, parameter_shapes

Shapes = dict[Path, tuple[int, ...]]


def of_unet(unet: UNet, in_channels: int) -> Shapes:
    """Shapes by path, for inputs of `in_channels` channels."""
    size = unet.downsampling
    inputs = {
        "x": jnp.zeros((1, size, size, in_channels)),
        "t": jnp.zeros((1,)),
        "label": None if unet.num_classes is None else jnp.zeros((1,), jnp.int32),
        "text": None if unet.text_dim is None else jnp.zeros((1, 1, unet.text_dim)),
    }
    return parameter_shapes(jax.eval_shape(unet.init, jax.random.key(0), **inputs)["params"])


def of_autoencoder(autoencoder: VQModel | AutoencoderKL, in_channels: int) -> Shapes:
    """Shapes by path, for images of `in_channels` channels."""
    size = autoencoder.downsampling
    x = jnp.zeros((1, size, size, in_channels))
    return parameter_shapes(jax.eval_shape(autoencoder.init, jax.random.key(0), x)["params"])


def of_transformer(transformer: TokenTransformer) -> Shapes:
    """Shapes by path."""
    text, classes = transformer.text_dim, transformer.num_classes
    inputs = {
        "x": jnp.zeros((1, *transformer.grid), jnp.int32),
        "t": jnp.zeros(1, jnp.int32),
        "label": None if classes is None else jnp.zeros(1, jnp.int32),
        "text": None if text is None else jnp.zeros((1, 1, text)),
    }
    return parameter_shapes(jax.eval_shape(transformer.init, jax.random.key(0), **inputs)["params"])


def of_text_encoder(encoder: nn.Module) -> Shapes:
    """Shapes by path, for one of `TEXT_ENCODERS`."""
    tokens = jnp.zeros((1, encoder.length), jnp.int32)
    return parameter_shapes(jax.eval_shape(encoder.init, jax.random.key(0), tokens)["params"])


def differing_fields(theirs: Any, ours: Any) -> str:
    """The fields in which two models differ, with both values."""
    pairs = {
        field.name: (getattr(theirs, field.name), getattr(ours, field.name))
        for field in dataclasses.fields(ours)
        if field.name not in ("parent", "name")
    }
    return ", ".join(f"{key} {a} there, {b} here" for key, (a, b) in pairs.items() if a != b)
