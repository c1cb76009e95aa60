"""Draws images from a trained model's moving average.

    python -m conprediff_jax.sample --workdir=runs/openmoji --num=64 --sampler=ddim --steps=50
        --seed=0 --out=samples.png
    python -m conprediff_jax.sample --workdir=runs/openmoji_text --guidance=2 --num=8
        --prompt="woman firefighter dark skin tone"

`--out` decides what is written: one grid (a name ending in .png), an npz (.npz: `arr_0`, uint8), or
a folder of single PNGs (anything else). Image i depends on the seed and i alone. The context
decoder is not part of what is loaded.
"""

import numpy as np
from absl import flags, logging
from etils import epath

from conprediff_jax import cli, images, parallel, sampling_flags
from conprediff_jax.errors import UserError
from conprediff_jax.files import check_file, check_folder
from conprediff_jax.inference import load_denoiser
from conprediff_jax.progress import Progress
from conprediff_jax.sampling import check_condition, generate_batches, make_generate

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a training run.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to sample from; the newest when absent.")
_NUM = flags.DEFINE_integer("num", 64, "Number of images.", lower_bound=1)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed; image i is a function of the seed and i.", 0, 2**32 - 1
)
_LABEL = flags.DEFINE_integer("label", None, "Class of every image; all in turn when absent.")
_PROMPT = flags.DEFINE_multi_string("prompt", None, "Caption; several are taken in turn.")
_PROMPTS = flags.DEFINE_string("prompts", None, "Text file of captions, one a line.")
_BATCH = flags.DEFINE_integer("batch_size", 64, "Images at a time.", lower_bound=1)
_OUT = flags.DEFINE_string(
    "out", None, "name.png: grid; name.npz: arrays; else a folder of PNGs. Default: in the workdir."
)
flags.adopt_module_key_flags(sampling_flags)  # so that --help has them


def main(argv: list[str]) -> None:
    """Reads the flags, loads the moving average and writes images."""
    del argv
    mesh = parallel.make_mesh(parallel.MeshSpec())
    task, params, frozen, step = load_denoiser(_WORKDIR.value, mesh, _STEP.value, flag="--workdir=")
    name = f"sample_step_{step:07}_seed_{_SEED.value}.png"
    out = epath.Path(_OUT.value or epath.Path(_WORKDIR.value) / "samples" / name)
    single = out.suffix not in (".png", ".npz")  # images are written as they come
    check_folder(out, "--out") if single else check_file(out, "--out")
    if single and out.is_dir() and any(out.glob("*.png")):
        raise UserError(f"--out={out}: holds images already, name another folder")
    prompts = _prompts()
    check_condition(task, _LABEL.value, prompts)
    spec = task.sampling.overridden(task, **sampling_flags.values())
    captions = task.text.in_turn(_NUM.value, prompts) if task.text else None

    batch_size = min(_BATCH.value, _NUM.value)
    progress = Progress(_NUM.value)
    drawn, done = [], 0
    for batch in generate_batches(
        make_generate(task, spec, mesh),
        params,
        frozen,
        seed=_SEED.value,
        num=_NUM.value,
        batch_size=batch_size,
        num_classes=task.num_classes,
        label=_LABEL.value,
        texts=task.tokenizer(captions) if captions else None,
    ):
        if single:
            for index, image in enumerate(batch, done):
                file = out / f"{index:06}.png"
                if not images.write_new_png(file, image):
                    raise UserError(f"{file}: was written by another run, name another folder")
        else:
            drawn.append(batch)
        done += len(batch)
        speed = progress.mark(done)
        logging.info(
            "%d/%d images  %.1f images/s  %s left", done, _NUM.value, speed, progress.left(speed)
        )
    if not single:
        _write(out, np.concatenate(drawn), captions)
    logging.info("%d images of step %d written to %s", _NUM.value, step, out)


def _prompts() -> list[str]:
    """The captions that are asked for."""
    return [*(_PROMPT.value or []), *(cli.read_lines("prompts", _PROMPTS.value) or [])]


def _write(out: epath.Path, drawn: np.ndarray, captions: list[str] | None) -> None:
    """A grid or an npz, by the ending of the name."""
    if out.suffix == ".npz":
        images.write_npz(out, drawn)
    else:
        images.write_png(out, images.grid(images.captioned(drawn, captions) if captions else drawn))


if __name__ == "__main__":
    cli.run(main)
