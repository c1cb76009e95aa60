"""What is peculiar to diffusers' `DiTPipeline`: its classes, and the models that it can hold.

    transformer    the DiT; see weights/diffusers/dit.py
    vae            the first stage, an AutoencoderKL
    scheduler      as in other pipelines of Gaussian diffusion
    id2label       names of the classes by number, `config.data.class_names` here

The pipeline takes class 1000 for no class, and guides only above a scale of 1. It guides all
channels of the latents, as we do.
"""

from typing import Any

from ml_collections import ConfigDict

from conprediff_jax.config.sections import section
from conprediff_jax.interop.diffusers.folder import Folder, check_guidance, refusal
from conprediff_jax.interop.pretrained import Pretrained
from conprediff_jax.models.autoencoder import AutoencoderKL
from conprediff_jax.models.dit import DiT
from conprediff_jax.models.first_stage import Latents
from conprediff_jax.weights.diffusers.options import DiffusersError

PIPELINE = "DiTPipeline"
_NULL = 1000


def check(model: Pretrained) -> None:
    """Checks that the pipeline can hold a model with a DiT.

    Raises:
        DiffusersError: It cannot; the message says why.
    """
    diffusion = model.diffusion
    first_stage, classes = diffusion.first_stage, diffusion.num_classes
    if not isinstance(first_stage, Latents) or not isinstance(first_stage.model, AutoencoderKL):
        raise refusal(model, f"has no first stage of kind 'kl', whose latents a {PIPELINE} draws")
    if classes != _NULL:
        raise refusal(model, f"has {classes or 'no'} classes: those of a {PIPELINE} are {_NULL}")
    if eta := getattr(diffusion.sampling, "eta", 0.0):
        raise refusal(model, f"has sampling.eta {eta}: a {PIPELINE} adds no noise in DDIM")
    check_guidance(model, PIPELINE)


def labels_of(model: Pretrained) -> dict[str, dict[str, str]]:
    """The entry `id2label` of `model_index.json`; empty if the names of the classes are unknown."""
    names = model.config.data.class_names
    return {"id2label": {str(number): name for number, name in enumerate(names)}} if names else {}


def add_classes(folder: Folder, config: ConfigDict, classes: int) -> None:
    """Adds the sections of a DiT with classes to a config, and the names of the classes.

    Args:
        folder: The folder of the pipeline.
        config: The config, changed in place.
        classes: The number of classes.

    Raises:
        DiffusersError: `id2label` does not name every class.
    """
    config.model = section(DiT, kind="dit")
    config.condition.dropout = 0.1
    names: Any = folder.index.get("id2label")
    if names is None:
        return
    numbers = {str(number) for number in range(classes)}
    if not isinstance(names, dict) or names.keys() != numbers:
        raise DiffusersError(
            f"{folder.path}: id2label in model_index.json must have a name for every class, 0 to "
            f"{classes - 1}"
        )
    config.data.class_names = tuple(str(names[str(number)]) for number in range(classes))
