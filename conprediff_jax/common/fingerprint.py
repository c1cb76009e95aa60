"""Short names for content: equal content has equal names, and other content has other names."""

import hashlib
import os
from collections.abc import Iterable


def fingerprint(parts: Iterable[bytes]) -> str:
    """A short name for some content."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def file_fingerprint(path: str | os.PathLike) -> str:
    """A short name for the content of a file."""
    with open(path, "rb") as file:
        return fingerprint(iter(lambda: file.read(1 << 22), b""))
