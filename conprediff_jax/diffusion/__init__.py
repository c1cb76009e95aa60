"""Diffusion processes and their samplers, which take functions and arrays and know no network."""

from conprediff_jax.diffusion.categorical import CategoricalProcess
from conprediff_jax.diffusion.gaussian import GaussianProcess
from conprediff_jax.diffusion.process import PROCESSES, Corrupted, Process
from conprediff_jax.diffusion.samplers import (
    DDIM,
    DDPM,
    SAMPLERS,
    CategoricalSampler,
    DPMSolverPP2M,
    Sampler,
)

__all__ = [
    "DDIM",
    "DDPM",
    "PROCESSES",
    "SAMPLERS",
    "CategoricalProcess",
    "CategoricalSampler",
    "Corrupted",
    "DPMSolverPP2M",
    "GaussianProcess",
    "Process",
    "Sampler",
]
