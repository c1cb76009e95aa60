"""CLIP's text encoder."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from conprediff_jax.common.keys import adjustable, derived
from conprediff_jax.models.text import layers
from conprediff_jax.models.text.encoder import Encoded, TokenIds, validate


class CLIPText(nn.Module):
    """CLIP's text encoder up to its final norm.

    The defaults are the sizes of ViT-B/32. ViT-L/14 has width 768, 12 heads and 3072 hidden
    channels.

    Attributes:
        vocab_size: The number of token ids, which are 0 .. vocab_size - 1.
        length: The number of tokens of a text, with padding.
        width: The number of channels of an encoded token.
        num_layers: The number of blocks.
        num_heads: The number of attention heads, which must divide `width`.
        hidden: The number of hidden channels of the feed-forward layers.
        activation: 'quick_gelu', 'gelu' or 'gelu_new'.
        unit: Whether every encoded token is divided by its norm, as in VQ-Diffusion.
        dtype: The dtype of the activations. Parameters and the output are float32.
        remat: Whether blocks are recomputed in the backward pass.
        unroll: Whether the program has the blocks one after another instead of a loop. It takes
            longer to compile.

    Raises:
        ValueError: An option is out of range; the constructor raises it.
    """

    vocab_size: int = 49408
    length: int = 77
    width: int = 512
    num_layers: int = 12
    num_heads: int = 8
    hidden: int = 2048
    activation: str = "quick_gelu"
    unit: bool = False
    dtype: DTypeLike = derived(jnp.float32)
    remat: bool = adjustable(False)
    unroll: bool = adjustable(False)

    def __post_init__(self):
        validate(self)
        if self.activation not in layers.ACTIVATIONS:
            raise ValueError(
                f"activation={self.activation!r} must be one of {list(layers.ACTIVATIONS)}"
            )
        if self.width % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide width={self.width}")
        super().__post_init__()

    @nn.compact
    def __call__(self, tokens: TokenIds) -> Encoded:
        """See `TextEncoder`."""
        x = layers.encode(
            self,
            tokens,
            head_channels=self.width // self.num_heads,
            activation=self.activation,
            causal=True,
        )
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True) if self.unit else x
