"""Sets of images: the samples that are evaluated, and the reference that they are compared with.

Samples are read as they are. They are a folder of image files in the natural order of their names,
turned upright by their EXIF orientation, or an npz whose `arr_0` is uint8 [images, height, width,
3] (ADM's sample batches). All sets are RGB: a folder of grey images alone and an npz of 1 or 4
channels are converted. A reference is one of these, a data set by its TFDS name, or a statistics
file. A statistics file holds `mu` and `sigma` of Inception's last features (pytorch-fid); ADM's
reference batches also hold `mu_s` and `sigma_s` of its spatial features, and the images. Data sets
and reference folders go through the data pipeline, which crops and resizes images that do not have
the size of the samples, and leaves the others alone.

Where two folders are compared image by image, images of the same name are partners, whatever the
endings of the names. Arrays and data sets have no names, and their images are compared in order.
"""

import collections
import dataclasses
import functools
import itertools
import os
import pathlib
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from conprediff_jax import data
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.fingerprint import file_fingerprint, fingerprint
from conprediff_jax.common.images import BadImage, as_rgb, list_images, read_image
from conprediff_jax.data.files import FolderSource
from conprediff_jax.metrics import npz
from conprediff_jax.metrics.frechet import Gaussian
from conprediff_jax.parallel import share

Batches = Callable[..., Iterator[np.ndarray]]
_THREADS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A set of images.

    Attributes:
        name: The name of the set in messages and reports.
        fingerprint: Fingerprint of the content.
        count: Number of images, undecodable ones included; 0 where a statistics file does not say.
        size: Height and width in pixels; None for statistics alone.
        batches: Function from a batch size to an iterator over all images, uint8 [<= size, height,
            width, 3]; with an index and a count after the size, over every count-th of these
            batches, from the index-th on. None for statistics alone.
        gaussians: Moments that came with the set, by name of the features.
        names: The file of each image, relative to the folder; None where images have no names.
    """

    name: str
    fingerprint: str
    count: int
    size: tuple[int, int] | None
    batches: Batches | None
    gaussians: Mapping[str, Gaussian] = dataclasses.field(default_factory=dict)
    names: Sequence[str] | None = None

    def part(self, size: int) -> Iterator[np.ndarray]:
        """The batches of this process, as `share.mine` deals them out."""
        return self.batches(size, jax.process_index(), jax.process_count())

    def pick(self, indices: Sequence[int]) -> np.ndarray:
        """The images of these indices, in this order."""
        wanted, found, first = set(indices), {}, 0
        for batch in self.batches(256):
            for index in wanted.intersection(range(first, first + len(batch))):
                found[index] = batch[index - first]
            first += len(batch)
            if len(found) == len(wanted):
                break
        return np.stack([found[index] for index in indices])


def read_samples(path: str | os.PathLike) -> ImageSet:
    """A folder or an npz of images, as they are.

    Raises:
        UserError: There is nothing at the path, an image is unreadable or not RGB, images differ
            in size, or the npz has another layout.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such folder or npz of images")
    found = _npz(path)
    if found.batches is None:
        raise UserError(f"{path}: holds statistics; samples must be images (arr_0)")
    return found


def read_reference(
    name: str,
    *,
    size: tuple[int, int],
    split: str = "train",
    data_dir: str | None = None,
    channels: int = 3,
    strict: bool = False,
) -> ImageSet:
    """A data set, a folder, an npz of images, or statistics.

    Args:
        name: TFDS name, or path.
        size: Height and width of the samples, in pixels.
        split: Split of a data set.
        data_dir: Folder of the TFDS data sets.
        channels: Channels of the samples: with 1, images of data sets and folders become grey.
        strict: Whether `batches` raises a UserError for an image that cannot be decoded, as
            comparisons image by image need it; otherwise such an image is left out.

    Raises:
        UserError: As for `read_samples`, or the data set is missing.
    """
    if name.endswith(".npz"):
        path = pathlib.Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        return _npz(path)
    side = size[0] if size[0] == size[1] else size
    spec = data.DataSpec(
        name=name,
        split=split,
        data_dir=data_dir,
        image_size=side,
        channels=channels,
        label=None,
    )
    return from_data(spec, strict=strict)


def from_data(spec: data.DataSpec, *, strict: bool = False) -> ImageSet:
    """A data set as its pipeline delivers it for evaluation: centre crops, no flips.

    Args:
        spec: The data set.
        strict: See `read_reference`.
    """
    source = data.open_data(spec)
    names = source.files if isinstance(source, FolderSource) else None

    def batches(size: int, index: int = 0, count: int = 1) -> Iterator[np.ndarray]:
        batches = data.evaluation_iterator(
            spec, batch_size=size, process_index=index, process_count=count
        )
        starts = itertools.count(index * size, count * size)
        for first, batch in zip(starts, batches, strict=False):
            if first >= len(source):  # another process has the last images
                return
            bad = np.flatnonzero(~batch["mask"][: len(source) - first])
            if strict and len(bad):
                name = names[first + bad[0]] if names else f"image {first + bad[0]}"
                raise UserError(
                    f"{spec.name}: {name} cannot be decoded, so there is nothing to compare its "
                    "sample with"
                )
            yield as_rgb(batch["image"][batch["mask"]])

    content = (source[index]["image"] for index in range(len(source)))
    form = str(spec.image_size) if spec.channels == 3 else str(spec.image_shape)
    return ImageSet(
        name=spec.name,
        fingerprint=f"{share.from_first(lambda: fingerprint(content))}-{form}",
        count=len(source),
        size=spec.image_shape[:2],
        batches=batches,
        names=names,
    )


def from_arrays(name: str, paths: Sequence[os.PathLike]) -> ImageSet:
    """Several npz files of images, such as those that `generate_to` writes, as one set."""
    found = share.from_first(lambda: [(npz.read(path), file_fingerprint(path)) for path in paths])
    counts = [part.shape[0] for part, _ in found]
    ends = np.cumsum(counts).tolist()

    @functools.lru_cache(maxsize=1)
    def whole(number: int) -> np.ndarray:
        (images,) = found[number][0].batches(counts[number])
        return images

    def batches(size: int, index: int = 0, count: int = 1) -> Iterator[np.ndarray]:
        for first in range(index * size, ends[-1], count * size):
            last = min(first + size, ends[-1])
            touched = (n for n, end in enumerate(ends) if first < end and end - counts[n] < last)
            begins = ((n, ends[n] - counts[n]) for n in touched)
            yield np.concatenate([whole(n)[max(first - b, 0) : last - b] for n, b in begins])

    return ImageSet(
        name=name,
        fingerprint=fingerprint(content.encode() for _, content in found),
        count=ends[-1],
        size=found[0][0].shape[1:3],
        batches=batches,
    )


def check_partners(
    samples: Sequence[str] | None, reference: Sequence[str] | None, title: str
) -> None:
    """Checks that the i-th images of both sides have the same name, their endings aside.

    Both sides are in natural order, in which endings count last. So where both sides have the same
    names, these stand at the same places.

    Args:
        samples: Names of the samples; None where they have none, and are compared in order.
        reference: Names of the reference images; None likewise.
        title: The name of the reference in messages.

    Raises:
        UserError: The names differ, or two images have the same name.
    """
    if samples is None or reference is None or list(samples) == list(reference):
        return
    stems = [[_stem(name) for name in names] for names in (samples, reference)]
    for name, other in itertools.zip_longest(*stems):
        if name != other:
            raise UserError(
                f"images are compared by their names: {name or 'no more samples'} stands where "
                f"{title} has {other or 'no more images'}; give both folders the same names"
            )
    name, times = collections.Counter(stems[0]).most_common(1)[0]
    if times > 1:
        raise UserError(f"images are compared by their names: {times} samples are called {name}")


def _stem(name: str) -> str:
    return unicodedata.normalize("NFC", os.path.splitext(name)[0])


def _folder(root: pathlib.Path) -> ImageSet:
    names = list_images(root)
    files = [root / name for name in names]
    decode = functools.partial(_decode, grey=_is_grey(files[0]))

    def batches(size: int, index: int = 0, count: int = 1) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(index * size, len(files), count * size):
                yield np.stack(list(pool.map(decode, files[start : start + size])))

    size, content = share.from_first(
        lambda: (
            _one_size(files, decode),
            fingerprint(file.read_bytes() for file in files),
        )
    )
    return ImageSet(
        name=str(root),
        fingerprint=content,
        count=len(files),
        size=size,
        batches=batches,
        names=names,
    )


def _is_grey(file: pathlib.Path) -> bool:
    """Whether a file is a grey image of 8 bits; then all of its folder must be."""
    try:
        return read_image(file.read_bytes()).mode == "L"
    except (OSError, BadImage):
        return False


def _one_size(
    files: Sequence[pathlib.Path], decode: Callable[[pathlib.Path], np.ndarray]
) -> tuple[int, int]:
    """Height and width of all images; decodes each once, so that bad ones are found early."""
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = list(pool.map(lambda file: decode(file).shape[:2], files))
    height, width = sizes[0]
    for file, size in zip(files, sizes, strict=True):
        if size != (height, width):
            raise UserError(
                f"{file}: {size[1]} x {size[0]} pixels, but {files[0].name} has {width} x "
                f"{height}: all samples must have one size"
            )
    return height, width


def _decode(file: pathlib.Path, grey: bool) -> np.ndarray:
    """The image at its own size, turned upright, uint8 [height, width, 3]; grey ones become RGB."""
    try:
        image = read_image(file.read_bytes())
    except (OSError, BadImage) as error:
        raise UserError(f"{file}: not a readable image: {error}") from error
    if grey and image.mode == "L":
        return np.asarray(image.convert("RGB"))
    if image.mode != "RGB" and (image.mode != "P" or "transparency" in image.info):
        kind = "a grey image" if image.mode[0] in "L1IF" else f"an image of mode {image.mode}"
        raise UserError(f"{file}: {kind}; the metrics are defined on RGB: convert it")
    return np.asarray(image.convert("RGB"))


def _npz(path: pathlib.Path) -> ImageSet:
    """The images, the statistics or both; images are read batch by batch."""
    found, content = share.from_first(lambda: (npz.read(path), file_fingerprint(path)))
    count, *size = found.shape[:3] if found.shape else (_moment_count(found.gaussians),)
    return ImageSet(
        name=str(path),
        fingerprint=content,
        count=count,
        size=tuple(size) or None,
        batches=found.batches if found.shape else None,
        gaussians=found.gaussians,
    )


def _moment_count(gaussians: Mapping[str, Gaussian]) -> int:
    """Number of images behind the moments; 0 where the file does not say."""
    return gaussians["pool"].count if "pool" in gaussians else 0
