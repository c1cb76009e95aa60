"""Sets of images to be judged, or to be held against.

Samples are read as they are: a folder of PNG, JPEG or WebP files in the order of their names, or an
npz whose `arr_0` is uint8 [images, height, width, 3] (ADM's sample batches). A reference is one of
these, a data set by its TFDS name, or a statistics file: `mu` and `sigma` of Inception's last
features (pytorch-fid), beside which ADM's reference batches hold `mu_s` and `sigma_s` of its
spatial ones, and the images. Data sets and reference folders go through the data pipeline, which
crops and resizes images that do not have the samples' size and leaves the others alone.
"""

import contextlib
import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from conprediff_jax import data
from conprediff_jax.errors import UserError
from conprediff_jax.images import list_images
from conprediff_jax.metrics import weights
from conprediff_jax.metrics.frechet import Gaussian

Batches = Callable[[int], Iterator[np.ndarray]]
_THREADS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A set of images.

    Attributes:
        name: what messages and reports call it.
        fingerprint: of the content.
        count: images there are, undecodable ones included; 0 where a statistics file does not say.
        size: height and width; None for statistics alone.
        batches: opens the images anew, in batches of a size, uint8 [<= size, height, width, 3];
            None for statistics alone.
        gaussians: moments that came with the set, by name of the features.
    """

    name: str
    fingerprint: str
    count: int
    size: tuple[int, int] | None
    batches: Batches | None
    gaussians: Mapping[str, Gaussian] = dataclasses.field(default_factory=dict)

    def pick(self, indices: Sequence[int]) -> np.ndarray:
        """Some images, in the order of their indices as given."""
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
        UserError: nothing there, mixed sizes, images that are not RGB, an npz of another layout.
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
    name: str, *, size: tuple[int, int], split: str = "train", data_dir: str | None = None
) -> ImageSet:
    """A data set, a folder, an npz of images, or statistics.

    Args:
        name: TFDS name, or path.
        size: height and width of the samples.
        split: of a data set.
        data_dir: where TFDS data sets live.

    Raises:
        UserError: see `read_samples`; or the data set is missing.
    """
    if name.endswith(".npz"):
        path = pathlib.Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        return _npz(path)
    if size[0] != size[1]:
        return read_samples(name)  # the pipeline makes squares
    return from_data(
        data.DataSpec(name=name, split=split, data_dir=data_dir, image_size=size[0], label=None)
    )


def from_data(spec: data.DataSpec) -> ImageSet:
    """A data set as its pipeline delivers it for evaluation: centre crops, no flips."""
    source = data.open_data(spec)

    def batches(size: int) -> Iterator[np.ndarray]:
        for batch in data.evaluation_iterator(spec, batch_size=size):
            yield batch["image"][batch["mask"]]

    content = (source[index]["image"] for index in range(len(source)))
    return ImageSet(
        name=spec.name,
        fingerprint=f"{weights.fingerprint(content)}-{spec.image_size}",
        count=len(source),
        size=(spec.image_size, spec.image_size),
        batches=batches,
    )


def from_arrays(name: str, paths: Sequence[pathlib.Path]) -> ImageSet:
    """Several npz files, such as those of a long generation, as one set."""
    parts = [_npz(path) for path in paths]

    def batches(size: int) -> Iterator[np.ndarray]:
        rest = np.empty((0, *parts[0].size, 3), np.uint8)
        for part in parts:
            for batch in part.batches(size):
                rest = np.concatenate([rest, batch])
                while len(rest) >= size:
                    yield rest[:size]
                    rest = rest[size:]
        if len(rest):
            yield rest

    return ImageSet(
        name=name,
        fingerprint=weights.fingerprint(part.fingerprint.encode() for part in parts),
        count=sum(part.count for part in parts),
        size=parts[0].size,
        batches=batches,
    )


def _folder(root: pathlib.Path) -> ImageSet:
    files = [root / name for name in list_images(root)]
    size = None
    for file in files:
        with _naming(file), Image.open(file) as image:  # reads the header alone
            mode, this = image.mode, (image.height, image.width)
        if mode != "RGB" and not (mode == "P" and "transparency" not in image.info):
            kind = "a grey image" if mode[0] in "L1IF" else f"an image of mode {mode}"
            raise UserError(f"{file}: {kind}; the metrics are defined on RGB: convert it")
        size = size or this
        if this != size:
            raise UserError(
                f"{file}: {this[1]} x {this[0]} pixels, but {files[0].name} has {size[1]} x "
                f"{size[0]}: all samples must have one size"
            )

    def batches(count: int) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, len(files), count):
                yield np.stack(list(pool.map(_decode, files[start : start + count])))

    return ImageSet(
        name=str(root),
        fingerprint=weights.fingerprint(file.read_bytes() for file in files),
        count=len(files),
        size=size,
        batches=batches,
    )


def _decode(file: pathlib.Path) -> np.ndarray:
    with _naming(file), Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


@contextlib.contextmanager
def _naming(file: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's, for what is no image
        raise UserError(f"{file}: not a readable image: {error}") from error


def _npz(path: pathlib.Path) -> ImageSet:
    """Images, statistics or both; images are read in pieces, not all at once."""
    try:
        with np.load(path) as file:
            names = list(file.files)
            pairs = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
            gaussians = {
                kind: Gaussian(mean=file[mu], covariance=file[sigma], count=_count(file))
                for kind, (mu, sigma) in pairs.items()
                if {mu, sigma} <= set(names)
            }
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable npz: {error}") from error
    if "arr_0" not in names and not gaussians:
        raise UserError(
            f"{path}: holds {', '.join(names)}; expected arr_0 (uint8 images), or mu and sigma"
        )
    count, size, batches = 0, None, None
    if "arr_0" in names:
        with _array(path) as (_, shape, dtype):
            if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8:
                raise UserError(
                    f"{path}: arr_0 is {dtype} of shape {shape}; expected RGB images, uint8 "
                    "[images, height, width, 3]"
                )
        count, size = shape[0], shape[1:3]

        def batches(step: int) -> Iterator[np.ndarray]:
            with _array(path) as (file, shape, _):
                for start in range(0, shape[0], step):
                    rows = min(step, shape[0] - start)
                    pixels = np.frombuffer(file.read(rows * int(np.prod(shape[1:]))), np.uint8)
                    yield pixels.reshape(rows, *shape[1:])

    elif gaussians:
        count = gaussians["pool"].count if "pool" in gaussians else 0
    return ImageSet(
        name=str(path),
        fingerprint=weights.file_fingerprint(path),
        count=count,
        size=size,
        batches=batches,
        gaussians=gaussians,
    )


def _count(file: Mapping[str, np.ndarray]) -> int:
    return int(file["count"]) if "count" in file else 0


@contextlib.contextmanager
def _array(path: pathlib.Path) -> Iterator[tuple]:
    """The open data of `arr_0`, its shape and its dtype."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0}
        reader = readers.get(version, np.lib.format.read_array_header_2_0)
        shape, fortran, dtype = reader(file)
        if fortran and len(shape) > 1:
            raise UserError(f"{path}: arr_0 is stored by columns; save it in C order")
        yield file, shape, dtype
