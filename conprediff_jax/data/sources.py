"""Random-access sources of undecoded records.

A source is named by

* a TFDS name, such as `openmoji/people`, `cifar10` or `celeb_a_hq/256`, looked up in `data_dir`;
* the path of a TFDS data set, which is the folder with its `dataset_info.json`, or its address in a
  bucket (`gs://`, `s3://`), from which it is copied, see `remote`;
* the path of a folder of image files, see `images.list_images`. A subfolder with the name of the
  split (`train/`, `test/`) holds that split. Without one, the folder is the split `train`. If every
  image lies in a subfolder, the subfolders of the first level are the classes. With the label
  `prefix`, classes are what stands before the first `_` of the files' names (ADM's layout). They
  are numbered in the order of their names (`10` before `2`), or as `class_names` says. Captions and
  further columns lie beside the images, see `captioned`.

A path starts with `/`, `./`, `../` or `~`, has a scheme (`gs://`), or leads from the current folder
to one with images or a `dataset_info.json`; everything else is a TFDS name. `openmoji` needs no
network and is prepared if it is missing. Sources do not decode images: the workers of the pipeline
do.

A record is a dict: `image` (bytes of an image file), `name` (str, for messages), `label` (int)
where there is one, and the features in `keep`. If a file cannot be read, `image` is empty and
`unreadable` (str) says why. `notes` (list of str) says what else is odd about a record.

Nothing here imports TensorFlow. TFDS is imported when a source is opened; some of its builders
import TensorFlow while they prepare their data.
"""

import os
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from conprediff_jax.common import buckets
from conprediff_jax.common.errors import DataError, shortened
from conprediff_jax.common.files import is_address
from conprediff_jax.common.images import holds_images
from conprediff_jax.data import remote
from conprediff_jax.data.files import open_folder
from conprediff_jax.data.tfds import builder_from_directory, open_split, prepared_builder

OF_THE_FILE = ("image", "name", "unreadable", "notes")  # keys of a record that examples do not have
_PATH_STARTS = ("/", "./", "../", "~")


@runtime_checkable
class Source(Protocol):
    """Random access to undecoded records.

    Attributes:
        class_names: Names of the classes by number; None if records have no label.
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
    cache_dir: str = remote.CACHE,
) -> Source:
    """Opens a source by its name.

    Args:
        name: TFDS name or path, see the module docstring.
        split: Name of the split. For TFDS data sets also a part of a split in the notation
            of TFDS, such as `train[:10%]`.
        data_dir: Folder of the TFDS data sets; None for `default_data_dir()`.
        download: Whether a missing TFDS data set may be downloaded and prepared.
        label: Name of the integer feature that is delivered as `label`; None for no labels. Data
            without a feature of the default name are read without labels; any other name must
            exist.
        keep: Names of further features to deliver, such as `caption`. If a data set has several
            captions for an image (feature `captions`), `caption` is a list of them.
        class_names: For folders of files: names of the classes by number; () to number them by
            name.
        cache_dir: Folder for copies of data in buckets.

    Returns:
        The source, with at least one record.

    Raises:
        DataError: The data are missing, lack the split or a feature, or have a class that is not
            among `class_names`.
        BucketError: The data are in a bucket that cannot be read.
    """
    path, builder = os.path.expanduser(name), None
    if not _is_path(name):
        builder = prepared_builder(name, data_dir, download)
        path = os.fspath(builder.data_dir)
    elif os.path.exists(os.path.join(path, "dataset_info.json")):
        builder = builder_from_directory(path, name)
    if buckets.is_bucket(path):
        builder = remote.copied_builder(path, name, split, cache_dir)
    if builder is not None:
        return open_split(builder, name, split, label, keep)
    if is_address(path):
        raise DataError(f"{name}: data are read from this machine, gs:// and s3:// alone")
    if not os.path.isdir(path):
        raise DataError(f"{name}: there is no such folder")
    return open_folder(path, split, label, keep, class_names)


def _is_path(name: str) -> bool:
    """Whether a name is a path, and not a TFDS name; a folder of TFDS data holds no image files."""
    if name.startswith(_PATH_STARTS) or is_address(name):
        return True
    return os.path.exists(os.path.join(name, "dataset_info.json")) or holds_images(name)


def check_class_names(title: str, names: Sequence[str] | None, expected: Sequence[str]) -> None:
    """Checks that the classes of data have the numbers that a run has stored.

    Args:
        title: Name of the data in the message.
        names: Names of the data's classes by number; None if the data have no classes.
        expected: Names of the run's classes by number; () to accept any.

    Raises:
        DataError: The classes or their numbers differ.
    """
    if expected and names is not None and tuple(names) != tuple(expected):
        raise DataError(
            f"{title}: the classes are {shortened(names)}; by class_names they are "
            f"{shortened(expected)}"
        )
