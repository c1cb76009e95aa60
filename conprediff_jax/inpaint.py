"""Fills holes in images.

    python -m conprediff_jax.inpaint --workdir=runs/openmoji --images=photos --masks=masks
        --samples=4 --seed=0 --out=filled

Images are a folder, whose files are taken at their own size, or a data set by its name; by default
the test split of what the model was trained on. Masks are a kind, drawn for every image (thin,
strokes, thick: free-form; every_second_line, super_resolve, expand, half, box), a file for all
images, or a folder with a mask of the same name for each.

In mask files white says what to KEEP, as in RePaint; with --polarity=fill it says what to FILL, as
in latent diffusion's inpainting. A mask of one colour may have its hole in the alpha channel.

Written to --out: every filling as NAME_0.png, NAME_1.png ..., whose known pixels are those of the
image, bit for bit; grid.png with, in a row, image, masked image and fillings; about.json with the
share of each image that was filled.

Continuous models fill by RePaint, which calls the network 2,410 times. Fewer --steps and
--resamplings are faster, and --sampler=ddim or dpm_solver far faster; they fit what is known less
well. Discrete models use their own sampler.
"""

import collections
import json
from collections.abc import Collection, Sequence

import jax
import numpy as np
from absl import flags, logging
from etils import epath

from conprediff_jax import parallel
from conprediff_jax.cli import app
from conprediff_jax.cli import inpainting_flags as shared
from conprediff_jax.common import images
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import (
    absolute,
    check_file,
    check_folder,
    check_replaced,
    write_text,
)
from conprediff_jax.data import holes as holes_lib
from conprediff_jax.data.holes import Hole, Picture
from conprediff_jax.data.masks import MASKS, filled_share
from conprediff_jax.runs.restore import load, own_files, read_pictures
from conprediff_jax.sampling import inpainting

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a training run.", required=True)
_MASKS = flags.DEFINE_string("masks", "thick", f"One of {', '.join(MASKS)}; a file; a folder.")
_NUM = flags.DEFINE_integer(
    "num", None, "Images, the first; when absent all of a folder, 8 of a data set.", lower_bound=1
)
_SAMPLES = flags.DEFINE_integer("samples", 4, "Fillings of every image.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "Folder. Default: in the workdir.")
flags.adopt_module_key_flags(shared)  # so that --help has them

_ROWS = 16  # of the grid
_IMAGES_OF_A_DATA_SET = 8


def main(argv: list[str]) -> None:
    """Reads the flags, loads the moving average, fills and writes."""
    del argv
    if jax.process_count() > 1:
        raise UserError("inpainting runs in one process, on all of its devices")
    mesh = parallel.make_mesh(parallel.MeshSpec())
    trained = load(_WORKDIR.value, mesh, shared.STEP.value)
    name = f"inpaint_step_{trained.step:07}_seed_{shared.SEED.value}"
    out = epath.Path(_OUT.value or epath.Path(_WORKDIR.value) / "samples" / name)
    check_folder(out, "--out")
    trained.model.check_condition(shared.LABEL.value, shared.prompts(), name="prompt")
    spec = inpainting.sampling_for(trained.model, **shared.sampling())
    pictures = _read(trained.step)
    for picture in pictures:
        trained.model.check_image_size(*picture.image.shape[:2], picture.name)
    _check_files(out, pictures, trained.step)
    holes = holes_lib.cut(
        pictures, _MASKS.value, polarity=shared.POLARITY.value, seed=shared.SEED.value
    )
    shares = {hole.name: round(filled_share(hole.mask), 4) for hole in holes}
    logging.info(
        "%d images; masks fill %.1f %% of an image, %.1f to %.1f %%",
        len(holes),
        *(100 * share(list(shares.values())) for share in (np.mean, min, max)),
    )
    filled = inpainting.fill_holes(
        inpainting.make_fill(trained.model, spec, mesh),
        trained,
        holes,
        seed=shared.SEED.value,
        samples=_SAMPLES.value,
        batch_size=shared.BATCH.value,
        label=shared.LABEL.value,
        prompt=shared.PROMPT.value or "",
    )
    about = {
        "workdir": str(absolute(_WORKDIR.value)),
        "step": trained.step,
        "seed": shared.SEED.value,
        "sampling": repr(spec),
        "masks": _MASKS.value,
        "filled share": shares,
    }
    _write(out, holes, filled, about)
    logging.info("%d fillings of %d images written to %s", _SAMPLES.value, len(holes), out)


def _read(step: int) -> list[Picture]:
    """The images."""
    num, folder = _NUM.value, shared.IMAGES.value
    if num is None and not (folder and holes_lib.is_folder(folder)):
        num = _IMAGES_OF_A_DATA_SET
    return read_pictures(folder, _WORKDIR.value, step, split=shared.SPLIT.value, num=num)


def _check_files(out: epath.Path, pictures: Sequence[Picture], step: int) -> None:
    """Checks that everything can be written, and replaces no image or mask of the user's.

    Raises:
        UserError: it cannot, or would replace one.
    """
    names = [
        _file(picture.name, number) for picture in pictures for number in range(_SAMPLES.value)
    ]
    names += [*_grids({picture.image.shape[:2] for picture in pictures}).values(), "about.json"]
    files = [out / name for name in names]
    folders = {folder for file in files for folder in file.parents}
    for file in files:
        if file in folders:
            raise UserError(f"{file}: both a filling and a folder of fillings: rename an image")
        check_file(file, "--out")
    own = own_files(shared.IMAGES.value, _WORKDIR.value, step, _MASKS.value)
    check_replaced(files, own, f"--out={out}")


def _file(name: str, number: int) -> str:
    """The file of a filling."""
    return f"{name}_{number}.png"


def _grids(sizes: Collection[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """The files of the grids, by the height and width of the images that they show."""
    if len(sizes) == 1:
        return dict.fromkeys(sizes, "grid.png")
    return {(height, width): f"grid_{width}x{height}.png" for height, width in sizes}


def _write(
    out: epath.Path, holes: Sequence[Hole], filled: Sequence[np.ndarray], about: dict
) -> None:
    """The fillings, a grid for every size of image, and about.json."""
    rows = collections.defaultdict(list)
    for hole, fillings in zip(holes, filled, strict=True):
        for number, image in enumerate(fillings):
            images.write_png(out / _file(hole.name, number), image)
        rows[hole.mask.shape].append(np.stack([hole.image, hole.masked, *fillings]))
    for size, name in _grids(rows.keys()).items():
        shown = rows[size][:_ROWS]
        images.write_png(out / name, images.grid(np.concatenate(shown), columns=len(shown[0])))
    write_text(out / "about.json", json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
