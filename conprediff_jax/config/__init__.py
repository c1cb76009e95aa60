"""Configs: what a config file needs, `from conprediff_jax.config import default`.

A config is plain ml_collections data, one section for each thing that is built. `sections` says how
sections are made into objects, `denoising` and `first_stage` have the sections of each task,
`experiment` makes everything that a config describes, and `presets` has published models as whole
configs.
"""

from conprediff_jax.config.denoising import (
    default,
    default_discrete,
    latents,
    pixels,
    text,
    tokens,
)
from conprediff_jax.config.first_stage import default_first_stage
from conprediff_jax.config.sections import section

__all__ = [
    "default",
    "default_discrete",
    "default_first_stage",
    "latents",
    "pixels",
    "section",
    "text",
    "tokens",
]
