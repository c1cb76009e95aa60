"""Whole models to and from the folders of diffusers' pipelines.

    our model                         pipeline                              opened by
    pixels, patch 1                   DDIMPipeline, DDPMPipeline            their from_pretrained
    latents of a VQ or KL model       LDMPipeline                           the same
    tokens, no text                   VQDiffusionPipeline                   the same

`LDMPipeline` takes a KL model in the place of its VQ model: it only divides by `scaling_factor` and
decodes. `VQDiffusionPipeline` is for text; a model without text ignores it, and its folder has a
one-layer text encoder that only takes its place. No pipeline of unconditional kind passes classes
on, gathers pixels in patches, or holds more than one guidance, and no folder is written then.

Nothing here needs diffusers or torch, but for weights that are pickled (`.bin`).
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from safetensors import numpy as safetensors

from conprediff_jax import config as config_lib
from conprediff_jax.errors import UserError
from conprediff_jax.interop import (
    diffusers_autoencoder,
    diffusers_schedulers,
    diffusers_text_stub,
    diffusers_transformer,
    diffusers_unet,
    tensor_files,
)
from conprediff_jax.interop.diffusers_options import DiffusersError
from conprediff_jax.interop.pretrained import Pretrained
from conprediff_jax.models.autoencoder import AutoencoderKL, VQModel
from conprediff_jax.models.first_stage import Latents, Pixels, Tokens
from conprediff_jax.models.transformer import TokenTransformer
from conprediff_jax.models.unet import UNet

WEIGHTS = "diffusion_pytorch_model.safetensors"
_PICKLED = "diffusion_pytorch_model.bin"
_VERSION = "0.31.0"  # the oldest whose classes have all the options that are written

_CONTINUOUS = ("DDIMPipeline", "DDPMPipeline", "LDMPipeline")
_DISCRETE = "VQDiffusionPipeline"


def pipeline_of(model: Pretrained) -> str:
    """The name of the pipeline that holds a model.

    Raises:
        DiffusersError: none does; the message says why.
    """
    task = model.task
    if task.denoiser.text_dim is not None:
        raise DiffusersError(
            f"{model.origin} reads captions: pipelines with a text encoder are not written; export "
            "--to=inference or safetensors"
        )
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
            return _DISCRETE
        case _:
            return "LDMPipeline"


def write(model: Pretrained, folder: pathlib.Path) -> None:
    """Writes a pipeline into an existing folder.

    Raises:
        DiffusersError: no pipeline holds the model, or one of its parts; the message says why.
    """
    name, task = pipeline_of(model), model.task
    index: dict[str, Any] = {"_class_name": name, "_diffusers_version": _VERSION}
    if name == _DISCRETE:
        scheduler = diffusers_schedulers.categorical_to_diffusers(task.process)
        parts = {
            "vqvae": _token_autoencoder(model),
            "transformer": (
                diffusers_transformer.config_to_diffusers(task.denoiser),
                diffusers_transformer.params_to_diffusers(model.params, task.denoiser),
            ),
        }
        index |= diffusers_text_stub.write(folder)
    else:
        scheduler = diffusers_schedulers.gaussian_to_diffusers(task.process, task.sampling)
        side, _, channels = task.point_shape
        parts = {
            "unet": (
                diffusers_unet.config_to_diffusers(task.denoiser, channels, side),
                diffusers_unet.params_to_diffusers(model.params, task.denoiser),
            )
        }
        if isinstance(task.first_stage, Latents):
            parts["vqvae"] = _latent_autoencoder(model)
    for part, (config, weights) in parts.items():
        _write_part(folder / part, config, weights)
        index[part] = ["diffusers", config["_class_name"]]
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    _write_json(folder / "model_index.json", index)


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


def _write_part(
    folder: pathlib.Path, config: Mapping[str, Any], weights: Mapping[str, np.ndarray]
) -> None:
    _write_json(folder / "config.json", {"_diffusers_version": _VERSION, **config})
    safetensors.save_file(dict(weights), folder / WEIGHTS, metadata={"format": "pt"})


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


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
    name = _read_json(folder / "model_index.json").get("_class_name")
    if name == _DISCRETE:
        return _read_discrete(folder)
    if name not in _CONTINUOUS:
        raise DiffusersError(
            f"{folder}: holds a {name}; {', '.join((*_CONTINUOUS, _DISCRETE))} are read"
        )
    return _read_continuous(folder, latent=name == "LDMPipeline")


def _read_continuous(folder: pathlib.Path, latent: bool) -> Pretrained:
    unet_config = _read_json(folder / "unet" / "config.json")
    fields = diffusers_unet.fields_from_diffusers(unet_config, str(folder / "unet"))
    unet = UNet(**fields)
    if unet.text_dim is not None:
        raise DiffusersError(f"{folder / 'unet'}: a UNet with text; text encoders are not read")
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    process, sampling = diffusers_schedulers.gaussian_from_diffusers(
        scheduler, str(folder / "scheduler")
    )
    config = config_lib.default().unlock()
    side, frozen = unet_config.get("sample_size"), {}
    if not isinstance(side, int):
        raise DiffusersError(f"{folder / 'unet'}: sample_size is {side!r}; one number is needed")
    if latent:
        family, architecture, scale, params = _read_autoencoder(folder / "vqvae")
        kind = "vq" if family is VQModel else "kl"
        config.first_stage = config_lib.latents(
            kind, str(folder / "vqvae"), scale=scale, **architecture
        )
        side *= family(**architecture).downsampling
        frozen = {"autoencoder": params, "scale": np.float32(scale)}
    config.data.image_size = side
    _update(config, "process", process)
    # An argument of the pipeline; half of all times always fit, whatever their offset.
    sampling["steps"] = min(config.sampling.steps, max(1, process["num_steps"] // 2))
    _update(config, "sampling", sampling)
    _update(config, "model", fields)
    params = _read_params(folder / "unet", diffusers_unet.params_from_diffusers, unet)
    return _checked(folder, config, params, frozen)


def _read_discrete(folder: pathlib.Path) -> Pretrained:
    where = folder / "transformer"
    fields = diffusers_transformer.fields_from_diffusers(
        _read_json(where / "config.json"), str(where)
    )
    if fields["text_dim"] is not None:
        raise DiffusersError(f"{where}: a transformer with text; text encoders are not read")
    transformer = TokenTransformer(**fields)
    family, architecture, _, autoencoder = _read_autoencoder(folder / "vqvae")
    if family is not VQModel:
        raise DiffusersError(f"{folder / 'vqvae'}: holds no VQModel, so there are no tokens")
    process = diffusers_schedulers.categorical_from_diffusers(
        _read_json(folder / "scheduler" / "scheduler_config.json"), str(folder / "scheduler")
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
    params = _read_params(where, diffusers_transformer.params_from_diffusers, transformer)
    codes = np.arange(fields["num_codes"], dtype=np.int32)
    return _checked(folder, config, params, {"autoencoder": autoencoder, "codes": codes})


def _read_autoencoder(
    folder: pathlib.Path,
) -> tuple[type[VQModel | AutoencoderKL], dict[str, Any], float, Any]:
    """Class, fields, scale and parameters of a first stage."""
    family, fields, scale = diffusers_autoencoder.fields_from_diffusers(
        _read_json(folder / "config.json"), str(folder)
    )
    if fields.pop("out_channels") != 3:
        raise DiffusersError(f"{folder}: images of three channels are needed")
    read_params = diffusers_autoencoder.params_from_diffusers
    return family, fields, scale, _read_params(folder, read_params, family(**fields))


def _read_params(folder: pathlib.Path, read_params: Any, network: Any) -> Any:
    """Parameters of a network out of the weights in its folder."""
    file = next((folder / n for n in (WEIGHTS, _PICKLED) if (folder / n).exists()), None)
    if file is None:
        raise UserError(f"{folder}: no weights; put {WEIGHTS} there")
    try:
        return read_params(tensor_files.arrays(tensor_files.read(file), str(file)), network)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable file of a diffusers pipeline: {error}") from error


def _update(config: ConfigDict, section: str, fields: Mapping[str, Any]) -> None:
    """Sets keys of a section, of whatever type their defaults are; others are derived there."""
    with config[section].ignore_type():
        config[section].update({key: v for key, v in fields.items() if key in config[section]})


def _checked(folder: pathlib.Path, config: ConfigDict, params: Any, frozen: Any) -> Pretrained:
    model = Pretrained(
        config=config.lock(), params=params, frozen=frozen, step=0, origin=str(folder)
    )
    model.check()
    return model
