"""Confidence intervals: how a figure would vary over other samples of the same model.

    [ f + q_a(f* - mean f*),  f + q_(1-a)(f* - mean f*) ]                                       (1)

with f the figure, f* the figure of a replicate, q_a a quantile, and a replicate as many samples
drawn with replacement from the given ones (Efron 1979). The spread is taken about the mean of f*,
and not about f. Figures such as the Frechet distance are biased by the number of different samples,
so repeated samples shift all f* in the same direction.

The reference is not drawn again, so an interval describes the variation of the samples alone. The
exception is recall, which is a share of the reference: there the reference images are drawn again,
and both manifolds stay fixed.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from conprediff_jax.common.progress import ProgressLine
from conprediff_jax.metrics.frechet import Gaussian, Moments, frechet_distance

LEVEL = 0.95
_ROWS = 4096  # features that are read at a time


class Figure(NamedTuple):
    """A figure with its confidence interval.

    Attributes:
        value: The figure of the given samples.
        low: Lower end of the interval; None for no interval.
        high: Upper end of the interval; None for no interval.
    """

    value: float
    low: float | None = None
    high: float | None = None


def interval(value: float, replicates: Float[np.ndarray, "replicates"]) -> Figure:
    """The interval (1) at `LEVEL`, from the figures of the replicates; none without replicates."""
    if not len(replicates):
        return Figure(value)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(replicates - replicates.mean(), [tail, 1 - tail])
    return Figure(value, float(value + low), float(value + high))


def mean_figure(
    values: Shaped[np.ndarray, "samples"], *, replicates: int, rng: np.random.Generator
) -> Figure:
    """The mean over the samples of a value such as a CLIP score or membership in a manifold."""
    means = [values[rows].mean() for rows in _draws(len(values), replicates, rng)]
    return interval(float(np.mean(values)), np.asarray(means, np.float64))


def figure(
    statistic: Callable[[np.ndarray], float],
    rows: Shaped[np.ndarray, "samples *features"],
    *,
    replicates: int,
    rng: np.random.Generator,
) -> Figure:
    """Any statistic of the samples, which are the rows of an array."""
    drawn = [statistic(rows[np.sort(draw)]) for draw in _draws(len(rows), replicates, rng)]
    return interval(statistic(rows), np.asarray(drawn, np.float64))


def frechet_figure(
    samples: Gaussian,
    features: Shaped[np.ndarray, "samples features"] | None,
    reference: Gaussian,
    *,
    replicates: int,
    rng: np.random.Generator,
) -> Figure:
    """The Frechet distance; features may lie on disk, and are read a block at a time.

    Args:
        samples: Moments of the samples.
        features: Features of the samples; None for no interval.
        reference: Moments of the reference.
        replicates: Number of bootstrap replicates.
        rng: Generator that draws the replicates.
    """
    drawn = []
    for draw in _draws(len(features), replicates, rng) if features is not None else ():
        times = np.bincount(draw, minlength=len(features))
        moments = Moments()
        for start in range(0, len(features), _ROWS):
            part = slice(start, start + _ROWS)
            moments.update(features[part], times[part])
        drawn.append(frechet_distance(moments.gaussian(), reference))
    value = frechet_distance(samples, reference)
    return interval(value, np.asarray(drawn, np.float64))


def _draws(count: int, replicates: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """For each replicate, indices drawn with replacement; logs the progress where it takes long."""
    progress = ProgressLine(replicates, "replicates", every=20.0)
    for number in range(replicates):
        if number:  # counts what is done, and never all of it: only long work needs a line
            progress.add(1)
        yield rng.integers(count, size=count)
