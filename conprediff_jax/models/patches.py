"""Patches of a grid of points as tokens, and fixed position embeddings.

The position embedding of a token has four parts of equal length,

    [sin(column f), cos(column f), sin(row f), cos(row f)],   f_k = 10000^(-k / (width / 4)) (1)

The column comes first, as in the published models of MAE, DiT and their successors.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_PERIOD = 10_000.0


def positions(rows: int, columns: int, width: int) -> Float[Array, "{rows} {columns} {width}"]:
    """Returns equation (1) for every token of a grid.

    Args:
        rows: The number of rows of tokens.
        columns: The number of columns of tokens.
        width: The number of channels of a token, a multiple of 4.
    """
    quarter = width // 4
    frequencies = _PERIOD ** (-np.arange(quarter) / quarter)

    def waves(places: int) -> Float[Array, "{places} half"]:
        angles = np.arange(places)[:, None] * frequencies  # in float64, as published
        return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=-1), jnp.float32)

    halves = (waves(columns), waves(rows)[:, None])
    spread = [jnp.broadcast_to(half, (rows, columns, width // 2)) for half in halves]
    return jnp.concatenate(spread, axis=-1)


def patches_of(
    points: Float[Array, "batch height width channels"], patch: int
) -> Float[Array, "batch tokens patch_channels"]:
    """Gathers patches of points into tokens.

    Args:
        points: The points of a grid, whose sides are multiples of `patch`.
        patch: The side of a patch in points.

    Returns:
        Tokens in reading order. Their channels are (row in patch, column in patch, channel).
    """
    batch, height, width, channels = points.shape
    rows, columns = height // patch, width // patch
    grid = points.reshape(batch, rows, patch, columns, patch, channels).swapaxes(2, 3)
    return grid.reshape(batch, rows * columns, patch * patch * channels)


def points_of(
    tokens: Float[Array, "batch tokens patch_channels"], rows: int, columns: int, patch: int
) -> Float[Array, "batch height width channels"]:
    """The inverse of `patches_of`, for a grid of `rows` x `columns` tokens."""
    batch, _, channels = tokens.shape
    channels //= patch * patch
    grid = tokens.reshape(batch, rows, columns, patch, patch, channels).swapaxes(2, 3)
    return grid.reshape(batch, rows * patch, columns * patch, channels)
