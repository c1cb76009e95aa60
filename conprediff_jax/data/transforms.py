"""Turns the bytes of an image file into uint8 pixels of a given size.

    decode -> RGB on white -> crop the largest part of the right shape -> resize it

Grey images (one channel) are the luminance of RGB (ITU-R 601-2, as Pillow converts it). With four
channels, transparency is kept, and colours are averaged by their opacity.

To crop first and then resize gives the same picture as to resize first, and costs less. The filter
is Pillow's Lanczos, whose support grows with the reduction (antialiasing). A reduction by a whole
number uses Pillow's box filter, the area average, which causes no ringing at the hard edges of
drawings. JPEGs that need no resizing, such as those of data prepared at their final size, are
decoded by simplejpeg where it is installed: to the same pixels, and without Pillow's copy. Larger
ones are decoded at a reduced scale if that leaves at least twice the final size, so that the filter
makes the last reduction.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import Image, ImageEnhance

from conprediff_jax.common.errors import first_line
from conprediff_jax.common.images import BadImage, as_picture, height_and_width, read_image
from conprediff_jax.data import aspects, sources
from conprediff_jax.data.tokenizers import Tokenizer

try:
    import simplejpeg
except ImportError:  # there are no wheels of it for some machines
    simplejpeg = None

_JPEG, _EXIF_OR_XMP, _PIXELS = b"\xff\xd8", b"\xff\xe1", b"\xff\xda"  # parts of a JPEG
_TURNING = (b"Exif\0\0", b"Orientation")  # a sign of EXIF or XMP, which may turn the image
CROPS = ("center", "random")
_TINTS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
DRAWS = 8  # numbers that are drawn for every example
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # modes of Pillow by the number of channels


def decode(data: bytes, at_least: int = 0, channels: int = 3) -> Image.Image:
    """Decodes an image file, upright by its EXIF orientation.

    Args:
        data: Bytes of an image file, which may be grey (8 or 16 bits), of a palette, transparent,
            or CMYK.
        at_least: If positive, a JPEG may be decoded at a reduced scale, with sides no shorter than
            this many pixels.
        channels: 3 for RGB and 1 for grey, both on a white background; 4 for RGBA.

    Raises:
        BadImage: The file is no image or damaged, or its range of values is not known.
    """
    image = read_image(data, at_least)
    if image.mode.startswith("I;16"):  # Pillow would clip it at 255
        levels, hidden = np.asarray(image), image.info.get("transparency", -1)
        image = Image.fromarray(np.where(levels == hidden, 255, levels >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BadImage("its values have 32 bits, and which of them is white is not known")
    try:
        if channels == 4:
            return image.convert("RGBA")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        image = image if image.mode == "RGB" else image.convert("RGB")
        return image if channels == 3 else image.convert(MODES[channels])
    except ValueError as error:  # such as Lab, which Pillow does not convert
        raise BadImage(str(error)) from error


def cropped(
    image: Image.Image,
    size: int | tuple[int, int],
    offset: float = 0.5,
    *,
    share: float = 1.0,
    other: float | None = None,
) -> UInt8[np.ndarray, "height width channels"]:
    """A part of the image that has the shape of `size`, resized to it.

    Args:
        image: The image.
        size: Height and width of the result, or the side of a square.
        offset: Place of the part, from 0 (left or at the top) to 1. The largest part leaves only
            one direction to move in.
        share: Side of the part, as a share of the largest part's.
        other: Place from 0 (at the top) to 1, where it is not `offset` as well.
    """
    size = height_and_width(size)
    return resized(image, size, _box(image.size, size, offset, share, other))


def _box(
    image: tuple[int, int],
    size: tuple[int, int],
    offset: float,
    share: float = 1.0,
    other: float | None = None,
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a part of an image, given by its width and height."""
    (across, down), (height, width) = image, size
    # The part has whole pixels; that of a square has exactly the shorter side.
    wide = min(across, round(down * width / height))
    high = min(down, round(across * height / width))
    wide, high = max(round(share * wide), 1), max(round(share * high), 1)
    left = round(offset * (across - wide))
    top = round((offset if other is None else other) * (down - high))
    return left, top, left + wide, top + high


def cut_from_jpeg(
    data: bytes,
    size: tuple[int, int],
    offset: float,
    out: UInt8[np.ndarray, "height width 3"] | None = None,
) -> UInt8[np.ndarray, "height width 3"] | None:
    """What `decode` and `cropped` make of a JPEG that needs neither resizing nor turning.

    Args:
        data: Bytes of an image file.
        size: Height and width of the result.
        offset: See `cropped`.
        out: Memory for the pixels, which is used if none of them are cut off.

    Returns:
        The same pixels; None for all other files, for damaged ones, and without simplejpeg.
    """
    if simplejpeg is None or not data.startswith(_JPEG):
        return None
    if _may_turn(data):
        return None
    try:
        down, across, colours, _ = simplejpeg.decode_jpeg_header(data)
        left, top, right, bottom = _box((across, down), size, offset)
        if (bottom - top, right - left) != size or colours != "YCbCr":
            return None
        out = out if (down, across) == size else None
        whole = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, buffer=out)
    except ValueError:  # Pillow says what is wrong, or reads it nevertheless
        return None
    return whole[top:bottom, left:right] if out is None else out


def _may_turn(jpeg: bytes) -> bool:
    """Whether the metadata of a JPEG may say that it is to be turned; they precede its pixels."""
    place = len(_JPEG)
    while jpeg[place : place + 2] != _PIXELS:
        length = 2 + int.from_bytes(jpeg[place + 2 : place + 4])
        marker = jpeg[place : place + 2]
        if not marker.startswith(b"\xff") or place + length > len(jpeg):
            return True  # it has another form
        if marker == _EXIF_OR_XMP:
            segment = jpeg[place : place + length]
            if any(sign in segment for sign in _TURNING):
                return True
        place += length
    return False


def resized(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]
) -> UInt8[np.ndarray, "height width channels"]:
    """A part of an image, resized by the filter of this module.

    Args:
        image: The image.
        size: Height and width of the result.
        box: Left, top, right and bottom of the part.
    """
    (height, width), (left, top, right, bottom) = size, box
    if (bottom - top, right - left) == size:
        return pixels(image.crop(box))
    whole = (bottom - top) % height == 0 == (right - left) % width
    kernel = Image.Resampling.BOX if whole else Image.Resampling.LANCZOS
    return pixels(image.resize((width, height), kernel, box=box))


def tinted(
    image: UInt8[np.ndarray, "height width channels"], tint: Sequence[float]
) -> UInt8[np.ndarray, "height width channels"]:
    """An image with other colours.

    Args:
        image: The image.
        tint: Factors of brightness, contrast (about the mean) and saturation, applied in this order
            as Pillow's `ImageEnhance` defines them.
    """
    picture = as_picture(image)
    for enhance, factor in zip(_TINTS, tint, strict=True):
        picture = enhance(picture).enhance(factor)
    return pixels(picture)


def pixels(image: Image.Image) -> UInt8[np.ndarray, "height width channels"]:
    """The pixels of an image of mode L, RGB or RGBA."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Undecodable:
    """Takes the place of an example whose image cannot be decoded.

    Attributes:
        name: Name of the record.
        error: The reason.
        others: All of the example but its image.
    """

    name: str
    error: BadImage
    others: dict[str, Any]


_logged: set[str] = set()  # bad records that this process has named


class BadRecords:
    """Counts the records that cannot be decoded, logs their names, and raises if they are too many.

    Too many are more than `max(floor, share * records seen)`, where every record counts once; or
    all records; or `2 * total` bad records in a row. Every process counts for itself, and starts
    anew when a run is resumed.

    Args:
        total: Number of records.
        floor: Number of bad records that is always allowed.
        share: Share of bad records that is allowed.
    """

    def __init__(self, total: int = sys.maxsize, floor: int = 10, share: float = 0.01):
        self.total, self.floor, self.share = total, floor, share
        self.names: set[str] = set()
        self._seen = self._in_a_row = 0

    def good(self, example: Any) -> bool:
        """Counts an example, and returns whether it is one and not `Undecodable`.

        Raises:
            DataError: Too many records cannot be decoded.
        """
        bad = isinstance(example, Undecodable)
        self.add(example.error if bad else None, example.name if bad else "")
        return not bad

    def add(self, error: Exception | None, name: str) -> None:
        """Counts one record.

        Args:
            error: The reason why it could not be decoded; None if it could.
            name: Name of the record in the log.

        Raises:
            DataError: Too many records cannot be decoded.
        """
        self._seen += 1
        self._in_a_row += 1
        if error is None:
            self._in_a_row = 0
            return
        new = name not in _logged
        _logged.add(name)
        self.names.add(name)
        seen, bad = min(self._seen, self.total), len(self.names)
        reason = first_line(error)
        if new:
            logging.warning("skipped %s: %s (%d of %d records so far)", name, reason, bad, seen)
        only_bad = bad >= self.total or self._in_a_row >= 2 * self.total
        if only_bad or bad > max(self.floor, self.share * seen):
            raise sources.DataError(
                f"{bad} of {seen} records cannot be decoded, the last one {name}: {reason}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToExample:
    """Makes an example of a record.

    It has `image`, uint8 `[height, width, channels]`, `label`, int32, and the kept features.

    If `text` names a feature, the example has its caption under the key `text` too: as a str, or
    with a tokenizer as int32 token ids `[length]`.

    Attributes:
        size: Pixels of a side, or height and width.
        shapes: Heights and widths, of which each image gets the nearest; () for `size` alone.
        channels: 1, 3 or 4, see `decode`.
        crop: `center`, or `random` for a place along the longer side that is drawn every time.
        min_crop: Least side of the part that is cut out, as a share of the largest; see `DataSpec`.
        jitter: How much colours may differ; see `DataSpec`.
        flip: Whether to mirror left and right with probability one half.
        text: Name of the kept feature that holds the caption, or None.
        tokenizer: Turns captions into token ids; None to leave them as they are.
    """

    size: int | tuple[int, int]
    shapes: Sequence[tuple[int, int]] = ()
    channels: int = 3
    crop: str = "center"
    min_crop: float = 1.0
    jitter: float = 0.0
    flip: bool = False
    text: str | None = None
    tokenizer: Tokenizer | None = None

    @property
    def draws(self) -> bool:
        """Whether images depend on the drawn numbers."""
        return self.crop == "random" or self.flip or self.jitter > 0

    def __call__(
        self, record: dict[str, Any], rng: np.random.Generator
    ) -> dict[str, Any] | Undecodable:
        """Makes one example with random choices."""
        return self.drawn(record, rng.random(DRAWS).tolist())

    def drawn(
        self,
        record: dict[str, Any],
        numbers: Sequence[float],
        out: UInt8[np.ndarray, "height width channels"] | None = None,
    ) -> dict[str, Any] | Undecodable:
        """Makes one example from drawn numbers.

        Args:
            record: The record.
            numbers: `DRAWS` numbers from 0 to 1 (exclusive). Each has a use of its own, so that no
                option changes what is drawn for another one.
            out: Memory for the image, if there is any.
        """
        offset, mirror, choice, *others = numbers
        return self.make(
            record,
            offset=offset if self.crop == "random" else 0.5,
            mirrored=self.flip and bool(mirror < 0.5),
            choice=choice,
            out=out,
            **self._augmentation(*others),
        )

    def _augmentation(self, smaller: float, other: float, *colours: float) -> dict[str, Any]:
        """The random choices of `min_crop` and `jitter`; none where both are off."""
        if self.min_crop == 1 and not self.jitter:
            return {}
        drawn = {"tint": [1 + self.jitter * (2 * colour - 1) for colour in colours]}
        if self.min_crop < 1:
            drawn |= {"share": 1 - (1 - self.min_crop) * smaller, "other": other}
        return drawn

    def make(
        self,
        record: dict[str, Any],
        *,
        offset: float,
        mirrored: bool,
        choice: float,
        share: float = 1.0,
        other: float | None = None,
        tint: Sequence[float] = (1.0, 1.0, 1.0),
        out: UInt8[np.ndarray, "height width channels"] | None = None,
    ) -> dict[str, Any] | Undecodable:
        """Makes one example from given choices.

        Args:
            record: The record.
            offset: Place of the part that is cut out, from 0 to 1.
            mirrored: Whether left and right are exchanged.
            choice: A number from 0 to 1 (exclusive) that picks one of several captions.
            share: See `cropped`.
            other: See `cropped`.
            tint: See `tinted`.
            out: Memory for the image, if there is any.
        """
        others = self._others(record, choice)
        part, shapes = None, self.shapes or (height_and_width(self.size),)
        if self.channels == 3 and share == 1 and len(shapes) == 1:
            part = cut_from_jpeg(record["image"], shapes[0], offset, None if mirrored else out)
        try:
            if "unreadable" in record:
                raise BadImage(record["unreadable"])
            if part is None:
                least = math.ceil(2 * max(map(max, shapes)) / self.min_crop)
                image = decode(record["image"], least, self.channels)
                size = aspects.nearest(shapes, image.size[::-1])
                part = cropped(image, size, offset, share=share, other=other)
        except BadImage as error:
            return Undecodable(name=record["name"], error=error, others=others)
        if any(factor != 1 for factor in tint):
            part = tinted(part, tint)
        if mirrored:
            part = part[:, ::-1]
        if out is None:
            out = np.ascontiguousarray(part)
        elif part is not out:
            out[:] = part
        return {"image": out, **others}

    def _others(self, record: dict[str, Any], choice: float) -> dict[str, Any]:
        """All of an example but its image; the arguments are those of `make`."""
        example = {key: value for key, value in record.items() if key not in sources.OF_THE_FILE}
        for key, value in example.items():
            if isinstance(value, list):
                example[key] = value[int(choice * len(value))] if value else ""
        if "label" in example:
            example["label"] = np.int32(example["label"])
        if self.text is not None:
            caption = example[self.text]
            example["text"] = self.tokenizer([caption])[0] if self.tokenizer else caption
        return example
