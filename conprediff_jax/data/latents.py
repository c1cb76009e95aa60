"""Latents that were encoded ahead of training: their files, and random access to them.

    <folder>/
        00000-of-00012.array_record, ...    one record for each record of the data, in its order
        latents.json                        the manifest; `incomplete.json` while shards are missing

A record is a msgpack map with these keys:

    latent      float32 [rows, columns, channels], as the autoencoder returns it, unscaled; of the
                shape of its image where images have several (`aspects`)
    mirrored    the same for the mirrored image (which is not the mirrored latent), where images are
                flipped
    encoded     float16 [captions, length, width], where captions were encoded too
    features    float16 [rows, columns, channels] of an encoder that the user gave, where there is
                one, and `mirrored_features` of the mirrored image
    label and the kept features, as the data have them

A record of an undecodable image has none of the first five. Record i here is record i of the data,
so that the order, flips and captions of training are drawn as they are for images.

Files are written under a temporary name and then moved into place, so that no file with its final
name is ever half written.
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

from conprediff_jax.common import lock
from conprediff_jax.common.errors import first_line
from conprediff_jax.common.files import writing
from conprediff_jax.common.images import BadImage
from conprediff_jax.data import sources, transforms

COMPLETE, INCOMPLETE = "latents.json", "incomplete.json"
COMMAND = "python -m conprediff_jax.precompute --config=..."
VERSION = 1

# The fields of a `DataSpec` that latents depend on. They do not depend on the folder of TFDS, nor
# on how fast the data are read.
DATA_FIELDS = ("name", "split", "image_size", "label", "keep")

# Those that name the shapes, and what they are for images of one shape.
_OF_SHAPES = {"aspect_step": 0, "max_aspect": None}

_PARTIAL = ".partial"
_OPTIONS = "group_size:1,uncompressed"  # for random access; such floats hardly compress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of latents holds.

    Attributes:
        fingerprint: Fingerprint of the autoencoder, see `encoders.fingerprint`.
        model: Options of the autoencoder, see `encoders.described_model`.
        data: The images that were encoded, see `described_data`.
        class_names: Names of the classes by number, or None.
        flip: Whether the latents of mirrored images are included.
        shape: Rows, columns and channels of a latent of `image_size`.
        count: Number of records, undecodable ones included.
        shard_size: Number of records of every shard but the last.
        scale: The factor that latents are to be multiplied by.
        scale_source: How the factor was found, in words.
        text_fingerprint: Fingerprint of the text encoder and its vocabulary, see
            `encoders.text_fingerprint`; empty where captions were not encoded.
        features: The function that encoded features, as 'module:function'; empty for none.
        features_shape: Rows, columns and channels of the features; empty for none.
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
    features: str = ""
    features_shape: tuple[int, ...] = ()

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return math.ceil(self.count / self.shard_size)

    def shard_name(self, shard: int) -> str:
        """File name of a shard."""
        return f"{shard:05}-of-{self.num_shards:05}.array_record"

    def shard_range(self, shard: int) -> range:
        """The indices of the records in a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.count))

    def missing(self, folder: pathlib.Path) -> list[int]:
        """The numbers of the shards that are not in a folder."""
        shards = range(self.num_shards)
        return [shard for shard in shards if not (folder / self.shard_name(shard)).exists()]

    def to_dict(self) -> dict[str, Any]:
        """The content of the manifest's file, in types of JSON."""
        return json.loads(json.dumps({"version": VERSION, **dataclasses.asdict(self)}))

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Manifest":
        """Makes a manifest from the content of its file.

        Raises:
            ValueError, KeyError, TypeError: The content is not of this version.
        """
        version = stored.pop("version")
        if version != VERSION:
            raise ValueError(f"it has version {version}; this program reads version {VERSION}")
        names = stored.pop("class_names")
        shapes = {name: tuple(stored.pop(name, ())) for name in ("shape", "features_shape")}
        return cls(**stored, **shapes, class_names=None if names is None else tuple(names))


def described_data(spec: Any) -> dict[str, Any]:
    """The part of a `DataSpec` that latents depend on."""
    fields = {name: getattr(spec, name) for name in DATA_FIELDS}
    if spec.channels != 3:  # manifests of RGB images do not say so
        fields["channels"] = spec.channels
    if spec.aspect_step:  # nor do those of images of one shape
        fields |= {name: getattr(spec, name) for name in _OF_SHAPES}
    return json.loads(json.dumps(fields))


def differences(theirs: Manifest, ours: Manifest) -> str:
    """The fields in which two manifests differ, with both values; empty if they are equal."""
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
    """The manifest of a folder, complete or incomplete; None if the folder is empty or missing.

    Raises:
        DataError: The manifest is unreadable, or the folder holds other things.
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
    names = [path.name for path in folder.glob("*")]
    others = [name for name in names if not name.endswith(_PARTIAL) and name != lock.NAME]
    if others:
        raise sources.DataError(
            f"{folder} holds other things ({others[0]}); latents go into a folder of their own"
        )
    return None


def begin(folder: pathlib.Path, manifest: Manifest) -> None:
    """Marks a folder as one that is being filled.

    Raises:
        WriteError: The folder cannot be written to.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _write_manifest(folder / INCOMPLETE, manifest)


def write_shard(
    folder: pathlib.Path, manifest: Manifest, shard: int, records: Iterable[dict[str, Any]]
) -> None:
    """Writes one shard, and moves it into place once it is on disk.

    Args:
        folder: A folder that `begin` has marked.
        manifest: The manifest of the folder.
        shard: Number of the shard.
        records: The records of the shard in order; see the module docstring.

    Raises:
        WriteError: The shard cannot be written.
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
    """Marks a folder as complete. Call it once every shard is written."""
    _write_manifest(folder / COMPLETE, manifest)
    (folder / INCOMPLETE).unlink(missing_ok=True)


def read_manifest(folder: str) -> Manifest:
    """The manifest of a complete folder.

    Raises:
        DataError: There is no manifest, or the folder is incomplete.
    """
    path = pathlib.Path(folder).expanduser()
    manifest = find_manifest(path)
    if manifest is None:
        raise sources.DataError(f"{folder}: no latents there; run {COMMAND} --out={folder}")
    missing = manifest.missing(path)
    if missing or not (path / COMPLETE).exists():
        raise sources.DataError(
            f"{folder} is incomplete, {len(missing)} of {manifest.num_shards} shards are missing; "
            f"run {COMMAND} --out={folder} again: it continues where it stopped"
        )
    return manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSource:
    """Random access to the latents of a folder: a `Source` whose records hold no images.

    Attributes:
        records: The undecoded records of all shards.
        folder: Name of the folder in messages.
        class_names: Names of the classes by number, or None.
        features: Names of the features that are delivered besides the latents.
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
    """Opens the latents that a `DataSpec` names.

    Args:
        spec: A `DataSpec` whose field `latents` is the folder. Its other fields must agree with
            the images that were encoded.

    Raises:
        DataError: The folder is missing or incomplete, or holds the latents of other images.
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
            *(["features", "mirrored_features"] if spec.features else []),
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToLatentExample(transforms.ToExample):
    """Makes an example with `latent` float32 `[rows, columns, channels]` in the place of `image`.

    Where captions were encoded, the example has the chosen one as `encoded`, float16
    `[length, width]`; where the records hold features, it has them as `features`, float16 `[rows,
    columns, channels]`. The random numbers are the same as for images. `crop` and `size` have no
    effect, since they were applied before the images were encoded.
    """

    def make(
        self,
        record: dict[str, Any],
        *,
        offset: float,
        mirrored: bool,
        choice: float,
        out: None = None,
    ) -> dict[str, Any] | transforms.Undecodable:
        """Makes one example from given choices; see `ToExample.make`."""
        del offset, out
        others = dict(record)
        latents = {False: others.pop("latent", None), True: others.pop("mirrored", None)}
        encoded = others.pop("encoded", None)
        features = {
            False: others.pop("features", None),
            True: others.pop("mirrored_features", None),
        }[mirrored]
        others = self._others(others, choice)
        if latents[mirrored] is None:
            error = BadImage("the image could not be decoded when the latents were made")
            return transforms.Undecodable(name=record["name"], error=error, others=others)
        example = {"latent": latents[mirrored], **others}
        if encoded is not None:
            example["encoded"] = encoded[int(choice * len(encoded))]
        if features is not None:
            example["features"] = features
        return example


def _check_spec(manifest: Manifest, spec: Any) -> None:
    """Checks that a spec agrees with the images that were encoded.

    Raises:
        DataError: A field of the spec differs.
    """
    theirs, ours = manifest.data, described_data(spec)
    theirs, ours = ({"channels": 3, **_OF_SHAPES, **fields} for fields in (theirs, ours))
    compared = ["name", "split", "image_size", "channels", *_OF_SHAPES]
    compared += ["label"] if spec.label else []
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
            f"encoded with keep={theirs['keep']}"
        )
    if spec.encoded_text and not manifest.text_fingerprint:
        raise sources.DataError(
            f"config.data.encoded_text is True; {spec.latents} holds no encoded captions: run "
            f"{COMMAND} with --config.data.encoded_text=True into another folder"
        )
    if spec.features != manifest.features and spec.features:
        raise sources.DataError(
            f"config.data.features is {spec.features!r}; {spec.latents} holds "
            f"{'those of ' + repr(manifest.features) if manifest.features else 'no features'}: run "
            f"{COMMAND} with --config.data.features={spec.features} into another folder"
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
    """Renames a file once it is on disk, so that no power cut can leave half of it."""
    with writing(path):
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
