"""A simulated disk without free space."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def little_room(size: int = 10_000) -> Iterator[None]:
    """No file may grow beyond `size` bytes, which fails as a full disk does."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
