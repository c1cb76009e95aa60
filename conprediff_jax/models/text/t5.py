"""T5's encoder. The equations are in the docstring of `models/text/__init__.py`."""

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from conprediff_jax.common.blocks import BLOCKS
from conprediff_jax.common.keys import adjustable, derived
from conprediff_jax.models import blocks
from conprediff_jax.models.layers import Tokens
from conprediff_jax.models.text import layers
from conprediff_jax.models.text.encoder import Encoded, TokenIds, check_length, validate


class T5Block(nn.Module):
    """A block of T5, eqs. (1) and (2).

    Attributes:
        heads: The number of heads.
        head_channels: The number of channels of a head.
        hidden: The number of hidden channels of the feed-forward layers.
        dtype: The dtype of the activations.
    """

    heads: int
    head_channels: int
    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        bias: Float[Array, "1 heads length length"],
        mask: Bool[Array, "batch 1 1 length"],
    ) -> Tokens:
        """Maps tokens to tokens, with the bias of their distances and a mask of the padding."""
        norm = functools.partial(nn.RMSNorm, epsilon=1e-6, dtype=self.dtype)
        attention = layers.Attention(
            self.heads,
            self.head_channels,
            qkv_bias=False,
            out_bias=False,
            scale=1.0,
            query_gain=1 / self.head_channels,  # takes the place of the scale
            dtype=self.dtype,
            name="attention",
        )
        feed_forward = layers.FeedForward(
            self.hidden, "gelu_new", gated=True, dtype=self.dtype, name="feed_forward"
        )
        x = x + attention(norm(name="attention_norm")(x), bias, mask)
        return x + feed_forward(norm(name="feed_forward_norm")(x))


class T5Text(nn.Module):
    """The encoder of T5 1.1.

    The defaults are the sizes of its "base"; "xxl" is 4096 wide.

    Attributes:
        vocab_size: The number of token ids, which are 0 .. vocab_size - 1.
        length: The number of tokens of a text, with padding.
        width: The number of channels of an encoded token (T5's `d_model`).
        num_layers: The number of blocks.
        num_heads: The number of attention heads.
        head_channels: The number of channels of a head (`d_kv`).
        hidden: The number of hidden channels of the feed-forward layers (`d_ff`).
        num_buckets: The number of buckets of distances in both directions, a multiple of 4.
        max_distance: All distances from this one on share a bucket.
        pad: The token id of padding, which is hidden.
        dtype: The dtype of the activations. Parameters and the output are float32.
        remat: Whether blocks are recomputed in the backward pass.
        unroll: Whether the program has the blocks one after another instead of a loop. It takes
            longer to compile.

    Raises:
        ValueError: An option is out of range; the constructor raises it.
    """

    vocab_size: int = 32128
    length: int = 77
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    head_channels: int = 64
    hidden: int = 2048
    num_buckets: int = 32
    max_distance: int = 128
    pad: int = 0
    dtype: DTypeLike = derived(jnp.float32)
    remat: bool = adjustable(False)
    unroll: bool = adjustable(False)

    def __post_init__(self):
        validate(self)
        if self.num_buckets < 4 or self.num_buckets % 4:
            raise ValueError(f"num_buckets={self.num_buckets} must be a multiple of 4")
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"max_distance={self.max_distance} must be above a quarter of "
                f"num_buckets={self.num_buckets}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, tokens: TokenIds) -> Encoded:
        """See `TextEncoder`."""
        check_length(self, tokens)
        embed = functools.partial(layers.embedding, dtype=self.dtype)
        x = embed(self.vocab_size, self.width, std=1.0, name="token_embedding")(tokens)
        buckets = distance_buckets(self.length, self.num_buckets, self.max_distance)
        std = self.width**-0.5
        biases = embed(self.num_buckets, self.num_heads, std=std, name="distance_embedding")
        bias = biases(jnp.asarray(buckets)).transpose(2, 0, 1)[None]
        mask = (tokens != self.pad)[:, None, None]
        stack = T5Block(self.num_heads, self.head_channels, self.hidden, self.dtype, name=BLOCKS)
        x, _ = blocks.run(
            stack, x, bias, mask, count=self.num_layers, unroll=self.unroll, remat=self.remat
        )
        return nn.RMSNorm(1e-6, dtype=jnp.float32, name="output_norm")(x)


def distance_buckets(
    length: int, num_buckets: int, max_distance: int
) -> Int32[np.ndarray, "length length"]:
    """Returns the bucket of every pair of a query and a key, eqs. (3) and (4).

    Args:
        length: The number of tokens of a text.
        num_buckets: n, a multiple of 4.
        max_distance: All distances from this one on share a bucket.
    """
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    d, m = np.abs(distance), num_buckets // 4
    # Published models compute this in float32 and in this order, which matters at whole powers.
    log = np.log(np.maximum(d, 1).astype(np.float32) / np.float32(m))
    steps = log / np.float32(np.log(max_distance / m)) * np.float32(m)
    place = np.minimum(np.where(d < m, d, m + steps.astype(np.int32)), 2 * m - 1)
    return (place + 2 * m * (distance > 0)).astype(np.int32)
