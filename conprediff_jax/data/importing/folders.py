"""Folders of image files as parts of an import, see `data.files` and `data.captioned`."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from conprediff_jax.common.images import list_folders
from conprediff_jax.data import captioned, files
from conprediff_jax.data.importing.parts import SPLITS, Part, Plan, Wanted

_PART = 1_000  # images that are done or not done together


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Images:
    """Some of the images of a folder.

    Attributes:
        source: The folder.
        indices: The images.
        text: The feature that holds the captions, or None.
    """

    source: files.FolderSource
    indices: range
    text: str | None

    def __call__(self) -> Iterator[dict[str, Any]]:
        for index in self.indices:
            record = self.source[index]
            if self.text is not None:
                text = record.pop(self.text)
                record["text"] = text if isinstance(text, list) else [text] if text else []
            for name, value in record.items():
                if isinstance(value, list) and name not in ("text", "notes"):
                    record[name] = "\n".join(value)
            yield record


def plan(path: str, wanted: Wanted) -> Plan:
    """Plans the import of a folder; `train/`, `test/` and validation's subfolders are splits.

    Args:
        path: The folder.
        wanted: The features; captions and classes that are to be found are those that there are.

    Raises:
        DataError: There are no images, or a feature is missing.
    """
    names = [name for name in list_folders(pathlib.Path(path)) if name in SPLITS]
    names = sorted(names, key=lambda name: name != "train") if "train" in names else ["train"]
    text = wanted.text
    if text == "":
        text = captioned.TEXT if captioned.has_captions(_inside(path, names[0]), path) else None
    label = "label" if wanted.label == "" else wanted.label
    keep = (*wanted.keep, *([] if text is None or text in wanted.keep else [text]))
    parts, class_names = [], None
    for name in names:
        source = files.open_folder(path, name, label, keep, class_names or ())
        if class_names is None:
            class_names = source.class_names
        for start in range(0, len(source), _PART):
            indices = range(start, min(start + _PART, len(source)))
            what = f"{source.files[start]} to {source.files[indices[-1]]}"
            read = _Images(source=source, indices=indices, text=text)
            parts.append(Part(split=SPLITS[name], name=what, read=read))
    return Plan(
        format="folder",
        parts=parts,
        text=text,
        label=label if class_names else None,
        class_names=class_names,
        keep=wanted.keep,
    )


def _inside(path: str, split: str) -> str:
    inside = os.path.join(path, split)
    return inside if os.path.isdir(inside) else path
