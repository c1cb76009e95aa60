"""The files in the folders of diffusers' pipelines: JSON files, and weights beside their config.

Only pickled weights (`.bin`) need torch.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from conprediff_jax.common.errors import UserError
from conprediff_jax.weights import tensor_files

WEIGHTS = "diffusion_pytorch_model.safetensors"
# The oldest version of diffusers whose classes have all the options that are written.
VERSION = "0.31.0"


def write_part(
    folder: pathlib.Path,
    config: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    file: str = WEIGHTS,
) -> None:
    """Writes a network into a new folder."""
    write_json(folder / "config.json", {"_diffusers_version": VERSION, **config})
    tensor_files.write(folder / file, weights, {"format": "pt"})


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, and makes its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON file.

    Raises:
        UserError: The file is missing or unreadable, or it holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable file of a diffusers pipeline: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a JSON object of options")
    return content


def read_weights(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], pathlib.Path]:
    """All tensors of the network in a folder, with their file or the index of their files.

    Raises:
        UserError: There are no weights, or a file is damaged.
    """
    stem = WEIGHTS.removesuffix(".safetensors")
    file = tensor_files.find(folder, stem, stem)
    if file is None:
        raise UserError(f"{folder}: there are no weights; put {WEIGHTS} there")
    return tensor_files.unwrapped(tensor_files.read_whole(file)), file
