"""The patch discriminator that sharpens first stages, and its hinge losses.

Strided convolutions compute a logit for every patch of an image, which says whether the patch is
real. With logits D(.),

    L_D = mean max(0, 1 - D(x)) / 2 + mean max(0, 1 + D(x')) / 2                            (1)
    L_G = -mean D(x')                                                                       (2)

Sources: PatchGAN: Isola et al. (2017, arXiv 1611.07004), section 3.2.2; hinge losses: Lim and Ye
(2017, arXiv 1705.02894); their use here: Esser et al. (2021, arXiv 2012.09841), section 3.1.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

Logits = Float[Array, "batch rows columns"]
_normal = nn.initializers.normal(0.02)


class BatchNorm(nn.Module):
    """Normalises by the mean and variance of the current batch, in float32, without averages.

    The batch is the global one, also if it is divided over several devices.

    Attributes:
        dtype: The dtype of the output.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """Normalises every channel over the batch and the pixels."""

        def around_one(rng: Key[Array, ""], shape: tuple[int, ...]) -> Array:
            return 1 + _normal(rng, shape)

        scale = self.param("scale", around_one, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        x = x.astype(jnp.float32)
        mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
        x = (x - mean) * (jax.lax.rsqrt(variance + 1e-5) * scale) + bias
        return x.astype(self.dtype)


class Discriminator(nn.Module):
    """PatchGAN (the defaults see patches of 70 x 70 pixels).

    Attributes:
        channels: The number of channels of the first layer. It doubles with every further layer, up
            to eightfold.
        layers: The number of strided convolutions.
        dtype: The dtype of the activations. Parameters, statistics and logits are float32.

    Raises:
        ValueError: An option is below 1; the constructor raises it.
    """

    channels: int = 64
    layers: int = 3
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        for option in ("channels", "layers"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option}={getattr(self, option)} must be at least 1")
        super().__post_init__()

    @property
    def smallest_image(self) -> int:
        """The side, in pixels, of the smallest image that has a logit."""
        return 3 * 2**self.layers

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Logits:
        """Returns the logits of images in [-1, 1], one for every patch."""
        conv = functools.partial(nn.Conv, kernel_size=(4, 4), padding=1, kernel_init=_normal)
        activate = functools.partial(nn.leaky_relu, negative_slope=0.2)
        h = activate(conv(self.channels, strides=2, dtype=self.dtype, name="conv_0")(x))
        for i in range(1, self.layers + 1):
            width = self.channels * min(2**i, 8)
            strides = 2 if i < self.layers else 1
            # There is no bias, since the norm would subtract it.
            inner = conv(width, strides=strides, use_bias=False, dtype=self.dtype, name=f"conv_{i}")
            h = activate(BatchNorm(self.dtype, name=f"norm_{i}")(inner(h)))
        return conv(1, name="output_conv")(h)[..., 0]


def discriminator_loss(real: Logits, fake: Logits) -> Float[Array, ""]:
    """Equation (1)."""
    return (nn.relu(1 - real).mean() + nn.relu(1 + fake).mean()) / 2


def generator_loss(fake: Logits) -> Float[Array, ""]:
    """Equation (2)."""
    return -fake.mean()
