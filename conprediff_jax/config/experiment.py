"""From a config to its objects, with the checks that involve more than one section."""

import dataclasses
import math

from ml_collections import ConfigDict

from conprediff_jax.common import random
from conprediff_jax.common.errors import ConfigError
from conprediff_jax.common.fields import as_kind
from conprediff_jax.config import denoising, first_stage  # noqa: F401  (they register their tasks)
from conprediff_jax.config.sections import build, completed, naming, task_kind
from conprediff_jax.data import DataSpec
from conprediff_jax.parallel import MeshSpec
from conprediff_jax.tasks.optimizer import OptimizerSpec
from conprediff_jax.tasks.spec import TrainSpec
from conprediff_jax.tasks.task import Task

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything a config describes.

    Attributes:
        seed: Seed of all random streams.
        data: The data set, and how its images are read.
        task: What is trained.
        optimizer: The optimiser.
        train: The number of steps, the batch size, and how often to log and save.
        mesh: The division of the devices.
    """

    seed: int
    data: DataSpec
    task: Task
    optimizer: OptimizerSpec
    train: TrainSpec
    mesh: MeshSpec


def make_experiment(config: ConfigDict) -> Experiment:
    """Builds all sections. It reads no data and makes no parameters.

    Raises:
        ConfigError: A key is unknown or has a wrong value. The message is one line that names it.
    """
    config = completed(config)
    with naming("config"):
        seed = as_kind("seed", config.seed, random.SEEDS)
    if config.dtype not in DTYPES:
        raise ConfigError(f"config.dtype is {config.dtype!r}: choose one of {DTYPES}")
    data = build(DataSpec, config, "data")
    train = build(TrainSpec, config, "train")
    return Experiment(
        seed=seed,
        data=data,
        task=task_kind(config).make(config, data, train),
        optimizer=build(OptimizerSpec, config, "optimizer"),
        train=train,
        mesh=build(MeshSpec, config, "mesh"),
    )


def check_devices(experiment: Experiment, devices: int, processes: int) -> None:
    """Checks that the mesh and the batch size fit the devices and processes.

    Raises:
        ConfigError: The mesh does not fit the devices, or they cannot divide the batch.
    """
    with naming("config.mesh"):
        data, fsdp, _ = experiment.mesh.shape(devices)
    train = experiment.train
    parts = math.lcm(data * fsdp, processes) * train.microbatches
    if train.batch_size % parts:
        raise ConfigError(
            f"config.train.batch_size is {train.batch_size}: it must be a multiple of {parts}, for "
            f"{data} x {fsdp} devices along data and fsdp, {processes} processes and "
            f"{train.microbatches} microbatches"
        )
