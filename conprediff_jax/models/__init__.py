"""Flax modules: denoisers, first-stage autoencoders and text encoders.

`DENOISERS` and `FIRST_STAGES` name them; importing this package registers those that it has.
"""

from conprediff_jax.models import dit, transformer, unet  # noqa: F401  (they register themselves)
from conprediff_jax.models.denoiser import DENOISERS, Denoised, Denoiser
from conprediff_jax.models.first_stage import FIRST_STAGES, FirstStage

__all__ = ["DENOISERS", "FIRST_STAGES", "Denoised", "Denoiser", "FirstStage"]
