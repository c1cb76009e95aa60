"""Files of tensors: torch's and safetensors, as NumPy arrays.

A torch file is a pickle, which can run anything when it is opened. It is opened with
`weights_only=True`: tensors and plain containers, and whatever else it asks for is refused. torch
is needed for that alone.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from conprediff_jax.errors import UserError

# Latent diffusion's checkpoints name this class beside the weights. It becomes an empty one.
_INERT = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",)


class FileError(UserError):
    """A file that is missing, unreadable, or holds what it should not."""


def read(path: str | os.PathLike) -> dict[str, Any]:
    """The content of a file by its ending: safetensors, or anything else for torch.

    Args:
        path: of the file.

    Returns:
        A dict, nested as in the file, with NumPy arrays for tensors (floats as float32).

    Raises:
        FileError: the file is missing or damaged, is no dict, holds objects other than tensors and
            plain values, or torch is needed and not installed.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileError(f"{path}: there is no such file")
    if path.suffix == ".safetensors":
        try:
            return safetensors.load_file(path)
        except (SafetensorError, OSError, TypeError) as error:
            raise FileError(f"{path}: not a readable safetensors file: {_line(error)}") from error
    return _read_torch(path)


def write(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file, to be handed on: the library would keep it to its owner."""
    safetensors.save_file(dict(tensors), path, metadata=dict(metadata))
    os.chmod(path, 0o644)


def arrays(tree: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    """The state dict in a tree: itself, all of whose values must be arrays.

    Args:
        tree: part of what `read` returned.
        where: what to call it in errors.

    Raises:
        FileError: a value is not an array; the message names it.
    """
    for name, value in tree.items():
        if not isinstance(value, np.ndarray):
            raise FileError(f"{where}: {name} is a {type(value).__name__}, not a tensor")
    return dict(tree)


def below(
    tensors: Mapping[str, np.ndarray], prefix: str, *, without: str | tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """The tensors whose names begin with a prefix, by what follows it.

    Args:
        tensors: All of them.
        prefix: Of the names.
        without: Beginnings of what follows, of tensors that are left aside.
    """
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    return {name: tensor for name, tensor in found.items() if not name.startswith(without)}


def account(
    tensors: Mapping[str, np.ndarray],
    where: str,
    *,
    prefixes: tuple[str, ...],
    names: tuple[str, ...],
) -> None:
    """Accounts for the tensors of a file that holds more than one network.

    Args:
        tensors: All of them.
        where: What to call the file in errors.
        prefixes: Beginnings of the names that belong to something known.
        names: Whole names that do.

    Raises:
        FileError: There are others; the message lists them and their shapes.
    """
    stray = [
        f"{name} {tensor.shape}"
        for name, tensor in tensors.items()
        if not name.startswith(prefixes) and name not in names
    ]
    if stray:
        more = f"; and {len(stray) - 8} more" if len(stray) > 8 else ""
        raise FileError(f"{where}: left over, of nothing known: {'; '.join(stray[:8])}{more}")


def _read_torch(path: pathlib.Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise FileError(
            f"{path}: a torch file, and torch is not installed: pip install torch, "
            "or give the weights as .safetensors"
        ) from error
    with path.open("rb") as file:
        begins = file.read(16)
    if not begins.startswith((b"PK", b"\x80")):  # a zip archive; the pickle of old files
        raise FileError(f"{path}: not a torch file: it begins with {begins!r}")
    inert = [(type(name.rsplit(".")[-1], (), {}), name) for name in _INERT]
    try:
        with torch.serialization.safe_globals(inert):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling raises
        raise FileError(
            f"{path}: not a torch file of tensors alone: refused, {_line(error)}"
        ) from error
    if not isinstance(loaded, dict):
        raise FileError(f"{path}: holds a {type(loaded).__name__}, not a dict of tensors")
    return _to_numpy(loaded)


def _to_numpy(tree: Any) -> Any:
    """The same with arrays for tensors, all floats as float32."""
    if isinstance(tree, Mapping):
        return {key: _to_numpy(value) for key, value in tree.items()}
    if hasattr(tree, "is_floating_point"):
        tree = tree.detach()
        return (tree.float() if tree.is_floating_point() else tree).numpy()
    return tree


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch explains at length; the line that names the object is the one to read.
    telling = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    line = (telling or lines or [type(error).__name__])[0]
    return line.partition(". Please use")[0]  # its advice would let the code run
