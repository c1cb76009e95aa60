"""Flax modules: denoisers, first-stage autoencoders and text encoders.

The registries `DENOISERS` and `FIRST_STAGES` list them by name. Importing this folder registers all
that it contains.
"""

from conprediff_jax.models import dit, transformer, unet  # noqa: F401  (they register themselves)
from conprediff_jax.models.denoiser import DENOISERS, Denoised, Denoiser
from conprediff_jax.models.first_stage import FIRST_STAGES, FirstStage

__all__ = ["DENOISERS", "FIRST_STAGES", "Denoised", "Denoiser", "FirstStage"]
