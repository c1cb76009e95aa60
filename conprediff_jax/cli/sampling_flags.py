"""The flags that override a model's `sampling` section, shared by the commands that sample."""

from typing import Any

from absl import flags

from conprediff_jax.common.fields import parse
from conprediff_jax.diffusion.samplers import SAMPLERS
from conprediff_jax.diffusion.samplers.categorical import REVEALS

_SAMPLER = flags.DEFINE_enum("sampler", None, list(SAMPLERS), "Sampler of continuous models.")
_STEPS = flags.DEFINE_integer("steps", None, "Sampling steps.")
_GUIDANCE = flags.DEFINE_float("guidance", None, "Scale of classifier-free guidance; 1 for none.")
_RESCALE = flags.DEFINE_float(
    "guidance_rescale", None, "Share of the contrast taken back after guidance, 0 to 1."
)
_INTERVAL = flags.DEFINE_list(
    "guidance_interval", None, "Shares of the times with guidance: 0.2,0.8; 0 is the least noise."
)
_ETA = flags.DEFINE_float("eta", None, "Noise of DDIM, 0 to 1.")
_TRUNCATION = flags.DEFINE_float("truncation", None, "Share of a token's mass that is kept.")
_REVEAL = flags.DEFINE_enum(
    "reveal", None, list(REVEALS), "How tokens come out: see diffusion/samplers/categorical.py."
)
_TOKENS = flags.DEFINE_integer("tokens_per_call", None, "At most so many tokens a call; 0: all.")
_PURITY = flags.DEFINE_float("purity_weight", None, "Sharper draws of purer tokens.")
_TEMPERATURE = flags.DEFINE_float("purity_temperature", None, "0: the purest tokens first.")


def values() -> dict[str, Any]:
    """Their values by field of the sampling section; None where the config's is to be taken."""
    continuous = (_SAMPLER, _ETA, _RESCALE)
    discrete = (_TRUNCATION, _REVEAL, _TOKENS, _PURITY, _TEMPERATURE)
    given = (_STEPS, _GUIDANCE, *continuous, *discrete)
    return {flag.name: flag.value for flag in given} | {_INTERVAL.name: _interval()}


def _interval() -> tuple[float, ...] | None:
    if _INTERVAL.value is None:
        return None
    return parse("guidance_interval", ",".join(_INTERVAL.value), tuple[float, float])
