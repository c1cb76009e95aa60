"""Weight files that a user gives, read without running code from them, and converted once.

A torch file is opened with `weights_only=True`, so that pickled code is refused. Its tensors are
stored as safetensors under a hash of the file, and torch is not needed again.
"""

import os
import pathlib

import jax
import numpy as np
from safetensors import numpy as safetensors

from conprediff_jax.common import hub
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import write_atomically
from conprediff_jax.common.fingerprint import file_fingerprint
from conprediff_jax.weights import tensor_files


def read(path: str | os.PathLike, cache: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a safetensors or torch file by name, float32 where they are floats.

    Args:
        path: A `.safetensors` file, or a file of any name in which `torch.save` wrote a dict of
            tensors; or the address of such a file on the Hub.
        cache: The folder for converted files.

    Raises:
        UserError: The file is missing or damaged, or holds anything but tensors of finite numbers;
            or the cache cannot be written.
    """
    path = pathlib.Path(hub.local(path))
    if not path.is_file():
        raise UserError(f"{path}: there is no such weights file")
    if path.suffix == ".safetensors":
        return _finite(tensor_files.read(path), path)
    converted = pathlib.Path(cache) / f"{file_fingerprint(path)}.safetensors"
    if not converted.exists():
        tensors = tensor_files.arrays(tensor_files.read(path), str(path))
        content = safetensors.save(jax.tree.map(np.ascontiguousarray, tensors))
        write_atomically(converted, lambda file: file.write(content))
    return _finite(tensor_files.read(converted), path)


def _finite(tensors: dict[str, np.ndarray], path: pathlib.Path) -> dict[str, np.ndarray]:
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds values that are no finite numbers")
    return tensors
