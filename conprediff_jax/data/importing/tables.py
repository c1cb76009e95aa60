"""Tables as parts of an import: Parquet files, and what Hugging Face's `save_to_disk` writes.

Images are a column of bytes, or of a struct with `bytes` and `path`, as Hugging Face's library
`datasets` writes them. The schema's metadata under the key `huggingface` say which column that is,
and name the classes. Without them, it is the only column of such a type, or the one named `image`.
Where only paths are stored, the files are read, if they are there.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

from conprediff_jax.common import buckets
from conprediff_jax.common.errors import DataError, first_line, printable
from conprediff_jax.data.captioned import as_texts
from conprediff_jax.data.importing.parts import SPLITS, TEXTS, Part, Plan, Wanted, split_of

_PART = 1_000  # rows, at least, that are done or not done together
_IMAGES = ("image", "img", "images", "jpg", "png")
_ROWS = 64  # read at a time


def arrow_files(path: str) -> list[str]:
    """The Arrow files of a folder that `save_to_disk` has written, in their order.

    Raises:
        DataError: The folder lacks a file.
    """
    try:
        if os.path.isfile(splits := os.path.join(path, "dataset_dict.json")):
            with open(splits, encoding="utf-8") as file:
                names = json.load(file)["splits"]
            return [file for name in names for file in arrow_files(os.path.join(path, name))]
        with open(os.path.join(path, "state.json"), encoding="utf-8") as file:
            names = [entry["filename"] for entry in json.load(file)["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not what save_to_disk writes: {first_line(error)}") from error
    return [os.path.join(path, name) for name in names]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Columns:
    """The columns that are read.

    Attributes:
        image: Of the images.
        text: Of the captions, or None.
        label: Of the classes, or None.
        keep: Further ones.
        class_names: Names of the classes by number; None where the column holds numbers alone.
        numbers: Whether the column of the classes holds numbers, and not names.
    """

    image: str
    text: str | None
    label: str | None
    keep: tuple[str, ...]
    class_names: tuple[str, ...] | None
    numbers: bool

    def names(self) -> list[str]:
        """All of them."""
        features = [name for name in (self.text, self.label) if name is not None]
        return list(dict.fromkeys([self.image, *features, *self.keep]))


def plan(kind: str, paths: list[str], wanted: Wanted) -> Plan:
    """Plans the import of tables.

    Args:
        kind: `parquet` or `arrow`.
        paths: The files, which must have the columns of the first one.
        wanted: The features.

    Raises:
        DataError: A file cannot be read, or lacks a column.
    """
    columns = _columns(paths, wanted)
    parts = []
    for path in paths:
        split = split_of(path)
        if kind == "arrow":  # a folder for each split, by any name
            folder = os.path.basename(os.path.dirname(path))
            split = SPLITS.get(folder, folder if len({map(os.path.dirname, paths)}) > 1 else split)
        missing = set(columns.names()).difference(_schema(path).names)
        if missing:
            raise DataError(f"{path}: lacks the column {min(missing)}, which {paths[0]} has")
        for groups in _groups(path):
            name = path if groups is None else f"{path}, row groups {groups[0]} to {groups[-1]}"
            parts.append(Part(split=split, name=name, read=_Rows(path, groups, columns)))
    return Plan(
        format=kind,
        parts=parts,
        text=columns.text,
        label=columns.label,
        class_names=columns.class_names,
        keep=columns.keep,
    )


def _is_parquet(path: str) -> bool:
    return path.endswith(".parquet")


def _file(path: str) -> Any:
    """What pyarrow reads: the path, or an open file of a bucket."""
    return buckets.opened(path) if buckets.is_bucket(path) else path


def _schema(path: str) -> Any:
    """The schema of a file, a `pyarrow.Schema`."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        if _is_parquet(path):
            return pa.parquet.read_schema(_file(path))
        with pa.memory_map(path) as file, pa.ipc.open_stream(file) as stream:
            return stream.schema
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}") from error


def _groups(path: str) -> list[list[int] | None]:
    """The row groups of a Parquet file, several small ones together; [None] for an Arrow file."""
    if not _is_parquet(path):
        return [None]
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(_file(path))
    parts, rows = [[]], 0
    for group in range(metadata.num_row_groups):
        if rows >= _PART:
            parts, rows = [*parts, []], 0
        parts[-1].append(group)
        rows += metadata.row_group(group).num_rows
    return [part for part in parts if part]


def _columns(paths: list[str], wanted: Wanted) -> _Columns:
    """Which columns are read, by the first file."""
    import pyarrow as pa

    schema = _schema(paths[0])
    types = dict(zip(schema.names, schema.types, strict=True))
    told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = told.get("info", {}).get("features", {})
    kinds = {name: feature.get("_type") for name, feature in features.items() if "_type" in feature}
    image = _image_column(paths[0], types, [n for n, kind in kinds.items() if kind == "Image"])
    text, label = wanted.text, wanted.label
    if text == "":
        text = next((name for name in TEXTS if name in types), None)
    if label == "":
        classes = [name for name, kind in kinds.items() if kind == "ClassLabel"]
        label = (classes or [name for name in ("label", "class") if name in types] or [None])[0]
    for name in (text, label, *wanted.keep):
        if name is not None and name not in types:
            raise DataError(f"{paths[0]}: has no column {name}, but {', '.join(types)}")
    names, numbers = None, label is not None and pa.types.is_integer(types[label])
    if numbers:
        names = tuple(features.get(label, {}).get("names", ())) or None
    elif label is not None:
        names = tuple(sorted({name for path in paths for name in _values(path, label)}))
    return _Columns(
        image=image, text=text, label=label, keep=wanted.keep, class_names=names, numbers=numbers
    )


def _image_column(path: str, types: dict[str, Any], told: list[str]) -> str:
    import pyarrow as pa

    def fits(kind: pa.DataType) -> bool:
        structured = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        return structured or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = told or [name for name, kind in types.items() if fits(kind)]
    named = [name for name in _IMAGES if name in found]
    if not named and len(found) != 1:
        which = (
            f"several columns of bytes, {', '.join(found)}"
            if found
            else (f"no column of images among {', '.join(types)}")
        )
        raise DataError(f"{path}: has {which}; call the column of the images image")
    return (named or found)[0]


def _batches(path: str, groups: list[int] | None, columns: list[str]) -> Iterator[Any]:
    """The rows of a file, a few at a time, as `pyarrow.RecordBatch`es."""
    import pyarrow as pa
    import pyarrow.parquet

    if _is_parquet(path):
        file = pa.parquet.ParquetFile(_file(path))
        yield from file.iter_batches(_ROWS, row_groups=groups, columns=columns)
        return
    with pa.memory_map(path) as file, pa.ipc.open_stream(file) as stream:
        for batch in stream:
            for start in range(0, batch.num_rows, _ROWS):
                yield batch.slice(start, _ROWS).select(columns)


def _values(path: str, column: str) -> set[str]:
    """The different texts of a column."""
    found = set()
    for batch in _batches(path, None, [column]):
        found.update(*(as_texts(value) for value in batch.column(0).to_pylist()))
    return found


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The records of a file, or of some row groups of one."""

    path: str
    groups: list[int] | None
    columns: _Columns

    def __call__(self) -> Iterator[dict[str, Any]]:
        import pyarrow as pa

        number = 0
        try:
            for batch in _batches(self.path, self.groups, self.columns.names()):
                for row in batch.to_pylist():
                    yield self._record(row, number)
                    number += 1
        except (pa.ArrowException, OSError) as error:
            reason = f"the file is damaged here: {first_line(error)}"
            yield {"name": f"{self.path}[{number}]", "image": b"", "unreadable": reason}

    def _record(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        group = "" if not self.groups else f"{self.groups[0]}:"
        record = {"name": f"{self.path}[{group}{number}]", **self._image(row[self.columns.image])}
        if self.columns.text is not None:
            record["text"] = as_texts(row[self.columns.text])
        for name in self.columns.keep:
            record[name] = "\n".join(as_texts(row[name]))
        if self.columns.label is not None:
            label = row[self.columns.label]
            if not self.columns.numbers:
                texts = as_texts(label)
                label = self.columns.class_names.index(texts[0]) if len(texts) == 1 else None
            if label is None or label < 0:
                record["unreadable"] = "it has no class"
            record["label"] = label
        return record

    def _image(self, value: Any) -> dict[str, Any]:
        """The bytes of an image, or why there are none."""
        value = value if isinstance(value, dict) else {"bytes": value}
        if value.get("bytes") is not None or not value.get("path"):
            return {"image": value.get("bytes") or b""}
        try:
            with open(os.path.join(os.path.dirname(self.path), value["path"]), "rb") as file:
                return {"image": file.read()}
        except OSError as error:
            name = printable(value["path"])
            reason = f"the table holds only the path {name}, which cannot be read: {error.strerror}"
            return {"image": b"", "unreadable": reason}
