"""Images in, batches out: sources, transforms, and the grain pipeline."""

from conprediff_jax.data.pipeline import (
    DataSpec,
    check_batch,
    evaluation_iterator,
    make_iterator,
    num_examples,
    open_data,
)
from conprediff_jax.data.sources import DataError

__all__ = [
    "DataError",
    "DataSpec",
    "check_batch",
    "evaluation_iterator",
    "make_iterator",
    "num_examples",
    "open_data",
]
