"""A model as safetensors: one file a network, our own names and layouts.

    <folder>/denoiser.safetensors       'input_conv/kernel', ...: paths joined by '/'
    <folder>/first_stage.safetensors    'autoencoder/encoder/...', and 'scale' or 'codes'
    <folder>/config.json                the whole config

The metadata of each file hold the format, its version, the step and the config, so that a file that
is found alone still says what it is.
"""

import json
import pathlib

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors import numpy as safetensors
from safetensors import safe_open

from conprediff_jax.errors import UserError
from conprediff_jax.interop import tensor_files
from conprediff_jax.interop.pretrained import Pretrained

FORMAT, VERSION = "conprediff_jax", "1"
DENOISER, FIRST_STAGE = "denoiser.safetensors", "first_stage.safetensors"


def write(model: Pretrained, folder: pathlib.Path) -> None:
    """Writes the files into an existing folder."""
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "step": str(model.step),
        "origin": model.origin,
        "config": model.config.to_json(),
    }
    for name, tree in ((DENOISER, model.params), (FIRST_STAGE, model.frozen)):
        if tree:
            tensors = traverse_util.flatten_dict(tree, sep="/")
            tensors = {path: np.asarray(leaf, order="C") for path, leaf in tensors.items()}
            safetensors.save_file(tensors, folder / name, metadata=metadata)


def read(path: str) -> Pretrained:
    """A model out of such a folder.

    Raises:
        UserError: a file is missing or of another format, or a tensor is missing, left over or of
            another shape than the config's.
    """
    folder = pathlib.Path(path).expanduser()
    denoiser = tensor_files.read(folder / DENOISER)
    with safe_open(folder / DENOISER, "np") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise UserError(
            f"{folder / DENOISER}: of format {metadata.get('format')!r}, version "
            f"{metadata.get('version')!r}; version {VERSION} of {FORMAT!r} is read"
        )
    frozen = {}
    if (folder / FIRST_STAGE).exists():
        frozen = traverse_util.unflatten_dict(tensor_files.read(folder / FIRST_STAGE), sep="/")
    model = Pretrained(
        config=ConfigDict(json.loads(metadata["config"])),
        params=traverse_util.unflatten_dict(denoiser, sep="/"),
        frozen=frozen,
        step=int(metadata["step"]),
        origin=str(folder),
    )
    model.check()
    return model
