"""Tests of random mask files: the mask that the file's numbers mean, or one line (`fuzzing`)."""

import io
import pathlib
import struct
import tempfile
import unicodedata
import zlib

import numpy as np
import pytest
from fuzzing import fuzz
from PIL import Image

from conprediff_jax.common.errors import UserError
from conprediff_jax.data.holes import Picture, cut, mask_files
from conprediff_jax.data.masks import POLARITIES, read_mask
from conprediff_jax.data.transforms import decode

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # PNG's kinds of colour
DEPTHS = {
    GREY: (1, 2, 4, 8, 16),
    RGB: (8, 16),
    PALETTE: (1, 2, 4, 8),
    GREY_ALPHA: (8, 16),
    RGBA: (8, 16),
}
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
LABELS = [(8, GREY), (16, GREY), (8, GREY_ALPHA)]  # that may be label maps of 0 and 1
REFUSED = "refused"


# Files, written and understood without Pillow ----------------------------------------------------


def png(samples, kind, depth, *, transparent=None, palette=None, orientation=None):
    """A PNG of samples [height, width, channels], by the standard."""
    height, width, _ = samples.shape
    bits = (samples.reshape(height, -1, 1) >> np.arange(depth)[::-1]) & 1
    rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))]
    if orientation:
        entry = struct.pack(">HHHIHHI", 1, 0x112, 3, 1, orientation, 0, 0)
        chunks.append((b"eXIf", b"MM\0*\0\0\0\x08" + entry))
    if palette is not None:
        chunks.append((b"PLTE", palette.astype(np.uint8).tobytes()))
    if transparent is not None:
        chunks.append((b"tRNS", transparent))
    chunks += [(b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def turned(pixels, orientation):
    """By EXIF 2.3, 4.6.4 A: where the first row and column of the file are seen."""
    pixels = pixels.swapaxes(0, 1) if orientation >= 5 else pixels
    down, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return pixels[:: -1 if down else 1, :: -1 if right else 1]


def meaning(brightness, seen, polarity):
    """The mask by docs/inpainting.md, or that there is none; brightness is 0 to 1."""
    white = brightness > 0.5
    if seen.all():
        return white if polarity == "keep" else ~white
    several = white[seen].any() and not white[seen].all()
    return REFUSED if several or not seen.any() else seen


def some_grey(rng, shape, depth):
    """Numbers on both sides of half, on one, next to it and at the ends; or a label map."""
    half, top = 2 ** (depth - 1), 2**depth
    if depth >= 8 and rng.random() < 0.2:
        return rng.integers(0, 2, shape)
    low, high = [(0, top), (0, half), (half, top)][rng.integers(3)]
    return rng.choice([low, high - 1, *rng.integers(low, high, 2)], shape)


def some_colours(rng, shape, depth):
    """Colours whose brightness is not just about half; often all on one side."""
    most = 2**depth - 1
    low, high = [(0, most + 1), (0, most // 3), (2 * most // 3, most + 1)][rng.integers(3)]
    colours = rng.integers(low, high, (*shape, 3))
    colours[abs(colours @ LUMA - most / 2) < most / 50] = low
    return colours


def random_png(rng, polarity):
    """A file, and the mask that it means."""
    kind = rng.choice(list(DEPTHS))
    depth = int(rng.choice(DEPTHS[kind]))
    most, shape = 2**depth - 1, tuple(rng.integers(1, 6, 2))
    options, seen = {}, np.ones(shape, bool)
    if kind in (GREY, GREY_ALPHA):
        samples = some_grey(rng, shape, depth)[..., None]
    elif kind in (RGB, RGBA):
        samples = some_colours(rng, shape, depth)
    else:
        options["palette"] = some_colours(rng, (int(rng.integers(1, most + 2)),), 8)
        samples = rng.integers(0, len(options["palette"]), (*shape, 1))
    colour = samples
    if kind in (GREY, RGB) and rng.random() < 0.3:  # one colour stands for nothing
        options["transparent"] = struct.pack(f">{len(samples[0, 0])}H", *samples[0, 0])
        seen = (samples != samples[0, 0]).any(-1)
    elif kind == PALETTE and rng.random() < 0.5:
        opacity = rng.choice([0, 127, 128, 255], int(rng.integers(1, len(options["palette"]) + 1)))
        options["transparent"] = opacity.astype(np.uint8).tobytes()
        seen = np.append(opacity > 127, np.ones(256, bool))[samples[..., 0]]
    elif kind in (GREY_ALPHA, RGBA):
        least = rng.choice([0, most // 2 + 1])  # the hole may be elsewhere, or nowhere
        opacity = rng.choice(sorted({least, most // 2 + 1, most}), shape)
        samples, seen = np.concatenate([samples, opacity[..., None]], -1), opacity > most / 2
    if kind == PALETTE:
        brightness = (options["palette"] @ LUMA / 255)[samples[..., 0]]
    elif kind in (RGB, RGBA):
        brightness = colour @ LUMA / most
    else:
        grey = colour[..., 0]
        label_map = (depth, kind) in LABELS and seen.any() and grey[seen].max() <= 1
        brightness = grey if label_map else grey / most
    mask = meaning(brightness, seen, polarity)
    if kind == RGB and depth == 16 and "transparent" in options:
        mask = REFUSED  # Pillow drops the lower bytes
    options["orientation"] = int(rng.integers(1, 9)) if rng.random() < 0.5 else None
    if options["orientation"] and mask is not REFUSED:
        mask = turned(mask, options["orientation"])
    return png(samples, kind, depth, **options), mask


# The outcomes ------------------------------------------------------------------------------------


def outcome(path, polarity="keep"):
    try:
        return read_mask(path, polarity)
    except UserError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        return REFUSED


def check_png(rng):
    polarity = str(rng.choice(POLARITIES))
    data, mask = random_png(rng, polarity)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "mask.png")
        path.write_bytes(data)
        np.testing.assert_array_equal(outcome(path, polarity), mask)
        # Damage is noticed: the checksums of PNGs are looked at.
        damaged = bytearray(data[: rng.integers(1, len(data) + 1)])
        for place in rng.integers(0, len(damaged), rng.integers(0, 4)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        found = outcome(path, polarity)
        assert found is REFUSED or np.array_equal(found, mask)


FORMATS = {  # Pillow's name -> modes that it writes without loss
    "TIFF": ("1", "L", "LA", "RGB", "RGBA", "I;16", "I", "F", "CMYK"),
    "BMP": ("1", "L", "RGB"),
    "GIF": ("L", "1"),
    "WEBP": ("RGB", "RGBA"),
}


def check_other_formats(rng):
    """Black and white in every mode; damaged, some mask or one line: these have no checksums."""
    kind = str(rng.choice(list(FORMATS)))
    mode = str(rng.choice(FORMATS[kind]))
    mask = rng.random(tuple(rng.integers(1, 6, 2))) < rng.choice([0.0, 0.5, 1.0])
    top = {"I;16": 65535, "I": 1, "F": 1.0}.get(mode, 255)
    grey = Image.fromarray((mask * 255).astype(np.uint8))
    types = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    image = (
        Image.fromarray((mask * top).astype(types[mode])) if mode in types else grey.convert(mode)
    )
    data = io.BytesIO()
    image.save(data, kind, **({"lossless": True} if kind == "WEBP" else {}))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "mask")
        path.write_bytes(data.getvalue())
        np.testing.assert_array_equal(outcome(path), mask)
        damaged = bytearray(data.getvalue())
        for place in rng.integers(0, len(damaged), rng.integers(1, 6)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged[: rng.integers(1, len(damaged) + 1)])
        found = outcome(path)
        assert found is REFUSED or (found.dtype == bool and found.ndim == 2)


LETTERS = [
    *"aAbB1 .'%",
    "\u00e9",
    "\u00c9",
    "\u00df",
    "SS",
    "\u1e9e",
    "\u0130",
    "\ud55c",
    "\U0001f600",
    "\u03c2",
]


def respelt(rng, name):
    """The same name as other programs write it."""
    name = name.swapcase() if rng.random() < 0.3 else name
    return unicodedata.normalize(str(rng.choice(["NFC", "NFD"])), name)


def folded(name):
    """By Unicode's definition D145 of names that are the same but for case and composition."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def check_names(rng):
    def name():
        return "n" + "".join(rng.choice(LETTERS, rng.integers(1, 4))).rstrip(". ") + "n"

    asked = list(dict.fromkeys(name() for _ in range(rng.integers(1, 4))))
    written = {respelt(rng, x) for x in asked for _ in range(rng.choice([1, 1, 1, 2]))}
    written |= {name() for _ in range(rng.integers(0, 2))}
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        files = [
            root / (x + str(rng.choice([".png", ".PNG", ".Jpeg", ".bmp", ".tif"]))) for x in written
        ]
        for file in files:
            file.touch()
        wanted = []
        for x in asked:
            exact = [file for file in files if file.stem == x]
            loose = [file for file in files if folded(file.stem) == folded(x)]
            shared = not exact and sum(folded(x) == folded(y) for y in asked) > 1
            wanted += (exact or loose) if len(exact or loose) == 1 and not shared else [REFUSED]
        try:
            assert mask_files(root, asked) == wanted
        except UserError as error:
            assert REFUSED in wanted and "\n" not in str(error) and str(root) in str(error)


def check_pairs(rng):
    """A photo and a mask of one size or two, through `cut`."""
    shape, other = (tuple(rng.integers(1, 4, 2)) for _ in range(2))
    mask = rng.random(other) < 0.5
    picture = Picture("a", np.zeros((*shape, 3), np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "A.PNG")
        path.write_bytes(png(mask[..., None].astype(int), GREY, 1))
        try:
            (hole,) = cut([picture], folder)
            np.testing.assert_array_equal(hole.mask, mask)
        except UserError as error:
            assert shape != other and f"{other[1]} x {other[0]} pixels, but image a" in str(error)


def check_photos(rng):
    """Grey photos of which one brightness is transparent are white there."""
    depth = int(rng.choice([1, 2, 4, 8, 16]))
    grey = rng.integers(0, 2**depth, (*rng.integers(1, 6, 2), 1))
    hidden = int(grey[0, 0, 0])
    data = png(grey, GREY, depth, transparent=struct.pack(">H", hidden))
    expected = np.where(grey == hidden, 255, grey * 255 / (2**depth - 1))
    np.testing.assert_allclose(np.asarray(decode(data), float), expected.repeat(3, -1), atol=1)


@pytest.mark.parametrize(
    "check", [check_png, check_other_formats, check_names, check_pairs, check_photos]
)
def test_fuzz(check):
    fuzz(check)
