"""Tests of random image files, EXIF blocks and folders: the right image or one line (`fuzzing`)."""

import io
import os
import pathlib
import struct
import tempfile

import numpy as np
import pytest
from fuzzing import fuzz
from PIL import Image

from conprediff_jax.common.errors import DataError
from conprediff_jax.common.images import EXTENSIONS, BadImage, list_images, natural_key
from conprediff_jax.data.transforms import decode

KINDS = {  # what Pillow calls a format -> options, and how far a pixel may be off on the average
    "PNG": ({}, 0),
    "BMP": ({}, 0),
    "GIF": ({}, 0),
    "TIFF": ({"compression": "tiff_lzw"}, 0),
    "WEBP": ({"lossless": True}, 0),
    "JPEG": ({"quality": 95, "subsampling": 0}, 4),
    "AVIF": ({"quality": 95, "subsampling": "4:4:4"}, 4),
}
WITH_EXIF = ("PNG", "WEBP", "JPEG")
MODES = ("RGB", "L", "RGBA", "P", "I;16")


def picture(rng):
    """A few colours in squares of 8 pixels, which every format keeps."""
    rows, columns = rng.integers(1, 4, 2)
    colours = rng.integers(0, 256, (4, 3), np.uint8)
    return colours[rng.integers(0, 4, (rows, columns))].repeat(8, 0).repeat(8, 1)


def file_bytes(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **KINDS[kind][0], **options)
    return out.getvalue()


def turned(pixels, orientation):
    """By EXIF 2.3, 4.6.4 A: where the first row and column of the file are seen."""
    pixels = pixels.transpose(1, 0, 2) if orientation >= 5 else pixels
    down, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return pixels[:: -1 if down else 1, :: -1 if right else 1]


def in_mode(pixels, mode, rng):
    """An image of a mode, and the RGB that it shows on white."""
    grey = pixels[..., :1]
    if mode == "RGBA":
        alpha = rng.integers(0, 256, (*pixels.shape[:2], 1), np.uint8)
        seen = (pixels * (alpha / 255) + 255 * (1 - alpha / 255)).round()
        return Image.fromarray(np.concatenate([pixels, alpha], -1)), seen
    if mode == "L":
        return Image.fromarray(grey[..., 0]), grey.repeat(3, -1)
    if mode == "I;16":
        return Image.fromarray(grey[..., 0].astype(np.uint16) * 256 + 7), grey.repeat(3, -1)
    image = Image.fromarray(pixels)
    return (image.quantize(16) if mode == "P" else image), pixels


def decoded(data):
    """The pixels, or None where there is one line that says why not."""
    try:
        image = decode(data)
    except BadImage as error:
        assert str(error) and "\n" not in str(error) and "BytesIO" not in str(error)
        return None
    assert image.mode == "RGB"
    return np.asarray(image)


def damaged(data, rng):
    """The bytes cut short, some of them changed, left out or doubled; or others altogether."""
    start, end = sorted(rng.integers(0, len(data), 2))
    kind = rng.integers(5)
    if kind == 0:
        return data[:start]
    if kind == 1:
        return data[:start] + data[end:]
    if kind == 2:
        return data[:end] + data[start:]
    if kind == 3:
        return data[: rng.integers(0, 16)] + rng.bytes(rng.integers(0, 200))
    changed = bytearray(data)
    for place in rng.integers(0, len(data), rng.integers(1, 4)):
        changed[place] = rng.integers(256)
    return bytes(changed)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
def test_files_of_every_format_whole_and_damaged():
    def check(rng):
        kind = rng.choice(list(KINDS))
        pixels = picture(rng)
        image, expected = in_mode(pixels, rng.choice(MODES) if kind == "PNG" else "RGB", rng)
        data = file_bytes(image, kind)
        found = decoded(data)
        assert found.shape == expected.shape
        off = np.abs(found.astype(float) - expected)
        assert off.mean() <= KINDS[kind][1] and (KINDS[kind][1] or off.max() <= 1)
        found = decoded(damaged(data, rng))
        if kind == "PNG":  # the format that has checksums
            assert found is None or np.abs(found - expected).max() <= 1

    fuzz(check)


def exif_block(orientation, rng):
    """A directory with an orientation among tags of random types, sizes and places."""
    order = rng.choice(["<", ">"])
    tags = rng.choice(np.arange(1, 2**16), rng.integers(0, 8), replace=False)
    entries = [
        struct.pack(f"{order}HHII", tag, rng.integers(0, 16), *rng.integers(0, 2**16, 2))
        for tag in tags
        if tag != 0x0112
    ]
    entry = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)
    entries.insert(rng.integers(len(entries) + 1), entry)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(entries)
    return head + directory + struct.pack(f"{order}I", rng.integers(0, 200)) + rng.bytes(60)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
def test_exif_blocks():
    """Whatever else a block says, the picture is there, and turned where the block can be read."""

    def check(rng):
        pixels, orientation = picture(rng), int(rng.integers(1, 9))
        kind = rng.choice(WITH_EXIF)
        block = exif_block(orientation, rng)
        whole = rng.random() < 0.5
        if not whole:
            block = damaged(block, rng)
        found = decoded(file_bytes(Image.fromarray(pixels), kind, exif=b"Exif\0\0" + block))
        turns = [turned(pixels, turn) for turn in ([orientation] if whole else range(1, 9))]
        assert any(
            turn.shape == found.shape
            and np.abs(turn.astype(float) - found).mean() <= KINDS[kind][1]
            for turn in turns
        )

    fuzz(check)


def random_tree(root, rng):
    """Folders, images, other files, and links to all of them and to nowhere."""
    folders = [root]
    for number in range(rng.integers(0, 6)):
        name = str(
            rng.choice([f"f{number}", f"{number}.png", f".f{number}", "__MACOSX", f"é{number}"])
        )
        folder = folders[rng.integers(len(folders))] / name
        if not folder.exists():
            folder.mkdir()
            folders.append(folder)
    endings = [*EXTENSIONS, ".PNG", ".txt", ".heic", ""]
    for number in range(rng.integers(0, 8)):
        name = rng.choice(["", ".", "img_"]) + str(number) + rng.choice(endings)
        (folders[rng.integers(len(folders))] / name).touch()
    for number in range(rng.integers(0, 6)):
        link = folders[rng.integers(len(folders))] / rng.choice([f"l{number}", f"l{number}.jpg"])
        targets = [
            *folders,
            *(p for f in folders for p in f.iterdir()),
            root / "gone",
            root.parent,
            link,
        ]
        link.symlink_to(targets[rng.integers(len(targets))])


def expected_listing(root):
    """How many images there are in folders that can be reached, and those folders' own paths."""
    reached, todo, count = {}, [(root, True)], 0
    while todo:
        todo.sort(key=lambda item: not item[1])  # own paths first
        folder, own = todo.pop(0)
        real = os.path.realpath(folder)
        if real in reached:
            continue
        reached[real] = folder if own else None
        for name in os.listdir(folder):
            path = folder / name
            if name.startswith(".") or name == "__MACOSX":
                continue
            if path.is_dir() and path.is_symlink() and f"{real}/".startswith(f"{path.resolve()}/"):
                continue  # it would lead back up
            if path.is_dir():
                todo.append((path, own and not path.is_symlink()))
            elif os.path.splitext(name)[1].lower() in EXTENSIONS:
                count += 1
    return count, reached


def test_trees_of_folders_and_links():
    def check(rng):
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder).resolve() / "root"
            root.mkdir()
            random_tree(root, rng)
            count, reached = expected_listing(root)
            if not count:
                with pytest.raises(DataError, match="no images there"):
                    list_images(root)
                return
            names = list_images(root)
            assert len(names) == len(set(names)) == count
            assert names == sorted(names, key=natural_key)
            for name in names:
                assert os.path.lexists(root / name) and not (root / name).is_dir()
                own = reached[os.path.realpath((root / name).parent)]
                assert own in (None, (root / name).parent)

    fuzz(check)
