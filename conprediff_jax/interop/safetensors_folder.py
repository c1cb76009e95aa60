"""A model as safetensors: one file for each network, with our own names and layouts.

    <folder>/denoiser.safetensors       'input_conv/kernel', ...: paths joined by '/'
    <folder>/first_stage.safetensors    'autoencoder/encoder/...', and 'scale' or 'codes'
    <folder>/text_encoder.safetensors   'token_embedding/embedding', ...; with tokenizer.json
    <folder>/config.json                the whole config

The metadata of each file hold the format, its version, the step and the config, so that a single
file still says what it is.
"""

import json
import pathlib

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors import safe_open

from conprediff_jax.common.errors import UserError
from conprediff_jax.interop.pretrained import Pretrained
from conprediff_jax.weights import tensor_files

FORMAT, VERSION = "conprediff_jax", "1"
NETWORKS = ("denoiser", "first_stage", "text_encoder")


def write(model: Pretrained, folder: pathlib.Path) -> None:
    """Writes the files into an existing folder."""
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "step": str(model.step),
        "origin": model.origin,
        "config": model.config.to_json(),
    }
    for name, tree in model.networks.items():
        tensors = traverse_util.flatten_dict(tree, sep="/")
        tensors = {path: np.asarray(leaf, order="C") for path, leaf in tensors.items()}
        tensor_files.write(_file(folder, name), tensors, metadata)


def read(path: str) -> Pretrained:
    """Reads a model from such a folder.

    Raises:
        UserError: A file is missing or has another format, or a tensor is missing, left over, or
            has another shape than the config asks for.
    """
    folder = pathlib.Path(path).expanduser()
    denoiser = _file(folder, "denoiser")
    tensors = {"denoiser": tensor_files.read(denoiser)}
    with safe_open(denoiser, "np") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise UserError(
            f"{denoiser}: the format is {metadata.get('format')!r}, version "
            f"{metadata.get('version')!r}; it must be {FORMAT!r}, version {VERSION}"
        )
    for name in NETWORKS[1:]:
        if _file(folder, name).exists():
            tensors[name] = tensor_files.read(_file(folder, name))
    return Pretrained.assembled(
        ConfigDict(json.loads(metadata["config"])),
        {name: traverse_util.unflatten_dict(flat, sep="/") for name, flat in tensors.items()},
        step=int(metadata["step"]),
        origin=str(folder),
    )


def _file(folder: pathlib.Path, network: str) -> pathlib.Path:
    return folder / f"{network}.safetensors"
