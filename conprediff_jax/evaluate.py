"""Judges images: of a trained model, of a folder or of an npz.

    python -m conprediff_jax.evaluate --workdir=runs/celebahq --reference=celeb_a_hq/256
        --num=50000 --inception=pt_inception-2015-12-05-6726825d.pth
    python -m conprediff_jax.evaluate --workdir=runs/openmoji --reference=openmoji/people
        --num=2048 --allow_few        # it has 1,454 images

    python -m conprediff_jax.evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256.npz
        --inception=...

With `--inception`, pytorch-fid's weight file: FID, sFID, KID, inception score, precision, recall.
Without: the same distances on a VGG-16 with fixed random weights, which need no file and are not
FID. `--clip` and `--captions` add the CLIP score; `--lpips_trunk` and `--lpips_heads` the LPIPS of
each sample to the reference image of the same name, or of the same place where they have no names.
Definitions are in docs/metrics.md.

Written to `--out`, by default `evaluation` in the workdir: `metrics.json`, `report.html` and its
PNGs, and, of a workdir, the images. A run that was broken off goes on where it stopped. Runs in one
process, on all of its devices.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from jax.sharding import Mesh

from conprediff_jax import parallel
from conprediff_jax.cli import app, sampling_flags
from conprediff_jax.common import images
from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import absolute, check_folder, is_address, write_text
from conprediff_jax.data.text_files import read_captions
from conprediff_jax.metrics import features, image_sets, report
from conprediff_jax.metrics.bootstrap import Figure, mean_figure
from conprediff_jax.metrics.clip_score import clip_scores
from conprediff_jax.metrics.image_sets import ImageSet
from conprediff_jax.metrics.networks import clip, lpips
from conprediff_jax.metrics.precision_recall import nearest
from conprediff_jax.metrics.suite import METRICS, Results, Suite
from conprediff_jax.runs.restore import load
from conprediff_jax.sampling.model import TrainedModel
from conprediff_jax.sampling.shards import drawing, generate_to
from conprediff_jax.weights import cached

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a training run: its images are judged.")
_SAMPLES = flags.DEFINE_string("samples", None, "Or a folder of images, or an npz with arr_0.")
_REFERENCE = flags.DEFINE_string(
    "reference", None, "TFDS name, folder, npz of images, or statistics.", required=True
)
_SPLIT = flags.DEFINE_string("split", "train", "Split of the reference.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS data sets live.")
_INCEPTION = flags.DEFINE_string("inception", None, "pytorch-fid's weight file.")
_METRICS = flags.DEFINE_list("metrics", None, f"Of {', '.join(METRICS)}; by default all there are.")
_CLIP = flags.DEFINE_string("clip", None, "Folder of a CLIP checkpoint, for the CLIP score.")
_CAPTIONS = flags.DEFINE_string(
    "captions",
    None,
    "Text file: the caption of each image, a line, in the order of their names (2 before 10); what "
    "a model that reads captions is asked for.",
)
_LPIPS_TRUNK = flags.DEFINE_string("lpips_trunk", None, "torchvision's weights of the trunk.")
_LPIPS_HEADS = flags.DEFINE_string("lpips_heads", None, "The lpips package's weights of the heads.")
_LPIPS_NETWORK = flags.DEFINE_enum("lpips_network", "vgg16", list(lpips.TRUNKS), "Which trunk.")
_BOOTSTRAP = flags.DEFINE_integer("bootstrap", 100, "Replicates; 0: no intervals.", lower_bound=0)
_ALLOW_FEW = flags.DEFINE_bool("allow_few", False, "Frechet distances of few images all the same.")
_NUM = flags.DEFINE_integer("num", 50_000, "Images to draw from a workdir.", lower_bound=1)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to draw from; the newest when absent.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of images, subsets and intervals.", 0, 2**32 - 1)
_BATCH = flags.DEFINE_integer("batch_size", 64, "Images at a time.", lower_bound=1)
_OUT = flags.DEFINE_string(
    "out", None, "Folder that results are written to; <workdir>/evaluation when absent."
)
_CACHE = flags.DEFINE_string(
    "cache", "~/.cache/conprediff_jax/metrics", "Features of references, converted weights."
)
flags.adopt_module_key_flags(sampling_flags)  # so that --help has them

_SHOWN, _ROWS, _NEIGHBORS = 64, 8, 5  # images of the grid; samples with neighbours, and how many


def main(argv: list[str]) -> None:
    """Reads the flags, computes, and writes JSON, table and report."""
    del argv
    if (_WORKDIR.value is None) == (_SAMPLES.value is None):
        raise UserError("give either --workdir or --samples")
    for name in ("num", "step"):
        if _SAMPLES.value and flags.FLAGS[name].present:
            raise UserError(f"--{name} is about a workdir: of --samples all images are judged")
    if jax.process_count() > 1:
        raise UserError("evaluation runs in one process, on all of its devices")
    out = _OUT.value or os.path.join(_WORKDIR.value or "", "evaluation")
    if is_address(out):
        raise UserError(f"--out={out}: an evaluation is written on this machine, name a folder")
    out = pathlib.Path(out)
    check_folder(out, "--out")
    cache = pathlib.Path(_CACHE.value).expanduser()
    check_folder(cache, "--cache")
    mesh = parallel.make_mesh(parallel.MeshSpec())
    extractor = features.random_extractor()
    if _INCEPTION.value:
        extractor = features.inception_extractor(_INCEPTION.value, cache)
    suite, judges = _suite(extractor), _judges(cache)

    if _WORKDIR.value:
        trained = load(_WORKDIR.value, mesh, _STEP.value)
        if trained.model.text and _CAPTIONS.value:
            trained.model.check_captions(read_captions(_CAPTIONS.value), _CAPTIONS.value)
        count, size, names = _NUM.value, (trained.model.image_size,) * 2, None
    else:
        samples, about = image_sets.read_samples(_SAMPLES.value), {}
        count, size, names = samples.count, samples.size, samples.names
    reference = image_sets.read_reference(
        _REFERENCE.value,
        size=size,
        split=_SPLIT.value,
        data_dir=_DATA_DIR.value,
        whole=bool(_LPIPS_TRUNK.value),
    )
    features.check_statistics(reference, extractor)
    suite = suite.possible(extractor, reference)
    _check(suite, count, size, reference, extractor)  # before hours are spent
    if _LPIPS_TRUNK.value:
        _check_pairs(count, size, names, reference)
    if _WORKDIR.value:
        samples, about = _draw(trained, mesh, out)

    figures = {name: judge(samples, reference) for name, judge in judges.items()}
    runner = features.Runner(extractor, mesh, _BATCH.value)
    # The memorisation check looks features up, whatever the metrics are.
    keep = suite.sample_rows() | {"pool"}, suite.reference_rows() | {"pool"}
    seen = features.extract(runner, samples, out / "features", keep[0])
    known = features.extract(runner, reference, cache / "features", keep[1])
    results = suite.compute(seen, known, extractor.labels)
    results.figures.update(figures)
    about |= {
        "samples": f"{samples.name}, {seen.count} images",
        "reference": f"{reference.name}, {known.count or 'unknown number of'} images",
        "features": f"{extractor.name} ({extractor.fingerprint})",
        "intervals": f"95 %, {_BOOTSTRAP.value} bootstrap replicates of the samples",
        "jax": jax.__version__,
    }
    pictures = _pictures(suite, (samples, seen), (reference, known), results, extractor)
    _write(out, about, results.figures, pictures)


def _suite(extractor: features.Extractor) -> Suite:
    """What to compute; everything asked for by name must be possible."""
    wanted = _METRICS.value or [metric for metric in METRICS if metric in extractor.labels]
    for metric in wanted:
        if metric in METRICS and metric not in extractor.labels:
            raise UserError(f"--metrics={metric}: needs --inception; {extractor.name} has none")
    try:
        return Suite(metrics=wanted, replicates=_BOOTSTRAP.value, seed=_SEED.value)
    except ValueError as error:
        raise UserError(f"--{error}") from error


def _judges(cache: pathlib.Path) -> dict[str, Callable[[ImageSet, ImageSet], Figure]]:
    """Metrics of single images, which have networks of their own."""
    if _CLIP.value and not _CAPTIONS.value:
        raise UserError("--clip: a CLIP score needs --captions too")
    if _CAPTIONS.value and not _CLIP.value and not _WORKDIR.value:
        raise UserError("--captions: for a CLIP score of these samples give --clip too")
    if (_LPIPS_TRUNK.value is None) != (_LPIPS_HEADS.value is None):
        raise UserError("LPIPS needs both --lpips_trunk and --lpips_heads")
    rng = np.random.default_rng((_SEED.value, len(METRICS)))
    options = {"replicates": _BOOTSTRAP.value, "rng": rng}
    judges = {}
    if _CLIP.value:
        loaded = clip.load(_CLIP.value, cache)
        captions = read_captions(_CAPTIONS.value)

        def clip_score(samples: ImageSet, reference: ImageSet) -> Figure:
            del reference
            return mean_figure(
                clip_scores(loaded, samples.batches(_BATCH.value), captions), **options
            )

        judges["CLIP score"] = clip_score
    if _LPIPS_TRUNK.value:
        model = lpips.LPIPS(network=_LPIPS_NETWORK.value)
        params = lpips.load(model, _LPIPS_TRUNK.value, _LPIPS_HEADS.value, cache=cache)

        def distance(samples: ImageSet, reference: ImageSet) -> Figure:
            return mean_figure(_lpips(model, params, samples, reference), **options)

        judges[f"LPIPS ({_LPIPS_NETWORK.value})"] = distance
    return judges


def _lpips(model: Any, params: Any, samples: ImageSet, reference: ImageSet) -> np.ndarray:
    """The distance of every sample to the reference image of the same place."""

    @jax.jit
    def apply(params, x, y):
        return model.apply({"params": params}, x / 127.5 - 1, y / 127.5 - 1)

    params = jax.device_put(params)
    pairs = zip(samples.batches(_BATCH.value), reference.batches(_BATCH.value), strict=True)
    return np.concatenate([np.asarray(apply(params, x, y)) for x, y in pairs])


def _draw(trained: TrainedModel, mesh: Mesh, out: pathlib.Path) -> tuple[ImageSet, dict[str, str]]:
    """Draws the images of the workdir, or the rest of them; and says how they came about."""
    workdir, model, step = _WORKDIR.value, trained.model, trained.step
    spec = model.sampling_with(num=_NUM.value, **sampling_flags.values())
    prompts = read_captions(_CAPTIONS.value) if model.text and _CAPTIONS.value else None
    if model.text and not prompts:
        logging.warning(
            "all images are of the %d prompts of the config: --captions says others",
            len(model.text.prompts),
        )
    draw = drawing(trained, spec, mesh, seed=_SEED.value, prompts=prompts)

    about = {"workdir": str(absolute(workdir)), "step": step, "seed": _SEED.value}
    about |= {"sampling": dataclasses.asdict(spec), "weights": _fingerprint(trained)}
    if model.text:
        asked = "\n".join(prompts or model.text.prompts)
        about |= {"captions": cached.fingerprint([asked.encode()])}
    files = generate_to(out / "samples", draw, num=_NUM.value, batch_size=_BATCH.value, about=about)
    said = ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(spec).items() if k != "num")
    return image_sets.from_arrays(f"{workdir}, step {step}", files), {
        "sampling": f"{said}, seed {_SEED.value}"
    }


def _fingerprint(trained: TrainedModel) -> str:
    """Of the parameters: a workdir may hold those of another run under the same step."""
    leaves = jax.tree.leaves((trained.params, trained.frozen))
    return cached.fingerprint(np.asarray(leaf).tobytes() for leaf in leaves)


def _check_pairs(
    count: int, size: tuple[int, int], names: Sequence[str] | None, reference: ImageSet
) -> None:
    """Whether every sample has its reference image; reads all of them once."""
    if reference.batches is None:
        raise UserError(f"LPIPS compares image by image, and {reference.name} holds statistics")
    image_sets.check_partners(names, reference.names, reference.name)
    if (count, size) != (reference.count, reference.size):
        raise UserError(
            f"LPIPS compares image by image: {count} samples of {size} do not match "
            f"{reference.count} reference images of {reference.size}"
        )
    for _ in reference.batches(_BATCH.value):
        pass


def _check(
    suite: Suite,
    count: int,
    size: tuple[int, int],
    reference: ImageSet,
    extractor: features.Extractor,
) -> None:
    """What can be known to be wrong before anything is computed."""
    captions = read_captions(_CAPTIONS.value) if _CLIP.value else None
    if captions is not None and len(captions) != count:
        raise UserError(
            f"--captions={_CAPTIONS.value}: {len(captions)} lines for {count} images; one a line "
            "for each image, in their order"
        )
    missing = [metric for metric in _METRICS.value or () if metric not in suite.metrics]
    if missing:
        raise UserError(f"--metrics={missing[0]}: needs images, {reference.name} has statistics")
    suite.check_possible(count, reference.count)
    if not _ALLOW_FEW.value:
        suite.check_counts(count, reference.count)
    same = reference.size in (None, size)
    if not same and "spatial" not in extractor.labels:
        raise UserError(
            f"{reference.name}: images of {reference.size}, but samples of {size}; "
            f"{extractor.name} compares images of one size"
        )


def _pictures(
    suite: Suite,
    samples: tuple[ImageSet, features.Features],
    reference: tuple[ImageSet, features.Features],
    results: Results,
    extractor: features.Extractor,
) -> list[report.Picture]:
    """What the report shows; without images of the reference, the samples alone."""
    shown = next(samples[0].batches(_SHOWN))
    pictures = [
        report.Picture(
            file="samples",
            title="Samples",
            note=f"The first {len(shown)}, not chosen.",
            pixels=images.grid(shown),
        )
    ]
    if reference[0].batches is None:
        return pictures
    rows, many = min(_ROWS, len(shown)), min(_NEIGHBORS, reference[1].count)
    queries, points = samples[1].rows["pool"][:rows], reference[1].rows["pool"]
    found = nearest(queries, points, k=many).indices
    close = reference[0].pick(found.ravel().tolist())
    if close.shape[1:] == shown.shape[1:]:
        pictures.append(
            report.Picture(
                file="neighbors",
                title="Nearest images of the reference",
                note=f"Left a sample; right its {many} nearest images, nearest first, by the "
                f"features of {extractor.name}. Copies would point to memorised images.",
                pixels=report.neighbors_picture(
                    shown[:rows], close.reshape(rows, many, *close.shape[1:])
                ),
            )
        )
    names = [extractor.labels[metric] for metric in ("precision", "recall")]
    if all(name in results.figures for name in names):
        pictures.append(
            report.Picture(
                file="precision_recall",
                title="Precision and recall",
                note=f"By the number of neighbours k; the point reported is that of k = "
                f"{suite.neighbor}, with its intervals.",
                pixels=report.precision_recall_picture(
                    np.array(list(results.curve.values())),
                    [f"k = {k}" for k in results.curve],
                    *(results.figures[name] for name in names),
                ),
            )
        )
    return pictures


def _write(
    out: pathlib.Path,
    about: dict[str, str],
    figures: dict[str, Figure],
    pictures: list[report.Picture],
) -> None:
    """`metrics.json`, `report.html` with its PNGs, and the table on standard output."""
    found = {name: figure._asdict() for name, figure in figures.items()}
    write_text(out / "metrics.json", json.dumps({**about, "metrics": found}, indent=2) + "\n")
    page = report.write(out, title="Evaluation", about=about, figures=figures, pictures=pictures)
    print(report.table(figures), flush=True)
    logging.info("%s, %s", out / "metrics.json", page)


if __name__ == "__main__":
    app.run(main)
