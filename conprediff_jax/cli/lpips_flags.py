"""The flags that `evaluate` and `evaluate_inpainting` share: LPIPS and the cache of weights."""

import pathlib
from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from jaxtyping import Float, UInt8

from conprediff_jax.common.errors import UserError
from conprediff_jax.common.files import check_folder
from conprediff_jax.metrics.networks import lpips

Images = UInt8[np.ndarray, "batch height width 3"]
Distance = Callable[[Images, Images], Float[np.ndarray, "batch"]]

TRUNK = flags.DEFINE_string(
    "lpips_trunk",
    None,
    "Compute LPIPS with the trunk in this file, torchvision's weights of --lpips_network; without "
    "it, LPIPS is left out.",
)
HEADS = flags.DEFINE_string(
    "lpips_heads",
    None,
    "Read the learned heads of LPIPS from this file of the lpips package; it goes with "
    "--lpips_trunk.",
)
NETWORK = flags.DEFINE_enum(
    "lpips_network", "vgg16", list(lpips.TRUNKS), "The two LPIPS files hold weights of this trunk."
)
_CACHE = flags.DEFINE_string(
    "cache",
    "~/.cache/conprediff_jax/metrics",
    "Keep converted weights, and features of references, in this folder.",
)


def cache_folder() -> pathlib.Path:
    """The folder that `--cache` names.

    Raises:
        UserError: The folder cannot be written to.
    """
    cache = pathlib.Path(_CACHE.value).expanduser()
    check_folder(cache, "--cache")
    return cache


def check() -> None:
    """Checks that both LPIPS files are given, or neither.

    Raises:
        UserError: Only one of the files is given.
    """
    if (TRUNK.value is None) != (HEADS.value is None):
        raise UserError("LPIPS needs both --lpips_trunk and --lpips_heads")


def load() -> dict[str, Distance]:
    """The LPIPS distance by the name that reports call it; empty where the flags ask for none.

    Raises:
        UserError: A file is missing, unreadable or of another network.
    """
    check()
    if not TRUNK.value:
        return {}
    model = lpips.LPIPS(network=NETWORK.value)
    params = lpips.load(model, TRUNK.value, HEADS.value, cache=cache_folder())
    params = jax.device_put(params)

    @jax.jit
    def distance(x, y):
        return model.apply({"params": params}, x / 127.5 - 1, y / 127.5 - 1)

    return {f"LPIPS ({NETWORK.value})": lambda x, y: np.asarray(distance(x, y))}
