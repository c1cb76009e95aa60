"""Training of first stages: autoencoders whose latents a diffusion model generates later.

With x an image and x' its reconstruction,

    L = L_rec + r + a w_g L_G(x'),     L_rec = mean |x - x'| + w_p LPIPS(x, x')           (1)
    r = w_kl KL(q(z|x) || N(0, 1)) / values of an image,  or the quantiser's loss         (2)
    a = min(|dL_rec / dK| / (|dL_G / dK| + 1e-4), 10^4)                                   (3)

where K is the kernel of the decoder's last layer. The discriminator behind L_G is trained with its
own loss on the same reconstructions in the same step. Since (2) is divided by the number of values
of an image, w_kl is the weight of latent diffusion, which sums L_rec over the values instead.

Sources: Esser et al., "Taming Transformers" (2021, arXiv 2012.09841), equations 4 to 7; Rombach et
al. (2022, arXiv 2112.10752), section 3.1 and appendix G.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from conprediff_jax import data as data_lib
from conprediff_jax import parallel
from conprediff_jax.common import random
from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.keys import fixed, switch
from conprediff_jax.metrics.networks import lpips
from conprediff_jax.models import quantizer
from conprediff_jax.models.autoencoder import AutoencoderKL, VQModel
from conprediff_jax.models.discriminator import Discriminator, discriminator_loss, generator_loss
from conprediff_jax.models.first_stage import scaled, to_uint8
from conprediff_jax.tasks.task import Batch, Metrics, Step, accumulate

PREVIEWED = 32  # number of images of a reconstruction grid
CODEBOOK = ("autoencoder", "quantizer", "codebook")

Images = Float[Array, "batch height width channels"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstStageLoss:
    """The `loss` section of a first stage.

    Attributes:
        kl_weight: The weight w_kl, for an autoencoder with Gaussian latents.
        codebook_decay: Decay of the moving averages that set the codes; 0 trains codes by gradients
            of the quantiser's loss instead, with `autoencoder.codebook_weight`.
        restart_below: A code restarts when its usage falls below this fraction of equal usage; for
            codes set by moving averages.
        lpips_weight: The weight w_p; it has no effect unless both files are given.
        lpips_network: The network of LPIPS, 'vgg16' or 'alexnet'.
        lpips_trunk: File of torchvision's weights of this network.
        lpips_heads: File of the `lpips` package's weights for this network.
        gan_weight: The weight w_g; 0 for no discriminator.
        gan_start: Number of steps before the discriminator is trained and counts in the loss.
        gan_channels: Channels of the discriminator's first layer.
        gan_layers: Number of the discriminator's strided convolutions.
    """

    kl_weight: float = 1e-6
    codebook_decay: float = fixed(0.0)
    restart_below: float = 0.05
    lpips_weight: float = 1.0
    lpips_network: str = fixed("vgg16")
    lpips_trunk: str = switch("")
    lpips_heads: str = ""
    gan_weight: float = fixed(0.0)
    gan_start: int = 0
    gan_channels: int = fixed(64)
    gan_layers: int = fixed(3)

    def __post_init__(self):
        for name in ("kl_weight", "lpips_weight", "gan_weight", "gan_start"):
            if getattr(self, name) < 0:
                raise FieldError(name, f"is {getattr(self, name)}: it must not be negative")
        if not 0 <= self.codebook_decay < 1:
            raise FieldError("codebook_decay", f"is {self.codebook_decay}: it must lie in [0, 1)")
        if not 0 < self.restart_below < 1:
            raise FieldError("restart_below", f"is {self.restart_below}: it must lie in (0, 1)")
        if self.lpips_network not in lpips.TRUNKS:
            raise FieldError(
                "lpips_network", f"is {self.lpips_network!r}: choose one of {tuple(lpips.TRUNKS)}"
            )
        if bool(self.lpips_trunk) != bool(self.lpips_heads):
            raise ValueError("lpips_trunk and lpips_heads go together: give both files, or none")


class Keys(NamedTuple):
    """One key per example for every random stream of a step."""

    posterior: Key[Array, "batch"]
    dropout: Key[Array, "batch"]
    codebook: Key[Array, "batch"]


class Codes(NamedTuple):
    """The vectors that were quantised, and the indices of their codes."""

    vectors: Float[Array, "batch rows columns embed_dim"]
    indices: Int[Array, "batch rows columns"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstStageTraining:
    """A `Task` that trains an autoencoder and, if wanted, its discriminator.

    The task's state is a dict of `lpips`, the frozen parameters of the LPIPS distance, and
    `averages`, the moving averages of the codes. A key is missing where it is not needed.

    Attributes:
        seed: Seed of all random streams.
        data: The data set, from which the images of the reconstruction grids are taken.
        model: The autoencoder.
        loss: The weights of (1) and (2).
        perceptual: The LPIPS distance; None for none.
        discriminator: The discriminator; None for no L_G.
        microbatches: Number of parts that a batch is computed in.

    Raises:
        ValueError: Images do not fit the networks, or microbatches are used together with a
            discriminator or moving averages of codes.
    """

    seed: int
    data: data_lib.DataSpec
    model: VQModel | AutoencoderKL
    loss: FirstStageLoss
    perceptual: lpips.LPIPS | None = None
    discriminator: Discriminator | None = None
    microbatches: int = 1

    averaged = "autoencoder"
    batch_keys = ("image",)
    num_classes = None
    tokenizer = None

    def __post_init__(self):
        size, factor = min(self.data.image_shape[:2]), self.model.downsampling
        if any(side % factor for side in self.data.image_shape[:2]):
            raise ValueError(
                f"the autoencoder's downsampling is {factor}: it must divide the image size "
                f"{self.data.image_size}"
            )
        if self.perceptual and self.data.channels != 3:
            raise ValueError(
                f"LPIPS compares RGB images, and config.data.channels is {self.data.channels}: "
                "leave out loss.lpips_trunk and loss.lpips_heads"
            )
        for network in (self.perceptual, self.discriminator):
            if network and size < network.smallest_image:
                raise ValueError(
                    f"the image size is {size}: {type(network).__name__} needs at least "
                    f"{network.smallest_image}"
                )
        if self.microbatches > 1 and (self.discriminator or self.has_ema_codebook):
            raise ValueError(
                f"train.microbatches is {self.microbatches}: it must be 1 with a discriminator "
                "(gan_weight) or moving averages of codes (codebook_decay), which need the whole "
                "batch at once"
            )

    @property
    def has_ema_codebook(self) -> bool:
        """Whether the codes are set by moving averages."""
        return isinstance(self.model, VQModel) and self.loss.codebook_decay > 0

    def init(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Initial parameters `{'autoencoder': ..., 'discriminator': ...}`, and the task's state.

        The usage of all codes is 0 at first, so that codes which the first batch does not use
        restart as vectors of this batch. The parameters of LPIPS are zeros until the trainer has
        loaded them.
        """
        x = jnp.zeros((1, *self.data.image_shape))
        key = random.stream(self.seed, "init/autoencoder")
        params, task_state = {"autoencoder": self.model.init(key, x)["params"]}, {}
        if self.discriminator:
            key = random.stream(self.seed, "init/discriminator")
            params["discriminator"] = self.discriminator.init(key, x)["params"]
        if self.perceptual:
            shapes = jax.eval_shape(self.perceptual.init, key, x, x)["params"]
            task_state["lpips"] = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
        if self.has_ema_codebook:
            averages = quantizer.init_averages(params["autoencoder"]["quantizer"]["codebook"])
            task_state["averages"] = jax.tree.map(jnp.zeros_like, averages)
        return params, task_state

    def with_perceptual_weights(self) -> dict[str, Any] | None:
        """The task's state with the parameters of LPIPS read from files; None without LPIPS.

        Raises:
            UserError: A file is missing or damaged.
        """
        if self.perceptual is None:
            return None
        task_state = jax.tree.map(
            lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(self.init)[1]
        )
        files = self.loss.lpips_trunk, self.loss.lpips_heads
        return task_state | {"lpips": lpips.load(self.perceptual, *files)}

    def step(
        self, params: dict[str, Any], task_state: Any, batch: Batch, step: Int[Array, ""]
    ) -> Step:
        """Gradients of (1) and of the discriminator's loss, and the codes set by averages."""
        indices = jnp.arange(len(batch["image"]))
        streams = (random.stream(self.seed, f"train/{name}", step) for name in Keys._fields)
        keys = Keys(*(random.example_keys(stream, indices) for stream in streams))
        frozen = task_state.get("lpips")
        if self.has_ema_codebook:
            grads, metrics, codes = self.gradients(params, batch, keys, frozen, step)
            averages, codebook = quantizer.update_codebook(
                task_state["averages"],
                *codes,
                keys.codebook,
                decay=self.loss.codebook_decay,
                restart_below=self.loss.restart_below,
            )
            metrics |= self._usage(self._counts(codes))
            return Step(grads, metrics, task_state | {"averages": averages}, {CODEBOOK: codebook})

        def grad(*arguments: Any) -> tuple[tuple[Any, Metrics, Any], None]:
            grads, metrics, codes = self.gradients(*arguments, frozen, step)
            return (grads, metrics, self._counts(codes)), None

        means, _ = accumulate(grad, params, self.microbatches, batch, keys)
        grads, metrics, counts = means
        return Step(grads, metrics | self._usage(counts), task_state)

    def gradients(
        self, params: dict[str, Any], batch: Batch, keys: Keys, frozen: Any, step: Int[Array, ""]
    ) -> tuple[Any, Metrics, Codes | None]:
        """Gradients on one (micro)batch, metrics, and the codes (None for Gaussian latents)."""
        x = scaled(batch["image"])
        # One pullback serves three cotangents. Of the gradients of L_rec and of L_G alone, only
        # the one at K is used, and the compiler removes the computation of the others.
        (reconstruction, regulariser), pullback, (metrics, codes) = jax.vjp(
            lambda p: self.reconstruct(p, x, keys), params["autoencoder"], has_aux=True
        )

        def at_last_layer(cotangent: Images) -> Array:
            (grads,) = pullback((cotangent, jnp.zeros_like(regulariser)))
            return grads["decoder"]["output_conv"]["kernel"]

        objective = jax.value_and_grad(self.reconstruction_loss, has_aux=True)
        (loss, terms), cotangent = objective(reconstruction, x, frozen)
        loss += regulariser
        metrics |= terms | {"psnr": psnr(reconstruction, x)}
        grads = {}
        if self.discriminator:
            gan_active = (step >= self.loss.gan_start).astype(jnp.float32)
            (critic, gan), to_image, grads["discriminator"] = self.adversarial(
                params["discriminator"], reconstruction, x, gan_active
            )
            adapted = adaptive_weight(at_last_layer(cotangent), at_last_layer(to_image))
            weight = gan_active * self.loss.gan_weight * adapted
            cotangent += weight * to_image
            loss += weight * gan
            metrics |= {"loss/generator": weight * gan, "gan_weight": weight}
            metrics["discriminator_loss"] = critic  # no term of the loss: it has its own parameters
        (grads["autoencoder"],) = pullback((cotangent, jnp.ones_like(regulariser)))
        return grads, {"loss": loss} | metrics, codes

    def reconstruct(
        self, params: Any, x: Images, keys: Keys
    ) -> tuple[tuple[Images, Float[Array, ""]], tuple[Metrics, Codes | None]]:
        """The reconstruction and the regulariser (2), and as auxiliary metrics and codes."""
        apply = functools.partial(
            self.model.apply, {"params": params}, rngs={"dropout": keys.dropout[0]}
        )
        if isinstance(self.model, AutoencoderKL):
            reconstruction, posterior = apply(x, keys.posterior, train=True)
            kl = self.loss.kl_weight * posterior.kl().mean() / x[0].size
            deviation = jnp.exp(posterior.log_variance / 2).mean()
            return (reconstruction, kl), ({"loss/kl": kl, "latents/deviation": deviation}, None)

        def through_codes(model: VQModel, x: Images) -> tuple[Images, Array, quantizer.Quantized]:
            z = model.encode(x, train=True)
            quantized = model.quantize(z)
            return model.decode(quantized.vectors, quantize=False, train=True), z, quantized

        reconstruction, z, quantized = apply(x, method=through_codes)
        loss = quantized.loss.mean()
        return (reconstruction, loss), ({"loss/codebook": loss}, Codes(z, quantized.indices))

    def reconstruction_loss(
        self, reconstruction: Images, x: Images, frozen: Any
    ) -> tuple[Float[Array, ""], Metrics]:
        """L_rec, and its terms as metrics."""
        l1 = jnp.abs(x - reconstruction).mean()
        if self.perceptual is None:
            return l1, {"loss/l1": l1}
        distance = self.perceptual.apply({"params": frozen}, x, reconstruction).mean()
        perceptual = self.loss.lpips_weight * distance
        return l1 + perceptual, {"loss/l1": l1, "loss/lpips": perceptual}

    def adversarial(
        self, params: Any, reconstruction: Images, x: Images, gan_active: Float[Array, ""]
    ) -> tuple[tuple[Array, Array], Images, Any]:
        """The adversarial losses and their gradients.

        Args:
            params: Parameters of the discriminator.
            reconstruction: Reconstructions, in [-1, 1] up to errors.
            x: Images, in [-1, 1].
            gan_active: 1 from step `gan_start` on, 0 before.

        Returns:
            The losses of the discriminator and the generator, the gradient of the generator's loss
            with respect to `reconstruction`, and that of the discriminator's with respect to
            `params`, which is 0 before step `gan_start`.
        """

        def logits(params: Any, images: Images) -> Array:
            return self.discriminator.apply({"params": params}, images)

        def critic_loss(params: Any) -> Array:
            return gan_active * discriminator_loss(
                logits(params, x), logits(params, reconstruction)
            )

        def loss_of_generator(images: Images) -> Array:
            return generator_loss(logits(params, images))

        generator, to_image = jax.value_and_grad(loss_of_generator)(reconstruction)
        critic, grads = jax.value_and_grad(critic_loss)(params)
        return (critic, generator), to_image, grads

    def preview(self, mesh: Mesh) -> Callable[[Any, Any], np.ndarray]:
        """A function to the same images of the data in every call, each beside its reconstruction.

        The reconstruction is to the right of the image.
        """

        @functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
        def beside_reconstructions(params: Any, images: Any) -> Array:
            reconstruction, _ = self.model.apply({"params": params}, scaled(images))
            return jnp.concatenate([images, to_uint8(reconstruction)], axis=2)

        @functools.cache
        def originals() -> np.ndarray:
            spec = dataclasses.replace(self.data, shuffle=True, workers=0)
            return next(data_lib.make_iterator(spec, batch_size=PREVIEWED, seed=0))["image"]

        def images(params: Any, task_state: Any) -> np.ndarray:
            del task_state
            return np.asarray(beside_reconstructions(params, originals()))

        return images

    def describe(self) -> str:
        """One line for the log: the latents and the losses."""
        rows, columns = (side // self.model.downsampling for side in self.data.image_shape[:2])
        latents = f"latents {rows} x {columns} x {self.model.latent_dim}"
        if isinstance(self.model, VQModel):
            how = "moving averages" if self.has_ema_codebook else "gradients"
            latents += f", {self.model.num_codes} codes by {how}"
        distance = f"LPIPS ({self.loss.lpips_network})" if self.perceptual else "no LPIPS"
        gan = "no discriminator"
        if self.discriminator:
            gan = f"discriminator from step {self.loss.gan_start}"
        return f"{latents}; {distance}; {gan}"

    def _counts(self, codes: Codes | None) -> Float[Array, "codes"] | None:
        """How often each code occurs; None for Gaussian latents."""
        return codes and quantizer.count_codes(codes.indices, self.model.num_codes)

    def _usage(self, counts: Float[Array, "codes"] | None) -> Metrics:
        """How evenly a batch uses the codes, and what share of them it uses."""
        if counts is None:
            return {}
        return {
            "codebook/perplexity": quantizer.perplexity(counts),
            "codebook/used": quantizer.used_fraction(counts),
        }


def adaptive_weight(reconstruction: Array, generator: Array) -> Float[Array, ""]:
    """Equation (3), from the gradients of L_rec and L_G at the last layer."""
    ratio = optax.global_norm(reconstruction) / (optax.global_norm(generator) + 1e-4)
    return jnp.minimum(ratio, 1e4)


def psnr(reconstruction: Images, x: Images) -> Float[Array, ""]:
    """Peak signal-to-noise ratio in dB, the mean over a batch of images in [-1, 1].

    The reconstruction is clipped to this range first.
    """
    error = jnp.square(jnp.clip(reconstruction, -1, 1) - x).mean(axis=(1, 2, 3))
    return (10 * jnp.log10(4 / jnp.maximum(error, 1e-10))).mean()
