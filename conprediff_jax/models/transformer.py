"""The denoising transformer of VQ-Diffusion over a grid of tokens.

The embeddings of a token, its row and its column are added. Then come blocks of

    x + self_attention(AdaLN(x, t)),   x + cross_attention(AdaLN(x, t), text),   x + MLP(LN(x))  (1)
    AdaLN(x, t) = LN(x) (1 + scale) + shift,   [scale, shift] = W silu(e(t))                     (2)
    MLP(x) = W_out a(W_in x),                  a(x) = x sigmoid(1.702 x)                         (3)

and then a layer norm and a projection to logits of the codes. The embedding e is a table for a
process of T steps, as published, and a projection of sines and cosines for continuous times.
Without a text there is no cross-attention. With labels, the norm of the MLP is an AdaLN of the
label. The matrices of the MLP may be 3x3 convolutions.

The blocks are a stack, see `blocks`, and so are their parameters. The features that can be tapped
are those after every block, `block_1` .. `block_{num_layers}`, and those after the last norm,
`output`.

Parameter paths follow the scheme of the UNet:

    token_embedding   row_embedding   column_embedding   output_norm   output
    blocks/{self,cross}_norm/{index_embedding or time_embedding, modulation}
    blocks/feed_forward_norm
    blocks/{self,cross}_attention/{query, key, value, out}   blocks/feed_forward/{in, out}

Source: Gu et al. 2022, "Vector Quantized Diffusion Model for Text-to-Image Synthesis" (arXiv
2111.14822), section 4.1 and the published configurations.
"""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Real

from conprediff_jax.common import linear
from conprediff_jax.common.blocks import BLOCKS
from conprediff_jax.common.keys import adjustable, derived
from conprediff_jax.models import blocks, layers
from conprediff_jax.models.attention import check_kind
from conprediff_jax.models.denoiser import DENOISERS, OUTPUT, Denoised

_INIT = nn.initializers.normal(0.02)  # for embeddings and dense layers, as published
_dense = functools.partial(linear.Dense, kernel_init=_INIT)
_embed = functools.partial(linear.Embed, embedding_init=_INIT)
_layer_norm = functools.partial(nn.LayerNorm, epsilon=1e-5)  # with float32 statistics

Grid = Float[Array, "batch height width channels"]


class AdaLayerNorm(nn.Module):
    """Layer norm whose scale and shift depend on a time or a label, eq. (2).

    Attributes:
        num_embeddings: The number of times or labels; None for continuous times.
        dtype: The dtype of the activations.
    """

    num_embeddings: int | None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Grid, index: Real[Array, "batch"]) -> Grid:
        """Normalises the tokens of every example with the scale and shift of its time or label."""
        channels = x.shape[-1]
        if self.num_embeddings is None:
            waves = layers.timestep_embedding(index, channels).astype(self.dtype)
            e = _dense(channels, dtype=self.dtype, name="time_embedding")(waves)
        else:
            embed = _embed(self.num_embeddings, channels, dtype=self.dtype, name="index_embedding")
            e = embed(index)
        modulation = _dense(2 * channels, dtype=self.dtype, name="modulation")(nn.silu(e))
        scale, shift = jnp.split(modulation[:, None, None], 2, axis=-1)
        norm = _layer_norm(use_scale=False, use_bias=False, dtype=self.dtype, name="norm")
        return norm(x) * (1 + scale) + shift


class TokenFeedForward(nn.Module):
    """Feed-forward layer of the blocks, whose hidden width is 4 times that of the tokens, eq. (3).

    Attributes:
        convolutional: Whether the layers are 3x3 convolutions, which see neighbouring tokens.
        dtype: The dtype of the activations.
    """

    convolutional: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Grid) -> Grid:
        """Maps a grid of tokens to one of the same shape."""
        project = layers.convolution if self.convolutional else _dense
        h = project(4 * x.shape[-1], dtype=self.dtype, name="in")(x)
        h = h * jax.nn.sigmoid(1.702 * h)
        return project(x.shape[-1], dtype=self.dtype, name="out")(h)


class TokenBlock(nn.Module):
    """One block of the transformer, eq. (1).

    Attributes:
        num_heads: The number of heads of both attentions.
        num_steps: The number of times; None for continuous times.
        num_labels: The number of labels. It is not used without a label.
        convolutional: See `TokenFeedForward`.
        dropout: The dropout rate after each of the three branches. At 0 nothing is drawn.
        dtype: The dtype of the activations.
        attention: The kernel of attention, see `attention.attend`.
    """

    num_heads: int
    num_steps: int | None
    num_labels: int = 0
    convolutional: bool = False
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32
    attention: str = "auto"

    @nn.compact
    def __call__(
        self,
        x: Grid,
        t: Real[Array, "batch"],
        label: Int[Array, "batch"] | None,
        text: Float[Array, "batch text_length text_dim"] | None,
    ) -> Grid:
        """Maps a grid of tokens to one of the same shape, given time, label and text."""
        ada_norm = functools.partial(AdaLayerNorm, dtype=self.dtype)
        drop = nn.Dropout(self.dropout, deterministic=False)

        def attend(name: str, h: Array, context: Array | None = None) -> Array:
            tokens = h.reshape(len(h), -1, h.shape[-1])
            attention = layers.Attention(
                self.num_heads,
                dtype=self.dtype,
                kernel_init=_INIT,
                kind=self.attention,
                name=name,
            )
            attended = attention(tokens, tokens if context is None else context)
            return drop(attended.reshape(h.shape))

        h = ada_norm(self.num_steps, name="self_norm")(x, t)
        x = x + attend("self_attention", h)
        if text is not None:
            h = ada_norm(self.num_steps, name="cross_norm")(x, t)
            x = x + attend("cross_attention", h, text.astype(self.dtype))
        if label is None:
            h = _layer_norm(dtype=self.dtype, name="feed_forward_norm")(x)
        else:
            h = ada_norm(self.num_labels, name="feed_forward_norm")(x, label)
        feed_forward = TokenFeedForward(self.convolutional, self.dtype, name="feed_forward")
        return x + drop(feed_forward(h))


@DENOISERS.register("token_transformer")
class TokenTransformer(nn.Module):
    """Predicts logits of the clean tokens from a grid of noisy ones.

    Attributes:
        num_codes: K. Inputs are 0 .. K, where K is the mask; outputs are logits of the K codes.
        grid: The height and width of the grid of tokens.
        position_grid: The height and width of the grid for which rows and columns have embeddings.
            None means `grid`. The tokens take its positions in reading order, whatever their own
            row and column. The published models of 16x16 tokens have a position grid of 32x32.
        width: The number of channels of a token, a multiple of `num_heads`.
        num_layers: The number of blocks.
        num_heads: The number of attention heads.
        num_steps: T. Times are 0 .. T-1. None means that times are continuous, from 0 to
            about 1,000; `layers.timestep_embedding` embeds them.
        text_dim: The number of channels of text tokens; None for a model without text.
        num_classes: The number of classes; None for a model without labels.
        learned_null: Whether the model learns a null label or null text for a condition that is
            left out, as classifier-free guidance needs it.
        convolutional: Whether feed-forward layers are convolutions, as in the published models of
            16x16 tokens.
        dropout: The dropout rate after attention and feed-forward layers, in training. It draws
            from the stream "dropout".
        dtype: The dtype of the activations. Parameters and the output are float32.
        attention: The kernel of attention: 'auto' for the one that suits the devices, 'xla',
            'cudnn' or 'flash'; see `attention.attend`.
        remat: Whether blocks are recomputed in the backward pass.
        remat_policy: What is not recomputed but kept, besides the input of a block. A key of
            `blocks.REMAT_POLICIES`: 'nothing', or the 'products' of its layers.
        unroll: Whether the program has the blocks one after another instead of a loop. It takes
            longer to compile.

    Raises:
        ValueError: An option is out of range; the constructor raises it.
    """

    num_codes: int = derived()
    grid: Sequence[int] = derived()
    width: int
    num_layers: int
    num_heads: int
    num_steps: int | None = derived(100)
    position_grid: Sequence[int] | None = None
    text_dim: int | None = derived(None)
    num_classes: int | None = None
    learned_null: bool = derived(False)
    convolutional: bool = False
    dropout: float = adjustable(0.0)
    dtype: DTypeLike = derived(jnp.float32)
    attention: str = adjustable("auto")
    remat: bool = adjustable(False)
    remat_policy: str = adjustable("nothing")
    unroll: bool = adjustable(False)

    discrete = True
    downsampling = None  # positions are learned, so the model reads one grid only

    def __post_init__(self):
        _validate(self)
        super().__post_init__()

    @property
    def tap_names(self) -> tuple[str, ...]:
        """The names of the features that can be tapped, in the order of computation."""
        return (*blocks.tap_names(self.num_layers), OUTPUT)

    @nn.compact
    def __call__(
        self,
        x: Int[Array, "batch height width"],
        t: Real[Array, "batch"],
        *,
        label: Int[Array, "batch"] | None = None,
        text: Float[Array, "batch text_length text_dim"] | None = None,
        unconditional: Bool[Array, "batch"] | None = None,
        train: bool = False,
        taps: Sequence[str] = (),
    ) -> Denoised:
        """Denoises a batch of grids.

        Args:
            x: Noisy tokens 0 .. K.
            t: Diffusion times, 0 .. T-1 or continuous.
            label: The classes, if and only if the model has `num_classes`.
            text: The text tokens, if and only if the model has `text_dim`.
            unconditional: True for examples to denoise without label and text. It needs
                `learned_null`.
            train: Whether dropout is active.
            taps: The features to return as well, by their `tap_names`.

        Returns:
            The logits, `[batch, height, width, K]` in float32, the features after the last norm,
            `[batch, height, width, width of the model]` in `dtype`, and the tapped ones in the same
            shape.

        Raises:
            ValueError: The shape of `x`, or the presence of `label` or `text`, does not fit.
        """
        self._check_shape(x)
        label, text = layers.condition(self, label, text, unconditional)
        h, named = blocks.run(
            TokenBlock(
                num_heads=self.num_heads,
                num_steps=self.num_steps,
                num_labels=(self.num_classes or 0) + self.learned_null,
                convolutional=self.convolutional,
                dropout=self.dropout if train else 0.0,
                dtype=self.dtype,
                attention=self.attention,
                name=BLOCKS,
            ),
            self._embed_tokens(x),
            t,
            label,
            text,
            count=self.num_layers,
            taps=[name for name in taps if name != OUTPUT],
            unroll=self.unroll,
            remat=self.remat,
            policy=self.remat_policy,
        )
        features = _layer_norm(dtype=self.dtype, name="output_norm")(h)
        named[OUTPUT] = features
        # This is float32, since logits need more than the three digits of bfloat16.
        output = _dense(self.num_codes, dtype=jnp.float32, name="output")(features)
        return Denoised(output, features, {name: named[name] for name in taps})

    def _embed_tokens(self, x: Int[Array, "batch height width"]) -> Grid:
        """Returns the sums of the embeddings of tokens, rows and columns."""
        embed = functools.partial(_embed, features=self.width, dtype=self.dtype)
        h = embed(self.num_codes + 1, name="token_embedding")(x)
        rows, columns = self.position_grid or self.grid
        row = embed(rows, name="row_embedding")(jnp.arange(rows))
        column = embed(columns, name="column_embedding")(jnp.arange(columns))
        places = (row[:, None] + column).reshape(rows * columns, self.width)
        return h + places[: math.prod(self.grid)].reshape(*self.grid, self.width)

    def _check_shape(self, x: Array) -> None:
        """Raises ValueError if the shape of the input does not fit the options."""
        if x.shape[1:] != tuple(self.grid):
            raise ValueError(f"grid of {x.shape[1:]} tokens, but the model has {tuple(self.grid)}")


def _validate(model: TokenTransformer) -> None:
    """Raises ValueError if an option of the model is out of range."""
    for option in ["num_codes", "width", "num_layers", "num_heads"]:
        if getattr(model, option) < 1:
            raise ValueError(f"{option}={getattr(model, option)} must be at least 1")
    if model.width % model.num_heads:
        raise ValueError(f"num_heads={model.num_heads} must divide width={model.width}")
    if len(model.grid) != 2 or min(model.grid) < 1:
        raise ValueError(f"grid={tuple(model.grid)} must be a height and a width, at least 1 each")
    if model.position_grid and math.prod(model.position_grid) < math.prod(model.grid):
        raise ValueError(
            f"position_grid={tuple(model.position_grid)} has fewer places than "
            f"grid={tuple(model.grid)}"
        )
    for option in ["num_steps", "text_dim", "num_classes"]:
        value = getattr(model, option)
        if value is not None and value < 1:
            raise ValueError(f"{option}={value} must be None or at least 1")
    check_kind(model.attention)
    blocks.check_policy(model.remat_policy)
    if not 0 <= model.dropout < 1:
        raise ValueError(f"dropout={model.dropout} must be in [0, 1)")
