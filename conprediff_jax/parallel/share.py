"""Work that several processes share without a common program: drawing, measuring, writing.

Images do not depend on each other, so no process needs the devices of another: each has a mesh of
its own devices, with all parameters on them. Items of work are dealt out in turn (`mine`), results
come together in the order of the items (`in_turn`), and the first process decides and writes what
there is only one of (`from_first`, `is_first`). One process alone gets all items, and never waits.

All processes must call the functions that wait, in the same order.
"""

import itertools
import os
import pickle
import threading
import uuid
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import write_text
from conprediff_jax.parallel.mesh import MeshSpec, make_mesh

T = TypeVar("T")

_LONGEST = 7 * 24 * 3600  # seconds that processes wait for each other; the launchers end it sooner
_waits = itertools.count()


def local_mesh() -> Mesh:
    """A mesh of the devices of this process, all of which divide its batches."""
    return make_mesh(MeshSpec(), jax.local_devices())


def is_first() -> bool:
    """Whether this is the process that writes what there is only one of."""
    return jax.process_index() == 0


def mine(items: Sequence[T]) -> Sequence[T]:
    """The items that this process works on."""
    return items[jax.process_index() :: jax.process_count()]


def in_turn(parts: Sequence[T]) -> list[T]:
    """The results of all processes in the order of the items. It waits for all processes.

    Args:
        parts: What this process made of each item of `mine(items)`, in their order.
    """
    everyones = of_all(list(parts))
    total = sum(map(len, everyones))
    return [everyones[place % len(everyones)][place // len(everyones)] for place in range(total)]


def of_all(value: T) -> list[T]:
    """The values of all processes, which are pickled. It waits for all processes."""
    if jax.process_count() == 1:
        return [value]
    wait_for_all()  # the devices have no patience
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data))).ravel()
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)  # few sizes to compile for
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, in all processes. It waits for all processes.

    Args:
        make: A function that only the first process calls.
    """
    return of_all(make() if is_first() else None)[0]


def check_seen(folder: str | os.PathLike, flag: str) -> None:
    """Checks that all processes see a folder, into which each of them writes its part.

    Args:
        folder: The folder, which is made if it does not exist.
        flag: Name of the flag that gives it, for the message.

    Raises:
        UserError: Some process does not see what the first one writes there.
    """
    if jax.process_count() == 1:
        return
    mark = epath.Path(folder) / from_first(lambda: f".{uuid.uuid4().hex}")
    if is_first():
        write_text(mark, "")
    wait_for_all()
    seen = of_all(mark.exists())
    if is_first():
        mark.unlink()
    if not all(seen):
        raise UserError(
            f"{flag}={os.fspath(folder)}: {seen.count(False)} of {len(seen)} processes do not see "
            "what the first one writes there: name a folder that all of them see"
        )


def wait_for_all() -> None:
    """Waits until all processes have come here, however long that takes.

    The thread that calls it goes on to hear signals, and a process that died ends the others.
    """
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost  # takes seconds, and one process can do without

    barrier, failed = multihost.get_barrier_sync_fn(), []
    key = f"conprediff_jax {next(_waits)}"

    def wait() -> None:
        try:
            barrier(key=key, timeout_ms=1000 * _LONGEST)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
