"""Folders of image files as a random-access source."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from conprediff_jax.common.errors import DataError, first_line, printable, shortened
from conprediff_jax.common.images import list_folders, list_images, warn_once
from conprediff_jax.data import captioned

PREFIX = "prefix"  # the label that is the beginning of a file's name
SPLITS = ("train", "test", "val", "valid", "validation", "dev")  # folders that are no classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderSource:
    """The image files of a folder and its subfolders.

    Attributes:
        root: The folder.
        files: Paths of the files relative to the folder, see `list_images`.
        labels: Number of every file's class, or None.
        class_names: Names of the classes by number, or None.
        columns: The further features of the images, or None.
    """

    root: str
    files: tuple[str, ...]
    labels: tuple[int, ...] | None
    class_names: tuple[str, ...] | None
    columns: captioned.Columns | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = os.path.join(self.root, self.files[index])
        record = {"image": b"", "name": path}
        try:
            with open(path, "rb", buffering=0) as file:  # pathlib takes as long as reading does
                record["image"] = file.read()
        except OSError as error:  # such as for a deleted file, or a link to nowhere
            record["unreadable"] = error.strerror or first_line(error)
        if self.labels is not None:
            record["label"] = self.labels[index]
        if self.columns is not None:
            features, notes = self.columns.of(self.files[index])
            record |= features | ({"notes": notes} if notes else {})
        return record


def open_folder(
    root: str, split: str, label: str | None, keep: Sequence[str], class_names: Sequence[str]
) -> FolderSource:
    """Opens a folder of image files, see `data.sources`.

    Args:
        root: The folder.
        split: Name of the split.
        label: 'label' to take the subfolders as classes, 'prefix' to take the beginnings of the
            files' names, or a column of the metadata; None for no labels.
        keep: Further features to deliver, see `captioned`.
        class_names: Names of the classes by number; empty to number them by name.

    Raises:
        DataError: There is no such split or feature, there is no image, or a class is not among
            `class_names`.
    """
    above, train = root, os.path.join(root, "train")
    if os.path.isdir(os.path.join(root, split)):
        _tell_other_folders(root, split)
        root = os.path.join(root, split)
    elif split != "train":
        raise DataError(f"{root}: no subfolder {split!r} (a folder without one is split 'train')")
    files = list_images(pathlib.Path(root))
    columns = captioned.find_columns(root, above, files, keep) if keep else None
    classes = _classes(root, above, files, label)
    source = FolderSource(
        root=root, files=tuple(files), labels=None, class_names=None, columns=columns
    )
    if classes is None:
        return source
    # All splits number their classes as the split `train` does, since another may lack some.
    numbered = train if split != "train" and os.path.isdir(train) else root
    names = tuple(class_names) or _names(
        numbered, above, label, classes if numbered == root else []
    )
    if new := set(classes).difference(names):
        whose = "class_names" if class_names else f"those of {numbered}"
        raise DataError(
            f"{root}: class {min(new)!r} is not among {whose}, which are {shortened(names)}"
        )
    index = {name: number for number, name in enumerate(names)}
    for name in sorted(set(names).difference(classes)):
        warn_once(f"{root}: class {name!r}, number {index[name]}, has no images")
    labels = tuple(index[name] for name in classes)
    return dataclasses.replace(source, labels=labels, class_names=names)


def _tell_other_folders(root: str, split: str) -> None:
    """Warns if a folder that is taken for a split may be a class, since it has other neighbours."""
    others = [name for name in list_folders(pathlib.Path(root)) if name not in SPLITS]
    others = [name for name in others if name != split and name != "annotations"]
    if others:
        warn_once(
            f"{root}: only its subfolder {split} is read, as the split of this name; left out are "
            f"{shortened(map(printable, others))}. If {split} is a class, move all of them into a "
            "folder train"
        )


def _classes(root: str, above: str, files: Sequence[str], label: str | None) -> list[str] | None:
    """The name of every file's class, or None if there are no classes."""
    if label is None or (label == "label" and not _all_in_folders(root, files)):
        return None
    if label == "label":
        return [file.split("/")[0] for file in files]
    if label == PREFIX:
        return [os.path.basename(file).partition("_")[0] for file in files]
    columns = captioned.find_columns(root, above, files, [label])
    classes = [columns.of(file)[0][label] for file in files]
    wrong = [
        file
        for file, name in zip(files, classes, strict=True)
        if not isinstance(name, str) or not name
    ]
    if wrong:
        raise DataError(
            f"{root}: {len(wrong)} images do not have one {label} each, such as "
            f"{printable(wrong[0])}"
        )
    return classes


def _names(root: str, above: str, label: str, classes: Sequence[str]) -> tuple[str, ...]:
    """The names of the classes in the order of their numbers.

    Args:
        root: The folder whose classes are numbered.
        above: The folder that the data are named by.
        label: See `open_folder`.
        classes: The classes of its files, if they are known.
    """
    if label == "label":
        return tuple(sorted(list_folders(pathlib.Path(root))))
    found = classes or _classes(root, above, list_images(pathlib.Path(root)), label)
    return tuple(sorted(set(found)))


def _all_in_folders(root: str, files: Sequence[str]) -> bool:
    """Whether every image lies in a subfolder; logs a warning if only some of them do."""
    stray = [file for file in files if "/" not in file]
    if stray and len(stray) < len(files):
        warn_once(
            f"{root}: no classes, since {stray[0]} and {len(stray) - 1} more of {len(files)} "
            "images lie in no subfolder"
        )
    return not stray
