"""A config made into objects, and the checks that involve more than one section."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from conprediff_jax import config as config_lib
from conprediff_jax import random
from conprediff_jax.config import build
from conprediff_jax.context import ContextPrediction
from conprediff_jax.data import DataSpec
from conprediff_jax.diffusion.gaussian import GaussianProcess
from conprediff_jax.errors import ConfigError
from conprediff_jax.models.first_stage import Pixels
from conprediff_jax.models.layers import Denoised
from conprediff_jax.models.unet import UNet
from conprediff_jax.parallel import MeshSpec
from conprediff_jax.sampling import SamplingSpec
from conprediff_jax.train.optimizer import OptimizerSpec
from conprediff_jax.train.spec import TrainSpec

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything a config describes.

    Attributes:
        seed: of every random stream.
        point_shape: (rows, columns, channels) of the points that are diffused.
        context: None when `context.weight` is 0: the plain diffusion model.
    """

    seed: int
    data: DataSpec
    first_stage: Pixels
    process: GaussianProcess
    denoiser: UNet
    context: ContextPrediction | None
    optimizer: OptimizerSpec
    train: TrainSpec
    sampling: SamplingSpec
    mesh: MeshSpec
    point_shape: tuple[int, int, int]

    def init(self) -> dict[str, Any]:
        """Initial parameters `{'denoiser': ..., 'context': ...}`; jit me.

        The denoiser's do not depend on whether there is a context decoder.
        """
        x = jnp.zeros((1, *self.point_shape))
        inputs = {"label": jnp.zeros(1, int)} if self.denoiser.num_classes else {}
        key = random.stream(self.seed, "init/denoiser")
        params = {"denoiser": self.denoiser.init(key, x, jnp.zeros(1), **inputs)["params"]}
        if self.context:
            params["context"] = self.context.init(
                random.stream(self.seed, "init/context"),
                features=self._context_features(),
                channels=self.point_shape[-1],
                dimensions=len(self.point_shape) - 1,
            )
        return params

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

    def _context_features(self) -> int:
        """Channels of what the context decoder reads."""
        prediction = self.context.source == "prediction"
        return self.point_shape[-1] if prediction else self.denoiser.channels


def make_experiment(config: ConfigDict) -> Experiment:
    """Builds every section, cheapest check first; no data is read and no parameter made.

    Raises:
        ConfigError: one line that names the key at fault.
    """
    config_lib.check_keys(config, list(config_lib.default()), "config")
    if config.dtype not in DTYPES:
        raise ConfigError(f"config.dtype is {config.dtype!r}: choose one of {DTYPES}")
    data = build(DataSpec, config, "data")
    first_stage = build(Pixels, config, "first_stage")
    process = build(GaussianProcess, config, "process")
    sampling = build(SamplingSpec, config, "sampling")
    try:
        point_shape = first_stage.point_shape(data.image_size)
    except ValueError as error:
        raise ConfigError(f"config.first_stage: {error}") from error
    try:
        sampling.make(process)
    except ValueError as error:
        raise ConfigError(f"config.sampling: {error}") from error
    denoiser = build(UNet, config, "model", out_channels=point_shape[-1], dtype=config.dtype)
    _check_resolution(data, first_stage, denoiser, point_shape)
    context = None
    if config.context.weight:
        context = build(
            ContextPrediction,
            config,
            "context",
            num_steps=process.num_steps,
            alpha_bar=process.alpha_bar,
            dtype=config.dtype,
        )
    return Experiment(
        seed=config.seed,
        data=data,
        first_stage=first_stage,
        process=process,
        denoiser=denoiser,
        context=context,
        optimizer=build(OptimizerSpec, config, "optimizer"),
        train=build(TrainSpec, config, "train"),
        sampling=sampling,
        mesh=build(MeshSpec, config, "mesh"),
        point_shape=point_shape,
    )


def check_devices(experiment: Experiment, devices: int, processes: int) -> None:
    """Checks mesh and batch against the machine.

    Raises:
        ConfigError: the mesh does not fit the devices, or the batch is not divisible.
    """
    try:
        data, fsdp, _ = experiment.mesh.shape(devices)
    except ValueError as error:
        raise ConfigError(f"config.mesh: {error}") from error
    train = experiment.train
    parts = math.lcm(data * fsdp, processes) * train.microbatches
    if train.batch_size % parts:
        raise ConfigError(
            f"config.train.batch_size is {train.batch_size}: it must be a multiple of {parts}, for "
            f"{data} x {fsdp} devices along data and fsdp, {processes} processes and "
            f"{train.microbatches} microbatches"
        )


def _check_resolution(
    data: DataSpec, first_stage: Pixels, denoiser: UNet, point_shape: tuple[int, int, int]
) -> None:
    """Raises ConfigError where the UNet cannot halve the points as often as its levels need."""
    if point_shape[0] % denoiser.downsampling:
        scale = data.image_size // point_shape[0]
        multiple = scale * denoiser.downsampling
        raise ConfigError(
            f"config.data.image_size is {data.image_size}: it must be a multiple of {multiple}, "
            f"{scale} (first stage) x {denoiser.downsampling} (the UNet's {len(denoiser.channel_mult)} "
            "levels)"
        )
