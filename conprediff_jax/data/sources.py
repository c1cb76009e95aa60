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

import contextlib
import dataclasses
import difflib
import importlib.util
import os
import pathlib
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from absl import logging

from conprediff_jax.errors import DataError
from conprediff_jax.images import list_folders, list_images, warn_once

OPENMOJI = "openmoji"
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderSource:
    """Image files below one folder.

    Attributes:
        root: The folder.
        files: Paths relative to it, see `list_images`.
        labels: The class of every file, or None.
        class_names: Names of the classes, by number, or None.
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
        except OSError as error:  # such as one that was deleted, or is a link to nowhere
            record["unreadable"] = error.strerror or first_line(error)
        if self.labels is not None:
            record["label"] = self.labels[index]
        return record


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsSource:
    """One split of a prepared TFDS data set.

    Attributes:
        records: The TFDS data source, its images left undecoded.
        title: What to call the data set in messages.
        label: The feature that becomes `label`, or None.
        class_names: Names of the classes, or None.
        keep: Names under which features are passed on -> their names in the data set.
    """

    records: Any
    title: str
    label: str | None
    class_names: tuple[str, ...] | None
    keep: dict[str, str]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = f"{self.title}[{index}]"
        try:
            features = self.records[index]
        except Exception as error:  # whatever TFDS and array_record raise about a damaged file
            raise DataError(f"{name} is damaged: {first_line(error)}") from error
        record = {"image": features["image"], "name": name}
        if self.label is not None:
            record["label"] = int(features[self.label])
        for name, feature in self.keep.items():
            record[name] = _plain(features[feature])
        return record


def _plain(value: Any) -> Any:
    """Text as str, a sequence of texts as a list of str, anything else unchanged."""
    if isinstance(value, dict) and "text" in value:  # COCO: one dict of parallel sequences
        value = value["text"]
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype.kind == "O"):
        return [item.decode() if isinstance(item, bytes) else item for item in value]
    return value


def default_data_dir() -> str:
    """`TFDS_DATA_DIR`, or `~/tensorflow_datasets`, as TFDS has it."""
    return os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets")


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
        builder = _prepared_builder(name, data_dir, download)
        return _tfds_source(builder, name, split, label, keep)
    path = os.path.expanduser(name)
    if "://" in path or os.path.exists(os.path.join(path, "dataset_info.json")):
        import tensorflow_datasets as tfds

        try:
            with _quiet():
                builder = tfds.builder_from_directory(path)
        except Exception as error:  # TFDS raises what its file systems and parsers raise
            raise DataError(f"{name}: not a readable TFDS data set: {first_line(error)}") from error
        return _tfds_source(builder, name, split, label, keep)
    if not os.path.isdir(path):
        raise DataError(f"{name}: there is no such folder")
    return _folder_source(path, split, label, keep, class_names)


def _folder_source(
    root: str, split: str, label: str | None, keep: Sequence[str], class_names: Sequence[str]
) -> FolderSource:
    """Lists the image files of a folder, see the module docstring."""
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
    # Numbered as for training: another split may lack some.
    numbered = train if split != "train" and os.path.isdir(train) else root
    names = tuple(class_names) or tuple(sorted(list_folders(pathlib.Path(numbered))))
    classes = [file.split("/")[0] for file in files]
    if new := set(classes).difference(names):
        whose = "class_names" if class_names else f"those of {numbered}"
        raise DataError(
            f"{root}: class {min(new)!r} is not among {whose}, which are {_shortened(names)}"
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
    """Whether every image lies in a subfolder; says so where only some of them do."""
    stray = [file for file in files if "/" not in file]
    if stray and len(stray) < len(files):
        warn_once(
            f"{root}: no classes, since {stray[0]} and {len(stray) - 1} more of {len(files)} "
            "images lie in no subfolder"
        )
    return not stray


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
            f"{title}: the classes are {_shortened(names)}; by class_names they are "
            f"{_shortened(expected)}"
        )


def _shortened(names: Sequence[str]) -> str:
    return textwrap.shorten(", ".join(names), 200, placeholder=" ...")


def _tfds_source(
    builder: Any, title: str, split: str, label: str | None, keep: Sequence[str]
) -> TfdsSource:
    """One split of a prepared builder, its images undecoded."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    names = {name: name for name in keep}
    if "caption" in names and "caption" not in features and "captions" in features:
        names["caption"] = "captions"
    if label == "label" and label not in features:
        label = None
    needed = ["image", *names.values(), *([label] if label else [])]
    missing = [name for name in needed if name not in features]
    if missing:
        have = ", ".join(sorted(features))
        raise DataError(f"{title}: has no feature {', '.join(missing)}; it has {have}")
    try:
        records = builder.as_data_source(
            split=split, decoders={"image": tfds.decode.SkipDecoding()}
        )
        count = len(records)
    except NotImplementedError as error:
        dataset = builder.info.full_name.rpartition("/")[0]  # without the version
        raise DataError(
            f"{title}: {builder.data_dir} is not written as array_record, so it has no random "
            f"access; move it away and run python -m conprediff_jax.data.prepare --name={dataset}"
        ) from error
    except (ValueError, KeyError) as error:
        raise DataError(f"{title}: {first_line(error)}") from error
    if not count:
        raise DataError(f"{title}: split {split!r} is empty")
    class_names = None
    if label is not None:
        number = getattr(features[label], "num_classes", None)
        if number is None:
            raise DataError(f"{title}: feature {label!r} holds no class labels")
        class_names = tuple(features[label].names)
    return TfdsSource(
        records=records, title=title, label=label, class_names=class_names, keep=names
    )


def first_line(error: Exception) -> str:
    """The first line of an error's message that says anything, or the name of its type."""
    lines = [line.strip(" \"'") for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS reports every folder it looks into, and warns of each that is not there yet."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def is_prepared(builder: Any) -> bool:
    """Whether the files of a TFDS builder are in place."""
    with _quiet():
        return builder.is_prepared()


def make_builder(name: str, data_dir: str | None = None) -> Any:
    """The TFDS builder of a name, to be written or read as array_record.

    Raises:
        DataError: TFDS does not know the name.
    """
    import tensorflow_datasets as tfds

    if name.split("/")[0] == OPENMOJI:
        # Importing the module registers the builder.
        from conprediff_jax.data.openmoji import openmoji_dataset_builder  # noqa: F401
    root = data_dir or default_data_dir()
    try:
        with _quiet():
            builder = tfds.builder(name, data_dir=root)
            if is_prepared(builder):  # in whatever format
                return builder
            return tfds.builder(name, data_dir=root, file_format="array_record")
    except Exception as error:  # unknown names, configs and versions each have their own
        raise DataError(
            f"{name}: {_nearest(name) or first_line(error)} (a folder is written with a leading ./ "
            "or /)"
        ) from error


def _nearest(name: str) -> str:
    """The names of TFDS that are nearest to one that it does not know; '' if it knows it."""
    import tensorflow_datasets as tfds

    builder, _, config = name.partition(":")[0].partition("/")
    known, wanted, prefix = tfds.list_builders(), builder, ""
    if builder in known:
        known, wanted = tfds.builder_cls(builder).builder_configs, config
        prefix = f"{builder}/"
    if wanted in ("", *known):
        return ""
    near = difflib.get_close_matches(wanted, known, 3, 0.4)
    hint = f": did you mean {' or '.join(prefix + found for found in near)}?" if near else ""
    return f"TFDS has no such data set{hint}"


def prepare(name: str, data_dir: str | None = None, manual_dir: str | None = None) -> Any:
    """Downloads and writes a TFDS data set as array_record, unless that is done already.

    Args:
        name: TFDS name.
        data_dir: Where to; `default_data_dir()` when None.
        manual_dir: Where files lie that TFDS cannot download; `<data_dir>/downloads/manual` when
            None.

    Returns:
        The prepared builder.

    Raises:
        DataError: Unknown name, no network, or manual files are missing.
    """
    import tensorflow_datasets as tfds

    builder = make_builder(name, data_dir)
    if is_prepared(builder):
        return builder
    if builder.name != OPENMOJI and importlib.util.find_spec("tensorflow"):
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # the accelerators are JAX's
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
        )
    except Exception as error:  # whatever a download or somebody else's builder raises
        again = make_builder(name, data_dir)
        if is_prepared(again):  # another process of this machine was faster
            return again
        if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and manual_dir is None:
            raise DataError(f"{name}: {_how_to_get(builder, name, data_dir)}") from error
        raise DataError(f"{name}: could not be prepared: {first_line(error)}") from error
    return make_builder(name, data_dir)


def _prepared_builder(name: str, data_dir: str | None, download: bool) -> Any:
    """A builder with its files in place."""
    import tensorflow_datasets as tfds

    builder = make_builder(name, data_dir)
    if is_prepared(builder):
        return builder
    if builder.name != OPENMOJI and not download:
        raise DataError(
            f"{name}: not in {builder.data_dir}; {_how_to_get(builder, name, data_dir)}"
        )
    logging.info("%s: preparing it in %s", name, builder.data_dir)
    tfds.disable_progress_bar()
    return prepare(name, data_dir)


def _how_to_get(builder: Any, name: str, data_dir: str | None) -> str:
    """What to do about a missing data set, in one phrase."""
    root = data_dir or default_data_dir()
    command = f"python -m conprediff_jax.data.prepare --name={name} --data_dir={root}"
    instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if not instructions:
        return f"run {command}"
    what = textwrap.shorten(instructions, 300)
    manual = os.path.join(root, "downloads", "manual")
    return f"put its files into {manual} ({what}), then run {command}"
