"""Paths of this machine or of a bucket, and files that are there whole or not at all."""

import contextlib
import errno
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from etils import epath

from conprediff_jax.common.errors import UserError

# What the operating system says of a place that takes nothing; messages of libraries contain it.
_REFUSALS = [
    os.strerror(code)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
]


class WriteError(UserError):
    """Something could not be written: a full disk, a read-only folder, a file in the way."""


def absolute(path: str | os.PathLike) -> epath.Path:
    """The whole path of a file or folder; the address of a bucket, as gs://, is one already."""
    path = epath.Path(path)
    return path if is_address(path) else path.expanduser().resolve()


def is_address(path: str | os.PathLike) -> bool:
    """Whether a path is not of this machine's file system."""
    return "://" in os.fspath(path)


def check_folder(path: str | os.PathLike, flag: str) -> None:
    """Checks, before anything is computed, that a folder is or can be made there, to be written to.

    Raises:
        UserError: a file is in the way, the place is read-only, or a name is too long.
    """
    path = epath.Path(path)
    _check_length(path, flag)
    for part in (path, *path.parents):
        if part.exists():
            if not part.is_dir():
                raise UserError(f"{flag}={path}: {part} is a file, and must be a folder")
            if not is_address(part) and not os.access(part, os.W_OK | os.X_OK):
                raise UserError(f"{flag}={path}: nothing can be written in {part}: it is read-only")
            return


def check_file(path: str | os.PathLike, flag: str) -> None:
    """Checks, before anything is computed, that a file can be written there.

    Raises:
        UserError: a folder of that name is there, its own folder cannot be made or written to, or a
            name is too long.
    """
    path = epath.Path(path)
    _check_length(path, flag)
    if path.is_dir():
        raise UserError(f"{flag}={path}: is a folder, and must be the name of a file")
    check_folder(path.parent, flag)


def _check_length(path: epath.Path, flag: str) -> None:
    """Checks that the file system takes the names of a path, and the path as a whole.

    Raises:
        UserError: it does not; the message says how long they may be.
    """
    if is_address(path):
        return
    there = next(part for part in (path, *path.parents) if os.path.exists(part))
    longest = max((len(os.fsencode(name)) for name in path.parts), default=0)
    if longest > (most := os.pathconf(there, "PC_NAME_MAX")):
        raise UserError(f"{flag}={path}: a name of {longest} bytes; it can have {most} there")
    whole = len(os.fsencode(path.parent / ("." + 32 * "x")))  # the name until it is whole
    whole = max(whole, len(os.fsencode(path)))
    if whole >= (most := os.pathconf(there, "PC_PATH_MAX")):
        raise UserError(f"{flag}={path}: a path of {whole} bytes; it must have less than {most}")


def check_replaced(
    paths: Iterable[str | os.PathLike], own: Iterable[str | os.PathLike], flag: str
) -> None:
    """Checks, before anything is computed, that files to be written replace none of some files.

    Two names are of one file also where links, or a file system that knows no case, make them so.

    Args:
        paths: to be written; what is there already, and none of `own`, may be replaced.
        own: files that must stay.
        flag: that `paths` come from.

    Raises:
        UserError: one of `own` would be replaced.
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
    """What the system knows a file by; with `links`, both a link and what it leads to."""
    found = set()
    for look in (os.lstat, os.stat) if links else (os.lstat,):
        with contextlib.suppress(OSError):  # nothing is there
            status = look(path)
            found.add((status.st_dev, status.st_ino))
    return found


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns what the operating system says while `path` is written into one line that names it.

    Raises:
        WriteError: the operating system refused, as it told this program or a library.
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
    """What the operating system said, where an error or one that it came from is about that."""
    if error is None:
        return None
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    said = [reason for reason in _REFUSALS if reason in str(error)]
    return said[0] if said else _refusal(error.__cause__ or error.__context__)


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Has `write` fill a new file, in a folder that is made where it is missing.

    The file appears under its name when it is whole; one that was there before stays until then.

    Raises:
        WriteError: it cannot be written; nothing of it is left.
    """
    path = epath.Path(path)
    with _aside(path, write) as whole:
        whole.replace(path)


def write_new(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> bool:
    """As `write_atomically`, but leaves a file alone that is there already.

    Of several processes that do so at once, one alone succeeds; where a file system has no links,
    as a bucket has none, those of the same moment may do so too, and the last one's file stays.

    Returns:
        Whether the file was written.

    Raises:
        WriteError: it cannot be written; nothing of it is left.
    """
    path = epath.Path(path)
    if path.exists():
        return False
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
    """A file that `write` has filled, beside `path`; it is removed unless it was moved."""
    partial = path.parent / f".{uuid.uuid4().hex}"  # no longer than `path` may be
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                write(file)
            yield partial
        finally:
            with contextlib.suppress(OSError):  # what was raised first says why
                partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text, UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))
