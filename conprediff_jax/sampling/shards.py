"""Draws many images into a folder; an interrupted call can be continued.

    <folder>/settings.json    the model, the settings and the seed that the images come from
    <folder>/000000.npz       the first images as `arr_0`; and so on, in at most FILES files

Image i depends only on the seed and i, so a continued folder holds the same images as one that was
written without interruption. Several processes share the missing files among them, and any number
of processes may continue.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from conprediff_jax.common import images, random
from conprediff_jax.common.progress import ProgressLine
from conprediff_jax.parallel import share
from conprediff_jax.sampling import record
from conprediff_jax.sampling.drawing import Report
from conprediff_jax.sampling.generate import make_generate
from conprediff_jax.sampling.model import TrainedModel
from conprediff_jax.sampling.spec import SamplingSpec

FILES = 256  # enough that hundreds of processes have about as much to do as each other

Draw = Callable[[np.ndarray], np.ndarray]


def make_draw(
    trained: TrainedModel,
    spec: SamplingSpec,
    mesh: Mesh,
    *,
    seed: int,
    prompts: Sequence[str] | None = None,
    report: Report | None = None,
) -> Draw:
    """A function from indices, int [batch], to images, uint8 [batch, height, width, channels].

    A model with classes takes all classes in turn.

    Args:
        trained: The model with its parameters.
        spec: The settings of sampling.
        mesh: The devices.
        seed: Seed of the images, in [0, 2^32).
        prompts: Captions, which a model that reads captions takes in turn; None for the prompts of
            its config.
        report: See `make_generate`.
    """
    model, seed = trained.model, random.as_seed(seed)
    generate = make_generate(model, spec, mesh, report)
    captions = model.tokenizer(prompts or model.text.prompts) if model.text else None

    def draw(indices: np.ndarray) -> np.ndarray:
        labels = indices % model.num_classes if model.num_classes else None
        texts = None if captions is None else captions[indices % len(captions)]
        return np.asarray(generate(trained.params, trained.frozen, seed, indices, labels, texts))

    return draw


def generate_to(
    folder: epath.PathLike,
    draw: Draw,
    *,
    num: int,
    batch_size: int,
    settings: record.Settings,
    shard: int | None = None,
    progress: ProgressLine | None = None,
    overwrite: bool = False,
) -> list[epath.Path]:
    """Draws images 0 to `num - 1` into a folder, and continues where an earlier call stopped.

    It waits until all processes have drawn their parts.

    Args:
        folder: The folder, which all processes see; it is made where it does not exist.
        draw: Function from indices, int [batch_size], to images, uint8 [batch_size, height, width,
            channels].
        num: Number of images.
        batch_size: Images at a time, in every process.
        settings: What the images depend on, as `record.claim` takes it.
        shard: Images per file; None for those of the files that are there, or for `FILES` files.
        progress: What logs how many images of this process are done.
        overwrite: Whether to draw anew what the folder holds.

    Returns:
        The files, in order.

    Raises:
        UserError: The folder holds images of other settings, or cannot be written to.
    """
    folder = epath.Path(folder)

    def claim() -> tuple[int, list[int]]:
        size = shard or (0 if overwrite else _stored_shard(folder)) or -(-num // FILES)
        asked = settings | {"num": num, "shard": size}
        record.claim(folder, asked, ending=".npz", overwrite=overwrite)
        return size, [start for start in range(0, num, size) if not _file(folder, start).exists()]

    size, missing = share.from_first(claim)
    mine = [range(start, min(start + size, num)) for start in share.mine(missing)]
    indices = [index for part in mine for index in part]
    drawn = drawn_singly(
        draw,
        indices,
        num=num,
        batch_size=batch_size,
        progress=progress or ProgressLine(num, "images"),
    )
    for part in mine:
        images.write_npz(_file(folder, part.start), np.stack([*itertools.islice(drawn, len(part))]))
    share.wait_for_all()
    return [_file(folder, start) for start in range(0, num, size)]


def drawn_singly(
    draw: Draw, indices: Sequence[int], *, num: int, batch_size: int, progress: ProgressLine
) -> Iterator[np.ndarray]:
    """Draws images in batches of one size, and yields them one by one.

    Args:
        draw: See `generate_to`.
        indices: The indices of the images that this process draws.
        num: Number of all images, with those of other processes and those that were there before.
        batch_size: Images at a time.
        progress: What logs how many images are done: one process counts all of them, and one of
            several its own.
    """
    leave_out(progress, num - len(indices))
    if indices:
        progress.compiling()
    for start in range(0, len(indices), batch_size):
        batch = np.array(indices[start : start + batch_size])
        padded = np.pad(batch, (0, batch_size - len(batch)), mode="edge")  # one compilation
        found = draw(padded)[: len(batch)]
        progress.add(len(batch))
        yield from found


def leave_out(progress: ProgressLine, count: int) -> None:
    """Notes that this process does not draw `count` images: they are there, or others draw them."""
    if jax.process_count() == 1:
        progress.skip(count)
    else:
        progress.without(count)


def _file(folder: epath.Path, start: int) -> epath.Path:
    return folder / f"{start:06}.npz"


def _stored_shard(folder: epath.Path) -> int:
    """Images per file of the images in a folder; 0 where there are none."""
    return record.read(folder).get("shard", 0) if (folder / record.FILE).exists() else 0
