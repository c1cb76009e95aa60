"""Image files: grids, single PNGs and npz archives, written to a temporary name and moved."""

import math
import os
import textwrap
from collections.abc import Sequence

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from conprediff_jax.files import write_atomically

Images = UInt8[np.ndarray, "count height width channels"]


def grid(
    images: Images, *, columns: int | None = None, gap: int = 2, least: int = 64
) -> UInt8[np.ndarray, "grid_height grid_width channels"]:
    """Images side by side on white, as square as their number allows.

    Args:
        images: uint8.
        columns: images a row; by default the root of their number, rounded up.
        gap: white pixels between neighbours, after enlarging.
        least: small images are enlarged by a whole factor until they have so many pixels a side, so
            that one can see them.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    scale = math.ceil(least / images.shape[1])
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    missing = -len(images) % columns
    images = np.pad(images, ((0, missing), (0, gap), (0, gap), (0, 0)), constant_values=255)
    images[len(images) - missing :] = 255
    joined = rearrange(images, "(r c) h w k -> (r h) (c w) k", c=columns)
    return np.pad(joined, ((gap, 0), (gap, 0), (0, 0)), constant_values=255)


def captioned(
    images: Images, captions: Sequence[str], *, least: int = 96
) -> UInt8[np.ndarray, "count captioned_height captioned_width channels"]:
    """Every image with its caption below it, in small print, broken into lines.

    Args:
        images: uint8, with three channels.
        captions: one for every image.
        least: see `grid`; narrow images leave no room for words.
    """
    scale = math.ceil(least / images.shape[1])
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    width, font = images.shape[2], ImageFont.load_default(size=10)
    broken = [textwrap.wrap(caption, max(8, width // 6)) or [""] for caption in captions]
    room = 12 * max(map(len, broken)) + 4
    labels = []
    for lines in broken:
        label = Image.new("RGB", (width, room), "white")
        ImageDraw.Draw(label).multiline_text((1, 0), "\n".join(lines), "black", font, spacing=2)
        labels.append(np.asarray(label))
    return np.concatenate([images, np.stack(labels)], axis=1)


def write_png(path: str | os.PathLike, image: UInt8[np.ndarray, "height width 3"]) -> None:
    """Writes one PNG."""
    write_atomically(path, lambda file: Image.fromarray(image).save(file, format="png"))


def write_npz(path: str | os.PathLike, images: Images) -> None:
    """Writes all images as `arr_0` of an npz, the layout of ADM's sample batches."""
    write_atomically(path, lambda file: np.savez(file, images))
