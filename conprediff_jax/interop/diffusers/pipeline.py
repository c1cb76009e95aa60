"""Whole models to and from the folders of diffusers' pipelines.

    our model                                pipeline
    pixels, patch 1                          DDIMPipeline, DDPMPipeline; flow matching: the second
    latents of a VQ or KL model              LDMPipeline
    latents, captions by BERT or CLIP        LDMTextToImagePipeline, StableDiffusionPipeline
    latents of a KL model, classes, a DiT    DiTPipeline
    tokens, with or without CLIP captions    VQDiffusionPipeline

The `from_pretrained` of a pipeline opens its folder. `LDMPipeline` also takes a KL model in the
place of its VQ model, since it only divides by `scaling_factor` and decodes. No pipeline of a UNet
passes classes on, and none works on patches of pixels or changes its guidance between steps; such
models are refused.

Nothing here needs diffusers. Only pickled weights (`.bin`) need torch.
"""

import pathlib
import re
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from conprediff_jax import config as config_lib
from conprediff_jax.diffusion.categorical import CategoricalProcess
from conprediff_jax.diffusion.flow import FlowProcess
from conprediff_jax.diffusion.gaussian import GaussianProcess
from conprediff_jax.interop.diffusers import custom, dit
from conprediff_jax.interop.diffusers import text as diffusers_text
from conprediff_jax.interop.diffusers.dit import PIPELINE as DIT
from conprediff_jax.interop.diffusers.files import VERSION, write_json, write_part
from conprediff_jax.interop.diffusers.folder import (
    Folder,
    Part,
    Pipeline,
    latent_autoencoder,
    made,
    params_in,
    read_autoencoder,
    refusal,
    update,
)
from conprediff_jax.interop.diffusers.text import DISCRETE, LATENT, STABLE
from conprediff_jax.interop.pretrained import Pretrained
from conprediff_jax.models.autoencoder import VQModel
from conprediff_jax.models.dit import DiT
from conprediff_jax.models.first_stage import Palette, Pixels, Tokens
from conprediff_jax.models.transformer import TokenTransformer
from conprediff_jax.models.unet import UNet
from conprediff_jax.sampling.spec import FlowSampling
from conprediff_jax.weights.diffusers import autoencoder as diffusers_autoencoder
from conprediff_jax.weights.diffusers import dit as diffusers_dit
from conprediff_jax.weights.diffusers import schedulers as diffusers_schedulers
from conprediff_jax.weights.diffusers import transformer as diffusers_transformer
from conprediff_jax.weights.diffusers import unet as diffusers_unet
from conprediff_jax.weights.diffusers.options import DiffusersError

# The only pipeline here that uses no method which diffusers' schedulers of flow matching lack.
FLOW = "DDPMPipeline"

# The pipelines of Gaussian diffusion, with the part that holds the first stage of each.
_CONTINUOUS = {
    "DDIMPipeline": None,
    "DDPMPipeline": None,
    "LDMPipeline": "vqvae",
    LATENT: "vqvae",
    STABLE: "vae",
    DIT: "vae",
}


def _parts(unet: str, **others: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The parts of a pipeline of Gaussian diffusion, with the class of its UNet."""
    return {"unet": (unet,), "scheduler": diffusers_schedulers.CONTINUOUS, **others}


_AUTOENCODERS = ("VQModel", "AutoencoderKL")
PIPELINES = {
    "DDIMPipeline": Pipeline(parts=_parts("UNet2DModel")),
    FLOW: Pipeline(
        parts={
            "unet": ("UNet2DModel",),
            "scheduler": (*diffusers_schedulers.CONTINUOUS, *diffusers_schedulers.FLOW),
        },
        steps=1000,
    ),
    "LDMPipeline": Pipeline(parts=_parts("UNet2DModel", vqvae=_AUTOENCODERS)),
    LATENT: Pipeline(
        parts=_parts(
            "UNet2DConditionModel", vqvae=_AUTOENCODERS, bert=("LDMBertModel",), tokenizer=()
        )
    ),
    STABLE: Pipeline(
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
    DIT: Pipeline(
        parts={
            "transformer": diffusers_dit.CLASSES,
            "scheduler": diffusers_schedulers.CONTINUOUS,
            "vae": ("AutoencoderKL",),
            "id2label": (),
        },
        guidance=4.0,
    ),
    DISCRETE: Pipeline(
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
    known = (GaussianProcess, FlowProcess, CategoricalProcess)
    if not isinstance(diffusion.process, known):
        raise refusal(
            model,
            f"has a process of class {type(diffusion.process).__name__}: the pipelines written "
            f"here have one of {', '.join(cls.__name__ for cls in known)}",
        )
    height, width = diffusion.image_shape
    if height != width or diffusion.channels != 3:
        raise refusal(
            model,
            f"draws images of {width} x {height} pixels and {diffusion.channels} channels: the "
            "pipelines written here draw square RGB images",
        )
    name = _pipeline_of_network(model)
    if isinstance(diffusion.process, FlowProcess) and name != FLOW:
        raise refusal(
            model,
            f"would be a {name} with flow matching: only a {FLOW} (pixels without patches, classes "
            "or captions) takes diffusers' schedulers of flow matching",
        )
    return name


def _pipeline_of_network(model: Pretrained) -> str:
    """The name of the pipeline that can hold a model's networks."""
    diffusion = model.diffusion
    if isinstance(diffusion.denoiser, DiT):
        dit.check(model)
        return DIT
    if not isinstance(diffusion.denoiser, UNet | TokenTransformer):
        raise refusal(
            model,
            f"has a denoiser of class {type(diffusion.denoiser).__name__}: the pipelines written "
            "here have a UNet, a DiT or a token transformer",
        )
    if diffusion.text:
        return diffusers_text.pipeline_of(model)
    if diffusion.num_classes:
        raise refusal(
            model,
            f"has {diffusion.num_classes} classes: none of diffusers' pipelines of this kind "
            "passes classes on",
        )
    match diffusion.first_stage:
        case Pixels(patch=1):
            return "DDIMPipeline" if diffusion.sampling.sampler == "ddim" else "DDPMPipeline"
        case Pixels(patch=patch):
            raise refusal(
                model,
                f"diffuses patches of {patch} x {patch} pixels: none of diffusers' pipelines does",
            )
        case Palette():
            raise refusal(
                model,
                "diffuses tokens that the data hold: diffusers' pipelines have a VQ autoencoder",
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
    name = pipeline_of(model)
    scheduler, parts = _discrete(model) if name == DISCRETE else _continuous(model, name)
    index: dict[str, Any] = {"_class_name": name, "_diffusers_version": VERSION}
    if name in (DISCRETE, LATENT, STABLE):
        index |= diffusers_text.write(diffusers_text.of_model(model), name, folder)
    if name == STABLE:
        unused = ("safety_checker", "feature_extractor", "image_encoder")
        index |= {part: [None, None] for part in unused} | {"requires_safety_checker": False}
    if name == DIT:
        index |= dit.labels_of(model)
    for part, (config, weights) in parts.items():
        write_part(folder / part, config, weights)
        index[part] = ["diffusers", config["_class_name"]]
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    write_json(folder / "model_index.json", index)
    custom.write(name, scheduler, folder)


def _discrete(model: Pretrained) -> tuple[dict[str, Any], dict[str, Part]]:
    """The scheduler's config and the networks of a model of tokens, by the names of their parts."""
    diffusion = model.diffusion
    scheduler = diffusers_schedulers.categorical_to_diffusers(diffusion.process, diffusion.sampling)
    denoiser, params = _without_null_text(model)
    transformer = (
        diffusers_transformer.config_to_diffusers(denoiser),
        diffusers_transformer.params_to_diffusers(params, denoiser),
    )
    return scheduler, {"vqvae": _token_autoencoder(model), "transformer": transformer}


def _continuous(model: Pretrained, name: str) -> tuple[dict[str, Any], dict[str, Part]]:
    """The same as `_discrete`, for a model of Gaussian diffusion in the pipeline of a name."""
    diffusion = model.diffusion
    if isinstance(diffusion.process, FlowProcess):
        scheduler = diffusers_schedulers.flow_to_diffusers(diffusion.process, diffusion.sampling)
    else:
        scheduler = diffusers_schedulers.gaussian_to_diffusers(
            diffusion.process, diffusion.sampling, pipeline=name
        )
    side, _, channels = diffusion.point_shape
    if name == DIT:
        part, layout = "transformer", diffusers_dit
        denoiser, params = diffusion.denoiser, model.networks["denoiser"]
    else:
        part, layout = "unet", diffusers_unet
        denoiser, params = _without_null_text(model)
    config = layout.config_to_diffusers(denoiser, channels, side)
    parts = {part: (config, layout.params_to_diffusers(params, denoiser))}
    if _CONTINUOUS[name]:
        parts[_CONTINUOUS[name]] = latent_autoencoder(model)
    return scheduler, parts


def _without_null_text(model: Pretrained) -> tuple[Any, dict[str, Any]]:
    """The denoiser and its parameters without the null text, which is a part of its own."""
    params = dict(model.networks["denoiser"])
    params.pop("null_text", None)
    return model.diffusion.denoiser.clone(learned_null=False), params


def _token_autoencoder(model: Pretrained) -> Part:
    """Config and weights of the first stage of tokens, with the codes in use alone."""
    first_stage, frozen = model.diffusion.first_stage, model.frozen
    autoencoder = first_stage.model.clone(num_codes=first_stage.num_codes)
    codebook = frozen["autoencoder"]["quantizer"]["codebook"][frozen["codes"]]
    params = frozen["autoencoder"] | {"quantizer": {"codebook": codebook}}
    config = diffusers_autoencoder.config_to_diffusers(
        autoencoder, 1.0, model.config.data.image_size
    )
    return config, diffusers_autoencoder.params_to_diffusers(params, autoencoder)


def read(path: str) -> Pretrained:
    """Reads a model from a pipeline's folder.

    Args:
        path: The folder, with `model_index.json` and a folder for each part. Pickled weights need
            torch.

    Raises:
        UserError: A part is missing, or has no counterpart here, or its weights do not fit its
            config.
    """
    folder = Folder.opened(pathlib.Path(path).expanduser(), PIPELINES)
    return _read_discrete(folder) if folder.pipeline == DISCRETE else _read_continuous(folder)


def _read_continuous(folder: Folder) -> Pretrained:
    name, path = folder.pipeline, folder.path
    denoiser, fields, params = _read_denoiser(folder)
    config, networks = config_lib.default().unlock(), {"denoiser": params}
    process, sampling = _read_scheduler(folder, config)
    side = _side(folder)
    if _CONTINUOUS[name]:
        family, architecture, scale, params = read_autoencoder(folder, _CONTINUOUS[name])
        kind, where = "vq" if family is VQModel else "kl", str(path / _CONTINUOUS[name])
        config.first_stage = config_lib.latents(kind, where, scale=scale, **architecture)
        side *= family(**architecture).downsampling
        networks["first_stage"] = {"autoencoder": params, "scale": np.float32(scale)}
    config.data.image_size = side
    if name == DIT:
        dit.add_classes(folder, config, denoiser.num_classes)
    update(config, "process", process)
    update(config, "sampling", sampling)
    update(config, "model", fields)
    if denoiser.text_dim is not None:
        _add_text(path, name, denoiser.text_dim, config, networks)
    return Pretrained.assembled(config.lock(), networks, step=0, origin=str(path))


def _read_denoiser(folder: Folder) -> tuple[UNet | DiT, dict[str, Any], Any]:
    """The denoiser of a pipeline of Gaussian diffusion, its fields and its parameters."""
    if folder.pipeline == DIT:
        part, network, layout = "transformer", DiT, diffusers_dit
    else:
        part, network, layout = "unet", UNet, diffusers_unet
    where = folder.path / part
    fields = layout.fields_from_diffusers(folder.config(part), str(where))
    denoiser = made(network, fields, where)
    if folder.pipeline in (LATENT, STABLE) and denoiser.text_dim is None:
        raise DiffusersError(f"{where}: cross_attention_dim is None in a {folder.pipeline}")
    return denoiser, fields, params_in(where, layout.params_from_diffusers, denoiser)


def _read_scheduler(folder: Folder, config: ConfigDict) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the `process` section and of the `sampling` section, whose kinds it sets."""
    (scheduler, where), defaults = folder.scheduler(), PIPELINES[folder.pipeline]
    if scheduler["_class_name"] in diffusers_schedulers.FLOW:
        process, sampling = diffusers_schedulers.flow_from_diffusers(scheduler, where)
        config.process = config_lib.section(FlowProcess, kind="flow")
        config.sampling = config_lib.section(FlowSampling)
        return process, sampling | {"steps": defaults.steps, "guidance": defaults.guidance}
    process, sampling = diffusers_schedulers.gaussian_from_diffusers(
        scheduler, where, pipeline=folder.pipeline
    )
    steps = diffusers_schedulers.fitting_steps(process, sampling, defaults.steps, where)
    return process, sampling | {"steps": steps, "guidance": defaults.guidance}


def _side(folder: Folder) -> int:
    """The side of the square points that the denoiser of a pipeline of Gaussian diffusion takes.

    StableDiffusionPipeline takes at least 64 for files that diffusers wrote before 0.9.

    Raises:
        DiffusersError: The points are not square, or the config does not say their size.
    """
    part = "transformer" if folder.pipeline == DIT else "unet"
    config, where = folder.config(part), folder.path / part
    given = config.get("sample_size")
    sides = set(given) if isinstance(given, list) and len(given) == 2 else {given}
    side = sides.pop()
    if sides or type(side) is not int or side < 1:
        raise DiffusersError(
            f"{where}: sample_size is {given!r}; one number is needed, or the same twice"
        )
    version = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version", "")))
    old = version is not None and tuple(map(int, version.groups())) < (0, 9)
    if folder.pipeline == STABLE and old and given == side:
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


def _read_discrete(folder: Folder) -> Pretrained:
    path, where = folder.path, folder.path / "transformer"
    fields = diffusers_transformer.fields_from_diffusers(folder.config("transformer"), str(where))
    transformer = made(TokenTransformer, fields, where)
    family, architecture, _, autoencoder = read_autoencoder(folder, "vqvae")
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
    update(config, "process", process)
    update(config, "model", fields)
    # By default, diffusers' pipeline visits every time and truncates nothing.
    config.sampling.update(steps=fields["num_steps"], truncation=1.0)
    codes = np.arange(fields["num_codes"], dtype=np.int32)
    networks = {
        "denoiser": params_in(where, diffusers_transformer.params_from_diffusers, transformer),
        "first_stage": {"autoencoder": autoencoder, "codes": codes},
    }
    if fields["text_dim"] is not None:
        config.sampling.guidance = PIPELINES[DISCRETE].guidance
        _add_text(path, DISCRETE, fields["text_dim"], config, networks)
    return Pretrained.assembled(config.lock(), networks, step=0, origin=str(path))
