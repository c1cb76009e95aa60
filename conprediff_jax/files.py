"""Paths of this machine or of a bucket, and files that are there whole or not at all."""

import os
import uuid
from collections.abc import Callable
from typing import BinaryIO

from etils import epath

from conprediff_jax.errors import UserError


def absolute(path: str | os.PathLike) -> epath.Path:
    """The whole path of a file or folder; the address of a bucket, as gs://, is one already."""
    path = epath.Path(path)
    return path if is_address(path) else path.expanduser().resolve()


def is_address(path: str | os.PathLike) -> bool:
    """Whether a path is not of this machine's file system."""
    return "://" in os.fspath(path)


def check_folder(path: str | os.PathLike, flag: str) -> None:
    """Checks, before anything is computed, that a folder is or can be made there.

    Raises:
        UserError: a file is in the way.
    """
    path = epath.Path(path)
    for part in (path, *path.parents):
        if part.exists():
            if not part.is_dir():
                raise UserError(f"{flag}={path}: {part} is a file, and must be a folder")
            return


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Has `write` fill a new file, in a folder that is made where it is missing."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        with partial.open("wb") as file:
            write(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text, UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))
