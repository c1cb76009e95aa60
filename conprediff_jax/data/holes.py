"""Images with holes: what inpainting reads.

Images are a folder of files, taken as they are, or a data set, whose images go through the data
pipeline (centre crops of the model's size). Masks are one of the kinds of `masks`, drawn anew for
every image; one file for all images; or a folder with a mask for every image, of the same name
whatever the ending. Names are the same also where upper and lower case differ, or how Unicode
composes their letters.
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

from conprediff_jax.common.errors import FieldError, UserError
from conprediff_jax.common.images import BadImage, list_images
from conprediff_jax.data import masks as masks_lib
from conprediff_jax.data.pipeline import DataSpec, evaluation_iterator
from conprediff_jax.data.transforms import decode

_BATCH = 64


class Picture(NamedTuple):
    """An image.

    Attributes:
        name: of its file, without the ending and relative to its folder; or its number in a data
            set, six digits.
        image: its pixels.
        label: its class, where the data have classes.
    """

    name: str
    image: UInt8[np.ndarray, "height width 3"]
    label: int | None = None


class Hole(NamedTuple):
    """An image to be filled.

    Attributes:
        name: see `Picture`.
        image: the whole image.
        mask: true where it is known.
        label: its class, where the data have classes.
    """

    name: str
    image: UInt8[np.ndarray, "height width 3"]
    mask: Bool[np.ndarray, "height width"]
    label: int | None = None

    @property
    def masked(self) -> UInt8[np.ndarray, "height width 3"]:
        """The image with grey in the hole."""
        return np.where(self.mask[..., None], self.image, np.uint8(128))


def is_folder(images: str) -> bool:
    """Whether a name is a folder of image files, and no data set."""
    root = pathlib.Path(images).expanduser()
    return root.is_dir() and not (root / "dataset_info.json").exists()


def read_folder(images: str, *, num: int | None = None) -> list[Picture]:
    """The image files of a folder and its subfolders, in their natural order.

    Args:
        images: path of the folder.
        num: how many, the first; all when None.

    Raises:
        UserError: there are none, two have one name, or one cannot be decoded.
    """
    root, pictures = pathlib.Path(images).expanduser(), {}
    for file in list_images(root)[:num]:
        name, path = _stem(file), root / file
        if name in pictures:
            raise UserError(f"{path}: another image is called {name} too: rename one of them")
        try:
            pictures[name] = Picture(name, np.asarray(decode(path.read_bytes())))
        except OSError as error:
            raise UserError(f"{path}: not a readable image: {error.strerror}") from error
        except BadImage as error:
            raise UserError(f"{path}: not a readable image: {error}") from error
    return list(pictures.values())


def _stem(file: str) -> str:
    """The name of an image: that of its file without the ending."""
    return os.path.splitext(file)[0]


def read_data(spec: DataSpec, *, num: int | None = None) -> list[Picture]:
    """The images of a data set, in its order, without those that cannot be decoded.

    Args:
        spec: which, and how they are cropped and resized.
        num: how many, the first; all when None.

    Raises:
        DataError: the data are missing, or lack the split.
    """
    spec = spec.of_images(keep=(), text=None)
    batches = evaluation_iterator(spec, batch_size=min(num or _BATCH, _BATCH))
    return list(itertools.islice(_numbered(batches), num))


def _numbered(batches: Iterator[dict[str, np.ndarray]]) -> Iterator[Picture]:
    """The images of batches, without those that fill up or could not be decoded."""
    numbers = itertools.count()
    for batch in batches:
        for row in np.flatnonzero(batch["mask"]):
            label = int(batch["label"][row]) if "label" in batch else None
            yield Picture(f"{next(numbers):06}", batch["image"][row], label)


def cut(
    pictures: Sequence[Picture], masks: str, *, polarity: str = "keep", seed: int = 0
) -> list[Hole]:
    """Takes a part of every image away.

    Args:
        pictures: the images.
        masks: a kind of mask, the path of a mask, or that of a folder of masks.
        polarity: what white says in mask files, see `masks.read_mask`.
        seed: of masks that are drawn. The mask of image i is a function of the seed and i.

    Raises:
        UserError: no such kind or path, an image is too small for the kind, a mask is missing, not
            the only one, or has another size than its image.
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
    """A mask of a kind for an image."""
    try:
        shape = picture.image.shape[:2]
        return masks_lib.make_mask(kind, *shape, np.random.default_rng(seed))
    except UserError as error:
        raise UserError(f"image {picture.name}: {error}") from error


def _read(file: pathlib.Path, picture: Picture, polarity: str) -> masks_lib.Mask:
    """The mask of an image from its file."""
    mask = masks_lib.read_mask(file, polarity)
    if mask.shape != picture.image.shape[:2]:
        sizes = [
            f"{width} x {height} pixels" for height, width in (mask.shape, picture.image.shape[:2])
        ]
        raise UserError(f"{file}: {sizes[0]}, but image {picture.name} has {sizes[1]}")
    return mask


def mask_files(folder: pathlib.Path, names: Sequence[str]) -> list[pathlib.Path]:
    """The file of the mask of every image.

    A file of exactly the name counts first; otherwise, and without the ending, case and the way
    Unicode composes letters do not matter.

    Args:
        folder: of masks, in the same subfolders as the images.
        names: see `Picture`.

    Raises:
        UserError: an image has no mask, or several, or shares its only one with another image.
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
    """A name as others of the same letters have it, whatever their case and composition."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())
