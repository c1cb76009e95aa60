"""All figures of the fillings of one model under one kind of mask.

    PSNR, SSIM              on the filled region: the mean over the fillings of an image, and then
                            over the images
    spread                  how much the fillings of an image differ, mean over the images; 0 for
                            one filling of each image
    LPIPS, LPIPS spread     distance to the original and spread, on whole images, by LPIPS; only
                            where its weights are given
    FD-random-VGG16         Frechet distance between all fillings and all originals, whole images

Intervals are bootstrapped over the images, and over the fillings for the Frechet distance. With few
images the Frechet distance is biased upwards, by about as much for every model: compare it only
within one table.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from conprediff_jax.common.errors import UserError
from conprediff_jax.common.images import as_rgb
from conprediff_jax.data.holes import Hole
from conprediff_jax.metrics import features, regions
from conprediff_jax.metrics.bootstrap import Figure, frechet_figure, mean_figure
from conprediff_jax.metrics.frechet import Gaussian, Moments

Batch = UInt8[np.ndarray, "batch height width 3"]
Fillings = UInt8[np.ndarray, "samples height width 3"]
Distance = Callable[[Batch, Batch], Float[np.ndarray, "batch"]]
Table = Mapping[str, Mapping[str, Mapping[str, Figure]]]


class FillingJudge:
    """Computes the figures.

    Args:
        runner: The feature network of the Frechet distance.
        distances: Distances between the images of two batches, such as LPIPS, by name.
        replicates: Number of bootstrap replicates; 0 for no intervals.
        seed: Seed of the bootstrap.
    """

    def __init__(
        self,
        runner: features.Runner,
        distances: Mapping[str, Distance],
        *,
        replicates: int,
        seed: int,
    ):
        self._runner, self._distances = runner, distances
        self._replicates, self._seed = replicates, seed

    def __call__(self, holes: Sequence[Hole], found: Sequence[Fillings]) -> dict[str, Figure]:
        """Figures by name.

        Args:
            holes: Images with their masks, all of one size; every mask has something to fill.
            found: Fillings of each image, the same number for each.

        Raises:
            UserError: A mask fills nothing, sizes differ, or there are fewer than 2 images.
        """
        check(holes)
        holes = [hole._replace(image=as_rgb(hole.image)) for hole in holes]
        found = [as_rgb(fillings) for fillings in found]
        values: dict[str, list[float]] = {}
        for hole, fillings in zip(holes, found, strict=True):
            for name, value in self._of_one(hole, fillings).items():
                values.setdefault(name, []).append(value)
        rng = np.random.default_rng(self._seed)
        options = {"replicates": self._replicates, "rng": rng}
        figures = {name: mean_figure(np.array(v), **options) for name, v in values.items()}
        _, originals = self._moments([hole.image for hole in holes])
        rows, filled = self._moments([image for fillings in found for image in fillings])
        name = self._runner.extractor.labels["frechet"]
        figures[name] = frechet_figure(filled, rows, originals, **options)
        return figures

    def _of_one(self, hole: Hole, fillings: Fillings) -> dict[str, float]:
        """The figures of one image: means over its fillings."""
        region = ~hole.mask
        values = {
            "PSNR": np.mean([regions.psnr(image, hole.image, region) for image in fillings]),
            "SSIM": np.mean([regions.ssim(image, hole.image, region) for image in fillings]),
            "spread": regions.spread(fillings, region),
        }
        for name, distance in self._distances.items():
            truth = np.broadcast_to(hole.image, fillings.shape)
            values[name] = distance(fillings, truth).mean()
            pairs = list(itertools.combinations(range(len(fillings)), 2))
            between = 0.0
            if pairs:
                first, second = np.array(pairs).T
                between = distance(fillings[first], fillings[second]).mean()
            values[f"{name} spread"] = between
        return {name: float(value) for name, value in values.items()}

    def _moments(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, Gaussian]:
        """The features of images, and their moments."""
        size = self._runner.batch_size
        starts = range(0, len(images), size)
        rows = [self._runner(np.stack(images[start : start + size]))["pool"] for start in starts]
        moments = Moments()
        moments.update(np.concatenate(rows))
        return np.concatenate(rows), moments.gaussian()


def check(holes: Sequence[Hole]) -> None:
    """Checks that the fillings of these holes can be evaluated.

    Raises:
        UserError: There are fewer than 2 images, a mask fills nothing, or sizes differ.
    """
    if len(holes) < 2:
        raise UserError(f"{len(holes)} images: a Frechet distance needs at least 2")
    for hole in holes:
        if hole.mask.all():
            raise UserError(f"the mask of {hole.name} fills nothing: there is nothing to evaluate")
        if hole.mask.shape != holes[0].mask.shape:
            raise UserError(
                f"{hole.name} and {holes[0].name} differ in size: figures need images of one size"
            )


def table(figures: Table) -> str:
    """The figures as plain text, with a block per metric, a row per model and a column per mask.

    Half the width of the interval follows each value.

    Args:
        figures: Figures by metric, model and mask.
    """
    return "\n\n".join(_block(metric, models) for metric, models in figures.items())


def _block(metric: str, models: Mapping[str, Mapping[str, Figure]]) -> str:
    masks = list(dict.fromkeys(mask for row in models.values() for mask in row))
    rows = [[f"{metric} ({_better(metric)})", *masks]]
    for model, row in models.items():
        rows.append([f"  {model}", *(_cell(row[mask]) if mask in row else "" for mask in masks)])
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        "  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows
    )


def _better(metric: str) -> str:
    if metric.endswith("spread"):
        return "diversity"
    return {"PSNR": "dB, higher is better", "SSIM": "higher is better"}.get(
        metric, "lower is better"
    )


def _cell(figure: Figure) -> str:
    text = f"{figure.value:.4g}"
    return text if figure.low is None else f"{text} ± {(figure.high - figure.low) / 2:.2g}"


def arranged(cells: Mapping[tuple[str, str], Mapping[str, Mapping[str, Any]]]) -> Table:
    """Figures by metric, model and mask.

    Args:
        cells: The `metrics` of a row of results, by model and mask.
    """
    found: dict[str, dict[str, dict[str, Figure]]] = {}
    for (model, mask), metrics in cells.items():
        for metric, figure in metrics.items():
            found.setdefault(metric, {}).setdefault(model, {})[mask] = Figure(**figure)
    return found
