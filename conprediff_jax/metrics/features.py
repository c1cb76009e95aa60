"""Computes features of images on the devices of every process, and keeps them on disk.

    <cache>/<images>-<extractor>/      both named by the fingerprint of their content
        pool.npz        mu, sigma and count, in the format of pytorch-fid
        pool.npy        the features themselves, float32, where a metric needs them

A file appears under its name only when it is complete, and `pool.npz` appears last, so several runs
can share a cache. Features are written to disk batch by batch and mapped into memory for use, so
they need not fit into memory. Several processes take the batches in turn, and write what they found
into folders of their own, which the first process joins.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, BinaryIO

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from conprediff_jax import parallel
from conprediff_jax.common import hub
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import write_atomically, writing
from conprediff_jax.common.fingerprint import file_fingerprint
from conprediff_jax.common.images import as_rgb
from conprediff_jax.common.progress import ProgressLine
from conprediff_jax.metrics import npz
from conprediff_jax.metrics.frechet import Gaussian, Moments
from conprediff_jax.metrics.image_sets import ImageSet
from conprediff_jax.metrics.networks import dinov2, inception, random_vgg16
from conprediff_jax.parallel import share
from conprediff_jax.weights import cached


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extractor:
    """A feature network.

    Attributes:
        name: The name of the network in reports.
        fingerprint: Fingerprint of the network and its weights.
        apply: Function from (params, uint8 images) to features by name, `pool` among them.
        params: Parameters of the network.
        labels: Published names of the metrics on these features, by their names in `suite`.
    """

    name: str
    fingerprint: str
    apply: Callable[[Any, Any], dict[str, Any]]
    params: Any
    labels: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """The features of a set of images.

    Attributes:
        gaussians: Moments by name of the features.
        rows: The features themselves by name, where they were kept; mapped from disk.
        count: Number of images; 0 where a statistics file does not say.
    """

    gaussians: Mapping[str, Gaussian]
    rows: Mapping[str, Float[np.ndarray, "count _features"]]
    count: int


def _labels(network: str) -> dict[str, str]:
    """The names of the metrics on the features of a network that is not Inception."""
    short = {"frechet": "FD", "kernel": "KD", "precision": "precision", "recall": "recall"}
    return {metric: f"{label}-{network}" for metric, label in short.items()}


def random_extractor() -> Extractor:
    """The VGG-16 with fixed random weights, which needs no file."""
    name = "random-VGG16"
    return Extractor(
        name=name,
        fingerprint=f"random-vgg16-{random_vgg16.KEY}",
        apply=lambda params, x: {"pool": random_vgg16.RandomVGG16().apply({"params": params}, x)},
        params=random_vgg16.params(),
        labels=_labels(name),
    )


def inception_extractor(path: str | os.PathLike, cache: str | os.PathLike) -> Extractor:
    """The 2015 Inception with pytorch-fid's weights.

    Args:
        path: The weight file, or its address on the Hub.
        cache: Folder for converted weights.

    Raises:
        UserError: The file is missing, damaged, or of another network.
    """
    try:
        params = inception.params_from_pytorch_fid(cached.read(path, cache))
    except ValueError as error:
        message = str(error)
        raise UserError(
            message if message.startswith(str(path)) else f"{path}: {message}"
        ) from error

    def apply(params: Any, images: Any) -> dict[str, Any]:
        features = inception.Inception().apply({"params": params}, images)._asdict()
        return {name: features[name] for name in ("pool", "spatial", "logits")}

    return Extractor(
        name="Inception (2015)",
        fingerprint=f"inception-{file_fingerprint(hub.local(path))}",
        apply=apply,
        params=params,
        labels={
            "frechet": "FID",
            "spatial": "sFID",
            "kernel": "KID",
            "score": "IS",
            "precision": "precision",
            "recall": "recall",
        },
    )


def dinov2_extractor(folder: str | os.PathLike, cache: str | os.PathLike) -> Extractor:
    """DINOv2, at 224 x 224 pixels.

    Args:
        folder: The folder of a checkpoint, or its address on the Hub; see `networks.dinov2`.
        cache: Folder for converted weights.

    Raises:
        UserError: A file is missing, damaged, or of another network.
    """
    model, params = dinov2.load(folder, cache)
    weights = dinov2.weights_of(pathlib.Path(hub.local(folder)))

    def apply(params: Any, images: Any) -> dict[str, Any]:
        return {"pool": model.apply({"params": params}, dinov2.resized(images))}

    return Extractor(
        name="DINOv2",
        fingerprint=f"dinov2-{file_fingerprint(weights)}",
        apply=apply,
        params=params,
        labels=_labels("DINOv2"),
    )


_SIZES = "sizes.npz"  # what a process notes of its batches


class Runner:
    """Runs a feature network on batches, which are divided over the devices.

    Args:
        extractor: The network.
        mesh: The devices; every process passes the whole batch.
        batch_size: Images at a time; rounded up to a multiple of the number of devices.
    """

    def __init__(self, extractor: Extractor, mesh: Mesh, batch_size: int = 64):
        parts = mesh.shape["data"] * mesh.shape["fsdp"]
        self.extractor = extractor
        self.batch_size = -(-batch_size // parts) * parts
        self._sharding = parallel.batch_sharding(mesh)
        self._params = jax.device_put(extractor.params, parallel.replicated(mesh))
        self._apply = jax.jit(extractor.apply, out_shardings=parallel.replicated(mesh))

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Features of at most `batch_size` images, which are read as RGB."""
        images, count = as_rgb(images), len(images)
        if count < self.batch_size:  # one shape, one compilation
            fill = np.broadcast_to(images[:1], (self.batch_size - count, *images.shape[1:]))
            images = np.concatenate([images, fill])
        batch = jax.make_array_from_callback(images.shape, self._sharding, lambda i: images[i])
        return {k: np.asarray(v)[:count] for k, v in self._apply(self._params, batch).items()}


def extract(
    runner: Runner, images: ImageSet, cache: str | os.PathLike, keep: Collection[str] = ()
) -> Features:
    """Features of a set of images, read from the cache or computed and written there.

    Args:
        runner: The network.
        images: The set of images; a statistics file gives the moments that it holds.
        cache: Folder that all sets and networks share.
        keep: Names of the features that are kept themselves; of all others, only the moments are
            kept.

    Raises:
        UserError: A file cannot be written or read, or some features are no finite numbers.
    """
    compute(runner, images, cache, keep)
    return read(runner.extractor, images, cache)


def compute(
    runner: Runner,
    images: ImageSet,
    cache: str | os.PathLike,
    keep: Collection[str] = (),
    *,
    shared: str | os.PathLike | None = None,
) -> None:
    """Computes features unless the cache has them; all processes compute them together.

    Args:
        runner: The network, on the devices of this process.
        images: See `extract`.
        cache: See `extract`; the first process writes there.
        keep: See `extract`.
        shared: A folder that all processes see, where each writes its part; None for `cache`.

    Raises:
        UserError: See `extract`.
    """
    if images.batches is None:
        return
    folder = _folder(runner.extractor, images, cache)
    needed = [folder / "pool.npz", *(folder / f"{name}.npy" for name in keep)]
    if not share.from_first(lambda: all(file.exists() for file in needed)):
        _compute(runner, images, folder, set(keep), pathlib.Path(shared or folder))


def read(extractor: Extractor, images: ImageSet, cache: str | os.PathLike) -> Features:
    """Features that `compute` has computed; see `extract`."""
    if images.batches is None:
        gaussians = _known(images, extractor)
        return Features(gaussians=gaussians, rows={}, count=images.count)
    folder = _folder(extractor, images, cache)
    gaussians = {
        file.stem: npz.read(file).gaussians["pool"] for file in sorted(folder.glob("*.npz"))
    }
    count = gaussians["pool"].count
    if images.gaussians:  # a published file's own moments come first
        gaussians |= _known(images, extractor)
    rows = {file.stem: _load_rows(file, count) for file in sorted(folder.glob("*.npy"))}
    return Features(gaussians=gaussians, rows=rows, count=count)


def check_statistics(images: ImageSet, extractor: Extractor) -> None:
    """Checks, before anything is computed, that the moments of a set belong to this network.

    Raises:
        UserError: They belong to another network, or have another number of features.
    """
    known = _known(images, extractor)
    if not known:
        return
    image = jax.ShapeDtypeStruct((1, *(images.size or (64, 64)), 3), np.uint8)
    features = jax.eval_shape(extractor.apply, extractor.params, image)
    for name, gaussian in known.items():
        if len(gaussian.mean) != features[name].shape[-1]:
            raise UserError(
                f"{images.name}: statistics of {len(gaussian.mean)} {name} features, but "
                f"{extractor.name} has {features[name].shape[-1]}"
            )


def _known(images: ImageSet, extractor: Extractor) -> dict[str, Gaussian]:
    """The moments that came with a set, which are always those of Inception features."""
    if "spatial" in extractor.labels:
        return dict(images.gaussians)
    if images.batches is None:
        raise UserError(
            f"{images.name}: holds statistics of Inception features, and {extractor.name} has "
            "other features; give images"
        )
    return {}


def _folder(extractor: Extractor, images: ImageSet, cache: str | os.PathLike) -> pathlib.Path:
    return pathlib.Path(cache) / f"{images.fingerprint}-{extractor.fingerprint}"


def _compute(
    runner: Runner, images: ImageSet, folder: pathlib.Path, keep: set[str], shared: pathlib.Path
) -> None:
    """Runs the network over all images, and moves the finished files into the folder."""
    name = share.from_first(lambda: f".{uuid.uuid4().hex}")
    parts, partial = shared / name, folder / name
    try:
        _write_part(runner, images, parts / str(jax.process_index()), keep)
        share.wait_for_all()
        if share.is_first():
            _join([parts / str(i) for i in range(jax.process_count())], partial, images.name)
            with writing(folder):
                # Another run may write the same files at the same time; it does not matter whose
                # stay.
                files = [file for file in partial.iterdir() if file.is_file()]
                for file in sorted(files, key=lambda file: file.name == "pool.npz"):
                    file.replace(folder / file.name)
    finally:
        if share.is_first():
            for left in (parts, partial):
                shutil.rmtree(left, ignore_errors=True)
    share.wait_for_all()


def _write_part(runner: Runner, images: ImageSet, folder: pathlib.Path, keep: set[str]) -> None:
    """Runs the network over the images of this process, and writes what is found into a folder.

    It holds the features of `keep`, the moments of all, and the number of images in every batch.
    """
    with writing(folder.parent.parent):
        folder.mkdir(parents=True)
    moments: dict[str, Moments] = {}
    files: dict[str, Any] = {}
    sizes = []
    starts = share.mine(range(0, images.count, runner.batch_size))
    count = sum(min(runner.batch_size, images.count - start) for start in starts)
    progress = ProgressLine(count, "images", about=f"features of {images.name}")
    progress.compiling()
    for batch in images.part(runner.batch_size):
        sizes.append(len(batch))
        for name, rows in runner(batch).items() if len(batch) else ():
            if name != "logits":
                moments.setdefault(name, Moments()).update(rows)
            if name in keep:
                if name not in files:
                    files[name] = _Rows(folder / f"{name}.npy", rows.shape[1])
                files[name].append(rows)
        progress.add(len(batch))
    for file in files.values():
        file.close()
    for name, running in moments.items():
        _save(folder / f"{name}.npz", **running.parts())
    _save(folder / _SIZES, sizes=np.array(sizes, int))


def _join(parts: Sequence[pathlib.Path], folder: pathlib.Path, title: str) -> None:
    """Writes the moments and the features of all images into a folder.

    Args:
        parts: The folders that `_write_part` has written, by process.
        folder: The folder.
        title: The name of the images in messages.
    """
    moments: dict[str, Moments] = {}
    for file in itertools.chain(*(part.glob("*.npz") for part in parts)):
        if file.name != _SIZES:
            with np.load(file) as found:
                known = float(found["count"]), found["mean"], found["scatter"]
                moments.setdefault(file.stem, Moments()).merge(*known)
    for name, running in moments.items():
        try:
            gaussian = running.gaussian()
        except ValueError as error:
            raise UserError(f"{title}: {error}") from error
        arrays = {"mu": gaussian.mean, "sigma": gaussian.covariance, "count": gaussian.count}
        _save(folder / f"{name}.npz", **arrays)
    for name in {file.name for part in parts for file in part.glob("*.npy")}:
        if len(parts) == 1:
            (parts[0] / name).rename(folder / name)
        else:
            _join_rows(parts, folder / name)


def _join_rows(parts: Sequence[pathlib.Path], path: pathlib.Path) -> None:
    """Writes the features of all images in their order: processes had the batches in turn."""
    sizes, batches = [], []
    for part in parts:
        with np.load(part / _SIZES) as found:
            sizes.append(found["sizes"].tolist())
        there = (part / path.name).exists()  # not where a process had no images
        rows = np.load(part / path.name, mmap_mode="r") if there else np.empty((0, 0))
        batches.append(np.split(rows, np.cumsum(sizes[-1])[:-1]))
    joined = None
    for turn in range(max(map(len, sizes))):
        for process in range(len(parts)):
            if turn < len(sizes[process]) and sizes[process][turn]:
                rows = batches[process][turn]
                joined = joined or _Rows(path, rows.shape[1])
                joined.append(rows)
    joined.close()


def _save(path: pathlib.Path, **arrays: Any) -> None:
    write_atomically(path, functools.partial(np.savez, **arrays))


class _Rows:
    """An npy file of float32 that grows row by row; closing it writes their number into its head.

    Rows are written, and not mapped into memory: so a full disk raises an error, where a mapped
    file would end the process by a signal.
    """

    def __init__(self, path: pathlib.Path, width: int):
        self._path, self._count, self._width = path, 0, width
        with writing(path), path.open("wb") as file:
            self._head(file)

    def append(self, rows: np.ndarray) -> None:
        with writing(self._path), self._path.open("ab") as file:
            file.write(rows.astype(np.float32).tobytes())
        self._count += len(rows)

    def close(self) -> None:
        with writing(self._path), self._path.open("r+b") as file:
            self._head(file)

    def _head(self, file: BinaryIO) -> None:
        """Writes the head; NumPy pads it, so its length is the same for any number of rows."""
        head = {"descr": "<f4", "fortran_order": False, "shape": (self._count, self._width)}
        np.lib.format.write_array_header_1_0(file, head)


def _load_rows(path: pathlib.Path, count: int) -> np.ndarray:
    with npz.naming(path):
        rows = np.load(path, mmap_mode="r")
        if len(rows) != count:
            raise ValueError(f"has {len(rows)} rows, and its moments are of {count}")
    return rows
