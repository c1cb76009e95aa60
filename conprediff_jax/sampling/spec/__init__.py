"""The `sampling` sections of configs: how images are drawn from each kind of model."""

from conprediff_jax.sampling.spec.base import SAMPLINGS, SamplingSpec
from conprediff_jax.sampling.spec.continuous import (
    ContinuousSampling,
    EDMSampling,
    FlowSampling,
    GaussianSampling,
    RePaintSampling,
)
from conprediff_jax.sampling.spec.tokens import MaskedSampling, TokenSampling

__all__ = [
    "SAMPLINGS",
    "ContinuousSampling",
    "EDMSampling",
    "FlowSampling",
    "GaussianSampling",
    "MaskedSampling",
    "RePaintSampling",
    "SamplingSpec",
    "TokenSampling",
]
