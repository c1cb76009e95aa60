"""Whole models to and from the folders of diffusers' pipelines.

    our model                                pipeline
    pixels, patch 1                          DDIMPipeline, DDPMPipeline
    latents of a VQ or KL model              LDMPipeline
    latents, captions by BERT or CLIP        LDMTextToImagePipeline, StableDiffusionPipeline
    tokens, with or without CLIP captions    VQDiffusionPipeline

The `from_pretrained` of a pipeline opens its folder. `LDMPipeline` also takes a KL model in the
place of its VQ model, since it only divides by `scaling_factor` and decodes. No pipeline passes
classes on, works on patches of pixels, or changes its guidance between steps; such models are
refused.

Nothing here needs diffusers. Only pickled weights (`.bin`) need torch.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from conprediff_jax import config as config_lib
from conprediff_jax.common.errors import UserError
from conprediff_jax.interop.diffusers import text as diffusers_text
from conprediff_jax.interop.diffusers.files import (
    VERSION,
    read_json,
    read_weights,
    write_json,
    write_part,
)
from conprediff_jax.interop.diffusers.text import DISCRETE, LATENT, OTHER_FORMATS, STABLE
from conprediff_jax.interop.pretrained import Pretrained
from conprediff_jax.models.autoencoder import AutoencoderKL, VQModel
from conprediff_jax.models.first_stage import Pixels, Tokens
from conprediff_jax.models.transformer import TokenTransformer
from conprediff_jax.models.unet import UNet
from conprediff_jax.weights.diffusers import autoencoder as diffusers_autoencoder
from conprediff_jax.weights.diffusers import schedulers as diffusers_schedulers
from conprediff_jax.weights.diffusers import transformer as diffusers_transformer
from conprediff_jax.weights.diffusers import unet as diffusers_unet
from conprediff_jax.weights.diffusers.options import DiffusersError

# The pipelines of Gaussian diffusion, with the part that holds the first stage of each.
_CONTINUOUS = {
    "DDIMPipeline": None,
    "DDPMPipeline": None,
    "LDMPipeline": "vqvae",
    LATENT: "vqvae",
    STABLE: "vae",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pipeline:
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


def _parts(unet: str, **others: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The parts of a pipeline of Gaussian diffusion, with the class of its UNet."""
    return {"unet": (unet,), "scheduler": diffusers_schedulers.CONTINUOUS, **others}


_AUTOENCODERS = ("VQModel", "AutoencoderKL")
PIPELINES = {
    "DDIMPipeline": _Pipeline(parts=_parts("UNet2DModel")),
    "DDPMPipeline": _Pipeline(parts=_parts("UNet2DModel"), steps=1000),
    "LDMPipeline": _Pipeline(parts=_parts("UNet2DModel", vqvae=_AUTOENCODERS)),
    LATENT: _Pipeline(
        parts=_parts(
            "UNet2DConditionModel", vqvae=_AUTOENCODERS, bert=("LDMBertModel",), tokenizer=()
        )
    ),
    STABLE: _Pipeline(
        parts=_parts(
            "UNet2DConditionModel",
            vae=("AutoencoderKL",),
            text_encoder=("CLIPTextModel",),
            tokenizer=(),
        ),
        guidance=7.5,
        left_aside=(
            *("safety_checker", "requires_safety_checker"),  # replaces images by black ones
            *("feature_extractor", "image_encoder"),  # for the checker, and for adapters
        ),
    ),
    DISCRETE: _Pipeline(
        parts={
            "transformer": ("Transformer2DModel",),
            "scheduler": ("VQDiffusionScheduler",),
            "vqvae": ("VQModel",),
            "text_encoder": ("CLIPTextModel",),
            "tokenizer": (),
            "learned_classifier_free_sampling_embeddings": (),
        },
        steps=100,
        guidance=5.0,
    ),
}


def pipeline_of(model: Pretrained) -> str:
    """The name of the pipeline that can hold a model.

    Raises:
        DiffusersError: No pipeline can; the message says why.
    """
    diffusion = model.diffusion
    if not isinstance(diffusion.denoiser, UNet | TokenTransformer):
        raise DiffusersError(
            f"{model.origin} has a denoiser of class {type(diffusion.denoiser).__name__}: the "
            f"pipelines written here have a UNet or a token transformer; {OTHER_FORMATS}"
        )
    if diffusion.text:
        return diffusers_text.pipeline_of(model)
    if diffusion.num_classes:
        raise DiffusersError(
            f"{model.origin} has {diffusion.num_classes} classes: none of diffusers' pipelines of "
            f"this kind passes classes on; {OTHER_FORMATS}"
        )
    match diffusion.first_stage:
        case Pixels(patch=1):
            return "DDIMPipeline" if diffusion.sampling.sampler == "ddim" else "DDPMPipeline"
        case Pixels(patch=patch):
            raise DiffusersError(
                f"{model.origin} diffuses patches of {patch} x {patch} pixels: none of diffusers' "
                f"pipelines does; {OTHER_FORMATS}"
            )
        case Tokens():
            return DISCRETE
        case _:
            return "LDMPipeline"


def write(model: Pretrained, folder: pathlib.Path) -> None:
    """Writes a pipeline into an existing folder.

    Raises:
        DiffusersError: No pipeline can hold the model, or one of its parts; the message says why.
    """
    name, diffusion = pipeline_of(model), model.diffusion
    denoiser, params = (
        diffusion.denoiser.clone(learned_null=False),
        dict(model.networks["denoiser"]),
    )
    params.pop("null_text", None)
    if name == DISCRETE:
        scheduler = diffusers_schedulers.categorical_to_diffusers(
            diffusion.process, diffusion.sampling
        )
        parts = {
            "vqvae": _token_autoencoder(model),
            "transformer": (
                diffusers_transformer.config_to_diffusers(denoiser),
                diffusers_transformer.params_to_diffusers(params, denoiser),
            ),
        }
    else:
        to_scheduler = diffusers_schedulers.gaussian_to_diffusers
        scheduler = to_scheduler(diffusion.process, diffusion.sampling, pipeline=name)
        side, _, channels = diffusion.point_shape
        parts = {
            "unet": (
                diffusers_unet.config_to_diffusers(denoiser, channels, side),
                diffusers_unet.params_to_diffusers(params, denoiser),
            )
        }
        if _CONTINUOUS[name]:
            parts[_CONTINUOUS[name]] = _latent_autoencoder(model)
    index: dict[str, Any] = {"_class_name": name, "_diffusers_version": VERSION}
    if name in (DISCRETE, LATENT, STABLE):
        index |= diffusers_text.write(diffusers_text.of_model(model), name, folder)
    if name == STABLE:
        unused = ("safety_checker", "feature_extractor", "image_encoder")
        index |= {part: [None, None] for part in unused} | {"requires_safety_checker": False}
    for part, (config, weights) in parts.items():
        write_part(folder / part, config, weights)
        index[part] = ["diffusers", config["_class_name"]]
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    write_json(folder / "model_index.json", index)


def _latent_autoencoder(model: Pretrained) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and weights of the first stage of latents."""
    autoencoder, frozen = model.diffusion.first_stage.model, model.frozen
    config = diffusers_autoencoder.config_to_diffusers(
        autoencoder, float(frozen["scale"]), model.config.data.image_size
    )
    return config, diffusers_autoencoder.params_to_diffusers(frozen["autoencoder"], autoencoder)


def _token_autoencoder(model: Pretrained) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and weights of the first stage of tokens, with the codes in use alone."""
    first_stage, frozen = model.diffusion.first_stage, model.frozen
    autoencoder = first_stage.model.clone(num_codes=first_stage.num_codes)
    codebook = frozen["autoencoder"]["quantizer"]["codebook"][frozen["codes"]]
    params = frozen["autoencoder"] | {"quantizer": {"codebook": codebook}}
    config = diffusers_autoencoder.config_to_diffusers(
        autoencoder, 1.0, model.config.data.image_size
    )
    return config, diffusers_autoencoder.params_to_diffusers(params, autoencoder)


@dataclasses.dataclass(frozen=True)
class _Folder:
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
    def opened(cls, path: pathlib.Path) -> "_Folder":
        """Reads and checks `model_index.json`.

        Raises:
            DiffusersError: The pipeline or one of its parts is not known here.
        """
        index = read_json(path / "model_index.json")
        name = index.get("_class_name")
        if name not in PIPELINES:
            raise DiffusersError(f"{path}: holds a {name}; {', '.join(PIPELINES)} are read")
        parts = PIPELINES[name].parts
        for part, classes in parts.items():
            entry = index.get(part)
            kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
            if classes and kind not in classes:
                raise DiffusersError(
                    f"{path / part}: holds a {kind} in a {name}, as model_index.json says; "
                    f"{' or '.join(classes)} is read there"
                )
        for key in index:
            if not key.startswith("_") and key not in (*parts, *PIPELINES[name].left_aside):
                raise DiffusersError(f"{path}: model_index.json has {key}: no part of a {name}")
        return cls(path, index, name)

    def config(self, part: str, file: str = "config.json") -> dict[str, Any]:
        """The config of a part, with the class that the index names, since diffusers makes that."""
        return read_json(self.path / part / file) | {"_class_name": self.index[part][1]}

    def scheduler(self) -> tuple[dict[str, Any], str]:
        """The config of the scheduler, and its name in errors."""
        return self.config("scheduler", "scheduler_config.json"), str(self.path / "scheduler")


def read(path: str) -> Pretrained:
    """Reads a model from a pipeline's folder.

    Args:
        path: The folder, with `model_index.json` and a folder for each part. Pickled weights need
            torch.

    Raises:
        UserError: A part is missing, or has no counterpart here, or its weights do not fit its
            config.
    """
    folder = _Folder.opened(pathlib.Path(path).expanduser())
    return _read_discrete(folder) if folder.pipeline == DISCRETE else _read_continuous(folder)


def _read_continuous(folder: _Folder) -> Pretrained:
    name, path = folder.pipeline, folder.path
    unet_config = folder.config("unet")
    fields = diffusers_unet.fields_from_diffusers(unet_config, str(path / "unet"))
    unet = _made(UNet, fields, path / "unet")
    if name in (LATENT, STABLE) and unet.text_dim is None:
        raise DiffusersError(f"{path / 'unet'}: cross_attention_dim is None in a {name}")
    scheduler, where = folder.scheduler()
    process, sampling = diffusers_schedulers.gaussian_from_diffusers(
        scheduler, where, pipeline=name
    )
    most = PIPELINES[name].steps
    sampling["steps"] = diffusers_schedulers.fitting_steps(process, sampling, most, where)
    sampling["guidance"] = PIPELINES[name].guidance
    config = config_lib.default().unlock()
    side, networks = _side(unet_config, name, path / "unet"), {}
    if _CONTINUOUS[name]:
        where = path / _CONTINUOUS[name]
        family, architecture, scale, params = _read_autoencoder(folder, _CONTINUOUS[name])
        kind = "vq" if family is VQModel else "kl"
        config.first_stage = config_lib.latents(kind, str(where), scale=scale, **architecture)
        side *= family(**architecture).downsampling
        networks["first_stage"] = {"autoencoder": params, "scale": np.float32(scale)}
    config.data.image_size = side
    _update(config, "process", process)
    _update(config, "sampling", sampling)
    _update(config, "model", fields)
    read_params = diffusers_unet.params_from_diffusers
    networks["denoiser"] = _read_params(path / "unet", read_params, unet)
    if unet.text_dim is not None:
        _add_text(path, name, unet.text_dim, config, networks)
    return Pretrained.assembled(config.lock(), networks, step=0, origin=str(path))


def _side(unet: Mapping[str, Any], pipeline: str, where: pathlib.Path) -> int:
    """The side of the square points that a UNet denoises.

    StableDiffusionPipeline takes at least 64 for files that diffusers wrote before 0.9.

    Raises:
        DiffusersError: The points are not square, or the config does not say their size.
    """
    given = unet.get("sample_size")
    sides = set(given) if isinstance(given, list) and len(given) == 2 else {given}
    side = sides.pop()
    if sides or type(side) is not int or side < 1:
        raise DiffusersError(
            f"{where}: sample_size is {given!r}; one number is needed, or the same twice"
        )
    version = re.match(r"(\d+)\.(\d+)", str(unet.get("_diffusers_version", "")))
    old = version is not None and tuple(map(int, version.groups())) < (0, 9)
    if pipeline == STABLE and old and given == side:
        return max(side, 64)
    return side


def _add_text(
    folder: pathlib.Path, name: str, text_dim: int, config: ConfigDict, networks: dict[str, Any]
) -> None:
    """Adds the text encoder and its sections to the networks and the config."""
    sections, text = diffusers_text.read(folder, name, text_dim)
    config.text = sections["text"]
    config.condition.update(sections["condition"])
    with config.data.ignore_type():
        config.data.text = "caption"
    networks["text_encoder"] = text.params
    if text.null is not None:
        networks["denoiser"]["null_text"] = {"embedding": text.null}


def _read_discrete(folder: _Folder) -> Pretrained:
    path, where = folder.path, folder.path / "transformer"
    fields = diffusers_transformer.fields_from_diffusers(folder.config("transformer"), str(where))
    transformer = _made(TokenTransformer, fields, where)
    family, architecture, _, autoencoder = _read_autoencoder(folder, "vqvae")
    if family is not VQModel:
        raise DiffusersError(f"{path / 'vqvae'}: holds no VQModel, so there are no tokens")
    process = diffusers_schedulers.categorical_from_diffusers(*folder.scheduler())
    sizes = {process.pop("num_codes"), fields["num_codes"], architecture["num_codes"]}
    if len(sizes) > 1 or process["num_steps"] != fields["num_steps"]:
        raise DiffusersError(
            f"{path}: transformer, scheduler and codebook do not agree on the number of codes "
            f"({sorted(sizes)}) or steps ({fields['num_steps']}, {process['num_steps']})"
        )
    config = config_lib.default_discrete(
        config_lib.tokens(str(path / "vqvae"), **architecture)
    ).unlock()
    config.data.image_size = fields["grid"][0] * family(**architecture).downsampling
    _update(config, "process", process)
    _update(config, "model", fields)
    # By default, diffusers' pipeline visits every time and truncates nothing.
    config.sampling.update(steps=fields["num_steps"], truncation=1.0)
    codes = np.arange(fields["num_codes"], dtype=np.int32)
    networks = {
        "denoiser": _read_params(where, diffusers_transformer.params_from_diffusers, transformer),
        "first_stage": {"autoencoder": autoencoder, "codes": codes},
    }
    if fields["text_dim"] is not None:
        config.sampling.guidance = PIPELINES[DISCRETE].guidance
        _add_text(path, DISCRETE, fields["text_dim"], config, networks)
    return Pretrained.assembled(config.lock(), networks, step=0, origin=str(path))


def _read_autoencoder(
    folder: _Folder, part: str
) -> tuple[type[VQModel | AutoencoderKL], dict[str, Any], float, Any]:
    """The class, fields, scale of latents, and parameters of a first stage."""
    where = folder.path / part
    family, fields, scale = diffusers_autoencoder.fields_from_diffusers(
        folder.config(part), str(where)
    )
    if fields.pop("out_channels") != 3:
        raise DiffusersError(f"{where}: images of three channels are needed")
    read_params = diffusers_autoencoder.params_from_diffusers
    model = _made(family, fields, where)
    return family, fields, scale, _read_params(where, read_params, model)


def _made(network: type, fields: Mapping[str, Any], where: pathlib.Path) -> Any:
    """Makes a network with these fields.

    Raises:
        DiffusersError: There is no such network here; the message names the field and says why.
    """
    try:
        return network(**fields)
    except (ValueError, TypeError) as error:
        raise DiffusersError(f"{where}: no counterpart here: {error}") from error


def _read_params(folder: pathlib.Path, read_params: Any, network: Any) -> Any:
    """Reads the parameters of a network from the weights in its folder."""
    weights, file = read_weights(folder)
    try:
        return read_params(weights, network)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def _update(config: ConfigDict, section: str, fields: Mapping[str, Any]) -> None:
    """Sets keys of a section to values of any type; the builder derives the other fields."""
    with config[section].ignore_type():
        config[section].update({key: v for key, v in fields.items() if key in config[section]})
