"""Named random streams: a draw is a function of (seed, name, step) and its place in the batch.

No key is carried in the train state, so a resumed run draws what the uninterrupted one would have;
and with one key an example, a draw does not depend on how a batch is split over microbatches or
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
    """A seed as compiled programs take it: half of the seeds do not fit JAX's own int32.

    Raises:
        FieldError: it is no whole number from 0 to 2^32 - 1.
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
    """One key per example, a function of the example's index in the global batch alone."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
