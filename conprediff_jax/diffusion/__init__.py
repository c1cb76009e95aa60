"""Diffusion processes and their samplers, which take functions and arrays and know no network."""

from conprediff_jax.diffusion.categorical import CategoricalProcess
from conprediff_jax.diffusion.edm import EDMProcess
from conprediff_jax.diffusion.flow import FlowProcess
from conprediff_jax.diffusion.gaussian import GaussianProcess
from conprediff_jax.diffusion.masked import MaskedProcess
from conprediff_jax.diffusion.process import PROCESSES, Corrupted, Process
from conprediff_jax.diffusion.samplers import (
    DDIM,
    DDPM,
    SAMPLERS,
    CategoricalSampler,
    DPMSolverPP2M,
    MaskedSampler,
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
    "EDMProcess",
    "FlowProcess",
    "GaussianProcess",
    "MaskedProcess",
    "MaskedSampler",
    "Process",
    "Sampler",
]
