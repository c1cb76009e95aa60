"""Kinds of one thing by name, to which code outside the package can add its own."""

from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """What the `kind` of a config's section may be.

    Args:
        what: What the kinds are of, for messages, such as 'denoiser'.
    """

    def __init__(self, what: str):
        self._what, self._entries = what, {}

    def register(self, kind: str) -> Callable[[T], T]:
        """A decorator that makes something known as `kind`.

        Raises:
            ValueError: Something else is known by that name.
        """

        def add(entry: T) -> T:
            known = self._entries.get(kind, entry)
            # A config file may be executed more than once, which defines the same things anew.
            if getattr(known, "__qualname__", known) != getattr(entry, "__qualname__", entry):
                raise ValueError(f"there is a {self._what} of kind {kind!r} already: {known}")
            self._entries[kind] = entry
            return entry

        return add

    def __getitem__(self, kind: str) -> T:
        if kind not in self._entries:
            raise ValueError(f"kind is {kind!r}: choose one of {tuple(self._entries)}")
        return self._entries[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
