"""Configs. A config file imports what it needs here: `from conprediff_jax.config import default`.

A config is plain ml_collections data with one section for each object that is built. `sections`
turns sections into objects, `denoising` and `first_stage` hold the sections of each task,
`experiment` builds everything that a config describes, and `presets` holds published models as
whole configs.
"""

from conprediff_jax.config.denoising import (
    default,
    default_discrete,
    default_masked,
    latents,
    palette,
    pixels,
    term,
    text,
    tokens,
)
from conprediff_jax.config.first_stage import default_first_stage
from conprediff_jax.config.sections import section

__all__ = [
    "default",
    "default_discrete",
    "default_first_stage",
    "default_masked",
    "latents",
    "palette",
    "pixels",
    "section",
    "term",
    "text",
    "tokens",
]
