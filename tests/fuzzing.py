"""Random inputs for the readers of users' files: images, masks, texts, checkpoints and flags.

The test suite runs every test on a few inputs. `FUZZ_INPUTS=5000 pytest tests/test_fuzz_*.py` runs
many.
"""

import os
from collections.abc import Callable

import numpy as np


def fuzz(check: Callable[[np.random.Generator], None], few: int = 40) -> None:
    """Calls `check` with a generator for each input; a failure names the input, to be repeated.

    `check` makes an input, gives it to a reader, and asserts that the outcome is right: either the
    value that was written, or one of the errors that commands print as one line.
    """
    first = int(os.environ.get("FUZZ_FIRST", 0))
    for number in range(first, first + int(os.environ.get("FUZZ_INPUTS", few))):
        try:
            check(np.random.default_rng(number))
        except BaseException as error:
            raise AssertionError(f"input {number} (FUZZ_FIRST={number} FUZZ_INPUTS=1)") from error
