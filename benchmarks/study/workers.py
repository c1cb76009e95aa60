"""Processes that train and measure the runs of a study, one run at a time in each.

    study       "baseline, seed 0"      to a worker that is idle, as a line of its standard input
    worker      {"error": null}         when the run is trained and measured, or has failed

A worker keeps what runs share: the imports, the references of the measurement, and the programs
that it has compiled, as far as JAX finds them again. With several workers, each has a core of its
own. A small model trains at one core with little less than the speed of two, so that two workers do
almost twice as much. What a run says goes to its `train.log`.
"""

import collections
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import logging

from conprediff_jax.common.errors import FieldError, first_line
from conprediff_jax.common.progress import Progress
from conprediff_jax.parallel.processes import RESTART_CODE, Preempted
from study.grid import Run

_STOPPED = "asked to stop: start again to continue"


def complete(runs: Sequence[Run], command: Sequence[str], count: int) -> list[str]:
    """Trains and measures the runs that are not done. If a run fails, the others continue.

    Args:
        runs: The runs in their order.
        command: The command that starts a worker; see `serve`.
        count: Number of workers; each has a core of its own if there are several.

    Returns:
        A message for each failure.

    Raises:
        FieldError: There are more workers than cores.
        Preempted: This process, or a run, was asked to stop.
    """
    cores = sorted(os.sched_getaffinity(0))
    if count > len(cores):
        raise FieldError("workers", f"is {count}: there are {len(cores)} cores")
    study = _Study(runs)
    workers = [
        _Worker(study, command, {core} if count > 1 else set(cores))
        for core in cores[: min(count, len(study.waiting))]
    ]
    signal.signal(signal.SIGTERM, _stop)
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        study.close()
        for worker in workers:
            worker.end()
    if study.preempted:
        raise Preempted(f"a run was {_STOPPED}")
    return study.failed


class _Study:
    """The runs that wait, and how many are done."""

    def __init__(self, runs: Sequence[Run]):
        self.waiting = collections.deque(run for run in runs if not run.result.exists())
        self.failed: list[str] = []
        self.preempted = False
        self._total, self._done = len(runs), len(runs) - len(self.waiting)
        self._progress, self._lock = Progress(self._total, self._done), threading.Lock()
        self._begun = self._done

    def close(self, *, preempted: bool = False) -> None:
        """Gives out no more runs."""
        with self._lock:
            self.waiting.clear()
            self.preempted |= preempted

    def take(self) -> Run | None:
        """The next run; None if there is none."""
        with self._lock:
            if not self.waiting:
                return None
            run = self.waiting.popleft()
            self._begun += 1
            doing = "measuring" if run.trained else "training"
            logging.info(
                "%s %s: run %d of %d, log in %s", doing, run.title, self._begun, self._total,
                run.log,
            )  # fmt: skip
            return run

    def ended(self, run: Run, error: str | None) -> None:
        """Notes that a run is done, or why it is not."""
        with self._lock:
            if error:
                self.failed.append(f"{run.title}: {error}")
                logging.error("%s", self.failed[-1])
                return
            self._done += 1
            # The speed since the start: several runs often end together.
            left = self._progress.left(self._progress.speed(self._done), self._done)
            logging.info("done %s: %d/%d runs  %s left", run.title, self._done, self._total, left)


class _Worker(threading.Thread):
    """A thread that gives runs to a process of its own."""

    def __init__(self, study: _Study, command: Sequence[str], cores: set[int]):
        super().__init__(daemon=True)
        self._study, self._command, self._cores = study, command, cores
        self._process: subprocess.Popen | None = None

    def run(self) -> None:
        os.sched_setaffinity(0, self._cores)  # of this thread, and of the process that it starts
        while run := self._study.take():
            if self._process is None:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            with contextlib.suppress(BrokenPipeError):  # the process has ended, which is seen below
                self._process.stdin.write(run.title + "\n")
                self._process.stdin.flush()
            if reply := self._process.stdout.readline():
                self._study.ended(run, json.loads(reply)["error"])
                continue
            code, self._process = self._process.wait(), None
            if code == RESTART_CODE:
                self._study.close(preempted=True)
            else:
                self._study.ended(run, f"exit code {code} (see {run.log})")

    def end(self) -> None:
        """Asks the process to end, and waits: a trainer saves its step first."""
        if process := self._process:
            process.terminate()
        if self.ident:
            self.join()
        if process:
            process.wait()


def serve(runs: Sequence[Run], measure: Callable[[Run], Any]) -> None:
    """Does the runs that the standard input names, and tells the end of each; for a worker.

    Args:
        runs: All runs of the study.
        measure: A function that measures a run and writes its result.

    Raises:
        Preempted: A run was asked to stop, and has saved its step.
    """
    known = {run.title: run for run in runs}
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    for line in sys.stdin:
        run, error = known[line.strip()], None
        with _saying_to(run.log):
            try:
                if not run.trained:
                    run.train()
                measure(run)
            except Preempted:
                raise
            except Exception as caught:  # the next run may succeed, whatever happened to this one
                traceback.print_exc()
                error = f"{first_line(caught)} (see {run.log})"
        print(json.dumps({"error": error}), file=replies, flush=True)


@contextlib.contextmanager
def _saying_to(log: pathlib.Path) -> Iterator[None]:
    """Appends all output of this process, also that of libraries, to a file."""
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        with log.open("a") as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, before in zip((1, 2), kept, strict=True):
            os.dup2(before, descriptor)
            os.close(before)


def _stop(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # further signals change nothing
    raise Preempted(_STOPPED)
