"""Images that a core reads, decodes and batches in a second: here, in torch, and in tf.data.

    python benchmarks/loading.py --side=256
    python benchmarks/loading.py --folder=photos --side=256

All three read the same files: those of a folder, or JPEGs of the given side that are made for it.
They crop to a square of the given side where an image is not one already, shuffle, and make uint8
batches. `torch.utils.data` decodes with Pillow, as torchvision's ImageFolder does; tf.data decodes
with TensorFlow, as TFDS's ImageFolder does. Each runs in threads of this process (torch in the
caller's), in turn, round after round. What counts is the processor time of the whole process, so
that other programs on the machine matter little. The medians are compared.

A last line says what decoding alone takes, in one thread and from memory into memory that is there
already: no loader of these files can be faster with the same decoder (libjpeg-turbo, by
simplejpeg).
"""

import contextlib
import io
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from absl import flags
from PIL import Image

from conprediff_jax import data
from conprediff_jax.cli import app
from conprediff_jax.common.images import list_images

_FOLDER = flags.DEFINE_string("folder", "", "Read the images of this folder; '' to make some.")
_SIDE = flags.DEFINE_integer("side", 256, "Side of the batches' images in pixels.", lower_bound=8)
_COUNT = flags.DEFINE_integer("count", 8192, "Files that are made.", lower_bound=1)
_DISTINCT = 128  # images among them; the others are links to these
_ALONE = "decoding alone"
_BATCH = flags.DEFINE_integer("batch_size", 32, "Images of a batch.", lower_bound=1)
_BATCHES = flags.DEFINE_integer("batches", 16, "Batches of a round.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds that are timed.", lower_bound=1)


def make_images(folder: pathlib.Path) -> None:
    """Makes JPEGs that compress as photos do, with about 0.3 bytes a pixel."""
    side = _SIDE.value
    for number in range(_COUNT.value):
        if number >= _DISTINCT:
            first = folder / "all" / f"{number % _DISTINCT:05}.jpg"
            (folder / "all" / f"{number:05}.jpg").hardlink_to(first)
            continue
        rng = np.random.default_rng(number)
        coarse = rng.integers(0, 256, (side // 10, side // 10, 3), np.uint8)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        noisy = np.asarray(image) + rng.normal(0, 4, (side, side, 3))
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        (folder / "all").mkdir(exist_ok=True)
        image.save(folder / "all" / f"{number:05}.jpg", quality=90)


def ours(folder: pathlib.Path) -> Iterator[np.ndarray]:
    """Batches of this package."""
    spec = data.DataSpec(name=str(folder), image_size=_SIDE.value, label=None)
    for batch in data.make_iterator(spec, batch_size=_BATCH.value, seed=0):
        yield batch["image"]


def of_torch(folder: pathlib.Path) -> Iterator[np.ndarray]:
    """Batches of `torch.utils.data`, decoded by Pillow."""
    import torch

    files, side = [folder / file for file in list_images(folder)], _SIDE.value

    class Files(torch.utils.data.Dataset):
        def __len__(self):
            return len(files)

        def __getitem__(self, index):
            with open(files[index], "rb") as file:
                image = Image.open(io.BytesIO(file.read())).convert("RGB")
            if image.size != (side, side):
                left, top = ((length - min(image.size)) // 2 for length in image.size)
                box = (left, top, left + min(image.size), top + min(image.size))
                image = image.resize((side, side), Image.Resampling.LANCZOS, box=box)
            return torch.from_numpy(np.array(image))

    while True:
        loader = torch.utils.data.DataLoader(Files(), _BATCH.value, shuffle=True, drop_last=True)
        yield from (batch.numpy() for batch in loader)


def of_tensorflow(folder: pathlib.Path) -> Iterator[np.ndarray]:
    """Batches of tf.data."""
    import tensorflow as tf

    files, side = [str(folder / file) for file in list_images(folder)], _SIDE.value

    def decode(path: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
        shape = tf.shape(image)
        if shape[0] != side or shape[1] != side:
            length = tf.minimum(shape[0], shape[1])
            top, left = (shape[0] - length) // 2, (shape[1] - length) // 2
            image = image[top : top + length, left : left + length]
            image = tf.image.resize(image, (side, side), "lanczos3", antialias=True)
            image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
        return tf.ensure_shape(image, (side, side, 3))

    batches = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    batches = batches.map(decode, tf.data.AUTOTUNE).batch(_BATCH.value).prefetch(2)
    yield from batches.as_numpy_iterator()


def decoded(folder: pathlib.Path) -> Iterator[None]:
    """Nothing but the decoding of as many images as batches have."""
    import simplejpeg

    files = [(folder / file).read_bytes() for file in list_images(folder)[:_DISTINCT]]
    height, width, _, _ = simplejpeg.decode_jpeg_header(files[0])
    slots = list(np.empty((_BATCH.value, height, width, 3), np.uint8))
    while True:
        for slot in slots:
            files.append(file := files.pop(0))
            simplejpeg.decode_jpeg(file, "RGB", buffer=slot)
        yield


def measure(folder: pathlib.Path) -> dict[str, float]:
    """Images for each second of processor time, by loader."""
    loaders = {"conprediff_jax": ours, "torch, Pillow": of_torch, "tf.data": of_tensorflow}
    if not _FOLDER.value:  # JPEGs of one size
        loaders[_ALONE] = decoded
    speeds = {name: [] for name in loaders}
    for _ in range(_ROUNDS.value):
        for name, make in loaders.items():
            batches = make(folder)
            next(batches)  # starts threads, and compiles
            began = time.process_time()
            for _ in range(_BATCHES.value):
                next(batches)
            spent = time.process_time() - began
            speeds[name].append(_BATCHES.value * _BATCH.value / spent)
            batches.close()
    return {name: statistics.median(values) for name, values in speeds.items()}


def main(argv: list[str]) -> None:
    """Prints the speeds, and how much faster this package is than the better one of the others."""
    del argv
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(_FOLDER.value).expanduser()
        if not _FOLDER.value:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            make_images(folder)
        speeds = measure(folder)
    for name, speed in speeds.items():
        print(f"{name:16} {speed:8.0f} images/s a core")
    first, *others = (speed for name, speed in speeds.items() if name != _ALONE)
    print(f"{'ratio':16} {first / max(others):8.2f}")


if __name__ == "__main__":
    app.run(main)
