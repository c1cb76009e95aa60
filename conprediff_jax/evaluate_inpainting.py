"""Evaluates the fillings of one model, or of several side by side, under every kind of mask.

    python -m conprediff_jax.evaluate_inpainting --workdir=runs/openmoji,runs/no_context
        --masks=thin,thick,every_second_line,super_resolve,expand,half --num=100 --samples=2
        [--lpips_trunk=vgg16-397923af.pth --lpips_heads=vgg.pth]
    python -m conprediff_jax.evaluate_inpainting --workdir=runs/openmoji --masks=half --num=16
    python -m conprediff_jax.evaluate_inpainting --workdir=runs/openmoji --images=photos
        --masks=masks

`--images` names a folder or a data set; the default is the test split of the data that the first
model was trained on. All models see the same images and masks, and start from the same noise. The
command computes PSNR, SSIM and spread (how much the fillings of an image differ) on the filled
region. On whole images it computes LPIPS to the original, where its weights are given, and
FD-random-VGG16 between all fillings and all originals. docs/inpainting.md defines these metrics.

The command prints a table of what it was asked for. It writes all figures, with all that they
depend on, to inpainting.json and inpainting.md, where results of other settings stay, and the first
images to pictures whose names say what was asked for. The default of `--out` is the folder
`inpainting` in the first workdir. If you start an interrupted command again, it continues after the
last filling. It can run as one of several processes that see this folder: they share the fillings
among them, and the first one computes and writes the figures.
"""

import pathlib
from collections.abc import Mapping, Sequence

from absl import flags

from conprediff_jax.cli import help, lpips_flags
from conprediff_jax.cli import inpainting_flags as shared
from conprediff_jax.cli.choices import MASKS

_PROTOCOL = ["thin", "thick", "every_second_line", "super_resolve", "expand", "half"]

_WORKDIR = flags.DEFINE_list(
    "workdir",
    None,
    "Evaluate the models in these workdirs of training runs, or `inference` folders.",
    required=True,
)
_NUM = flags.DEFINE_integer("num", 100, "Fill the first NUM images.", lower_bound=2)
_MASKS = flags.DEFINE_list(
    "masks",
    _PROTOCOL,
    f"Fill holes of these kinds: {', '.join(MASKS)}; or name mask files, or folders with a mask "
    "for every image.",
)
_SAMPLES = flags.DEFINE_integer(
    "samples", 2, "Make this many fillings of every image.", lower_bound=1
)
_BOOTSTRAP = flags.DEFINE_integer(
    "bootstrap",
    100,
    "Compute confidence intervals from this many bootstrap replicates; 0 computes none.",
    lower_bound=0,
)
_OUT = flags.DEFINE_string(
    "out", None, "Write results to this folder; the default is <first workdir>/inpainting."
)
flags.adopt_module_key_flags(shared)  # so that --help shows them
flags.adopt_module_key_flags(lpips_flags)

help.answer(__name__, several=True)  # before imports that take seconds

import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from conprediff_jax.cli import app
from conprediff_jax.common import hub, images, opening
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import absolute, check_folder
from conprediff_jax.common.progress import ProgressLine
from conprediff_jax.data import fitting
from conprediff_jax.data.holes import Hole
from conprediff_jax.data.masks import filled_share
from conprediff_jax.metrics import features, fillings
from conprediff_jax.metrics.bootstrap import LEVEL
from conprediff_jax.metrics.fillings import FillingJudge, check
from conprediff_jax.metrics.results import ResultsTable
from conprediff_jax.parallel import share
from conprediff_jax.runs.classes import Numbers, numbers_of
from conprediff_jax.runs.restore import load, load_experiment, load_model, read_pictures
from conprediff_jax.sampling import inpainting, record
from conprediff_jax.sampling.model import TrainedModel
from conprediff_jax.sampling.spec import SamplingSpec

_ROWS = 8  # images shown in a picture


def main(argv: list[str]) -> None:
    """Reads the flags, fills the holes, evaluates, and writes JSON, table and pictures."""
    del argv
    mesh = share.local_mesh()
    names, holes, shape = _names(_WORKDIR.value), {}, ()
    asked = {workdir: _asked_of(workdir) for workdir in names.values()}  # fails now, not later
    out = epath.Path(_OUT.value or epath.Path(hub.results_folder(_WORKDIR.value[0])) / "inpainting")
    check_folder(out, "--out")
    share.check_seen(out, "--out")
    opening.say(
        f"{', '.join(names.values())}, and {_NUM.value} images",
        f"{_SAMPLES.value} fillings of each under {', '.join(_MASKS.value)}, and their figures",
        out,
    )
    judge, cells = _judge(mesh), {}
    table = ResultsTable(out / "inpainting.json") if share.is_first() else None
    for name, workdir in names.items():
        trained = load(workdir, mesh, shared.STEP.value)
        model = trained.model
        label, spec = asked[workdir]
        if not holes:
            shape = (*model.image_shape, model.channels)
            holes = _read(workdir, trained.step, model.image_shape)
        if (*model.image_shape, model.channels) != shape:
            raise UserError(
                f"--workdir={workdir}: its model has images of {model.image_shape} pixels and "
                f"{model.channels} channels, and the first model has {shape}: all must have one "
                "size"
            )
        described = record.model_of(trained, workdir)
        settings = {
            masks: _settings(described, spec, label, masks, cut) for masks, cut in holes.items()
        }
        _fill(name, trained, spec, mesh, label, holes, settings, judge, table, out)
        for masks in holes if table else ():
            cells[name, masks] = table.find(settings[masks])["metrics"]
    if not table:
        return
    print(fillings.table(fillings.arranged(cells)), flush=True)
    logging.info("%s, %s", table.path, table.path.with_suffix(".md"))


def _asked_of(workdir: str) -> tuple[Numbers, SamplingSpec]:
    """The classes that the flags ask of the model in a workdir, and the settings of sampling.

    Raises:
        UserError: There is no such model, or the flags do not fit it.
    """
    model = load_model(workdir, shared.STEP.value)
    names = load_experiment(workdir, shared.STEP.value).data.class_names
    label = numbers_of(shared.LABEL.value, names, model.num_classes)
    model.check_prompts(shared.prompts(), name="prompt")
    return label, inpainting.sampling_for(model, **shared.sampling())


def _fill(
    name: str,
    trained: TrainedModel,
    spec: SamplingSpec,
    mesh: Mesh,
    label: Numbers,
    holes: Mapping[str, Sequence[Hole]],
    settings: Mapping[str, record.Settings],
    judge: FillingJudge,
    table: ResultsTable | None,
    out: epath.Path,
) -> None:
    """Fills the holes by one model where its figures are missing, and adds the figures.

    The first process has the table, and the others wait for it.
    """
    missing = share.from_first(lambda: [m for m in holes if table.find(settings[m]) is None])
    if not missing:
        return
    count = _SAMPLES.value * sum(len(holes[masks]) for masks in missing)
    progress = ProgressLine(count, "fillings")
    fill = inpainting.make_fill(trained.model, spec, mesh, progress.within)
    for masks in missing:
        cut, progress.about = holes[masks], f"{name}, {masks}"
        folder = out / f".{record.fingerprint_of(settings[masks])}"
        found = inpainting.fill_holes_to(
            folder,
            fill,
            trained,
            cut,
            seed=shared.SEED.value,
            samples=_SAMPLES.value,
            batch_size=shared.BATCH.value,
            label=label,
            prompt=shared.PROMPT.value or "",
            progress=progress,
        )
        if table:
            _show(name, cut, found, settings[masks], trained, out)
            with progress.paused():
                table.add(settings[masks], judge(cut, found))
            folder.rmtree()
        share.wait_for_all()


def _show(
    name: str,
    cut: Sequence[Hole],
    found: Sequence[np.ndarray],
    settings: record.Settings,
    trained: TrainedModel,
    out: epath.Path,
) -> None:
    """Writes the picture of the first images with their fillings."""
    rows = [np.stack([h.image, h.masked, *f]) for h, f in zip(cut, found, strict=True)]
    picture = images.grid(np.concatenate(rows[:_ROWS]), columns=len(rows[0]))
    usual = inpainting.sampling_for(trained.model, sampler=shared.sampling()["sampler"])
    title = record.short_name(settings, usual, "label", "prompt", "masks", "images")
    images.write_png(out / f"{name}_{title}.png", picture)


def _names(workdirs: Sequence[str]) -> dict[str, str]:
    """Workdirs by their names in the table: the last part of the path, where that is unique."""
    short = [absolute(workdir).name for workdir in workdirs]
    if len(set(short)) < len(short):
        short = [workdir.strip("/").replace("/", "-") for workdir in workdirs]
    if len(set(short)) < len(short):
        raise UserError(f"--workdir={','.join(workdirs)}: a workdir is named twice")
    return dict(zip(short, workdirs, strict=True))


def _read(workdir: str, step: int, size: tuple[int, int]) -> dict[str, list[Hole]]:
    """The same images under every mask, by the mask's name; a path is named by its last part."""
    pictures = read_pictures(
        shared.IMAGES.value, workdir, step, split=shared.SPLIT.value, num=_NUM.value
    )
    holes = {}
    for masks in _MASKS.value:
        name = pathlib.Path(masks).name
        if name in holes:
            raise UserError(f"--masks={','.join(_MASKS.value)}: two masks are called {name}")
        fitted = fitting.cut(
            pictures,
            masks,
            fit=shared.FIT.value,
            size=size,
            polarity=shared.POLARITY.value,
            seed=shared.SEED.value,
        )
        if not holes:
            fitting.log_changes(fitted)
        holes[name] = [each.hole for each in fitted]
        check(holes[name])
        shares = [filled_share(hole.mask) for hole in holes[name]]
        logging.info("%s fills %.1f %% of an image", name, 100 * np.mean(shares))
    return holes


def _judge(mesh: Mesh) -> FillingJudge:
    """What computes the metrics of fillings."""
    distances = lpips_flags.load()
    runner = features.Runner(features.random_extractor(), mesh, shared.BATCH.value)
    return FillingJudge(runner, distances, replicates=_BOOTSTRAP.value, seed=shared.SEED.value)


def _settings(
    model: record.Settings,
    spec: SamplingSpec,
    label: Numbers,
    masks: str,
    holes: Sequence[Hole],
) -> record.Settings:
    """All that a figure depends on: a stored figure is used again only where all of it agrees."""
    networks = (lpips_flags.NETWORK, lpips_flags.TRUNK, lpips_flags.HEADS)
    content = record.content_of(part for hole in holes for part in (hole.image, hole.mask))
    masks = pathlib.Path(masks).stem
    asked = shared.asked(label)
    return record.settings_of(model, spec, masks=masks, content=content, **asked) | {
        "num": len(holes),
        "samples": _SAMPLES.value,
        "lpips": [flag.value for flag in networks] if lpips_flags.TRUNK.value else None,
        "intervals": {"level": LEVEL, "replicates": _BOOTSTRAP.value},
    }


if __name__ == "__main__":
    app.run(main, several=True, again="the same command continues after the last filling")
