"""Confidence intervals: how a figure would vary over other samples of the same model.

    [ f + q_a(f* - mean f*),  f + q_(1-a)(f* - mean f*) ]                                       (1)

with f* the figure of samples drawn again, with replacement, from those there are (Efron 1979). The
spread is taken about the mean of the f*, and not about f: repeated samples shift figures such as
the Frechet distance, which are biased in the number of different samples, all in one direction.
The reference is not drawn again: an interval is one for the samples alone. That of recall, a share
of the reference, is the exception: there the reference images are drawn, both manifolds given.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from conprediff_jax.common.progress import ProgressLine
from conprediff_jax.metrics.frechet import Gaussian, Moments, frechet_distance

LEVEL = 0.95
_ROWS = 4096  # features read at a time


class Figure(NamedTuple):
    """A figure with its confidence interval.

    Attributes:
        value: of the samples as they are.
        low: lower end; None where no interval was asked for.
        high: upper end.
    """

    value: float
    low: float | None = None
    high: float | None = None


def interval(value: float, replicates: Float[np.ndarray, "replicates"]) -> Figure:
    """Equation (1), at `LEVEL`; no interval without replicates."""
    if not len(replicates):
        return Figure(value)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(replicates - replicates.mean(), [tail, 1 - tail])
    return Figure(value, float(value + low), float(value + high))


def mean_figure(
    values: Shaped[np.ndarray, "samples"], *, replicates: int, rng: np.random.Generator
) -> Figure:
    """The mean of a value for every sample, such as a CLIP score or membership in a manifold."""
    means = [values[rows].mean() for rows in _draws(len(values), replicates, rng)]
    return interval(float(np.mean(values)), np.asarray(means, np.float64))


def figure(
    statistic: Callable[[np.ndarray], float],
    rows: Shaped[np.ndarray, "samples *features"],
    *,
    replicates: int,
    rng: np.random.Generator,
) -> Figure:
    """Any statistic of the samples' rows."""
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
    """The Frechet distance; the features, which may lie on disk, are read a block at a time.

    Args:
        samples: moments of the samples.
        features: what they are the moments of; None for no interval.
        reference: moments of the reference.
        replicates: how many times the samples are drawn again.
        rng: draws.
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
    """Indices drawn with replacement; says how far it is where that takes long."""
    progress = ProgressLine(replicates, "replicates", every=20)
    for number in range(replicates):
        if number:  # counts what is done, and never all of it: only long work needs a line
            progress.add(1)
        yield rng.integers(count, size=count)
