"""Draws images from the moving average of a trained model.

    python -m conprediff_jax.sample --workdir=runs/openmoji --num=64 --sampler=ddim --steps=50
        --seed=0 --out=samples.png
    python -m conprediff_jax.sample --workdir=runs/openmoji --num=1000 --out=samples
    python -m conprediff_jax.sample --workdir=runs/openmoji_text --guidance=2 --num=8
        --prompt="woman firefighter dark skin tone"

The name in `--out` decides the format: .png, .jpg and .webp give one grid, .npz gives an npz with
`arr_0`, uint8, .npy gives this array alone, and a name without an ending gives a folder of single
PNGs. Image i depends only on the seed and i, so a folder goes on, or grows, when the command is
started again with the same settings. The settings and prompts stand in `settings.json` of a folder,
in the array `settings` of an npz, and in the text `settings` of a PNG. The context decoder is not
loaded.

The command can run as one of several processes, each of which draws its own part of the images. A
grid or an array is then put together from files in a hidden folder beside it, and what was drawn is
not drawn again when the command is started again.
"""

import json
from collections.abc import Sequence

from absl import flags

from conprediff_jax.cli import guide_flag, help, sampling_flags

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
_LABEL = flags.DEFINE_string(
    "label",
    None,
    "Give images these classes, by name or number, with commas between them: images take them in "
    "turn. By default images take all classes in turn.",
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
_SIZE = flags.DEFINE_string(
    "size",
    None,
    "Draw images of this height and width in pixels, such as 192,320, as the shapes that "
    "config.data.aspect_step trains on; the default is config.data.image_size.",
)
_BATCH = flags.DEFINE_integer("batch_size", 64, "Draw this many images at a time.", lower_bound=1)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "Write a grid to name.png (.jpg, .webp), an array to name.npz (.npy), or PNGs to this folder; "
    "the default is a grid in <workdir>/samples, whose name says what was asked for.",
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Remove the images that the folder of --out holds, and draw anew."
)
flags.adopt_module_key_flags(sampling_flags)  # so that --help shows them
flags.adopt_module_key_flags(guide_flag)

help.answer(__name__, several=True)  # before imports that take seconds

import jax
import numpy as np
from absl import logging
from etils import epath

from conprediff_jax.cli import app
from conprediff_jax.common import hub, images, opening
from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.fields import as_kind, parse
from conprediff_jax.common.files import check_file, check_folder
from conprediff_jax.common.fingerprint import fingerprint
from conprediff_jax.common.progress import ProgressLine
from conprediff_jax.data.text_files import read_captions
from conprediff_jax.parallel import share
from conprediff_jax.runs.classes import numbers_of
from conprediff_jax.runs.restore import load_guided
from conprediff_jax.sampling import record
from conprediff_jax.sampling.generate import conditions_of, make_generate
from conprediff_jax.sampling.model import DiffusionModel
from conprediff_jax.sampling.shards import Draw, drawn_singly, generate_to


def main(argv: list[str]) -> None:
    """Reads the flags, loads the moving average, and writes images."""
    del argv
    ending = images.output_ending(_OUT.value) if _OUT.value else ".png"
    if _OUT.value:
        (check_file if ending else check_folder)(_OUT.value, "--out")
    mesh = share.local_mesh()
    trained = load_guided(_WORKDIR.value, mesh, _STEP.value, guide_flag.value())
    model, size = trained.model, None
    if _SIZE.value:
        size = images.height_and_width(parse("size", _SIZE.value, int | tuple[int, int]))
        model = model.of_size(*size)
    captions = _captions(model)
    labels = numbers_of(_LABEL.value, trained.class_names, model.num_classes)
    spec = model.sampling_with(**sampling_flags.values())
    # Images in a folder depend on their indices alone, so a folder can grow.
    drawn = {"first": _FIRST.value or None, "num": _NUM.value} if ending else {}
    settings = record.settings_of(
        record.model_of(trained, _WORKDIR.value),
        spec,
        seed=_SEED.value,
        label=labels,
        prompts=captions,
        size=size,
        **drawn,
    )
    out = epath.Path(_OUT.value or _default_out(settings, model))
    as_kind("first", _FIRST.value, range(2**31 - _NUM.value))
    if not ending:
        share.check_seen(out, "--out")
    elif ending in images.PICTURES:
        check_file(out, "--out")
        images.check_grid(out, _NUM.value, model.image_shape)

    opening.say(
        record.described(trained, _WORKDIR.value),
        f"{_NUM.value} images of {' x '.join(map(str, model.image_shape[::-1]))}: "
        f"{spec.describe()}, "
        f"seed {_SEED.value}",
        out,
    )
    progress = ProgressLine(_NUM.value, "images", batch=min(_BATCH.value, _NUM.value))
    generate = make_generate(model, spec, mesh, progress.within)
    texts, seed = model.tokenizer(captions) if captions else None, np.uint32(_SEED.value)

    def draw(indices: np.ndarray) -> np.ndarray:
        given = conditions_of(indices, model.num_classes, labels, texts)
        return np.asarray(generate(trained.params, trained.frozen, seed, indices, *given))

    if ending:
        drawn = _draw(draw, out, settings, progress)
        if drawn is not None:
            _write(out, ending, drawn, captions, settings)
    else:
        _fill_folder(out, draw, settings, progress)
    logging.info("%d images of step %d written to %s", _NUM.value, trained.step, out)


def _default_out(settings: record.Settings, model: DiffusionModel) -> epath.Path:
    """A grid in the workdir, whose name says what was asked for."""
    asked = ["prompts"] if _PROMPT.value or _PROMPTS.value else []
    name = record.short_name(settings, model.sampling, "label", *asked, "size", "first", "num")
    return epath.Path(hub.results_folder(_WORKDIR.value)) / "samples" / f"sample_{name}.png"


def _draw(
    draw: Draw, out: epath.Path, settings: record.Settings, progress: ProgressLine
) -> np.ndarray | None:
    """The images that the flags ask for; None in all processes but the first."""
    size, first = min(_BATCH.value, _NUM.value), _FIRST.value
    if jax.process_count() == 1:
        indices = range(first, first + _NUM.value)
        drawn = drawn_singly(draw, indices, num=len(indices), batch_size=size, progress=progress)
        return np.stack(list(drawn))
    share.check_seen(out.parent, "--out")
    name = fingerprint([out.name.encode(), record.fingerprint_of(settings).encode()])
    folder = out.parent / f".{name}"
    files = generate_to(
        folder,
        lambda indices: draw(first + indices),
        num=_NUM.value,
        batch_size=size,
        settings=settings,
        progress=progress,
    )
    if not share.is_first():
        return None
    drawn = np.concatenate([images.read_npz(file) for file in files])
    folder.rmtree()
    return drawn


def _fill_folder(
    out: epath.Path, draw: Draw, settings: record.Settings, progress: ProgressLine
) -> None:
    """Writes every image as soon as it is drawn, and goes on where an earlier command stopped."""

    def claim() -> list[int]:
        record.claim(out, settings, overwrite=_OVERWRITE.value)
        indices = range(_FIRST.value, _FIRST.value + _NUM.value)
        return [index for index in indices if not _file(out, index).exists()]

    missing = share.from_first(claim)
    if len(missing) < _NUM.value:
        done = _NUM.value - len(missing)
        logging.info("%s: goes on, %d of %d images are there", out, done, _NUM.value)
    mine, size = share.mine(missing), min(_BATCH.value, _NUM.value)
    drawn = drawn_singly(draw, mine, num=_NUM.value, batch_size=size, progress=progress)
    for index, image in zip(mine, drawn, strict=True):
        images.write_new_png(_file(out, index), image)  # another command may draw the same images
    share.wait_for_all()


def _file(folder: epath.Path, index: int) -> epath.Path:
    return folder / f"{index:06}.png"


def _captions(model: DiffusionModel) -> list[str] | None:
    """The captions that images take in turn; None for a model that reads no captions."""
    given, file = _PROMPT.value or [], _PROMPTS.value
    model.check_prompts(given, name="prompt")
    if file is None:
        return (given or list(model.text.prompts)) if model.text else None
    if model.text is None:
        raise FieldError("prompts", f"is {file}: the model reads no captions")
    read = read_captions(file)
    model.check_captions(read, file)
    return [*given, *read]


def _write(
    out: epath.Path,
    ending: str,
    drawn: np.ndarray,
    captions: Sequence[str] | None,
    settings: record.Settings,
) -> None:
    """Writes arrays, or a grid, in the format of the ending."""
    text = json.dumps(settings)
    if ending == ".npz":
        images.write_npz(out, drawn, text)
        return
    if ending == ".npy":
        images.write_npy(out, drawn)
        return
    if captions:
        turns = np.arange(_FIRST.value, _FIRST.value + len(drawn)) % len(captions)
        drawn = images.captioned(drawn, [captions[turn] for turn in turns])
    images.write_picture(out, images.grid(drawn), text)


_AGAIN = "the same command continues a folder, and starts a single file afresh"

if __name__ == "__main__":
    app.run(main, several=True, again=_AGAIN)
