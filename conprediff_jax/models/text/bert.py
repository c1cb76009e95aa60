"""The text encoder of latent diffusion's text-to-image model."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from conprediff_jax.common.keys import adjustable, derived
from conprediff_jax.models.text import layers
from conprediff_jax.models.text.encoder import Encoded, TokenIds, validate


class BERTText(nn.Module):
    """The encoder that was trained with latent diffusion's text-to-image model.

    The defaults are its sizes. It has BERT's vocabulary, but not its architecture.

    Attributes:
        vocab_size: The number of token ids, which are 0 .. vocab_size - 1.
        length: The number of tokens of a text, with padding.
        width: The number of channels of an encoded token.
        num_layers: The number of blocks.
        num_heads: The number of attention heads.
        head_channels: The number of channels of a head.
        hidden: The number of hidden channels of the feed-forward layers.
        dtype: The dtype of the activations. Parameters and the output are float32.
        remat: Whether blocks are recomputed in the backward pass.
        unroll: Whether the program has the blocks one after another instead of a loop. It takes
            longer to compile.

    Raises:
        ValueError: An option is out of range; the constructor raises it.
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
    unroll: bool = adjustable(False)

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
