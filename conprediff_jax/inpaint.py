"""Fills holes in images.

    python -m conprediff_jax.inpaint --workdir=runs/openmoji --images=photos --masks=masks
        --samples=4 --seed=0 --out=filled

Images are a folder, whose files are taken at their own size, or a data set by its name; by default
the test split of what the model was trained on. Masks are a kind, drawn for every image (thin,
strokes, thick: free-form; every_second_line, super_resolve, expand, half, box), a file for all
images, or a folder with a mask of the same name for each.

In mask files white says what to KEEP, as in RePaint; with --polarity=fill it says what to FILL, as
in latent diffusion's inpainting.

Written to --out: every filling as NAME_0.png, NAME_1.png ..., whose known pixels are those of the
image, bit for bit; grid.png with, in a row, image, masked image and fillings; about.json with the
share of each image that was filled.

Continuous models fill by RePaint, which calls the network 2,410 times. Fewer --steps and
--resamplings are faster, and --sampler=ddim or dpm_solver far faster; they fit what is known less
well. Discrete models use their own sampler.
"""

import collections
import json
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags, logging
from etils import epath

from conprediff_jax import cli, images, inpainting, parallel
from conprediff_jax import inpainting_flags as shared
from conprediff_jax.data import holes as holes_lib
from conprediff_jax.data.holes import Hole
from conprediff_jax.data.masks import MASKS, filled_share
from conprediff_jax.errors import UserError
from conprediff_jax.files import absolute, check_folder, write_text
from conprediff_jax.inference import load_denoiser
from conprediff_jax.sampling import check_condition

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
    trained = load_denoiser(_WORKDIR.value, mesh, shared.STEP.value, flag="--workdir=")
    name = f"inpaint_step_{trained.step:07}_seed_{shared.SEED.value}"
    out = epath.Path(_OUT.value or epath.Path(_WORKDIR.value) / "samples" / name)
    check_folder(out, "--out")
    check_condition(trained.task, shared.LABEL.value, shared.prompts(), name="prompt")
    spec = inpainting.sampling_for(trained.task, **shared.sampling())
    holes = _read(trained.step)
    shares = {hole.name: round(filled_share(hole.mask), 4) for hole in holes}
    logging.info(
        "%d images; masks fill %.1f %% of an image, %.1f to %.1f %%",
        len(holes),
        *(100 * share(list(shares.values())) for share in (np.mean, min, max)),
    )
    filled = inpainting.fill_holes(
        inpainting.make_fill(trained.task, spec, mesh),
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


def _read(step: int) -> list[Hole]:
    """Images with holes."""
    num, images = _NUM.value, shared.IMAGES.value
    if num is None and not (images and holes_lib.is_folder(images)):
        num = _IMAGES_OF_A_DATA_SET
    pictures = inpainting.read_pictures(
        images, _WORKDIR.value, step, split=shared.SPLIT.value, num=num
    )
    return holes_lib.cut(
        pictures, _MASKS.value, polarity=shared.POLARITY.value, seed=shared.SEED.value
    )


def _write(
    out: epath.Path, holes: Sequence[Hole], filled: Sequence[np.ndarray], about: dict
) -> None:
    """The fillings, a grid for every size of image, and about.json."""
    rows = collections.defaultdict(list)
    for hole, fillings in zip(holes, filled, strict=True):
        for number, image in enumerate(fillings):
            images.write_png(out / f"{hole.name}_{number}.png", image)
        rows[hole.mask.shape].append(np.stack([hole.image, hole.masked, *fillings]))
    for (height, width), all_rows in rows.items():
        name = "grid.png" if len(rows) == 1 else f"grid_{width}x{height}.png"
        shown = all_rows[:_ROWS]
        images.write_png(out / name, images.grid(np.concatenate(shown), columns=len(shown[0])))
    write_text(out / "about.json", json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
