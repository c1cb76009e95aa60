"""Draws many images into a folder; an interrupted call can be continued.

    <folder>/settings.json    the model, the settings and the seed that the images come from
    <folder>/000000.npz       images 0 to SHARD - 1 as `arr_0`; and so on

Image i depends only on the seed and i, so a continued folder holds the same images as one that was
written without interruption.
"""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from conprediff_jax.common import images, random
from conprediff_jax.common.progress import ProgressLine
from conprediff_jax.sampling import record
from conprediff_jax.sampling.drawing import Report
from conprediff_jax.sampling.generate import make_generate
from conprediff_jax.sampling.model import TrainedModel
from conprediff_jax.sampling.spec import SamplingSpec

SHARD = 1024

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
    folder: pathlib.Path,
    draw: Draw,
    *,
    num: int,
    batch_size: int,
    settings: record.Settings,
    shard: int = SHARD,
    progress: ProgressLine | None = None,
    overwrite: bool = False,
) -> list[pathlib.Path]:
    """Draws images 0 to `num - 1` into a folder, and continues where an earlier call stopped.

    Args:
        folder: The folder; it is made where it does not exist.
        draw: Function from indices, int [batch_size], to images, uint8 [batch_size, height, width,
            channels].
        num: Number of images.
        batch_size: Images at a time.
        settings: What the images depend on, as `record.claim` takes it.
        shard: Images per file.
        progress: What logs how many images are done.
        overwrite: Whether to draw anew what the folder holds.

    Returns:
        The files, in order.

    Raises:
        UserError: The folder holds images of other settings, or cannot be written to.
    """
    record.claim(
        folder, settings | {"num": num, "shard": shard}, ending=".npz", overwrite=overwrite
    )
    files = [folder / f"{start:06}.npz" for start in range(0, num, shard)]
    missing = [index for index, file in enumerate(files) if not file.exists()]
    sizes = [min(shard, num - index * shard) for index in range(len(files))]
    done = num - sum(sizes[index] for index in missing)
    progress = progress or ProgressLine(num, "images")
    progress.skip(done)
    if missing:
        progress.compiling()
    for index in missing:
        drawn = []
        for start in range(0, sizes[index], batch_size):
            batch = draw(index * shard + start + np.arange(batch_size))[: sizes[index] - start]
            drawn.append(batch)
            progress.add(len(batch))
        images.write_npz(files[index], np.concatenate(drawn))
    return files
