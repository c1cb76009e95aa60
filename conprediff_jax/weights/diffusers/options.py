"""Options of diffusers' configs. Every option is either read, or must have the value that fits.

Schedulers have few options, and the effect of each is known. Each is declared as a `Key`, and all
others are refused. The options of networks are read one by one by `Options`.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from conprediff_jax.common.errors import UserError


class DiffusersError(UserError):
    """A model or setting without a counterpart, here or in diffusers."""


REQUIRED = type("Required", (), {"__repr__": lambda self: "no default"})()


@dataclasses.dataclass(frozen=True)
class Key:
    """One option of a class of diffusers.

    Attributes:
        default: The default of the class; `REQUIRED` if a file must not leave the option out.
        fits: The values that have a counterpart here; empty if all values of the default's type do.
        matters: Whether the option changes the samples.
    """

    default: Any
    fits: tuple[Any, ...] = ()
    matters: bool = True

    def problem(self, value: Any) -> str | None:
        """The reason why a value is refused, as the end of a sentence; None if it is accepted."""
        if not self.matters:
            return None
        if self.fits:
            listed = ", ".join(repr(fit) for fit in self.fits)
            same = any(type(value) is type(fit) and value == fit for fit in self.fits)
            return None if same else f"{listed} alone has a counterpart here"
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
    """The values of all options of a class, with the defaults of those that a file leaves out.

    Args:
        config: The content of the file. Keys that begin with an underscore are no options.
        keys: The options of the class.
        where: The name of the file in errors.
        others: The options of other classes, which the class ignores.

    Raises:
        DiffusersError: An option is not known, is missing, or has a value without a counterpart
            here; the message names the option.
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
    """The options of one of diffusers' configs, with an account of those that were read.

    Attributes:
        given: The config. Keys that begin with an underscore are no options.
        where: The name of the config in errors.
    """

    given: Mapping[str, Any]
    where: str

    def __post_init__(self):
        self._read = set()

    def take(self, name: str, default: Any, kind: type | None = None) -> Any:
        """Reads the value of an option, with tuples for lists.

        Args:
            name: The name of the option.
            default: The default of diffusers. The value must have the type of the default, or be a
                list of such values, one for each level.
            kind: The type of an option that may also be None.

        Raises:
            DiffusersError: The value has another type.
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
        """Reads options that must have the given values, which are also diffusers' defaults.

        Raises:
            DiffusersError: An option has another value; the message names it and both values.
        """
        for name, value in only.items():
            found = self._value(name, value)
            if found != value:
                raise DiffusersError(
                    f"{self.where}: {name} is {found!r}; only {value!r} has a counterpart here"
                )

    def activation(self) -> None:
        """Reads `act_fn`, which must be SiLU by either of its names."""
        if self._value("act_fn", "silu") != "swish":
            self.expect(act_fn="silu")

    def ignore(self, *names: str) -> None:
        """Reads options that do not matter."""
        self._read.update(names)

    def finish(self) -> None:
        """Checks that every option was read.

        Raises:
            DiffusersError: An option was not read.
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
    """The channels of the first level, and the channels of all levels as multiples of these.

    Raises:
        DiffusersError: The channels of a level are no multiple of those of the first.
    """
    if not isinstance(channels, tuple) or not channels or min(_leaves(channels)) < 1:
        raise DiffusersError(
            f"{where}: block_out_channels {channels}; give a number above 0 for every level"
        )
    first = channels[0]
    if any(width % first for width in channels):
        raise DiffusersError(
            f"{where}: block_out_channels {channels}; all must be multiples of the first"
        )
    return first, tuple(width // first for width in channels)
