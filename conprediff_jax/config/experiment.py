"""A config made into objects, and the checks that involve more than one section."""

import dataclasses
import math
from typing import Any

from ml_collections import ConfigDict

from conprediff_jax.common import random
from conprediff_jax.common.errors import ConfigError
from conprediff_jax.common.fields import as_kind
from conprediff_jax.config import sections as config_lib
from conprediff_jax.config.sections import build
from conprediff_jax.config.vocabulary import make_text
from conprediff_jax.context import ContextPrediction
from conprediff_jax.data import DataSpec
from conprediff_jax.diffusion.categorical import CategoricalProcess
from conprediff_jax.diffusion.gaussian import GaussianProcess
from conprediff_jax.metrics.networks.lpips import LPIPS
from conprediff_jax.models.autoencoder import VQModel
from conprediff_jax.models.discriminator import Discriminator
from conprediff_jax.models.first_stage import FirstStage, Pixels, Tokens
from conprediff_jax.models.transformer import TokenTransformer
from conprediff_jax.models.unet import UNet
from conprediff_jax.parallel import MeshSpec
from conprediff_jax.sampling.spec import GaussianSampling, SamplingSpec, TokenSampling
from conprediff_jax.tasks.denoising import Denoising
from conprediff_jax.tasks.first_stage import FirstStageLoss, FirstStageTraining
from conprediff_jax.tasks.optimizer import OptimizerSpec
from conprediff_jax.tasks.spec import ConditionSpec, TrainSpec
from conprediff_jax.tasks.task import Task

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
    tasks = ("denoising", *config_lib.AUTOENCODERS)
    task = config.get("task")
    if task not in tasks:
        raise ConfigError(f"config.task is {task!r}: choose one of {tasks}")
    denoising = task == "denoising"
    default = config_lib.default() if denoising else config_lib.default_first_stage(task)
    config_lib.check_keys(config, list(default), "config")
    # A checkpoint may be older than a section; it was trained with what is now the default.
    config = ConfigDict({**default, **config})
    with config_lib.naming("config"):
        seed = as_kind("seed", config.seed, random.SEEDS)
    if config.dtype not in DTYPES:
        raise ConfigError(f"config.dtype is {config.dtype!r}: choose one of {DTYPES}")
    data = build(DataSpec, config, "data")
    train = build(TrainSpec, config, "train")
    if data.latents and (
        not denoising or config.first_stage.get("kind") not in config_lib.AUTOENCODERS
    ):
        raise ConfigError(
            f"config.data.latents is {data.latents!r}: only a denoiser with a trained first stage "
            "(config.first_stage.kind 'vq' or 'kl') reads latents"
        )
    make_task = _make_denoising if denoising else _make_first_stage_training
    return Experiment(
        seed=seed,
        data=data,
        task=make_task(config, data, train),
        optimizer=build(OptimizerSpec, config, "optimizer"),
        train=train,
        mesh=build(MeshSpec, config, "mesh"),
    )


def _make_denoising(config: ConfigDict, data: DataSpec, train: TrainSpec) -> Denoising:
    """Diffusion, with context prediction unless its weight is 0."""
    first_stage = _make_first_stage(config)
    with config_lib.naming("config.first_stage"):
        point_shape = first_stage.point_shape(data.image_size)
    condition = build(ConditionSpec, config, "condition")
    text = make_text(config)
    if condition.dropout and not (text or config.model.num_classes):
        raise ConfigError(
            f"config.condition.dropout is {condition.dropout}: there is no condition to drop, "
            "config.model.num_classes is None and config.text.kind 'none'"
        )
    if text and config.model.num_classes:
        raise ConfigError(
            f"config.text.kind is {config.text.kind!r}: config.model.num_classes must be None, a "
            "model has one condition"
        )
    if condition.null == "empty" and not text:
        raise ConfigError("config.condition.null is 'empty': only captions can be empty")
    options = {"learned_null": condition.learned_null, "dtype": config.dtype}
    if text:
        options["text_dim"] = text.encoder.width
    make = _make_discrete if isinstance(first_stage, Tokens) else _make_continuous
    process, denoiser, sampling = make(config, first_stage, point_shape, **options)
    context = build(
        ContextPrediction,
        config,
        "context",
        num_steps=process.num_steps,
        alpha_bar=process.alpha_bar,
        dtype=config.dtype,
    )
    task = Denoising(
        seed=config.seed,
        first_stage=first_stage,
        process=process,
        denoiser=denoiser,
        context=context if context.weight else None,
        sampling=sampling,
        microbatches=train.microbatches,
        point_shape=point_shape,
        condition=condition,
        text=text,
        latents=data.latents,
        encoded_text=bool(data.latents) and data.encoded_text,
    )
    if data.encoded_text and not (text and text.frozen):
        raise ConfigError(
            "config.data.encoded_text is True: only a frozen text encoder (config.text.weights) "
            "can encode captions ahead of time"
        )
    with config_lib.naming("config.sampling"):
        task.check_sampling(sampling)
    return task


def _make_continuous(
    config: ConfigDict, first_stage: FirstStage, point_shape: tuple[int, int, int], **options: Any
) -> tuple[GaussianProcess, UNet, SamplingSpec]:
    """Gaussian diffusion of patches or latents by a UNet."""
    process = build(GaussianProcess, config, "process")
    denoiser = build(UNet, config, "model", out_channels=point_shape[-1], **options)
    if point_shape[0] % denoiser.downsampling:
        scale = first_stage.downsampling
        raise ConfigError(
            f"config.data.image_size is {config.data.image_size}: it must be a multiple of "
            f"{scale * denoiser.downsampling}, {scale} (first stage) x {denoiser.downsampling} "
            f"(the UNet's {len(denoiser.channel_mult)} levels)"
        )
    return process, denoiser, build(GaussianSampling, config, "sampling")


def _make_discrete(
    config: ConfigDict, first_stage: Tokens, point_shape: tuple[int, int], **options: Any
) -> tuple[CategoricalProcess, TokenTransformer, SamplingSpec]:
    """Mask-and-replace diffusion of tokens by a transformer."""
    codes = {"num_codes": first_stage.num_codes}
    process = build(CategoricalProcess, config, "process", **codes)
    shape = {"grid": point_shape, "num_steps": process.num_steps}
    denoiser = build(TokenTransformer, config, "model", **codes, **shape, **options)
    return process, denoiser, build(TokenSampling, config, "sampling")


def _make_first_stage(config: ConfigDict) -> FirstStage:
    """The frozen codec of a diffusion model."""
    kinds = config_lib.FIRST_STAGES
    kind = config.first_stage.get("kind")
    if kind not in kinds:
        raise ConfigError(f"config.first_stage.kind is {kind!r}: choose one of {tuple(kinds)}")
    if kind == "pixels":
        return build(Pixels, config, "first_stage", others=("kind",))
    # float32 whatever the denoiser has: latents are made once and seen many times.
    model = build(
        config_lib.AUTOENCODERS.get(kind, VQModel),
        config,
        "first_stage.autoencoder",
        dtype="float32",
    )
    return build(kinds[kind], config, "first_stage", others=("kind", "autoencoder"), model=model)


def _make_first_stage_training(
    config: ConfigDict, data: DataSpec, train: TrainSpec
) -> FirstStageTraining:
    """An autoencoder, with LPIPS where its files are given and a discriminator where it counts."""
    if train.eval_every:
        raise ConfigError("config.train.eval_every is for diffusion models: a first stage has 0")
    loss = build(FirstStageLoss, config, "loss")
    cls = config_lib.AUTOENCODERS[config.task]
    model = build(cls, config, "autoencoder", dtype=config.dtype)
    if config.task == "vq" and loss.codebook_decay:
        model = model.clone(codebook_weight=0.0)  # codes follow, and do not descend
    discriminator = None
    if loss.gan_weight:
        with config_lib.naming("config.loss"):
            discriminator = Discriminator(loss.gan_channels, loss.gan_layers, config.dtype)
    has_lpips = loss.lpips_trunk and loss.lpips_weight
    with config_lib.naming("config"):
        return FirstStageTraining(
            seed=config.seed,
            data=data,
            model=model,
            loss=loss,
            perceptual=LPIPS(loss.lpips_network) if has_lpips else None,
            discriminator=discriminator,
            microbatches=train.microbatches,
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
