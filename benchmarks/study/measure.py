"""Measures a trained run: its samples against the data, and its losses on held-out images.

    FD-, KD-, precision-, recall-random-VGG16   of the samples against the training images
    held-out loss                               mean over times, and over each third of them
    bits per token                              of discrete models, on held-out images
    difference W2, patch W2                     local structure of the samples against that of
                                                held-out images, see `study.neighborhoods`; also
                                                on the grid of the model's points, by block means

Of data that are made (`data.made`), whose law is known, the samples are compared with the law
instead: differences, correlations, and for Potts grids patterns and energies, see
`study.known_structure`.

All models draw from the same prior noise, and read the same held-out images with the same noise.
The random directions, patches and bootstrap replicates are the same for all models too.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from scipy import stats

from conprediff_jax import data, parallel
from conprediff_jax.common.files import write_atomically, write_text
from conprediff_jax.common.fingerprint import fingerprint
from conprediff_jax.data import made
from conprediff_jax.diffusion.tokens import TokenProcess
from conprediff_jax.metrics import denoising_loss, features, image_sets
from conprediff_jax.metrics.bootstrap import LEVEL, Figure, mean_figure
from conprediff_jax.metrics.suite import Suite
from conprediff_jax.runs.restore import load
from conprediff_jax.sampling.model import TrainedModel
from conprediff_jax.sampling.shards import generate_to, make_draw
from study import known_structure
from study.grid import Run
from study.neighborhoods import NeighborhoodJudge, block_means

HELD_OUT = "held_out.npy"  # losses by image and time
REAL = "real.json"  # figures of the neighbourhoods of training images, in the study's folder
LOSS = "held-out loss"
_THIRDS = ("little noise", "middle", "much noise")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured.

    Attributes:
        num: Number of samples of each run.
        held_out: Largest number of held-out images.
        times: Number of times of the held-out losses of continuous models.
        replicates: Number of replicates of the bootstrap over samples.
        batch_size: Number of images at a time.
        split: Split of the held-out images.
        reference: Largest number of training images that samples are compared with, the first ones;
            None for all.
        curve: Number of checkpoints before the last one whose losses are measured too.
    """

    num: int
    held_out: int
    times: int
    replicates: int
    batch_size: int
    split: str
    reference: int | None = None
    curve: int = 0


class Judge:
    """Measures runs of one data set with one size of images. It reads the references once.

    Args:
        spec: The training images.
        sizes: How much is measured.
        cell: Pixels on a side of one point of the models.
        cache: Folder for the features of the references.
    """

    def __init__(self, spec: data.DataSpec, sizes: Sizes, cell: int, cache: pathlib.Path):
        self._sizes, self._mesh = sizes, parallel.make_mesh(parallel.MeshSpec())
        self._held_out = spec.of_images(split=sizes.split)
        train = _first(_images(spec), sizes.reference)
        held_out = _images(self._held_out)
        # The best to be reached is measured on images that samples are not compared with.
        if made.is_made(spec.name):
            self._of_samples = lambda samples, run: {}
            self._structure = _KnownStructure(made.law_of(spec.name), _pixels(train))
            self._perfect = held_out
        else:
            self._of_samples = _Features(train, sizes, self._mesh, cache)
            self._structure = _Neighborhoods(_pixels(held_out), cell, sizes.replicates)
            self._perfect = train

    def real(self) -> dict[str, Figure]:
        """Figures of as many images of the data as there are samples: the best to be reached."""
        return self._structure(_pixels(self._perfect)[: self._sizes.num])

    def __call__(self, run: Run) -> dict[str, Any]:
        """Measures a run and returns all figures as plain data; also writes its `held_out.npy`."""
        trained = load(str(run.folder), self._mesh)
        samples = self._samples(trained, run)
        figures = self._of_samples(samples, run)
        times = trained.model.process.evaluated_times(self._sizes.times)
        losses = self._losses(trained, times, run)
        write_atomically(run.measured_folder / HELD_OUT, lambda file: np.save(file, losses))
        figures |= loss_figures(trained.model.process, losses, self._sizes.replicates)
        figures |= self._structure(_pixels(samples))
        curve = [self._before(run, step) for step in run.milestones(self._sizes.curve)]
        return {
            "setting": run.setting,
            "seed": run.seed,
            "step": trained.step,
            "longer": run.longer,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained.params)),
            "steps_per_second": run.speed(),
            "metrics": {name: figure._asdict() for name, figure in figures.items()},
            "times": times.tolist(),
            "shares": np.asarray(trained.model.process.share(times), np.float64).tolist(),
            "losses": losses.mean(axis=0).tolist(),
            "curve": curve,
            "cosines": run.cosines(),
        }

    def _before(self, run: Run, step: int) -> dict[str, Any]:
        """The losses of an earlier checkpoint; samples of each would take as long as training."""
        trained = load(str(run.folder), self._mesh, step)
        times = trained.model.process.evaluated_times(self._sizes.times)
        figures = loss_figures(trained.model.process, self._losses(trained, times, run), 0)
        return {"step": step, "metrics": {name: figure.value for name, figure in figures.items()}}

    def _samples(self, trained: TrainedModel, run: Run) -> image_sets.ImageSet:
        spec = trained.model.sampling_with(num=self._sizes.num)
        draw = make_draw(trained, spec, self._mesh, seed=0)
        files = generate_to(
            run.measured_folder / f"samples_{trained.step}",
            draw,
            num=self._sizes.num,
            batch_size=min(self._sizes.batch_size, self._sizes.num),
            settings={"step": trained.step, "sampling": dataclasses.asdict(spec)},
        )
        return image_sets.from_arrays(run.title, files)

    def _losses(self, trained: TrainedModel, times: np.ndarray, run: Run) -> np.ndarray:
        """Held-out losses, float32 `[images, times]`."""
        model, spec = trained.model, self._held_out
        num = min(self._sizes.held_out, data.num_examples(spec))
        batches = data.evaluation_iterator(
            spec, batch_size=self._sizes.batch_size, tokenizer=model.tokenizer
        )
        losses = denoising_loss.make_losses(model, self._mesh, times)
        parts = denoising_loss.losses_of(losses, trained.params, trained.frozen, batches, num)
        rows = np.concatenate(list(parts))
        logging.info(
            "%s, step %d: held-out losses of %d images at %d times", run.title, trained.step, num,
            len(times),
        )  # fmt: skip
        return rows


class _Features:
    """Compares samples with the training images by the features of a random network."""

    def __init__(self, train: image_sets.ImageSet, sizes: Sizes, mesh: Any, cache: pathlib.Path):
        self._runner = features.Runner(features.random_extractor(), mesh, sizes.batch_size)
        self._suite = Suite(
            metrics=("frechet", "kernel", "precision", "recall"), replicates=sizes.replicates
        )
        rows = self._suite.reference_rows()
        self._known = features.extract(self._runner, train, cache, rows)

    def __call__(self, samples: image_sets.ImageSet, run: Run) -> dict[str, Figure]:
        cache, rows = run.measured_folder / "features", self._suite.sample_rows()
        seen = features.extract(self._runner, samples, cache, rows)
        return dict(self._suite.compute(seen, self._known, self._runner.extractor.labels).figures)


class _KnownStructure:
    """How far the structure of images is from that of a law, with intervals over images.

    Means of the law, such as the energy, become their absolute errors.
    """

    def __init__(self, law: made.Law, images: np.ndarray):
        self._quantities = known_structure.quantities(law)
        reference = known_structure.groups_of(images)
        self._known = {
            name: known_structure.summed(quantity, reference).mean
            if quantity.known is None
            else quantity.known
            for name, quantity in self._quantities.items()
        }

    def __call__(self, images: np.ndarray) -> dict[str, Figure]:
        groups, figures = known_structure.groups_of(images), {}
        for name, quantity in self._quantities.items():
            known = self._known[name]
            of_law = quantity.read(known, known)
            found = known_structure.summed(quantity, groups)
            for title, (value, error) in known_structure.estimates(quantity, found, known).items():
                off, reach = abs(value - of_law[title]), stats.norm.ppf((1 + LEVEL) / 2) * error
                figures[title] = Figure(off, max(off - reach, 0.0), off + reach)
        return figures


class _Neighborhoods:
    """Measures neighbourhoods of pixels, and of the models' points if these are larger."""

    def __init__(self, reference: np.ndarray, cell: int, replicates: int):
        self._cell, self._points = cell, None
        self._pixels = NeighborhoodJudge(reference, replicates=replicates)
        if cell > 1:
            small = block_means(reference, cell)
            radii = [radius for radius in (1, 2, 3) if radius < min(small.shape[1:3])]
            self._points = NeighborhoodJudge(small, radii=radii, sizes=(), replicates=replicates)

    def __call__(self, images: np.ndarray) -> dict[str, Figure]:
        figures = self._pixels(images)
        if self._points:
            found = self._points(block_means(images, self._cell))
            figures |= {f"{name}, points": figure for name, figure in found.items()}
        return figures


def loss_figures(process: Any, losses: np.ndarray, replicates: int) -> dict[str, Figure]:
    """Means of held-out losses `[images, times]`, with intervals over images."""
    columns = {LOSS: losses.mean(axis=1)}
    for name, part in zip(_THIRDS, np.array_split(losses, 3, axis=1), strict=True):
        if part.size:
            columns[f"{LOSS}, {name}"] = part.mean(axis=1)
    if isinstance(process, TokenProcess):
        columns["bits per token"] = denoising_loss.bits_per_token(process, losses)
    options = {"replicates": replicates, "rng": np.random.default_rng(0)}
    return {name: mean_figure(values, **options) for name, values in columns.items()}


def write(path: pathlib.Path, figures: Mapping[str, Any]) -> None:
    """Writes plain data as JSON."""
    write_text(path, json.dumps(figures, indent=1) + "\n")


def _images(spec: data.DataSpec) -> image_sets.ImageSet:
    size = spec.image_shape[:2]
    return image_sets.read_reference(spec.name, size=size, split=spec.split, data_dir=spec.data_dir)


def _first(images: image_sets.ImageSet, count: int | None) -> image_sets.ImageSet:
    """The first `count` images of a set; all of them if it has no more."""
    if count is None or images.count <= count:
        return images

    def whole(size: int) -> Iterator[np.ndarray]:
        left = count
        for batch in images.batches(size):
            yield batch[:left]
            left -= len(batch)
            if left <= 0:
                return

    def batches(size: int, index: int = 0, total: int = 1) -> Iterator[np.ndarray]:
        return itertools.islice(whole(size), index, None, total)

    name = fingerprint([images.fingerprint.encode(), str(count).encode()])
    return dataclasses.replace(images, fingerprint=name, count=count, batches=batches)


def _pixels(images: image_sets.ImageSet) -> np.ndarray:
    return np.concatenate(list(images.batches(256)))
