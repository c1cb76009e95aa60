"""The first-stage autoencoders of latent diffusion, channels last.

The encoder is a convolution to `channels`, levels of residual blocks with a strided convolution
between them, a middle of block, attention and block, and then a group norm, SiLU and a convolution.
The decoder mirrors it, with one more block at every level. Between the two are the latents:

    VQModel        z = W encoder(x),                  x' = decoder(W' code nearest to z)
    AutoencoderKL  mean, log variance = W encoder(x), x' = decoder(W' z), z ~ N(mean, variance)

They differ from the UNet in four points: blocks do not depend on a time, attention has one head,
group norms have epsilon 1e-6, and strided convolutions pad below and to the right only. Parameters
and latents are float32. Residual branches start at zero, as in the UNet; in the original code they
start at random.

Below `encoder` and `decoder`, parameter paths follow the scheme of the UNet, with levels counted
from the full resolution in both. Beside them are `quant_conv` (W), `post_quant_conv` (W') and
`quantizer/codebook`.

Sources: Rombach et al. (2022, arXiv 2112.10752), section 3.1 and appendix G; Esser et al., "Taming
Transformers" (2021, arXiv 2012.09841); Kingma and Welling (2014, arXiv 1312.6114), appendix B.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from conprediff_jax.common.keys import adjustable, derived
from conprediff_jax.models import blocks, layers
from conprediff_jax.models.quantizer import Quantized, VectorQuantizer

EPSILON = 1e-6  # for all group norms of the autoencoders

Images = Float[Array, "batch height width channels"]
Latents = Float[Array, "batch rows columns embed_dim"]


class Levels(nn.Module):
    """The options that encoders, decoders and whole autoencoders share.

    Attributes:
        out_channels: The number of channels of the output.
        channels: The number of channels at the full resolution, a multiple of 32.
        channel_mult: The number of channels of each level, as a multiple of `channels`.
        blocks_per_level: The number of residual blocks of a level of the encoder. A level of the
            decoder has one more.
        patch: The side of patches, in pixels, that are gathered into channels before the first
            convolution and spread out after the last. This makes small models cheap. The full
            resolution is then that of patches. All published models have 1.
        attention_downsampling: The downsampling factors (1, 2, 4, ...) at which there is attention,
            counted from the full resolution.
        middle_attention: Whether the middle has attention. All published models have it, also those
            that are called "without attention".
        dropout: The dropout rate inside residual blocks, in training. It draws from the stream
            "dropout".
        dtype: The dtype of the activations. Parameters and outputs are float32.
        remat: Whether residual and attention blocks are recomputed in the backward pass.

    Raises:
        ValueError: Options contradict each other; the constructor raises it.
    """

    out_channels: int = derived(3)
    channels: int = 128
    channel_mult: Sequence[int] = (1, 2, 4)
    blocks_per_level: int = 2
    patch: int = 1
    attention_downsampling: Sequence[int] = ()
    middle_attention: bool = True
    dropout: float = adjustable(0.0)
    dtype: DTypeLike = derived(jnp.float32)
    remat: bool = adjustable(False)

    def __post_init__(self):
        _validate(self)
        super().__post_init__()

    @property
    def downsampling(self) -> int:
        """The factor between the sides of images and latents, which must divide image sizes."""
        return self.patch * 2 ** (len(self.channel_mult) - 1)

    @nn.nowrap
    def _blocks(self, train: bool) -> tuple[Callable[..., Array], ...]:
        """Returns functions that apply the blocks of a level, the middle, and the output layers."""
        remat = functools.partial(blocks.recomputed, remat=self.remat)

        def residual(h: Array, level: int, name: str) -> Array:
            block = remat(layers.ResidualBlock)(
                self.channels * self.channel_mult[level],
                dropout=self.dropout if train else 0.0,
                dtype=self.dtype,
                epsilon=EPSILON,
                name=name,
            )
            return block(h)

        def attention(h: Array, name: str) -> Array:
            return remat(layers.SelfAttentionBlock)(1, self.dtype, EPSILON, name=name)(h)

        def stage(h: Array, level: int, direction: str, blocks: int) -> Array:
            for i in range(blocks):
                h = residual(h, level, f"{direction}_{level}_block_{i}")
                if 2**level in self.attention_downsampling:
                    h = attention(h, f"{direction}_{level}_attention_{i}")
            return h

        def middle(h: Array) -> Array:
            lowest = len(self.channel_mult) - 1
            h = residual(h, lowest, "middle_block_0")
            if self.middle_attention:
                h = attention(h, "middle_attention")
            return residual(h, lowest, "middle_block_1")

        def output(h: Array, channels: int) -> Array:
            norm = layers.group_norm(epsilon=EPSILON, dtype=self.dtype, name="output_norm")
            # This is float32, since latents and pixels need more than the digits of bfloat16.
            return layers.convolution(channels, name="output_conv")(nn.silu(norm(h)))

        return stage, middle, output


class Encoder(Levels):
    """Turns images into feature maps of 1 / `downsampling` of their height and width.

    Its attributes are those of `Levels`.
    """

    @nn.compact
    def __call__(
        self, x: Images, *, train: bool = False
    ) -> Float[Array, "batch rows columns out_channels"]:
        """Encodes a batch of images. `train` turns dropout on.

        Raises:
            ValueError: The height or width is not a multiple of `downsampling`.
        """
        height, width = x.shape[1:3]
        if height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"image of {height} x {width}: both must be multiples of {self.downsampling}, the"
                f" downsampling of {len(self.channel_mult)} levels on patches of {self.patch}"
            )
        stage, middle, output = self._blocks(train)
        p = self.patch
        h = rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=p, q=p)
        h = layers.convolution(self.channels, dtype=self.dtype, name="input_conv")(h)
        for level in range(len(self.channel_mult)):
            if level > 0:
                name = f"down_{level - 1}_resample"
                h = layers.Resample("down", self.dtype, centered=False, name=name)(h)
            h = stage(h, level, "down", self.blocks_per_level)
        return output(middle(h), self.out_channels)


class Decoder(Levels):
    """Turns feature maps into images of `downsampling` times their height and width.

    Its attributes are those of `Levels`.
    """

    @nn.compact
    def __call__(
        self, h: Float[Array, "batch rows columns features"], *, train: bool = False
    ) -> Float[Array, "batch height width out_channels"]:
        """Decodes a batch of feature maps. `train` turns dropout on."""
        stage, middle, output = self._blocks(train)
        width = self.channels * self.channel_mult[-1]
        h = middle(layers.convolution(width, dtype=self.dtype, name="input_conv")(h))
        for level in reversed(range(len(self.channel_mult))):
            h = stage(h, level, "up", self.blocks_per_level + 1)
            if level > 0:
                h = layers.Resample("up", self.dtype, name=f"up_{level}_resample")(h)
        p = self.patch
        h = output(h, p * p * self.out_channels)
        return rearrange(h, "b h w (p q c) -> b (h p) (w q) c", p=p, q=p)


class Autoencoder(Levels):
    """The base of both autoencoders, with a dense layer on either side of the latents.

    It has the attributes of `Levels` too.

    Attributes:
        latent_channels: The number of channels that the encoder outputs ("z_channels").
        embed_dim: The number of channels of the latents. None means `latent_channels`.
    """

    latent_channels: int = 3
    embed_dim: int | None = None

    @property
    def latent_dim(self) -> int:
        """The number of channels of the latents."""
        return self.latent_channels if self.embed_dim is None else self.embed_dim

    @nn.nowrap
    def _coders(self, moments: int) -> tuple[nn.Module, ...]:
        """Returns the encoder, the two dense layers and the decoder.

        Args:
            moments: The number of outputs of the encoder for every value of a latent.
        """
        shared: dict[str, Any] = {
            name: getattr(self, name)
            for name in Levels.__dataclass_fields__
            if name not in ("out_channels", "parent", "name")
        }
        return (
            Encoder(out_channels=moments * self.latent_channels, **shared),
            nn.Dense(moments * self.latent_dim),
            nn.Dense(self.latent_channels),
            Decoder(out_channels=self.out_channels, **shared),
        )


class VQModel(Autoencoder):
    """Autoencoder whose latents are quantised by a codebook. The defaults are those of VQ-f4.

    Latent diffusion works on the latents before quantisation, which is then a part of the decoder.
    Discrete diffusion works on the indices: `decode(lookup(indices), quantize=False)`. It has the
    attributes of `Autoencoder` too.

    Attributes:
        num_codes: The number of codes of the codebook.
        codebook_weight: See `VectorQuantizer`.
        commitment_weight: See `VectorQuantizer`.
    """

    num_codes: int = 8192
    codebook_weight: float = adjustable(0.25)
    commitment_weight: float = adjustable(1.0)

    def setup(self):
        """Declares the parts."""
        self.encoder, self.quant_conv, self.post_quant_conv, self.decoder = self._coders(1)
        self.quantizer = VectorQuantizer(
            self.num_codes, self.latent_dim, self.codebook_weight, self.commitment_weight
        )

    def __call__(self, x: Images, *, train: bool = False) -> tuple[Images, Quantized]:
        """Encodes, quantises and decodes. Returns the reconstruction and the quantised latents."""
        quantized = self.quantize(self.encode(x, train=train))
        return self.decode(quantized.vectors, quantize=False, train=train), quantized

    def encode(self, x: Images, *, train: bool = False) -> Latents:
        """Encodes images in [-1, 1] to latents before quantisation, float32."""
        return self.quant_conv(self.encoder(x, train=train))

    def quantize(self, z: Latents) -> Quantized:
        """Returns the nearest codes of latents, with straight-through gradient, and the loss."""
        return self.quantizer(z)

    def lookup(
        self, indices: Int[Array, "batch rows columns"]
    ) -> Float[Array, "batch rows columns embed_dim"]:
        """Returns the codes with indices 0 .. `num_codes` - 1, and NaN for others."""
        return self.quantizer.lookup(indices)

    def decode(self, z: Latents, *, quantize: bool = True, train: bool = False) -> Images:
        """Decodes latents to images, float32. Pass `quantize=False` if they are codes already."""
        if quantize:
            z = self.quantize(z).vectors
        return self.decoder(self.post_quant_conv(z), train=train)


class DiagonalGaussian(NamedTuple):
    """A Gaussian over latents, with a mean and a log variance for every value, float32.

    Attributes:
        mean: The means, `[batch, ...]`.
        log_variance: The log variances, `[batch, ...]`.
    """

    mean: Array
    log_variance: Array

    def sample(self, rngs: Key[Array, "batch"]) -> Float[Array, "batch *rest"]:
        """Draws latents with one key per example."""
        noise = jax.vmap(lambda rng: jax.random.normal(rng, self.mean.shape[1:]))(rngs)
        return self.mean + jnp.exp(self.log_variance / 2) * noise

    def mode(self) -> Float[Array, "batch *rest"]:
        """Returns the mean."""
        return self.mean

    def kl(self) -> Float[Array, "batch"]:
        """Returns KL(self || N(0, 1)) of each example in nats, a sum over its values."""
        variance = jnp.exp(self.log_variance)
        terms = (jnp.square(self.mean) + variance - 1 - self.log_variance) / 2
        return terms.reshape(len(terms), -1).sum(axis=1)


class AutoencoderKL(Autoencoder):
    """Variational autoencoder. KL-f8 has `channel_mult=(1, 2, 4, 4)` and `latent_channels=4`.

    Its attributes are those of `Autoencoder`.
    """

    def setup(self):
        """Declares the parts. The encoder outputs means and log variances."""
        self.encoder, self.quant_conv, self.post_quant_conv, self.decoder = self._coders(2)

    def __call__(
        self, x: Images, rngs: Key[Array, "batch"] | None = None, *, train: bool = False
    ) -> tuple[Images, DiagonalGaussian]:
        """Encodes, draws latents and decodes.

        Args:
            x: Images in [-1, 1].
            rngs: One key per example. Without keys the latents are the means.
            train: Whether dropout is active.

        Returns:
            The reconstruction and the Gaussian over latents.
        """
        posterior = self.encode(x, train=train)
        z = posterior.mode() if rngs is None else posterior.sample(rngs)
        return self.decode(z, train=train), posterior

    def encode(self, x: Images, *, train: bool = False) -> DiagonalGaussian:
        """Encodes images in [-1, 1] to Gaussians, with log variances clipped to [-30, 20]."""
        moments = self.quant_conv(self.encoder(x, train=train))
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return DiagonalGaussian(mean, jnp.clip(log_variance, -30.0, 20.0))

    def decode(self, z: Latents, *, train: bool = False) -> Images:
        """Decodes latents to images, float32."""
        return self.decoder(self.post_quant_conv(z), train=train)


def _validate(model: Levels) -> None:
    """Raises ValueError if options of the model contradict each other."""
    widths = [model.channels * mult for mult in model.channel_mult]
    if not widths or any(width < 1 or width % layers.GROUPS for width in [model.channels, *widths]):
        raise ValueError(
            f"channels={model.channels}, times channel_mult={tuple(model.channel_mult)}: every"
            f" level needs a positive multiple of {layers.GROUPS}"
        )
    factors = [2**level for level in range(len(widths))]
    if not set(model.attention_downsampling) <= set(factors):
        raise ValueError(
            f"attention_downsampling={tuple(model.attention_downsampling)}: choose among {factors}"
        )
    counts = ["out_channels", "blocks_per_level", "patch", "latent_channels", "embed_dim"]
    for option in [*counts, "num_codes"]:
        value = getattr(model, option, None)  # an encoder has fewer options than an autoencoder
        if value is not None and value < 1:
            raise ValueError(f"{option}={value} must be at least 1")
    if not 0 <= model.dropout < 1:
        raise ValueError(f"dropout={model.dropout} must be in [0, 1)")
