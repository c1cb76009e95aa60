"""Checkpoints of DiT and SiT: `.pt` files that hold the tensors of a transformer.

    published file    the tensors of the moving average; see weights/original/dit.py
    ema               in a file that the trainer wrote: the same tensors
    model, opt, args  in such a file: the weights themselves, the state of the optimiser, and the
                      arguments of the training; these are not read

The shapes of the tensors tell the size of the model. All published models draw the latents of
Stable Diffusion's first stage, KL-f8, which is published in a place of its own. They know the 1000
classes of ImageNet, and a null label that stands for no class.

DiT predicts the noise, and the variance of its steps as well. The variance is not read, since DDIM
has no variance, and the variance of our DDPM is fixed. Files of SiT have the same channels, to
which its code gives no meaning. SiT predicts the velocity in its own direction of time, which is
opposite to ours, so that the sign of its prediction is changed.

The published code guides the first three of the four channels of a latent, and leaves the fourth as
it is with the class. Here all channels are guided. DiT's authors measured both for XL/2: a scale of
1.5 on three channels and a scale of 1.375 on four channels lead to an FID of 2.27 and 2.23.
"""

from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from conprediff_jax.common.errors import FieldError, UserError
from conprediff_jax.config import presets
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.diffusion.flow import FlowProcess
from conprediff_jax.diffusion.gaussian import GaussianProcess
from conprediff_jax.interop.pretrained import Pretrained
from conprediff_jax.models.dit import DiT
from conprediff_jax.models.first_stage import Latents
from conprediff_jax.runs.first_stage import load_params
from conprediff_jax.sampling.model import DiffusionModel
from conprediff_jax.weights import tensor_files
from conprediff_jax.weights.original import dit as original_dit

# The config of a model of each family, and the class and fields of its process.
_PRESETS = {"dit": presets.dit, "sit": presets.sit}
_PROCESSES = {"dit": GaussianProcess, "sit": FlowProcess}
_CONVENTIONS = {
    "dit": {"prediction": "epsilon"},
    "sit": {"prediction": "velocity", "time_scale": 1.0},
}
FAMILIES = tuple(_PRESETS)


def read(
    path: str, family: str, *, first_stage: str | None = None, config: ConfigDict | None = None
) -> Pretrained:
    """Reads a model from a checkpoint.

    Args:
        path: The file.
        family: One of `FAMILIES`.
        first_stage: Where the weights of the first stage are; see `models.first_stage.Autoencoded`.
        config: The config of a model that has none of the published sizes.

    Raises:
        UserError: A tensor is missing, left over, or does not fit the config; or there are no
            weights of the first stage.
    """
    content = tensor_files.nested(tensor_files.read(path), "ema", path)
    weights = tensor_files.unwrapped(tensor_files.arrays(content, path))
    try:
        config = published(weights, family) if config is None else config
        config = with_first_stage(config, first_stage)
        model = _checked(make_experiment(config).task.model, family)
        params = original_dit.params_from_original(weights, model.denoiser)
    except FieldError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if family == "sit":
        params = original_dit.with_turned_velocity(params)
    frozen = {
        "autoencoder": load_params(model.first_stage),
        "scale": np.float32(model.first_stage.scale),
    }
    networks = {"denoiser": params, "first_stage": frozen}
    return Pretrained.assembled(config, networks, step=0, origin=path)


def published(weights: Mapping[str, np.ndarray], family: str) -> ConfigDict:
    """The config of a model of a published size, without the place of its first stage's weights.

    Args:
        weights: The tensors of the file, of which only the shapes matter.
        family: One of `FAMILIES`.

    Raises:
        ValueError: The model has none of the published sizes.
    """
    fields = original_dit.fields_from_original(weights)
    made = _PRESETS[family](weights="").unlock()
    made.dtype = "float32"
    made.data.update(name="imagenet2012", image_size=8 * original_dit.side_from_original(weights))
    made.model.update({name: value for name, value in fields.items() if name in made.model})
    return made.lock()


def with_first_stage(config: ConfigDict, first_stage: str | None) -> ConfigDict:
    """The config with the place of the first stage's weights.

    Args:
        config: The config.
        first_stage: The place; None for that of the config.

    Raises:
        FieldError: Neither names a place.
    """
    config = ConfigDict(config.to_dict()).unlock()
    config.first_stage.weights = first_stage or config.first_stage.get("weights", "")
    if not config.first_stage.weights:
        raise FieldError(
            "first_stage",
            "is missing, since the file holds no first stage: name a folder with Stable "
            "Diffusion's, a diffusers AutoencoderKL (config.json and "
            "diffusion_pytorch_model.safetensors), or the workdir of a first stage",
        )
    return config.lock()


def _checked(model: DiffusionModel, family: str) -> DiffusionModel:
    """The model of a config.

    Raises:
        ValueError: It is no DiT on latents of a known scale, or has another process or other
            conventions than the family.
    """
    if not isinstance(model.denoiser, DiT) or not isinstance(model.first_stage, Latents):
        raise ValueError(
            "the config must have the model.kind 'dit', and the first_stage.kind 'vq' or 'kl'"
        )
    if model.first_stage.scale is None:
        raise ValueError("the file does not hold the scale of latents: give first_stage.scale")
    if not isinstance(model.process, _PROCESSES[family]):
        raise ValueError(
            f"the config's process is a {type(model.process).__name__}; that of {family} is a "
            f"{_PROCESSES[family].__name__}"
        )
    for section, part, expected in (
        ("model", model.denoiser, original_dit.CONVENTIONS[family]),
        ("process", model.process, _CONVENTIONS[family]),
    ):
        found = {name: getattr(part, name) for name in expected}
        if found != expected:
            raise ValueError(f"config.{section} has {found}; in {family} it has {dict(expected)}")
    return model
