"""Turns the bytes of an image file into a square of uint8 RGB.

    decode -> RGB on white -> crop a square as large as the shorter side -> resize it

To crop first and then resize gives the same picture as to resize first, and costs less. The filter
is Pillow's Lanczos, whose support grows with the reduction (antialiasing). A reduction by a whole
number uses Pillow's box filter, the area average, which causes no ringing at the hard edges of
drawings. JPEGs are decoded at a reduced scale if that leaves at least twice the final size, so that
the filter makes the last reduction.
"""

import dataclasses
import sys
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import Image

from conprediff_jax.common.errors import first_line
from conprediff_jax.common.images import BadImage, read_image
from conprediff_jax.data import sources
from conprediff_jax.data.tokenizers import Tokenizer

CROPS = ("center", "random")


def decode(data: bytes, at_least: int = 0) -> Image.Image:
    """Decodes an image file to RGB on a white background, upright by its EXIF orientation.

    Args:
        data: Bytes of an image file, which may be grey (8 or 16 bits), of a palette, transparent,
            or CMYK.
        at_least: If positive, a JPEG may be decoded at a reduced scale, with sides no shorter than
            this many pixels.

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
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:  # such as Lab, which Pillow does not convert
        raise BadImage(str(error)) from error


def square(image: Image.Image, size: int, offset: float = 0.5) -> UInt8[np.ndarray, "size size 3"]:
    """A square of the image, as large as its shorter side, resized to `size` pixels a side.

    Args:
        image: An RGB image.
        size: Pixels of a side of the result.
        offset: Place of the square along the longer side, from 0 (its beginning) to 1 (its end).
    """
    width, height = image.size
    side = min(width, height)
    left, top = round(offset * (width - side)), round(offset * (height - side))
    return resized(image, (size, size), (left, top, left + side, top + side))


def resized(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]
) -> UInt8[np.ndarray, "height width 3"]:
    """A part of an image, resized by the filter of this module.

    Args:
        image: An RGB image.
        size: Height and width of the result.
        box: Left, top, right and bottom of the part.
    """
    (height, width), (left, top, right, bottom) = size, box
    if (bottom - top, right - left) == size:
        return np.asarray(image.crop(box))
    whole = (bottom - top) % height == 0 == (right - left) % width
    kernel = Image.Resampling.BOX if whole else Image.Resampling.LANCZOS
    return np.asarray(image.resize((width, height), kernel, box=box))


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
    """Makes an example of a record: `image` uint8 `[size, size, 3]`, `label` int32, kept features.

    If `text` names a feature, the example has its caption under the key `text` too: as a str, or
    with a tokenizer as int32 token ids `[length]`.

    Attributes:
        size: Pixels of a side.
        crop: `center`, or `random` for a place along the longer side that is drawn every time.
        flip: Whether to mirror left and right with probability one half.
        text: Name of the kept feature that holds the caption, or None.
        tokenizer: Turns captions into token ids; None to leave them as they are.
    """

    size: int
    crop: str = "center"
    flip: bool = False
    text: str | None = None
    tokenizer: Tokenizer | None = None

    def __call__(
        self, record: dict[str, Any], rng: np.random.Generator
    ) -> dict[str, Any] | Undecodable:
        """Makes one example with random choices.

        It always draws three numbers, so that no option changes the draws for another one.
        """
        offset, mirror, choice = rng.random(3)
        return self.make(
            record,
            offset=offset if self.crop == "random" else 0.5,
            mirrored=self.flip and bool(mirror < 0.5),
            choice=choice,
        )

    def make(
        self, record: dict[str, Any], *, offset: float, mirrored: bool, choice: float
    ) -> dict[str, Any] | Undecodable:
        """Makes one example from given choices.

        Args:
            record: The record.
            offset: Place of the square along the longer side, from 0 to 1.
            mirrored: Whether left and right are exchanged.
            choice: A number from 0 to 1 (exclusive) that picks one of several captions.
        """
        others = self._others(record, choice)
        try:
            if "unreadable" in record:
                raise BadImage(record["unreadable"])
            image = decode(record["image"], 2 * self.size)
        except BadImage as error:
            return Undecodable(name=record["name"], error=error, others=others)
        pixels = square(image, self.size, offset)
        if mirrored:
            pixels = pixels[:, ::-1]
        return {"image": np.ascontiguousarray(pixels), **others}

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
