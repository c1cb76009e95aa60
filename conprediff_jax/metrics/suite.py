"""Computes all figures of one set of images against another."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from conprediff_jax.common.errors import UserError, first_line
from conprediff_jax.metrics.bootstrap import Figure, figure, frechet_figure, mean_figure
from conprediff_jax.metrics.features import Extractor, Features
from conprediff_jax.metrics.image_sets import ImageSet
from conprediff_jax.metrics.inception_score import inception_score
from conprediff_jax.metrics.kernel import kernel_distance
from conprediff_jax.metrics.precision_recall import Inside, precision_recall

METRICS = ("frechet", "spatial", "kernel", "score", "precision", "recall")
ENOUGH = 2048  # images; with fewer, the covariance of 2048 features has not full rank
CURVE = (1, 2, 3, 5, 10)  # values of k in the plot of precision and recall
_NEEDS_REFERENCE_ROWS = ("kernel", "precision", "recall")


class Results(NamedTuple):
    """The results of an evaluation.

    Attributes:
        figures: Figures by published name of the metric.
        curve: Recall and precision for every k of `CURVE` that there are images for, for the plot;
            empty where neither metric is computed.
        missing: Why a metric could not be computed, by its published name.
    """

    figures: dict[str, Figure]
    curve: dict[int, tuple[float, float]]
    missing: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """The metrics to compute, and their settings.

    Attributes:
        metrics: Metrics, of `METRICS`.
        replicates: Number of bootstrap replicates for every interval; 0 for no intervals.
        neighbor: The k of precision and recall.
        subsets: Number of subsets of the kernel distance.
        subset_size: Features in a subset.
        splits: Number of splits of the inception score.
        seed: Seed of subsets and replicates.

    Raises:
        ValueError: A metric is unknown, or a number is out of range.
    """

    metrics: Sequence[str] = METRICS
    replicates: int = 100
    neighbor: int = 3
    subsets: int = 100
    subset_size: int = 1000
    splits: int = 10
    seed: int = 0

    def __post_init__(self):
        if any(metric not in METRICS for metric in self.metrics):
            raise ValueError(f"metrics are {list(self.metrics)}: choose from {METRICS}")
        for name in ("neighbor", "subsets", "splits"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.replicates < 0:
            raise ValueError(f"replicates is {self.replicates}: it must not be negative")

    def possible(self, extractor: Extractor, reference: ImageSet) -> "Suite":
        """This suite without the metrics for which the network or the reference lacks features."""
        without = [metric for metric in self.metrics if metric not in extractor.labels]
        if reference.batches is None:
            without += [metric for metric in self.metrics if metric in _NEEDS_REFERENCE_ROWS]
            if "spatial" not in reference.gaussians:
                without.append("spatial")
        return self.without(without)

    def sample_rows(self) -> set[str]:
        """Names of the features of the samples that must be kept."""
        keep = {"pool"} if self._any("kernel", "precision", "recall") else set()
        keep |= {"logits"} if self._any("score") else set()
        if self.replicates:
            keep |= {"pool"} if self._any("frechet") else set()
            keep |= {"spatial"} if self._any("spatial") else set()
        return keep

    def reference_rows(self) -> set[str]:
        """Names of the features of the reference that must be kept."""
        return {"pool"} if self._any(*_NEEDS_REFERENCE_ROWS) else set()

    def check_counts(self, samples: int, reference: int) -> None:
        """Checks that there are enough images for Frechet distances.

        Args:
            samples: Number of samples; 0 where it is unknown.
            reference: Number of reference images; 0 where it is unknown.

        Raises:
            UserError: A side has fewer than `ENOUGH` images.
        """
        for side, count in (("samples", samples), ("reference images", reference)):
            if self._any("frechet", "spatial") and 0 < count < ENOUGH:
                raise UserError(
                    f"{count} {side}: a Frechet distance of fewer than {ENOUGH} is badly biased; "
                    "give more"
                )

    def lacking(self, samples: int, reference: int) -> dict[str, str]:
        """The metrics that a side has too few images for, each with the reason.

        Args:
            samples: Number of samples; 0 where it is unknown.
            reference: Number of reference images; 0 where it is unknown.
        """
        neighbors = self.neighbor + 1
        least = {"score": self.splits, "precision": neighbors, "recall": neighbors}
        found = {}
        for metric in self.metrics:
            sides = {"samples": samples, "reference images": reference}
            if metric == "score":
                del sides["reference images"]
            for side, count in sides.items():
                if 0 < count < least.get(metric, 2):
                    needs = f"{count} {side}: {metric} needs at least {least.get(metric, 2)}"
                    found.setdefault(metric, needs)
        return found

    def without(self, metrics: Collection[str]) -> "Suite":
        """This suite without some metrics; it may be left with none."""
        left = [metric for metric in self.metrics if metric not in metrics]
        return dataclasses.replace(self, metrics=left)

    def compute(self, samples: Features, reference: Features, labels: Mapping[str, str]) -> Results:
        """Computes all figures that can be computed.

        Args:
            samples: Features of the samples, with those of `sample_rows` kept.
            reference: Features of the reference, with those of `reference_rows` kept.
            labels: Published names of the metrics.
        """
        missing = self.lacking(samples.count, reference.count)  # without undecodable images
        possible, inside, curve = self.without(missing), None, {}
        missing = {labels[metric]: reason for metric, reason in missing.items()}
        ks = self._curve(min(samples.count, reference.count))
        if possible._any("precision", "recall"):
            inside = precision_recall(samples.rows["pool"], reference.rows["pool"], ks=ks)
            means = inside.reference.mean(axis=0), inside.samples.mean(axis=0)
            curve = {k: (float(r), float(p)) for k, r, p in zip(ks, *means, strict=True)}
        figures = {}
        for metric in possible.metrics:
            logging.info("computing %s", labels[metric])
            column = ks.index(self.neighbor) if inside else 0
            try:
                figures[labels[metric]] = self._figure(metric, samples, reference, inside, column)
            except ValueError as error:
                missing[labels[metric]] = first_line(error)
        return Results(figures, curve, missing)

    def _curve(self, count: int) -> list[int]:
        """The values of k in the plot, of which sets of `count` images have neighbours."""
        return sorted({k for k in CURVE if k < count} | {self.neighbor})

    def _figure(
        self,
        metric: str,
        samples: Features,
        reference: Features,
        inside: Inside | None,
        column: int,
    ) -> Figure:
        rng = np.random.default_rng((self.seed, METRICS.index(metric)))
        options = {"replicates": self.replicates, "rng": rng}
        if metric in ("frechet", "spatial"):
            name = {"frechet": "pool", "spatial": "spatial"}[metric]
            gaussians = samples.gaussians[name], reference.gaussians[name]
            rows = samples.rows[name] if self.replicates else None
            return frechet_figure(gaussians[0], rows, gaussians[1], **options)
        if metric == "kernel":
            value, influence = kernel_distance(
                samples.rows["pool"],
                reference.rows["pool"],
                subsets=self.subsets,
                size=self.subset_size,
                rng=rng,
            )
            # To first order, the distance is the mean of value + influence over the samples.
            return mean_figure(value + influence, **options)
        if metric == "score":
            logits = samples.rows["logits"]
            logits = logits[rng.permutation(len(logits))]  # samples may take their classes in turn
            return figure(lambda rows: inception_score(rows, splits=self.splits), logits, **options)
        rows = inside.samples if metric == "precision" else inside.reference
        return mean_figure(rows[:, column], **options)

    def _any(self, *metrics: str) -> bool:
        return any(metric in self.metrics for metric in metrics)
