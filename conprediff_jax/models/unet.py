"""The denoising UNet of ADM and latent diffusion, channels last.

It has these parts, in this order:

    a convolution to `channels`
    a down path of levels, with `blocks_per_level` residual blocks each and attention at some
    a middle: a residual block, attention, a residual block
    an up path that mirrors the down path and reads all of its feature maps by concatenation
    a group norm, SiLU and a convolution

With `text_dim`, spatial transformers take the place of attention. Parameter paths follow one
scheme, on which sharding rules and checkpoint converters rely:

    time_embedding_{in,out}   label_embedding   input_conv   output_norm   output_conv
    {down,up}_{level}_block_{i}, middle_block_{i}, {down,up}_{level}_resample
    {down,up}_{level}_attention_{i}, middle_attention

Levels are counted from the full resolution in both paths. `layers.py` has the parameters below
these paths.

Features can be tapped (see `denoiser.Denoised`) at the end of every level of the down path and the
up path, before the resolution changes, and where a level of the up path begins; level l has a grid
that is 2^l times as coarse as that of the points:

    down_{level}   middle   up_{level}_in (for all levels but the lowest)   up_{level}   output

Sources: Dhariwal and Nichol (2021, arXiv 2105.05233); Rombach et al. (2022, arXiv 2112.10752). Four
options make the UNet of the original DDPM: Ho et al. (2020, arXiv 2006.11239).
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Real

from conprediff_jax.common import linear
from conprediff_jax.common.keys import adjustable, derived
from conprediff_jax.models import blocks, layers
from conprediff_jax.models.attention import check_kind
from conprediff_jax.models.denoiser import DENOISERS, OUTPUT, Denoised


@DENOISERS.register("unet")
class UNet(nn.Module):
    """Predicts what the process needs (noise, clean points or v) from noisy points.

    Attributes:
        out_channels: The number of channels of the prediction.
        channels: The number of channels at the full resolution. The channels of every level are
            multiples of 32.
        channel_mult: The number of channels of each level, as a multiple of `channels`.
        blocks_per_level: The number of residual blocks of a level of the down path. A level of the
            up path has one more.
        attention_downsampling: The downsampling factors (1, 2, 4, ...) at which there is attention,
            as in latent diffusion's "attention_resolutions". The middle always has attention.
        num_heads: The number of attention heads at every level. Give either this or
            `head_channels`.
        head_channels: The number of channels per head.
        scale_shift_norm: Whether the time embedding scales and shifts norms. Otherwise it is added
            to features.
        resblock_updown: Whether residual blocks change the resolution. Otherwise convolutions do.
        dropout: The dropout rate inside residual blocks, in training. It draws from the stream
            "dropout".
        num_classes: The number of classes; None for a model without labels.
        norm_epsilon: The epsilon of the group norms, but not of those of spatial transformers. It
            is 1e-6 in the original DDPM, and so are the next three the other way round there.
        time_endpoint: Whether the lowest frequency of the time embedding is exactly 1/10000; see
            `layers.timestep_embedding`.
        sine_first: Whether the sines precede the cosines in the time embedding.
        centered_downsampling: Whether strided convolutions pad every side. Otherwise they pad below
            and to the right only.
        learned_null: Whether the model learns a null label or null text for a condition that is
            left out, as classifier-free guidance needs it.
        text_dim: The number of channels of text tokens; None for a model without text.
        transformer_depth: The number of blocks of each spatial transformer, used with `text_dim`.
        dtype: The dtype of the activations. Parameters and the output are float32.
        attention: The kernel of attention: 'auto' for the one that suits the devices, 'xla',
            'cudnn' or 'flash'; see `attention.attend`.
        remat: Whether residual and attention blocks are recomputed in the backward pass.
        remat_policy: What is not recomputed but kept, besides the input of a block. A key of
            `blocks.REMAT_POLICIES`: 'nothing', or the 'products' of its layers.

    Raises:
        ValueError: Options contradict each other; the constructor raises it.
    """

    out_channels: int = derived()
    channels: int
    channel_mult: Sequence[int]
    blocks_per_level: int = 2
    attention_downsampling: Sequence[int] = ()
    num_heads: int | None = None
    head_channels: int | None = None
    scale_shift_norm: bool = False
    resblock_updown: bool = False
    dropout: float = adjustable(0.0)
    num_classes: int | None = None
    norm_epsilon: float = 1e-5
    time_endpoint: bool = False
    sine_first: bool = False
    centered_downsampling: bool = True
    learned_null: bool = derived(False)
    text_dim: int | None = derived(None)
    transformer_depth: int = 1
    dtype: DTypeLike = derived(jnp.float32)
    attention: str = adjustable("auto")
    remat: bool = adjustable(False)
    remat_policy: str = adjustable("nothing")

    discrete = False

    def __post_init__(self):
        _validate(self)
        super().__post_init__()

    @property
    def downsampling(self) -> int:
        """The factor between the full and the lowest resolution, which must divide grid sides."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def tap_names(self) -> tuple[str, ...]:
        """The names of the features that can be tapped, in the order of computation."""
        levels = range(len(self.channel_mult))
        up = [name for level in levels for name in (f"up_{level}", f"up_{level}_in")]
        return (*(f"down_{level}" for level in levels), "middle", *up[-2::-1], OUTPUT)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width in_channels"],
        t: Real[Array, "batch"],
        *,
        label: Int[Array, "batch"] | None = None,
        text: Float[Array, "batch text_length text_dim"] | None = None,
        unconditional: Bool[Array, "batch"] | None = None,
        train: bool = False,
        taps: Sequence[str] = (),
    ) -> Denoised:
        """Denoises a batch.

        Args:
            x: Noisy points. Height and width are multiples of `downsampling`.
            t: Diffusion times, integer or fractional; see `Process.network_time`.
            label: The classes, if and only if the model has `num_classes`.
            text: The text tokens, if and only if the model has `text_dim`.
            unconditional: True for examples to denoise without label and text. It needs
                `learned_null`.
            train: Whether dropout is active.
            taps: The features to return as well, by their `tap_names`.

        Returns:
            The output, `[batch, height, width, out_channels]` in float32, the features after the
            last norm and SiLU, `[batch, height, width, channels]` in `dtype`, and the tapped ones.

        Raises:
            ValueError: The shape of `x`, or the presence of `label` or `text`, does not fit.
        """
        self._check_shape(x)
        label, text = layers.condition(self, label, text, unconditional)
        stage, middle, resample = self._blocks(self._embed(t, label), text, train)
        levels = range(len(self.channel_mult))
        h = layers.convolution(self.channels, dtype=self.dtype, name="input_conv")(x)
        skips, named = [h], {}
        for level in levels:
            for i in range(self.blocks_per_level):
                h = stage(h, level, "down", i)
                skips.append(h)
            named[f"down_{level}"] = h
            if level < levels[-1]:
                h = resample(h, level, "down")
                skips.append(h)

        named["middle"] = h = middle(h)
        for level in reversed(levels):
            for i in range(self.blocks_per_level + 1):
                h = stage(jnp.concatenate([h, skips.pop()], axis=-1), level, "up", i)
            named[f"up_{level}"] = h
            if level > 0:
                named[f"up_{level - 1}_in"] = h = resample(h, level, "up")

        norm = layers.group_norm(epsilon=self.norm_epsilon, dtype=self.dtype, name="output_norm")
        features = nn.silu(norm(h))
        named[OUTPUT] = features
        # This is float32, since predictions need more than the three digits of bfloat16.
        output = layers.convolution(self.out_channels, zero=True, name="output_conv")(features)
        return Denoised(output, features, {name: named[name] for name in taps})

    def _embed(
        self, t: Real[Array, "batch"], label: Int[Array, "batch"] | None
    ) -> Float[Array, "batch embedding"]:
        """Returns silu(e), the embedding of time and label that residual blocks read."""
        width = 4 * self.channels
        dense = functools.partial(linear.Dense, width, dtype=self.dtype)
        e = layers.timestep_embedding(
            t, self.channels, endpoint=self.time_endpoint, sine_first=self.sine_first
        )
        e = nn.silu(dense(name="time_embedding_in")(e))
        e = dense(name="time_embedding_out")(e)
        if label is not None:
            init = nn.initializers.normal(1.0)
            embed = linear.Embed(
                self.num_classes + self.learned_null,
                width,
                self.dtype,
                embedding_init=init,
                name="label_embedding",
            )
            e = e + embed(label)
        return nn.silu(e)

    @nn.nowrap
    def _blocks(
        self, embedding: Array, text: Array | None, train: bool
    ) -> tuple[Callable[..., Array], ...]:
        """Returns functions that apply a block of a level, the middle, and a resampling layer."""
        remat = functools.partial(blocks.recomputed, remat=self.remat, policy=self.remat_policy)

        def residual(h: Array, level: int, name: str, resample: str | None = None) -> Array:
            block = remat(layers.ResidualBlock)(
                channels=self.channels * self.channel_mult[level],
                scale_shift=self.scale_shift_norm,
                resample=resample,
                dropout=self.dropout if train else 0.0,
                dtype=self.dtype,
                epsilon=self.norm_epsilon,
                name=name,
            )
            return block(h, embedding)

        def attention(h: Array, name: str) -> Array:
            heads = self.num_heads or h.shape[-1] // self.head_channels
            if text is None:
                block = remat(layers.SelfAttentionBlock)
                return block(heads, self.dtype, self.norm_epsilon, self.attention, name=name)(h)
            transformer = remat(layers.SpatialTransformer)(
                heads, self.transformer_depth, self.dtype, self.attention, name=name
            )
            return transformer(h, text)

        def stage(h: Array, level: int, path: str, i: int) -> Array:
            h = residual(h, level, f"{path}_{level}_block_{i}")
            if 2**level in self.attention_downsampling:
                h = attention(h, f"{path}_{level}_attention_{i}")
            return h

        def middle(h: Array) -> Array:
            lowest = len(self.channel_mult) - 1
            h = residual(h, lowest, "middle_block_0")
            h = attention(h, "middle_attention")
            return residual(h, lowest, "middle_block_1")

        def resample(h: Array, level: int, direction: str) -> Array:
            name = f"{direction}_{level}_resample"
            if self.resblock_updown:
                return residual(h, level, name, direction)
            centered = self.centered_downsampling
            return layers.Resample(direction, self.dtype, centered, name=name)(h)

        return stage, middle, resample

    def _check_shape(self, x: Array) -> None:
        """Raises ValueError if the shape of the input does not fit the options."""
        height, width = x.shape[1:3]
        if height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"image of {height} x {width}: both must be multiples of {self.downsampling}, the"
                f" downsampling of {len(self.channel_mult)} levels"
            )


def _validate(unet: UNet) -> None:
    """Raises ValueError if options of the model contradict each other."""
    check_kind(unet.attention)
    blocks.check_policy(unet.remat_policy)
    widths = [unet.channels * mult for mult in unet.channel_mult]
    if not widths or min(widths) < 1 or any(width % layers.GROUPS for width in widths):
        raise ValueError(
            f"channels={unet.channels} times channel_mult={tuple(unet.channel_mult)}: every level"
            f" needs a positive multiple of {layers.GROUPS}"
        )
    factors = [2**level for level in range(len(widths))]
    if not set(unet.attention_downsampling) <= set(factors):
        raise ValueError(
            f"attention_downsampling={tuple(unet.attention_downsampling)}: choose among {factors}"
        )
    if (unet.num_heads is None) == (unet.head_channels is None):
        raise ValueError(
            f"num_heads={unet.num_heads}, head_channels={unet.head_channels}: give exactly one"
        )
    option = "head_channels" if unet.num_heads is None else "num_heads"
    divisor = getattr(unet, option)
    attended = [widths[factors.index(factor)] for factor in unet.attention_downsampling]
    for width in [*attended, widths[-1]]:
        if divisor < 1 or width % divisor:
            raise ValueError(f"{option}={divisor} must divide {width}, the channels of a level")
    for option in ["out_channels", "blocks_per_level", "transformer_depth"]:
        if getattr(unet, option) < 1:
            raise ValueError(f"{option}={getattr(unet, option)} must be at least 1")
    for option in ["num_classes", "text_dim"]:
        value = getattr(unet, option)
        if value is not None and value < 1:
            raise ValueError(f"{option}={value} must be None or at least 1")
    if unet.norm_epsilon <= 0:
        raise ValueError(f"norm_epsilon={unet.norm_epsilon} must be above 0")
    if not 0 <= unet.dropout < 1:
        raise ValueError(f"dropout={unet.dropout} must be in [0, 1)")
