"""Masks for inpainting: true where a pixel is known, false where it is to be filled.

The six kinds of the RePaint protocol (Lugmayr et al. 2022, arXiv 2201.09865, section 5), `strokes`
between its two free-form kinds, and `box`:

    thin, strokes, thick    free-form strokes, narrow, medium and wide; in the wide two, boxes at
                            times. Settings of LaMa's narrow, medium and wide masks for 256 x 256
                            (Suvorov et al. 2022, arXiv 2109.07161), scaled to the shorter side
    every_second_line       every second row is known
    super_resolve           every second pixel of every second row is known
    expand                  the centre is known, a quarter of either side (64 of 256)
    half                    the left half is known
    box                     the centre is filled, half of either side

The strokes are drawn here, in the manner of Yu et al. 2019, "Free-Form Image Inpainting with Gated
Convolution" (arXiv 1806.03589), algorithm 1, and are not the files of either paper.
"""

import dataclasses
import os
import pathlib

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw

from conprediff_jax.data.transforms import DECODE_ERRORS
from conprediff_jax.errors import UserError

Mask = Bool[np.ndarray, "height width"]

POLARITIES = ("keep", "fill")
_MOST = 0.5  # of an image that free-form masks fill
_SIDE = 256  # that lengths are given for


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreeForm:
    """Settings of free-form masks. Ranges include both ends; lengths are in 256ths of a side.

    Attributes:
        strokes: Number of strokes.
        width: Of a stroke.
        length: Of a stroke's segments, of which it has one to five.
        box_chance: Chance of boxes instead of strokes.
        boxes: Number of boxes.
        box_side: Sides of a box.
        margin: Between boxes and the image's edge.
    """

    strokes: tuple[int, int]
    width: tuple[int, int]
    length: tuple[int, int]
    box_chance: float = 0.0
    boxes: tuple[int, int] = (1, 1)
    box_side: tuple[int, int] = (0, 0)
    margin: int = 0


_BOXES_TO_STROKES = 0.3 / 1.3  # LaMa weighs strokes 1 and boxes 0.3
FREE_FORMS = {
    "thin": FreeForm(strokes=(4, 50), width=(5, 15), length=(10, 50)),
    "strokes": FreeForm(
        strokes=(4, 5),
        width=(5, 55),
        length=(10, 110),
        box_chance=_BOXES_TO_STROKES,
        boxes=(1, 5),
        box_side=(10, 50),
    ),
    "thick": FreeForm(
        strokes=(1, 5),
        width=(5, 105),
        length=(10, 210),
        box_chance=_BOXES_TO_STROKES,
        boxes=(1, 3),
        box_side=(30, 150),
        margin=10,
    ),
}


def _every_second_line(mask: Mask) -> None:
    mask[::2] = True


def _super_resolve(mask: Mask) -> None:
    mask[::2, ::2] = True


def _expand(mask: Mask) -> None:
    mask[_central(mask, 4)] = True


def _half(mask: Mask) -> None:
    mask[:, : mask.shape[1] // 2] = True


def _box(mask: Mask) -> None:
    mask[:] = True
    mask[_central(mask, 2)] = False


def _central(mask: Mask, share: int) -> tuple[slice, slice]:
    """The middle of a mask, one `share`-th of either side."""
    sides = [max(side // share, 1) for side in mask.shape]
    starts = [(side - inner) // 2 for side, inner in zip(mask.shape, sides, strict=True)]
    return tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))


FIXED = {
    "every_second_line": _every_second_line,
    "super_resolve": _super_resolve,
    "expand": _expand,
    "half": _half,
    "box": _box,
}
MASKS = (*FREE_FORMS, *FIXED)


def make_mask(name: str, height: int, width: int, rng: np.random.Generator) -> Mask:
    """A mask of one kind.

    Args:
        name: one of `MASKS`.
        height: pixels, at least 2.
        width: pixels, at least 2.
        rng: draws the free-form ones; the others take nothing from it.

    Raises:
        ValueError: there is no such kind.
    """
    if name in FIXED:
        mask = np.zeros((height, width), bool)
        FIXED[name](mask)
        return mask
    if name not in FREE_FORMS:
        raise ValueError(f"mask {name!r}: choose one of {', '.join(MASKS)}, or give a path")
    while True:
        mask = _free_form(FREE_FORMS[name], height, width, rng)
        if 0 < filled_share(mask) <= _MOST:
            return mask


def filled_share(mask: Mask) -> float:
    """Share of the pixels that are to be filled."""
    return 1 - float(np.mean(mask))


def read_mask(path: str | os.PathLike, polarity: str = "keep") -> Mask:
    """A mask from an image file, white being all above half; of 0 and 1, as label maps are, 1.

    Args:
        path: of the file.
        polarity: what white says: 'keep' (RePaint) or 'fill' (latent diffusion's inpainting).

    Raises:
        UserError: the file is missing or no image.
    """
    path = pathlib.Path(path)
    try:
        with Image.open(path) as image:
            values = np.asarray(image.convert("L"))
    except DECODE_ERRORS as error:
        raise UserError(f"{path}: not a readable mask: {error}") from error
    white = values >= (128 if values.max() > 1 else 1)
    return white if polarity == "keep" else ~white


def _free_form(form: FreeForm, height: int, width: int, rng: np.random.Generator) -> Mask:
    """Strokes or boxes, known around them."""
    image = Image.new("L", (width, height), 255)
    draw = ImageDraw.Draw(image)
    unit = min(height, width) / _SIDE
    if rng.random() < form.box_chance:
        for _ in range(rng.integers(*form.boxes, endpoint=True)):
            _draw_box(draw, form, (width, height), unit, rng)
    else:
        for _ in range(rng.integers(*form.strokes, endpoint=True)):
            _draw_stroke(draw, form, (width, height), unit, rng)
    return np.asarray(image) > 0


def _draw_box(
    draw: ImageDraw.ImageDraw,
    form: FreeForm,
    size: tuple[int, int],
    unit: float,
    rng: np.random.Generator,
) -> None:
    sides = np.minimum(unit * rng.uniform(*form.box_side, size=2), size)
    room = np.maximum(np.array(size) - sides - 2 * unit * form.margin, 0)
    corner = np.floor(unit * form.margin + room * rng.random(2))
    last = np.minimum(corner + np.ceil(sides), size) - 1
    draw.rectangle([*corner, *last], fill=0)


def _draw_stroke(
    draw: ImageDraw.ImageDraw,
    form: FreeForm,
    size: tuple[int, int],
    unit: float,
    rng: np.random.Generator,
) -> None:
    """One to five segments with round joints, whose directions turn to and fro."""
    width = max(round(unit * rng.uniform(*form.width)), 1)
    here = rng.uniform(0, size)
    for segment in range(rng.integers(1, 5, endpoint=True)):
        angle = rng.uniform(0, 4) * (-1 if segment % 2 else 1)
        step = unit * rng.uniform(*form.length) * np.array([np.sin(angle), np.cos(angle)])
        there = np.clip(here + step, 0, np.array(size) - 1)
        draw.line([*here, *there], fill=0, width=width)
        for x, y in (here, there):
            draw.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=0)
        here = there
