"""The flags that `evaluate` and `evaluate_inpainting` share: LPIPS and the cache of weights."""

import pathlib
from collections.abc import Callable

from absl import flags

from conprediff_jax.cli.choices import LPIPS_NETWORKS
from conprediff_jax.common.errors import UserError

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
    "lpips_network", "vgg16", LPIPS_NETWORKS, "The two LPIPS files hold weights of this trunk."
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
    from conprediff_jax.common.files import check_folder  # an import that --help can do without

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


def load() -> dict[str, Callable]:
    """The LPIPS distance by the name that reports call it; empty where the flags ask for none.

    Raises:
        UserError: A file is missing, unreadable or of another network.
    """
    from conprediff_jax.metrics.networks import lpips  # takes seconds, which --help can do without

    check()
    if not TRUNK.value:
        return {}
    distance = lpips.distance(NETWORK.value, TRUNK.value, HEADS.value, cache=cache_folder())
    return {f"LPIPS ({NETWORK.value})": distance}
