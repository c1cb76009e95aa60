"""Named random streams: a draw is a function of (seed, name, step) and its place in the batch.

No key is carried in the train state, so a resumed run draws what the uninterrupted one would have;
and with one key an example, a draw does not depend on how a batch is split over microbatches or
devices.
"""

import zlib

import jax
from jaxtyping import Array, Int, Key


def stream(seed: int | Int[Array, ""], name: str, step: int | Int[Array, ""] = 0) -> Key[Array, ""]:
    """The key of a named stream at a step."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(key, step)


def example_keys(key: Key[Array, ""], indices: Int[Array, "batch"]) -> Key[Array, "batch"]:
    """One key per example, a function of the example's index in the global batch alone."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
