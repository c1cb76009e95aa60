"""Draws images from a trained model's moving average.

    python -m conprediff_jax.sample --workdir=runs/openmoji --num=64 --sampler=ddim --steps=50
        --seed=0 --out=samples.png
    python -m conprediff_jax.sample --workdir=runs/openmoji_text --guidance=4 --num=8
        --prompt="woman firefighter dark skin tone"

`--out` decides what is written: one grid (a name ending in .png), an npz (.npz: `arr_0`, uint8), or
a folder of single PNGs (anything else). Image i depends on the seed and i alone. The context
decoder is not part of what is loaded.
"""

import itertools
import pathlib

import numpy as np
from absl import flags, logging

from conprediff_jax import cli, images, parallel, sampling_flags
from conprediff_jax.errors import UserError
from conprediff_jax.inference import load
from conprediff_jax.progress import Progress
from conprediff_jax.sampling import generate_batches, make_generate
from conprediff_jax.train.denoising import Denoising

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a training run.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to sample from; the newest when absent.")
_NUM = flags.DEFINE_integer("num", 64, "Number of images.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed; image i is a function of the seed and i.")
_LABEL = flags.DEFINE_integer("label", None, "Class of every image; all in turn when absent.")
_PROMPT = flags.DEFINE_multi_string("prompt", None, "Caption; several are taken in turn.")
_PROMPTS = flags.DEFINE_string("prompts", None, "Text file of captions, one a line.")
_BATCH = flags.DEFINE_integer("batch_size", 64, "Images at a time.", lower_bound=1)
_OUT = flags.DEFINE_string(
    "out", None, "name.png: grid; name.npz: arrays; else a folder of PNGs. Default: in the workdir."
)


def main(argv: list[str]) -> None:
    """Reads the flags, loads the moving average and writes images."""
    del argv
    mesh = parallel.make_mesh(parallel.MeshSpec())
    task, params, frozen, step = load(_WORKDIR.value, mesh, _STEP.value)
    if not isinstance(task, Denoising):
        raise UserError(f"--workdir={_WORKDIR.value} holds a first stage: there is no denoiser")
    num_classes = task.num_classes
    if _LABEL.value is not None and not 0 <= _LABEL.value < (num_classes or 0):
        raise UserError(
            f"--label={_LABEL.value}: "
            + (f"the model knows 0 to {num_classes - 1}" if num_classes else "no classes here")
        )
    spec = task.sampling.overridden(task, **sampling_flags.values())
    prompts = _prompts(task)

    batch_size = min(_BATCH.value, _NUM.value)
    progress = Progress(_NUM.value)
    drawn = []
    for batch in generate_batches(
        make_generate(task, spec, mesh),
        params,
        frozen,
        seed=_SEED.value,
        num=_NUM.value,
        batch_size=batch_size,
        num_classes=num_classes,
        label=_LABEL.value,
        texts=task.tokenizer(prompts) if prompts else None,
    ):
        drawn.append(batch)
        done = sum(map(len, drawn))
        speed = progress.mark(done)
        logging.info(
            "%d/%d images  %.1f images/s  %s left", done, _NUM.value, speed, progress.left(speed)
        )
    name = f"sample_step_{step:07}_seed_{_SEED.value}.png"
    out = pathlib.Path(_OUT.value or pathlib.Path(_WORKDIR.value) / "samples" / name)
    _write(out, np.concatenate(drawn), prompts)
    logging.info("%d images of step %d written to %s", _NUM.value, step, out)


def _prompts(task: Denoising) -> list[str] | None:
    """The caption of every image; None for a model that reads none."""
    given = _PROMPT.value or []
    if _PROMPTS.value:
        try:
            text = pathlib.Path(_PROMPTS.value).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts={_PROMPTS.value}: not a text file: {error}") from error
        given = [*given, *text.splitlines()]
    if task.text is None:
        if given:
            raise UserError(f"--prompt={given[0]}: the model of --workdir reads no captions")
        return None
    for prompt in given:
        task.tokenizer.check(prompt)
    return list(itertools.islice(itertools.cycle(given or task.text.prompts), _NUM.value))


def _write(out: pathlib.Path, drawn: np.ndarray, prompts: list[str] | None) -> None:
    """A grid, an npz or a folder, by the ending of the name."""
    if out.suffix == ".png":
        images.write_png(out, images.grid(images.captioned(drawn, prompts) if prompts else drawn))
    elif out.suffix == ".npz":
        images.write_npz(out, drawn)
    else:
        for index, image in enumerate(drawn):
            images.write_png(out / f"{index:06}.png", image)


if __name__ == "__main__":
    cli.run(main)
