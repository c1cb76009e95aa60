"""What fields of a section and arguments of the Python API may hold.

Every section of a config is a dataclass, or a Flax module, whose annotations say the type of each
field. Here values are held against them, texts of a command line are read by them, and whatever
does not fit is a `FieldError`: a wrong type, and a number that float32 or int32 cannot hold.
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
    """Values of a dataclass's fields as plain Python values of the types that they are declared of.

    Args:
        cls: the dataclass.
        values: by field; NumPy's numbers and lists are taken, too.

    Raises:
        FieldError: a value is of another type, or is not finite.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    return {name: as_kind(name, value, kinds[name]) for name, value in values.items()}


def as_kind(name: str, value: Any, kind: Any) -> Any:
    """A value as a plain Python value of a type.

    Args:
        name: of the field, for the message.
        value: anything.
        kind: an annotation: bool, int, float, str, a tuple or sequence of these, or any of them or
            None. A value of any other type is returned as it is. Or a range of whole numbers.

    Raises:
        FieldError: the value does not fit.
    """
    fit = _fit(value, kind)
    if fit is _UNFIT:
        raise FieldError(name, f"is {_shown(value)}: it must be {describe(kind)}")
    return fit


def parse(name: str, text: str, kind: Any) -> Any:
    """The value that a text of a command line stands for.

    Args:
        name: of the field, for the message.
        text: 'None' where None may be; a number; 'True' or 'False'; a tuple as Python writes it,
            whose brackets may be missing. Any other text is taken as it is.
        kind: an annotation, see `as_kind`.

    Raises:
        FieldError: the text stands for no such value.
    """
    value = None if text == "None" else _from_text(text, _without_none(kind))
    fit = _UNFIT if value is _UNFIT else _fit(value, kind)
    if fit is _UNFIT:
        raise FieldError(name, f"is {_shown(text)}: it must be {describe(kind)}")
    return fit


def require(spec: Any, fits: Callable[[Any], bool], must: str, *names: str) -> None:
    """Raises FieldError for the first of some fields whose value does not fit.

    Args:
        spec: the object that has the fields.
        fits: whether a value fits.
        must: the end of the message, 'it must ...'.
        *names: of the fields.
    """
    for name in names:
        if not fits(getattr(spec, name)):
            raise FieldError(name, f"is {getattr(spec, name)}: it must {must}")


def describe(kind: Any) -> str:
    """What values of a type are called in a message."""
    if isinstance(kind, range):
        return f"a whole number from {kind[0]} to {kind[-1]}"
    inner = _without_none(kind)
    elements = _elements(inner)
    said = _ONE[inner] if elements is None else _MANY[elements[0]]
    if elements and elements[-1] is not ...:
        said = f"{len(elements)} {said}"
    return f"{said}, or None" if _may_be_none(kind) else said


def _may_be_none(kind: Any) -> bool:
    return types.NoneType in typing.get_args(kind)


def _without_none(kind: Any) -> Any:
    """`kind` of the annotation `kind | None`."""
    if not _may_be_none(kind):
        return kind
    rest = [inner for inner in typing.get_args(kind) if inner is not types.NoneType]
    return rest[0] if len(rest) == 1 else kind


def _elements(kind: Any) -> tuple[Any, ...] | None:
    """Types of the elements of a tuple or sequence; of any number of them, `(type, ...)`."""
    if typing.get_origin(kind) not in (tuple, collections.abc.Sequence):
        return None
    arguments = typing.get_args(kind)
    return arguments if typing.get_origin(kind) is tuple else (*arguments, ...)


def _fit(value: Any, kind: Any) -> Any:
    """The value as a plain one of the type; `_UNFIT` where it is no such value."""
    if value is None and _may_be_none(kind):
        return None
    kind = _without_none(kind)
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
    """What an array of no dimensions holds; everything else as it is."""
    is_scalar = hasattr(value, "item") and getattr(value, "ndim", None) == 0
    return value.item() if is_scalar else value


def _from_text(text: str, kind: Any) -> Any:
    """What a text says, of roughly the type; `_UNFIT` where it says nothing of the kind."""
    elements = _elements(kind)
    if elements is not None:
        return _many_from_text(text, elements[0])
    if kind is bool:
        return _BOOLEANS.get(text.lower(), _UNFIT)
    if kind is str:
        return text
    try:
        return float(text) if kind is float else int(text)
    except ValueError:
        return _UNFIT


def _many_from_text(text: str, element: type) -> Any:
    """A tuple as Python writes it; else, of texts, this one alone."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return (text,) if element is str else _UNFIT
    if element is str and not isinstance(value, str) and not text.lstrip().startswith(("(", "[")):
        return (text,)
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _shown(value: Any) -> str:
    """A value in a message of one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
