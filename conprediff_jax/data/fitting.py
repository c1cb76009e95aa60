"""Photos of any size for a model of one size, and fillings brought back to the photo.

A part of the photo becomes a part of the image that the model sees:

    crop    the largest part of the model's shape, as near to the middle of the hole as the photo
            allows (or to the middle of the photo, where a mask is drawn), becomes the whole image
    pad     the whole photo becomes the middle of the image; the model fills the border around it
    resize  the whole photo becomes the whole image, and its sides may be scaled unequally
    keep    the photo is the image, at its own size, which the model has to take

Masks that are read from files are at the size of the photo, and go through the same change: a pixel
of the image is known if all pixels of the photo under it are known. Masks of a kind are drawn at
the size of the image. Colours of the hole do not reach known pixels: before a photo is resized, its
hole takes the colour of the nearest known pixel.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Bool, UInt8
from PIL import Image

from conprediff_jax.common.errors import UserError
from conprediff_jax.common.images import as_picture
from conprediff_jax.data import holes as holes_lib
from conprediff_jax.data.holes import Hole, Picture, painted_over
from conprediff_jax.data.masks import MASKS
from conprediff_jax.data.transforms import resized

FITS = ("crop", "pad", "resize", "keep")

Photo = UInt8[np.ndarray, "photo_height photo_width channels"]
PhotoMask = Bool[np.ndarray, "photo_height photo_width"]
Pixels = UInt8[np.ndarray, "height width channels"]
Mask = Bool[np.ndarray, "height width"]
Size = tuple[int, int]


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def size(self) -> Size:
        """Height and width."""
        return self.height, self.width

    @property
    def within(self) -> tuple[slice, slice]:
        """The slices of rows and columns."""
        return (
            slice(self.top, self.top + self.height),
            slice(self.left, self.left + self.width),
        )

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom, as Pillow names a box."""
        return self.left, self.top, self.left + self.width, self.top + self.height


class Placement(NamedTuple):
    """Where a photo lies in the image that the model sees.

    Attributes:
        photo: Height and width of the photo.
        part: The part of the photo that is used.
        image: Height and width of the image.
        place: The part of the image that shows it.
    """

    photo: Size
    part: Box
    image: Size
    place: Box

    @property
    def is_identity(self) -> bool:
        """Whether the image is the photo."""
        return self.photo == self.image and self.part == self.place

    @property
    def scale(self) -> float:
        """Pixels of the photo for one of the image, along the side that is scaled most."""
        pairs = zip(self.part.size, self.place.size, strict=True)
        return max(part / place for part, place in pairs)

    def shown(self, photo: Photo) -> Pixels:
        """The image of a photo; the border of a padded one is grey."""
        if self.is_identity:
            return photo
        image = np.full((*self.image, photo.shape[-1]), 128, np.uint8)
        image[self.place.within] = resized(as_picture(photo), self.place.size, self.part.corners)
        return image

    def known(self, mask: PhotoMask) -> Mask:
        """The known pixels of the image, from those of the photo."""
        if self.is_identity:
            return mask
        hole = Image.fromarray((~mask).astype(np.float32))  # mode F: no small share is rounded off
        height, width = self.place.size
        touched = hole.resize((width, height), Image.Resampling.BOX, box=self.part.corners)
        known = np.zeros(self.image, bool)
        known[self.place.within] = np.asarray(touched) <= 0
        return known

    def known_of_photo(self, mask: Mask) -> PhotoMask:
        """The known pixels of the photo, from those of the image; unused parts count as known."""
        if self.is_identity:
            return mask
        known = np.ones(self.photo, bool)
        rows, columns = (
            np.arange(length) * shown // length
            for length, shown in zip(self.part.size, self.place.size, strict=True)
        )
        known[self.part.within] = mask[self.place.within][np.ix_(rows, columns)]
        return known

    def pasted(self, filling: Pixels, photo: Photo) -> Photo:
        """The photo with a filling of the image laid over the part that was used."""
        if self.is_identity:
            return filling
        pasted = photo.copy()
        pasted[self.part.within] = resized(as_picture(filling), self.part.size, self.place.corners)
        return pasted

    def describe(self) -> str:
        """What happens to the photo, in words."""
        (height, width), part, place = self.photo, self.part, self.place
        said = f"{width} x {height} pixels"
        if part.size != self.photo:
            said += f", cropped to {part.width} x {part.height}"
        if part.size != place.size:
            said += f", resized to {place.width} x {place.height}"
        if place.size != self.image:
            said += f", padded to {self.image[1]} x {self.image[0]}"
        return said


class Fitted(NamedTuple):
    """A photo with a hole, at its own size and as the model sees it.

    Attributes:
        photo: The photo and its hole.
        hole: The image and its hole, at the size of the model.
        placement: Where the photo lies in the image.
    """

    photo: Hole
    hole: Hole
    placement: Placement


def place(
    fit: str, photo: Size, image: Size, centre: tuple[float, float] | None = None
) -> Placement:
    """Places a photo in an image.

    Args:
        fit: One of `FITS`.
        photo: Height and width of the photo.
        image: Height and width of the images that the model takes.
        centre: The row and column of the photo that a crop should have in its middle; None for the
            middle of the photo.
    """
    if fit == "keep" or photo == image:
        return Placement(photo, Box(0, 0, *photo), photo, Box(0, 0, *photo))
    part, whole = Box(0, 0, *photo), Box(0, 0, *image)
    if fit == "crop":
        size = _largest(image, photo)
        middle = centre or tuple(side / 2 for side in photo)
        corner = [
            round(min(max(at - side / 2, 0), room - side))
            for at, side, room in zip(middle, size, photo, strict=True)
        ]
        return Placement(photo, Box(*corner, *size), image, whole)
    if fit == "pad":
        size = _largest(photo, image)
        corner = [(room - side) // 2 for side, room in zip(size, image, strict=True)]
        return Placement(photo, part, image, Box(*corner, *size))
    return Placement(photo, part, image, whole)


def _largest(shape: Size, room: Size) -> Size:
    """The largest height and width of a shape, up to rounding, that fit into a room."""
    scale = min(most / side for side, most in zip(shape, room, strict=True))
    return tuple(
        max(1, min(round(side * scale), most)) for side, most in zip(shape, room, strict=True)
    )


def cut(
    pictures: Sequence[Picture],
    masks: str,
    *,
    fit: str,
    size: Size,
    polarity: str = "keep",
    seed: int = 0,
) -> list[Fitted]:
    """Cuts a hole into every photo, and fits both to a model.

    Args:
        pictures: The photos.
        masks: A kind of mask or a path; see `holes.cut`.
        fit: One of `FITS`.
        size: Height and width of the images that the model takes.
        polarity: The meaning of white in mask files; see `masks.read_mask`.
        seed: Seed of masks that are drawn; see `holes.cut`.

    Raises:
        FieldError: There is no such kind or path of masks.
        UserError: A mask does not fit its photo (see `holes.cut`), or no part of a hole is left in
            the image.
    """
    if masks in MASKS:
        placements = [place(fit, picture.image.shape[:2], size) for picture in pictures]
        shown = [
            picture._replace(image=placement.shown(picture.image))
            for picture, placement in zip(pictures, placements, strict=True)
        ]
        holes = holes_lib.cut(shown, masks, seed=seed)
        fitted = [_from_image(*each) for each in zip(pictures, holes, placements, strict=True)]
    else:
        photos = holes_lib.cut(pictures, masks, polarity=polarity, seed=seed)
        fitted = [from_photo(photo, fit, size) for photo in photos]
    return fitted


def log_changes(fitted: Sequence[Fitted]) -> None:
    """Logs how every photo was changed, one line each."""
    for each in fitted:
        if not each.placement.is_identity:
            logging.info("%s: %s", each.photo.name, each.placement.describe())


def _from_image(picture: Picture, hole: Hole, placement: Placement) -> Fitted:
    """A photo whose mask was drawn at the size of the image."""
    border = placement.known(np.ones(placement.photo, bool))
    hole = hole._replace(mask=hole.mask & border)
    mask = placement.known_of_photo(hole.mask)
    return Fitted(Hole(picture.name, picture.image, mask, picture.label), hole, placement)


def from_photo(photo: Hole, fit: str, size: Size) -> Fitted:
    """Fits a photo, whose hole was marked at the size of the photo, to a model.

    Args:
        photo: The photo and its hole.
        fit: One of `FITS`.
        size: Height and width of the images that the model takes.

    Raises:
        UserError: No part of the hole is left in the image.
    """
    found = np.argwhere(~photo.mask)
    centre = tuple((found.min(axis=0) + found.max(axis=0) + 1) / 2) if len(found) else None
    placement = place(fit, photo.mask.shape, size, centre)
    if placement.is_identity:
        return Fitted(photo, photo, placement)
    used = np.zeros(photo.mask.shape, bool)
    used[placement.part.within] = True
    lost = (~photo.mask & ~used).sum() / max(len(found), 1)
    if lost == 1:
        raise UserError(f"image {photo.name}: nothing of its hole is left: {placement.describe()}")
    if lost:
        logging.warning(
            "%s: %.0f %% of its hole lie outside the crop and stay as they are; the fit 'pad' "
            "shows the model the whole photo", photo.name, 100 * lost,
        )  # fmt: skip
    known = placement.known(photo.mask)
    hidden = placement.shown(painted_over(photo))
    image = np.where(known[..., None], hidden, placement.shown(photo.image))
    return Fitted(photo, Hole(photo.name, image, known, photo.label), placement)
