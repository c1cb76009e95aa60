"""What all readers of diffusers' configs share: every option is read, or has its only fit value.

The options of schedulers are few, and what they do is known to the last of them: each is declared
as a `Key`, and no other is read. Those of networks are taken one by one, by `Options`.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from conprediff_jax.common.errors import UserError


class DiffusersError(UserError):
    """A model or setting that one side has and the other has not."""


REQUIRED = type("Required", (), {"__repr__": lambda self: "no default"})()


@dataclasses.dataclass(frozen=True)
class Key:
    """One option of a class of diffusers.

    Attributes:
        default: What the class takes where a file leaves the option out; `REQUIRED` if it must not.
        fits: The values that have a counterpart here; empty for all of the default's type.
        matters: Whether it makes a difference to what is sampled here.
    """

    default: Any
    fits: tuple[Any, ...] = ()
    matters: bool = True

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, after "<name> is <value>"; None for nothing."""
        if not self.matters:
            return None
        if self.fits:
            listed = ", ".join(repr(fit) for fit in self.fits)
            same = any(type(value) is type(fit) and value == fit for fit in self.fits)
            return None if same else f"{listed} alone can be read here"
        kind = int if self.default is REQUIRED else type(self.default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            return f"it must be of type {kind.__name__}"
        if kind is float and (math.isnan(value) or value == math.inf):
            return "it must be a number"
        return None


def declared(
    config: Mapping[str, Any], keys: Mapping[str, Key], where: str, others: Collection[str] = ()
) -> dict[str, Any]:
    """The values of all options of a class, of those that a file leaves out the defaults.

    Args:
        config: What the file holds; keys that begin with an underscore are about the file.
        keys: The options of the class.
        where: What to call the file in errors.
        others: Options of other classes, which the class drops.

    Raises:
        DiffusersError: An option is not known, is missing, or has a value without a counterpart
            here; the message names it.
    """
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    for name in given.keys() - keys.keys() - set(others):
        raise DiffusersError(f"{where}: no counterpart for {name}={given[name]!r}")
    values = {name: given.get(name, key.default) for name, key in keys.items()}
    for name, value in values.items():
        if value is REQUIRED:
            raise DiffusersError(f"{where}: {name} is missing")
        if problem := keys[name].problem(value):
            raise DiffusersError(f"{where}: {name} is {value!r}; {problem}")
    return values


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

    def take(self, name: str, default: Any, kind: type | None = None) -> Any:
        """The value of an option, lists as tuples; diffusers' default where it is absent.

        Args:
            name: Of the option.
            default: Of diffusers. The value is of its type, or holds values of it, level by level.
            kind: That type, of an option that may be None as well.

        Raises:
            DiffusersError: The value is of another type.
        """
        value = self._value(name, default)
        if value is None and kind is not None:
            return None
        kind = kind or type(_first(default))
        allowed = (int, float) if kind is float else (kind,)
        if not all(type(leaf) in allowed for leaf in _leaves(value)):
            raise DiffusersError(
                f"{self.where}: {name} is {value!r}; it must be of type {kind.__name__}"
            )
        return value

    def _value(self, name: str, default: Any) -> Any:
        self._read.add(name)
        return _tupled(self.given.get(name, default))

    def expect(self, **only: Any) -> None:
        """Options of which there is one fit value; absent ones must have it as their default.

        Raises:
            DiffusersError: an option has another value; the message names it, and both values.
        """
        for name, value in only.items():
            found = self._value(name, value)
            if found != value:
                raise DiffusersError(
                    f"{self.where}: {name} is {found!r}; only {value!r} has a counterpart here"
                )

    def activation(self) -> None:
        """Reads `act_fn`: SiLU, by either of its names."""
        if self._value("act_fn", "silu") != "swish":
            self.expect(act_fn="silu")

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


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list | tuple) else value


def _leaves(value: Any) -> list[Any]:
    if not isinstance(value, tuple):
        return [value]
    return [leaf for part in value for leaf in _leaves(part)]


def _first(value: Any) -> Any:
    return _leaves(value)[0]


def multiples(channels: Any, where: str) -> tuple[int, tuple[int, ...]]:
    """The channels of the first level, and those of all levels as multiples of them.

    Raises:
        DiffusersError: they are no multiples.
    """
    if not isinstance(channels, tuple) or not channels or min(_leaves(channels)) < 1:
        raise DiffusersError(f"{where}: block_out_channels {channels}; one above 0 for every level")
    first = channels[0]
    if any(width % first for width in channels):
        raise DiffusersError(
            f"{where}: block_out_channels {channels}; all must be multiples of the first"
        )
    return first, tuple(width // first for width in channels)
