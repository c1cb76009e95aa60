"""The flags that replace settings of a model's `sampling` section, for all commands that sample."""

from typing import Any

from absl import flags

from conprediff_jax.cli.choices import REVEALS, SAMPLERS

_DEFAULT = "the default is the model's `sampling` section."
_SAMPLER = flags.DEFINE_enum(
    "sampler", None, SAMPLERS, f"Draw continuous models by this sampler; {_DEFAULT}"
)
_STEPS = flags.DEFINE_integer("steps", None, f"Take this many sampling steps; {_DEFAULT}")
_GUIDANCE = flags.DEFINE_float(
    "guidance",
    None,
    f"Scale classifier-free guidance by this factor; 1 is no guidance; {_DEFAULT}",
)
_RESCALE = flags.DEFINE_float(
    "guidance_rescale",
    None,
    "Rescale guided predictions of continuous models by this share, in [0, 1], to the deviation "
    f"without guidance; {_DEFAULT}",
)
_INTERVAL = flags.DEFINE_list(
    "guidance_interval",
    None,
    "Apply guidance only in this interval of times, low,high, as shares of all times; 0 is the "
    f"least noise and 1 the most; {_DEFAULT}",
)
_ETA = flags.DEFINE_float(
    "eta", None, f"Add this share of DDPM's noise in steps of DDIM, in [0, 1]; {_DEFAULT}"
)
_TRUNCATION = flags.DEFINE_float(
    "truncation",
    None,
    "Keep this share of the mass of a token's distribution, in (0, 1], in discrete models; "
    f"{_DEFAULT}",
)
_REVEAL = flags.DEFINE_enum(
    "reveal",
    None,
    REVEALS,
    "Reveal tokens of discrete models in this way: all kinds have posterior, mask_and_replace also "
    "random and purity, and masked also confidence. The modules categorical.py and masked.py in "
    f"diffusion/samplers explain them; {_DEFAULT}",
)
_TOKENS = flags.DEFINE_integer(
    "tokens_per_call",
    None,
    "Reveal at most this many tokens per call, with --reveal=random or purity; 0 is no limit; "
    f"{_DEFAULT}",
)
_PURITY = flags.DEFINE_float(
    "purity_weight",
    None,
    f"Draw purer tokens more sharply by this weight, at least 0, with --reveal=purity; {_DEFAULT}",
)
_TEMPERATURE = flags.DEFINE_float(
    "purity_temperature",
    None,
    "Choose tokens by purity at this temperature with --reveal=purity; 1 is in proportion to "
    f"purity, 0 takes the purest; {_DEFAULT}",
)
_CONFIDENCE = flags.DEFINE_float(
    "confidence_temperature",
    None,
    "Add this much noise to the order of tokens with --reveal=confidence; 0 always reveals the "
    f"most confident ones; {_DEFAULT}",
)


def values() -> dict[str, Any]:
    """The values of the flags by field of the `sampling` section; None for flags not given."""
    continuous = (_SAMPLER, _ETA, _RESCALE)
    discrete = (_TRUNCATION, _REVEAL, _TOKENS, _PURITY, _TEMPERATURE, _CONFIDENCE)
    given = (_STEPS, _GUIDANCE, *continuous, *discrete)
    return {flag.name: flag.value for flag in given} | {_INTERVAL.name: _interval()}


def _interval() -> tuple[float, ...] | None:
    if _INTERVAL.value is None:
        return None
    from conprediff_jax.common.fields import parse  # imports NumPy, which --help can do without

    return parse("guidance_interval", ",".join(_INTERVAL.value), tuple[float, float])
