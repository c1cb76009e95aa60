"""Ctrl-C while a command starts: one line, and the end.

A command imports libraries for seconds. A KeyboardInterrupt would leave them as a long traceback,
or be dropped, or become another exception. There is nothing to save yet, so nothing is raised and
the process ends by the signal, which shells report as exit code 130. From `interrupts.heard` on,
Ctrl-C is answered there.

This module imports next to nothing, so that it can come before all others.
"""

import os
import signal
import sys
import types


def is_command(package: str) -> bool:
    """Whether Python is about to run a module of a package by `python -m`.

    Args:
        package: Name of the package.
    """
    # While Python looks for the module, "-m" stands in the place of its path.
    named = any(argument.startswith(f"{package}.") for argument in sys.orig_argv)
    return sys.argv[:1] == ["-m"] and named


def answer_ctrl_c() -> None:
    """Lets Ctrl-C end the program with one line, unless it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)


def end(number: int, frame: types.FrameType | None) -> None:
    """The handler: says so, and ends the process by the signal."""
    del frame
    os.write(2, b"stopped by Ctrl-C before anything was begun\n")
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
