"""Reads data sets and makes batches of them: sources, transforms, and the grain pipeline."""

from conprediff_jax.data.pipeline import (
    DataSpec,
    captions,
    check_batch,
    evaluation_iterator,
    make_iterator,
    num_examples,
    open_data,
)
from conprediff_jax.data.sources import DataError
from conprediff_jax.data.tokenizers import Tokenizer

__all__ = [
    "DataError",
    "DataSpec",
    "Tokenizer",
    "captions",
    "check_batch",
    "evaluation_iterator",
    "make_iterator",
    "num_examples",
    "open_data",
]
