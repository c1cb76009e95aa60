"""Kernel distance: the squared maximum mean discrepancy under a cubic kernel.

    k(x, y) = (x . y / d + 1)^3
    D = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)       (1)

averaged over random subsets of both sides. The estimate is unbiased, so it may be below 0. Source:
Binkowski et al. 2018 (arXiv 1801.01401), section 4. On Inception features, it is the KID.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped


class KernelDistance(NamedTuple):
    """The distance (1), and the influence of each sample on it.

    Attributes:
        value: Mean of (1) over the subsets.
        influence: First-order contribution of every sample, with mean 0: if one of n samples, i,
            counts twice, (1) changes by about `influence[i] / n`.
    """

    value: float
    influence: Float[np.ndarray, "samples"]


def kernel_distance(
    samples: Shaped[np.ndarray, "samples features"],
    reference: Shaped[np.ndarray, "reference features"],
    *,
    subsets: int = 100,
    size: int = 1000,
    rng: np.random.Generator,
) -> KernelDistance:
    """The distance (1) between two sets of features, in float64.

    Args:
        samples: Features of the samples.
        reference: Features of the reference images.
        subsets: Number of subsets; one is drawn where a subset holds all of both sides.
        size: Features in a subset; reduced to the number of features of the smaller side.
        rng: Generator that draws the subsets, without replacement.

    Raises:
        ValueError: A side has fewer than two feature vectors.
    """
    size = min(size, len(samples), len(reference))
    if size < 2:
        raise ValueError("a kernel distance needs at least 2 images on either side")
    if size == len(samples) == len(reference):
        subsets = 1
    values = []
    witness, times = np.zeros(len(samples)), np.zeros(len(samples))
    for _ in range(subsets):
        rows = np.sort(rng.choice(len(samples), size, replace=False))
        others = np.sort(rng.choice(len(reference), size, replace=False))
        x, y = samples[rows].astype(np.float64), reference[others].astype(np.float64)
        within = _mean_to_others(_kernel(x, x))
        across = _kernel(x, y).mean(axis=1)
        values.append(within.mean() + _mean_to_others(_kernel(y, y)).mean() - 2 * across.mean())
        witness[rows] += 2 * (within - within.mean() - across + across.mean())
        times[rows] += 1
    influence = witness / np.maximum(times, 1)
    return KernelDistance(float(np.mean(values)), influence)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_to_others(kernel: np.ndarray) -> np.ndarray:
    """Mean of each row without the diagonal."""
    return (kernel.sum(axis=1) - np.diagonal(kernel)) / (len(kernel) - 1)
