"""Type checks for the fields of a config's sections and for arguments of the Python API.

Every section of a config belongs to a dataclass or a Flax module whose annotations give the type of
each field. `as_kind` checks a value against such a type, and `parse` reads a value from a text of
the command line. Both raise `FieldError` for a wrong type, and for a number that float32 or int32
cannot hold.
"""

import ast
import collections.abc
import dataclasses
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from conprediff_jax.common.errors import FieldError

_INTS = range(-(2**31), 2**31)
_LARGEST_FLOAT = float(np.finfo(np.float32).max)

_ONE = {
    bool: "True or False",
    int: "a whole number of 32 bits",
    float: "a finite number of 32 bits",
    str: "a text",
}
_MANY = {
    bool: "True or False each, such as (True, False)",
    int: "whole numbers, such as (1, 2)",
    float: "finite numbers, such as (0.2, 0.8)",
    str: "texts, such as ('a', 'b')",
}
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

_UNFIT = object()


def conform(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a dataclass's fields, as plain Python values of the declared types.

    Args:
        cls: The dataclass.
        values: Values by field. Numbers of NumPy and lists are accepted, too.

    Raises:
        FieldError: A value has another type, or is not finite.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    return {name: as_kind(name, value, kinds[name]) for name, value in values.items()}


def as_kind(name: str, value: Any, kind: Any) -> Any:
    """A value as a plain Python value of a type.

    Args:
        name: Name of the field, for the message.
        value: The value.
        kind: An annotation: bool, int, float, str, a tuple or sequence of these, or a union of
            these and None. A range of whole numbers is a type, too. For other types, the value is
            returned unchanged.

    Raises:
        FieldError: The value does not fit.
    """
    fit = _fit(value, kind)
    if fit is _UNFIT:
        raise FieldError(name, f"is {_shown(value)}: it must be {describe(kind)}")
    return fit


def parse(name: str, text: str, kind: Any) -> Any:
    """The value that a text of the command line stands for.

    Args:
        name: Name of the field, for the message.
        text: 'None' where None is allowed, a number, 'True' or 'False', or a tuple as Python writes
            it, with or without brackets. '1e4' is a whole number, too. For a field of type str, the
            text itself.
        kind: An annotation; see `as_kind`.

    Raises:
        FieldError: The text does not stand for a value of this type.
    """
    value = None if text == "None" else _from_text(text, _without_none(kind))
    fit = _UNFIT if value is _UNFIT else _fit(value, kind)
    if fit is _UNFIT:
        raise FieldError(name, f"is {_shown(text)}: it must be {describe(kind)}")
    return fit


def require(spec: Any, fits: Callable[[Any], bool], must: str, *names: str) -> None:
    """Raises FieldError for the first of some fields whose value does not fit.

    Args:
        spec: The object that has the fields.
        fits: A function that says whether a value fits.
        must: The end of the message 'it must ...'.
        *names: Names of the fields.
    """
    for name in names:
        if not fits(getattr(spec, name)):
            raise FieldError(name, f"is {getattr(spec, name)}: it must {must}")


def describe(kind: Any) -> str:
    """The words for values of a type in a message."""
    if isinstance(kind, range):
        return f"a whole number from {kind[0]} to {kind[-1]}"
    inner = _without_none(kind)
    if isinstance(inner, types.UnionType):
        choices = [each for each in typing.get_args(inner) if each is not types.NoneType]
        return " or ".join(map(describe, choices)) + (", or None" if _may_be_none(kind) else "")
    elements = _elements(inner)
    said = _ONE[inner] if elements is None else _MANY[elements[0]]
    if elements and elements[-1] is not ...:
        said = f"{len(elements)} {said}"
    return f"{said}, or None" if _may_be_none(kind) else said


def _may_be_none(kind: Any) -> bool:
    return types.NoneType in typing.get_args(kind)


def _without_none(kind: Any) -> Any:
    """The type `kind` of an annotation `kind | None`; other annotations are returned unchanged."""
    if not _may_be_none(kind):
        return kind
    rest = [inner for inner in typing.get_args(kind) if inner is not types.NoneType]
    return rest[0] if len(rest) == 1 else kind


def _elements(kind: Any) -> tuple[Any, ...] | None:
    """Types of the elements of a tuple or sequence; `(type, ...)` if it may have any length."""
    if typing.get_origin(kind) not in (tuple, collections.abc.Sequence):
        return None
    arguments = typing.get_args(kind)
    return arguments if typing.get_origin(kind) is tuple else (*arguments, ...)


def _fit(value: Any, kind: Any) -> Any:
    """The value as a plain Python value of the type; `_UNFIT` if it does not fit."""
    if value is None and _may_be_none(kind):
        return None
    kind = _without_none(kind)
    if isinstance(kind, types.UnionType):
        fits = (_fit(value, inner) for inner in typing.get_args(kind))
        return next((fit for fit in fits if fit is not _UNFIT), _UNFIT)
    elements = _elements(kind)
    if elements is not None and elements[0] in _ONE:
        return _fit_all(value, elements)
    if not isinstance(kind, range) and kind not in _ONE:
        return value
    value = _number(value)
    if kind in (bool, str):
        return value if isinstance(value, kind) else _UNFIT
    return _UNFIT if isinstance(value, bool) else _fit_number(value, kind)


def _fit_number(value: Any, kind: Any) -> Any:
    if kind is float and isinstance(value, numbers.Real):
        return float(value) if abs(value) <= _LARGEST_FLOAT else _UNFIT
    allowed = _INTS if kind is int else kind
    if isinstance(value, numbers.Integral) and int(value) in allowed:
        return int(value)
    return _UNFIT


def _fit_all(values: Any, elements: tuple[Any, ...]) -> Any:
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        return _UNFIT
    if elements[-1] is not ... and len(values) != len(elements):
        return _UNFIT
    fit = tuple(_fit(value, elements[0]) for value in values)
    return _UNFIT if any(value is _UNFIT for value in fit) else fit


def _number(value: Any) -> Any:
    """The number in an array without dimensions; everything else is returned unchanged."""
    is_scalar = hasattr(value, "item") and getattr(value, "ndim", None) == 0
    return value.item() if is_scalar else value


def _from_text(text: str, kind: Any) -> Any:
    """The value of roughly this type that a text stands for; `_UNFIT` if there is none."""
    if isinstance(kind, types.UnionType):
        values = (_from_text(text, inner) for inner in typing.get_args(kind))
        return next((value for value in values if value is not _UNFIT), _UNFIT)
    elements = _elements(kind)
    if elements is not None:
        return _many_from_text(text, elements[0])
    if kind is bool:
        return _BOOLEANS.get(text.lower(), _UNFIT)
    if kind is str:
        return text
    try:
        return float(text) if kind is float else _whole(text)
    except ValueError:
        return _UNFIT


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _whole(text: str) -> int:
    """The whole number that a text stands for, such as '10000' or '1e4'; raises ValueError."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not _is_whole(number):
            raise
        return int(number)


def _many_from_text(text: str, element: type) -> Any:
    """A tuple as Python writes it. For a tuple of texts, any other text is its only element."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return (text,) if element is str else _UNFIT
    if element is str and not isinstance(value, str) and not text.lstrip().startswith(("(", "[")):
        return (text,)
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(int(v) if element is int and _is_whole(v) else v for v in values)


def _shown(value: Any) -> str:
    """A value as it is shown in a message of one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
