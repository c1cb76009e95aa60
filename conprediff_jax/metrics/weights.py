"""Weight files that a user gives: read without running what is in them, converted once.

A torch file is opened with `weights_only=True`, so that pickled code is refused, and its tensors
are kept as safetensors under the hash of the file; from then on torch is not needed.
"""

import hashlib
import os
import pathlib
import uuid
from collections.abc import Iterable

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from conprediff_jax.errors import UserError


def fingerprint(parts: Iterable[bytes]) -> str:
    """A short name for some content."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def file_fingerprint(path: str | os.PathLike) -> str:
    """A short name for the content of a file."""
    with open(path, "rb") as file:
        return fingerprint(iter(lambda: file.read(1 << 22), b""))


def read(path: str | os.PathLike, cache: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a safetensors or torch file by name, float32 where they are floats.

    Args:
        path: `.safetensors`, or anything else that `torch.save` wrote of a dict of tensors.
        cache: folder for the converted file.

    Raises:
        UserError: the file is missing, damaged, or holds anything but tensors.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such weights file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    converted = pathlib.Path(cache) / f"{file_fingerprint(path)}.safetensors"
    if not converted.exists():
        converted.parent.mkdir(parents=True, exist_ok=True)
        partial = converted.with_name(f".{converted.name}.{uuid.uuid4().hex[:8]}")
        safetensors.save_file(_read_torch(path), partial)
        partial.replace(converted)
    return _read_safetensors(converted)


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.load_file(path)
    except (SafetensorError, OSError, TypeError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {_line(error)}") from error


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{path}: install torch to read it, or give safetensors") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling raises
        raise UserError(f"{path}: not a torch file of tensors alone: {_line(error)}") from error
    if not isinstance(loaded, dict) or not all(map(torch.is_tensor, loaded.values())):
        raise UserError(f"{path}: holds something else than a dict of tensors")
    as_float = {k: v.float() if v.is_floating_point() else v for k, v in loaded.items()}
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in as_float.items()}


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
