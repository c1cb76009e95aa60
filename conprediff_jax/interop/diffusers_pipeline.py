"""Whole models to and from the folders of diffusers' pipelines.

    our model                                pipeline
    pixels, patch 1                          DDIMPipeline, DDPMPipeline
    latents of a VQ or KL model              LDMPipeline
    latents, captions by BERT or CLIP        LDMTextToImagePipeline, StableDiffusionPipeline
    tokens, no captions or those by CLIP     VQDiffusionPipeline

Each is opened by its `from_pretrained`. `LDMPipeline` takes a KL model in the place of its VQ
model: it only divides by `scaling_factor` and decodes. No pipeline passes classes on, gathers
pixels in patches, or holds more than one guidance, and no folder is written then.

Nothing here needs diffusers or torch, but for weights that are pickled (`.bin`).
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from conprediff_jax import config as config_lib
from conprediff_jax.errors import UserError
from conprediff_jax.interop import (
    diffusers_autoencoder,
    diffusers_schedulers,
    diffusers_text,
    diffusers_transformer,
    diffusers_unet,
)
from conprediff_jax.interop.diffusers_files import (
    VERSION,
    read_json,
    read_weights,
    write_json,
    write_part,
)
from conprediff_jax.interop.diffusers_options import DiffusersError
from conprediff_jax.interop.diffusers_text import DISCRETE, LATENT, STABLE
from conprediff_jax.interop.pretrained import Pretrained
from conprediff_jax.models.autoencoder import AutoencoderKL, VQModel
from conprediff_jax.models.first_stage import Pixels, Tokens
from conprediff_jax.models.transformer import TokenTransformer
from conprediff_jax.models.unet import UNet

# Those of Gaussian diffusion, and where each keeps its first stage.
_CONTINUOUS = {
    "DDIMPipeline": None,
    "DDPMPipeline": None,
    "LDMPipeline": "vqvae",
    LATENT: "vqvae",
    STABLE: "vae",
}


def pipeline_of(model: Pretrained) -> str:
    """The name of the pipeline that holds a model.

    Raises:
        DiffusersError: none does; the message says why.
    """
    task = model.task
    if task.text:
        return diffusers_text.pipeline_of(model)
    if task.num_classes:
        raise DiffusersError(
            f"{model.origin} has {task.num_classes} classes: none of diffusers' pipelines of this "
            "kind passes classes on; export --to=inference, safetensors or stablehlo"
        )
    match task.first_stage:
        case Pixels(patch=1):
            return "DDIMPipeline" if task.sampling.sampler == "ddim" else "DDPMPipeline"
        case Pixels(patch=patch):
            raise DiffusersError(
                f"{model.origin} diffuses patches of {patch} x {patch} pixels: none of diffusers' "
                "pipelines does; export --to=inference, safetensors or stablehlo"
            )
        case Tokens():
            return DISCRETE
        case _:
            return "LDMPipeline"


def write(model: Pretrained, folder: pathlib.Path) -> None:
    """Writes a pipeline into an existing folder.

    Raises:
        DiffusersError: no pipeline holds the model, or one of its parts; the message says why.
    """
    name, task = pipeline_of(model), model.task
    denoiser, params = task.denoiser.clone(learned_null=False), dict(model.networks["denoiser"])
    params.pop("null_text", None)
    if name == DISCRETE:
        scheduler = diffusers_schedulers.categorical_to_diffusers(task.process, task.sampling)
        parts = {
            "vqvae": _token_autoencoder(model),
            "transformer": (
                diffusers_transformer.config_to_diffusers(denoiser),
                diffusers_transformer.params_to_diffusers(params, denoiser),
            ),
        }
    else:
        to_scheduler = diffusers_schedulers.gaussian_to_diffusers
        scheduler = to_scheduler(task.process, task.sampling, stable=name == STABLE)
        side, _, channels = task.point_shape
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
    autoencoder, frozen = model.task.first_stage.model, model.frozen
    config = diffusers_autoencoder.config_to_diffusers(
        autoencoder, float(frozen["scale"]), model.config.data.image_size
    )
    return config, diffusers_autoencoder.params_to_diffusers(frozen["autoencoder"], autoencoder)


def _token_autoencoder(model: Pretrained) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config and weights of the first stage of tokens, with the codes that they count."""
    first_stage, frozen = model.task.first_stage, model.frozen
    autoencoder = first_stage.model.clone(num_codes=first_stage.num_codes)
    codebook = frozen["autoencoder"]["quantizer"]["codebook"][frozen["codes"]]
    params = frozen["autoencoder"] | {"quantizer": {"codebook": codebook}}
    config = diffusers_autoencoder.config_to_diffusers(
        autoencoder, 1.0, model.config.data.image_size
    )
    return config, diffusers_autoencoder.params_to_diffusers(params, autoencoder)


def read(path: str) -> Pretrained:
    """A model out of a pipeline's folder.

    Args:
        path: Folder with `model_index.json`, a folder for each part, and weights as safetensors or
            pickled (for which torch is needed).

    Raises:
        UserError: A part is missing, is of a kind that is not known here, or has weights that do
            not fit its config.
    """
    folder = pathlib.Path(path).expanduser()
    name = read_json(folder / "model_index.json").get("_class_name")
    if name == DISCRETE:
        return _read_discrete(folder)
    if name not in _CONTINUOUS:
        raise DiffusersError(
            f"{folder}: holds a {name}; {', '.join((*_CONTINUOUS, DISCRETE))} are read"
        )
    return _read_continuous(folder, name)


def _read_continuous(folder: pathlib.Path, name: str) -> Pretrained:
    unet_config = read_json(folder / "unet" / "config.json")
    fields = diffusers_unet.fields_from_diffusers(unet_config, str(folder / "unet"))
    unet = UNet(**fields)
    if (unet.text_dim is not None) != (name in (LATENT, STABLE)):
        raise DiffusersError(f"{folder / 'unet'}: holds a {unet_config['_class_name']} in a {name}")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    process, sampling = diffusers_schedulers.gaussian_from_diffusers(
        scheduler, str(folder / "scheduler")
    )
    config = config_lib.default().unlock()
    side, networks = unet_config.get("sample_size"), {}
    if not isinstance(side, int):
        raise DiffusersError(f"{folder / 'unet'}: sample_size is {side!r}; one number is needed")
    if _CONTINUOUS[name]:
        where = folder / _CONTINUOUS[name]
        family, architecture, scale, params = _read_autoencoder(where)
        kind = "vq" if family is VQModel else "kl"
        config.first_stage = config_lib.latents(kind, str(where), scale=scale, **architecture)
        side *= family(**architecture).downsampling
        networks["first_stage"] = {"autoencoder": params, "scale": np.float32(scale)}
    config.data.image_size = side
    _update(config, "process", process)
    # An argument of the pipeline; half of all times always fit, whatever their offset.
    sampling["steps"] = min(config.sampling.steps, max(1, process["num_steps"] // 2))
    _update(config, "sampling", sampling)
    _update(config, "model", fields)
    read_params = diffusers_unet.params_from_diffusers
    networks["denoiser"] = _read_params(folder / "unet", read_params, unet)
    if unet.text_dim is not None:
        _add_text(folder, name, unet.text_dim, config, networks)
    return Pretrained.assembled(config.lock(), networks, step=0, origin=str(folder))


def _add_text(
    folder: pathlib.Path, name: str, text_dim: int, config: ConfigDict, networks: dict[str, Any]
) -> None:
    """Adds what reads captions to a config and the networks."""
    sections, text = diffusers_text.read(folder, name, text_dim)
    config.text = sections["text"]
    config.condition.update(sections["condition"])
    with config.data.ignore_type():
        config.data.text = "caption"
    networks["text_encoder"] = text.params
    if text.null is not None:
        networks["denoiser"]["null_text"] = {"embedding": text.null}


def _read_discrete(folder: pathlib.Path) -> Pretrained:
    where = folder / "transformer"
    fields = diffusers_transformer.fields_from_diffusers(
        read_json(where / "config.json"), str(where)
    )
    transformer = TokenTransformer(**fields)
    family, architecture, _, autoencoder = _read_autoencoder(folder / "vqvae")
    if family is not VQModel:
        raise DiffusersError(f"{folder / 'vqvae'}: holds no VQModel, so there are no tokens")
    process = diffusers_schedulers.categorical_from_diffusers(
        read_json(folder / "scheduler" / "scheduler_config.json"), str(folder / "scheduler")
    )
    sizes = {process.pop("num_codes"), fields["num_codes"], architecture["num_codes"]}
    if len(sizes) > 1 or process["num_steps"] != fields["num_steps"]:
        raise DiffusersError(
            f"{folder}: transformer, scheduler and codebook do not agree on the number of codes "
            f"({sorted(sizes)}) or steps ({fields['num_steps']}, {process['num_steps']})"
        )
    config = config_lib.default_discrete(
        config_lib.tokens(str(folder / "vqvae"), **architecture)
    ).unlock()
    config.data.image_size = fields["grid"][0] * family(**architecture).downsampling
    _update(config, "process", process)
    _update(config, "model", fields)
    # diffusers' pipeline visits every time and truncates nothing unless told to.
    config.sampling.update(steps=fields["num_steps"], truncation=1.0)
    codes = np.arange(fields["num_codes"], dtype=np.int32)
    networks = {
        "denoiser": _read_params(where, diffusers_transformer.params_from_diffusers, transformer),
        "first_stage": {"autoencoder": autoencoder, "codes": codes},
    }
    if fields["text_dim"] is not None:
        _add_text(folder, DISCRETE, fields["text_dim"], config, networks)
    return Pretrained.assembled(config.lock(), networks, step=0, origin=str(folder))


def _read_autoencoder(
    folder: pathlib.Path,
) -> tuple[type[VQModel | AutoencoderKL], dict[str, Any], float, Any]:
    """Class, fields, scale and parameters of a first stage."""
    family, fields, scale = diffusers_autoencoder.fields_from_diffusers(
        read_json(folder / "config.json"), str(folder)
    )
    if fields.pop("out_channels") != 3:
        raise DiffusersError(f"{folder}: images of three channels are needed")
    read_params = diffusers_autoencoder.params_from_diffusers
    return family, fields, scale, _read_params(folder, read_params, family(**fields))


def _read_params(folder: pathlib.Path, read_params: Any, network: Any) -> Any:
    """Parameters of a network out of the weights in its folder."""
    weights, file = read_weights(folder)
    try:
        return read_params(weights, network)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def _update(config: ConfigDict, section: str, fields: Mapping[str, Any]) -> None:
    """Sets keys of a section, of whatever type their defaults are; others are derived there."""
    with config[section].ignore_type():
        config[section].update({key: v for key, v in fields.items() if key in config[section]})
