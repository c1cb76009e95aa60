"""Evaluates images: those of a trained model, of a folder or of an npz.

    python -m conprediff_jax.evaluate --workdir=runs/celebahq --reference=celeb_a_hq/256
        --num=50000 --inception=pt_inception-2015-12-05-6726825d.pth
    python -m conprediff_jax.evaluate --workdir=runs/openmoji --reference=openmoji/people
        --num=2048 --allow_few        # it has 1,454 images
    python -m conprediff_jax.evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256.npz
        --inception=...

With `--inception`, which names pytorch-fid's weight file, the command computes FID, sFID, KID,
inception score, precision and recall. With `--dinov2`, which names the folder of facebook/
dinov2-large, it computes FD-DINOv2, KD-DINOv2, precision and recall. Without either, it computes
FD-random-VGG16, KD-random-VGG16, precision and recall from a VGG-16 with fixed random weights;
these need no file and are not FID. `--clip` and `--captions` add the CLIP score. `--lpips_trunk`
and `--lpips_heads` add the LPIPS of each sample to the reference image of the same name, or at the
same place where images have no names. `--sweep='guidance=1,1.5,2 steps=25,50'` evaluates every
combination.
docs/metrics.md defines all metrics.

The command writes to `--out`, which is the folder `evaluation` in the workdir by default:

    metrics.json, metrics.md    a row for every evaluation, newest first: the figures with all that
                                they depend on; a row is replaced by one of the same settings alone
    reports/<name>/             report.html and its PNGs; the name says what was asked for
    sweeps/<name>.png           the figures of a sweep, over what was varied
    comparisons/<name>.html     the model and that of `--compare`, side by side
    samples/<name>/             the images that were drawn from the workdir
    features/                   features of samples

If you start an interrupted command again, it continues where it stopped. It can run as one of
several processes that see these folders: each draws and reads its own part of the images, and the
first one computes and writes the figures.
"""

import os
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from absl import flags

from conprediff_jax.cli import guide_flag, help, lpips_flags, sampling_flags, sweep_flag
from conprediff_jax.cli.choices import ENOUGH, METRICS

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Evaluate images of the model in this workdir of a training run."
)
_COMPARE = flags.DEFINE_string(
    "compare",
    None,
    "Evaluate the model in this other workdir in the same way, too, and write a page on which both "
    "stand side by side.",
)
_SAMPLES = flags.DEFINE_string(
    "samples", None, "Evaluate this folder of images, or this npz with arr_0, instead of --workdir."
)
_REFERENCE = flags.DEFINE_string(
    "reference",
    None,
    "Compare the samples with this TFDS data set, folder of images, npz of images, or npz of "
    "Inception statistics.",
    required=True,
)
_SPLIT = flags.DEFINE_string("split", "train", "Use this split of a TFDS data set as reference.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "Find TFDS data sets in this folder; the default is TFDS_DATA_DIR or ~/tensorflow_datasets.",
)
_INCEPTION = flags.DEFINE_string(
    "inception",
    None,
    "Read the Inception network from this weight file of pytorch-fid; without it, features come "
    "from a VGG-16 with fixed random weights.",
)
_DINOV2 = flags.DEFINE_string(
    "dinov2",
    None,
    "Read DINOv2 from this folder of a checkpoint of transformers, for FD-DINOv2 and its like.",
)
_METRICS = flags.DEFINE_list(
    "metrics",
    None,
    f"Compute these of {', '.join(METRICS)}; the default is all that the feature network and the "
    "reference allow.",
)
_CLIP = flags.DEFINE_string(
    "clip", None, "Compute the CLIP score with the CLIP checkpoint in this folder."
)
_CAPTIONS = flags.DEFINE_string(
    "captions",
    None,
    "Read captions from this text file, one a line. A model that reads captions draws one image "
    "for each in turn; for the CLIP score, line i is the caption of image i in the order of file "
    "names (2 before 10).",
)
_BOOTSTRAP = flags.DEFINE_integer(
    "bootstrap",
    100,
    "Compute confidence intervals from this many bootstrap replicates; 0 computes none.",
    lower_bound=0,
)
_ALLOW_FEW = flags.DEFINE_bool(
    "allow_few", False, f"Compute Frechet distances of fewer than {ENOUGH} images, too."
)
_NUM = flags.DEFINE_integer("num", 50_000, "Draw this many images from --workdir.", lower_bound=1)
_STEP = flags.DEFINE_integer(
    "step", None, "Draw from the checkpoint of this training step; the default is the newest."
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "This seed decides the images, the subsets and the intervals.", 0, 2**32 - 1
)
_BATCH = flags.DEFINE_integer(
    "batch_size", 64, "Draw and evaluate this many images at a time.", lower_bound=1
)
_OUT = flags.DEFINE_string(
    "out", None, "Write results to this folder; the default is <workdir>/evaluation."
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Draw the images anew where earlier ones of the same settings are there."
)
flags.adopt_module_key_flags(sampling_flags)  # so that --help shows them
flags.adopt_module_key_flags(guide_flag)
flags.adopt_module_key_flags(sweep_flag)
flags.adopt_module_key_flags(lpips_flags)

help.answer(__name__, several=True)  # before imports that take seconds

import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Float

from conprediff_jax.cli import app
from conprediff_jax.common import extras, hub, opening
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import check_folder, is_address
from conprediff_jax.common.fingerprint import fingerprint
from conprediff_jax.common.progress import ProgressLine
from conprediff_jax.common.trees import flatten
from conprediff_jax.common.version import code_version
from conprediff_jax.data.text_files import read_captions
from conprediff_jax.metrics import comparison, features, image_sets, pictures, report, sweep
from conprediff_jax.metrics.bootstrap import LEVEL, Figure, mean_figure
from conprediff_jax.metrics.clip_score import clip_scores
from conprediff_jax.metrics.image_sets import ImageSet
from conprediff_jax.metrics.networks import clip, lpips
from conprediff_jax.metrics.results import ResultsTable
from conprediff_jax.metrics.suite import Suite
from conprediff_jax.parallel import share
from conprediff_jax.runs.restore import load_guided, load_model
from conprediff_jax.sampling import record
from conprediff_jax.sampling.model import DiffusionModel
from conprediff_jax.sampling.shards import Draw, generate_to, make_draw


class _Asked(NamedTuple):
    """The samples that the flags ask for.

    Attributes:
        name: What they are, as part of a file's name.
        source: Where they come from, in words.
        count: Number of images.
        size: Height and width in pixels.
        names: Names of the images; None where they have none.
        images: Function that returns the images, which it may draw, and what they were drawn by.
        channels: Channels of the images before they became RGB.
    """

    name: str
    source: str
    count: int
    size: tuple[int, int]
    names: Sequence[str] | None
    images: Callable[[], tuple[ImageSet, record.Settings]]
    channels: int = 3


class _Found(NamedTuple):
    """What an evaluation found.

    Attributes:
        settings: All that the figures depend on.
        figures: The figures by metric.
        samples: A grid of samples, uint8.
    """

    settings: record.Settings
    figures: dict[str, Figure]
    samples: np.ndarray


def main(argv: list[str]) -> None:
    """Reads the flags, computes, and writes JSON, table and report."""
    del argv
    if (_WORKDIR.value is None) == (_SAMPLES.value is None):
        raise UserError("give either --workdir or --samples")
    if _INCEPTION.value and _DINOV2.value:
        raise UserError("give either --inception or --dinov2: each has metrics of its own")
    for name in ("num", "step"):
        if _SAMPLES.value and flags.FLAGS[name].present:
            raise UserError(f"--{name} goes with --workdir: all images of --samples are evaluated")
    points = sweep_flag.points()
    mesh = share.local_mesh()
    if len(points) > 1:
        _check_sweep(points, mesh)
    if _COMPARE.value:
        _check_comparison(points, mesh)
    out = _OUT.value or os.path.join(hub.results_folder(_WORKDIR.value or ""), "evaluation")
    if is_address(out):
        raise UserError(f"--out={out}: an evaluation is written on this machine, name a folder")
    out = pathlib.Path(out)
    check_folder(out, "--out")
    share.check_seen(out, "--out")
    cache = lpips_flags.cache_folder()
    if _INCEPTION.value:
        extractor = features.inception_extractor(_INCEPTION.value, cache)
    elif _DINOV2.value:
        extractor = features.dinov2_extractor(_DINOV2.value, cache)
    else:
        extractor = features.random_extractor()
    found = []
    for number, point in enumerate(points):
        if len(points) > 1:
            logging.info("sweep, %d of %d: %s", number + 1, len(points), _in_words(point))
        if _WORKDIR.value:
            asked = _of_workdir(_WORKDIR.value, mesh, out / "samples", point)
        else:
            asked = _of_file()
        found.append(_evaluate(asked, extractor, mesh, out, cache))
    if len(points) > 1 and share.is_first():
        _plot(points, found, out / "sweeps")
    if _COMPARE.value:
        folder = pathlib.Path(hub.results_folder(_COMPARE.value)) / "evaluation"
        asked = _of_workdir(_COMPARE.value, mesh, folder / "samples", {})
        found.append(_evaluate(asked, extractor, mesh, folder, cache))
        if share.is_first():
            _compare(found, out / "comparisons")


def _evaluate(
    asked: _Asked,
    extractor: features.Extractor,
    mesh: Mesh,
    out: pathlib.Path,
    cache: pathlib.Path,
) -> _Found | None:
    """Compares the samples with the reference; the first process writes and returns what it finds.

    It waits for all processes.
    """
    suite, judges = _suite(extractor), _judges(cache)
    reference = image_sets.read_reference(
        _REFERENCE.value,
        size=asked.size,
        channels=asked.channels,
        split=_SPLIT.value,
        data_dir=_DATA_DIR.value,
        strict=bool(lpips_flags.TRUNK.value),
    )
    _check_statistics(reference, extractor)
    suite = suite.possible(extractor, reference)
    _check(suite, asked, reference, extractor)  # fails now, and not after hours of work
    suite, missing = _without_lacking(suite, judges, asked.count, reference, extractor)
    if lpips_flags.TRUNK.value:
        _check_pairs(asked, reference)
    _say(asked, reference, suite, extractor, out)
    table = ResultsTable(out / "metrics.json") if share.is_first() else None
    samples, settings = asked.images()

    figures = {name: judge(samples, reference) for name, judge in judges.items()}
    runner = features.Runner(extractor, mesh, _BATCH.value)
    # The picture of nearest images needs `pool`, whatever the metrics are.
    folders = out / "features", cache / "features"
    features.compute(runner, samples, folders[0], suite.sample_rows() | {"pool"})
    kept = suite.reference_rows() | {"pool"}
    features.compute(runner, reference, folders[1], kept, shared=folders[0])
    found = None
    if table:
        sets = zip((samples, reference), folders, strict=True)
        pair = [(images, features.read(extractor, images, folder)) for images, folder in sets]
        found = _conclude(asked, suite, extractor, pair, figures, settings, missing, table)
    share.wait_for_all()
    return found


def _conclude(
    asked: _Asked,
    suite: Suite,
    extractor: features.Extractor,
    pair: Sequence[pictures.Extracted],
    figures: dict[str, Figure],
    settings: record.Settings,
    missing: dict[str, str],
    table: ResultsTable,
) -> _Found:
    """Computes what is left and writes all figures, from both sets and their features."""
    (samples, of_samples), (reference, of_reference) = pair
    results = suite.compute(of_samples, of_reference, extractor.labels)
    results.figures.update(figures)
    for metric, reason in results.missing.items():
        logging.warning("%s is not computed: %s", metric, reason)
    settings |= {
        "samples": _identity(samples, of_samples.count),
        "reference": _identity(reference, of_reference.count),
        **_of_metrics(extractor),
    }
    shown = pictures.of_evaluation(suite, *pair, results, extractor)
    name = record.slug(pathlib.Path(reference.name).stem)
    name = f"{asked.name}_{name}_{record.fingerprint_of(settings)}"
    folder = pathlib.Path(table.path).parent / "reports" / name
    _write(table, folder, settings, results.figures, missing | results.missing, shown)
    return _Found(settings, results.figures, shown[0].pixels)


def _in_words(point: sweep_flag.Point) -> str:
    """A combination of values, as in 'guidance 1.5, steps 25'."""
    return ", ".join(f"{key} {value}" for key, value in point.items())


def _of_model(point: sweep_flag.Point) -> tuple[sweep_flag.Point, int | None, float | None]:
    """A combination as settings of sampling, the step of the checkpoint and the average."""
    point = dict(point)
    step, average = point.pop("step", _STEP.value), point.pop("average", None)
    return sampling_flags.values() | point, step, average


def _model(workdir: str, step: int | None, mesh: Mesh) -> DiffusionModel:
    """The model of a workdir, with its guide; only a guide needs the parameters."""
    guide = guide_flag.value()
    return load_guided(workdir, mesh, step, guide).model if guide else load_model(workdir, step)


def _check_sweep(points: Sequence[sweep_flag.Point], mesh: Mesh) -> None:
    """Checks, before anything is computed, that every combination suits the model.

    Raises:
        UserError: It does not, there is no model, or what plots is not installed.
    """
    if not _WORKDIR.value:
        raise UserError("--sweep: goes with --workdir, whose model it draws from")
    extras.need("matplotlib", "plan")
    for key in points[0]:
        if key in flags.FLAGS and flags.FLAGS[key].present:
            raise UserError(f"--{key}: --sweep has values for it, so leave one of the two out")
    for point in points:
        settings, step, _ = _of_model(point)
        _model(_WORKDIR.value, step, mesh).sampling_with(num=_NUM.value, **settings)


def _plot(
    points: Sequence[sweep_flag.Point], found: Sequence[_Found], folder: pathlib.Path
) -> None:
    """Draws the figures of a sweep, and prints them as one table."""
    figures = [each.figures for each in found]
    name = record.slug("_".join(points[0])) + "_" + fingerprint([repr(points).encode()])[:6]
    path = folder / f"{name}.png"
    title = f"{_WORKDIR.value}, {_NUM.value} images"
    sweep.plot(path, list(zip(points, figures, strict=True)), title)
    for point, row in zip(points, figures, strict=True):
        told = "   ".join(f"{metric} {figure.value:.4g}" for metric, figure in row.items())
        print(f"{_in_words(point)}:   {told}")
    logging.info("the sweep: %s", path)


def _check_comparison(points: Sequence[sweep_flag.Point], mesh: Mesh) -> None:
    """Checks, before anything is computed, that two models can be compared.

    Raises:
        UserError: There is no model, a sweep is asked for, the settings do not suit the other
            model, or what plots is not installed.
    """
    if not _WORKDIR.value or len(points) > 1:
        raise UserError("--compare: goes with --workdir, and without --sweep")
    extras.need("matplotlib", "plan")
    settings, step, _ = _of_model({})
    _model(_COMPARE.value, step, mesh).sampling_with(num=_NUM.value, **settings)


def _compare(found: Sequence[_Found], folder: pathlib.Path) -> None:
    """Writes the page on which both models stand side by side."""
    workdirs = (_WORKDIR.value, _COMPARE.value)
    sides = [
        comparison.Evaluated(name=name, **each._asdict())
        for name, each in zip(workdirs, found, strict=True)
    ]
    names = "_".join(record.slug(pathlib.Path(workdir).name) for workdir in workdirs)
    path = folder / f"{names}_{record.fingerprint_of(found[0].settings)}.html"
    comparison.write(path, sides)
    logging.info("the comparison: %s", path)


def _say(
    asked: _Asked,
    reference: ImageSet,
    suite: Suite,
    extractor: features.Extractor,
    out: pathlib.Path,
) -> None:
    """Logs what is about to happen."""
    count = reference.count or "statistics of"
    opening.say(
        f"{asked.source}; {count} images of {reference.name}",
        f"{', '.join(suite.metrics)} of {asked.count} images by {extractor.name}",
        out,
    )


def _suite(extractor: features.Extractor) -> Suite:
    """What to compute.

    Raises:
        UserError: The feature network has no features for a metric that `--metrics` names.
    """
    wanted = _METRICS.value or [metric for metric in METRICS if metric in extractor.labels]
    for metric in wanted:
        if metric in METRICS and metric not in extractor.labels:
            raise UserError(
                f"--metrics={metric}: needs --inception; {extractor.name} has no such metric"
            )
    try:
        return Suite(metrics=wanted, replicates=_BOOTSTRAP.value, seed=_SEED.value)
    except ValueError as error:
        raise UserError(f"--{error}") from error


def _judges(cache: pathlib.Path) -> dict[str, Callable[[ImageSet, ImageSet], Figure]]:
    """The metrics of single images, which have networks of their own, by name."""
    if _CLIP.value and not _CAPTIONS.value:
        raise UserError("--clip: a CLIP score needs --captions too")
    if _CAPTIONS.value and not _CLIP.value and not _WORKDIR.value:
        raise UserError("--captions: a CLIP score of these samples needs --clip too")
    lpips_flags.check()
    rng = np.random.default_rng((_SEED.value, len(METRICS)))
    options = {"replicates": _BOOTSTRAP.value, "rng": rng}
    judges = {}
    if _CLIP.value:
        loaded = clip.load(_CLIP.value, cache)
        captions = read_captions(_CAPTIONS.value)

        def clip_score(samples: ImageSet, reference: ImageSet) -> Figure:
            del reference
            starts = share.mine(range(0, len(captions), _BATCH.value))
            own = [caption for i in starts for caption in captions[i : i + _BATCH.value]]
            scores = clip_scores(loaded, samples.part(_BATCH.value), own)
            return mean_figure(_of_all(scores), **options)

        judges["CLIP score"] = clip_score
    for name, distance in lpips_flags.load().items():

        def mean_distance(
            samples: ImageSet, reference: ImageSet, distance: lpips.Distance = distance
        ) -> Figure:
            pairs = zip(samples.part(_BATCH.value), reference.part(_BATCH.value), strict=True)
            distances = [np.empty(0, np.float32), *(distance(x, y) for x, y in pairs)]
            return mean_figure(_of_all(np.concatenate(distances)), **options)

        judges[name] = mean_distance
    return judges


def _of_all(values: Float[np.ndarray, "part"]) -> Float[np.ndarray, "images"]:
    """The values of all images, of which this process has those of its batches."""
    starts = range(0, len(values), _BATCH.value)
    return np.concatenate(share.in_turn([values[i : i + _BATCH.value] for i in starts]))


def _prompts(model: DiffusionModel) -> list[str] | None:
    """The captions that the flags give a model that reads captions; None for those of its config.

    Raises:
        UserError: The model cannot read the captions.
    """
    if not model.text:
        return None
    if not _CAPTIONS.value:
        logging.warning(
            "the %d prompts of the config are the captions of all images; --captions gives others",
            len(model.text.prompts),
        )
        return None
    prompts = read_captions(_CAPTIONS.value)
    model.check_captions(prompts, _CAPTIONS.value)
    return prompts


def _of_workdir(workdir: str, mesh: Mesh, folder: pathlib.Path, point: sweep_flag.Point) -> _Asked:
    """Images that are drawn from a workdir into a subfolder of `folder`."""
    settings, step, average = _of_model(point)
    trained = load_guided(workdir, mesh, step, guide_flag.value(), average)
    model = trained.model
    spec = model.sampling_with(num=_NUM.value, **settings)
    prompts = _prompts(model)
    captions = "\n".join(prompts or model.text.prompts) if model.text else None
    settings = record.settings_of(
        record.model_of(trained, workdir),
        spec,
        seed=_SEED.value,
        captions=captions and fingerprint([captions.encode()]),
        num=_NUM.value,
    )
    of_average = ["average"] if average is not None else []
    name = record.short_name(settings, model.sampling, *of_average, "num")
    progress = ProgressLine(_NUM.value, "images", batch=_BATCH.value, about="samples")
    draw = make_draw(trained, spec, mesh, seed=_SEED.value, prompts=prompts, report=progress.within)
    return _Asked(
        name=name,
        source=f"{record.described(trained, workdir)}, by {spec.describe()}",
        count=_NUM.value,
        size=model.image_shape,
        channels=model.channels,
        names=None,
        images=lambda: _draw(draw, settings, folder / name, progress),
    )


def _of_file() -> _Asked:
    """The images of `--samples`."""
    found = image_sets.read_samples(_SAMPLES.value)
    return _Asked(
        name=record.slug(pathlib.Path(found.name).stem),
        source=f"{found.count} images of {found.name}",
        count=found.count,
        size=found.size,
        names=found.names,
        images=lambda: (found, record.of_images(found.name)),
    )


def _draw(
    draw: Draw, settings: record.Settings, folder: pathlib.Path, progress: ProgressLine
) -> tuple[ImageSet, record.Settings]:
    """The images of the workdir, of which missing ones are drawn; and what they were drawn by."""
    files = generate_to(
        folder,
        draw,
        num=_NUM.value,
        batch_size=_BATCH.value,
        settings=settings,
        overwrite=_OVERWRITE.value,
        progress=progress,
    )
    drawn_by = share.from_first(lambda: record.read(folder)["version"])
    if drawn_by != settings["version"]:
        logging.warning(
            "%s: drawn by version %s, and this is %s; --overwrite draws the images anew",
            folder, drawn_by, settings["version"],
        )  # fmt: skip
    title = f"{settings['workdir']}, step {settings['step']}"
    return image_sets.from_arrays(title, files), settings | {"version": drawn_by}


def _identity(images: ImageSet, count: int) -> dict[str, str | int]:
    """What a set of images is, in the settings of a figure."""
    return {"name": images.name, "count": count, "fingerprint": images.fingerprint}


def _of_metrics(extractor: features.Extractor) -> dict[str, Any]:
    """The settings of the metrics, beside those of the images."""
    networks = {"clip": _CLIP.value, "lpips": lpips_flags.TRUNK.value and lpips_flags.NETWORK.value}
    return {
        "features": f"{extractor.name} ({extractor.fingerprint})",
        "intervals": {"level": LEVEL, "replicates": _BOOTSTRAP.value, "seed": _SEED.value},
        **{name: value for name, value in networks.items() if value},
        "evaluated_by": code_version(),
    }


def _check_pairs(asked: _Asked, reference: ImageSet) -> None:
    """Checks that every sample has its reference image; reads its part of these once.

    Raises:
        UserError: Names, numbers or sizes differ, or a reference image cannot be decoded.
    """
    if reference.batches is None:
        raise UserError(f"LPIPS compares image by image, and {reference.name} holds statistics")
    image_sets.check_partners(asked.names, reference.names, reference.name)
    if (asked.count, asked.size) != (reference.count, reference.size):
        raise UserError(
            f"LPIPS compares image by image: {asked.count} samples of {asked.size} do not match "
            f"{reference.count} reference images of {reference.size}"
        )
    for _ in reference.part(_BATCH.value):
        pass


def _check(suite: Suite, asked: _Asked, reference: ImageSet, extractor: features.Extractor) -> None:
    """Checks, before anything is computed, that every metric can be computed.

    Raises:
        UserError: There are too few captions or images, or images of another size.
    """
    captions = read_captions(_CAPTIONS.value) if _CLIP.value else None
    if captions is not None and len(captions) != asked.count:
        raise UserError(
            f"--captions={_CAPTIONS.value}: {len(captions)} lines for {asked.count} images; give "
            "one line for each image, in their order"
        )
    missing = [metric for metric in _METRICS.value or () if metric not in suite.metrics]
    if missing:
        raise UserError(
            f"--metrics={missing[0]}: needs images, and {reference.name} has statistics"
        )
    if not _ALLOW_FEW.value:
        try:
            suite.check_counts(asked.count, reference.count)
        except UserError as error:
            raise UserError(f"{error}, or --allow_few to compute it all the same") from error
    same = reference.size in (None, asked.size)
    if not same and "spatial" not in extractor.labels:
        raise UserError(
            f"{reference.name}: images of {reference.size}, but samples of {asked.size}; "
            f"{extractor.name} compares images of one size"
        )


def _without_lacking(
    suite: Suite,
    judges: Collection[str],
    count: int,
    reference: ImageSet,
    extractor: features.Extractor,
) -> tuple[Suite, dict[str, str]]:
    """The suite without metrics that there are too few images for; and why, by published name.

    Raises:
        UserError: `--metrics` names such a metric, or nothing is left to compute.
    """
    lacking = suite.lacking(count, reference.count)
    left = suite.without(lacking)
    if lacking and (_METRICS.value or not (left.metrics or judges)):
        raise UserError(next(iter(lacking.values())))
    for reason in lacking.values():
        logging.warning("%s; it is left out, and the others are computed", reason)
    return left, {extractor.labels[metric]: reason for metric, reason in lacking.items()}


def _check_statistics(reference: ImageSet, extractor: features.Extractor) -> None:
    """Calls `features.check_statistics`, and adds to its message the flag that helps."""
    try:
        features.check_statistics(reference, extractor)
    except UserError as error:
        hint = "" if _INCEPTION.value or _DINOV2.value else ", or --inception"
        raise UserError(f"{error}{hint}") from error


def _write(
    table: ResultsTable,
    folder: pathlib.Path,
    settings: record.Settings,
    figures: dict[str, Figure],
    missing: dict[str, str],
    shown: list[report.Picture],
) -> None:
    """The row of the table, the report, and the figures on standard output."""
    table.add(settings, figures, report=str(folder), missing=missing)
    about = {key: str(value) for key, value in flatten(settings).items()}
    about |= {f"without {metric}": reason for metric, reason in missing.items()}
    page = report.write(folder, title="Evaluation", about=about, figures=figures, pictures=shown)
    print(report.table(figures), flush=True)
    logging.info("%s, %s", table.path.with_suffix(".md"), page)


_AGAIN = "the same command continues after the last whole file of samples"

if __name__ == "__main__":
    app.run(main, several=True, again=_AGAIN)
