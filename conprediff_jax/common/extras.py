"""Libraries that only a part of the package needs, and that its extras install."""

import importlib
import importlib.util
import types

from conprediff_jax.common.errors import UserError


def need(module: str, extra: str) -> None:
    """Checks, before anything is computed, that a library of one of the extras is installed.

    Args:
        module: The name of the library's module.
        extra: The extra of this package that installs it.

    Raises:
        UserError: The library is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(f'this needs {module}, which is not installed: pip install -e ".[{extra}]"')


def pyplot() -> types.ModuleType:
    """Matplotlib's pyplot, which draws to files alone.

    Raises:
        UserError: Matplotlib is not installed.
    """
    need("matplotlib", "plan")
    importlib.import_module("matplotlib").use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def tensorflow_datasets() -> types.ModuleType:
    """TFDS, which is imported where it is used, since this takes seconds.

    Raises:
        UserError: TFDS or TensorFlow is not installed.
    """
    for module in ("tensorflow_datasets", "tensorflow"):
        need(module, "tfds")
    return importlib.import_module("tensorflow_datasets")


def apache_beam() -> types.ModuleType:
    """Apache Beam, which is imported where it is used, since this takes a second.

    Raises:
        UserError: It is not installed.
    """
    need("apache_beam", "beam")
    return importlib.import_module("apache_beam")
