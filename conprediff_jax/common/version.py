"""The version of the code: of the package, of its source in a git clone, and of JAX."""

import functools
import pathlib
import shlex
import subprocess
from importlib import metadata

_ROOT = pathlib.Path(__file__).parents[2]


def package_version() -> str:
    """The version of the installed package."""
    try:
        return metadata.version("conprediff_jax")
    except metadata.PackageNotFoundError:  # run from a folder of its source
        return "(not installed)"


@functools.cache
def code_version() -> str:
    """The versions of the package and of JAX, with the commit where this is a git clone.

    Returns:
        For example '0.1.0, commit 1a2b3c4d5e6f, jax 0.7.2'; '-dirty' follows a commit whose files
        have changed since.
    """
    commit = _commit() if (_ROOT / ".git").exists() else ""
    of_jax = f"jax {metadata.version('jax')}"
    return ", ".join(filter(None, [package_version(), commit and f"commit {commit}", of_jax]))


def _commit() -> str:
    """The commit of the clone; '' where git is missing, refuses, or takes more than 5 seconds."""
    line = f"git -C {shlex.quote(str(_ROOT))} describe --always --dirty --exclude=* --abbrev=12"
    try:
        found = subprocess.run(shlex.split(line), capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
