"""Errors that are the user's to mend."""

import textwrap
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message is one line saying what was wrong, where, and what would be right.

    The commands print it without a traceback and end with exit code 2.
    """


class FieldError(UserError):
    """A field of a section, or an argument of a function, has a value that cannot be right.

    The message is a sentence whose subject is the field: 'clip is -1.0: it must not be negative'.
    The commands put dashes before the field where they have a flag of that name.

    Attributes:
        field: name of the field or argument.
        reason: the rest of the sentence.
    """

    def __init__(self, field: str, reason: str):
        super().__init__(f"{field} {reason}")
        self.field, self.reason = field, reason

    def __reduce__(self):
        return FieldError, (self.field, self.reason)


class ConfigError(UserError):
    """A config that cannot be built; the message names the key."""


class DataError(UserError):
    """Data that is missing, or not what the configuration says. The message is one line."""


def first_line(error: Exception) -> str:
    """The first line of an error's message that says anything, or the name of its type."""
    lines = [line.strip(" \"'") for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


def shortened(names: Iterable[str]) -> str:
    """Names with commas between them, for a message: the first of them where they are many."""
    return textwrap.shorten(", ".join(names), 200, placeholder=" ...")
