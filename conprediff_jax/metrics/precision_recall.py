"""Improved precision and recall: how much of each set lies within the manifold of the other.

The manifold of a set is the union of balls about its points, where each ball reaches to the k-th
nearest neighbour of its point in the set. Precision is the share of samples within the manifold of
the reference. Recall is the share of the reference within the manifold of the samples. Source:
Kynkaanniemi et al. 2019 (arXiv 1904.06991), equations 1 to 3, there with k = 3.

Distances are computed on the device in blocks, so that no n x n matrix is needed. Features are
centred first, because a common offset would cost |a|^2 + |b|^2 - 2 a.b its precision.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

BLOCK = 4096  # rows of a block of distances


class Neighbors(NamedTuple):
    """The nearest points of every query, nearest first.

    Attributes:
        distances: Euclidean distances, float32.
        indices: Indices of the points.
    """

    distances: Float[np.ndarray, "queries k"]
    indices: Int[np.ndarray, "queries k"]


class Inside(NamedTuple):
    """Which points lie within the manifold of the other set, for every k.

    Attributes:
        samples: Whether each sample lies within the reference's manifold; precision is the mean.
        reference: Whether each reference image lies within the samples' manifold; recall is the
            mean.
    """

    samples: Bool[np.ndarray, "samples ks"]
    reference: Bool[np.ndarray, "reference ks"]


def precision_recall(
    samples: Shaped[np.ndarray, "samples features"],
    reference: Shaped[np.ndarray, "reference features"],
    *,
    ks: Sequence[int] = (3,),
) -> Inside:
    """Membership in each other's manifold, whose means are precision and recall.

    Args:
        samples: Features of the samples.
        reference: Features of the reference images.
        ks: The values of k; a ball reaches to the k-th nearest neighbour.

    Raises:
        ValueError: A side has no more feature vectors than the largest k.
    """
    samples, reference = _centred(samples, reference)
    radii = [
        nearest(x, x, k=max(ks) + 1).distances[:, np.asarray(ks)] for x in (samples, reference)
    ]
    return Inside(_within(samples, reference, radii[1]), _within(reference, samples, radii[0]))


def nearest(
    queries: Shaped[np.ndarray, "queries features"],
    points: Shaped[np.ndarray, "points features"],
    *,
    k: int,
) -> Neighbors:
    """The k nearest points of every query; a query that is a point finds itself first.

    Raises:
        ValueError: There are fewer than k points.
    """
    if len(points) < k:
        raise ValueError(f"{len(points)} images have no {k} neighbours: more are needed")
    queries, points = _centred(queries, points)
    distances, indices = [], []
    for block in _blocks(queries):
        best = (np.full((len(block), k), np.inf, np.float32), np.zeros((len(block), k), np.int32))
        for start, part in zip(range(0, len(points), BLOCK), _blocks(points), strict=True):
            best = _merge(*best, block, part, min(BLOCK, len(points) - start), start)
        distances.append(np.sqrt(best[0]))
        indices.append(np.asarray(best[1]))
    count = len(queries)
    return Neighbors(np.concatenate(distances)[:count], np.concatenate(indices)[:count])


def _centred(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sets less the mean of the second: distances stay the same, and float32 loses less."""
    centre = second.mean(axis=0, dtype=np.float64).astype(np.float32)
    return tuple(np.subtract(x, centre, dtype=np.float32) for x in (first, second))


def _within(queries: np.ndarray, points: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Whether each query lies in the ball of any point, for every column of radii."""
    inside = []
    # Points of the padding get no ball.
    missing = -len(radii) % _block(points)
    padded = np.pad(radii.astype(np.float32), ((0, missing), (0, 0)), constant_values=-1)
    reaches = padded.reshape(-1, _block(points), radii.shape[1])
    for block in _blocks(queries):
        found = np.zeros((len(block), radii.shape[1]), bool)
        for part, reach in zip(_blocks(points), reaches, strict=True):
            found |= np.asarray(_any_within(block, part, reach))
        inside.append(found)
    return np.concatenate(inside)[: len(queries)]


def _block(x: np.ndarray) -> int:
    """Rows of a block; for small sets a power of two, so that few shapes are compiled."""
    return min(BLOCK, 1 << (len(x) - 1).bit_length())


def _blocks(x: np.ndarray) -> list[np.ndarray]:
    size = _block(x)
    parts = [x[start : start + size].astype(np.float32) for start in range(0, len(x), size)]
    parts[-1] = np.pad(parts[-1], ((0, size - len(parts[-1])), (0, 0)))
    return parts


def _squared(a: jax.Array, b: jax.Array) -> jax.Array:
    product = jnp.matmul(a, b.T, precision="highest")
    return jnp.maximum((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * product, 0)


@jax.jit
def _merge(distances, indices, queries, points, valid, start):
    """The k nearest of those found so far and of a new block, whose first `valid` rows count."""
    new = jnp.where(jnp.arange(len(points)) < valid, _squared(queries, points), jnp.inf)
    numbers = jnp.broadcast_to(start + jnp.arange(len(points)), new.shape)
    both = jnp.concatenate([distances, new], axis=1)
    best, places = jax.lax.top_k(-both, distances.shape[1])
    numbers = jnp.concatenate([indices, numbers], axis=1)
    return -best, jnp.take_along_axis(numbers, places, axis=1)


@jax.jit
def _any_within(queries, points, reach):
    distances = jnp.sqrt(_squared(queries, points))
    return jax.vmap(lambda r: (distances <= r).any(axis=1), in_axes=1, out_axes=1)(reach)
