"""First stages: frozen codecs between images and the points that are diffused.

A first stage has `point_shape`, `encode` and `decode`. Its parameters, where it has any, are
frozen: they are an argument of both, are stored beside the denoiser and never trained.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, UInt8

from conprediff_jax.models.autoencoder import AutoencoderKL, VQModel

Images = UInt8[Array, "batch height width channels"]
Points = Float[Array, "batch rows columns point_channels"]


@runtime_checkable
class FirstStage(Protocol):
    """Between uint8 images and float32 points; `frozen` is what `abstract` describes."""

    def point_shape(self, image_size: int) -> tuple[int, int, int]:
        """(rows, columns, channels) of the points of a square image, or ValueError."""
        ...

    def abstract(self) -> dict[str, Any]:
        """Shapes and dtypes of the frozen parameters."""
        ...

    def encode(self, frozen: dict[str, Any], images: Images) -> Points:
        """From images to points."""
        ...

    def decode(self, frozen: dict[str, Any], points: Points) -> Images:
        """From points to images."""
        ...


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

    def point_shape(self, image_size: int) -> tuple[int, int, int]:
        """(rows, columns, channels) of the points of a square RGB image.

        Raises:
            ValueError: the patch does not divide the image size.
        """
        if image_size % self.patch:
            raise ValueError(f"patch is {self.patch}: it must divide the image size {image_size}")
        side = image_size // self.patch
        return side, side, 3 * self.patch**2

    def abstract(self) -> dict[str, Any]:
        """Nothing: pixels have no parameters."""
        return {}

    def encode(self, frozen: dict[str, Any], images: Images) -> Points:
        """From uint8 images to float32 points in [-1, 1]."""
        del frozen
        p = self.patch
        return rearrange(scaled(images), "b (h p) (w q) c -> b h w (p q c)", p=p, q=p)

    def decode(self, frozen: dict[str, Any], points: Points) -> Images:
        """From points to uint8 images; values outside [-1, 1] are clipped."""
        del frozen
        p = self.patch
        return to_uint8(rearrange(points, "b h w (p q c) -> b (h p) (w q) c", p=p, q=p))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latents:
    """Latents of a trained autoencoder, scaled to about unit variance (arXiv 2112.10752, app. G).

    A VQ model's latents are taken before quantisation and quantised in decoding; a KL model's are
    the mean of its posterior.

    Attributes:
        model: the autoencoder. weights: where its parameters come from: a workdir that trained it,
        or a diffusers folder. scale: what latents are multiplied by; None: one over their standard
        deviation, measured over
            the first batches.
    """

    model: VQModel | AutoencoderKL
    weights: str
    scale: float | None = None

    def point_shape(self, image_size: int) -> tuple[int, int, int]:
        """(rows, columns, channels) of the latents of a square image.

        Raises:
            ValueError: the autoencoder's downsampling does not divide the image size.
        """
        factor = self.model.downsampling
        if image_size % factor:
            raise ValueError(f"the autoencoder's downsampling {factor} must divide {image_size}")
        return image_size // factor, image_size // factor, self.model.latent_dim

    def abstract(self) -> dict[str, Any]:
        """Shapes of the autoencoder's parameters and of the scale."""
        side = self.model.downsampling
        images = jnp.zeros((1, side, side, 3))
        params = jax.eval_shape(lambda: self.model.init(jax.random.key(0), images)["params"])
        return {"autoencoder": params, "scale": jax.ShapeDtypeStruct((), jnp.float32)}

    def encode(self, frozen: dict[str, Any], images: Images) -> Points:
        """From uint8 images to scaled float32 latents."""
        return frozen["scale"] * self.encode_unscaled(frozen["autoencoder"], images)

    def encode_unscaled(self, params: Any, images: Images) -> Points:
        """Latents as the autoencoder has them."""
        encoded = self.model.apply({"params": params}, scaled(images), method="encode")
        latents = encoded.mode() if isinstance(self.model, AutoencoderKL) else encoded
        return latents.astype(jnp.float32)

    def decode(self, frozen: dict[str, Any], points: Points) -> Images:
        """From scaled latents to uint8 images."""
        latents = points / frozen["scale"]
        return to_uint8(
            self.model.apply({"params": frozen["autoencoder"]}, latents, method="decode")
        )


def scaled(images: Images) -> Float[Array, "batch height width channels"]:
    """From uint8 to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: Float[Array, "batch height width channels"]) -> Images:
    """From [-1, 1] to uint8, rounded and clipped."""
    return jnp.round(jnp.clip(images * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)
