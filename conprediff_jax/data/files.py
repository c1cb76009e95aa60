"""Folders of image files as a random-access source."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from conprediff_jax.common.errors import DataError, first_line, shortened
from conprediff_jax.common.images import list_folders, list_images, warn_once


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderSource:
    """The image files of a folder and its subfolders.

    Attributes:
        root: The folder.
        files: Paths of the files relative to the folder, see `list_images`.
        labels: Number of every file's class, or None.
        class_names: Names of the classes by number, or None.
    """

    root: str
    files: tuple[str, ...]
    labels: tuple[int, ...] | None
    class_names: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = os.path.join(self.root, self.files[index])
        record = {"image": b"", "name": path}
        try:
            record["image"] = pathlib.Path(path).read_bytes()
        except OSError as error:  # such as for a deleted file, or a link to nowhere
            record["unreadable"] = error.strerror or first_line(error)
        if self.labels is not None:
            record["label"] = self.labels[index]
        return record


def open_folder(
    root: str, split: str, label: str | None, keep: Sequence[str], class_names: Sequence[str]
) -> FolderSource:
    """Opens a folder of image files, see `data.sources`.

    Args:
        root: The folder.
        split: Name of the split.
        label: 'label' to take the subfolders as classes, None for no labels.
        keep: Further features to deliver. A folder has none, so any name is an error.
        class_names: Names of the classes by number; empty to number the subfolders by name.

    Raises:
        DataError: There is no such split or feature, there is no image, or a class is not among
            `class_names`.
    """
    train = os.path.join(root, "train")
    if os.path.isdir(os.path.join(root, split)):
        root = os.path.join(root, split)
    elif split != "train":
        raise DataError(f"{root}: no subfolder {split!r} (a folder without one is split 'train')")
    if keep or label not in (None, "label"):
        wanted = [*keep, *([label] if label not in (None, "label") else [])]
        raise DataError(f"{root}: a folder of images has no {', '.join(wanted)}; only image, label")
    files = list_images(pathlib.Path(root))
    if label is None or not _all_in_folders(root, files):
        return FolderSource(root=root, files=tuple(files), labels=None, class_names=None)
    # All splits number their classes as the split `train` does, since another may lack some.
    numbered = train if split != "train" and os.path.isdir(train) else root
    names = tuple(class_names) or tuple(sorted(list_folders(pathlib.Path(numbered))))
    classes = [file.split("/")[0] for file in files]
    if new := set(classes).difference(names):
        whose = "class_names" if class_names else f"those of {numbered}"
        raise DataError(
            f"{root}: class {min(new)!r} is not among {whose}, which are {shortened(names)}"
        )
    index = {name: number for number, name in enumerate(names)}
    for name in sorted(set(names).difference(classes)):
        warn_once(f"{root}: class {name!r}, number {index[name]}, has no images")
    return FolderSource(
        root=root,
        files=tuple(files),
        labels=tuple(index[name] for name in classes),
        class_names=names,
    )


def _all_in_folders(root: str, files: Sequence[str]) -> bool:
    """Whether every image lies in a subfolder; logs a warning if only some of them do."""
    stray = [file for file in files if "/" not in file]
    if stray and len(stray) < len(files):
        warn_once(
            f"{root}: no classes, since {stray[0]} and {len(stray) - 1} more of {len(files)} "
            "images lie in no subfolder"
        )
    return not stray
