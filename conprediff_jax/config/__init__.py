"""Configs: what a config file needs, `from conprediff_jax.config import default`.

A config is plain ml_collections data, one section for each thing that is built; `sections` has the
sections, `experiment` makes objects of them, and `presets` has published models as whole configs.
"""

from conprediff_jax.config.sections import (
    default,
    default_discrete,
    default_first_stage,
    latents,
    pixels,
    section,
    text,
    tokens,
)

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
