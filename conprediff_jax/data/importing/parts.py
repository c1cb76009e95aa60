"""What is imported: the parts of a source, and the features of its records."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

_VALIDATION = ("val", "valid", "validation", "dev")
SPLITS = dict.fromkeys(("train", "training"), "train")
SPLITS |= dict.fromkeys(("test", "testing"), "test") | dict.fromkeys(_VALIDATION, "validation")
TEXTS = ("text", "caption", "captions", "prompt")  # usual names of a column of captions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which features are imported besides the images.

    Attributes:
        text: Name of the captions' column or kind of file; '' to find them; None for none.
        label: Name of the classes' column or kind of file; '' to find them; None for none.
        keep: Names of further columns, which are imported as texts.
    """

    text: str | None = ""
    label: str | None = ""
    keep: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Records that are imported together; an interrupted import goes on with the next part.

    Attributes:
        split: Name of the split.
        name: What is read, in messages.
        read: Makes an iterator over the records of the part. They are those of `data.sources`,
            where `text` is a list of captions and every other feature a text. A record that lacks
            its image or its class is `unreadable`.
    """

    split: str
    name: str
    read: Callable[[], Iterable[dict[str, Any]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is imported.

    Attributes:
        format: Name of the format.
        parts: The parts in order.
        text: Where the captions come from; None for no captions.
        label: Where the classes come from; None for no classes.
        class_names: Names of the classes by number; None where only numbers are known.
        keep: Names of further features.
    """

    format: str
    parts: Sequence[Part]
    text: str | None
    label: str | None
    class_names: tuple[str, ...] | None
    keep: tuple[str, ...]

    def described(self) -> dict[str, Any]:
        """What an import that continues must have in common with the one before, as JSON."""
        fields = {name: getattr(self, name) for name in ("format", "text", "label")}
        parts = [f"{part.split}: {part.name}" for part in self.parts]
        return {**fields, "keep": list(self.keep), "parts": parts}


def split_of(path: str) -> str:
    """The split of a file, by the first word of its name or by its folder."""
    folder, name = os.path.split(path)
    for word in (re.split(r"[-._ \d]", name)[0], os.path.basename(folder)):
        if word.lower() in SPLITS:
            return SPLITS[word.lower()]
    return "train"
