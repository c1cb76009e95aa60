"""Samplers: those of Gaussian processes, which `SAMPLERS` names, and that of categorical ones."""

from conprediff_jax.diffusion.samplers.base import Known, Sampler, Walk, step_noise
from conprediff_jax.diffusion.samplers.categorical import CategoricalSampler
from conprediff_jax.diffusion.samplers.ddim import DDIM
from conprediff_jax.diffusion.samplers.ddpm import DDPM
from conprediff_jax.diffusion.samplers.dpm_solver import DPMSolverPP2M
from conprediff_jax.diffusion.samplers.repaint import RePaint, jump_schedule

SAMPLERS: dict[str, type[Sampler]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "dpm_solver": DPMSolverPP2M,
}

__all__ = [
    "DDIM",
    "DDPM",
    "SAMPLERS",
    "CategoricalSampler",
    "DPMSolverPP2M",
    "Known",
    "RePaint",
    "Sampler",
    "Walk",
    "jump_schedule",
    "step_noise",
]
