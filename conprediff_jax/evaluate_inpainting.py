"""Judges fillings: of one model or several, side by side, under every kind of mask.

    python -m conprediff_jax.evaluate_inpainting --workdir=runs/openmoji,runs/no_context
        --masks=thin,thick,every_second_line,super_resolve,expand,half --num=100 --samples=2
        [--lpips_trunk=vgg16-397923af.pth --lpips_heads=vgg.pth]

Images are a folder or a data set; by default the test split of what the first model was trained on.
All models see the same images and masks, and start from the same noise. Of the filled region: PSNR,
SSIM and how much the fillings of an image differ (spread); of whole images: LPIPS to the original,
where its weights are given, and FD-random-VGG16 of all fillings from all originals. Definitions
are in docs/inpainting.md.

Written to --out, by default `inpainting` in the first workdir: inpainting.json, table.txt, which is
also printed, and MODEL_MASK.png with the first images. A run that was broken off goes on at the
model and mask where it stopped.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from etils import epath
from jax.sharding import Mesh

from conprediff_jax import parallel
from conprediff_jax.cli import app
from conprediff_jax.cli import inpainting_flags as shared
from conprediff_jax.common import images
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import absolute, check_folder, write_text
from conprediff_jax.data import holes as holes_lib
from conprediff_jax.data.holes import Hole
from conprediff_jax.data.masks import MASKS, filled_share
from conprediff_jax.metrics import features
from conprediff_jax.metrics.fillings import FillingJudge, Results, check, table
from conprediff_jax.metrics.networks import lpips
from conprediff_jax.runs.restore import load, load_model, read_pictures
from conprediff_jax.sampling import inpainting
from conprediff_jax.weights import cached

_PROTOCOL = ["thin", "thick", "every_second_line", "super_resolve", "expand", "half"]

_WORKDIR = flags.DEFINE_list("workdir", None, "Workdirs of training runs.", required=True)
_NUM = flags.DEFINE_integer("num", 100, "Images, the first.", lower_bound=2)
_MASKS = flags.DEFINE_list("masks", _PROTOCOL, f"Of {', '.join(MASKS)}; or files or folders.")
_SAMPLES = flags.DEFINE_integer("samples", 2, "Fillings of every image.", lower_bound=1)
_BOOTSTRAP = flags.DEFINE_integer("bootstrap", 100, "Replicates; 0: no intervals.", lower_bound=0)
_LPIPS_TRUNK = flags.DEFINE_string("lpips_trunk", None, "torchvision's weights of the trunk.")
_LPIPS_HEADS = flags.DEFINE_string("lpips_heads", None, "The lpips package's weights of the heads.")
_LPIPS_NETWORK = flags.DEFINE_enum("lpips_network", "vgg16", list(lpips.TRUNKS), "Which trunk.")
_OUT = flags.DEFINE_string(
    "out", None, "Folder that results are written to; <first workdir>/inpainting when absent."
)
_CACHE = flags.DEFINE_string("cache", "~/.cache/conprediff_jax/metrics", "Converted weights.")
flags.adopt_module_key_flags(shared)  # so that --help has them

_ROWS = 8  # of a picture


def main(argv: list[str]) -> None:
    """Reads the flags, fills, judges, and writes JSON, table and pictures."""
    del argv
    if jax.process_count() > 1:
        raise UserError("evaluation runs in one process, on all of its devices")
    mesh = parallel.make_mesh(parallel.MeshSpec())
    names, holes, size = _names(_WORKDIR.value), {}, 0
    for workdir in names.values():
        load_model(workdir, shared.STEP.value)  # before hours are spent
    out = epath.Path(_OUT.value or epath.Path(_WORKDIR.value[0]) / "inpainting")
    check_folder(out, "--out")
    judge, results = _judge(mesh), Results(out / "inpainting.json")
    for name, workdir in names.items():
        trained = load(workdir, mesh, shared.STEP.value)
        model = trained.model
        model.check_condition(shared.LABEL.value, shared.prompts(), name="prompt")
        spec = inpainting.sampling_for(model, **shared.sampling())
        if not holes:
            holes, size = _read(workdir, trained.step), model.image_size
        if model.image_size != size:
            raise UserError(
                f"--workdir={workdir}: a model of images of {model.image_size}, and the "
                f"first one's have {size}: all must have one size"
            )
        fill = inpainting.make_fill(model, spec, mesh)
        for masks, cut in holes.items():
            about = _about(workdir, trained.step, repr(spec), masks, cut)
            if results.has(name, masks, about):
                continue
            logging.info("%s, %s", name, masks)
            found = inpainting.fill_holes(
                fill,
                trained,
                cut,
                seed=shared.SEED.value,
                samples=_SAMPLES.value,
                batch_size=shared.BATCH.value,
                label=shared.LABEL.value,
                prompt=shared.PROMPT.value or "",
            )
            rows = [np.stack([h.image, h.masked, *f]) for h, f in zip(cut, found, strict=True)]
            picture = images.grid(np.concatenate(rows[:_ROWS]), columns=len(rows[0]))
            images.write_png(out / f"{name}_{masks}.png", picture)
            results.add(name, masks, about, judge(cut, found))
    text = table(results.figures(list(names), list(holes)))
    write_text(out / "table.txt", text + "\n")
    print(text, flush=True)
    logging.info("%s, %s", results.path, out / "table.txt")


def _names(workdirs: Sequence[str]) -> dict[str, str]:
    """Workdirs by what the table calls them: their last part, where that tells them apart."""
    short = [absolute(workdir).name for workdir in workdirs]
    if len(set(short)) < len(short):
        short = [workdir.strip("/").replace("/", "-") for workdir in workdirs]
    if len(set(short)) < len(short):
        raise UserError(f"--workdir={','.join(workdirs)}: one of them is named twice")
    return dict(zip(short, workdirs, strict=True))


def _read(workdir: str, step: int) -> dict[str, list[Hole]]:
    """The same images under every mask, by its name; that of a path is its last part."""
    pictures = read_pictures(
        shared.IMAGES.value, workdir, step, split=shared.SPLIT.value, num=_NUM.value
    )
    holes = {}
    for masks in _MASKS.value:
        name = pathlib.Path(masks).name
        if name in holes:
            raise UserError(f"--masks={','.join(_MASKS.value)}: two are called {name}")
        holes[name] = holes_lib.cut(
            pictures, masks, polarity=shared.POLARITY.value, seed=shared.SEED.value
        )
        check(holes[name])
        shares = [filled_share(hole.mask) for hole in holes[name]]
        logging.info("%s fills %.1f %% of an image", name, 100 * np.mean(shares))
    return holes


def _judge(mesh: Mesh) -> FillingJudge:
    """The metrics."""
    if (_LPIPS_TRUNK.value is None) != (_LPIPS_HEADS.value is None):
        raise UserError("LPIPS needs both --lpips_trunk and --lpips_heads")
    distances = {}
    if _LPIPS_TRUNK.value:
        model = lpips.LPIPS(network=_LPIPS_NETWORK.value)
        cache = pathlib.Path(_CACHE.value).expanduser()
        check_folder(cache, "--cache")
        params = lpips.load(model, _LPIPS_TRUNK.value, _LPIPS_HEADS.value, cache=cache)
        params = jax.device_put(params)

        @jax.jit
        def distance(x, y):
            return model.apply({"params": params}, x / 127.5 - 1, y / 127.5 - 1)

        distances[f"LPIPS ({_LPIPS_NETWORK.value})"] = lambda x, y: np.asarray(distance(x, y))
    runner = features.Runner(features.random_extractor(), mesh, shared.BATCH.value)
    return FillingJudge(runner, distances, replicates=_BOOTSTRAP.value, seed=shared.SEED.value)


def _about(
    workdir: str, step: int, sampling: str, masks: str, holes: Sequence[Hole]
) -> dict[str, Any]:
    """What decides about a figure: everything must be as it was for it to be used again."""
    data = (shared.IMAGES.value, shared.SPLIT.value, _NUM.value, shared.POLARITY.value)
    return {
        "workdir": str(absolute(workdir)),
        "step": step,
        "sampling": sampling,
        "images": ", ".join(map(str, data)),
        "masks": masks,
        "content": cached.fingerprint(
            part.tobytes() for hole in holes for part in (hole.image, hole.mask)
        ),
        "samples": _SAMPLES.value,
        "label": shared.LABEL.value,
        "prompt": shared.PROMPT.value,
        "seed": shared.SEED.value,
        "lpips": [_LPIPS_NETWORK.value, _LPIPS_TRUNK.value, _LPIPS_HEADS.value],
        "bootstrap": _BOOTSTRAP.value,
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    app.run(main)
