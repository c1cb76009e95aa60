"""Reads npz files from other programs: images, moments of features, or both.

    arr_0           images, uint8 [images, height, width, 3]; ADM's sample batches. Images of 1 or
                    4 channels become RGB
    mu, sigma       moments of Inception's last features; pytorch-fid's statistics
    mu_s, sigma_s   of its spatial features; ADM's reference batches
    count           how many images the moments are of, where the file says

Every file is read to its end before it is used, so that a truncated or damaged file is found at
once. Pickled objects are not loaded.
"""

import contextlib
import dataclasses
import math
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float, UInt8
from numpy.lib import format as npy

from conprediff_jax.common.errors import UserError, first_line
from conprediff_jax.common.images import as_rgb
from conprediff_jax.metrics.frechet import Gaussian

_MOMENTS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_HEADERS = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
    (3, 0): npy.read_array_header_2_0,  # the same, in UTF-8
}
_ZIP64_COUNT = 2**16 - 1  # stands for the number of members where that is stored elsewhere
_ROUNDING = 1e-4  # share of the largest variance by which float32 may break symmetry or positivity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Npz:
    """The content of a file: images, moments, or both.

    Attributes:
        path: The file.
        shape: Shape of its images, without a 0; None where the file has no images.
        gaussians: Moments by name of the features.
    """

    path: str | os.PathLike
    shape: tuple[int, int, int, int] | None
    gaussians: Mapping[str, Gaussian]

    def batches(
        self, size: int, index: int = 0, count: int = 1
    ) -> Iterator[UInt8[np.ndarray, "_batch height width 3"]]:
        """The images in batches of at most `size`, so that they need not fit into memory.

        Args:
            size: Images at a time.
            index: Number of the first batch.
            count: Distance to the next batch; those in between are left out.

        Raises:
            UserError: The file has changed and is not readable any more.
        """
        with (
            naming(self.path),
            zipfile.ZipFile(self.path) as archive,
            archive.open("arr_0.npy") as file,
        ):
            _header(file)
            for number, start in enumerate(range(0, self.shape[0], size)):
                shape = min(size, self.shape[0] - start), *self.shape[1:]
                if number % count != index:
                    file.seek(math.prod(shape), os.SEEK_CUR)
                    continue
                yield as_rgb(np.frombuffer(file.read(math.prod(shape)), np.uint8).reshape(shape))


def read(path: str | os.PathLike) -> Npz:
    """The content of an npz, with moments in float64.

    Raises:
        UserError: The file is no npz, is damaged, or holds other arrays than the module describes.
    """
    with naming(path), zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged, by its checksum")
        if _stated_members(archive, path) not in (len(archive.infolist()), _ZIP64_COUNT):
            raise ValueError("its directory is damaged: it lists fewer or more arrays than it says")
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        shape = _image_shape(archive, path) if "arr_0" in names else None
        count = _count(archive, path) if "count" in names else 0
        gaussians = {
            kind: _gaussian(archive, path, *pair, count)
            for kind, pair in _MOMENTS.items()
            if set(pair) <= set(names)
        }
    if shape is None and not gaussians:
        raise UserError(
            f"{path}: holds {', '.join(names) or 'nothing'}; expected arr_0 (uint8 images), or mu "
            "and sigma"
        )
    return Npz(path=path, shape=shape, gaussians=gaussians)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Turns errors of a damaged file into a UserError of one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # zip, npy headers and compressions raise what they like
        raise UserError(f"{path}: not a readable file of arrays: {first_line(error)}") from error


def _stated_members(archive: zipfile.ZipFile, path: str | os.PathLike) -> int:
    """The number of members that the end of the zip file states; zipfile does not check it."""
    with open(path, "rb") as file:
        file.seek(-22 - len(archive.comment), os.SEEK_END)
        return struct.unpack("<10xH10x", file.read(22))[0]


def _header(file: zipfile.ZipExtFile) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads up to the data: the shape, whether the array is in column order, and the dtype."""
    version = npy.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"npy version {version} is not known")
    return _HEADERS[version](file)


def _image_shape(archive: zipfile.ZipFile, path: str | os.PathLike) -> tuple[int, ...]:
    with archive.open("arr_0.npy") as file:
        shape, by_columns, dtype = _header(file)
        there = archive.getinfo("arr_0.npy").file_size - file.tell()
    if len(shape) != 4 or shape[-1] not in (1, 3, 4) or dtype != np.uint8:
        raise UserError(
            f"{path}: arr_0 is {dtype} of shape {shape}; expected RGB images, uint8 [images, "
            "height, width, 3]"
        )
    if min(shape) < 1:
        raise UserError(f"{path}: arr_0 has shape {shape}: there are no images")
    if by_columns:
        raise UserError(f"{path}: arr_0 is stored by columns; save it in C order")
    if there != math.prod(shape):
        raise UserError(
            f"{path}: arr_0 has {there} bytes; its shape {shape} needs {math.prod(shape)}"
        )
    return shape


def _numbers(archive: zipfile.ZipFile, path: str | os.PathLike, name: str) -> np.ndarray:
    """An array of finite real numbers."""
    with archive.open(f"{name}.npy") as file:
        _, _, dtype = _header(file)
    if dtype.kind not in "iuf":
        raise UserError(f"{path}: {name} is {dtype}; expected real numbers")
    with archive.open(f"{name}.npy") as file:
        array = npy.read_array(file, allow_pickle=False)
    if not np.isfinite(array).all():
        raise UserError(f"{path}: {name} holds values that are no finite numbers")
    return array


def _count(archive: zipfile.ZipFile, path: str | os.PathLike) -> int:
    count = _numbers(archive, path, "count")
    if count.size != 1 or count.item() < 0 or count.item() != int(count.item()):
        raise UserError(f"{path}: count is {count.dtype} of shape {count.shape}; expected a number")
    return int(count.item())


def _gaussian(
    archive: zipfile.ZipFile, path: str | os.PathLike, mu: str, sigma: str, count: int
) -> Gaussian:
    mean, covariance = _numbers(archive, path, mu), _numbers(archive, path, sigma)
    if mean.ndim != 1 or not mean.size:
        raise UserError(f"{path}: {mu} has shape {mean.shape}; expected [features]")
    if covariance.shape != 2 * mean.shape:
        raise UserError(
            f"{path}: {sigma} has shape {covariance.shape}; expected {2 * mean.shape}, since {mu} "
            f"has {mean.size} features"
        )
    covariance = covariance.astype(np.float64)
    if reason := _not_a_covariance(covariance):
        raise UserError(f"{path}: {sigma} is no covariance: {reason}")
    return Gaussian(mean=mean.astype(np.float64), covariance=covariance, count=count)


def _not_a_covariance(matrix: Float[np.ndarray, "n n"]) -> str:
    """Why the matrix is no covariance, rounding errors aside; '' if it is one."""
    little = _ROUNDING * np.abs(np.diagonal(matrix)).max()
    if np.abs(matrix - matrix.T).max() > little:
        return "it is not symmetric"
    if (lowest := np.linalg.eigvalsh(matrix)[0]) < -little:
        return f"it has the eigenvalue {lowest:.3g}, and none may be negative"
    return ""
