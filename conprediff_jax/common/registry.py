"""Kinds of something by name. Code outside the package can add its own kinds."""

from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from conprediff_jax.common.errors import FieldError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """The kinds that a config may name, each with a value such as a class.

    Args:
        what: What there are several kinds of, for messages, such as 'denoiser'.
    """

    def __init__(self, what: str):
        self._what, self._entries = what, {}

    def register(self, kind: str) -> Callable[[T], T]:
        """A decorator that registers something under the name `kind`.

        Raises:
            ValueError: Something else is registered under this name.
        """

        def add(entry: T) -> T:
            known = self._entries.get(kind, entry)
            # A config file may be executed more than once, which defines the same things again.
            if getattr(known, "__qualname__", known) != getattr(entry, "__qualname__", entry):
                raise ValueError(f"there is a {self._what} of kind {kind!r} already: {known}")
            self._entries[kind] = entry
            return entry

        return add

    def __getitem__(self, kind: str) -> T:
        if kind not in self._entries:
            raise FieldError("kind", f"is {kind!r}: choose one of {tuple(self._entries)}")
        return self._entries[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
