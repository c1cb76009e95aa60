"""Latents encoded once, ahead of training: their files, and random access to them.

    <folder>/
        00000-of-00012.array_record, ...    one record for each record of the data, in its order
        latents.json                        the manifest; `incomplete.json` while shards are missing

A record is a msgpack map: `latent` and, where images are flipped, `mirrored` (the latent of the
mirrored image, which is not the mirrored latent), both float32 `[rows, columns, channels]` as the
autoencoder has them, unscaled; where captions were encoded too, `encoded`, float16 `[captions,
length, width]`, in their order; `label` and the kept features as the data have them. A record of an
undecodable image has none of the encoded. So record i here is record i of the data, and order,
flips and captions are drawn as they are for images.

Files are written under another name and moved into place: what has its name is whole.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from flax import serialization, traverse_util

from conprediff_jax.common.errors import first_line
from conprediff_jax.common.files import writing
from conprediff_jax.common.images import BadImage
from conprediff_jax.data import sources, transforms

COMPLETE, INCOMPLETE = "latents.json", "incomplete.json"
COMMAND = "python -m conprediff_jax.precompute --config=..."
VERSION = 1

# Of a `DataSpec`: what latents depend on. The folder of TFDS and the speed of reading are not.
DATA_FIELDS = ("name", "split", "image_size", "label", "keep")

_PARTIAL = ".partial"
_OPTIONS = "group_size:1,uncompressed"  # random access; noise-like floats hardly compress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of latents holds.

    Attributes:
        fingerprint: Of the autoencoder, see `encoders.fingerprint`.
        model: Its options, see `encoders.described_model`.
        data: Which images, see `described_data`.
        class_names: Names of the classes, or None.
        flip: Whether the latents of mirrored images are there.
        shape: Rows, columns and channels of a latent.
        count: Records, undecodable ones included.
        shard_size: Records of every shard but the last.
        scale: What latents are to be multiplied by.
        scale_source: Where that comes from.
        text_fingerprint: Of the text encoder and its vocabulary, see
            `encoders.text_fingerprint`; empty where captions were not encoded.
    """

    fingerprint: str
    model: dict[str, Any]
    data: dict[str, Any]
    class_names: tuple[str, ...] | None
    flip: bool
    shape: tuple[int, int, int]
    count: int
    shard_size: int
    scale: float
    scale_source: str
    text_fingerprint: str = ""

    @property
    def num_shards(self) -> int:
        """Files of the folder."""
        return math.ceil(self.count / self.shard_size)

    def shard_name(self, shard: int) -> str:
        """File name of a shard."""
        return f"{shard:05}-of-{self.num_shards:05}.array_record"

    def shard_range(self, shard: int) -> range:
        """The records in a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.count))

    def missing(self, folder: pathlib.Path) -> list[int]:
        """The shards that are not in a folder."""
        shards = range(self.num_shards)
        return [shard for shard in shards if not (folder / self.shard_name(shard)).exists()]

    def to_dict(self) -> dict[str, Any]:
        """As it is in its file: JSON's types only."""
        return json.loads(json.dumps({"version": VERSION, **dataclasses.asdict(self)}))

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Manifest":
        """The other way round.

        Raises:
            ValueError, KeyError, TypeError: The file was not written by this version.
        """
        version = stored.pop("version")
        if version != VERSION:
            raise ValueError(f"version {version}; this program knows {VERSION}")
        names, shape = stored.pop("class_names"), tuple(stored.pop("shape"))
        return cls(**stored, shape=shape, class_names=None if names is None else tuple(names))


def described_data(spec: Any) -> dict[str, Any]:
    """The part of a `DataSpec` that latents depend on."""
    fields = {name: getattr(spec, name) for name in DATA_FIELDS}
    return {**fields, "keep": list(spec.keep)}


def differences(theirs: Manifest, ours: Manifest) -> str:
    """Where two manifests differ, with both values; empty where they do not."""
    flat, other = (
        traverse_util.flatten_dict(manifest.to_dict(), sep=".") for manifest in (theirs, ours)
    )
    for side in (flat, other):
        for name in ("fingerprint", "text_fingerprint"):
            side[name] = side[name][:12]
    return ", ".join(
        f"{key} {flat.get(key)} there, {other.get(key)} here"
        for key in sorted(flat.keys() | other.keys())
        if flat.get(key) != other.get(key)
    )


def find_manifest(folder: pathlib.Path) -> Manifest | None:
    """The manifest of a folder that is complete or begun; None where nothing is there yet.

    Raises:
        DataError: It is unreadable, or the folder holds other things.
    """
    for name in (COMPLETE, INCOMPLETE):
        path = folder / name
        if path.exists():
            try:
                return Manifest.from_dict(json.loads(path.read_text()))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise sources.DataError(f"{path} is unreadable: {first_line(error)}") from error
    if folder.exists() and not folder.is_dir():
        raise sources.DataError(f"{folder} is a file; latents go into a folder of their own")
    others = [p.name for p in folder.glob("*") if not p.name.endswith(_PARTIAL)]
    if others:
        raise sources.DataError(
            f"{folder} holds other things ({others[0]}); latents go into a folder of their own"
        )
    return None


def begin(folder: pathlib.Path, manifest: Manifest) -> None:
    """Marks a folder as one that is being filled.

    Raises:
        WriteError: Nothing can be written there.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _write_manifest(folder / INCOMPLETE, manifest)


def write_shard(
    folder: pathlib.Path, manifest: Manifest, shard: int, records: Iterable[dict[str, Any]]
) -> None:
    """Writes one shard, and moves it into place when it is on disk.

    Args:
        folder: Where `begin` has been.
        manifest: The folder's.
        shard: Its number.
        records: Maps as in the module docstring, in order.

    Raises:
        WriteError: It cannot be written.
    """
    path = folder / manifest.shard_name(shard)
    partial = path.with_name(path.name + _PARTIAL)
    packed = map(serialization.msgpack_serialize, records)
    with writing(path):
        writer = ArrayRecordWriter(str(partial), _OPTIONS)
    try:
        for record in packed:
            with writing(path):
                writer.write(record)
    finally:
        with writing(path):
            writer.close()
    _move_into_place(partial, path)


def finish(folder: pathlib.Path, manifest: Manifest) -> None:
    """Marks a folder as complete, once every shard is there."""
    _write_manifest(folder / COMPLETE, manifest)
    (folder / INCOMPLETE).unlink(missing_ok=True)


def read_manifest(folder: str) -> Manifest:
    """The manifest of a complete folder.

    Raises:
        DataError: There is none, or the folder is incomplete.
    """
    path = pathlib.Path(folder).expanduser()
    manifest = find_manifest(path)
    if manifest is None:
        raise sources.DataError(f"{folder}: no latents there; run {COMMAND} --out={folder}")
    missing = manifest.missing(path)
    if missing or not (path / COMPLETE).exists():
        raise sources.DataError(
            f"{folder} is incomplete, {len(missing)} of {manifest.num_shards} shards are missing; "
            f"run {COMMAND} --out={folder} again: it goes on where it stopped"
        )
    return manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSource:
    """Random access to the latents of a folder; a `Source` whose records hold no image.

    Attributes:
        records: Undecoded records of all shards.
        folder: What to call the folder in messages.
        class_names: Names of the classes, or None.
        features: Names of what is delivered besides the latents.
    """

    records: Any
    folder: str
    class_names: tuple[str, ...] | None
    features: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = f"{self.folder}[{index}]"
        try:
            record = serialization.msgpack_restore(self.records[index])
        except Exception as error:  # whatever array_record raises about a damaged chunk
            raise sources.DataError(f"{name} is damaged: {first_line(error)}") from error
        wanted = ("latent", "mirrored", *self.features)
        return {"name": name} | {key: record[key] for key in wanted if key in record}


def open_latents(spec: Any) -> LatentSource:
    """The latents of a `DataSpec`.

    Args:
        spec: Its `latents` is the folder; what it says of the images must be true of it.

    Raises:
        DataError: The folder is missing, incomplete, or holds the latents of other images.
    """
    manifest = read_manifest(spec.latents)
    _check_spec(manifest, spec)
    folder = pathlib.Path(spec.latents).expanduser()
    paths = [str(folder / manifest.shard_name(shard)) for shard in range(manifest.num_shards)]
    try:
        records = ArrayRecordDataSource(paths)
    except Exception as error:  # whatever array_record raises about a damaged file
        raise sources.DataError(
            f"{folder} is damaged: {first_line(error)}; delete that file and run "
            f"{COMMAND} --out={folder} again"
        ) from error
    if len(records) != manifest.count:
        raise sources.DataError(
            f"{folder} holds {len(records)} records; its {COMPLETE} says {manifest.count}"
        )
    return LatentSource(
        records=records,
        folder=spec.latents,
        class_names=manifest.class_names if spec.label else None,
        features=(
            *(["label"] if spec.label else []),
            *spec.keep,
            *(["encoded"] if spec.encoded_text else []),
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToLatentExample(transforms.ToExample):
    """From a record to an example with `latent` float32 in the place of `image`.

    Where captions were encoded, that of the caption is there as `encoded`, float16 [length, width].

    The draws are those of an image, number for number; `crop` and `size` have had their effect.
    """

    def make(
        self, record: dict[str, Any], *, offset: float, mirrored: bool, choice: float
    ) -> dict[str, Any] | transforms.Undecodable:
        """One example as told; see `ToExample`."""
        del offset
        others = dict(record)
        latents = {False: others.pop("latent", None), True: others.pop("mirrored", None)}
        encoded = others.pop("encoded", None)
        others = self._others(others, choice)
        if latents[mirrored] is None:
            error = BadImage("the image could not be decoded when the latents were made")
            return transforms.Undecodable(name=record["name"], error=error, others=others)
        example = {"latent": latents[mirrored], **others}
        if encoded is not None:
            example["encoded"] = encoded[int(choice * len(encoded))]
        return example


def _check_spec(manifest: Manifest, spec: Any) -> None:
    """Raises DataError where a spec asks for other images than those that were encoded."""
    theirs, ours = manifest.data, described_data(spec)
    compared = ["name", "split", "image_size", *(["label"] if spec.label else [])]
    for field in compared:
        if theirs[field] != ours[field]:
            raise sources.DataError(
                f"config.data.{field} is {ours[field]!r}; the latents in {spec.latents} were "
                f"encoded with {theirs[field]!r}"
            )
    lacking = [name for name in ours["keep"] if name not in theirs["keep"]]
    if lacking:
        raise sources.DataError(
            f"config.data.keep has {', '.join(lacking)}; the latents in {spec.latents} were "
            f"encoded with {theirs['keep']}"
        )
    if spec.encoded_text and not manifest.text_fingerprint:
        raise sources.DataError(
            f"config.data.encoded_text is True; {spec.latents} holds no encoded captions: run "
            f"{COMMAND} with --config.data.encoded_text=True into another folder"
        )
    if spec.flip and not manifest.flip:
        raise sources.DataError(
            f"config.data.flip is True; {spec.latents} holds no latents of mirrored images: run "
            f"{COMMAND} with --config.data.flip=True into another folder"
        )


def _write_manifest(path: pathlib.Path, manifest: Manifest) -> None:
    partial = path.with_name(path.name + _PARTIAL)
    with writing(path):
        partial.write_text(json.dumps(manifest.to_dict(), indent=2) + "\n")
    _move_into_place(partial, path)


def _move_into_place(partial: pathlib.Path, path: pathlib.Path) -> None:
    """Renames a file once it is on disk, so that not even a power cut leaves half of it."""
    with writing(path):
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
