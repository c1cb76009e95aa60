"""Captions and further columns that lie beside the images of a folder, as people have them.

* `metadata.jsonl`, `metadata.csv` or `metadata.parquet`: a row for each image. Its column
  `file_name` is a path relative to the metadata file, and every other column is a feature, such as
  `text` (the convention of Hugging Face's imagefolder and of diffusers' scripts).
* `captions_*.json`, in the folder or in `annotations/`: COCO's captions, as the feature `text`. The
  images of `captions_train2017.json` lie in the folder, or in its subfolder `train2017`.
* `a.txt` or `a.caption` beside `a.png`: every line that is not blank is a caption of the image, as
  the feature `text`.

The first of these that has all features asked for is read. With a split in a subfolder, metadata
may lie in it or above it. Values are texts; several rows for one image, a list in a row and several
lines are several captions. An image without a value has the empty text.

What does not fit is left out, counted and named: rows that cannot be read, rows and texts without
an image, images without a row. No image is left out because of its captions.
"""

import csv
import dataclasses
import io
import json
import os
import pathlib
import posixpath
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from conprediff_jax.common.errors import DataError, first_line, printable
from conprediff_jax.common.images import list_beside, warn_once
from conprediff_jax.data.text_files import decode_text

TEXT = "text"  # the feature of captions that have no column of their own
KEY = "file_name"  # the column of metadata that names an image
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_BESIDE = (".txt", ".caption")

Row = tuple[str, dict[str, Any]]  # the place of a row in messages, and its values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Values that were read from metadata or from COCO's captions.

    Attributes:
        features: Names of the features.
        values: The texts of each image, by feature and by path of the image.
    """

    features: tuple[str, ...]
    values: Mapping[str, Mapping[str, Sequence[str]]]

    def of(self, file: str) -> tuple[dict[str, str | list[str]], list[str]]:
        """The values of an image by feature, and what is to be said of them (nothing).

        Args:
            file: Path of the image relative to its folder.
        """
        return {name: _one_or_all(self.values[name].get(file, ())) for name in self.features}, []


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Text files beside the images, which are read with the images.

    Attributes:
        root: The folder.
        files: Path of the text file of each image, by the path of the image.
    """

    root: str
    files: Mapping[str, str]

    def of(self, file: str) -> tuple[dict[str, str | list[str]], list[str]]:
        """As `Rows.of`. A text file that cannot be read counts as empty."""
        if file not in self.files:
            return {TEXT: ""}, []
        path = os.path.join(self.root, self.files[file])
        try:
            text, encoding = decode_text(pathlib.Path(path).read_bytes())
        except OSError as error:
            return {TEXT: ""}, [f"caption cannot be read: {error.strerror}"]
        notes = [] if encoding.startswith("utf") else [f"caption read as {encoding}"]
        return {
            TEXT: _one_or_all([line.strip() for line in text.split("\n") if line.strip()])
        }, notes


Columns = Rows | TextFiles


def find_columns(root: str, above: str, files: Sequence[str], wanted: Sequence[str]) -> Columns:
    """The features of a folder's images, see the module docstring.

    Args:
        root: The folder of the images.
        above: The folder that data are named by: `root`, or the one above it.
        files: Paths of the images relative to `root`.
        wanted: Names of the features.

    Raises:
        DataError: The features are not there, or the metadata cannot be read at all.
    """
    have = []
    for folder in dict.fromkeys((root, above)):
        if path := _metadata(folder):
            columns = _columns_of(path)
            if set(wanted) <= set(columns):
                prefix = "" if folder == root else f"{os.path.basename(root)}/"
                rows = ((place, row, [row.get(KEY)]) for place, row in _read_rows(path))
                return _matched(path, rows, prefix, files, wanted)
            have.append(f"{path} has {', '.join(columns)}")
    if list(wanted) == [TEXT]:
        if paths := _coco(root, above):
            rows = (row for path in paths for row in _coco_rows(path))
            return _matched(" and ".join(paths), rows, "", files, wanted)
        if texts := list_beside(pathlib.Path(root), _BESIDE):
            return _text_files(root, files, texts)
    known = "; ".join(have) or (
        f"features besides image and label come from metadata.jsonl or metadata.csv (a column "
        f"{KEY}), and {TEXT} also from captions_*.json or a .txt beside each image"
    )
    raise DataError(f"{root}: there is no feature {', '.join(wanted)}; {known}")


def has_captions(root: str, above: str) -> bool:
    """Whether `find_columns` would find the feature `text`."""
    for folder in dict.fromkeys((root, above)):
        if path := _metadata(folder):
            return TEXT in _columns_of(path)
    return bool(_coco(root, above) or list_beside(pathlib.Path(root), _BESIDE))


def _one_or_all(values: Sequence[str]) -> str | list[str]:
    """The only value, or '' if there is none, or the list of several."""
    return list(values) if len(values) > 1 else (*values, "")[0]


def _metadata(folder: str) -> str | None:
    """The metadata file of a folder, if there is one."""
    found = [name for name in _METADATA if os.path.isfile(os.path.join(folder, name))]
    if len(found) > 1:
        raise DataError(f"{folder}: has {' and '.join(found)}; keep one of them")
    return os.path.join(folder, found[0]) if found else None


def _read_rows(path: str) -> Iterator[Row]:
    """The readable rows of a metadata file; the others are counted and named.

    Raises:
        DataError: The file cannot be read, or has no column of file names.
    """
    read: Callable[[str], Iterator[Row | str]] = {
        ".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows,
    }[os.path.splitext(path)[1]]  # fmt: skip
    bad, good = [], 0
    try:
        for row in read(path):
            if isinstance(row, str):
                bad.append(row)
            else:
                good += 1
                yield row
    except (OSError, csv.Error, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}") from error
    if bad:
        warn_once(f"{path}: left out {len(bad)} rows, such as {bad[0]}")
    if not good:
        raise DataError(f"{path}: has no rows that can be read")


def _columns_of(path: str) -> list[str]:
    """The columns of a metadata file besides the file name.

    Raises:
        DataError: It has no column of file names.
    """
    columns = dict.fromkeys(name for _, row in _read_rows(path) for name in row)
    if KEY not in columns:
        raise DataError(f"{path}: has no column {KEY}, but {', '.join(map(repr, columns))}")
    return [name for name in columns if name != KEY]


def _json_lines(path: str) -> Iterator[Row | str]:
    text, _ = decode_text(pathlib.Path(path).read_bytes())
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            yield f"line {number} ({first_line(error)})"
            continue
        yield (f"line {number}", row) if isinstance(row, dict) else f"line {number} (no object)"


def _csv_rows(path: str) -> Iterator[Row | str]:
    text, _ = decode_text(pathlib.Path(path).read_bytes())
    reader = csv.DictReader(io.StringIO(text), restkey="")
    for row in reader:
        place = f"line {reader.line_num}"
        yield f"{place} (more fields than the first line)" if "" in row else (place, row)


def _parquet_rows(path: str) -> Iterator[Row]:
    import pyarrow.parquet  # takes a quarter of a second

    place = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            place += 1
            yield f"row {place}", row


def _coco(root: str, above: str) -> list[str]:
    """The files of COCO's captions for the images of a folder."""
    own = f"captions_{os.path.basename(root)}.json"
    for folder in (root, os.path.join(root, "annotations")):
        names = os.listdir(folder) if os.path.isdir(folder) else ()
        found = [name for name in names if name.startswith("captions_") and name.endswith(".json")]
        if found:
            return [os.path.join(folder, name) for name in sorted(found)]
    for folder in (above, os.path.join(os.path.dirname(root), "annotations")):
        if os.path.isfile(path := os.path.join(folder, own)):
            return [path]
    return []


def _coco_rows(path: str) -> Iterator[tuple[str, dict[str, Any], list[Any]]]:
    """The captions of a file: place, row, and the names that the image may have."""
    subfolder = os.path.basename(path).removeprefix("captions_").removesuffix(".json")
    try:
        stored = json.loads(pathlib.Path(path).read_bytes())
        names = {image["id"]: image[KEY] for image in stored["images"]}
        captions = [(note["image_id"], note["caption"]) for note in stored["annotations"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a file of COCO's captions: {first_line(error)}") from error
    for number, caption in captions:
        name = names.get(number)
        places = [name, f"{subfolder}/{name}"] if isinstance(name, str) else [name]
        yield f"image {number}", {TEXT: caption}, places


def _matched(
    path: str,
    rows: Iterator[tuple[str, dict[str, Any], list[Any]]],
    prefix: str,
    files: Sequence[str],
    wanted: Sequence[str],
) -> Rows:
    """Gives each image the values of its rows, and says what is left over.

    Args:
        path: The file of the rows, in messages.
        rows: Place, values and possible names of the image, for each row.
        prefix: What names must begin with, which is not a part of the images' paths.
        files: Paths of the images.
        wanted: Names of the features.
    """
    places = {unicodedata.normalize("NFC", file): file for file in files}
    values: dict[str, dict[str, list[str]]] = {name: {} for name in wanted}
    strangers = []
    for place, row, names in rows:
        found = [places[name] for name in _plain_names(names, prefix) if name in places]
        if not found:
            if not prefix or any(str(name).startswith(prefix) for name in names):
                strangers.append(f"{printable(str(names[0]))} ({place})")
            continue
        for name in wanted:
            texts = values[name].setdefault(found[0], [])
            texts += [text for text in as_texts(row.get(name)) if text not in texts]
    if strangers:
        warn_once(f"{path}: {len(strangers)} rows name no image, such as {strangers[0]}")
    for name in wanted:
        _tell_missing(path, name, [file for file in files if not values[name].get(file)], files)
    return Rows(features=tuple(wanted), values=values)


def _plain_names(names: Sequence[Any], prefix: str) -> Iterator[str]:
    """The ways to write paths that are tried: as they are, and with the slashes of Windows."""
    for name in names:
        if isinstance(name, str):
            for text in (name, name.replace("\\", "/")):
                text = unicodedata.normalize("NFC", posixpath.normpath(text))
                if text.startswith(prefix):
                    yield text.removeprefix(prefix)


def as_texts(value: Any) -> list[str]:
    """A value of a column as texts without blanks around them: none, one, or those of a list."""
    if value is None:
        return []
    if isinstance(value, list):
        return [text for item in value for text in as_texts(item)]
    if isinstance(value, bytes):
        value, _ = decode_text(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text.encode("utf-8", "replace").decode().strip()  # a lone surrogate is no text
    return [text] if text else []


def _text_files(root: str, files: Sequence[str], texts: Mapping[str, str]) -> TextFiles:
    """The text files that have the stem of an image, and what is left over."""
    stems = {file: os.path.splitext(file)[0] for file in files}
    matched = {file: texts[stem] for file, stem in stems.items() if stem in texts}
    used = set(matched.values())
    if shared := len(matched) - len(used):
        warn_once(f"{root}: {shared} images share the caption of another one of the same stem")
    if unused := sorted(set(texts.values()).difference(used)):
        warn_once(
            f"{root}: {len(unused)} text files lie beside no image, such as {printable(unused[0])}"
        )
    _tell_missing(root, TEXT, [file for file in files if file not in matched], files)
    return TextFiles(root=root, files=matched)


def _tell_missing(where: str, name: str, missing: Sequence[str], files: Sequence[str]) -> None:
    if missing:
        warn_once(
            f"{where}: {len(missing)} of {len(files)} images have no {name}, such as "
            f"{printable(missing[0])}; it is empty for them"
        )
