"""Images with holes, which inpainting fills.

The images are those of a folder, taken as they are, or those of a data set, which go through the
data pipeline (centre crops of the model's size). The masks are of a kind in `masks`, drawn anew for
every image; or one file for all images; or a folder with a mask for every image. A mask has the
name of its image, whatever the ending. Names that differ only in upper and lower case, or in how
Unicode composes their letters, count as the same.
"""

import collections
import itertools
import os
import pathlib
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from scipy import ndimage

from conprediff_jax.common.errors import FieldError, UserError
from conprediff_jax.common.images import BadImage, list_images
from conprediff_jax.data import masks as masks_lib
from conprediff_jax.data.pipeline import DataSpec, evaluation_iterator
from conprediff_jax.data.transforms import decode, pixels

_BATCH = 64


class Picture(NamedTuple):
    """An image.

    Attributes:
        name: Path of its file without the ending, relative to the folder of all images; or its
            number in a data set, with six digits.
        image: Its pixels.
        label: Number of its class; None where the data have no classes.
    """

    name: str
    image: UInt8[np.ndarray, "height width channels"]
    label: int | None = None


class Hole(NamedTuple):
    """An image with a hole to be filled.

    Attributes:
        name: See `Picture`.
        image: The whole image.
        mask: True where the image is known.
        label: See `Picture`.
    """

    name: str
    image: UInt8[np.ndarray, "height width channels"]
    mask: Bool[np.ndarray, "height width"]
    label: int | None = None

    @property
    def masked(self) -> UInt8[np.ndarray, "height width channels"]:
        """The image with grey in the hole."""
        return np.where(self.mask[..., None], self.image, np.uint8(128))


def painted_over(hole: Hole) -> UInt8[np.ndarray, "height width channels"]:
    """The image with unknown pixels in the colour of the nearest known pixel, or all grey."""
    if not hole.mask.any():
        return np.full_like(hole.image, 128)
    nearest = ndimage.distance_transform_edt(
        ~hole.mask, return_distances=False, return_indices=True
    )
    return hole.image[tuple(nearest)]


def are_files(images: str) -> bool:
    """Whether a name is that of an image file or a folder of them, and not of a data set."""
    root = pathlib.Path(images).expanduser()
    return root.is_file() or (root.is_dir() and not (root / "dataset_info.json").exists())


def read_files(images: str, *, num: int | None = None, channels: int = 3) -> list[Picture]:
    """One image file, or those of a folder and its subfolders in their natural order.

    Args:
        images: Path of the file or folder.
        num: Number of images, from the first; None for all.
        channels: 3 for RGB, 1 for grey, or 4 for RGB with transparency.

    Raises:
        UserError: There are no images, two of them have the same name, or one cannot be decoded.
    """
    root, pictures = pathlib.Path(images).expanduser(), {}
    files = [root.name] if root.is_file() else list_images(root)[:num]
    root = root.parent if root.is_file() else root
    for file in files:
        name, path = _stem(file), root / file
        if name in pictures:
            raise UserError(f"{path}: another image is called {name} too: rename one of them")
        try:
            image = decode(path.read_bytes(), channels=channels)
            pictures[name] = Picture(name, pixels(image))
        except OSError as error:
            raise UserError(f"{path}: not a readable image: {error.strerror}") from error
        except BadImage as error:
            raise UserError(f"{path}: not a readable image: {error}") from error
    return list(pictures.values())


def _stem(file: str) -> str:
    """The name of an image: the path of its file without the ending."""
    return os.path.splitext(file)[0]


def read_data(spec: DataSpec, *, num: int | None = None) -> list[Picture]:
    """The images of a data set in its order, without those that cannot be decoded.

    Args:
        spec: The data set, and how its images are cropped and resized.
        num: Number of images, from the first; None for all.

    Raises:
        DataError: The data are missing, or lack the split.
    """
    spec = spec.of_images(keep=(), text=None)
    batches = evaluation_iterator(spec, batch_size=min(num or _BATCH, _BATCH))
    return list(itertools.islice(_numbered(batches), num))


def _numbered(batches: Iterator[dict[str, np.ndarray]]) -> Iterator[Picture]:
    """The images of batches, without padding and without images that could not be decoded."""
    numbers = itertools.count()
    for batch in batches:
        for row in np.flatnonzero(batch["mask"]):
            label = int(batch["label"][row]) if "label" in batch else None
            yield Picture(f"{next(numbers):06}", batch["image"][row], label)


def cut(
    pictures: Sequence[Picture], masks: str, *, polarity: str = "keep", seed: int = 0
) -> list[Hole]:
    """Cuts a hole into every image.

    Args:
        pictures: The images.
        masks: A kind of mask, the path of a mask, or the path of a folder of masks.
        polarity: The meaning of white in mask files, see `masks.read_mask`.
        seed: Seed of masks that are drawn. The mask of image i depends on the seed and i alone.

    Raises:
        FieldError: There is no such kind or path.
        UserError: An image is too small for the kind of mask; or a mask is missing, ambiguous, or
            of another size than its image.
    """
    path = pathlib.Path(masks).expanduser()
    if masks in masks_lib.MASKS:
        drawn = [_drawn(masks, picture, (seed, i)) for i, picture in enumerate(pictures)]
    elif path.is_dir():
        files = mask_files(path, [picture.name for picture in pictures])
        drawn = [_read(*pair, polarity) for pair in zip(files, pictures, strict=True)]
    elif path.exists():
        drawn = [_read(path, picture, polarity) for picture in pictures]
    else:
        kinds = ", ".join(masks_lib.MASKS)
        raise FieldError("masks", f"is {masks!r}: no such file or folder; kinds are {kinds}")
    return [
        Hole(name, image, mask, label)
        for (name, image, label), mask in zip(pictures, drawn, strict=True)
    ]


def _drawn(kind: str, picture: Picture, seed: tuple[int, int]) -> masks_lib.Mask:
    """Draws a mask of one kind for an image."""
    try:
        shape = picture.image.shape[:2]
        return masks_lib.make_mask(kind, *shape, np.random.default_rng(seed))
    except UserError as error:
        raise UserError(f"image {picture.name}: {error}") from error


def _read(file: pathlib.Path, picture: Picture, polarity: str) -> masks_lib.Mask:
    """Reads the mask of an image from a file."""
    mask = masks_lib.read_mask(file, polarity)
    if mask.shape != picture.image.shape[:2]:
        sizes = [
            f"{width} x {height} pixels" for height, width in (mask.shape, picture.image.shape[:2])
        ]
        raise UserError(f"{file}: {sizes[0]}, but image {picture.name} has {sizes[1]}")
    return mask


def mask_files(folder: pathlib.Path, names: Sequence[str]) -> list[pathlib.Path]:
    """Finds the mask file of every image.

    A file with exactly the name of the image, up to the ending, is taken first. Without such a
    file, upper and lower case and the composition of letters do not matter.

    Args:
        folder: The folder of masks, in the same subfolders as the images.
        names: Names of the images, see `Picture`.

    Raises:
        UserError: An image has no mask, or several, or would share its mask with another image.
    """
    found, asked = collections.defaultdict(list), collections.defaultdict(list)
    for file in list_images(folder):
        found[_folded(_stem(file))].append(file)
    for name in names:
        asked[_folded(name)].append(name)
    files = []
    for name in names:
        alike = found[_folded(name)]
        exact = [file for file in alike if _stem(file) == name]
        if not alike:
            raise UserError(f"{folder}: no mask for image {name}: expected {folder / name}.png")
        if len(exact or alike) > 1:
            raise UserError(
                f"{folder}: {', '.join(exact or alike)} are masks for image {name}: keep one"
            )
        if not exact and len(asked[_folded(name)]) > 1:
            several = " and ".join(asked[_folded(name)])
            raise UserError(f"{folder / alike[0]}: a mask for images {several}: give each its own")
        files.append(folder / (exact or alike)[0])
    return files


def _folded(name: str) -> str:
    """A name in a form that does not depend on its case and on the composition of letters."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())
