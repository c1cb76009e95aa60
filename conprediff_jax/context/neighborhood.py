"""Neighbourhoods of several strides on grids of any dimension.

The neighbourhood `N_i^s` of point i at stride s is the window of Chebyshev radius s around i,
without i itself and cut off at the border of the grid. It has `(2s+1)^d - 1` neighbours in the
interior and fewer near the border. A window that is cut off is still a box, so a neighbour is
addressed by its rank in that box, and no table of neighbours is stored: only the first index and
the width of the window for every position of every axis.

Draws are stratified: Q draws from K neighbours take one from each of Q equal slices of [0, K).
Every neighbour has the same expected count, as with independent draws, but the sample mean varies
less. With Q = K every neighbour is drawn exactly once; with Q > K neighbours repeat as evenly as
possible.

Source: arXiv 2401.02015, section 3, defines N_i^s; the uniform draws from it are those of NWR-GAE
(arXiv 2202.09025).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped


def neighbor_counts(grid: tuple[int, ...], stride: int) -> np.ndarray:
    """Counts the neighbours of every point of a grid.

    Args:
        grid: The sizes of the d axes.
        stride: The Chebyshev radius of the window, at least 1.

    Returns:
        An int array of shape `grid`, with `(2 stride + 1)^d - 1` away from the border.

    Raises:
        ValueError: The stride is below 1, or the grid has a single point.
    """
    if stride < 1:
        raise ValueError(f"stride {stride} is below 1: it is the radius of the neighbourhood")
    if np.prod(grid) < 2:
        raise ValueError(f"grid {grid} has one point, which has no neighbours")
    widths = [_window(size, stride)[1] for size in grid]
    return functools.reduce(np.multiply.outer, widths) - 1


def draw_points(
    rngs: Key[Array, "batch"], num_points: int, count: int
) -> Int[Array, "batch {count}"]:
    """Draws `count` of `num_points` flat indices for every example, stratified, in rising order.

    The mean over the points that are drawn is an unbiased estimate of the mean over all points.
    """
    return jax.vmap(lambda rng: _stratified(rng, (), num_points, count))(rngs)


def draw_neighbors(
    rngs: Key[Array, "batch"],
    points: Int[Array, "batch points"],
    *,
    grid: tuple[int, ...],
    strides: tuple[int, ...],
    samples: int,
) -> Int[Array, "batch points strides {samples}"]:
    """Draws neighbours of the given points, all of them inside the grid.

    Args:
        rngs: One key for every example.
        points: Flat (row-major) indices into the grid.
        grid: The sizes of the d axes.
        strides: The Chebyshev radii.
        samples: Q, the number of draws for every point and stride. It may exceed the number of
            neighbours.

    Returns:
        Flat indices into the grid. The expected share of every neighbour is 1 / |N_i^s|.
    """
    position = unravel(points, grid)
    drawn = []
    for index, stride in enumerate(strides):
        keys = jax.vmap(lambda rng, i=index: jax.random.fold_in(rng, i))(rngs)
        window = [_window(size, stride) for size in grid]
        start = [jnp.asarray(w[0])[p][..., None] for w, p in zip(window, position, strict=True)]
        width = [jnp.asarray(w[1])[p][..., None] for w, p in zip(window, position, strict=True)]
        offset = [p[..., None] - s for p, s in zip(position, start, strict=True)]
        count = jnp.asarray(neighbor_counts(grid, stride).reshape(-1))[points][..., None]
        rank = jax.vmap(lambda rng, c: _stratified(rng, c.shape[:-1], c, samples))(keys, count)
        centre = _ravel(offset, width)
        rank = rank + (rank >= centre)  # skip the point itself
        inside = unravel(rank, width)
        drawn.append(_ravel([s + i for s, i in zip(start, inside, strict=True)], grid))
    return jnp.stack(drawn, axis=2)


def ordered_neighbors(
    points: Int[Array, "batch points"], *, grid: tuple[int, ...], stride: int
) -> tuple[Int[Array, "batch points neighbors"], Bool[Array, "batch points neighbors"]]:
    """Lists all `(2 stride + 1)^d - 1` neighbours in row-major order.

    Args:
        points: Flat (row-major) indices into the grid.
        grid: The sizes of the d axes.
        stride: The Chebyshev radius.

    Returns:
        Flat indices of the neighbours, and a mask that is False for neighbours outside the grid.
        Their indices are those of the nearest points of the grid.
    """
    span = range(-stride, stride + 1)
    offsets = np.array([o for o in itertools.product(span, repeat=len(grid)) if any(o)], np.int32)
    position = [p[..., None] + o for p, o in zip(unravel(points, grid), offsets.T, strict=True)]
    sizes = list(zip(position, grid, strict=True))
    valid = functools.reduce(jnp.logical_and, [(p >= 0) & (p < size) for p, size in sizes])
    return _ravel([jnp.clip(p, 0, size - 1) for p, size in sizes], grid), valid


def gather_points(
    values: Shaped[Array, "batch grid_points channels"], indices: Int[Array, "batch *points"]
) -> Shaped[Array, "batch *points channels"]:
    """Returns the values at flat indices, separately for every example."""
    return jax.vmap(lambda v, i: v.at[i].get(mode="promise_in_bounds"))(values, indices)


def _window(size: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first index and the width of the window around every position of an axis."""
    position = np.arange(size, dtype=np.int32)
    first = np.maximum(position - stride, 0)
    return first, np.minimum(position + stride, size - 1) - first + 1


def unravel(flat: Int[Array, "*shape"], sizes) -> list[Int[Array, "*shape"]]:
    """Row-major coordinates of flat indices. Unlike in `jnp.unravel_index`, sizes may be arrays."""
    coordinates = []
    for size in reversed(sizes):
        flat, coordinate = flat // size, flat % size
        coordinates.append(coordinate)
    return coordinates[::-1]


def _ravel(coordinates: list, sizes) -> Int[Array, "*shape"]:
    """The inverse of `unravel`."""
    flat = coordinates[0]
    for coordinate, size in zip(coordinates[1:], sizes[1:], strict=True):
        flat = flat * size + coordinate
    return flat


def _stratified(
    rng: Key[Array, ""],
    shape: tuple[int, ...],
    population: int | Int[Array, "*shape 1"],
    count: int,
) -> Int[Array, "*shape {count}"]:
    """Draws `count` indices in [0, population), one from each of `count` equal slices."""
    u: Float[Array, "*shape count"] = jax.random.uniform(rng, (*shape, count))
    position = (jnp.arange(count) + u) * (population / count)
    # The product may round up to the population itself.
    return jnp.minimum(position.astype(jnp.int32), population - 1)
