"""Building blocks of the denoisers, channels last.

The blocks are those of the ADM / latent-diffusion UNet:

    residual block    y = skip(x) + conv(silu(norm(conv(silu(norm(x))) + W silu(e))))
                      or, with scale and shift, ... norm(.) * (1 + scale(e)) + shift(e) ...
    self-attention    y = x + W_o softmax(q k^T / sqrt(d)) v,   q, k, v = W norm(x)
    transformer       self-attention, cross-attention, GEGLU feed-forward, each on a layer norm

where e is the embedding of the diffusion time and, if there is one, of the label. Parameters and
statistics are float32; activations have the `dtype` of the module.

Sources: Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021, arXiv
2105.05233); Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022,
arXiv 2112.10752), appendix E; GEGLU: Shazeer (2020, arXiv 2002.05202).
"""

import functools
import math

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Real

from conprediff_jax.common import linear
from conprediff_jax.models.attention import attend

GROUPS = 32  # the number of groups in all group norms of these models
group_norm = functools.partial(nn.GroupNorm, GROUPS, epsilon=1e-5)  # with float32 statistics

Image = Float[Array, "batch height width channels"]
Tokens = Float[Array, "batch length channels"]
Embedding = Float[Array, "batch embedding"]


class Null(nn.Module):
    """A learned null text, which takes the place of texts that classifier-free guidance leaves out.

    Source: Tang et al. 2022, "Improved Vector Quantized Diffusion Models" (arXiv 2205.16007).
    """

    @nn.compact
    def __call__(self, text: Tokens, left_out: Bool[Array, "batch"]) -> Tokens:
        """Returns the text of every example, or the null text where `left_out` is True."""
        null = self.param("embedding", nn.initializers.normal(0.02), text.shape[1:])
        return jnp.where(left_out[:, None, None], null, text).astype(text.dtype)


def condition(
    model: nn.Module,
    label: Int[Array, "batch"] | None,
    text: Tokens | None,
    unconditional: Bool[Array, "batch"] | None,
) -> tuple[Int[Array, "batch"] | None, Tokens | None]:
    """Checks label and text of a denoiser, and replaces them by the null where unconditional.

    Args:
        model: A module with `num_classes`, `text_dim` and `learned_null`. With a learned null,
            labels are 0 .. num_classes, of which the last is the null, and a model with text gets a
            parameter `null_text`.
        label: The classes, if and only if the model has `num_classes`.
        text: The text tokens, if and only if the model has `text_dim`.
        unconditional: True for examples to denoise without label and text. None means no example.

    Raises:
        ValueError: The presence of an argument, or the shape of the text, does not fit.
    """
    for name, value, option in [("label", label, "num_classes"), ("text", text, "text_dim")]:
        size = getattr(model, option)
        if (value is None) != (size is None):
            given = "missing" if value is None else "given"
            raise ValueError(f"{name} is {given}, but the model has {option}={size}")
    if text is not None and text.shape[-1] != model.text_dim:
        raise ValueError(f"text of {text.shape[-1]} channels, but text_dim={model.text_dim}")
    if not model.learned_null:
        if unconditional is not None:
            raise ValueError("unconditional is given, but the model has learned_null=False")
        return label, text
    if unconditional is None:
        given = label if text is None else text
        unconditional = jnp.zeros(len(given), bool)
    if label is not None:
        label = jnp.where(unconditional, model.num_classes, label)
    if text is not None:
        text = Null(name="null_text")(text, unconditional)
    return label, text


def timestep_embedding(
    t: Real[Array, "batch"],
    features: int,
    max_period: float = 10_000.0,
    *,
    endpoint: bool = False,
    sine_first: bool = False,
) -> Float[Array, "batch features"]:
    """Sinusoidal embedding of the diffusion time, in float32.

    `[cos(t w_0), ..., cos(t w_{h-1}), sin(t w_0), ..., sin(t w_{h-1})]` with `h = features / 2` and
    `w_i = max_period ** (-i / h)`: cosines first, as in ADM and latent diffusion.

    Args:
        t: Times 0 .. T-1, integer or fractional.
        features: The size of the embedding, an even number.
        max_period: The longest wavelength divided by 2 pi.
        endpoint: Whether the lowest frequency is exactly `1 / max_period`, so that the exponent is
            `-i / (h - 1)`, as in the original DDPM.
        sine_first: Whether the sines precede the cosines, as in the original DDPM.
    """
    half = features // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / (half - endpoint)
    frequencies = jnp.exp(-math.log(max_period) * exponents)  # rounded as in published models
    angles = t.astype(jnp.float32)[:, None] * frequencies
    waves = [jnp.cos(angles), jnp.sin(angles)]
    return jnp.concatenate(waves[::-1] if sine_first else waves, axis=-1)


def convolution(
    channels: int,
    *,
    stride: int = 1,
    centered: bool = True,
    zero: bool = False,
    dtype: DTypeLike = jnp.float32,
    name: str,
) -> linear.Conv:
    """A 3x3 convolution, whose kernel starts at zero if `zero` is set.

    It pads every side by one pixel if `centered` is set. Otherwise the padding is "SAME", so that a
    strided convolution pads below and to the right only.
    """
    kernel_init = nn.initializers.zeros if zero else nn.initializers.lecun_normal()
    padding = 1 if centered else "SAME"
    return linear.Conv(
        channels, (3, 3), stride, padding=padding, kernel_init=kernel_init, dtype=dtype, name=name
    )


def upsample(x: Image) -> Float[Array, "batch height2 width2 channels"]:
    """Nearest-neighbour upsampling by two."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def downsample(x: Image) -> Float[Array, "batch height2 width2 channels"]:
    """Downsampling by two: the mean of every 2x2 pixels."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


class ResidualBlock(nn.Module):
    """Residual block that reads the time embedding and may change the resolution.

    Attributes:
        channels: The number of output channels.
        scale_shift: Whether the embedding scales and shifts the second norm. Otherwise it is added
            to the input of that norm.
        resample: 'up' or 'down' to change the resolution of both branches after the first
            activation (ADM's `resblock_updown`), or None.
        dropout: The dropout rate before the second convolution. At 0 nothing is drawn.
        dtype: The dtype of the activations.
        epsilon: The epsilon of the group norms.
    """

    channels: int
    scale_shift: bool = False
    resample: str | None = None
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self, x: Image, embedding: Embedding | None = None
    ) -> Float[Array, "batch height2 width2 channels2"]:
        """Maps an image to an image; the embedding, if there is one, is silu(e)."""
        norm = functools.partial(group_norm, epsilon=self.epsilon, dtype=self.dtype)
        h = nn.silu(norm(name="norm_in")(x))
        if self.resample:
            resample = {"up": upsample, "down": downsample}[self.resample]
            x, h = resample(x), resample(h)
        h = convolution(self.channels, dtype=self.dtype, name="conv_in")(h)

        norm_out = norm(name="norm_out")
        if embedding is None:
            h = norm_out(h)
        else:
            width = 2 * self.channels if self.scale_shift else self.channels
            e = linear.Dense(width, dtype=self.dtype, name="time")(embedding)[:, None, None]
            if self.scale_shift:
                scale, shift = jnp.split(e, 2, axis=-1)
                h = norm_out(h) * (1 + scale) + shift
            else:
                h = norm_out(h + e)
        h = nn.Dropout(self.dropout, deterministic=False)(nn.silu(h))
        h = convolution(self.channels, zero=True, dtype=self.dtype, name="conv_out")(h)

        if x.shape[-1] != self.channels:
            x = linear.Dense(self.channels, dtype=self.dtype, name="shortcut")(x)
        return x + h


class Resample(nn.Module):
    """Changes the resolution by two, by a strided convolution or by upsampling and a convolution.

    Attributes:
        direction: 'up' or 'down'.
        dtype: The dtype of the activations.
        centered: Whether the strided convolution pads every side. Otherwise it pads below and to
            the right only.
    """

    direction: str
    dtype: DTypeLike = jnp.float32
    centered: bool = True

    @nn.compact
    def __call__(self, x: Image) -> Float[Array, "batch height2 width2 channels"]:
        """Maps an image to one of twice or half its height and width."""
        conv = functools.partial(convolution, x.shape[-1], dtype=self.dtype, name="conv")
        if self.direction == "up":
            return conv()(upsample(x))
        return conv(stride=2, centered=self.centered)(x)


class Attention(nn.Module):
    """Multi-head attention from tokens to a context, which may be the tokens themselves.

    Attributes:
        heads: The number of heads, which must divide the channels of the tokens.
        qkv_bias: Whether the query, key and value projections have a bias.
        zero_init: Whether the output projection starts at zero.
        dtype: The dtype of the activations; the softmax is float32.
        kernel_init: The initialiser of the projections.
        kind: The kernel to use, see `attention.attend`.
    """

    heads: int
    qkv_bias: bool = True
    zero_init: bool = False
    dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    kind: str = "auto"

    @nn.compact
    def __call__(
        self, x: Tokens, context: Float[Array, "batch context_length context_channels"]
    ) -> Tokens:
        """Attends from every token of `x` to all tokens of `context`."""
        channels = x.shape[-1]
        project_to = functools.partial(linear.Dense, channels, dtype=self.dtype)

        def project(inputs: Array, name: str) -> Array:
            bias = {"use_bias": self.qkv_bias}
            projected = project_to(**bias, kernel_init=self.kernel_init, name=name)(inputs)
            return projected.reshape(*inputs.shape[:-1], self.heads, channels // self.heads)

        query = project(x, "query")
        values = attend(query, project(context, "key"), project(context, "value"), self.kind)
        init = nn.initializers.zeros if self.zero_init else self.kernel_init
        return project_to(kernel_init=init, name="out")(values.reshape(x.shape))


class SelfAttentionBlock(nn.Module):
    """Residual self-attention over the pixels of an image (ADM's attention block).

    Attributes:
        heads: The number of heads.
        dtype: The dtype of the activations.
        epsilon: The epsilon of the group norm.
        kind: The kernel of attention, see `attention.attend`.
    """

    heads: int
    dtype: DTypeLike = jnp.float32
    epsilon: float = 1e-5
    kind: str = "auto"

    @nn.compact
    def __call__(self, x: Image) -> Image:
        """Maps an image to an image of the same shape."""
        norm = group_norm(epsilon=self.epsilon, dtype=self.dtype, name="norm")
        tokens = norm(x).reshape(len(x), -1, x.shape[-1])
        attention = Attention(
            self.heads, zero_init=True, dtype=self.dtype, kind=self.kind, name="attention"
        )
        return x + attention(tokens, tokens).reshape(x.shape)


class FeedForward(nn.Module):
    """GEGLU feed-forward layer W_out (W_in x * gelu(W_gate x)), hidden layers 4 times as wide as x.

    Attributes:
        dtype: The dtype of the activations.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        """Maps every token to a token, independently of the others."""
        channels = x.shape[-1]
        hidden = linear.Dense(4 * channels, dtype=self.dtype, name="in")(x)
        gate = linear.Dense(4 * channels, dtype=self.dtype, name="gate")(x)
        hidden = hidden * nn.gelu(gate, approximate=False)
        return linear.Dense(channels, dtype=self.dtype, name="out")(hidden)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each residual and after a layer norm.

    Attributes:
        heads: The number of heads of both attentions.
        dtype: The dtype of the activations.
        kind: The kernel of attention, see `attention.attend`.
    """

    heads: int
    dtype: DTypeLike = jnp.float32
    kind: str = "auto"

    @nn.compact
    def __call__(self, x: Tokens, text: Float[Array, "batch text_length text_channels"]) -> Tokens:
        """Maps image tokens to image tokens, with attention to the text tokens."""
        norm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=self.dtype)
        attention = functools.partial(
            Attention, self.heads, qkv_bias=False, dtype=self.dtype, kind=self.kind
        )
        h = norm(name="self_norm")(x)
        x = x + attention(name="self_attention")(h, h)
        h = norm(name="cross_norm")(x)
        x = x + attention(name="cross_attention")(h, text)
        h = norm(name="feed_forward_norm")(x)
        return x + FeedForward(dtype=self.dtype, name="feed_forward")(h)


class SpatialTransformer(nn.Module):
    """Residual transformer over the pixels of an image, with attention to a text.

    Attributes:
        heads: The number of heads.
        depth: The number of transformer blocks.
        dtype: The dtype of the activations.
        kind: The kernel of attention, see `attention.attend`.
    """

    heads: int
    depth: int = 1
    dtype: DTypeLike = jnp.float32
    kind: str = "auto"

    @nn.compact
    def __call__(self, x: Image, text: Float[Array, "batch text_length text_channels"]) -> Image:
        """Maps an image to an image of the same shape, with attention to the text tokens."""
        project_to = functools.partial(linear.Dense, x.shape[-1], dtype=self.dtype)
        # Latent diffusion has an epsilon of 1e-6 here, and of 1e-5 elsewhere in the UNet.
        h = group_norm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        h = project_to(name="project_in")(h.reshape(len(x), -1, x.shape[-1]))
        for i in range(self.depth):
            block = TransformerBlock(self.heads, self.dtype, self.kind, name=f"transformer_{i}")
            h = block(h, text)
        h = project_to(kernel_init=nn.initializers.zeros, name="project_out")(h)
        return x + h.reshape(x.shape)
