"""Samplers: those of processes with additive noise, in `SAMPLERS`, and those of tokens."""

from conprediff_jax.diffusion.samplers.base import Known, Sampler, Walk, step_noise
from conprediff_jax.diffusion.samplers.categorical import CategoricalSampler
from conprediff_jax.diffusion.samplers.ddim import DDIM
from conprediff_jax.diffusion.samplers.ddpm import DDPM
from conprediff_jax.diffusion.samplers.dpm_solver import DPMSolverPP2M
from conprediff_jax.diffusion.samplers.euler import Euler
from conprediff_jax.diffusion.samplers.heun import Heun
from conprediff_jax.diffusion.samplers.masked import MaskedSampler
from conprediff_jax.diffusion.samplers.repaint import RePaint, jump_schedule
from conprediff_jax.diffusion.samplers.sde import SDE

# The samplers for all processes with additive noise, and all samplers.
GENERAL_SAMPLERS: dict[str, type[Sampler]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "dpm_solver": DPMSolverPP2M,
}
SAMPLERS: dict[str, type[Sampler]] = GENERAL_SAMPLERS | {
    "euler": Euler,
    "heun": Heun,
    "sde": SDE,
}

__all__ = [
    "DDIM",
    "DDPM",
    "GENERAL_SAMPLERS",
    "SAMPLERS",
    "SDE",
    "CategoricalSampler",
    "DPMSolverPP2M",
    "Euler",
    "Heun",
    "Known",
    "MaskedSampler",
    "RePaint",
    "Sampler",
    "Walk",
    "jump_schedule",
    "step_noise",
]
