"""Draws images from the moving average of a trained model.

    python -m conprediff_jax.sample --workdir=runs/openmoji --num=64 --sampler=ddim --steps=50
        --seed=0 --out=samples.png
    python -m conprediff_jax.sample --workdir=runs/openmoji --num=1000 --out=samples
    python -m conprediff_jax.sample --workdir=runs/openmoji_text --guidance=2 --num=8
        --prompt="woman firefighter dark skin tone"

The name in `--out` decides the format: a name that ends in .png gives one grid, .npz gives an npz
with `arr_0`, uint8, and any other name gives a folder of single PNGs. Image i depends only on the
seed and i. The context decoder is not loaded.
"""

from absl import flags

from conprediff_jax.cli import help, sampling_flags

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Use the model in this workdir of a training run, or `inference` folder.",
    required=True,
)
_STEP = flags.DEFINE_integer(
    "step", None, "Use the checkpoint of this training step; the default is the newest."
)
_NUM = flags.DEFINE_integer("num", 64, "Draw this many images.", 1, 2**31 - 1)
_FIRST = flags.DEFINE_integer(
    "first",
    0,
    "Start at the image of this index: --first=i --num=1 draws image i alone.",
    lower_bound=0,
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "This seed decides the images: image i depends only on the seed and i.", 0, 2**32 - 1
)
_LABEL = flags.DEFINE_integer(
    "label", None, "Give every image this class; by default images take all classes in turn."
)
_PROMPT = flags.DEFINE_multi_string(
    "prompt",
    None,
    "Draw images of this caption; if you repeat the flag, images take the captions in turn. The "
    "default is the prompts of the model's config.",
)
_PROMPTS = flags.DEFINE_string(
    "prompts", None, "Read more captions from this text file, one a line."
)
_BATCH = flags.DEFINE_integer("batch_size", 64, "Draw this many images at a time.", lower_bound=1)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "Write a grid to name.png, arrays to name.npz, or else PNGs to this folder; the default is a "
    "grid in <workdir>/samples.",
)
flags.adopt_module_key_flags(sampling_flags)  # so that --help shows them

help.answer(__name__)  # before imports that take seconds

import numpy as np
from absl import logging
from etils import epath

from conprediff_jax import parallel
from conprediff_jax.cli import app
from conprediff_jax.common import images, opening
from conprediff_jax.common.errors import FieldError, UserError
from conprediff_jax.common.files import check_file, check_folder
from conprediff_jax.common.progress import ProgressLine
from conprediff_jax.data.text_files import read_captions
from conprediff_jax.runs.restore import load
from conprediff_jax.sampling.generate import generate_batches, make_generate
from conprediff_jax.sampling.model import DiffusionModel


def main(argv: list[str]) -> None:
    """Reads the flags, loads the moving average, and writes images."""
    del argv
    mesh = parallel.make_mesh(parallel.MeshSpec())
    model, params, frozen, step = load(_WORKDIR.value, mesh, _STEP.value)
    from_first = f"_first_{_FIRST.value}" if _FIRST.value else ""
    name = f"sample_step_{step:07}_seed_{_SEED.value}{from_first}.png"
    out = epath.Path(_OUT.value or epath.Path(_WORKDIR.value) / "samples" / name)
    single = out.suffix not in (".png", ".npz")  # every image is written as soon as it is drawn
    check_folder(out, "--out") if single else check_file(out, "--out")
    if single and out.is_dir() and any(out.glob("*.png")):
        raise UserError(f"--out={out}: holds images already; name another folder")
    captions = _captions(model)
    model.check_condition(_LABEL.value)
    spec = model.sampling_with(**sampling_flags.values())

    batch_size = min(_BATCH.value, _NUM.value)
    opening.say(
        f"step {step} of {_WORKDIR.value}",
        f"{_NUM.value} images of {model.image_size} x {model.image_size}: {spec.describe()}, "
        f"seed {_SEED.value}",
        out,
    )
    progress = ProgressLine(_NUM.value, "images", batch=batch_size)
    progress.compiling()
    drawn, done = [], 0
    for batch in generate_batches(
        make_generate(model, spec, mesh, progress.within),
        params,
        frozen,
        seed=_SEED.value,
        num=_NUM.value,
        first=_FIRST.value,
        batch_size=batch_size,
        num_classes=model.num_classes,
        label=_LABEL.value,
        texts=model.tokenizer(captions) if captions else None,
    ):
        if single:
            for index, image in enumerate(batch, _FIRST.value + done):
                file = out / f"{index:06}.png"
                if not images.write_new_png(file, image):
                    raise UserError(f"{file}: another run wrote this file; name another folder")
        else:
            drawn.append(batch)
        done += len(batch)
        progress.add(len(batch))
    if not single:
        _write(out, np.concatenate(drawn), captions)
    logging.info("%d images of step %d written to %s", _NUM.value, step, out)


def _captions(model: DiffusionModel) -> list[str] | None:
    """The captions that images take in turn; None for a model that reads no captions."""
    given, file = _PROMPT.value or [], _PROMPTS.value
    model.check_condition(prompts=given, name="prompt")
    if file is None:
        return (given or list(model.text.prompts)) if model.text else None
    if model.text is None:
        raise FieldError("prompts", f"is {file}: the model reads no captions")
    read = read_captions(file)
    model.check_captions(read, file)
    return [*given, *read]


def _write(out: epath.Path, drawn: np.ndarray, captions: list[str] | None) -> None:
    """Writes a grid or an npz, whichever the ending of the name asks for."""
    if out.suffix == ".npz":
        images.write_npz(out, drawn)
        return
    if captions:
        turns = np.arange(_FIRST.value, _FIRST.value + len(drawn)) % len(captions)
        drawn = images.captioned(drawn, [captions[turn] for turn in turns])
    images.write_png(out, images.grid(drawn))


if __name__ == "__main__":
    app.run(main)
