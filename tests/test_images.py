"""Tests of image files: the order of listings, the folders that are read, and decoding."""

import io
import itertools
import os
import random

import numpy as np
import pytest
from absl import logging as absl_logging
from PIL import ExifTags, Image, ImageOps

from conprediff_jax.common.errors import DataError, FieldError
from conprediff_jax.common.images import (
    BadImage,
    check_grid,
    list_images,
    natural_key,
    output_ending,
    read_image,
    upright,
    write_picture,
)

NAMES = [  # in order
    "01.png",
    "1.png",
    "2.png",
    "10.png",
    "20/3.png",
    "a.png",
    "a/1.png",
    "a/2.png",
    "a/10/1.png",
    "a2.png",
    "a10.png",
    "a-b/1.png",
    "a-b/2.png",
    "b.png",
    "img_2.jpg",
    "img_10.jpg",
    "x9999999999999999999999.png",
    "x10000000000000000000000.png",
]


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(absl_logging, "warning", lambda text, *values: lines.append(text % values))
    return lines


def test_names_are_sorted_as_people_number_them():
    shuffled = random.Random(0).sample(NAMES, len(NAMES))
    assert sorted(shuffled, key=natural_key) == NAMES
    assert natural_key("9" * 10_000 + "²٣.png") > natural_key("9.png")  # no number is too long
    composed, decomposed = "\u00e9" + "2.png", "e\u0301" + "10.png"
    assert sorted([decomposed, composed], key=natural_key) == [composed, decomposed]


def test_endings_do_not_change_the_order():
    """So that photos and what was made of them, in files of another kind, are paired in order."""
    stems = ["a", "a-1", "a-10", "a-2", "a b", "a.b", "b/a", "b/a-1", "b-1/a"]
    orders = [
        [os.path.splitext(name)[0] for name in sorted(names, key=natural_key)]
        for names in ([f"{stem}{ending}" for stem in stems] for ending in (".png", ".webp"))
    ]
    assert orders[0] == orders[1]


def test_only_image_files_are_listed(tmp_path, warnings):
    for name in ["2.PNG", "10.jfif", "a/1.jpe", "a/3.tif", "a/4.heic", "a/notes.txt", "5.HEIC"]:
        touch(tmp_path / name)
    for name in [".thumbnails/1.png", "a/.ipynb_checkpoints/1.png", "__MACOSX/1.png", "._2.png"]:
        touch(tmp_path / name)
    (tmp_path / "b.png").mkdir()
    os.mkfifo(tmp_path / "c.png")
    assert list_images(tmp_path) == ["2.PNG", "10.jfif", "a/1.jpe", "a/3.tif"]
    assert warnings == [
        f"{tmp_path}: left out 2 hidden folders and images, such as .thumbnails",
        f"{tmp_path}: left out 2 .heic, which are not read",
    ]


def test_no_images_are_an_error_that_says_what_is_there(tmp_path):
    touch(tmp_path / "1.heic")
    with pytest.raises(DataError, match=r"no images there \(\.png, .*; there are 1 \.heic"):
        list_images(tmp_path)
    with pytest.raises(DataError, match="absent: cannot be read: No such file or directory"):
        list_images(tmp_path / "absent")


def test_links_are_followed_and_no_folder_is_read_twice(tmp_path, warnings):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for path in (root / "b/1.png", root / "b/2.png", elsewhere / "3.png", elsewhere / "x/4.png"):
        touch(path)
    (root / "b/up").symlink_to(root)
    (root / "b/out").symlink_to(tmp_path)  # holds root, and what is not meant
    (root / "a").symlink_to("b")  # stands before b in the order, and yet b keeps its own name
    (root / "cat").symlink_to(elsewhere)
    (root / "one.png").symlink_to(elsewhere / "3.png")
    (root / "gone.png").symlink_to("nowhere")
    (root / "itself.png").symlink_to("itself.png")
    assert list_images(root) == [
        *("b/1.png", "b/2.png", "cat/3.png", "cat/x/4.png", "gone.png", "itself.png", "one.png")
    ]
    assert any(line.startswith(f"{root}/a: left out") for line in warnings)


def test_many_links_to_each_other_end(tmp_path):
    folders = [tmp_path / f"{number}" for number in range(12)]
    for folder in folders:
        touch(folder / "x.png")
    for one, other in itertools.permutations(folders, 2):
        (one / other.name).symlink_to(other)
    assert list_images(tmp_path) == [f"{number}/x.png" for number in range(12)]


def picture(mode="RGB"):
    return Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10).convert(mode)


def file_bytes(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def with_orientation(value):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    exif[ExifTags.Base.Make] = "a camera"
    return exif


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_by_its_orientation_once(orientation, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = file_bytes(picture(), kind, exif=with_orientation(orientation), **options)
    # By hand: what the viewer's top row and left column are in the file (EXIF 2.3, 4.6.4 A).
    pixels = np.asarray(picture())
    pixels = pixels.transpose(1, 0, 2) if orientation >= 5 else pixels
    down = orientation in (3, 4, 7, 8)
    right = orientation in (2, 3, 6, 7)
    expected = pixels[:: -1 if down else 1, :: -1 if right else 1]
    turned = read_image(data)
    np.testing.assert_array_equal(np.asarray(turned), expected)
    np.testing.assert_array_equal(np.asarray(upright(turned)), expected)


def test_a_tag_of_a_wrong_type_does_not_matter():
    # A double in ExifVersion, which is text: Pillow reads it, and fails where it writes it.
    entry = [
        b"\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00",
        b"\x69\x87\x04\x00\x01\x00\x00\x00",
    ]
    block = (
        b"II*\x00\x08\x00\x00\x00\x02\x00" + entry[0] + entry[1] + b"\x26\x00\x00\x00" + b"\0" * 4
    )
    block += b"\x01\x00\x00\x90\x0c\x00\x01\x00\x00\x00\x38\x00\x00\x00" + b"\0" * 4
    data = file_bytes(picture(), exif=b"Exif\x00\x00" + block + np.float64(2.3).tobytes())
    with pytest.raises(TypeError):
        ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(read_image(data)), np.rot90(picture(), -1))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"not an image", "not a known kind of image"),
        (file_bytes(picture())[:50], "image file is truncated"),
    ],
    ids=["empty", "text", "cut short"],
)
def test_bad_bytes_have_a_reason(data, reason):
    with pytest.raises(BadImage, match=f"^{reason}") as caught:
        read_image(data)
    assert "\n" not in str(caught.value) and "BytesIO" not in str(caught.value)


def test_the_ending_of_an_output_decides_its_format(tmp_path):
    smooth = np.linspace(0, 255, 40 * 40 * 3).reshape(40, 40, 3).astype(np.uint8)
    for name, kind, most in (("a.PNG", "PNG", 0), ("a.webp", "WEBP", 0), ("a.jpg", "JPEG", 4)):
        write_picture(tmp_path / name, smooth, "by this")
        with Image.open(tmp_path / name) as found:
            assert found.format == kind
            assert np.abs(np.asarray(found).astype(int) - smooth).max() <= most
    assert Image.open(tmp_path / "a.PNG").text == {"settings": "by this"}
    (tmp_path / "there.gif").mkdir()
    for name in ("images", "guidance_1.5", "name.tif/", str(tmp_path / "there.gif")):
        assert output_ending(name) == ""
    assert output_ending("x.y.NPZ") == ".npz"
    for name in ("grid.gif", "grid.jpgg", "1.tif"):
        with pytest.raises(FieldError, match=r"its ending must be one of \.png, \.jpg, "):
            output_ending(name)
    check_grid("a.png", 10**6, (64, 64))
    check_grid("a.webp", 248**2, (64, 64))
    with pytest.raises(FieldError, match=r"16436 pixels a side, and .* 16383 at most"):
        check_grid("a.webp", 249**2, (32, 32))
