"""Looks at every image that is imported: what is odd about it, and whether it is left out.

Left out are records without an image that can be decoded to RGB, and images that are too small or
too narrow for a crop to mean anything. Everything else that is odd is counted and named, and kept
as it is: the pipeline decodes it in the same way every time.
"""

import dataclasses
import hashlib
import io
import os
from typing import Any

from PIL import ExifTags, Image

from conprediff_jax.common.images import EXTENSIONS, BadImage, as_picture
from conprediff_jax.data import transforms

_ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".mpo"),
    "TIFF": (".tif", ".tiff"),
}
_WITH_LOSSES = ("JPEG", "MPO", "WEBP", "AVIF")
_DEPTH = 24  # place of the bits per sample in a PNG file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Which images are left out for their shape.

    Attributes:
        min_side: Pixels of the shorter side, at least.
        max_aspect: The longer side divided by the shorter one, at most.
    """

    min_side: int = 16
    max_aspect: float = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What was found in a record.

    Attributes:
        left_out: Why the record is left out; '' if it is not.
        detail: What was found in this very image, such as its size.
        notes: What is odd about a record that is not left out.
        form: Format and mode, such as 'JPEG RGB'; '' if the image is not readable.
        size: Width and height in pixels, upright.
        digest: SHA-256 of the bytes of the image.
        reduced: The bytes of a smaller image that takes its place; empty to keep it.
    """

    left_out: str = ""
    detail: str = ""
    notes: tuple[str, ...] = ()
    form: str = ""
    size: tuple[int, int] = (0, 0)
    digest: bytes = b""
    reduced: bytes = b""


def inspect(record: dict[str, Any], limits: Limits, size: int = 0) -> Seen:
    """Decodes the image of a record once, as the pipeline will.

    Args:
        record: A record of `data.sources`.
        limits: Which shapes are left out.
        size: If positive, an image is reduced until its shorter side has this many pixels.
    """
    data, notes = record["image"], list(record.get("notes", ()))
    if "unreadable" in record:
        reason, _, detail = record["unreadable"].partition(": ")
        return Seen(left_out=reason, detail=detail)
    if not data:
        return Seen(left_out="the file is empty")
    try:
        image = transforms.decode(data)
        header = Image.open(io.BytesIO(data))
        notes += _notes(header, record["name"], data)
    except BadImage as error:
        return Seen(left_out=_kind(str(error)), detail=str(error))
    width, height = image.size
    seen = Seen(
        notes=tuple(notes),
        form=f"{header.format} {header.mode}",
        size=(width, height),
        digest=hashlib.sha256(data).digest(),
    )
    short, long = sorted(image.size)
    pixels = f"{width} x {height} pixels"
    if short < limits.min_side:
        reason = f"the shorter side is below {limits.min_side} pixels (min_side)"
        return dataclasses.replace(seen, left_out=reason, detail=pixels)
    if long > limits.max_aspect * short:
        reason = f"the longer side is above {limits.max_aspect:g} times the shorter (max_aspect)"
        return dataclasses.replace(seen, left_out=reason, detail=pixels)
    if 0 < size < short:
        return dataclasses.replace(seen, reduced=_reduced(data, header, size))
    return seen


def _reduced(data: bytes, header: Image.Image, size: int) -> bytes:
    """The file of a smaller image: a JPEG for formats with losses, or else a PNG."""
    channels = 1 if header.mode in ("1", "L") else 4 if header.has_transparency_data else 3
    image = transforms.decode(data, channels=channels)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    smaller = as_picture(transforms.resized(image, (height, width), (0, 0, *image.size)))
    file = io.BytesIO()
    if header.format in _WITH_LOSSES and channels < 4:
        smaller.save(file, "JPEG", quality=95, subsampling=0)
    else:
        smaller.save(file, "PNG")
    return file.getvalue()


def _kind(reason: str) -> str:
    """The reason of an undecodable image without what differs from image to image."""
    if "exceeds limit" in reason:  # of twice this number of pixels
        return (
            f"above Pillow's limit against bombs, 2 x MAX_IMAGE_PIXELS = {_most_pixels():,} pixels"
        )
    known = ("the file is empty", "not a known kind of image", "its values have 32 bits")
    return next((start for start in known if reason.startswith(start)), "damaged or truncated")


def _most_pixels() -> int:
    return 2 * (Image.MAX_IMAGE_PIXELS or 0)


def _notes(header: Image.Image, name: str, data: bytes) -> list[str]:
    """What is odd about an image that can be decoded."""
    notes = []
    ending = os.path.splitext(name)[1].lower()
    right = _ENDINGS.get(header.format, (f".{header.format.lower()}",))
    if ending in EXTENSIONS and ending not in right:
        notes.append(f"named {ending}, but the file is {header.format}")
    if header.mode == "CMYK":
        ycck = header.info.get("adobe_transform") == 2
        notes.append(f"{'YCCK' if ycck else 'CMYK'}, converted without its colour profile")
    if header.mode.startswith("I;16") or (header.format == "PNG" and data[_DEPTH] == 16):
        notes.append("16 bits a sample, of which 8 are used")
    if header.mode == "P" and "transparency" in header.info:
        notes.append("a palette with transparency, which becomes white")
    elif header.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        notes.append("an alpha channel: what is transparent becomes white")
    if getattr(header, "is_animated", False):
        notes.append("an animation, of which the first frame is used")
    return notes + _exif_notes(header)


def _exif_notes(header: Image.Image) -> list[str]:
    try:
        orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises errors of any type
        return ["EXIF that cannot be read, and is passed over"]
    if orientation in range(2, 9):
        return ["turned upright by its EXIF orientation"]
    return [] if orientation == 1 else ["EXIF with an orientation that does not exist"]
