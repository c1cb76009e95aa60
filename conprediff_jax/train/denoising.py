"""The main task: a diffusion model that also predicts the context of every point.

    L = mean_batch L_denoise(x_0, t) + w(step) * lambda_t * mean_i sum_s w_s W_2^2(i, s)         (1)

Source: arXiv 2401.02015, section 3. With `context.weight = 0` there is no context decoder and the
program is that of the plain diffusion model.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from conprediff_jax import random
from conprediff_jax.context import ContextPrediction
from conprediff_jax.data import latents as latents_lib
from conprediff_jax.diffusion.gaussian import GaussianProcess
from conprediff_jax.models.first_stage import FirstStage, Pixels
from conprediff_jax.models.layers import Denoised
from conprediff_jax.models.unet import UNet
from conprediff_jax.sampling import SamplingSpec, generate_batches, make_generate
from conprediff_jax.train import frozen as frozen_lib
from conprediff_jax.train.task import Batch, Metrics, Step, accumulate


class Keys(NamedTuple):
    """One key per example for every random stream of a step."""

    time: Key[Array, "batch"]
    noise: Key[Array, "batch"]
    context: Key[Array, "batch"]
    dropout: Key[Array, "batch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoising:
    """Diffusion on the points of a first stage, with or without context prediction; a `Task`.

    Attributes:
        seed: of every random stream.
        first_stage: between images and points.
        process: what is done to the points and asked of the denoiser.
        denoiser: the network.
        context: None for the plain diffusion model.
        sampling: how the sample grids are made.
        microbatches: parts that a batch is computed in.
        point_shape: (rows, columns, channels) of the points.
        latents: folder of latents encoded ahead of time, in which case batches hold `latent` and
            not `image`; empty to encode on the fly.
    """

    seed: int
    first_stage: FirstStage
    process: GaussianProcess
    denoiser: UNet
    context: ContextPrediction | None
    sampling: SamplingSpec
    microbatches: int
    point_shape: tuple[int, int, int]
    latents: str = ""

    averaged = "denoiser"

    @property
    def num_classes(self) -> int | None:
        """Classes of the denoiser."""
        return self.denoiser.num_classes

    @property
    def batch_keys(self) -> tuple[str, ...]:
        """Images or their latents, and labels where the denoiser has classes."""
        source = "latent" if self.latents else "image"
        return (source, "label") if self.num_classes else (source,)

    def init(self) -> tuple[dict[str, Any], Any]:
        """Initial parameters `{'denoiser': ..., 'context': ...}`, and room for the first stage's.

        The denoiser's do not depend on whether there is a context decoder.
        """
        x = jnp.zeros((1, *self.point_shape))
        label = jnp.zeros(1, jnp.int32) if self.num_classes else None
        key = random.stream(self.seed, "init/denoiser")
        params = {"denoiser": self.denoiser.init(key, x, jnp.zeros(1), label=label)["params"]}
        if self.context:
            prediction = self.context.source == "prediction"
            params["context"] = self.context.init(
                random.stream(self.seed, "init/context"),
                features=self.point_shape[-1] if prediction else self.denoiser.channels,
                channels=self.point_shape[-1],
                dimensions=len(self.point_shape) - 1,
            )
        frozen = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.first_stage.abstract())
        return params, frozen

    def prepare(self, batches: Callable[[], Iterator[Batch]]) -> Any:
        """The parameters of the first stage, where it has any, and its scale."""
        if isinstance(self.first_stage, Pixels):
            return None
        first_stage = self.first_stage
        if self.latents and first_stage.scale is None:  # it was measured on the images
            scale = latents_lib.read_manifest(self.latents).scale
            first_stage = dataclasses.replace(first_stage, scale=scale)
        return frozen_lib.load(first_stage, batches)

    def check_latents(self, frozen: dict[str, Any]) -> None:
        """Raises DataError where latents were not encoded by the first stage of this run."""
        latents_lib.check_first_stage(
            self.latents, self.first_stage.model, frozen["autoencoder"], self.point_shape
        )

    def step(self, params: dict[str, Any], extra: Any, batch: Batch, step: Int[Array, ""]) -> Step:
        """Gradient of (1) over the whole batch, and its terms."""
        indices = jnp.arange(len(batch[self.batch_keys[0]]))
        streams = (random.stream(self.seed, f"train/{name}", step) for name in Keys._fields)
        keys = Keys(*(random.example_keys(stream, indices) for stream in streams))
        grad = jax.grad(lambda p, b, k: self.objective(p, extra, b, k, step), has_aux=True)
        return Step(*accumulate(grad, params, self.microbatches, batch, keys), extra)

    def objective(
        self,
        params: dict[str, Any],
        frozen: dict[str, Any],
        batch: Batch,
        keys: Keys,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Equation (1) on one (micro)batch, and its terms."""
        if self.latents:
            x_0 = frozen["scale"] * batch["latent"]
        else:
            x_0 = self.first_stage.encode(frozen, batch["image"])
        label = batch["label"] if self.num_classes else None
        t = self.process.sample_time(keys.time)
        x_t, noise = self.process.corrupt(keys.noise, x_0, t)
        output, features = self.denoise(
            params["denoiser"], x_t, t, label=label, rng=keys.dropout[0]
        )
        denoise = self.process.loss(output, x_0, x_t, noise, t).mean()
        if self.context is None:
            return denoise, {"loss": denoise, "loss/denoise": denoise}
        h = features
        if self.context.source == "prediction":
            h = self.process.predict_x0(output, x_t, t)
        weighted, distance = self.context.loss(params["context"], h, x_0, t, keys.context)
        context = weighted.mean()
        loss = denoise + self.context.warmup(step) * context
        metrics = {"loss": loss, "loss/denoise": denoise, "loss/context": context}
        for stride, column in zip(self.context.strides, distance.T, strict=True):
            metrics[f"distance/stride_{stride}"] = column.mean()
        return loss, metrics

    def denoise(
        self,
        params: Any,
        x_t: Float[Array, "batch *point"],
        t: Int[Array, "batch"],
        *,
        label: Int[Array, "batch"] | None = None,
        rng: Key[Array, ""] | None = None,
    ) -> Denoised:
        """The denoiser's answer; with `rng` in training mode, which draws dropout from it."""
        rngs = {} if rng is None else {"dropout": rng}
        return self.denoiser.apply(
            {"params": params}, x_t, t, label=label, train=rng is not None, rngs=rngs
        )

    def preview(self, mesh: Mesh) -> Callable[[Any, Any], np.ndarray]:
        """Samples of the same seeds every time: one sees the same images emerge."""
        generate = make_generate(self, self.sampling.make(self.process), mesh)
        num = self.sampling.num

        def images(params: Any, frozen: Any) -> np.ndarray:
            batches = generate_batches(
                generate,
                params,
                frozen,
                seed=self.seed,
                num=num,
                batch_size=min(num, 64),
                num_classes=self.num_classes,
            )
            return np.concatenate(list(batches))

        return images

    def describe(self) -> str:
        """Points and context prediction."""
        points = " x ".join(map(str, self.point_shape))
        if self.context is None:
            return f"points {points}, no context prediction"
        return f"points {points}, context strides {self.context.strides}, {self.context.transport}"
