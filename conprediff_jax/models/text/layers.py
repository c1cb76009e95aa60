"""The layers of the text encoders, and the transformer that CLIP and BERT share."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from conprediff_jax.common import linear
from conprediff_jax.common.blocks import BLOCKS
from conprediff_jax.models import blocks
from conprediff_jax.models.layers import Tokens
from conprediff_jax.models.text.encoder import Encoded, TextEncoder, TokenIds, check_length

# The keys are the names in published configs. "gelu_new" is the approximation of GELU by tanh.
ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
}


class Attention(nn.Module):
    """Multi-head self-attention of the tokens of a text.

    Attributes:
        heads: The number of heads.
        head_channels: The number of channels of a head. Together the heads may be wider or narrower
            than a token.
        qkv_bias: Whether the query, key and value projections have a bias.
        out_bias: Whether the output projection has a bias.
        causal: Whether a token sees only itself and the tokens before it.
        scale: The factor on the logits. None means one over the root of `head_channels`.
        query_gain: The factor on the variance of the initial query projection.
        dtype: The dtype of the activations; the softmax is float32.
    """

    heads: int
    head_channels: int
    qkv_bias: bool = True
    out_bias: bool = True
    causal: bool = False
    scale: float | None = None
    query_gain: float = 1.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        bias: Float[Array, "1 heads length length"] | None = None,
        mask: Bool[Array, "batch 1 1 length"] | None = None,
    ) -> Tokens:
        """Attends from every token to every token that it may see.

        Args:
            x: The tokens.
            bias: Numbers that are added to the logits, or None.
            mask: False for keys that are hidden, or None.
        """

        def project(name: str, gain: float = 1.0) -> Array:
            dense = linear.Dense(
                self.heads * self.head_channels,
                use_bias=self.qkv_bias,
                kernel_init=nn.initializers.variance_scaling(gain, "fan_in", "truncated_normal"),
                dtype=self.dtype,
                name=name,
            )
            return dense(x).reshape(*x.shape[:-1], self.heads, self.head_channels)

        values = jax.nn.dot_product_attention(
            project("query", self.query_gain),
            project("key"),
            project("value"),
            bias=bias,
            mask=mask,
            scale=self.scale,
            is_causal=self.causal,
        )
        out = linear.Dense(x.shape[-1], use_bias=self.out_bias, dtype=self.dtype, name="out")
        return out(values.reshape(*x.shape[:-1], -1))


class FeedForward(nn.Module):
    """Two dense layers, of which the first may be gated.

    Attributes:
        hidden: The number of channels between the two layers.
        activation: A key of `ACTIVATIONS`.
        gated: Whether the activation acts on a gate, eq. (2). Then there are no biases.
        dtype: The dtype of the activations.
    """

    hidden: int
    activation: str
    gated: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        """Maps every token to a token, independently of the others."""
        dense = functools.partial(linear.Dense, use_bias=not self.gated, dtype=self.dtype)
        activation = ACTIVATIONS[self.activation]
        h = activation(dense(self.hidden, name="gate" if self.gated else "in")(x))
        if self.gated:
            h = h * dense(self.hidden, name="in")(x)
        return dense(x.shape[-1], name="out")(h)


class Block(nn.Module):
    """A block with layer norms, eq. (1). The image encoder of CLIP has it too.

    Attributes:
        heads: The number of heads.
        head_channels: The number of channels of a head.
        hidden: The number of hidden channels of the feed-forward layers.
        activation: A key of `ACTIVATIONS`.
        causal: See `Attention`.
        qkv_bias: See `Attention`.
        dtype: The dtype of the activations.
    """

    heads: int
    head_channels: int
    hidden: int
    activation: str
    causal: bool = False
    qkv_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        """Maps tokens to tokens."""
        norm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=self.dtype)
        attention = Attention(
            self.heads,
            self.head_channels,
            qkv_bias=self.qkv_bias,
            causal=self.causal,
            dtype=self.dtype,
            name="attention",
        )
        feed_forward = FeedForward(
            self.hidden, self.activation, dtype=self.dtype, name="feed_forward"
        )
        x = x + attention(norm(name="attention_norm")(x))
        return x + feed_forward(norm(name="feed_forward_norm")(x))


def embedding(rows: int, width: int, std: float, dtype: DTypeLike, name: str) -> linear.Embed:
    """A table of vectors, which are initially normal with deviation `std`."""
    init = nn.initializers.normal(std)
    return linear.Embed(rows, width, embedding_init=init, dtype=dtype, name=name)


def encode(encoder: TextEncoder, tokens: TokenIds, **options: Any) -> Encoded:
    """Applies token and position embeddings, blocks and a norm. Call it inside `encoder.__call__`.

    Args:
        encoder: The module that gives the sizes, and of which the layers become submodules.
        tokens: Token ids, `encoder.length` for every text.
        **options: Further options of every `Block`.

    Raises:
        ValueError: The texts do not have `encoder.length` tokens.
    """
    check_length(encoder, tokens)
    sizes = {"width": encoder.width, "std": 0.02, "dtype": encoder.dtype}
    x = embedding(encoder.vocab_size, **sizes, name="token_embedding")(tokens)
    positions = embedding(encoder.length, **sizes, name="position_embedding")
    x = x + positions(jnp.arange(encoder.length))
    stack = Block(
        encoder.num_heads, hidden=encoder.hidden, dtype=encoder.dtype, name=BLOCKS, **options
    )
    x, _ = blocks.run(
        stack, x, count=encoder.num_layers, unroll=encoder.unroll, remat=encoder.remat
    )
    return nn.LayerNorm(1e-5, dtype=jnp.float32, name="output_norm")(x)
