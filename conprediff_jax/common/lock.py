"""A lock on a folder, so that only one program writes into it.

    <folder>/lock.json    {"host": "box", "pid": 123, "since": "2026-05-09 07:35:25"}

The lock is an `flock` of this file, which the operating system takes away from a process that has
ended, however it ended. So no lock has to be removed by hand, and the file's content is for people
only. NFS passes `flock` on to its server, so programs on other hosts are held off as well. When a
host dies, the server waits for it, about 90 seconds; a program that finds a lock of another host
therefore tries again for a while, so that a job can move to another host. Buckets have no locks.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import BinaryIO

from absl import logging
from etils import epath

from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import absolute, is_address, writing

NAME = "lock.json"
PATIENCE = 120  # seconds that a lock of another host is waited for


class LockedError(UserError):
    """Another program writes into the folder."""


@contextlib.contextmanager
def locked(folder: str | os.PathLike, *, hold: bool = True) -> Iterator[None]:
    """Encloses work that writes into a folder, which is made if it does not exist.

    A folder that was made and in which nothing was written is removed at the end.

    Args:
        folder: The folder.
        hold: Whether to take the lock. The first process of a job takes it for all of them.

    Raises:
        LockedError: Another program holds the lock.
        WriteError: The folder cannot be made, or nothing can be written in it.
    """
    folder = absolute(folder)
    if not hold or is_address(folder):
        yield
        return
    made = not folder.exists()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with _held(folder / NAME):
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(folder)


@contextlib.contextmanager
def _held(path: epath.Path) -> Iterator[None]:
    file = _acquired(path)
    try:
        with writing(path):
            _note(path, file)
        yield
    finally:
        with contextlib.suppress(OSError):  # somebody has removed it
            path.unlink()
        file.close()


def _acquired(path: epath.Path) -> BinaryIO:
    """The open file, locked."""
    deadline = time.monotonic() + PATIENCE
    waiting = False
    while True:
        with writing(path):
            file = open(path, "a+b", buffering=0)  # noqa: SIM115  (held for long)
        if _flock(path, file):
            if _is_at(path, file):
                return file
            file.close()  # its holder has ended and removed it
            continue
        holder = _read(file)
        file.close()
        if holder.get("host") == socket.gethostname() or time.monotonic() > deadline:
            raise LockedError(
                f"{path.parent}: {_described(holder)} writes into it; end it first, or give "
                "another folder"
            )
        if not waiting:
            logging.info(
                "%s: %s holds the lock; waiting up to %d s for its end",
                path.parent, _described(holder), PATIENCE,
            )  # fmt: skip
        waiting = True
        time.sleep(1)


def _flock(path: epath.Path, file: BinaryIO) -> bool:
    """Whether the lock is ours. It counts as ours on a file system that has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logging.warning(
            "%s has no locks (%s): start no second run in it", path.parent, error.strerror
        )
    return True


def _note(path: epath.Path, file: BinaryIO) -> None:
    """Writes who holds the lock, and warns of a holder on another host that left without a word."""
    before = _read(file)
    host = socket.gethostname()
    if before.get("host", host) != host:
        logging.warning(
            "%s: %s ended without a word; if it still runs, end it", path.parent, _described(before)
        )
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(json.dumps({"host": host, "pid": os.getpid(), "since": since}).encode())


def _is_at(path: epath.Path, file: BinaryIO) -> bool:
    """Whether the file still has its name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _read(file: BinaryIO) -> dict:
    """Who holds the lock, or held it last; empty if the file does not say."""
    file.seek(0)
    try:
        return dict(json.loads(file.read()))
    except (ValueError, TypeError):
        return {}


def _described(holder: dict) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')},"
