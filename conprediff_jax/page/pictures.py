"""Pictures that users bring, and how pictures are shown."""

import io
import math
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from conprediff_jax.common import images
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.images import BadImage
from conprediff_jax.data.transforms import decode, pixels

MOST_BYTES = 20 * 2**20  # of an upload
MOST_PIXELS = 4096 * 4096  # of an upload
_SIDE = 1024  # longest side of a photo on the page, in pixels
_ROOM = 512  # shorter side of a picture that is painted on, at least, in pixels

Picture = UInt8[np.ndarray, "height width channels"]


def read(data: bytes, channels: int) -> Picture:
    """The picture in an uploaded file, upright, and reduced to at most 1,024 pixels a side.

    Args:
        data: Bytes of the file.
        channels: Channels of the picture; see `transforms.decode`.

    Raises:
        UserError: The file is too large, no image, or a damaged one.
    """
    if len(data) > MOST_BYTES:
        raise UserError(f"The file is larger than {MOST_BYTES / 2**20:.0f} MB.")
    width, height = _size(data)
    if width * height > MOST_PIXELS:
        most = math.isqrt(MOST_PIXELS)
        raise UserError(
            f"The photo has {width:,} x {height:,} pixels, more than {most:,} x {most:,}."
        )
    try:
        picture = decode(data, channels=channels)
    except BadImage as error:
        raise UserError(f"The file is not a readable image: {error}.") from error
    picture.thumbnail((_SIDE, _SIDE))
    return pixels(picture)


def _size(data: bytes) -> tuple[int, int]:
    """Width and height of an image, before it is decoded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Exception as error:  # Pillow raises errors of any type
        raise UserError("The file is not an image of a kind that can be read.") from error


def to_paint_on(picture: Picture) -> UInt8[np.ndarray, "rows columns 3"]:
    """The picture as RGB, enlarged by a whole factor so that there is room to paint a mask."""
    scale = _scale(picture.shape[:2])
    return images.as_rgb(picture).repeat(scale, axis=0).repeat(scale, axis=1)


def painted(editor: dict[str, Any] | None, shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """The pixels of a picture that were painted over: those that paint touches.

    Args:
        editor: What the editor holds: layers, uint8 [rows, columns, 4], at the size of
            `to_paint_on`.
        shape: Height and width of the picture.

    Raises:
        UserError: Nothing is painted over.
    """
    scale, mask = _scale(shape), np.zeros(shape, bool)
    for layer in (editor or {}).get("layers") or ():
        if layer.shape[:2] == (shape[0] * scale, shape[1] * scale):
            opaque = layer[..., 3] > 0
            mask |= opaque.reshape(shape[0], scale, shape[1], scale).any(axis=(1, 3))
    if not mask.any():
        raise UserError("Nothing is painted over: paint over what is to be filled.")
    return mask


def _scale(shape: tuple[int, int]) -> int:
    """The factor by which a picture is enlarged to be painted on."""
    return max(1, min(math.ceil(_ROOM / min(shape)), _SIDE // max(shape)))


def shown(picture: Picture) -> Image.Image:
    """The picture as the page takes it."""
    return images.as_picture(picture)
