"""Paths on this machine or in a bucket, and files that are written completely or not at all."""

import contextlib
import errno
import io
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from etils import epath

from conprediff_jax.common import buckets
from conprediff_jax.common.errors import UserError

# Messages of the operating system for a place that cannot be written to; libraries quote them.
_REFUSALS = [
    os.strerror(code)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
]


HUB = "hf://"  # how addresses on the Hugging Face Hub begin


class WriteError(UserError):
    """Something could not be written: a full disk, a read-only folder, a file in the way."""


def absolute(path: str | os.PathLike) -> epath.Path:
    """The absolute path of a file or folder; an address such as gs:// is unchanged."""
    path = epath.Path(path)
    return path if is_address(path) else path.expanduser().resolve()


def is_address(path: str | os.PathLike) -> bool:
    """Whether a path is an address outside this machine's file system."""
    return "://" in os.fspath(path)


def check_folder(path: str | os.PathLike, flag: str, *, local: bool = False) -> None:
    """Checks, before anything is computed, that a folder exists or can be made and written to.

    Args:
        path: The folder.
        flag: Name of the flag or argument that gives it, for the message.
        local: Whether it must be on this machine.

    Raises:
        UserError: A file or a link to nothing is in the way, the place is read-only, on the Hub or
            in a bucket that cannot be written to, or a name is too long.
    """
    if os.fspath(path).startswith(HUB):
        raise UserError(
            f"{flag}={path}: only `convert --push` writes to the Hub; name a folder on this machine"
        )
    if local and is_address(path):
        raise UserError(f"{flag}={path}: name a folder on this machine, and copy it to the bucket")
    if buckets.is_bucket(path):
        buckets.check(os.fspath(path), write=True)
        return
    path = epath.Path(path)
    _check_length(path, flag)
    for part in (path, *path.parents):
        if part.exists():
            if not part.is_dir():
                raise UserError(f"{flag}={path}: {part} is a file, and must be a folder")
            if not os.access(part, os.W_OK | os.X_OK):
                raise UserError(f"{flag}={path}: nothing can be written in {part}: it is read-only")
            return
        if os.path.islink(part):
            raise UserError(
                f"{flag}={path}: {part} is a link to {os.readlink(part)}, which does not exist: "
                "make this folder, or remove the link"
            )


def check_file(path: str | os.PathLike, flag: str) -> None:
    """Checks, before anything is computed, that a file can be written.

    Args:
        path: The file.
        flag: Name of the flag or argument that gives it, for the message.

    Raises:
        UserError: The path is a folder, its parent folder cannot be made or written to, or a name
            is too long.
    """
    path = epath.Path(path)
    _check_length(path, flag)
    if path.is_dir():
        raise UserError(f"{flag}={path}: is a folder, and must be the name of a file")
    check_folder(path.parent, flag)


def _check_length(path: epath.Path, flag: str) -> None:
    """Checks that neither a path nor one of its names is too long for the file system.

    Raises:
        UserError: One of them is too long; the message gives the limit.
    """
    if is_address(path):
        return
    there = next(part for part in (path, *path.parents) if os.path.exists(part))
    longest = max((len(os.fsencode(name)) for name in path.parts), default=0)
    if longest > (most := os.pathconf(there, "PC_NAME_MAX")):
        raise UserError(f"{flag}={path}: a name of {longest} bytes; it can have {most} there")
    whole = len(os.fsencode(path.parent / ("." + 32 * "x")))  # its name while it is written
    whole = max(whole, len(os.fsencode(path)))
    if whole >= (most := os.pathconf(there, "PC_PATH_MAX")):
        raise UserError(f"{flag}={path}: a path of {whole} bytes; it must have less than {most}")


def check_replaced(
    paths: Iterable[str | os.PathLike], own: Iterable[str | os.PathLike], flag: str
) -> None:
    """Checks, before anything is computed, that files to be written replace none of some files.

    Two names that lead to the same file, by a link or on a file system that ignores case, count as
    this one file.

    Args:
        paths: Files to be written; they may replace existing files other than `own`.
        own: Files that must not be replaced.
        flag: Name of the flag or argument that `paths` come from, for the message.

    Raises:
        UserError: One of `own` would be replaced.
    """
    there = {identity: path for path in paths for identity in _identities(path, links=False)}
    if not there:
        return
    for file in own:
        for identity in _identities(file):
            if identity in there:
                raise UserError(
                    f"{flag}: {there[identity]} would replace {file}: choose another folder"
                )


def _identities(path: str | os.PathLike, *, links: bool = True) -> set[tuple[int, int]]:
    """The device and inode of a file; with `links`, those of a link and of its target."""
    found = set()
    for look in (os.lstat, os.stat) if links else (os.lstat,):
        with contextlib.suppress(OSError):  # there is no such file
            status = look(path)
            found.add((status.st_dev, status.st_ino))
    return found


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns an error of the operating system while `path` is written into one line that names it.

    Raises:
        WriteError: The operating system refused to write, to this program or to a library.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        if reason := _refusal(error):
            raise WriteError(f"cannot write {os.fspath(path)}: {reason}") from error
        raise


def _refusal(error: BaseException | None) -> str | None:
    """The operating system's message in an error or in one of its causes; None if there is none."""
    if error is None:
        return None
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    said = [reason for reason in _REFUSALS if reason in str(error)]
    return said[0] if said else _refusal(error.__cause__ or error.__context__)


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file completely or not at all; a missing folder is made.

    The file appears under its name when it is complete. Until then, an older file of this name
    stays.

    Args:
        path: The file.
        write: A function that writes the content to an open file.

    Raises:
        WriteError: The file cannot be written; no part of it is left.
        BucketError: The same in a bucket.
    """
    path = epath.Path(path)
    if buckets.is_bucket(path):  # where a file appears when all of it was sent
        whole = io.BytesIO()
        write(whole)
        buckets.write(os.fspath(path), whole.getvalue())
        return
    with _aside(path, write) as whole:
        whole.replace(path)


def write_new(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> bool:
    """Writes a file as `write_atomically` does, unless there is a file of this name already.

    When several processes do this at once, only one succeeds. A file system without links, such as
    a bucket, cannot ensure this: there, several may succeed, and the file of the last one stays.

    Returns:
        Whether the file was written.

    Raises:
        WriteError: The file cannot be written; no part of it is left.
    """
    path = epath.Path(path)
    if path.exists():
        return False
    if buckets.is_bucket(path):
        write_atomically(path, write)
        return True
    with _aside(path, write) as whole:
        try:
            os.link(whole, path)
        except FileExistsError:
            return False
        except OSError:
            whole.replace(path)
    return True


@contextlib.contextmanager
def _aside(path: epath.Path, write: Callable[[BinaryIO], object]) -> Iterator[epath.Path]:
    """A temporary file beside `path` that `write` has filled; removed at the end, unless moved."""
    partial = path.parent / f".{uuid.uuid4().hex}"  # no longer than `path` may be
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                write(file)
            yield partial
        finally:
            with contextlib.suppress(OSError):  # the error that was raised first says why
                partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))
