"""Data and logs in buckets, for which a file system of fsspec in memory stands here."""

import json

import fsspec
import numpy as np
import pytest
import test_importing
from etils.epath import gpath
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry, known_implementations
from PIL import Image

from conprediff_jax.common.buckets import BucketError
from conprediff_jax.common.errors import DataError
from conprediff_jax.common.files import check_folder, write_text
from conprediff_jax.data import DataSpec
from conprediff_jax.data.importing import beam
from conprediff_jax.data.importing.formats import plan_import
from conprediff_jax.data.importing.parts import Wanted
from conprediff_jax.data.importing.writing import Options, write
from conprediff_jax.data.sources import open_source
from conprediff_jax.runs.checkpoint import CheckpointError, Checkpoints
from conprediff_jax.train.logs import open_logs


class Bucket(MemoryFileSystem):
    """The service of gs:// addresses."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))


@pytest.fixture(autouse=True)
def bucket(monkeypatch):
    monkeypatch.setenv("EPATH_USE_TF", "false")  # as where gcsfs is installed
    gpath._is_tf_installed.cache_clear()
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    for name in Bucket.protocol:
        monkeypatch.setitem(_registry, name, Bucket)
    Bucket.clear_instance_cache()
    files = fsspec.filesystem("gs")
    files.mkdir("bucket")
    yield files
    gpath._is_tf_installed.cache_clear()


def prepared(folder, seed):
    """A prepared data set of noise in two classes. All seeds give files of one size."""
    values = np.random.default_rng(seed).integers(0, 256, (12, 20, 20, 3), np.uint8)
    for index, pixels in enumerate(values):
        path = folder / "images" / "ab"[index % 2] / f"{index}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    images, out = str(folder / "images"), folder / "set"
    write(plan_import(images, Wanted()), images, str(out), Options(held_out=0.3))
    return out


def read(name, **asked):
    source = open_source(str(name), **asked)
    records = [source[index] for index in range(len(source))]
    return source.class_names, [(record["image"], record["label"]) for record in records]


def test_a_data_set_in_a_bucket_is_that_of_the_folder_and_is_copied_once(tmp_path, bucket):
    folder, cache = prepared(tmp_path / "first", 0), tmp_path / "cache"
    copies = cache / "gs" / "bucket" / "photos"
    bucket.put(f"{folder}/", "gs://bucket/photos/", recursive=True)
    asked = {"split": "test", "cache_dir": str(cache)}
    assert read("gs://bucket/photos", **asked) == read(folder, split="test")
    assert [path.name for path in copies.glob("*array_record*")] == [
        "set-test.array_record-00000-of-00001"  # and no other split
    ]
    written = {path: path.stat().st_mtime_ns for path in copies.glob("set-test*")}
    part = {"split": "train[:50%]", "cache_dir": str(cache)}
    assert read("gs://bucket/photos/", **part) == read(folder, split="train[:50%]")
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())

    other = prepared(tmp_path / "second", 1)
    bucket.put(f"{other}/", "gs://bucket/photos/", recursive=True)
    everything = {"split": "train+test", "cache_dir": str(cache)}
    assert read("gs://bucket/photos", **everything) == read(other, split="train+test")


@pytest.mark.parametrize("by_beam", [False, True])
@pytest.mark.parametrize("make", [test_importing.make_tars, test_importing.make_parquet])
def test_an_import_from_one_bucket_to_another_is_that_of_a_folder(tmp_path, bucket, make, by_beam):
    by = None
    if by_beam:
        pytest.importorskip("apache_beam")
        by = beam.Beam("DirectRunner", test_importing.IN_MEMORY)
    bucket.put(f"{make(tmp_path / 'in')}/", "gs://bucket/in/", recursive=True)
    options = Options(held_out=0.4, drop_duplicates=True)
    expected = write(
        plan_import(str(tmp_path / "in"), Wanted()), "in", str(tmp_path / "x"), options
    )
    plan = plan_import("gs://bucket/in", Wanted())
    assert write(plan, "in", "gs://bucket/x", options, by) == expected
    assert write(plan, "in", "gs://bucket/x", options) == expected  # which is there
    files = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    assert files == {
        name.rpartition("/")[2]: bucket.cat_file(name) for name in bucket.find("gs://bucket/x")
    }
    with pytest.raises(DataError, match=r"gs://bucket/x: holds no \.tar or \.parquet files"):
        plan_import("gs://bucket/x", Wanted())


def test_half_a_shard_never_has_its_name(tmp_path, bucket, monkeypatch):
    bucket.put(f"{prepared(tmp_path, 0)}/", "gs://bucket/photos/", recursive=True)

    def get_half(self, source, path, **_):
        with open(path, "wb") as file:
            file.write(self.cat_file(source)[: -1 if "array_record" in source else None])

    monkeypatch.setattr(Bucket, "get_file", get_half)
    line = r"^gs://bucket/photos/set-train\S+: \d+ bytes came, and it has \d+: try again$"
    with pytest.raises(BucketError, match=line):
        read("gs://bucket/photos", cache_dir=str(tmp_path / "cache"))
    shards = list(tmp_path.glob("cache/**/*array_record*"))
    assert [path.suffix for path in shards] == [".partial"]


def test_what_is_wrong_with_a_bucket_is_one_line(tmp_path, bucket, monkeypatch):
    def refuse(name, line, error=BucketError, **asked):
        with pytest.raises(error, match=line):
            open_source(name, cache_dir=str(tmp_path), **asked)

    bucket.put(f"{prepared(tmp_path, 0)}/", "gs://bucket/photos/", recursive=True)
    refuse("gs://other/photos", "^gs://other/photos: there is no such bucket or folder in it$")
    refuse("gs://bucket/photos", "^gs://bucket/photos: Unknown split 'dev'", DataError, split="dev")
    write_text("gs://bucket/plain/a.png", "")
    refuse(
        "gs://bucket/plain", r"nothing else in a bucket is read at random.* --from=\S+", DataError
    )
    refuse("az://bucket/photos", "^az://bucket/photos: data are read from this machine", DataError)
    with pytest.raises(
        ValueError, match=r"^latents is 'gs://bucket/latents'; latents are read from"
    ):
        DataSpec(name="gs://bucket/photos", latents="gs://bucket/latents")
    with pytest.raises(CheckpointError, match=r"^s3://bucket/run: .* orbax has no access to s3://"):
        Checkpoints("s3://bucket/run", read_only=True)
    with pytest.raises(BucketError, match=r"^gs://other/run: there is no such bucket"):
        Checkpoints("gs://other/run", read_only=True)

    def deny(*_, **__):
        raise OSError("Anonymous caller does not have storage.objects.create access")

    monkeypatch.setattr(Bucket, "pipe_file", deny)
    with pytest.raises(BucketError, match=r"^gs://bucket/run: .*access; log in by `gcloud auth"):
        check_folder("gs://bucket/run", "--workdir")
    monkeypatch.delitem(_registry, "gs")
    monkeypatch.setitem(known_implementations, "gs", {"class": "none.None", "err": ""})
    refuse("gs://bucket/photos", r'this needs gcsfs, .*: pip install -e "\.\[gcs\]"$')


def test_the_logs_of_a_run_are_in_its_bucket(bucket):
    for first_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # the second start does step 3 again
        logs = open_logs("gs://bucket/run", [], first_step)
        for step in steps:
            for log in logs:
                log.scalars(step, {"loss": step + first_step / 10})
        for log in logs:
            log.close()
    lines = bucket.cat_file("gs://bucket/run/metrics.jsonl").decode().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 3.2), (4, 4.2)]
    names = [name.rpartition("/")[2] for name in bucket.find("gs://bucket/run")]
    assert len([name for name in names if name.startswith("events.out")]) == 2 and len(names) == 3
