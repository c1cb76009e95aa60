"""First stages: frozen codecs between images and the points that are diffused.

A first stage has `encode`, `decode` and `point_shape`; this one has no parameters.
"""

import dataclasses

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, UInt8

Images = UInt8[Array, "batch height width channels"]
Points = Float[Array, "batch rows columns point_channels"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pixels:
    """Pixels in [-1, 1], gathered in patches (pixel-unshuffle; Shi et al. 2016, arXiv 1609.05158).

    Unshuffling permutes values and nothing else, so Gaussian noise on patches is Gaussian noise on
    pixels; it only trades resolution for channels, which makes a UNet cheap.

    Attributes:
        patch: pixels along a side of a patch; 1 for plain pixels.
    """

    patch: int = 1

    def __post_init__(self):
        if self.patch < 1:
            raise ValueError(f"patch is {self.patch}: it must be at least 1")

    def point_shape(self, image_size: int, channels: int = 3) -> tuple[int, int, int]:
        """(rows, columns, channels) of the points of a square image.

        Raises:
            ValueError: the patch does not divide the image size.
        """
        if image_size % self.patch:
            raise ValueError(f"patch is {self.patch}: it must divide the image size {image_size}")
        side = image_size // self.patch
        return side, side, channels * self.patch**2

    def encode(self, images: Images) -> Points:
        """From uint8 images to float32 points in [-1, 1]."""
        scaled = images.astype(jnp.float32) / 127.5 - 1
        p = self.patch
        return rearrange(scaled, "b (h p) (w q) c -> b h w (p q c)", p=p, q=p)

    def decode(self, points: Points) -> Images:
        """From points to uint8 images; values outside [-1, 1] are clipped."""
        p = self.patch
        pixels = rearrange(points, "b h w (p q c) -> b (h p) (w q) c", p=p, q=p)
        return jnp.round(jnp.clip(pixels * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)
