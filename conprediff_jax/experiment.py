"""A config made into objects, and the checks that involve more than one section."""

import dataclasses
import math

from ml_collections import ConfigDict

from conprediff_jax import config as config_lib
from conprediff_jax.config import build
from conprediff_jax.context import ContextPrediction
from conprediff_jax.data import DataSpec
from conprediff_jax.diffusion.gaussian import GaussianProcess
from conprediff_jax.errors import ConfigError
from conprediff_jax.models.first_stage import Pixels
from conprediff_jax.models.unet import UNet
from conprediff_jax.parallel import MeshSpec
from conprediff_jax.sampling import SamplingSpec
from conprediff_jax.train.denoising import Denoising
from conprediff_jax.train.optimizer import OptimizerSpec
from conprediff_jax.train.spec import TrainSpec
from conprediff_jax.train.task import Task

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything a config describes.

    Attributes:
        seed: of every random stream.
        data: which images.
        task: what is trained on them.
        optimizer: and by what steps.
        train: how long.
        mesh: on which devices.
    """

    seed: int
    data: DataSpec
    task: Task
    optimizer: OptimizerSpec
    train: TrainSpec
    mesh: MeshSpec


def make_experiment(config: ConfigDict) -> Experiment:
    """Builds every section; no data is read and no parameter made.

    Raises:
        ConfigError: one line that names the key at fault.
    """
    config_lib.check_keys(config, list(config_lib.default()), "config")
    if config.dtype not in DTYPES:
        raise ConfigError(f"config.dtype is {config.dtype!r}: choose one of {DTYPES}")
    data = build(DataSpec, config, "data")
    train = build(TrainSpec, config, "train")
    return Experiment(
        seed=config.seed,
        data=data,
        task=_make_denoising(config, data, train),
        optimizer=build(OptimizerSpec, config, "optimizer"),
        train=train,
        mesh=build(MeshSpec, config, "mesh"),
    )


def _make_denoising(config: ConfigDict, data: DataSpec, train: TrainSpec) -> Denoising:
    """Diffusion, with context prediction unless its weight is 0."""
    first_stage = build(Pixels, config, "first_stage")
    process = build(GaussianProcess, config, "process")
    sampling = build(SamplingSpec, config, "sampling")
    with config_lib.naming("config.first_stage"):
        point_shape = first_stage.point_shape(data.image_size)
    with config_lib.naming("config.sampling"):
        sampling.make(process)
    denoiser = build(UNet, config, "model", out_channels=point_shape[-1], dtype=config.dtype)
    if point_shape[0] % denoiser.downsampling:
        scale = data.image_size // point_shape[0]
        raise ConfigError(
            f"config.data.image_size is {data.image_size}: it must be a multiple of "
            f"{scale * denoiser.downsampling}, {scale} (first stage) x {denoiser.downsampling} "
            f"(the UNet's {len(denoiser.channel_mult)} levels)"
        )
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
    return Denoising(
        seed=config.seed,
        first_stage=first_stage,
        process=process,
        denoiser=denoiser,
        context=context,
        sampling=sampling,
        microbatches=train.microbatches,
        point_shape=point_shape,
    )


def check_devices(experiment: Experiment, devices: int, processes: int) -> None:
    """Checks mesh and batch against the machine.

    Raises:
        ConfigError: the mesh does not fit the devices, or the batch is not divisible.
    """
    with config_lib.naming("config.mesh"):
        data, fsdp, _ = experiment.mesh.shape(devices)
    train = experiment.train
    parts = math.lcm(data * fsdp, processes) * train.microbatches
    if train.batch_size % parts:
        raise ConfigError(
            f"config.train.batch_size is {train.batch_size}: it must be a multiple of {parts}, for "
            f"{data} x {fsdp} devices along data and fsdp, {processes} processes and "
            f"{train.microbatches} microbatches"
        )
