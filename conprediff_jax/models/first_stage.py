"""First stages: frozen codecs between images and the points that are diffused.

Points are patches of pixels or latents, both vectors, or tokens, which are indices of vectors. The
context of a point is predicted in vectors, so every first stage says what vectors its points are.
The parameters, where there are any, are frozen: they are an argument of every function, are stored
beside the denoiser and never trained.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, Shaped, UInt8

from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.keys import derived, fixed
from conprediff_jax.common.registry import Registry
from conprediff_jax.models.autoencoder import AutoencoderKL, VQModel
from conprediff_jax.models.quantizer import nearest_codes

Images = UInt8[Array, "batch height width channels"]
Points = Float[Array, "batch rows columns point_channels"]
Codes = Int[Array, "batch rows columns"]


@runtime_checkable
class FirstStage(Protocol):
    """Between uint8 images and points; `frozen` is what `abstract` describes.

    Attributes:
        discrete: Whether points are tokens.
    """

    discrete: bool

    @property
    def downsampling(self) -> int:
        """Pixels along the side of a point."""
        ...

    def point_shape(self, image_size: int) -> tuple[int, ...]:
        """Shape of the points of a square image, without the batch, or ValueError."""
        ...

    def abstract(self) -> dict[str, Any]:
        """Shapes and dtypes of the frozen parameters."""
        ...

    def encode(self, frozen: dict[str, Any], images: Images) -> Shaped[Array, "batch *point"]:
        """From images to points."""
        ...

    def decode(self, frozen: dict[str, Any], points: Shaped[Array, "batch *point"]) -> Images:
        """From points to images."""
        ...

    def vectors(self, frozen: dict[str, Any], points: Shaped[Array, "batch *point"]) -> Points:
        """What the context is predicted in: the vectors of points, or of estimates of them."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pixels:
    """Pixels in [-1, 1], gathered in patches (pixel-unshuffle; Shi et al. 2016, arXiv 1609.05158).

    Unshuffling permutes values and nothing else, so Gaussian noise on patches is Gaussian noise on
    pixels; it only trades resolution for channels, which makes a UNet cheap.

    Attributes:
        patch: pixels along a side of a patch; 1 for plain pixels.
    """

    patch: int = fixed(1)

    discrete = False

    def __post_init__(self):
        if self.patch < 1:
            raise FieldError("patch", f"is {self.patch}: it must be at least 1")

    @property
    def downsampling(self) -> int:
        """Pixels along the side of a patch."""
        return self.patch

    def point_shape(self, image_size: int) -> tuple[int, int, int]:
        """(rows, columns, channels) of the points of a square RGB image.

        Raises:
            ValueError: the patch does not divide the image size.
        """
        if image_size % self.patch:
            raise FieldError(
                "patch", f"is {self.patch}: it must divide the image size {image_size}"
            )
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

    def vectors(self, frozen: dict[str, Any], points: Points) -> Points:
        """The points themselves."""
        del frozen
        return points


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoencoded:
    """Base of the first stages that are a trained autoencoder.

    Attributes:
        model: The autoencoder.
        weights: Where its parameters come from: a workdir that trained it, or a diffusers folder.
    """

    model: VQModel | AutoencoderKL = derived()
    weights: str

    @property
    def downsampling(self) -> int:
        """Pixels along the side of a latent or token."""
        return self.model.downsampling

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(rows, columns, channels) of the latents of a square image.

        Raises:
            ValueError: The autoencoder's downsampling does not divide the image size.
        """
        factor = self.downsampling
        if image_size % factor:
            raise ValueError(f"the autoencoder's downsampling {factor} must divide {image_size}")
        return image_size // factor, image_size // factor, self.model.latent_dim

    def abstract(self) -> dict[str, Any]:
        """Shapes of the autoencoder's parameters."""
        side = self.downsampling
        images = jnp.zeros((1, side, side, 3))
        params = jax.eval_shape(lambda: self.model.init(jax.random.key(0), images)["params"])
        return {"autoencoder": params}

    def encode_unscaled(self, params: Any, images: Images) -> Points:
        """Latents as the autoencoder has them, float32."""
        encoded = self.model.apply({"params": params}, scaled(images), method="encode")
        latents = encoded.mode() if isinstance(self.model, AutoencoderKL) else encoded
        return latents.astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latents(Autoencoded):
    """Latents of a trained autoencoder, scaled to about unit variance (arXiv 2112.10752, app. G).

    A VQ model's latents are taken before quantisation and quantised in decoding; a KL model's are
    the mean of its posterior.

    Attributes:
        scale: What latents are multiplied by; None: one over their standard deviation, measured
            over the first batches.
    """

    scale: float | None = fixed(None)

    discrete = False

    def point_shape(self, image_size: int) -> tuple[int, int, int]:
        """That of the latents."""
        return self.latent_shape(image_size)

    def abstract(self) -> dict[str, Any]:
        """Shapes of the autoencoder's parameters and of the scale."""
        return super().abstract() | {"scale": jax.ShapeDtypeStruct((), jnp.float32)}

    def encode(self, frozen: dict[str, Any], images: Images) -> Points:
        """From uint8 images to scaled latents."""
        return frozen["scale"] * self.encode_unscaled(frozen["autoencoder"], images)

    def decode(self, frozen: dict[str, Any], points: Points) -> Images:
        """From scaled latents to uint8 images."""
        latents = points / frozen["scale"]
        return to_uint8(
            self.model.apply({"params": frozen["autoencoder"]}, latents, method="decode")
        )

    def vectors(self, frozen: dict[str, Any], points: Points) -> Points:
        """The points themselves."""
        del frozen
        return points


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens(Autoencoded):
    """Codes of a trained VQ autoencoder, one index a point.

    Many codebooks have codes that no image of the data takes. With `used_codes` = K only the K
    codes that the data takes most are kept, tokens count the kept ones, and a latent takes the
    nearest of them (VQ-Diffusion keeps 2,887 of 8,192; Gu et al. 2022, arXiv 2111.14822).

    Attributes:
        used_codes: K; None: all codes of the model.

    Raises:
        ValueError: There are not so many codes.
    """

    used_codes: int | None = fixed(None)

    discrete = True

    def __post_init__(self):
        if not 1 <= self.num_codes <= self.model.num_codes:
            raise FieldError(
                "used_codes",
                f"is {self.used_codes}: it must lie in 1 .. {self.model.num_codes}, the "
                "codes of the autoencoder",
            )

    @property
    def num_codes(self) -> int:
        """K."""
        return self.model.num_codes if self.used_codes is None else self.used_codes

    def point_shape(self, image_size: int) -> tuple[int, int]:
        """(rows, columns) of the tokens of a square image."""
        return self.latent_shape(image_size)[:2]

    def abstract(self) -> dict[str, Any]:
        """Shapes of the autoencoder's parameters, and of the indices of the kept codes."""
        return super().abstract() | {"codes": jax.ShapeDtypeStruct((self.num_codes,), jnp.int32)}

    def codebook(self, frozen: dict[str, Any]) -> Float[Array, "codes channels"]:
        """The kept codes."""
        return frozen["autoencoder"]["quantizer"]["codebook"][frozen["codes"]]

    def encode(self, frozen: dict[str, Any], images: Images) -> Codes:
        """From uint8 images to tokens, int32: the nearest kept code of every latent."""
        latents = self.encode_unscaled(frozen["autoencoder"], images)
        return nearest_codes(latents, self.codebook(frozen))

    def decode(self, frozen: dict[str, Any], points: Codes) -> Images:
        """From tokens to uint8 images."""
        return to_uint8(
            self.model.apply(
                {"params": frozen["autoencoder"]},
                self.codebook(frozen)[points],
                quantize=False,
                method="decode",
            )
        )

    def vectors(
        self, frozen: dict[str, Any], points: Shaped[Array, "batch rows columns *codes"]
    ) -> Points:
        """Codes standardised over the codebook: to mean 0 and deviation 1 in every channel.

        Args:
            frozen: Holds the codes.
            points: Tokens, int32; or log-probabilities of them, `[batch, rows, columns, K]`, whose
                expected vectors are meant.
        """
        codebook = self.codebook(frozen)
        codebook = (codebook - codebook.mean(axis=0)) / codebook.std(axis=0)
        if jnp.issubdtype(points.dtype, jnp.integer):
            return codebook[points]
        return jnp.exp(points) @ codebook


def scaled(images: Images) -> Float[Array, "batch height width channels"]:
    """From uint8 to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: Float[Array, "batch height width channels"]) -> Images:
    """From [-1, 1] to uint8, rounded and clipped."""
    return jnp.round(jnp.clip(images * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)


class FirstStageKind(NamedTuple):
    """What a kind of first stage is made of.

    Attributes:
        first_stage: The class whose fields are the `first_stage` section.
        autoencoder: The class of its subsection `autoencoder`; None where it has none.
    """

    first_stage: type
    autoencoder: type | None = None


FIRST_STAGES: Registry[FirstStageKind] = Registry("first stage")
FIRST_STAGES.register("pixels")(FirstStageKind(Pixels))
FIRST_STAGES.register("vq")(FirstStageKind(Latents, VQModel))
FIRST_STAGES.register("kl")(FirstStageKind(Latents, AutoencoderKL))
FIRST_STAGES.register("tokens")(FirstStageKind(Tokens, VQModel))
