"""Folders in buckets, `gs://BUCKET/FOLDER` and `s3://BUCKET/FOLDER`, by fsspec.

gcsfs and s3fs do the work, which the extras `gcs` and `s3` of this package install. They find
credentials where the tools of the services store them: `gcloud auth application-default login` or
GOOGLE_APPLICATION_CREDENTIALS; `aws configure` or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
"""

import contextlib
import dataclasses
import fcntl
import importlib.util
import json
import logging
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from conprediff_jax.common.errors import UserError, first_line
from conprediff_jax.common.progress import ProgressLine

# etils opens addresses by TensorFlow where it is installed, unless this says otherwise: TensorFlow
# does not know the credentials of gcsfs. etils looks at it when it opens the first address. Without
# gcsfs it stays with TensorFlow, by which TFDS looks for data sets that are prepared already.
if importlib.util.find_spec("gcsfs"):
    os.environ.setdefault("EPATH_USE_TF", "false")

_COPIED = "copied.json"  # the marks of the files that a folder of copies holds
_THREADS = 8  # files that are copied at the same time
_DENIED = ("credential", "denied", "forbidden", "unauthorized", "anonymous", "login", "401", "403")


@dataclasses.dataclass(frozen=True)
class _Service:
    """A library of file systems, the extra that installs it, and how its users log in."""

    library: str
    extra: str
    login: str


_SERVICES = {
    "gs": _Service(
        "gcsfs", "gcs", "`gcloud auth application-default login` or GOOGLE_APPLICATION_CREDENTIALS"
    ),
    "s3": _Service("s3fs", "s3", "`aws configure` or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
}


class BucketError(UserError):
    """A bucket that is missing, or that cannot be reached, read or written to."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file in a bucket.

    Attributes:
        size: Its bytes.
        mark: What the service says of its content; another content has another mark.
    """

    size: int
    mark: str


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is an address in a bucket."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in _SERVICES))


def check(address: str, *, write: bool = False) -> None:
    """Checks that a bucket can be reached and read; a folder in it need not exist.

    Args:
        address: Address of a folder.
        write: Whether to write a small file there as well, and delete it again.

    Raises:
        BucketError: It cannot.
    """
    with _explained(address):
        files, bucket = _file_system(address), address.split("/")[2]
        try:
            files.ls(address)
        except FileNotFoundError:
            if not files.exists(bucket):
                raise
        if write:
            probe = f"{address.rstrip('/')}/.{uuid.uuid4().hex}"
            files.pipe_file(probe, b"")
            files.rm_file(probe)


def write(address: str, content: bytes) -> None:
    """Writes a file, which appears when it is complete.

    Raises:
        BucketError: It cannot be written.
    """
    with _explained(address):
        _file_system(address).pipe_file(address, content)


def listed(address: str) -> dict[str, Entry]:
    """The files of a folder by name, without those of its subfolders.

    Raises:
        BucketError: The folder is missing or cannot be read.
    """
    with _explained(address):
        files = _file_system(address)
        files.invalidate_cache()
        return {
            os.path.basename(entry["name"]): Entry(entry["size"], _mark(entry))
            for entry in files.ls(address, detail=True)
            if entry["type"] == "file"
        }


def found(address: str) -> list[str]:
    """The addresses of the files that a pattern names, or of all files below a folder.

    Raises:
        BucketError: The bucket cannot be read.
    """
    scheme = address.partition("://")[0]
    with _explained(address):
        files = _file_system(address)
        names = files.glob(address) if "*" in address else files.find(address)
    return [f"{scheme}://{name.lstrip('/')}" for name in names]


def opened(path: str) -> Any:
    """A file, here or in a bucket, open for reading bytes.

    Raises:
        BucketError: The bucket cannot be read.
        OSError: The file of this machine cannot be read.
    """
    if not is_bucket(path):
        return open(path, "rb")
    with _explained(path):
        return _file_system(path).open(path, "rb")


def copy(address: str, entries: Mapping[str, Entry], folder: pathlib.Path) -> None:
    """Copies files from a bucket, unless the folder holds them already.

    A file appears under its name when it is complete and of the right size. Processes that copy
    into one folder wait for each other.

    Args:
        address: Address of the folder that holds the files.
        entries: The files by name, as `listed` returns them.
        folder: The folder on this machine, which is made if it does not exist.

    Raises:
        BucketError: A file cannot be read, or there is no room for all of them.
        OSError: The folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        marks = _read_marks(folder)
        lacking = {
            name: entry
            for name, entry in entries.items()
            if not _is_there(folder / name, entry, marks.get(name))
        }
        size, room = sum(entry.size for entry in lacking.values()), shutil.disk_usage(folder).free
        if size > room:
            raise BucketError(
                f"{address}: {_megabytes(size)} are to be copied, and {folder} has room for "
                f"{_megabytes(room)}"
            )
        with _explained(address), ThreadPoolExecutor(_THREADS) as pool:
            files = _file_system(address)
            jobs = {
                pool.submit(_copy, files, f"{address}/{name}", folder / name, entry.size): name
                for name, entry in lacking.items()
            }
            about = f"copying {_megabytes(size)} of {address}"
            line = ProgressLine(len(jobs), "files", about=about) if jobs else None
            for job in as_completed(jobs):
                job.result()
                marks[jobs[job]] = lacking[jobs[job]].mark
                (folder / _COPIED).write_text(json.dumps(marks))
                line.add(1)


def _copy(files: Any, source: str, path: pathlib.Path, size: int) -> None:
    partial = path.with_name(path.name + ".partial")
    files.get_file(source, str(partial))
    if (found := partial.stat().st_size) != size:
        raise BucketError(f"{source}: {found} bytes came, and it has {size}: try again")
    partial.replace(path)


def _read_marks(folder: pathlib.Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / _COPIED).read_text()))
    except (OSError, ValueError, TypeError):  # nothing was copied, or the program was killed
        return {}


def _is_there(path: pathlib.Path, entry: Entry, mark: str | None) -> bool:
    return path.is_file() and path.stat().st_size == entry.size and mark == entry.mark


def _mark(entry: Mapping[str, Any]) -> str:
    """What changes when a file does: a hash where the service has one, or the time of writing."""
    keys = ("etag", "ETag", "mtime", "created")
    return next((str(entry[key]) for key in keys if entry.get(key)), "")


def _file_system(address: str) -> Any:
    """The file system of fsspec that an address is in."""
    import fsspec

    service = _service(address)
    logging.getLogger(service.library).setLevel(logging.CRITICAL)  # what fails is raised as well
    try:
        return fsspec.core.url_to_fs(address)[0]
    except ImportError as error:
        raise BucketError(
            f"{address}: this needs {service.library}, which is not installed: "
            f'pip install -e ".[{service.extra}]"'
        ) from error


def _service(address: str) -> _Service:
    return _SERVICES[address.partition("://")[0]]


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turns whatever a file system raises into one line.

    Raises:
        BucketError: Something was raised.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise BucketError(f"{address}: there is no such bucket or folder in it") from error
    except Exception as error:  # aiohttp, botocore and google.auth have errors of their own
        said = first_line(error)
        denied = any(word in f"{type(error).__name__} {said}".lower() for word in _DENIED)
        hint = f"; log in by {_service(address).login}" if denied else ""
        raise BucketError(f"{address}: cannot be reached: {said}{hint}") from error


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
