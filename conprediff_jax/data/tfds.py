"""TFDS data sets: their builders found, prepared, and read as random-access sources."""

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import os
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from conprediff_jax.common.errors import DataError, first_line

OPENMOJI = "openmoji"
_OPENMOJI_BUILDER = "conprediff_jax.data.openmoji.openmoji_dataset_builder"


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


def open_split(
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


def builder_from_directory(path: str, title: str) -> Any:
    """The builder of a data set that lies in a folder.

    Args:
        path: The folder that holds its `dataset_info.json`.
        title: What a message calls the data set.

    Raises:
        DataError: It is not readable.
    """
    import tensorflow_datasets as tfds

    try:
        with _quiet():
            return tfds.builder_from_directory(path)
    except Exception as error:  # TFDS raises what its file systems and parsers raise
        raise DataError(f"{title}: not a readable TFDS data set: {first_line(error)}") from error


def make_builder(name: str, data_dir: str | None = None) -> Any:
    """The TFDS builder of a name, to be written or read as array_record.

    Raises:
        DataError: TFDS does not know the name.
    """
    import tensorflow_datasets as tfds

    if name.split("/")[0] == OPENMOJI:
        importlib.import_module(_OPENMOJI_BUILDER)  # which registers the builder
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


def prepared_builder(name: str, data_dir: str | None, download: bool) -> Any:
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
    command = f"python -m conprediff_jax.prepare --name={name} --data_dir={root}"
    instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if not instructions:
        return f"run {command}"
    what = textwrap.shorten(instructions, 300)
    manual = os.path.join(root, "downloads", "manual")
    return f"put its files into {manual} ({what}), then run {command}"
