"""What a command answers before it imports libraries: `--help`, `--version`, or no arguments.

Importing JAX and all that is built on it takes seconds. So a command defines its flags first, calls
`answer`, and imports its libraries below.
"""

import re
import sys
from collections.abc import Callable

from absl import app, flags

from conprediff_jax.common.version import package_version

flags.disclaim_key_flags()  # the flags below are those of the command

_HELP = ("help", "helpshort", "helpfull", "helpxml", "?", "h")


def answer(name: str, *, several: bool = False, **answers: Callable[[], str]) -> None:
    """Ends the program with an answer if the command line only asks a question.

    Args:
        name: `__name__` of the command: nothing happens where another module imports it.
        several: Whether the command can run as one of several processes.
        **answers: Functions that make the answers to further flags, by the flags' names.
    """
    if name != "__main__":
        return
    define(several)
    arguments = sys.argv[1:]
    asked = {argument.lstrip("-") for argument in arguments if argument.startswith("-")}
    if not arguments:
        print(examples(sys.modules[name].__doc__), file=sys.stderr)
        sys.exit(2)
    if "version" in asked:
        print(f"conprediff_jax {package_version()}")
        sys.exit(0)
    for flag in asked.intersection(answers):
        print(answers[flag]())
        sys.exit(0)
    if asked.intersection(_HELP):
        app.usage(shorthelp="helpfull" not in asked, writeto_stdout=True, exitcode=0)


def define(several: bool) -> None:
    """Defines the flags that every command has, unless they are defined."""
    app.define_help_flags()
    if "version" not in flags.FLAGS:
        flags.DEFINE_bool("version", False, "Print the version of the package and exit.")
    if several and "distributed" not in flags.FLAGS:
        flags.DEFINE_bool(
            "distributed",
            False,
            "Find the other processes of the run through Cloud TPU, Slurm or MPI.",
        )


def examples(doc: str) -> str:
    """What a command is for, and its three most common lines.

    Args:
        doc: Docstring of the command, which begins with both.
    """
    lines = re.findall(r"^    python -m .*\n(?:^        .*\n)*", doc, re.MULTILINE)
    return "\n".join([doc.partition("\n")[0], "", *map(str.rstrip, lines[:3]), "", _ALL])


_ALL = "--help describes every flag."
