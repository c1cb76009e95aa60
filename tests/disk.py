"""A simulated disk without free space."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def little_room(size: int = 10_000) -> Iterator[None]:
    """Lets no file grow beyond `size` bytes, so that writing fails as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
