"""Data sets that are computed: as many images as are asked for, of laws that are known.

    <data_dir>/<name>/1.0.0/
        made.json                                       what is made; other wishes are refused
        <name>-train.array_record-00000-of-00030, ...   the images, as PNG
        dataset_info.json, features.json                what TFDS reads; they are written last

The images are made in blocks. A block depends on the law, the seed, the name of the split and its
place in the split, and on nothing else: a larger data set begins with the images of a smaller one.
Every file appears under its name when it is complete, so that a run which was interrupted goes on
with the files that are missing.
"""

import dataclasses
import io
import json
import os
import pathlib
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import UInt8
from PIL import Image

from conprediff_jax.common import extras
from conprediff_jax.common.errors import DataError, FieldError
from conprediff_jax.common.files import write_text, writing
from conprediff_jax.common.lock import locked
from conprediff_jax.common.progress import ProgressLine
from conprediff_jax.data.dead_leaves import DeadLeaves
from conprediff_jax.data.potts import Potts

BLOCK = 64  # images of one random stream
SHARD = 32 * BLOCK  # images of one file
SPLITS = ("train", "test")
VERSION = "1.0.0"
TRAIN, TEST = 65_536, 4_096  # images of the splits, where nothing else is asked for

_PARTIAL = ".partial"
_OPTIONS = "group_size:1"  # for random access; TFDS writes its files in the same way


@runtime_checkable
class Law(Protocol):
    """A distribution of images.

    Attributes:
        side: Side of an image in pixels.
    """

    side: int

    @property
    def description(self) -> str:
        """What the images are, in words."""
        ...

    def draw(self, rng: np.random.Generator, count: int) -> UInt8[np.ndarray, "count side side 3"]:
        """Draws images."""
        ...


LAWS: Mapping[str, Law] = {
    "dead_leaves/16": DeadLeaves(side=16, largest=8.0),
    "dead_leaves/32": DeadLeaves(side=32, largest=16.0),
    "dead_leaves/64": DeadLeaves(side=64, largest=32.0),
    "potts/8": Potts(side=8),
    "potts/16": Potts(side=16),
    "potts/32": Potts(side=32, sweeps=96),
}


def is_made(name: str) -> bool:
    """Whether data of this name are computed."""
    return name.partition("/")[0] in {known.partition("/")[0] for known in LAWS}


def law_of(name: str) -> Law:
    """The law of a data set.

    Raises:
        DataError: No data set that is computed has this name.
    """
    if name not in LAWS:
        raise DataError(f"{name}: is not known; data that are computed are {', '.join(LAWS)}")
    return LAWS[name]


def folder_of(name: str, data_dir: str | os.PathLike) -> pathlib.Path:
    """The folder of a data set."""
    return pathlib.Path(data_dir).expanduser() / name / VERSION


def is_complete(folder: pathlib.Path) -> bool:
    """Whether all files of a data set are in its folder."""
    return (folder / "dataset_info.json").exists()


def blocks(
    law: Law, seed: int, split: str, count: int, *, first: int = 0
) -> Iterator[UInt8[np.ndarray, "images side side 3"]]:
    """Images of a split in blocks of `BLOCK`; the last one may be shorter.

    Args:
        law: The law of the images.
        seed: Seed of the data set, at least 0.
        split: Name of the split; other names give other images.
        count: Number of images.
        first: Index of the first image, a multiple of `BLOCK`.
    """
    for start in range(first, first + count, BLOCK):
        rng = np.random.default_rng([seed, zlib.crc32(split.encode()), start // BLOCK])
        yield law.draw(rng, BLOCK)[: first + count - start]


def write(
    name: str,
    data_dir: str | os.PathLike,
    *,
    num: int = TRAIN,
    test_num: int = TEST,
    seed: int = 0,
) -> None:
    """Writes a data set as TFDS does, as array_record, unless it is there already.

    Args:
        name: A key of `LAWS`.
        data_dir: Folder of the TFDS data sets.
        num: Images of the split `train`.
        test_num: Images of the split `test`, which share no random numbers with the others.
        seed: Seed of all images.

    Raises:
        DataError: The name is not known, or the folder holds other images of this name.
        FieldError: A number is out of its range.
        LockedError: Another program writes into the folder.
        WriteError: A file cannot be written.
    """
    law = law_of(name)
    for field, value, least in (("num", num, 1), ("test_num", test_num, 1), ("seed", seed, 0)):
        if value < least:
            raise FieldError(field, f"is {value}: it must be at least {least}")
    folder = folder_of(name, data_dir)
    about = {"law": dataclasses.asdict(law), "seed": seed, "train": num, "test": test_num}
    with locked(folder):
        _claim(folder, name, about)
        if is_complete(folder):
            return
        progress = ProgressLine(num + test_num, "images", about=name)
        for split in SPLITS:
            _write_split(folder, name, about, split, progress)
        _write_info(folder, name, law, about)


def _claim(folder: pathlib.Path, name: str, about: Mapping[str, Any]) -> None:
    """Notes what a folder is for, or checks that it is for the same."""
    note = folder / "made.json"
    if not note.exists():
        write_text(note, json.dumps(about, indent=1) + "\n")
        return
    there = json.loads(note.read_text())
    for key in about:
        if there.get(key) != about[key]:
            raise DataError(
                f"{name}: {folder} was made with {key} {there.get(key)}, not {about[key]}: ask for "
                "the same, give another data_dir, or remove this folder"
            )


def _places(count: int) -> list[range]:
    """The indices of the images in every file of a split."""
    return [range(first, min(first + SHARD, count)) for first in range(0, count, SHARD)]


def _shards(folder: pathlib.Path, name: str, split: str, count: int) -> list[pathlib.Path]:
    """The files of a split."""
    stem, total = f"{name.partition('/')[0]}-{split}.array_record", len(_places(count))
    return [folder / f"{stem}-{shard:05}-of-{total:05}" for shard in range(total)]


def _write_split(
    folder: pathlib.Path, name: str, about: Mapping[str, Any], split: str, progress: ProgressLine
) -> None:
    """Writes the files of a split that are missing."""
    law, count = law_of(name), about[split]
    serialize = _serializer(law)
    for places, path in zip(_places(count), _shards(folder, name, split, count), strict=True):
        if path.exists():
            progress.skip(len(places))
            continue
        partial = path.with_name(path.name + _PARTIAL)
        with writing(path):
            writer = ArrayRecordWriter(str(partial), _OPTIONS)
            try:
                for images in blocks(law, about["seed"], split, len(places), first=places.start):
                    for image in images:
                        writer.write(serialize(image))
                    progress.add(len(images))
            finally:
                writer.close()
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(path)


def _features(law: Law) -> Any:
    tfds = extras.tensorflow_datasets()

    image = tfds.features.Image(shape=(law.side, law.side, 3), encoding_format="png")
    return tfds.features.FeaturesDict({"image": image})


def _serializer(law: Law) -> Callable[[np.ndarray], bytes]:
    """A function from an image to its record."""
    features = _features(law)

    def serialize(image: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        file.seek(0)
        return features.serialize_example(features.encode_example({"image": file}))

    return serialize


def _write_info(folder: pathlib.Path, name: str, law: Law, about: Mapping[str, Any]) -> None:
    """Writes what TFDS reads, which makes the data set complete."""
    tfds = extras.tensorflow_datasets()
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    dataset, _, config = name.partition("/")
    identity = DatasetIdentity(
        name=dataset, config_name=config, version=tfds.core.Version(VERSION), data_dir=str(folder),
        module_name="",
    )  # fmt: skip
    description = f"{law.description}; seed {about['seed']}"
    info = tfds.core.DatasetInfo(builder=identity, features=_features(law), description=description)
    info.set_file_format("array_record")
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=dataset, filetype_suffix="array_record"
    )
    splits = []
    for split in SPLITS:
        paths = _shards(folder, name, split, about[split])
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(places) for places in _places(about[split])],
                num_bytes=sum(path.stat().st_size for path in paths),
                filename_template=template.replace(split=split),
            )
        )
    info.set_splits(tfds.core.splits.SplitDict(splits))
    with writing(folder), tempfile.TemporaryDirectory(dir=folder) as aside:
        info.write_to_directory(aside)
        for file in sorted(pathlib.Path(aside).iterdir(), reverse=True):  # dataset_info.json last
            file.replace(folder / file.name)
