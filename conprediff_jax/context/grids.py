"""Features on a coarser grid than that of the points, and windows of features around points.

Both grids have the same axes, and a cell of the coarse grid covers a box of points.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, Int

from conprediff_jax.context.neighborhood import gather_points, unravel

Grid = tuple[int, ...]


def box(cells: Grid, grid: Grid) -> Grid:
    """Returns the number of points of a cell along every axis.

    Args:
        cells: The sizes of the axes of the coarse grid.
        grid: The sizes of the axes of the grid of points.

    Raises:
        ValueError: The cells do not divide the grid.
    """
    if len(cells) != len(grid) or any(size % cell for size, cell in zip(grid, cells, strict=True)):
        raise ValueError(
            f"h lies on a grid of {cells}, and the points on one of {grid}: the first must be the "
            "same as the second, or divide it"
        )
    return tuple(size // cell for size, cell in zip(grid, cells, strict=True))


def pooled(
    x: Float[Array, "batch *grid channels"], cells: Grid
) -> Float[Array, "batch *cells channels"]:
    """Returns the means of points over the cells of a coarser grid."""
    axes, sizes = _axes(box(cells, x.shape[1:-1]))
    outer = " ".join(f"c{axis}" for axis in axes)
    inner = " ".join(f"(c{axis} b{axis})" for axis in axes)
    return reduce(x, f"n {inner} f -> n {outer} f", "mean", **sizes)


def spread(
    h: Float[Array, "batch *cells features"], grid: Grid
) -> Float[Array, "batch *grid some_features"]:
    """Divides the channels of every cell among its points, in row-major order of the points.

    Raises:
        ValueError: The number of points of a cell does not divide the number of channels.
    """
    within = box(h.shape[1:-1], grid)
    if h.shape[-1] % np.prod(within):
        raise ValueError(
            f"h has {h.shape[-1]} channels: the {np.prod(within)} points of a cell cannot share "
            "them equally; choose another coarse_tap than 'spread'"
        )
    axes, sizes = _axes(within)
    outer = " ".join(f"c{axis}" for axis in axes)
    inner = " ".join(f"b{axis}" for axis in axes)
    both = " ".join(f"(c{axis} b{axis})" for axis in axes)
    return rearrange(h, f"n {outer} ({inner} f) -> n {both} f", **sizes)


def bring_up(
    values: Float[Array, "batch cells *channels"],
    points: Int[Array, "batch points"],
    *,
    cells: Grid,
    grid: Grid,
) -> Float[Array, "batch points *channels"]:
    """Interpolates values of cells linearly at the centres of points.

    Args:
        values: The values of all cells, in row-major order. They hold at the centres of the cells,
            and outside of all centres the nearest one counts.
        points: Flat indices of points.
        cells: The sizes of the axes of the coarse grid.
        grid: The sizes of the axes of the grid of points.
    """
    axes = zip(unravel(points, grid), cells, grid, strict=True)
    places = [(place + 0.5) * (cell / size) - 0.5 for place, cell, size in axes]

    def read(image: Array, places: list[Array]) -> Array:
        return map_coordinates(image.reshape(cells), places, order=1, mode="nearest")

    flat = values.reshape(*values.shape[:2], -1)
    over_channels = jax.vmap(read, in_axes=(-1, None), out_axes=-1)
    found = jax.vmap(over_channels)(flat, places).astype(values.dtype)
    return found.reshape(*points.shape, *values.shape[2:])


def windows(
    h: Float[Array, "batch cells features"],
    points: Int[Array, "batch points"],
    *,
    grid: Grid,
    side: int,
) -> Float[Array, "batch points window features"]:
    """Gathers the window of cells around every point, row-major, with zeros outside the grid.

    A dense layer of the whole window is a convolution that is computed at these points alone.

    Args:
        h: The features of all cells of the grid, in row-major order.
        points: Flat indices into the grid.
        grid: The sizes of its axes.
        side: The side of the window, an odd number.
    """
    reach = range(-(side // 2), side // 2 + 1)
    places = unravel(points, grid)
    columns = []
    for offsets in itertools.product(reach, repeat=len(grid)):
        moved = [place + offset for place, offset in zip(places, offsets, strict=True)]
        inside = jnp.ones_like(points, bool)
        flat = jnp.zeros_like(points)
        for place, size in zip(moved, grid, strict=True):
            inside &= (place >= 0) & (place < size)
            flat = flat * size + jnp.clip(place, 0, size - 1)
        columns.append(jnp.where(inside[..., None], gather_points(h, flat), 0))
    return jnp.stack(columns, axis=2)


def _axes(within: Grid) -> tuple[range, dict[str, int]]:
    """The numbers of the axes, and the sizes of a cell along them under their names for einops."""
    axes = range(len(within))
    return axes, {f"b{axis}": size for axis, size in zip(axes, within, strict=True)}
