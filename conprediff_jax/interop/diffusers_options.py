"""What all readers of diffusers' configs share: every option is read, or has its only fit value."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from conprediff_jax.errors import UserError


class DiffusersError(UserError):
    """A model or setting that one side has and the other has not."""


@dataclasses.dataclass
class Options:
    """The options of one of diffusers' configs, and an account of those that were read.

    Attributes:
        given: The config. Keys that begin with an underscore are about the file.
        where: What to call it in errors.
    """

    given: Mapping[str, Any]
    where: str

    def __post_init__(self):
        self._read = set()

    def take(self, name: str, default: Any) -> Any:
        """The value of an option, lists as tuples; diffusers' default where it is absent."""
        self._read.add(name)
        value = self.given.get(name, default)
        return tuple(value) if isinstance(value, list) else value

    def expect(self, **only: Any) -> None:
        """Options of which there is one fit value; absent ones must have it as their default.

        Raises:
            DiffusersError: an option has another value; the message names it, and both values.
        """
        for name, value in only.items():
            found = self.take(name, value)
            if found != value:
                raise DiffusersError(
                    f"{self.where}: {name} is {found!r}; only {value!r} has a counterpart here"
                )

    def ignore(self, *names: str) -> None:
        """Options that do not matter."""
        self._read.update(names)

    def finish(self) -> None:
        """Accounts for the rest.

        Raises:
            DiffusersError: an option was given that nobody read.
        """
        for name, value in self.given.items():
            if name not in self._read and not name.startswith("_") and value is not None:
                raise DiffusersError(f"{self.where}: no counterpart for {name}={value!r}")


def multiples(channels: tuple[int, ...], where: str) -> tuple[int, tuple[int, ...]]:
    """The channels of the first level, and those of all levels as multiples of them.

    Raises:
        DiffusersError: they are no multiples.
    """
    first = channels[0]
    if any(width % first for width in channels):
        raise DiffusersError(
            f"{where}: block_out_channels {channels}; all must be multiples of the first"
        )
    return first, tuple(width // first for width in channels)
