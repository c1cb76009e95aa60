"""Multi-stride neighbourhoods on grids of any dimension.

The neighbourhood `N_i^s` of point i at stride s is the window of Chebyshev radius s around i,
without i itself, cut at the border of the grid: `(2s+1)^d - 1` neighbours inside, fewer at the
border. A border point's window is still a box, so a neighbour is addressed by its rank in that box
and no table of neighbours is ever stored: the constants are two numbers an axis position.

Draws are stratified: Q samples of K neighbours take one from each of Q equal slices of [0, K).
Every neighbour is expected equally often, as with independent draws, but Q = K takes each exactly
once and the sample mean varies less. Q > K is legal: neighbours then repeat as evenly as they can.

Source: arXiv 2401.02015, section 3 (N_i^s); uniform draws from it: NWR-GAE, arXiv 2202.09025.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped


def neighbor_counts(grid: tuple[int, ...], stride: int) -> np.ndarray:
    """Number of neighbours of every point inside the grid.

    Args:
      grid: sizes of the d axes.
      stride: Chebyshev radius of the window, at least 1.

    Returns:
      int array of shape `grid`; `(2 stride + 1)^d - 1` away from the border.

    Raises:
      ValueError: the stride is below 1, or a grid of one point has no neighbours.
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
    """Draws `count` of `num_points` flat point indices per example, stratified, in rising order.

    A mean over the drawn points is an unbiased estimate of the mean over all of them.
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
    """Draws neighbours of the given points, all inside the grid.

    Args:
      rngs: one key per example.
      points: flat (row-major) indices into the grid.
      grid: sizes of the d axes.
      strides: Chebyshev radii.
      samples: Q, the number of neighbours that stand for the distribution; may exceed the number of
        neighbours.

    Returns:
      Flat indices into the grid; an expected share of 1 / |N_i^s| for each neighbour.
    """
    position = _unravel(points, grid)
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
        rank = rank + (rank >= centre)  # step over the point itself
        inside = _unravel(rank, width)
        drawn.append(_ravel([s + i for s, i in zip(start, inside, strict=True)], grid))
    return jnp.stack(drawn, axis=2)


def ordered_neighbors(
    points: Int[Array, "batch points"], *, grid: tuple[int, ...], stride: int
) -> tuple[Int[Array, "batch points neighbors"], Bool[Array, "batch points neighbors"]]:
    """All `(2 stride + 1)^d - 1` neighbours in row-major order, and which of them are in the grid.

    Indices of neighbours outside the grid are moved to its border; the mask is False there.
    """
    span = range(-stride, stride + 1)
    offsets = np.array([o for o in itertools.product(span, repeat=len(grid)) if any(o)], np.int32)
    position = [p[..., None] + o for p, o in zip(_unravel(points, grid), offsets.T, strict=True)]
    sizes = list(zip(position, grid, strict=True))
    valid = functools.reduce(jnp.logical_and, [(p >= 0) & (p < size) for p, size in sizes])
    return _ravel([jnp.clip(p, 0, size - 1) for p, size in sizes], grid), valid


def gather_points(
    values: Shaped[Array, "batch grid_points channels"], indices: Int[Array, "batch *points"]
) -> Shaped[Array, "batch *points channels"]:
    """Values at flat indices, example by example."""
    return jax.vmap(lambda v, i: v.at[i].get(mode="promise_in_bounds"))(values, indices)


def _window(size: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """First index and width of the window around every position of one axis."""
    position = np.arange(size, dtype=np.int32)
    first = np.maximum(position - stride, 0)
    return first, np.minimum(position + stride, size - 1) - first + 1


def _unravel(flat: Int[Array, "*shape"], sizes) -> list[Int[Array, "*shape"]]:
    """Row-major coordinates of flat indices; unlike `jnp.unravel_index`, sizes may be arrays."""
    coordinates = []
    for size in reversed(sizes):
        flat, coordinate = flat // size, flat % size
        coordinates.append(coordinate)
    return coordinates[::-1]


def _ravel(coordinates: list, sizes) -> Int[Array, "*shape"]:
    """Inverse of `_unravel`."""
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
    """`count` indices below `population`, one from each of `count` equal slices of it."""
    u: Float[Array, "*shape count"] = jax.random.uniform(rng, (*shape, count))
    position = (jnp.arange(count) + u) * (population / count)
    # The product may round up to the population itself.
    return jnp.minimum(position.astype(jnp.int32), population - 1)
