"""Colours for tokens, so that a grid of tokens can be stored and shown as an image."""

import colorsys

import numpy as np
from jaxtyping import UInt8

from conprediff_jax.common.errors import FieldError

MOST = 256


def palette(count: int) -> UInt8[np.ndarray, "count 3"]:
    """Different colours of full saturation, with hues at equal steps from red.

    Args:
        count: Number of colours, from 2 to `MOST`.

    Raises:
        FieldError: `count` is out of its range.
    """
    if not 2 <= count <= MOST:
        raise FieldError("num_codes", f"is {count}: it must lie in 2 .. {MOST}")
    hues = [colorsys.hsv_to_rgb(index / count, 1.0, 1.0) for index in range(count)]
    return np.rint(255 * np.array(hues)).astype(np.uint8)
