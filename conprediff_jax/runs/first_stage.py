"""The weights of a first stage, from the workdir that trained it or from a diffusers folder."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from conprediff_jax import parallel
from conprediff_jax.common import hub
from conprediff_jax.common.errors import UserError, first_line
from conprediff_jax.common.files import is_address
from conprediff_jax.models.autoencoder import AutoencoderKL
from conprediff_jax.models.first_stage import Autoencoded
from conprediff_jax.runs.checkpoint import FOLDER
from conprediff_jax.runs.restore import restore
from conprediff_jax.tasks.first_stage import FirstStageTraining
from conprediff_jax.weights import tensor_files
from conprediff_jax.weights.diffusers import autoencoder as diffusers_autoencoder
from conprediff_jax.weights.model_shapes import differing_fields

WEIGHTS = "diffusion_pytorch_model.safetensors"


class FirstStageError(UserError):
    """The weights of a first stage are missing, or belong to another model."""


def load_params(first_stage: Autoencoded) -> Any:
    """The parameters of the autoencoder, from the place that `first_stage.weights` names.

    Args:
        first_stage: The first stage.

    Returns:
        The tree that `first_stage.abstract()` has under `autoencoder`, as NumPy arrays.

    Raises:
        FirstStageError: The weights are missing, or have other shapes or another architecture.
    """
    path = check_there(first_stage)
    if (path / FOLDER).is_dir():
        return _from_workdir(first_stage, path)
    return _from_diffusers(first_stage, path)


def check_there(first_stage: Autoencoded) -> epath.Path:
    """The folder of the autoencoder's weights; weights on the Hub are downloaded.

    Raises:
        FirstStageError: The weights are missing; the message says what to do.
        HubError: They cannot be downloaded.
    """
    path = epath.Path(hub.local(first_stage.weights)).expanduser()
    if (path / FOLDER).is_dir() or (path / WEIGHTS).exists():
        return path
    if not is_address(path) and _weights_file(path):
        return path
    family = "AutoencoderKL" if isinstance(first_stage.model, AutoencoderKL) else "VQModel"
    raise FirstStageError(
        f"config.first_stage.weights is {path}: put there a diffusers {family} (config.json and "
        f"{WEIGHTS}), or name the workdir of a first stage trained here, or a folder on the Hub, "
        "hf://owner/name/folder"
    )


def _weights_file(folder: epath.Path) -> pathlib.Path | None:
    """The file of weights in a diffusers folder on this machine, or the index of its shards."""
    stem = WEIGHTS.removesuffix(".safetensors")
    return tensor_files.find(pathlib.Path(folder), stem, stem)


def _from_workdir(first_stage: Autoencoded, path: epath.Path) -> Any:
    restored = restore(str(path), parallel.make_mesh(parallel.MeshSpec()))
    task, params, step = restored.task, restored.params, restored.step
    held = task.model if isinstance(task, FirstStageTraining) else task
    if type(held) is not type(first_stage.model):
        raise FirstStageError(
            f"{path} holds a {type(held).__name__}; config.first_stage asks for a "
            f"{type(first_stage.model).__name__}"
        )
    expected = first_stage.abstract()["autoencoder"]
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, expected):
        raise FirstStageError(
            f"{path} holds a {type(held).__name__} of other sizes than config.first_stage: "
            f"{differing_fields(held, first_stage.model)}"
        )
    logging.info("first stage: step %d of %s", step, path)
    return jax.tree.map(np.asarray, params)


def _from_diffusers(first_stage: Autoencoded, path: epath.Path) -> Any:
    try:
        config = dict(json.loads((path / "config.json").read_text()))
        if is_address(path):
            tensors = safetensors.load((path / WEIGHTS).read_bytes())
        else:
            tensors = tensor_files.unwrapped(tensor_files.read_whole(_weights_file(path)))
    except tensor_files.FileError as error:
        raise FirstStageError(str(error)) from error
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise FirstStageError(
            f"{path}: config.json and {WEIGHTS} must be readable: {first_line(error)}"
        ) from error
    family, stored = type(first_stage.model).__name__, config.get("_class_name")
    if stored != family:
        raise FirstStageError(f"{path} holds a {stored}; config.first_stage asks for a {family}")
    for side in ("in_channels", "out_channels"):
        if (channels := config.get(side, 3)) != first_stage.channels:
            raise FirstStageError(
                f"{path}: {side} is {channels}, and config.data.channels is "
                f"{first_stage.channels}: the first stage and the data must have the same images"
            )
    try:
        return diffusers_autoencoder.params_from_diffusers(tensors, first_stage.model)
    except ValueError as error:
        raise FirstStageError(f"{path}: {error}") from error
