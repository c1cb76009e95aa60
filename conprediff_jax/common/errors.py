"""Errors that the user can correct."""

import textwrap
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message is one line that says what is wrong, where, and what would be right.

    The commands print it without a traceback and end with exit code 2.
    """


class FieldError(UserError):
    """A field of a section, or an argument of a function, has a value that cannot be right.

    The message is a sentence whose subject is the field: 'clip is -1.0: it must not be negative'.
    A command that has a flag of this name puts dashes before the field.

    Attributes:
        field: The name of the field or argument.
        reason: The rest of the sentence.
    """

    def __init__(self, field: str, reason: str):
        super().__init__(f"{field} {reason}")
        self.field, self.reason = field, reason

    def __reduce__(self):
        return FieldError, (self.field, self.reason)


class ConfigError(UserError):
    """A config that cannot be built; the message names the key."""


class DataError(UserError):
    """Data that are missing, or that are not what the config says."""


def first_line(error: Exception) -> str:
    """The first line of an error's message that is not empty, or the name of the error's type."""
    lines = [line.strip(" \"'") for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


def shortened(names: Iterable[str]) -> str:
    """Names with commas between them, for a message; only the first ones if there are many."""
    return textwrap.shorten(", ".join(names), 200, placeholder=" ...")


def printable(name: str) -> str:
    """A name for a message: line breaks and other invisible characters are written as escapes."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in name
    )
