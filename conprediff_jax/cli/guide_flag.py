"""The flag `--guide`, for commands that draw from one model."""

import re

from absl import flags

from conprediff_jax.common.errors import FieldError

_FORM = re.compile(r"(.+?)(?:@(\d+))?(?::(\d*\.\d+))?")
_GUIDE = flags.DEFINE_string(
    "guide",
    None,
    "Guide the model by a worse one (autoguidance): WORKDIR[@STEP][:AVERAGE], such as runs/small, "
    "runs/small@10000 or runs/small@10000:0.10, where AVERAGE is the relative deviation of a "
    "power-function average. --guidance is the scale, and both models have the condition.",
)


def value() -> tuple[str, int | None, float | None] | None:
    """The workdir, the step and the relative deviation that the flag names, if it is given.

    Raises:
        FieldError: The flag has another form.
    """
    return None if _GUIDE.value is None else parse(_GUIDE.value)


def parse(text: str) -> tuple[str, int | None, float | None]:
    """The workdir, and the step and the relative deviation where they are given; see `value`."""
    match = _FORM.fullmatch(text)
    if not match:
        raise FieldError("guide", f"is {text!r}: give WORKDIR[@STEP][:AVERAGE]")
    path, step, average = match.groups()
    return path, int(step) if step else None, float(average) if average else None
