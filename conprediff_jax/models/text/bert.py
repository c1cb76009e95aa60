"""The text encoder of latent diffusion's text-to-image model."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from conprediff_jax.common.keys import adjustable, derived
from conprediff_jax.models.text import layers
from conprediff_jax.models.text.encoder import Encoded, TokenIds, validate


class BERTText(nn.Module):
    """The encoder trained along with latent diffusion's text-to-image model, and its sizes.

    It shares BERT's vocabulary, not its architecture. `vocab_size`, `length` and `width` are those
    of `TextEncoder`.

    Attributes:
        num_layers: Number of blocks.
        num_heads: Attention heads.
        head_channels: Channels of a head.
        hidden: Hidden channels of the feed-forward layers.
        dtype: Of the activations. Parameters and the output are float32.
        remat: Recompute every block in the backward pass.

    Raises:
        ValueError: If an option is out of range, at construction.
    """

    vocab_size: int = 30522
    length: int = 77
    width: int = 1280
    num_layers: int = 32
    num_heads: int = 8
    head_channels: int = 64
    hidden: int = 5120
    dtype: DTypeLike = derived(jnp.float32)
    remat: bool = adjustable(False)

    def __post_init__(self):
        validate(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, tokens: TokenIds) -> Encoded:
        """See `TextEncoder`."""
        return layers.encode(
            self,
            tokens,
            head_channels=self.head_channels,
            activation="gelu",
            qkv_bias=False,
        )
