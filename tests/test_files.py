"""Tests of writing: a file is complete or absent, and a failure is reported in one line."""

import os
import pathlib
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from disk import little_room

from conprediff_jax.common import images
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import (
    WriteError,
    check_file,
    check_folder,
    write_atomically,
    write_new,
    write_text,
)
from conprediff_jax.data import latents

WRITERS = {
    "text": lambda path: write_text(path, "b" * 100_000),
    "npz": lambda path: images.write_npz(path, np.ones((4, 100, 100, 3), np.uint8)),
    "png": lambda path: images.write_png(
        path, np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_without_room_the_old_file_stays_and_nothing_else(kind, tmp_path):
    path = tmp_path / "file"
    write_text(path, "a")
    with little_room(), pytest.raises(WriteError, match=rf"^cannot write {path}: [^\n]+$"):
        WRITERS[kind](path)
    assert os.listdir(tmp_path) == ["file"] and path.read_text() == "a"


def test_latents_without_room_are_no_shard(tmp_path):
    """Another library writes these files and raises its own errors."""
    manifest = latents.Manifest(
        fingerprint="", model={}, data={}, class_names=None, flip=False, shape=(10, 10, 4),
        count=100, shard_size=100, scale=1.0, scale_source="",
    )  # fmt: skip
    latents.begin(tmp_path, manifest)
    record = {"latent": np.random.default_rng(0).normal(size=(10, 10, 4))}
    shard = tmp_path / manifest.shard_name(0)
    with little_room(), pytest.raises(WriteError, match=f"^cannot write {shard}: File too large$"):
        latents.write_shard(tmp_path, manifest, 0, [record] * 100)
    assert manifest.missing(tmp_path) == [0]
    latents.write_shard(tmp_path, manifest, 0, [record] * 100)
    assert manifest.missing(tmp_path) == []


def test_of_many_that_write_a_new_file_at_once_one_does_and_it_is_whole(tmp_path):
    many, path = 16, tmp_path / "file"
    start = threading.Barrier(many)

    def write(number):
        start.wait()
        return write_new(path, lambda file: file.write(bytes([number]) * 100_000))

    with ThreadPoolExecutor(many) as pool:
        wrote = list(pool.map(write, range(many)))
    assert wrote.count(True) == 1 and os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == bytes([wrote.index(True)]) * 100_000
    with little_room(), pytest.raises(WriteError):
        write_new(tmp_path / "other", lambda file: file.write(bytes(100_000)))
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_is_not_written_where_a_folder_is(tmp_path):
    check_file(tmp_path / "new" / "a.png", "--out")
    with pytest.raises(UserError, match=f"^--out={tmp_path}: is a folder, and must be the name"):
        check_file(tmp_path, "--out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/file is a file, and must be a folder"):
        check_file(tmp_path / "file" / "a.png", "--out")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=f"link is a link to {tmp_path}/gone, which does not exist"):
        check_file(tmp_path / "link" / "a.png", "--out")


def test_what_is_in_the_way_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match=f"cannot write {tmp_path}/folder: .*is a directory"):
        write_text(tmp_path / "folder", "a")
    write_text(tmp_path / "file", "a")
    with pytest.raises(WriteError, match=f"cannot write {tmp_path}/file/b: "):
        write_text(tmp_path / "file" / "b", "a")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_name_may_be_as_long_as_the_file_system_takes_it(tmp_path):
    write_text(tmp_path / ("a" * 255), "a")
    with pytest.raises(WriteError, match="File name too long"):
        write_text(tmp_path / ("a" * 256), "a")


def test_errors_that_are_not_of_writing_stay_what_they_are(tmp_path):
    def fail(file):
        raise KeyError("a")

    with pytest.raises(KeyError):
        write_atomically(tmp_path / "a", fail)
    assert not os.listdir(tmp_path)


READ_ONLY = """
import os
from conprediff_jax.common.files import check_folder, write_text
if not os.getuid():
    os.setuid(65534)  # root may write anywhere
for call in (lambda: check_folder("a/b", "--out"), lambda: write_text("a/b", "")):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_read_only_folders(tmp_path):
    (tmp_path / "a").mkdir(mode=0o555)
    tmp_path.chmod(0o755)
    root = pathlib.Path(__file__).parent.parent
    said = subprocess.run(
        [sys.executable, "-c", READ_ONLY],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert said == [
        "--out=a/b: nothing can be written in a: it is read-only",
        "cannot write a/b: Permission denied",
    ]


def test_a_file_is_no_folder(tmp_path):
    write_text(tmp_path / "a", "")
    with pytest.raises(UserError, match=r"--out=.*/a/b: .*/a is a file, and must be a folder"):
        check_folder(tmp_path / "a" / "b", "--out")
