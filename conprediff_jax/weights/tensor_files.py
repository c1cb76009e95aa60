"""Files of tensors, in torch's format or as safetensors, read as NumPy arrays.

A torch file is a pickle, which can run any code when it is opened. Here it is opened with
`weights_only=True`: tensors and plain containers are read, and a file that asks for anything else
is refused. Only torch files need torch.
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

# The prefixes that torch's parallel modules and Lightning put before the names of all tensors.
_WRAPPERS = ("module.", "model.")

# The marks of variants in file names. A file without one is preferred.
_VARIANTS = ("", ".fp32", ".fp16", ".bf16", ".non_ema")

# Checkpoints of latent diffusion and of DiT name these classes beside the weights. Empty classes
# replace them.
_INERT = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "argparse.Namespace")


class FileError(UserError):
    """A file that is missing, unreadable, or holds what it should not."""


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a file. The ending `.safetensors` names that format; all other files are torch's.

    Args:
        path: The file.

    Returns:
        A dict, nested as in the file, with a NumPy array for each tensor. Floats are float32.

    Raises:
        FileError: The file is missing or damaged, holds no dict, or holds objects other than
            tensors and plain values; or torch is needed and not installed.
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
    """Writes a safetensors file."""
    safetensors.save_file(dict(tensors), path, metadata=dict(metadata))
    # The library makes files that only their owner can read; these are for others too.
    os.chmod(path, 0o644)


def find(folder: pathlib.Path, stem: str, pickled: str) -> pathlib.Path | None:
    """The file of a network's weights in a folder, or the index of its shards; None for neither.

    Args:
        folder: The folder.
        stem: The stem of the names of safetensors files.
        pickled: The stem of the names of torch files, which are read where there are no others.
    """
    for name, ending in ((stem, "safetensors"), (pickled, "bin")):
        for variant in _VARIANTS:
            for file in (f"{name}{variant}.{ending}", f"{name}.{ending}.index{variant}.json"):
                if (folder / file).exists():
                    return folder / file
    return None


def read_whole(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads all tensors of a file, or of the shards that an index lists.

    Raises:
        FileError: A file is missing or damaged, or holds more than tensors; see `read`.
    """
    if path.suffix != ".json":
        return arrays(read(path), str(path))
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        shards = sorted({path.parent / place for place in places})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path}: not an index of shards with a weight_map: {error!r}") from error
    return {name: tensor for shard in shards for name, tensor in read_whole(shard).items()}


def nested(content: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """The dict that a file holds under a name, or the whole content if there is no such name.

    Args:
        content: The content of the file.
        name: The name.
        where: The name of the file in errors.

    Raises:
        FileError: The file holds something else than a dict under the name.
    """
    found = content.get(name, content)
    if not isinstance(found, Mapping):
        raise FileError(f"{where}: {name} is {_kind(found)}, not a dict of tensors")
    return found


def arrays(
    tree: Mapping[str, Any], where: str, numbers: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """The arrays in a dict. Plain values beside them, such as `epoch`, are left aside.

    Args:
        tree: The content of a file, or a part of it; see `read`.
        where: The name of the file in errors.
        numbers: Names of plain numbers that count as arrays.

    Raises:
        FileError: A value is neither an array nor plain, or there are no arrays.
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
        logging.info("%s: left aside, since they are no tensors: %s", where, ", ".join(plain)[:200])
    return tensors


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def unwrapped(
    tensors: Mapping[str, np.ndarray], own: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Removes the prefixes that the names of all tensors share, `module.` and `model.`.

    Args:
        tensors: All tensors of a file.
        own: Beginnings of the names in the format itself. If a name begins with one of them, there
            is no prefix to remove.
    """
    prefix = next((p for p in _WRAPPERS if all(n.startswith(p) for n in tensors)), None)
    if not tensors or prefix is None or any(name.startswith(own) for name in tensors):
        return dict(tensors)
    return unwrapped(below(tensors, prefix), own)


def precision(table: np.ndarray) -> float:
    """The relative rounding error that the numbers in a table may have.

    Args:
        table: Any numbers. If all of them are numbers of a half precision, the table was probably
            stored in it.

    Returns:
        2^-7 for numbers of bfloat16, 2^-10 for numbers of float16, and 1e-4 for all others.
    """
    with np.errstate(over="ignore"):
        # bfloat16 comes first, since float16 can hold all bfloat16 numbers of this size.
        for dtype, share in ((ml_dtypes.bfloat16, 2**-7), (np.float16, 2**-10)):
            if np.array_equal(table, table.astype(dtype).astype(table.dtype)):
                return share
    return 1e-4


def below(
    tensors: Mapping[str, np.ndarray], prefix: str, *, without: str | tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """The tensors whose names begin with a prefix, by the rest of their names.

    Args:
        tensors: Tensors by name.
        prefix: The prefix.
        without: Tensors are left aside if the rest of their name begins with one of these.
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
        tensors: All tensors of the file.
        where: The name of the file in errors.
        prefixes: Beginnings of the names that are known.
        names: Other names that are known.

    Raises:
        FileError: There are other tensors; the message lists their names and shapes.
    """
    stray = [
        f"{name} {tensor.shape}"
        for name, tensor in tensors.items()
        if not name.startswith(prefixes) and name not in names
    ]
    if stray:
        more = f"; and {len(stray) - 8} more" if len(stray) > 8 else ""
        raise FileError(f"{where}: nothing reads the tensors {'; '.join(stray[:8])}{more}")


def _read_torch(path: pathlib.Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise FileError(
            f"{path}: is a torch file, and torch is not installed: pip install torch, "
            "or give the weights as .safetensors"
        ) from error
    with path.open("rb") as file:
        begins = file.read(16)
    if not begins.startswith((b"PK", b"\x80")):  # a zip archive, or a pickle in old files
        raise FileError(f"{path}: not a torch file: it begins with {begins!r}")
    inert = [(type(name.rsplit(".")[-1], (), {}), name) for name in _INERT]
    try:
        with torch.serialization.safe_globals(inert):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling can raise anything
        raise FileError(
            f"{path}: not a torch file of tensors alone, and so refused, {_line(error)}"
        ) from error
    if not isinstance(loaded, dict):
        raise FileError(f"{path}: holds a {type(loaded).__name__}, not a dict of tensors")
    return _to_numpy(loaded)


def _to_numpy(tree: Any) -> Any:
    """The same tree with NumPy arrays for tensors, and float32 for all floats."""
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
    # torch explains at length; the line that names the object matters.
    telling = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    line = (telling or lines or [type(error).__name__])[0]
    return line.partition(". Please use")[0]  # torch's advice would let the code run
