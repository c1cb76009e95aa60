"""Shipped configs by their names."""

import importlib.util
import pathlib

from ml_collections import ConfigDict

from conprediff_jax.common.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent.parent


def path_of(name: str) -> pathlib.Path:
    """The file of a config.

    Raises:
        UserError: There is no such file.
    """
    path = ROOT / "configs" / f"{name}.py"
    if not path.is_file():
        raise UserError(f"--configs={name}: there is no {path.relative_to(ROOT)}")
    return path


def config(name: str, chips: int = 1) -> ConfigDict:
    """A config, with its own batch size or the next larger one that the chips can divide.

    Raises:
        UserError: There is no such config.
    """
    spec = importlib.util.spec_from_file_location(name, path_of(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.get_config().unlock()
    found.train.batch_size = -(-found.train.batch_size // chips) * chips
    return found.lock()
