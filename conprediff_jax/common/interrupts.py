"""Ctrl-C (SIGINT): what the first one does, and the second one, which ends a program at once.

Python runs a handler of a signal in the main thread, between two of its instructions. A compilation
or a batch on the devices is one such instruction, and may take minutes. So a thread hears Ctrl-C as
well, by `signal.set_wakeup_fd`. It says what the program is waiting for, and ends the program at
the second Ctrl-C, whatever the main thread is doing.

In some places, such as callbacks of the garbage collector, Python drops exceptions. A
KeyboardInterrupt that was dropped is raised once more.

A shell starts a script's background processes with SIGINT ignored, and it stays ignored there.
"""

import _thread
import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator

from absl import logging

from conprediff_jax.common import starting

EXIT_CODE = 128 + signal.SIGINT  # 130, as shells report it

_PATIENCE = 1.0  # seconds after which a program that has not ended says why
_WAITING = "Ctrl-C: ends after the computation that is running"

Ask = Callable[[int, types.FrameType | None], None]


class _Listener:
    """What hears Ctrl-C. There is one, since signals belong to the whole process."""

    def __init__(self):
        self.active = False
        self.waiting, self.patience = _WAITING, _PATIENCE
        self.left: Callable[[], str] = str  # what a program that ends at once leaves
        self._presses = 0
        self._repeated = 0  # signals to come that are no Ctrl-C
        self._timer: threading.Timer | None = None

    def hear(self, pipe: int) -> None:
        """Reads the numbers of signals from a pipe; the work of the thread."""
        while number := os.read(pipe, 1):
            if number[0] != signal.SIGINT or not self.active:
                continue
            if self._repeated:
                self._repeated -= 1
                continue
            self._presses += 1
            if self._presses > 1:
                self._end()
            self._timer = _later(self.patience, self._say)

    def _say(self) -> None:
        logging.info("%s; press again to end at once", self.waiting)

    def _end(self) -> None:
        said = self.left()
        logging.info("Ctrl-C: ended at once%s", f"; {said}" if said else "")
        os._exit(EXIT_CODE)

    def interrupt(self, number: int, frame: types.FrameType | None) -> None:
        """The handler of the main thread: raises KeyboardInterrupt, but not a second time."""
        del number, frame
        if self._presses < 2:
            raise KeyboardInterrupt

    def dropped(self, about: "sys.UnraisableHookArgs") -> None:
        """Is told of every exception that Python drops; raises KeyboardInterrupt once more."""
        if self.active and about.exc_type is KeyboardInterrupt:
            self._repeated += 1
            _later(0.1, _thread.interrupt_main)
        else:
            sys.__unraisablehook__(about)

    def quiet(self) -> None:
        """Says nothing more about waiting."""
        if self._timer:
            self._timer.cancel()


def _later(seconds: float, call: Callable[[], None]) -> threading.Timer:
    """Calls a function after some seconds, in a thread of its own."""
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
    return timer


_listener = _Listener()


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Encloses a command: Ctrl-C raises KeyboardInterrupt, and a second one ends the process."""
    known = (signal.default_int_handler, starting.end)
    if signal.getsignal(signal.SIGINT) not in known:  # ignored, or taken
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _listener.interrupt)
    sys.unraisablehook = _listener.dropped
    _listener.active = True
    threading.Thread(target=_listener.hear, args=[reading], daemon=True).start()
    try:
        yield
    finally:
        _listener.active = False
        _listener.quiet()
        sys.unraisablehook = sys.__unraisablehook__
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(previous)
        os.close(writing)  # which ends the thread


@contextlib.contextmanager
def asking(ask: Ask, *, waiting: str, left: Callable[[], str]) -> Iterator[None]:
    """Encloses work that ends by itself when it is asked to, as training does after a step.

    Ctrl-C then calls `ask` and raises nothing. Outside of `heard`, Ctrl-C stays what it is.

    Args:
        ask: A handler of the signal.
        waiting: What the first Ctrl-C says, at once.
        left: A function that says what a second Ctrl-C leaves.
    """
    if not _listener.active:
        yield
        return
    before = _listener.waiting, _listener.patience, _listener.left
    _listener.waiting, _listener.patience, _listener.left = f"Ctrl-C: {waiting}", 0.0, left
    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _listener.interrupt)
        _listener.waiting, _listener.patience, _listener.left = before
