"""Named random streams: a draw is a function of (seed, name, step) and its place in the batch.

The train state holds no key, so a resumed run draws the same numbers as an uninterrupted one. With
one key for every example, a draw does not depend on how a batch is split over microbatches or
devices.
"""

import zlib
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Integer, Key

from conprediff_jax.common.fields import as_kind

SEEDS = range(2**32)


def as_seed(seed: Any) -> np.uint32:
    """A seed as the uint32 that compiled programs take; half of the seeds do not fit int32.

    Raises:
        FieldError: The seed is not a whole number from 0 to 2^32 - 1.
    """
    return np.uint32(as_kind("seed", seed, SEEDS))


def stream(
    seed: int | np.uint32 | Integer[Array, ""], name: str, step: int | Int[Array, ""] = 0
) -> Key[Array, ""]:
    """The key of a named stream at a step."""
    seed = seed if isinstance(seed, jax.Array) else as_seed(seed)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(key, step)


def example_keys(key: Key[Array, ""], indices: Int[Array, "batch"]) -> Key[Array, "batch"]:
    """One key for every example, which depends only on its index in the global batch."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
