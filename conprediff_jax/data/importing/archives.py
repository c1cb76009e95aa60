"""Archives as parts of an import: WebDataset's tar files, and npz files in ADM's layout.

**WebDataset** (github.com/webdataset/webdataset). Members of a tar file that follow each other and
share a key are one sample. The key is the path up to the first dot of the file's name; the rest in
lower case is the kind of the member. The image is the member of a kind such as `jpg` or `png`.
Captions are a text member (`txt`) or an entry of the member `json`; the class is the number in
`cls`, or a number in `json`. Members whose names begin with a dot, or begin and end with `__`, are
passed over.

**npz** (github.com/openai/guided-diffusion). `arr_0` holds images, uint8 `[images, height, width,
channels]` with 1, 3 or 4 channels; `arr_1`, where it is there, holds the number of every class.
Images are kept without loss, as PNG.
"""

import dataclasses
import functools
import io
import itertools
import json
import os
import posixpath
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from conprediff_jax.common import buckets
from conprediff_jax.common.errors import DataError, FieldError, first_line, printable
from conprediff_jax.common.images import EXTENSIONS
from conprediff_jax.data.captioned import as_texts
from conprediff_jax.data.importing.parts import TEXTS, Part, Plan, Wanted, split_of

_KINDS = tuple(ending.removeprefix(".") for ending in EXTENSIONS)
_PART = 1_000  # images of an npz that are done or not done together
_SOUGHT = 20  # samples that are looked at for captions and classes
_LOCAL_HEADER = 30  # bytes before a member's name in a zip file


def plan_tars(paths: list[str], wanted: Wanted) -> Plan:
    """Plans the import of WebDataset's tar files.

    Captions and classes are sought in the first samples of the first file.

    Raises:
        DataError: The first file cannot be read.
    """
    first = [sample for _, sample in itertools.islice(_samples(paths[0]), _SOUGHT)]
    if not first:
        raise DataError(f"{paths[0]}: holds no files")
    there = set().union(*first, *map(_json, first))
    text, label = wanted.text, wanted.label
    if text == "":
        text = next((name for name in ("txt", *TEXTS) if name in there), None)
    if label == "":
        label = next((name for name in ("cls", "label") if name in there), None)
    found = dataclasses.replace(wanted, text=text, label=label)
    parts = [Part(split=split_of(path), name=path, read=_Tar(path, found)) for path in paths]
    return Plan(
        format="webdataset",
        parts=parts,
        text=text,
        label=label,
        class_names=None,
        keep=wanted.keep,
    )


def _samples(path: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a tar file: their keys and members. A damaged end is a sample with an error.

    Raises:
        DataError: The file is no tar file.
    """
    key, sample = None, {}
    try:
        with buckets.opened(path) as file, tarfile.open(fileobj=file, mode="r|*") as archive:
            for member in archive:
                folder, name = posixpath.split(member.name)
                hidden = name.startswith(".") or (name.startswith("__") and name.endswith("__"))
                if not member.isfile() or hidden:
                    continue
                stem, _, kind = name.partition(".")
                if key is not None and posixpath.join(folder, stem) != key:
                    yield key, sample
                    sample = {}
                key = posixpath.join(folder, stem)
                sample.setdefault(kind.lower(), archive.extractfile(member).read())
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if key is None:
            raise DataError(f"{path}: not a tar file: {first_line(error)}") from error
        sample = {"": f"the archive is damaged here: {first_line(error)}".encode()}
    if key is not None:
        yield key, sample


def _json(sample: Mapping[str, bytes]) -> dict[str, Any]:
    """The entries of a sample's member `json`; none where it is missing or damaged."""
    try:
        values = json.loads(sample.get("json", b"{}"))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


@dataclasses.dataclass(frozen=True)
class _Tar:
    """The records of a tar file."""

    path: str
    wanted: Wanted

    def __call__(self) -> Iterator[dict[str, Any]]:
        for key, sample in _samples(self.path):
            yield self._record(f"{self.path}:{key}", sample)

    def _record(self, name: str, sample: Mapping[str, bytes]) -> dict[str, Any]:
        kinds = [kind for kind in sample if kind in _KINDS]
        record: dict[str, Any] = {"name": name, "image": b""}
        if not kinds:
            reason = (
                sample[""].decode()
                if list(sample) == [""]
                else (f"no image among its members {', '.join(map(printable, sample))}")
            )
            return {**record, "unreadable": reason}
        values = _json(sample)
        record.update(name=f"{name}.{kinds[0]}", image=sample[kinds[0]])

        def texts(feature: str) -> list[str]:
            return as_texts(sample[feature] if feature in sample else values.get(feature))

        if len(kinds) > 1:
            record["notes"] = ["one of several images of a sample"]
        if self.wanted.text is not None:
            record["text"] = texts(self.wanted.text)
        for feature in self.wanted.keep:
            record[feature] = "\n".join(texts(feature))
        if self.wanted.label is not None:
            number = "".join(texts(self.wanted.label))
            if not number.isdecimal():
                return {**record, "unreadable": f"its class is no number: {printable(number)!r}"}
            record["label"] = int(number)
        return record


def plan_npz(paths: list[str], wanted: Wanted) -> Plan:
    """Plans the import of npz files.

    Raises:
        DataError: A file is no npz, or `arr_0` does not hold images.
        FieldError: Texts are asked for, which an npz has not.
    """
    for field, given in {"text": wanted.text, "keep": wanted.keep}.items():
        if given:
            raise FieldError(field, "is given, and an npz holds only images and classes")
    parts, labelled = [], []
    for path in paths:
        shape = _images(path).shape
        labelled.append(wanted.label is not None and "arr_1" in _members(path))
        if labelled[-1] and _array(path, "arr_1").shape != shape[:1]:
            raise DataError(f"{path}: arr_1 does not hold a class for each of {shape[0]} images")
        for start in range(0, shape[0], _PART):
            indices = range(start, min(start + _PART, shape[0]))
            name = f"{path}[{start}:{indices.stop}]"
            parts.append(
                Part(split=split_of(path), name=name, read=_Arrays(path, indices, labelled[0]))
            )
    if len(set(labelled)) > 1 or (wanted.label and not all(labelled)):
        raise DataError(f"{paths[labelled.index(False)]}: has no classes (arr_1)")
    return Plan(
        format="npz",
        parts=parts,
        text=None,
        label="arr_1" if labelled[0] else None,
        class_names=None,
        keep=(),
    )


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """The records of a part of an npz."""

    path: str
    indices: range
    labelled: bool

    def __call__(self) -> Iterator[dict[str, Any]]:
        images = _images(self.path)
        labels = _array(self.path, "arr_1") if self.labelled else None
        for index in self.indices:
            file = io.BytesIO()
            image = images[index]
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
            record = {"name": f"{self.path}[{index}]", "image": file.getvalue()}
            if labels is not None:
                record["label"] = int(labels[index])
            yield record


def _members(path: str) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not an npz: {first_line(error)}") from error


def _images(path: str) -> np.ndarray:
    """The images of an npz, uint8 `[images, height, width, channels]`."""
    if "arr_0" not in _members(path):
        raise DataError(f"{path}: has no arr_0, but {', '.join(_members(path))}")
    images = _array(path, "arr_0")
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or images.dtype != np.uint8:
        raise DataError(
            f"{path}: arr_0 is {images.dtype} of shape {images.shape}; expected uint8 [images, "
            "height, width, 1, 3 or 4]"
        )
    if not images.size:
        raise DataError(f"{path}: arr_0 has shape {images.shape}: there are no images")
    return images


@functools.lru_cache(maxsize=2)
def _array(path: str, name: str) -> np.ndarray:
    """An array of an npz; one that is not compressed stays in the file until it is used."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"{name}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            with np.load(path) as arrays:
                return arrays[name]
        with open(path, "rb") as file:
            file.seek(member.header_offset + _LOCAL_HEADER - 4)
            lengths = np.frombuffer(file.read(4), "<u2")  # of the name and of an extra field
            file.seek(int(lengths.sum()), os.SEEK_CUR)
            version = npy.read_magic(file)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, by_columns, dtype = read(file)
            if dtype.hasobject:
                raise ValueError(f"{name} holds objects of Python")
            order = "F" if by_columns else "C"
            return np.memmap(file, dtype, "r", file.tell(), shape, order)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: {name} cannot be read: {first_line(error)}") from error
