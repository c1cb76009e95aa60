"""Files of tensors: torch's and safetensors, as NumPy arrays.

A torch file is a pickle, which can run anything when it is opened. It is opened with
`weights_only=True`: tensors and plain containers, and whatever else it asks for is refused. torch
is needed for that alone.
"""

import json
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from conprediff_jax.common.errors import UserError

# What others put before the names of all tensors: torch's parallel modules, and Lightning's.
_WRAPPERS = ("module.", "model.")

# In the names of files: of smaller numbers, taken where there is no file without.
_VARIANTS = ("", ".fp16", ".bf16")

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
            return _to_numpy(safetensors.load_file(path))
        except (SafetensorError, OSError, TypeError) as error:
            raise FileError(f"{path}: not a readable safetensors file: {_line(error)}") from error
    return _read_torch(path)


def write(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file, to be handed on: the library would keep it to its owner."""
    safetensors.save_file(dict(tensors), path, metadata=dict(metadata))
    os.chmod(path, 0o644)


def find(folder: pathlib.Path, stem: str, pickled: str) -> pathlib.Path | None:
    """The file of a network's weights in a folder, or the index of its shards; None for neither.

    Args:
        folder: Where to look.
        stem: Of the names of safetensors files.
        pickled: Of the names of torch files, which are taken where there is nothing else.
    """
    for name, ending in ((stem, "safetensors"), (pickled, "bin")):
        for variant in _VARIANTS:
            for file in (f"{name}{variant}.{ending}", f"{name}.{ending}.index{variant}.json"):
                if (folder / file).exists():
                    return folder / file
    return None


def read_whole(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a file, or of the shards that an index lists.

    Raises:
        FileError: A file is missing or damaged, or holds other things; see `read`.
    """
    if path.suffix != ".json":
        return arrays(read(path), str(path))
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        shards = sorted({path.parent / place for place in places})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path}: no index of shards with a weight_map: {error!r}") from error
    return {name: tensor for shard in shards for name, tensor in read_whole(shard).items()}


def nested(content: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """What a file holds under a name, or the whole of it where it has no such name.

    Raises:
        FileError: There is something else than a dict.
    """
    found = content.get(name, content)
    if not isinstance(found, Mapping):
        raise FileError(f"{where}: {name} is {_kind(found)}, not a dict of tensors")
    return found


def arrays(
    tree: Mapping[str, Any], where: str, numbers: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """The state dict in a tree: its arrays. Plain values beside them, as `epoch`, are left aside.

    Args:
        tree: part of what `read` returned.
        where: what to call it in errors.
        numbers: names of plain numbers that count as arrays.

    Raises:
        FileError: a value is neither an array nor plain, or there are no arrays.
    """
    tensors, plain = {}, []
    for name, value in tree.items():
        if isinstance(value, np.ndarray):
            tensors[str(name)] = value
        elif name in numbers and type(value) in (int, float):
            tensors[str(name)] = np.asarray(value, np.float32)
        elif value is None or isinstance(value, bool | int | float | str):
            plain.append(f"{name}={value!r}")
        else:
            raise FileError(f"{where}: {name} is {_kind(value)}, not a tensor")
    if not tensors:
        raise FileError(f"{where}: there are no tensors in it")
    if plain:
        logging.info("%s: left aside, no tensors: %s", where, ", ".join(plain)[:200])
    return tensors


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def unwrapped(
    tensors: Mapping[str, np.ndarray], own: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """The tensors without a prefix that all their names have: `module.`, `model.`, or several.

    Args:
        tensors: All of a file.
        own: How names of the format begin; where one does, nothing is in front of them.
    """
    prefix = next((p for p in _WRAPPERS if all(n.startswith(p) for n in tensors)), None)
    if not tensors or prefix is None or any(name.startswith(own) for name in tensors):
        return dict(tensors)
    return unwrapped(below(tensors, prefix), own)


def precision(table: np.ndarray) -> float:
    """By how much numbers may be off, as a share: those of a half precision are, and are all short.

    Args:
        table: Any numbers; 1e-4 where some need more than half precision.
    """
    with np.errstate(over="ignore"):
        # The shorter kind first: float16 holds all of its numbers of this size.
        for dtype, share in ((ml_dtypes.bfloat16, 2**-7), (np.float16, 2**-10)):
            if np.array_equal(table, table.astype(dtype).astype(table.dtype)):
                return share
    return 1e-4


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
    if isinstance(tree, np.ndarray):
        floating = np.issubdtype(tree.dtype, np.floating) or tree.dtype == ml_dtypes.bfloat16
        return tree.astype(np.float32) if floating else tree
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
