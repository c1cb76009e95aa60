"""The flags that `inpaint` and `evaluate_inpainting` share, with those of sampling."""

from typing import Any

from absl import flags

from conprediff_jax.cli import sampling_flags
from conprediff_jax.data.masks import POLARITIES

STEP = flags.DEFINE_integer("step", None, "Checkpoint to fill with; the newest when absent.")
IMAGES = flags.DEFINE_string("images", None, "Folder or data set; the model's own when absent.")
SPLIT = flags.DEFINE_string("split", "test", "Split of a data set.")
POLARITY = flags.DEFINE_enum("polarity", "keep", POLARITIES, "What white says in mask files.")
LABEL = flags.DEFINE_integer("label", None, "Class of every image; its own, or all in turn.")
PROMPT = flags.DEFINE_string("prompt", None, "Caption of every image; empty when absent.")
SEED = flags.DEFINE_integer(
    "seed", 0, "Of masks and fillings, which depend on it and the image.", 0, 2**32 - 1
)
BATCH = flags.DEFINE_integer("batch_size", 64, "Fillings at a time.", lower_bound=1)
_JUMP = flags.DEFINE_integer("jump_length", None, "Steps that RePaint takes back; 10.")
_RESAMPLINGS = flags.DEFINE_integer("resamplings", None, "How often RePaint goes through them; 10.")

flags.adopt_module_key_flags(sampling_flags)  # so that --help has them


def prompts() -> list[str]:
    """The caption that is asked for, if any."""
    return [] if PROMPT.value is None else [PROMPT.value]


def sampling() -> dict[str, Any]:
    """What overrides the sampling; None where it is left as it is."""
    given = {flag.name: flag.value for flag in (_JUMP, _RESAMPLINGS)}
    return sampling_flags.values() | given
