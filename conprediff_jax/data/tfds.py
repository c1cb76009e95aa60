"""Finds and prepares TFDS data sets, and reads them as random-access sources."""

import contextlib
import dataclasses
import difflib
import importlib
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from conprediff_jax.common import extras
from conprediff_jax.common.errors import DataError, first_line
from conprediff_jax.data import made

OPENMOJI = "openmoji"
_OPENMOJI_BUILDER = "conprediff_jax.data.openmoji.openmoji_dataset_builder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsSource:
    """One split of a prepared TFDS data set.

    Attributes:
        records: The TFDS data source, with undecoded images.
        title: Name of the data set in messages.
        label: Name of the feature that is delivered as `label`, or None.
        class_names: Names of the classes by number, or None.
        keep: Maps the names under which features are delivered to their names in the data set.
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
    """Turns bytes into str and a sequence of texts into a list of str; leaves other values."""
    if isinstance(value, dict) and "text" in value:  # COCO: one dict of parallel sequences
        value = value["text"]
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype.kind == "O"):
        return [item.decode() if isinstance(item, bytes) else item for item in value]
    return value


def default_data_dir() -> str:
    """The default folder of TFDS: `TFDS_DATA_DIR`, or else `~/tensorflow_datasets`."""
    return os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets")


def open_split(
    builder: Any, title: str, split: str, label: str | None, keep: Sequence[str]
) -> TfdsSource:
    """Opens one split of a prepared data set; the arguments are those of `sources.open_source`.

    Args:
        builder: The builder of the data set.
        title: Name of the data set in messages.
        split: Name of the split, or a part of one in the notation of TFDS.
        label: Name of the feature that is delivered as `label`, or None.
        keep: Names of further features to deliver.

    Raises:
        DataError: There is no such split or feature, the split is empty, the label is no class
            label, or the files have no random access.
    """
    tfds = extras.tensorflow_datasets()

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
            f"access; move it away and run python -m conprediff_jax.prepare --name={dataset}"
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the messages of TFDS, which names every folder that it looks into."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def is_prepared(builder: Any) -> bool:
    """Whether the files of a TFDS builder exist."""
    with _quiet():
        return builder.is_prepared()


def builder_from_directory(path: str, title: str) -> Any:
    """The builder of a data set in a given folder.

    Args:
        path: The folder that holds `dataset_info.json`.
        title: Name of the data set in messages.

    Raises:
        DataError: The data set is not readable.
    """
    tfds = extras.tensorflow_datasets()

    try:
        with _quiet():
            return tfds.builder_from_directory(path)
    except Exception as error:  # TFDS raises what its file systems and parsers raise
        raise DataError(f"{title}: not a readable TFDS data set: {first_line(error)}") from error


def make_builder(name: str, data_dir: str | None = None) -> Any:
    """The TFDS builder of a data set; if it is not prepared yet, it will write array_record.

    Data that `made` computes have no builder before they are there.

    Args:
        name: TFDS name.
        data_dir: Folder of the TFDS data sets; None for `default_data_dir()`.

    Raises:
        DataError: TFDS does not know the name, or the data must be computed first.
    """
    tfds = extras.tensorflow_datasets()

    root = data_dir or default_data_dir()
    if made.is_made(name):
        made.law_of(name)
        folder = made.folder_of(name, root)
        if not made.is_complete(folder):
            raise DataError(f"{name} is not in {folder}; run {_command(name, root)}")
        return builder_from_directory(str(folder), name)
    if name.split("/")[0] == OPENMOJI:
        importlib.import_module(_OPENMOJI_BUILDER)  # which registers the builder
    try:
        with _quiet():
            builder = tfds.builder(name, data_dir=root)
            if is_prepared(builder):  # in any format
                return builder
            return tfds.builder(name, data_dir=root, file_format="array_record")
    except Exception as error:  # unknown names, configs and versions raise different types
        raise DataError(
            f"{name}: {_nearest(name) or first_line(error)} (a folder is written with a leading ./ "
            "or /)"
        ) from error


def _nearest(name: str) -> str:
    """A phrase with the names that are nearest to one that TFDS does not know; '' if it does."""
    tfds = extras.tensorflow_datasets()

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
    """Downloads a TFDS data set and writes it as array_record, unless that is done already.

    Args:
        name: TFDS name.
        data_dir: Folder to write to; None for `default_data_dir()`.
        manual_dir: Folder of files that TFDS cannot download; None for
            `<data_dir>/downloads/manual`.

    Returns:
        The prepared builder.

    Raises:
        DataError: The name is unknown, the download fails, or manual files are missing.
    """
    tfds = extras.tensorflow_datasets()

    builder = make_builder(name, data_dir)
    if is_prepared(builder):
        return builder
    if not sys.stderr.isatty():  # its bars are drawn over and over, which fills a file
        tfds.disable_progress_bar()
    if builder.name != OPENMOJI:
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # leaves the accelerators to JAX
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
        )
    except Exception as error:  # whatever a download or a builder of TFDS raises
        current = make_builder(name, data_dir)
        if is_prepared(current):  # by another process on this machine, at the same time
            return current
        if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and manual_dir is None:
            raise DataError(f"{name}: {_how_to_get(builder, name, data_dir)}") from error
        raise DataError(f"{name}: could not be prepared: {first_line(error)}") from error
    return make_builder(name, data_dir)


def prepared_builder(name: str, data_dir: str | None, download: bool) -> Any:
    """The builder of a data set that is prepared, or can be prepared now.

    Args:
        name: TFDS name.
        data_dir: Folder of the TFDS data sets; None for `default_data_dir()`.
        download: Whether a missing data set may be downloaded. OpenMoji needs no download.

    Raises:
        DataError: The data set is missing and may not be downloaded, or cannot be prepared.
    """
    tfds = extras.tensorflow_datasets()

    builder = make_builder(name, data_dir)
    if is_prepared(builder):
        return builder
    if builder.name != OPENMOJI and not download:
        raise DataError(
            f"{name} is not in {builder.data_dir}; {_how_to_get(builder, name, data_dir)}"
        )
    logging.info("preparing %s in %s", name, builder.data_dir)
    tfds.disable_progress_bar()
    return prepare(name, data_dir)


def _how_to_get(builder: Any, name: str, data_dir: str | None) -> str:
    """How to get a missing data set, in one phrase."""
    root = data_dir or default_data_dir()
    command = _command(name, root)
    instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if not instructions:
        return f"run {command}"
    what = textwrap.shorten(instructions, 300)
    manual = os.path.join(root, "downloads", "manual")
    return f"put its files into {manual} ({what}), then run {command}"


def _command(name: str, root: str) -> str:
    """The command that prepares a data set."""
    return f"python -m conprediff_jax.prepare --name={name} --data_dir={root}"
