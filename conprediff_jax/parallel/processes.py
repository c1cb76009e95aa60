"""Several processes: how they find each other, and how all of them stop at the same step.

A scheduler that wants its machines back sends SIGTERM and, a little later, SIGKILL. In between, a
run writes a checkpoint and exits with `RESTART_CODE`: the same command then continues from it.
Ctrl-C (SIGINT) is answered in the same way, except that the run ends as programs end by Ctrl-C.
Schedulers differ in which processes they signal, and when. So every process contributes one number
a step to a sum over all processes. The sum is queued on the devices behind the step and read two
steps later, so that no process waits for it and all of them read the same value. (JAX's own
`multihost_utils.reached_preemption_sync_point` keeps one counter, which orbax sets back to older
steps while it saves in the background. A signal that arrives then, or before the first step of a
resumed run, is lost.)
"""

import collections
import contextlib
import functools
import os
import signal
import threading
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from conprediff_jax.common import interrupts
from conprediff_jax.common.errors import UserError

RESTART_CODE = os.EX_TEMPFAIL  # 75, the exit code of a run to be started again

COORDINATOR = "JAX_COORDINATOR_ADDRESS"
COUNT, INDEX = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

LAG = 2  # steps from the queueing of a vote to its reading


# What a process adds to the sum if it was asked to stop: the sum tells whether any Ctrl-C came.
_VOTES = {None: 0, signal.SIGTERM: 1, signal.SIGINT: 1 << 16}


class Preempted(Exception):
    """The run was asked to stop, and has saved what it needs to continue."""


class Interrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C in all its processes, and has saved what it needs."""


def join(*, automatic: bool = False, timeout: int = 300) -> None:
    """Connects this process with the others of its run. Call it before JAX is used.

    The environment says which processes there are: `JAX_COORDINATOR_ADDRESS` (host:port of the
    first process), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`. Without these variables, this process
    is the only one, unless `automatic` is set.

    Args:
        automatic: Whether to ask the cluster (Cloud TPU, Slurm, Open MPI) for the other processes
            if the environment does not name them.
        timeout: Seconds to wait for the other processes.

    Raises:
        UserError: Some of the variables are missing, or the coordinator cannot be found.
        RuntimeError: The other processes did not appear in time. (JAX may abort the process
            instead.)
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
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # matters on CPUs only
    try:
        jax.distributed.initialize(**options, initialization_timeout=timeout)
    except (ValueError, RuntimeError) as error:
        if "DEADLINE_EXCEEDED" in str(error):  # no user error: a restart may find them
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        where = f" by {COORDINATOR}={os.environ[COORDINATOR]}" if given else ""
        raise UserError(f"the processes do not find each other{where}: {first}") from error
    exit_when_asked()  # JAX has installed its own handler of SIGTERM


def refuse_several() -> None:
    """Checks that a command for one process was not started as several.

    Raises:
        UserError: The environment says that there are several processes.
    """
    for name in (COUNT, "SLURM_STEP_NUM_TASKS"):
        if os.environ.get(name, "1") != "1":
            raise UserError(
                f"{name} is {os.environ[name]}: this command runs in one process, on all of its "
                "devices; start it once"
            )


def exit_when_asked() -> None:
    """Lets SIGTERM end the process at once with `RESTART_CODE`, for work that can stop anywhere."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(RESTART_CODE))


class Preemption:
    """Whether a run has been asked to stop. Use it as a context manager around the steps.

    Args:
        left: A function that says where the run goes on if a second Ctrl-C ends it at once.
    """

    def __init__(self, left: Callable[[], str]):
        self._asked: int | None = None
        self._left, self._votes = left, collections.deque[jax.Array]()
        self._contexts = contextlib.ExitStack()
        self._by_interrupt = False

    def __enter__(self) -> "Preemption":
        # Only the main thread may handle signals; a run in another thread is left to its caller.
        if threading.current_thread() is threading.main_thread():
            previous = signal.signal(signal.SIGTERM, self._ask)
            self._contexts.callback(signal.signal, signal.SIGTERM, previous)
            waiting = "the run saves its step and ends"
            self._contexts.enter_context(
                interrupts.asking(self._ask, waiting=waiting, left=self._left)
            )
        return self

    def __exit__(self, *exception) -> None:
        self._contexts.close()

    def reached(self) -> bool:
        """Whether to stop now. Every process must call it once a step; all get the same answer."""
        vote = _VOTES[self._asked]
        if jax.process_count() > 1:
            sharding, total = _vote()
            votes = np.array([vote], np.int32)
            self._votes.append(total(jax.make_array_from_process_local_data(sharding, votes)))
            vote = int(self._votes.popleft()) if len(self._votes) > LAG else 0
        self._by_interrupt = vote >= _VOTES[signal.SIGINT]
        return vote > 0

    def reason(self, step: int) -> Preempted | Interrupted:
        """What to raise once the step is saved after which `reached` was true."""
        if self._by_interrupt:
            return Interrupted(f"Ctrl-C: step {step} is saved; the same command continues")
        return Preempted(f"asked to stop: step {step} is saved; the same command continues")

    def _ask(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        self._asked = max(number, self._asked or 0, key=lambda n: _VOTES.get(n, 0))


@functools.cache
def _vote() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """The sharding of the votes, one device for every process, and the sum over them."""
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
