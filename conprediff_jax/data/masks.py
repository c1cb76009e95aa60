"""Masks for inpainting: true where a pixel is known, false where it is to be filled.

There are the six kinds of the RePaint protocol (Lugmayr et al. 2022, arXiv 2201.09865, section 5),
a kind `strokes` between its two free-form kinds, and `box`:

    thin, strokes, thick    free-form strokes: narrow, medium and wide; of `strokes` and `thick`,
                            some masks are boxes. The settings are those of LaMa's narrow, medium
                            and wide masks for 256 x 256 pixels (Suvorov et al. 2022, arXiv
                            2109.07161), scaled to the shorter side
    every_second_line       every second row is known
    super_resolve           every second pixel of every second row is known
    expand                  the centre is known, with a quarter of either side (64 of 256)
    half                    the left half is known
    box                     the centre is filled, with half of either side

The strokes are drawn here, by algorithm 1 of Yu et al. 2019, "Free-Form Image Inpainting with Gated
Convolution" (arXiv 1806.03589). They are not the mask files that the papers have published.
"""

import dataclasses
import os
import pathlib

import numpy as np
from jaxtyping import Bool, Shaped
from PIL import Image, ImageDraw

from conprediff_jax.common.errors import UserError
from conprediff_jax.common.images import BadImage, read_image

Mask = Bool[np.ndarray, "height width"]
Levels = Shaped[np.ndarray, "height width"]

POLARITIES = ("keep", "fill")
_MOST = 0.5  # the largest share of an image that free-form masks fill
_SIDE = 256  # the side of an image for which lengths are given
_DRAWS = 2000  # attempts to draw a free-form mask that fills at most _MOST


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreeForm:
    """Settings of free-form masks. Ranges include both ends; lengths are in 256ths of a side.

    Attributes:
        strokes: Range of the number of strokes.
        width: Range of the width of a stroke.
        length: Range of the length of a stroke's segments. A stroke has one to five segments.
        box_chance: Probability of boxes instead of strokes.
        boxes: Range of the number of boxes.
        box_side: Range of the sides of a box.
        margin: Distance between boxes and the edge of the image.
    """

    strokes: tuple[int, int]
    width: tuple[int, int]
    length: tuple[int, int]
    box_chance: float = 0.0
    boxes: tuple[int, int] = (1, 1)
    box_side: tuple[int, int] = (0, 0)
    margin: int = 0


_BOX_CHANCE = 0.3 / 1.3  # LaMa gives strokes the weight 1 and boxes the weight 0.3
FREE_FORMS = {
    "thin": FreeForm(strokes=(4, 50), width=(5, 15), length=(10, 50)),
    "strokes": FreeForm(
        strokes=(4, 5),
        width=(5, 55),
        length=(10, 110),
        box_chance=_BOX_CHANCE,
        boxes=(1, 5),
        box_side=(10, 50),
    ),
    "thick": FreeForm(
        strokes=(1, 5),
        width=(5, 105),
        length=(10, 210),
        box_chance=_BOX_CHANCE,
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
    """The slices of the centre of a mask, one `share`-th of either side."""
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
    """Makes a mask of one kind, with both known pixels and pixels to be filled.

    Args:
        name: Kind of the mask, one of `MASKS`.
        height: Height in pixels.
        width: Width in pixels.
        rng: Generator that draws free-form masks; the other kinds draw nothing.

    Raises:
        ValueError: There is no such kind.
        UserError: An image of that size is too small for such a mask.
    """
    if name not in MASKS:
        raise ValueError(f"mask {name!r}: choose one of {', '.join(MASKS)}, or give a path")
    draws, most = (_DRAWS, _MOST) if name in FREE_FORMS else (1, 1)
    for _ in range(draws if most * height * width >= 1 else 0):
        mask = _drawn(name, height, width, rng)
        if mask.any() and 0 < filled_share(mask) <= most:
            return mask
    raise UserError(f"{width} x {height} pixels are too few for a mask of kind {name!r}")


def _drawn(name: str, height: int, width: int, rng: np.random.Generator) -> Mask:
    """Makes a mask of one kind, whatever share of the image it fills."""
    if name in FREE_FORMS:
        return _free_form(FREE_FORMS[name], height, width, rng)
    mask = np.zeros((height, width), bool)
    FIXED[name](mask)
    return mask


def filled_share(mask: Mask) -> float:
    """Share of the pixels that are to be filled."""
    return 1 - float(np.mean(mask))


def read_mask(path: str | os.PathLike, polarity: str = "keep") -> Mask:
    """Reads a mask from an image file, turned upright by its EXIF orientation as photos are.

    A pixel counts as white if its value is above half of the file's range, which has 8 or 16 bits.
    Where all values are 0 or 1, as in label maps, 1 is white. If some pixels are transparent and
    all others have the same colour, white or black, then the transparent pixels are the hole,
    whatever the polarity.

    Args:
        path: Path of the file.
        polarity: Meaning of white: 'keep' (as in RePaint) or 'fill' (as in the inpainting of latent
            diffusion).

    Raises:
        UserError: The file is missing or no image, or its colours show another mask than its
            transparency.
    """
    path = pathlib.Path(path)
    try:
        return _known(*_levels(read_image(path.read_bytes())), polarity)
    except OSError as error:
        raise UserError(f"{path}: not a readable mask: {error.strerror}") from error
    except BadImage as error:
        raise UserError(f"{path}: not a readable mask: {error}") from error


def _levels(image: Image.Image) -> tuple[Levels, int, Bool[np.ndarray, "height width"]]:
    """The grey value of every pixel, the value of white, and which pixels are not transparent."""
    if image.mode.startswith("I;16"):  # Pillow would clip it at 255
        levels = np.asarray(image)
        return levels, 2**16 - 1, levels != image.info.get("transparency", -1)
    if image.mode in ("I", "F"):
        levels = np.asarray(image)
        if not ((levels >= 0) & (levels <= 1)).all():
            raise BadImage("its values have 32 bits, and which of them is white is not known")
        return levels, 1, np.ones(levels.shape, bool)
    try:
        if not image.has_transparency_data:
            levels = np.asarray(image.convert("L"))
            return levels, 255, np.ones(levels.shape, bool)
        image = image.convert("RGBA")
    except ValueError as error:  # such as Lab, which Pillow does not convert
        raise BadImage(str(error)) from error
    return np.asarray(image.convert("L")), 255, np.asarray(image.getchannel("A")) >= 128


def _known(
    levels: Levels, most: int, visible: Bool[np.ndarray, "height width"], polarity: str
) -> Mask:
    """The known pixels by the rules of `read_mask`."""
    if not visible.any():
        raise BadImage("every pixel is transparent")
    labels = np.isin(levels[visible], (0, 1)).all()
    white = levels == 1 if labels else levels > most / 2
    if visible.all():
        return white if polarity == "keep" else ~white
    if white[visible].any() and not white[visible].all():
        raise BadImage(
            "its colours show one mask and its transparency another: save it without an alpha "
            "channel, or in one colour"
        )
    return visible


def _free_form(form: FreeForm, height: int, width: int, rng: np.random.Generator) -> Mask:
    """Draws a free-form mask: strokes or boxes to be filled, with known pixels around them."""
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
    """Draws one to five segments with round joints, whose directions alternate."""
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
