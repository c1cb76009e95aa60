"""The flag `--sweep`: combinations of settings to evaluate one after the other."""

import itertools
import re
from typing import Any

from absl import flags

from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.names import did_you_mean

KEYS = {
    "guidance": float,
    "guidance_rescale": float,
    "truncation": float,
    "eta": float,
    "steps": int,
    "step": int,
    "average": float,
}
_SWEEP = flags.DEFINE_string(
    "sweep",
    None,
    "Evaluate --workdir with every combination of these values, and plot the figures over them: "
    f"KEY=VALUE,VALUE,... for one or several of {', '.join(KEYS)}, such as 'guidance=1,1.5,2 "
    "steps=25,50'. A step is a checkpoint, and an average the relative deviation of a "
    "power-function average.",
)

Point = dict[str, Any]


def points() -> list[Point]:
    """The combinations that the flag asks for, as values by key; [{}] if it is not given.

    Raises:
        FieldError: The flag has another form.
    """
    return parse(_SWEEP.value) if _SWEEP.value is not None else [{}]


def parse(text: str) -> list[Point]:
    """The combinations of values that a text lists; see `points`."""
    axes: dict[str, list[Any]] = {}
    for part in text.split():
        key, _, values = part.partition("=")
        if key not in KEYS:
            near = did_you_mean(key, KEYS)
            raise FieldError("sweep", f"has {part!r}: {near}the keys are {', '.join(KEYS)}")
        if key in axes:
            raise FieldError("sweep", f"has the key {key!r} twice: list its values once")
        try:
            axes[key] = list(dict.fromkeys(map(KEYS[key], re.split(",", values))))
        except ValueError as error:
            kind = "whole numbers" if KEYS[key] is int else "numbers"
            raise FieldError(
                "sweep", f"has {part!r}: give {kind} after the key, as in {key}=1,2"
            ) from error
    if not axes:
        raise FieldError("sweep", "is empty: give KEY=VALUE,VALUE,...")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
