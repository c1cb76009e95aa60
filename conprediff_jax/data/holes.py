"""Images with holes: what inpainting reads.

Images are a folder of files, taken as they are, or a data set, whose images go through the data
pipeline (centre crops of the model's size). Masks are one of the kinds of `masks`, drawn anew for
every image; one file for all images; or a folder with a mask for every image, of the same name
whatever the ending.
"""

import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from conprediff_jax.data import masks as masks_lib
from conprediff_jax.data.pipeline import DataSpec, evaluation_iterator
from conprediff_jax.data.transforms import DECODE_ERRORS, decode
from conprediff_jax.errors import UserError
from conprediff_jax.images import EXTENSIONS, list_images

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
    root = pathlib.Path(images).expanduser()
    files = [root / name for name in list_images(root)]
    pictures = {}
    for file in files[:num]:
        name = file.relative_to(root).with_suffix("").as_posix()
        if name in pictures:
            raise UserError(f"{file}: another image is called {name} too: rename one of them")
        try:
            pictures[name] = Picture(name, np.asarray(decode(file.read_bytes())))
        except DECODE_ERRORS as error:
            raise UserError(f"{file}: not a readable image: {error}") from error
    return list(pictures.values())


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
        UserError: no such kind or path, a mask is missing, or has another size than its image.
    """
    path = pathlib.Path(masks).expanduser()
    if masks not in masks_lib.MASKS and not path.exists():
        raise UserError(
            f"--masks={masks}: no such file or folder, and none of {', '.join(masks_lib.MASKS)}"
        )
    holes = []
    for index, (name, image, label) in enumerate(pictures):
        if masks in masks_lib.MASKS:
            rng = np.random.default_rng((seed, index))
            mask = masks_lib.make_mask(masks, *image.shape[:2], rng)
        else:
            file = _mask_file(path, name) if path.is_dir() else path
            mask = masks_lib.read_mask(file, polarity)
            if mask.shape != image.shape[:2]:
                sizes = [f"{side[1]} x {side[0]} pixels" for side in (mask.shape, image.shape)]
                raise UserError(f"{file}: {sizes[0]}, but image {name} has {sizes[1]}")
        holes.append(Hole(name, image, mask, label))
    return holes


def _mask_file(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The mask of an image."""
    for ending in EXTENSIONS:
        file = folder / f"{name}{ending}"
        if file.exists():
            return file
    raise UserError(f"{folder}: no mask for image {name}: expected {folder / name}.png")
