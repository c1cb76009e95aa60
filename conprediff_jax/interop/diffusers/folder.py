"""What the pipelines of diffusers share: their folders, the networks in them, and refusals."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from conprediff_jax.common.errors import UserError
from conprediff_jax.interop.diffusers.files import read_json, read_weights
from conprediff_jax.interop.pretrained import Pretrained
from conprediff_jax.models.autoencoder import AutoencoderKL, VQModel
from conprediff_jax.weights.diffusers import autoencoder as diffusers_autoencoder
from conprediff_jax.weights.diffusers.options import DiffusersError

# A network: the content of its `config.json`, and its tensors by name.
Part = tuple[dict[str, Any], dict[str, np.ndarray]]

OTHER_FORMATS = "export it as inference, safetensors or stablehlo"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The parts of a class of pipelines, and its defaults.

    Attributes:
        parts: The classes that each part may have; empty where the reader of the part checks them.
        steps: The default number of steps. The pipeline of tokens always visits every time.
        guidance: The default scale of guidance; 1 for none.
        left_aside: Parts that are not read: they do not change the images, or only hide some.
    """

    parts: Mapping[str, tuple[str, ...]]
    steps: int = 50
    guidance: float = 1.0
    left_aside: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Folder:
    """A pipeline's folder, and what its `model_index.json` says.

    Attributes:
        path: The folder.
        index: The content of `model_index.json`.
        pipeline: The name of the pipeline's class.
    """

    path: pathlib.Path
    index: Mapping[str, Any]
    pipeline: str

    @classmethod
    def opened(cls, path: pathlib.Path, pipelines: Mapping[str, Pipeline]) -> "Folder":
        """Reads and checks `model_index.json`.

        Args:
            path: The folder.
            pipelines: The pipelines that are known, by the names of their classes.

        Raises:
            DiffusersError: The pipeline or one of its parts is not known here.
        """
        index = read_json(path / "model_index.json")
        name = index.get("_class_name")
        if name not in pipelines:
            raise DiffusersError(f"{path}: holds a {name}; {', '.join(pipelines)} are read")
        parts = pipelines[name].parts
        for part, classes in parts.items():
            entry = index.get(part)
            kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
            if classes and kind not in classes:
                raise DiffusersError(
                    f"{path / part}: holds a {kind} in a {name}, as model_index.json says; "
                    f"{' or '.join(classes)} is read there"
                )
        for key in index:
            if not key.startswith("_") and key not in (*parts, *pipelines[name].left_aside):
                raise DiffusersError(f"{path}: model_index.json has {key}: no part of a {name}")
        return cls(path, index, name)

    def config(self, part: str, file: str = "config.json") -> dict[str, Any]:
        """The config of a part, with the class that the index names, since diffusers makes that."""
        return read_json(self.path / part / file) | {"_class_name": self.index[part][1]}

    def scheduler(self) -> tuple[dict[str, Any], str]:
        """The config of the scheduler, and its name in errors."""
        return self.config("scheduler", "scheduler_config.json"), str(self.path / "scheduler")


def read_autoencoder(
    folder: Folder, part: str
) -> tuple[type[VQModel | AutoencoderKL], dict[str, Any], float, Any]:
    """The class, fields, scale of latents, and parameters of a first stage."""
    where = folder.path / part
    family, fields, scale = diffusers_autoencoder.fields_from_diffusers(
        folder.config(part), str(where)
    )
    if fields.pop("out_channels") != 3:
        raise DiffusersError(f"{where}: images of three channels are needed")
    read_params = diffusers_autoencoder.params_from_diffusers
    model = made(family, fields, where)
    return family, fields, scale, params_in(where, read_params, model)


def made(network: type, fields: Mapping[str, Any], where: pathlib.Path) -> Any:
    """Makes a network with these fields.

    Raises:
        DiffusersError: There is no such network here; the message names the field and says why.
    """
    try:
        return network(**fields)
    except (ValueError, TypeError) as error:
        raise DiffusersError(f"{where}: no counterpart here: {error}") from error


def params_in(folder: pathlib.Path, read_params: Any, network: Any) -> Any:
    """Reads the parameters of a network from the weights in its folder."""
    weights, file = read_weights(folder)
    try:
        return read_params(weights, network)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def update(config: ConfigDict, section: str, fields: Mapping[str, Any]) -> None:
    """Sets keys of a section to values of any type; the builder derives the other fields."""
    with config[section].ignore_type():
        config[section].update({key: v for key, v in fields.items() if key in config[section]})


def latent_autoencoder(model: Pretrained) -> Part:
    """Config and weights of the first stage of latents."""
    autoencoder, frozen = model.diffusion.first_stage.model, model.frozen
    config = diffusers_autoencoder.config_to_diffusers(
        autoencoder, float(frozen["scale"]), model.config.data.image_size
    )
    return config, diffusers_autoencoder.params_to_diffusers(frozen["autoencoder"], autoencoder)


def refusal(model: Pretrained, why: str) -> DiffusersError:
    """The error for a model that no pipeline can hold, which names the formats that can."""
    return DiffusersError(f"{model.origin} {why}; {OTHER_FORMATS}")


def check_guidance(model: Pretrained, pipeline: str) -> None:
    """Raises DiffusersError if the guidance of a model changes between steps, or is rescaled."""
    sampling = model.diffusion.sampling
    partly = sampling.guidance_interval != (0.0, 1.0) or getattr(sampling, "guidance_rescale", 0)
    if sampling.guidance != 1 and partly:
        raise refusal(
            model,
            "has guidance with sampling.guidance_interval or guidance_rescale, which a "
            f"{pipeline} does not have",
        )
