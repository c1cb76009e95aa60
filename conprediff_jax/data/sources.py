"""Where images come from: random-access sources of undecoded records.

A source is named by

* a TFDS name, `openmoji/people`, `cifar10` or `celeb_a_hq/256`, looked up in `data_dir`;
* a path to a TFDS data set, the folder that holds its `dataset_info.json`;
* a path to a folder of image files, read as `images.list_images` says. A subfolder named like the
  split (`train/`, `test/`) holds that split; without one the folder is the split `train`. When
  every image lies in a subfolder, the first-level subfolders are the classes, numbered in the order
  of their names (`10` before `2`), or as a run has numbered them.

A path starts with `/`, `./`, `../` or `~`, or has a scheme (`gs://`); everything else is a TFDS
name. `openmoji` needs no network and is prepared when missing. Images stay compressed here: they
are decoded by the workers of the pipeline.

A record is a dict: `image` (bytes of an image file), `name` (str, what to call it in a message),
`label` (int) where there is one, and the features asked for by `keep`. The `image` of a file that
cannot be read is empty, and there is `unreadable` (str), which says why.

Nothing here imports TensorFlow. TFDS is imported when a source is opened; only its builders for
other people's data may import TensorFlow, while they prepare.
"""

import os
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from conprediff_jax.common.errors import DataError, shortened
from conprediff_jax.data.files import open_folder
from conprediff_jax.data.tfds import builder_from_directory, open_split, prepared_builder

OF_THE_FILE = ("image", "name", "unreadable")  # what examples do not take over from a record
_PATH_STARTS = ("/", "./", "../", "~")


@runtime_checkable
class Source(Protocol):
    """Random access to undecoded records.

    Attributes:
        class_names: Names of the classes, or None when records carry no label.
    """

    class_names: tuple[str, ...] | None

    def __len__(self) -> int:
        """Number of records."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The record at `index`, see the module docstring."""
        ...


def open_source(
    name: str,
    *,
    split: str = "train",
    data_dir: str | None = None,
    download: bool = False,
    label: str | None = "label",
    keep: Sequence[str] = (),
    class_names: Sequence[str] = (),
) -> Source:
    """Opens a source by its name.

    Args:
        name: TFDS name or path, see the module docstring.
        split: Split, or a part of one in TFDS's notation (`train[:10%]`; not for folders of files).
        data_dir: Where TFDS data sets live; `default_data_dir()` when None.
        download: Whether a missing TFDS data set may be downloaded and prepared.
        label: The integer feature delivered as `label`. The default is taken where there is one;
            any other name must exist. None for no labels.
        keep: Further features to deliver, such as `caption`. Where a data set has several captions
            an image (feature `captions`), `caption` is all of them.
        class_names: Of a folder: names of the classes by number, where a run has numbered them.

    Returns:
        The source, with at least one record.

    Raises:
        DataError: The data are missing, or lack a split or feature; or have a class that
            `class_names` lack.
    """
    if not name.startswith(_PATH_STARTS) and "://" not in name:
        builder = prepared_builder(name, data_dir, download)
        return open_split(builder, name, split, label, keep)
    path = os.path.expanduser(name)
    if "://" in path or os.path.exists(os.path.join(path, "dataset_info.json")):
        return open_split(builder_from_directory(path, name), name, split, label, keep)
    if not os.path.isdir(path):
        raise DataError(f"{name}: there is no such folder")
    return open_folder(path, split, label, keep, class_names)


def check_class_names(title: str, names: Sequence[str] | None, expected: Sequence[str]) -> None:
    """Checks that classes have the numbers that a run has given them.

    Args:
        title: What to call the data.
        names: Names of their classes, by number; None where they have none.
        expected: Those of the run; () for any.

    Raises:
        DataError: They have others.
    """
    if expected and names is not None and tuple(names) != tuple(expected):
        raise DataError(
            f"{title}: the classes are {shortened(names)}; by class_names they are "
            f"{shortened(expected)}"
        )
