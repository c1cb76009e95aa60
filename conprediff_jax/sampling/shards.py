"""Long generations that can be broken off and taken up again.

    <folder>/about.json       what the images are of
    <folder>/000000.npz       images 0 to SHARD - 1, `arr_0`; and so on

Image i depends on the seed and i alone, so what is there already is as it would have been.
"""

import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from absl import logging
from jax.sharding import Mesh

from conprediff_jax.common import images, random
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import write_new
from conprediff_jax.common.progress import Progress
from conprediff_jax.common.trees import flatten
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
) -> Draw:
    """From indices int [batch] to a trained model's images, uint8 [batch, height, width, 3].

    Args:
        trained: the model.
        spec: how it is sampled.
        mesh: devices.
        seed: of the images.
        prompts: captions, taken in turn by a model that reads them; its config's when None. A model
            with classes takes all of them in turn.
    """
    model, seed = trained.model, random.as_seed(seed)
    generate = make_generate(model, spec, mesh)
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
    about: dict,
    shard: int = SHARD,
) -> list[pathlib.Path]:
    """Draws images 0 to num - 1 into a folder, going on where an earlier call stopped.

    Args:
        folder: where to.
        draw: from indices int [batch_size] to images uint8 [batch_size, height, width, 3].
        num: how many.
        batch_size: images at a time.
        about: what the images are of, as plain data; a folder that holds others is refused.
        shard: images of a file.

    Returns:
        The files, in order.

    Raises:
        UserError: the folder holds images of something else, or cannot be written to.
    """
    _claim(folder, about | {"num": num, "shard": shard})
    files = [folder / f"{start:06}.npz" for start in range(0, num, shard)]
    missing = [index for index, file in enumerate(files) if not file.exists()]
    sizes = [min(shard, num - index * shard) for index in range(len(files))]
    done = num - sum(sizes[index] for index in missing)
    progress = Progress(num, done)
    for index in missing:
        drawn = []
        for start in range(0, sizes[index], batch_size):
            batch = draw(index * shard + start + np.arange(batch_size))[: sizes[index] - start]
            drawn.append(batch)
            done += len(batch)
            speed = progress.mark(done)
            logging.info(
                "%d/%d images  %.1f images/s  %s left", done, num, speed, progress.left(speed)
            )
        images.write_npz(files[index], np.concatenate(drawn))
    return files


def _claim(folder: pathlib.Path, about: dict) -> None:
    """Notes what the images of a folder are of, or checks that they are of just that."""
    note, text = folder / "about.json", json.dumps(about)
    if write_new(note, lambda file: file.write(text.encode())):
        return
    try:
        there = flatten(dict(**json.loads(note.read_text())))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{note}: does not say what the images beside it are of: name another folder, or "
            "remove this one"
        ) from error
    asked = flatten(json.loads(text))
    for key in asked | there:
        if asked.get(key) != there.get(key):
            raise UserError(
                f"{folder}: holds images of {key} {there.get(key)}, not {asked.get(key)}: name "
                "another folder, or remove this one"
            )
