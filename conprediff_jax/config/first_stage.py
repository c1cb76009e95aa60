"""Configs of first stages: their sections, and the training that they describe."""

from ml_collections import ConfigDict

from conprediff_jax.common.errors import ConfigError
from conprediff_jax.config.sections import (
    TASKS,
    TaskKind,
    build,
    naming,
    section,
    whole,
    with_defaults,
)
from conprediff_jax.data import DataSpec
from conprediff_jax.metrics.networks.lpips import LPIPS
from conprediff_jax.models.discriminator import Discriminator
from conprediff_jax.models.first_stage import FIRST_STAGES
from conprediff_jax.tasks.first_stage import FirstStageLoss, FirstStageTraining
from conprediff_jax.tasks.spec import TrainSpec

KINDS = ("vq", "kl")

_KL_F8 = {"channel_mult": (1, 2, 4, 4), "latent_channels": 4}


def default_first_stage(kind: str) -> ConfigDict:
    """A config with all keys for training a first stage; the defaults are VQ-f4 and KL-f8.

    Args:
        kind: 'vq' or 'kl'.
    """
    published = _KL_F8 if kind == "kl" else {}
    return whole(
        kind,
        autoencoder=section(FIRST_STAGES[kind].autoencoder, **published),
        loss=section(FirstStageLoss),
    )


def classes(config: ConfigDict) -> dict[str, type]:
    """The class of every section of a first stage's config; see `TaskKind`."""
    return {"autoencoder": FIRST_STAGES[config.task].autoencoder, "loss": FirstStageLoss}


def make_task(config: ConfigDict, data: DataSpec, train: TrainSpec) -> FirstStageTraining:
    """The training of an autoencoder, with LPIPS if its files are given.

    There is a discriminator unless its weight is 0.
    """
    if data.latents:
        raise ConfigError(
            f"config.data.latents is {data.latents!r}: only a denoiser with a trained first stage "
            "(config.first_stage.kind 'vq' or 'kl') reads latents"
        )
    if data.aspect_step:
        raise ConfigError("config.data.aspect_step is for diffusion models: a first stage has 0")
    if train.eval_every:
        raise ConfigError("config.train.eval_every is for diffusion models: a first stage has 0")
    loss = build(FirstStageLoss, config, "loss")
    cls = FIRST_STAGES[config.task].autoencoder
    model = build(cls, config, "autoencoder", dtype=config.dtype, out_channels=data.channels)
    if config.task == "vq" and loss.codebook_decay:
        model = model.clone(codebook_weight=0.0)  # codes are averages, and get no gradients
    discriminator = None
    if loss.gan_weight:
        with naming("config.loss"):
            discriminator = Discriminator(loss.gan_channels, loss.gan_layers, config.dtype)
    has_lpips = loss.lpips_trunk and loss.lpips_weight
    with naming("config"):
        return FirstStageTraining(
            seed=config.seed,
            data=data,
            model=model,
            loss=loss,
            perceptual=LPIPS(loss.lpips_network) if has_lpips else None,
            discriminator=discriminator,
            microbatches=train.microbatches,
        )


def completed(config: ConfigDict) -> ConfigDict:
    """The config, with the sections that checkpoints of older versions do not have."""
    return with_defaults(config, default_first_stage(config.task))


for _kind in KINDS:
    TASKS.register(_kind)(TaskKind(completed, classes, make_task))
