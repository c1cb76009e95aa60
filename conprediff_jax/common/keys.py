"""The roles of the fields of a section's class as keys of a config.

A field is either a key of its section, or `derived` from other sections. A key is either `fixed`,
since trained parameters mean nothing with another value, or `adjustable` when a run continues. A
`switch` is adjustable, except between nothing (0 or '') and something, because that adds or removes
parameters. A `guarded` key says what a run learns from. Another value makes another run, and must
be allowed explicitly. By default, the fields of Flax modules are fixed, and all other fields are
adjustable.
"""

import dataclasses
from typing import Any

import flax.linen as nn

_ROLE = "role"
_OF_FLAX = ("parent", "name")  # fields that Flax adds to every module


def derived(default: Any = dataclasses.MISSING) -> Any:
    """A field that the builder fills in from other sections; it is not a key."""
    return dataclasses.field(default=default, metadata={_ROLE: "derived"})


def fixed(default: Any = dataclasses.MISSING) -> Any:
    """A key that must not change when a run continues."""
    return dataclasses.field(default=default, metadata={_ROLE: "fixed"})


def adjustable(default: Any = dataclasses.MISSING) -> Any:
    """A key that may change when a run continues."""
    return dataclasses.field(default=default, metadata={_ROLE: "adjustable"})


def switch(default: Any = dataclasses.MISSING) -> Any:
    """A key that may change when a run continues, but not between nothing and something."""
    return dataclasses.field(default=default, metadata={_ROLE: "switch"})


def guarded(default: Any = dataclasses.MISSING) -> Any:
    """A key that may change when a run continues only if this is allowed explicitly."""
    return dataclasses.field(default=default, metadata={_ROLE: "guarded"})


def keys_of(cls: type) -> list[dataclasses.Field]:
    """The fields of a dataclass or Flax module that are keys of its section."""
    return [
        field
        for field in dataclasses.fields(cls)
        if field.init and _role(field) != "derived" and not _is_of_flax(cls, field)
    ]


def derived_names(cls: type) -> list[str]:
    """The fields of a dataclass or Flax module that are derived from other sections."""
    return [field.name for field in dataclasses.fields(cls) if _role(field) == "derived"]


def fixed_names(cls: type) -> list[str]:
    """The keys of a section that must not change when a run continues."""
    default = "fixed" if issubclass(cls, nn.Module) else "adjustable"
    return [field.name for field in keys_of(cls) if _role(field, default) == "fixed"]


def switch_names(cls: type) -> list[str]:
    """The keys of a section that are switches."""
    return [field.name for field in keys_of(cls) if _role(field) == "switch"]


def guarded_names(cls: type) -> list[str]:
    """The keys of a section that are guarded."""
    return [field.name for field in keys_of(cls) if _role(field) == "guarded"]


def _role(field: dataclasses.Field, default: str = "") -> str:
    return field.metadata.get(_ROLE, default)


def _is_of_flax(cls: type, field: dataclasses.Field) -> bool:
    return issubclass(cls, nn.Module) and field.name in _OF_FLAX
