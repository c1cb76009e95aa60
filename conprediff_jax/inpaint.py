"""Fills holes in images.

    python -m conprediff_jax.inpaint --workdir=runs/openmoji --images=photos --masks=masks
        --samples=4 --seed=0 --out=filled
    python -m conprediff_jax.inpaint --workdir=runs/openmoji --images=photos --quality=best
    python -m conprediff_jax.inpaint --workdir=runs/openmoji --masks=half --num=4

`--images` names a photo, a folder of photos, or a data set; the default is the test split of the
data that the model was trained on. Photos of another size than the model's are fitted to it, and
their masks with them, by default by a crop around the hole (--fit). With --full_size, fillings are
enlarged and laid over the holes of the photos, whose other pixels stay as they are.

`--masks` names a kind of mask, which is drawn for every image (thin, strokes and thick are
free-form; the others are every_second_line, super_resolve, expand, half and box), one file for all
images, or a folder with a mask of the same name for every image.

White pixels of a mask file mark what to KEEP, as in RePaint. With --polarity=fill, they mark what
to FILL, as in the inpainting of latent diffusion. A mask file of one colour may have its hole in
the alpha channel.

The command writes to --out: every filling as NAME_0.png, NAME_1.png ..., whose known pixels equal
those of the image bit for bit; grid.png, whose rows show image, masked image and fillings; and
settings.json with all that the fillings depend on, and the share of each image that was filled.

Continuous models fill by RePaint, which calls the network 210 times, or 2,410 times with
--quality=best, whose fillings match the known pixels better. --sampler=ddim or dpm_solver is
faster still, and its fillings match less well. Discrete models use their own sampler.

If you start an interrupted command again, it continues after the last filling. It can run as one of
several processes that see --out, which share the fillings among them.
"""

import collections
import pathlib
from collections.abc import Collection, Sequence

from absl import flags

from conprediff_jax.cli import guide_flag, help
from conprediff_jax.cli import inpainting_flags as shared
from conprediff_jax.cli.choices import MASKS

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Use the model in this workdir of a training run, or `inference` folder.",
    required=True,
)
_MASKS = flags.DEFINE_string(
    "masks",
    "thick",
    f"Fill holes of this kind, one of {', '.join(MASKS)}; or name a mask file, or a folder with a "
    "mask for every image.",
)
_NUM = flags.DEFINE_integer(
    "num",
    None,
    "Fill the first NUM images; the default is all images of a folder, or 8 of a data set.",
    lower_bound=1,
)
_SAMPLES = flags.DEFINE_integer(
    "samples", 4, "Make this many fillings of every image.", lower_bound=1
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "Write the fillings to this folder; the default is a folder in <workdir>/samples, whose name "
    "says what was asked for.",
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Remove the fillings that the folder of --out holds, and fill anew."
)
_FULL_SIZE = flags.DEFINE_bool(
    "full_size",
    False,
    "Write fillings at the size of the photos: each is enlarged and laid over its hole, and all "
    "other pixels stay as they are. The default is the size that the model has filled.",
)
flags.adopt_module_key_flags(shared)  # so that --help shows them
flags.adopt_module_key_flags(guide_flag)

help.answer(__name__, several=True)  # before imports that take seconds

import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from conprediff_jax.cli import app
from conprediff_jax.common import hub, images, opening
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import (
    check_file,
    check_folder,
    check_replaced,
)
from conprediff_jax.common.progress import ProgressLine
from conprediff_jax.data import fitting
from conprediff_jax.data import holes as holes_lib
from conprediff_jax.data.fitting import Fitted
from conprediff_jax.data.holes import Hole, Picture
from conprediff_jax.data.masks import filled_share
from conprediff_jax.parallel import share
from conprediff_jax.runs.classes import Numbers, numbers_of
from conprediff_jax.runs.restore import load_guided, own_files, read_pictures
from conprediff_jax.sampling import inpainting, record
from conprediff_jax.sampling.model import TrainedModel
from conprediff_jax.sampling.spec import SamplingSpec

_ROWS = 16  # rows of the grid
_DRAWN = ".drawn"  # the folder of fillings until all of them are there
_IMAGES_OF_A_DATA_SET = 8


def main(argv: list[str]) -> None:
    """Reads the flags, loads the moving average, fills the holes, and writes the fillings."""
    del argv
    if _OUT.value:
        check_folder(_OUT.value, "--out")
    mesh = share.local_mesh()
    trained = load_guided(_WORKDIR.value, mesh, shared.STEP.value, guide_flag.value())
    label = numbers_of(shared.LABEL.value, trained.class_names, trained.model.num_classes)
    trained.model.check_prompts(shared.prompts(), name="prompt")
    spec = inpainting.sampling_for(trained.model, usual="fast", **shared.sampling())
    pictures = _read(trained.step)
    if shared.FIT.value == "keep":
        for picture in pictures:
            trained.model.check_image_size(*picture.image.shape[:2], picture.name)
    fitted = fitting.cut(
        pictures,
        _MASKS.value,
        fit=shared.FIT.value,
        size=trained.model.image_shape,
        polarity=shared.POLARITY.value,
        seed=shared.SEED.value,
    )
    fitting.log_changes(fitted)
    holes = [each.hole for each in fitted]
    shares = {hole.name: round(filled_share(hole.mask), 4) for hole in holes}
    settings = _settings(trained, spec, fitted, shares, label)
    # A name has every guidance that is not 1, whatever the usual one; that of a guide would warn.
    given = {key: shared.sampling()[key] for key in ("sampler", "guidance")}
    usual = inpainting.sampling_for(trained.model, **given)
    name = record.short_name(settings, usual, "label", "prompt", "masks", "images", "size")
    usual_out = epath.Path(hub.results_folder(_WORKDIR.value)) / "samples" / f"inpaint_{name}"
    out = epath.Path(_OUT.value or usual_out)
    _check_files(out, holes, trained.step)
    share.check_seen(out, "--out")
    share.from_first(lambda: _claim(out, settings))
    logging.info(
        "%d images; masks fill %.1f %% of an image on average, %.1f to %.1f %%",
        len(holes),
        *(100 * share(list(shares.values())) for share in (np.mean, min, max)),
    )
    opening.say(
        f"{record.described(trained, _WORKDIR.value)}; {len(holes)} images",
        f"{_SAMPLES.value} fillings of each: {spec.describe()}, seed {shared.SEED.value}",
        out,
    )
    filled = _fill(trained, spec, mesh, fitted, label, out)
    if share.is_first():
        _write(out, fitted, filled)
        (out / _DRAWN).rmtree()
    logging.info("%d fillings of %d images written to %s", _SAMPLES.value, len(holes), out)


def _claim(out: epath.Path, settings: record.Settings) -> None:
    """Takes the folder of `--out` for the fillings of these settings."""
    record.claim(out, settings, overwrite=_OVERWRITE.value)
    if _OVERWRITE.value and (out / _DRAWN).exists():
        (out / _DRAWN).rmtree()


def _settings(
    trained: TrainedModel,
    spec: SamplingSpec,
    fitted: Sequence[Fitted],
    shares: dict[str, float],
    label: Numbers,
) -> record.Settings:
    """All that the fillings depend on."""
    arrays = (part for each in fitted for part in (each.photo.image, each.photo.mask))
    return record.settings_of(
        record.model_of(trained, _WORKDIR.value),
        spec,
        masks=pathlib.Path(_MASKS.value).stem,
        fit={each.photo.name: each.placement.describe() for each in fitted},
        size="full size" if _FULL_SIZE.value else None,
        content=record.content_of(arrays),
        **{"filled share": shares},
        **shared.asked(label),
    )


def _fill(
    trained: TrainedModel,
    spec: SamplingSpec,
    mesh: Mesh,
    fitted: Sequence[Fitted],
    label: Numbers,
    out: epath.Path,
) -> list[np.ndarray]:
    """Fills the holes, and writes every filling as soon as it is made; see `fill_holes_to`."""

    def write(index: int, number: int, image: np.ndarray) -> None:
        if _FULL_SIZE.value:
            image = inpainting.laid_over(fitted[index], image)
        images.write_png(out / _file(fitted[index].hole.name, number), image)

    count = _SAMPLES.value * len(fitted)
    progress = ProgressLine(count, "fillings")
    return inpainting.fill_holes_to(
        out / _DRAWN,
        inpainting.make_fill(trained.model, spec, mesh, progress.within),
        trained,
        [each.hole for each in fitted],
        seed=shared.SEED.value,
        samples=_SAMPLES.value,
        batch_size=shared.BATCH.value,
        label=label,
        prompt=shared.PROMPT.value or "",
        progress=progress,
        done=write,
    )


def _read(step: int) -> list[Picture]:
    """The images to fill."""
    num, folder = _NUM.value, shared.IMAGES.value
    if num is None and not (folder and holes_lib.are_files(folder)):
        num = _IMAGES_OF_A_DATA_SET
    return read_pictures(folder, _WORKDIR.value, step, split=shared.SPLIT.value, num=num)


def _check_files(out: epath.Path, holes: Sequence[Hole], step: int) -> None:
    """Checks that all files can be written, and that no image or mask of the user is lost.

    Raises:
        UserError: A file cannot be written, or an image or a mask would be replaced or removed.
    """
    names = [_file(hole.name, number) for hole in holes for number in range(_SAMPLES.value)]
    names += [*_grids({hole.mask.shape for hole in holes}).values(), record.FILE]
    files = [out / name for name in names]
    folders = {folder for file in files for folder in file.parents}
    for file in files:
        if file in folders:
            raise UserError(f"{file}: both a filling and a folder of fillings: rename an image")
        check_file(file, "--out")
    own = own_files(shared.IMAGES.value, _WORKDIR.value, step, _MASKS.value)
    removed = record.images_in(out) if _OVERWRITE.value else []
    check_replaced([*files, *removed], own, f"--out={out}")


def _file(name: str, number: int) -> str:
    """The name of a filling's file."""
    return f"{name}_{number}.png"


def _grids(sizes: Collection[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """The names of the grids' files, by the height and width of the images that they show."""
    if len(sizes) == 1:
        return dict.fromkeys(sizes, "grid.png")
    return {(height, width): f"grid_{width}x{height}.png" for height, width in sizes}


def _write(out: epath.Path, fitted: Sequence[Fitted], filled: Sequence[np.ndarray]) -> None:
    """Writes a grid for every size of image."""
    rows = collections.defaultdict(list)
    for each, fillings in zip(fitted, filled, strict=True):
        hole = each.hole
        rows[hole.mask.shape].append(np.stack([hole.image, hole.masked, *fillings]))
    for size, name in _grids(rows.keys()).items():
        shown = rows[size][:_ROWS]
        images.write_png(out / name, images.grid(np.concatenate(shown), columns=len(shown[0])))


if __name__ == "__main__":
    app.run(main, several=True, again="the same command continues after the last filling")
