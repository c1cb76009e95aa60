"""First stages: maps between images and the points that are diffused.

A point is a vector (a patch of pixels or a latent) or a token, which is the index of a vector. The
context of a point is predicted in vectors, so every first stage gives the vectors of its points.
The parameters of a first stage are frozen: they are not trained with the denoiser, but are stored
with it, and are an argument of every function.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, Shaped, UInt8

from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.images import height_and_width
from conprediff_jax.common.keys import derived, fixed, guarded
from conprediff_jax.common.palette import palette
from conprediff_jax.common.registry import Registry
from conprediff_jax.models.autoencoder import AutoencoderKL, VQModel
from conprediff_jax.models.quantizer import nearest_codes

Images = UInt8[Array, "batch height width channels"]
Points = Float[Array, "batch rows columns point_channels"]
Codes = Int[Array, "batch rows columns"]
Size = int | tuple[int, int]


@runtime_checkable
class FirstStage(Protocol):
    """A map between uint8 images and points.

    The argument `frozen` holds the parameters, in the form that `abstract` describes.

    Attributes:
        discrete: Whether points are tokens.
    """

    discrete: bool

    @property
    def downsampling(self) -> int:
        """The side of a point in pixels."""
        ...

    @property
    def channels(self) -> int:
        """The number of channels of an image."""
        ...

    def point_shape(self, image_size: Size) -> tuple[int, ...]:
        """Returns the shape of the points of an image, without the batch.

        Args:
            image_size: Height and width in pixels, or the side of a square image.

        Raises:
            ValueError: The first stage cannot encode images of this size.
        """
        ...

    def abstract(self) -> dict[str, Any]:
        """Returns the shapes and dtypes of the frozen parameters."""
        ...

    def encode(self, frozen: dict[str, Any], images: Images) -> Shaped[Array, "batch *point"]:
        """Turns images into points."""
        ...

    def decode(self, frozen: dict[str, Any], points: Shaped[Array, "batch *point"]) -> Images:
        """Turns points into images."""
        ...

    def vectors(self, frozen: dict[str, Any], points: Shaped[Array, "batch *point"]) -> Points:
        """Returns the vectors of points, or of estimates of points, for context prediction."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pixels:
    """Pixels in [-1, 1], gathered in patches (pixel-unshuffle; Shi et al. 2016, arXiv 1609.05158).

    Unshuffling only permutes values, so Gaussian noise on patches is Gaussian noise on pixels. It
    trades resolution for channels, which makes a UNet cheap.

    Attributes:
        patch: The side of a patch in pixels; 1 for plain pixels.
        channels: The number of channels of an image.

    Raises:
        ValueError: The patch is below 1.
    """

    patch: int = fixed(1)
    channels: int = derived(3)

    discrete = False

    def __post_init__(self):
        if self.patch < 1:
            raise FieldError("patch", f"is {self.patch}: it must be at least 1")

    @property
    def downsampling(self) -> int:
        """The side of a patch in pixels."""
        return self.patch

    def point_shape(self, image_size: Size) -> tuple[int, int, int]:
        """Returns (rows, columns, channels) of the points of an image.

        Raises:
            ValueError: The patch does not divide the image size.
        """
        height, width = height_and_width(image_size)
        if height % self.patch or width % self.patch:
            raise FieldError(
                "patch", f"is {self.patch}: it must divide the image size {image_size}"
            )
        return height // self.patch, width // self.patch, self.channels * self.patch**2

    def abstract(self) -> dict[str, Any]:
        """Returns an empty dict, since pixels have no parameters."""
        return {}

    def encode(self, frozen: dict[str, Any], images: Images) -> Points:
        """Turns uint8 images into float32 points in [-1, 1]."""
        del frozen
        p = self.patch
        return rearrange(scaled(images), "b (h p) (w q) c -> b h w (p q c)", p=p, q=p)

    def decode(self, frozen: dict[str, Any], points: Points) -> Images:
        """Turns points into uint8 images. Values outside [-1, 1] are clipped."""
        del frozen
        p = self.patch
        return to_uint8(rearrange(points, "b h w (p q c) -> b (h p) (w q) c", p=p, q=p))

    def vectors(self, frozen: dict[str, Any], points: Points) -> Points:
        """Returns the points themselves."""
        del frozen
        return points


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoencoded:
    """The base of first stages that use a trained autoencoder.

    Attributes:
        model: The autoencoder.
        weights: Where its parameters come from: the workdir of a run, or a diffusers folder.
    """

    model: VQModel | AutoencoderKL = derived()
    weights: str = guarded()

    @property
    def downsampling(self) -> int:
        """The side of a latent or token in pixels."""
        return self.model.downsampling

    @property
    def channels(self) -> int:
        """The number of channels of an image."""
        return self.model.out_channels

    def latent_shape(self, image_size: Size) -> tuple[int, int, int]:
        """Returns (rows, columns, channels) of the latents of an image.

        Raises:
            ValueError: The autoencoder's downsampling does not divide the image size.
        """
        factor, (height, width) = self.downsampling, height_and_width(image_size)
        if height % factor or width % factor:
            raise ValueError(f"the autoencoder's downsampling {factor} must divide {image_size}")
        return height // factor, width // factor, self.model.latent_dim

    def abstract(self) -> dict[str, Any]:
        """Returns the shapes of the autoencoder's parameters."""
        side = self.downsampling
        images = jnp.zeros((1, side, side, self.channels))
        params = jax.eval_shape(lambda: self.model.init(jax.random.key(0), images)["params"])
        return {"autoencoder": params}

    def encode_unscaled(self, params: Any, images: Images) -> Points:
        """Encodes images to latents without the scale, float32."""
        encoded = self.model.apply({"params": params}, scaled(images), method="encode")
        latents = encoded.mode() if isinstance(self.model, AutoencoderKL) else encoded
        return latents.astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latents(Autoencoded):
    """Latents of a trained autoencoder, scaled to about unit variance (arXiv 2112.10752, app. G).

    The latents of a VQ model are those before quantisation; decoding quantises them. Those of a KL
    model are the mean of its posterior.

    Attributes:
        scale: The factor on latents. None means one over their standard deviation, which is
            measured on the first batches.
    """

    scale: float | None = fixed(None)

    discrete = False

    def point_shape(self, image_size: Size) -> tuple[int, int, int]:
        """Returns the shape of the latents of an image."""
        return self.latent_shape(image_size)

    def abstract(self) -> dict[str, Any]:
        """Returns the shapes of the autoencoder's parameters and of the scale."""
        return super().abstract() | {"scale": jax.ShapeDtypeStruct((), jnp.float32)}

    def encode(self, frozen: dict[str, Any], images: Images) -> Points:
        """Turns uint8 images into scaled latents."""
        return frozen["scale"] * self.encode_unscaled(frozen["autoencoder"], images)

    def decode(self, frozen: dict[str, Any], points: Points) -> Images:
        """Turns scaled latents into uint8 images."""
        latents = points / frozen["scale"]
        return to_uint8(
            self.model.apply({"params": frozen["autoencoder"]}, latents, method="decode")
        )

    def vectors(self, frozen: dict[str, Any], points: Points) -> Points:
        """Returns the points themselves."""
        del frozen
        return points


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens(Autoencoded):
    """Codes of a trained VQ autoencoder, with one index for every point.

    Many codebooks have codes that no image of the data uses. With `used_codes` = K, only the codes
    that the data uses most are kept, K in number. Tokens are then indices of the kept codes, and
    the token of a latent is the nearest of them. VQ-Diffusion keeps 2,887 of 8,192 codes (Gu et al.
    2022, arXiv 2111.14822).

    Attributes:
        used_codes: K, the number of codes to keep. None means all codes of the model.

    Raises:
        ValueError: `used_codes` is not between 1 and the number of codes of the autoencoder.
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
        """K, the number of kept codes."""
        return self.model.num_codes if self.used_codes is None else self.used_codes

    def point_shape(self, image_size: Size) -> tuple[int, int]:
        """Returns (rows, columns) of the tokens of an image."""
        return self.latent_shape(image_size)[:2]

    def abstract(self) -> dict[str, Any]:
        """Returns the shapes of the autoencoder's parameters and of the indices of kept codes."""
        return super().abstract() | {"codes": jax.ShapeDtypeStruct((self.num_codes,), jnp.int32)}

    def codebook(self, frozen: dict[str, Any]) -> Float[Array, "codes channels"]:
        """Returns the kept codes."""
        return frozen["autoencoder"]["quantizer"]["codebook"][frozen["codes"]]

    def encode(self, frozen: dict[str, Any], images: Images) -> Codes:
        """Turns uint8 images into tokens, int32: the nearest kept code of every latent."""
        latents = self.encode_unscaled(frozen["autoencoder"], images)
        return nearest_codes(latents, self.codebook(frozen))

    def decode(self, frozen: dict[str, Any], points: Codes) -> Images:
        """Turns tokens into uint8 images."""
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
        """Returns codes, standardised to mean 0 and deviation 1 over the codebook in every channel.

        Args:
            frozen: The frozen parameters.
            points: Tokens, int32, or log-probabilities of tokens, `[batch, rows, columns, K]`. For
                log-probabilities the result is the expected codes.
        """
        codebook = self.codebook(frozen)
        codebook = (codebook - codebook.mean(axis=0)) / codebook.std(axis=0)
        if jnp.issubdtype(points.dtype, jnp.integer):
            return codebook[points]
        return jnp.exp(points) @ codebook


@dataclasses.dataclass(frozen=True, kw_only=True)
class Palette:
    """Tokens that are stored as images of one pixel a token: no autoencoder comes between.

    The colour of a pixel names its token, by `common.palette`. So a discrete model can be trained
    on grids of tokens themselves, such as those of `data.potts`.

    Attributes:
        num_codes: K, the number of tokens, from 2 to 256.
        channels: The number of channels of an image, which is 3.

    Raises:
        FieldError: `num_codes` is out of its range, or images are not RGB.
    """

    num_codes: int = fixed(3)
    channels: int = derived(3)

    discrete = True
    downsampling = 1

    def __post_init__(self):
        palette(self.num_codes)
        if self.channels != 3:
            raise FieldError(
                "kind", f"is 'palette', for RGB images: config.data.channels is {self.channels}"
            )

    def point_shape(self, image_size: Size) -> tuple[int, int]:
        """Returns (rows, columns) of the tokens of an image."""
        return height_and_width(image_size)

    def abstract(self) -> dict[str, Any]:
        """Returns an empty dict, since a palette has no parameters."""
        return {}

    def encode(self, frozen: dict[str, Any], images: Images) -> Codes:
        """Turns uint8 images into tokens, int32: the nearest colour of the palette."""
        del frozen
        colours = jnp.asarray(palette(self.num_codes), jnp.float32)
        return nearest_codes(images.astype(jnp.float32), colours)

    def decode(self, frozen: dict[str, Any], points: Codes) -> Images:
        """Turns tokens into uint8 images."""
        del frozen
        return jnp.asarray(palette(self.num_codes))[points]

    def vectors(
        self, frozen: dict[str, Any], points: Shaped[Array, "batch rows columns *codes"]
    ) -> Points:
        """Returns one-hot vectors, standardised to mean 0 and deviation 1 over the tokens.

        Every two tokens are equally far apart.

        Args:
            frozen: The frozen parameters.
            points: Tokens, int32, or log-probabilities of tokens, `[batch, rows, columns, K]`. For
                log-probabilities the result is the expected vectors.
        """
        del frozen
        share = 1 / self.num_codes
        if jnp.issubdtype(points.dtype, jnp.integer):
            one_hot = jax.nn.one_hot(points, self.num_codes)
        else:
            one_hot = jnp.exp(points)
        return (one_hot - share) / (share * (1 - share)) ** 0.5


def scaled(images: Images) -> Float[Array, "batch height width channels"]:
    """Turns uint8 images into float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: Float[Array, "batch height width channels"]) -> Images:
    """Turns images in [-1, 1] into uint8, rounded and clipped."""
    return jnp.round(jnp.clip(images * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)


class FirstStageKind(NamedTuple):
    """The classes of a kind of first stage.

    Attributes:
        first_stage: The class whose fields are the keys of the `first_stage` section.
        autoencoder: The class of its subsection `autoencoder`, or None if it has none.
    """

    first_stage: type
    autoencoder: type | None = None


FIRST_STAGES: Registry[FirstStageKind] = Registry("first stage")
FIRST_STAGES.register("pixels")(FirstStageKind(Pixels))
FIRST_STAGES.register("vq")(FirstStageKind(Latents, VQModel))
FIRST_STAGES.register("kl")(FirstStageKind(Latents, AutoencoderKL))
FIRST_STAGES.register("tokens")(FirstStageKind(Tokens, VQModel))
FIRST_STAGES.register("palette")(FirstStageKind(Palette))
