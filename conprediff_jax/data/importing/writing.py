"""Writes what is imported as a data set of TFDS in array_record files, part by part.

    OUT/
        NAME-SPLIT.array_record-00000-of-00003, ...     a shard for each part and split
        dataset_info.json, features.json                what TFDS reads; written last
        report.json, report.txt, contact_sheet.png, ... what was imported, and what was left out
        unfinished/                                     while the import goes on
            plan.json                                   what is imported, to compare with
            00000-train.array_record, 00000.json        a finished part: its shards, its counts

A part counts as done when its JSON file is there, which is written once its shards have their
names. An interrupted import therefore goes on with the parts that are not done, and ends with the
same files, byte for byte, as one that was never interrupted. Parts depend on nothing but the plan
and the options, so that one process may write them in turn, or many machines at once (`beam`).

OUT may be in a bucket. array_record writes local files only, so a shard is copied there when it is
complete.

A record has the bytes of its image, as they were or of a smaller one, `label`, `text` (a list of
captions) and the features that were asked for, as texts. Of the split `train`, a share may be held
out as the split `test`: those images whose SHA-256 is below the share, so that equal images are on
the same side, and more images later do not change the side of those before.
"""

import collections
import contextlib
import dataclasses
import json
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from conprediff_jax.common import extras, lock
from conprediff_jax.common.errors import DataError
from conprediff_jax.common.files import is_address, write_text, writing
from conprediff_jax.common.images import warned
from conprediff_jax.common.progress import ProgressLine
from conprediff_jax.data.importing import counting
from conprediff_jax.data.importing.inspecting import Limits, Seen, inspect
from conprediff_jax.data.importing.parts import Part, Plan

UNFINISHED, PLAN, REPORT = "unfinished", "plan.json", "report.json"
HELD_OUT = "test"  # the split of the images that are held out
_INFO = "dataset_info.json"
_OPTIONS = "group_size:1,uncompressed"  # for random access; images hardly compress
_AHEAD = 64  # records that are decoded ahead
_AT_ONCE = 16  # small files that are read, or files that are moved, at the same time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How data are imported.

    Attributes:
        held_out: Share of the split `train` that becomes the split `test`, by a hash.
        drop_duplicates: Whether an image whose bytes came before is left out.
        limits: Which images are left out for their shape.
        size: Pixels to which the shorter side of larger images is reduced; 0 to keep all as they
            are.
        threads: Number of threads that decode.
    """

    held_out: float = 0.0
    drop_duplicates: bool = False
    limits: Limits = dataclasses.field(default_factory=Limits)
    size: int = 0
    threads: int = 8

    def described(self) -> dict[str, Any]:
        """The options that the files depend on, in types of JSON."""
        fields = dataclasses.asdict(self)
        del fields["threads"]
        return fields


Parts = Callable[[Plan, epath.Path, Options], None]  # writes all parts that are not done


def write(
    plan: Plan, source: str, out: str, options: Options, write_parts: Parts | None = None
) -> dict[str, Any]:
    """Imports data, or goes on with an interrupted import of the same data.

    Args:
        plan: What is imported.
        source: What was named, for the report.
        out: Folder to write to.
        options: How the data are imported.
        write_parts: What writes the parts; None for one after another in this process.

    Returns:
        The content of `report.json`.

    Raises:
        DataError: The folder holds other things, or no record is left.
        WriteError: Nothing can be written there.
    """
    folder = epath.Path(out).expanduser()
    with lock.locked(folder):
        if (folder / _INFO).exists() and (folder / REPORT).exists():
            report = json.loads((folder / REPORT).read_text())
            _check_same(folder, report, {"source": source, **options.described()})
            return report
        _begin(folder, {"source": source, **options.described(), **plan.described()})
        aside = folder / UNFINISHED
        (write_parts or _one_by_one)(plan, aside, options)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            files = [counts_of(aside, number) for number in range(len(plan.parts))]
            counts = list(pool.map(lambda file: json.loads(file.read_text()), files))
        report = _finish(folder, plan, counts, {"source": source, **options.described()})
    return report


def _one_by_one(plan: Plan, aside: epath.Path, options: Options) -> None:
    """Writes the parts in this process, with a line of the log now and then."""
    line = ProgressLine(len(plan.parts), "parts")
    for number in range(len(plan.parts)):
        write_part(plan, number, aside, options)
        line.add(1)


def _check_same(folder: epath.Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Checks that an import goes on with what an earlier one began.

    Raises:
        DataError: It differs.
    """
    differing = [key for key in ours if theirs.get(key) != ours[key]]
    if differing:
        key = differing[0]
        values = f" ({theirs.get(key)} there, {ours[key]} here)" if key != "parts" else ""
        raise DataError(
            f"{folder} holds an import of other data, by its {key}{values}; name another folder, "
            "or delete it"
        )


def _begin(folder: epath.Path, described: dict[str, Any]) -> None:
    """Makes the folder of an unfinished import, or checks that it is one of the same data."""
    there = folder.iterdir() if folder.exists() else ()  # nothing is a folder of a bucket, too
    others = [path.name for path in there if path.name not in (UNFINISHED, lock.NAME)]
    stored = folder / UNFINISHED / PLAN
    if stored.exists():
        _check_same(folder, json.loads(stored.read_text()), described)
        return
    if others:
        raise DataError(f"{folder} holds other things ({others[0]}); name a folder of its own")
    write_text(stored, json.dumps(described, indent=1))


def counts_of(aside: epath.Path, number: int) -> epath.Path:
    """The file that holds the counts of a part, and is there when the part is done."""
    return aside / f"{number:05}.json"


def write_part(plan: Plan, number: int, aside: epath.Path, options: Options) -> None:
    """Imports a part unless that is done.

    Should two machines write the same part, each has files of its own until they are complete.

    Args:
        plan: What is imported.
        number: Number of the part.
        aside: Folder of the unfinished import.
        options: How the data are imported.

    Raises:
        DataError: The part cannot be read at all.
        WriteError: Nothing can be written there.
    """
    if counts_of(aside, number).exists():
        return
    part = plan.parts[number]
    counts = counting.Counts()
    writers: dict[str, ArrayRecordWriter] = {}
    serialize, own = _serializer(plan), uuid.uuid4().hex
    with _local(aside) as scratch:
        try:
            for record, seen in _inspected(part, options):
                counts.add(record, seen)
                if seen.left_out:
                    continue
                split = _side(part.split, seen.digest, options.held_out)
                with writing(aside):
                    if split not in writers:
                        file = scratch / f"{own}-{split}"
                        writers[split] = ArrayRecordWriter(str(file), _OPTIONS)
                    image = seen.reduced or record["image"]
                    writers[split].write(serialize(record | {"image": image}))
                counts.kept(split, record, seen)
        finally:
            with writing(aside):
                for writer in writers.values():
                    writer.close()
        for split in writers:
            _move(scratch / f"{own}-{split}", _shard(aside, number, split))
    write_text(counts_of(aside, number), json.dumps(counts.to_json()))


@contextlib.contextmanager
def _local(folder: epath.Path) -> Iterator[epath.Path]:
    """A folder for files that `_move` moves to a folder: itself, unless that is in a bucket."""
    if not is_address(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield epath.Path(scratch)


def _move(path: epath.Path, target: epath.Path) -> None:
    """Moves a file to its name, from this machine or in a bucket."""
    with writing(target):
        if is_address(target) and not is_address(path):
            path.copy(target, overwrite=True)
        else:
            path.replace(target)


def _shard(aside: epath.Path, number: int, split: str) -> epath.Path:
    return aside / f"{number:05}-{split}.array_record"


def _inspected(part: Part, options: Options) -> Iterator[tuple[dict[str, Any], Seen]]:
    """The records of a part in order, inspected by threads a few records ahead."""
    pending = collections.deque()
    with ThreadPoolExecutor(options.threads) as pool:
        for record in part.read():
            pending.append((record, pool.submit(inspect, record, options.limits, options.size)))
            if len(pending) >= _AHEAD:
                record, seen = pending.popleft()
                yield record, seen.result()
        for record, seen in pending:
            yield record, seen.result()


def _side(split: str, digest: bytes, held_out: float) -> str:
    """The split of an image, after a share of `train` is held out."""
    held = int.from_bytes(digest[:8], "big") < held_out * 2**64
    return HELD_OUT if held and split == "train" else split


def _features(plan: Plan, class_names: Sequence[str] = ()) -> Any:
    """The features of a data set, a `tfds.features.FeaturesDict`."""
    tfds = extras.tensorflow_datasets()

    features = {name: tfds.features.Text() for name in plan.keep}
    features["image"] = tfds.features.Image(shape=(None, None, 3))
    if plan.text is not None:
        features["text"] = tfds.features.Sequence(tfds.features.Text())
    if plan.label is not None:
        names = {"names": list(class_names)} if class_names else {"num_classes": 1}
        features["label"] = tfds.features.ClassLabel(**names)
    return tfds.features.FeaturesDict(features)


def _serializer(plan: Plan) -> Any:
    """A function from a record to bytes, which do not depend on the number of classes.

    Nor do they depend on the process, as the order of features in a record otherwise does.
    """
    tfds = extras.tensorflow_datasets()
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = dict(_features(plan))
    if plan.label is not None:
        features["label"] = tfds.features.Scalar(np.int64)
    features = tfds.features.FeaturesDict(features)

    serializer = ExampleSerializer(features.get_serialized_info())

    def serialize(record: dict[str, Any]) -> bytes:
        encoded = features.encode_example({name: record[name] for name in features})
        return serializer.get_tf_example(encoded).SerializeToString(deterministic=True)

    return serialize


def _finish(
    folder: epath.Path, plan: Plan, counts: Sequence[dict[str, Any]], told: dict[str, Any]
) -> dict[str, Any]:
    """Drops duplicates, names the shards, and writes what TFDS reads and the report."""
    aside = folder / UNFINISHED
    again, duplicates = counting.duplicates(counts)
    report = told | counting.merged(counts)
    report["duplicates"] = duplicates.to_json()
    dropped = again if told["drop_duplicates"] else {}
    shards: dict[str, list[tuple[epath.Path, int]]] = {}
    for number, part in enumerate(counts):
        for split, digests in part["digests"].items():
            path = _shard(aside, number, split)
            drop = dropped.get((number, split), set())
            if drop and path.exists():
                _rewrite(path, len(digests), drop)
            if len(digests) > len(drop):
                shards.setdefault(split, []).append((path, len(digests) - len(drop)))
    if not shards:
        reasons = "; ".join(entry["reason"] for entry in report["left_out"][:3])
        raise DataError(f"{told['source']}: no record is left: {reasons or 'there are none'}")
    report["splits"] = {split: sum(n for _, n in parts) for split, parts in sorted(shards.items())}
    report["class_names"] = _class_names(plan, report["labels"])
    report["said"] = list(warned())
    _place(folder, plan, shards, report)
    write_text(folder / "report.txt", "\n".join(counting.lines(report)) + "\n")
    write_text(folder / REPORT, json.dumps(report, indent=1, ensure_ascii=False))
    (aside / _INFO).replace(folder / _INFO)
    for path in list(aside.iterdir()):
        path.unlink()
    if not is_address(aside):  # a bucket has no empty folders
        aside.rmdir()
    return report


def _rewrite(path: epath.Path, count: int, drop: set[int]) -> None:
    """Writes a shard of `count` records again without some of them, unless that was done before."""
    with _local(path.parent) as scratch, writing(path):
        whole, partial = scratch / path.name, scratch / f"{path.name}.partial"
        if whole != path:
            path.copy(whole)
        records = ArrayRecordDataSource([str(whole)])
        if len(records) < count:
            return
        writer = ArrayRecordWriter(str(partial), _OPTIONS)
        for place in range(len(records)):
            if place not in drop:
                writer.write(records[place])
        writer.close()
        _move(partial, path)


def _class_names(plan: Plan, labels: Iterable[str]) -> list[str] | None:
    """The names of the classes; numbers as texts where there are no names."""
    if plan.label is None:
        return None
    return list(plan.class_names or map(str, range(max(map(int, labels)) + 1)))


def _place(
    folder: epath.Path,
    plan: Plan,
    shards: dict[str, list[tuple[epath.Path, int]]],
    report: dict[str, Any],
) -> None:
    """Names the shards as TFDS does, writes its files beside them, and moves all but one of them.

    `dataset_info.json` stays, so that the data set is there when this file is.
    """
    tfds = extras.tensorflow_datasets()

    aside = folder / UNFINISHED
    name = "_".join(re.findall(r"[a-z0-9]+", folder.resolve().name.lower()))
    name = name if name[:1].isalpha() else f"images_{name}".rstrip("_")
    template = tfds.core.ShardedFileTemplate(
        data_dir=aside, dataset_name=name, filetype_suffix="array_record"
    )
    infos, finals = [], ["features.json"]
    for split, paths in sorted(shards.items()):
        size = 0
        for number, (path, _) in enumerate(paths):
            final = f"{name}-{split}.array_record-{number:05}-of-{len(paths):05}"
            for earlier in (path, folder / final):  # by an import that was stopped just here
                if earlier.exists():
                    earlier.replace(aside / final)
            size += (aside / final).stat().length
            finals.append(final)
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[count for _, count in paths],
                num_bytes=size,
                filename_template=template.replace(split=split),
            )
        )
    with writing(folder):
        tfds.folder_dataset.write_metadata(
            data_dir=aside,
            features=_features(plan, report["class_names"] or ()),
            split_infos=infos,
            filename_template=template,
            check_data=False,
            description=f"Imported from {report['source']} by conprediff_jax.prepare.",
        )
        finals += [path.name for path in aside.glob("*.labels.txt")]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda final: (aside / final).replace(folder / final), finals))
