"""Several processes: how they find each other, and how all of them stop at the same step.

A scheduler that wants its machines back sends SIGTERM and, a little later, SIGKILL. In between, a
run finishes a checkpoint and ends with `AGAIN`, which says that the same command goes on from it.
Which of the processes are told, and when, differs. So each puts one number a step into a sum over
all, which is queued on the devices behind the step and read two steps later: nobody waits for it,
and all read the same. (JAX's own `multihost_utils.reached_preemption_sync_point` keeps one counter,
which orbax, saving in the background, sets back to older steps; a notice that falls in between, or
before a resumed run's first step, is lost there.)
"""

import collections
import functools
import os
import signal
import threading
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from conprediff_jax.common.errors import UserError

AGAIN = os.EX_TEMPFAIL  # 75

COORDINATOR = "JAX_COORDINATOR_ADDRESS"
COUNT, INDEX = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

LAG = 2  # steps that are queued while their votes are counted


class Preempted(Exception):
    """The run was asked to stop and has saved what it needs to go on."""


def join(*, automatic: bool = False, timeout: int = 300) -> None:
    """Makes this process one of several, where it is; to be called before JAX is used.

    Args:
        automatic: Ask the cluster (Cloud TPU, Slurm, Open MPI) who the others are. Otherwise the
            environment says: `JAX_COORDINATOR_ADDRESS` (host:port of the first process),
            `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; without them this is the only one.
        timeout: Seconds to wait for the others.

    Raises:
        UserError: The environment says half of it, or names no coordinator.
        RuntimeError: The others do not come in time; where JAX does not abort the process at once.
    """
    given = [name for name in (COORDINATOR, COUNT, INDEX) if os.environ.get(name)]
    if not given and not automatic:
        return
    options = {}
    if given:
        missing = [name for name in (COORDINATOR, COUNT, INDEX) if name not in given]
        if missing:
            raise UserError(f"{given[0]} is set, but {missing[0]} is not: give all three, or none")
        options = {
            "coordinator_address": os.environ[COORDINATOR],
            "num_processes": _number(COUNT),
            "process_id": _number(INDEX),
        }
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # where CPUs are the devices
    try:
        jax.distributed.initialize(**options, initialization_timeout=timeout)
    except (ValueError, RuntimeError) as error:
        if "DEADLINE_EXCEEDED" in str(error):  # another start may find them
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        where = f"{COORDINATOR}={os.environ[COORDINATOR]}" if given else "--distributed"
        raise UserError(f"{where}: the processes do not find each other: {first}") from error
    exit_when_asked()  # JAX listens now; who wants to know will


def refuse_several() -> None:
    """For commands of one process: stops those that were started as several.

    Raises:
        UserError: the environment says that there are others.
    """
    for name in (COUNT, "SLURM_STEP_NUM_TASKS"):
        if os.environ.get(name, "1") != "1":
            raise UserError(
                f"{name} is {os.environ[name]}: this command runs in one process, on all of its "
                "devices; start it once"
            )


def exit_when_asked() -> None:
    """For work that can stop anywhere: SIGTERM ends the process at once, with `AGAIN`."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(AGAIN))


class Preemption:
    """Whether a run is to stop. Use as a context manager around its steps."""

    def __init__(self):
        self._asked = False
        self._previous: Any = signal.SIG_DFL
        self._votes: collections.deque[jax.Array] = collections.deque()

    def __enter__(self) -> "Preemption":
        # Only the main thread may listen; a run in another one is left to its caller.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *exception) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self) -> bool:
        """Whether to stop now; to be called once a step, by all processes, which agree."""
        if jax.process_count() == 1:
            return self._asked
        sharding, total = _vote()
        mine = np.array([self._asked], np.int32)
        self._votes.append(total(jax.make_array_from_process_local_data(sharding, mine)))
        return len(self._votes) > LAG and int(self._votes.popleft()) > 0

    def _ask(self, number: int, frame: types.FrameType | None) -> None:
        self._asked = True


@functools.cache
def _vote() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """Where the processes put their numbers, one device for each, and their sum."""
    first = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh([first[process] for process in sorted(first)], "process")
    return (
        NamedSharding(mesh, PartitionSpec("process")),
        jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec())),
    )


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError as error:
        raise UserError(f"{name} is {os.environ[name]!r}: it must be a number") from error
