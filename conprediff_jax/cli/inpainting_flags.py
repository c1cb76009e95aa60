"""The flags that `inpaint` and `evaluate_inpainting` share, along with the flags of sampling."""

import pathlib
from typing import Any

from absl import flags

from conprediff_jax.cli import sampling_flags
from conprediff_jax.cli.choices import FITS, POLARITIES, QUALITIES

STEP = flags.DEFINE_integer(
    "step", None, "Use the checkpoint of this training step; the default is the newest."
)
IMAGES = flags.DEFINE_string(
    "images",
    None,
    "Fill images of this folder or data set; the default is the data set of the model's config.",
)
SPLIT = flags.DEFINE_string("split", "test", "Use this split of a data set.")
POLARITY = flags.DEFINE_enum(
    "polarity", "keep", POLARITIES, "White pixels of mask files mark what to keep, or what to fill."
)
FIT = flags.DEFINE_enum(
    "fit",
    "crop",
    FITS,
    "Fit photos of another size to the model: 'crop' takes the largest part of its shape around "
    "the hole, 'pad' shows the whole photo and lets the model fill a border, 'resize' may scale "
    "its sides unequally, and 'keep' leaves photos at their own size, which the model has to take.",
)
LABEL = flags.DEFINE_string(
    "label",
    None,
    "Give images these classes, by name or number, with commas between them: fillings take them in "
    "turn. By default an image has its own class, or images without labels take all classes in "
    "turn.",
)
PROMPT = flags.DEFINE_string(
    "prompt", None, "Give every image this caption; the default is the empty caption."
)
SEED = flags.DEFINE_integer(
    "seed",
    0,
    "This seed decides the masks and the fillings, which depend only on it and the image.",
    0,
    2**32 - 1,
)
BATCH = flags.DEFINE_integer("batch_size", 64, "Draw this many fillings at a time.", lower_bound=1)
_QUALITY = flags.DEFINE_enum(
    "quality",
    None,
    QUALITIES,
    "Fill continuous models by RePaint with 210 calls of the network (fast: 50 steps, 5 "
    "resamplings) or with the paper's 2,410 (best: 250 steps, 10 resamplings); the default is fast "
    "to fill images and best to evaluate fillings.",
)
_JUMP = flags.DEFINE_integer(
    "jump_length", None, "RePaint goes back by this many steps of sampling; the default is 10."
)
_RESAMPLINGS = flags.DEFINE_integer(
    "resamplings",
    None,
    "RePaint goes through each stretch of steps this often; --quality has the default.",
)

flags.adopt_module_key_flags(sampling_flags)  # so that --help shows them


def prompts() -> list[str]:
    """The caption that `--prompt` gives, if any."""
    return [] if PROMPT.value is None else [PROMPT.value]


def asked(label: int | tuple[int, ...] | None) -> dict[str, Any]:
    """What fillings depend on beside sampling and images, for their record.

    Args:
        label: The numbers of the classes that `--label` names.
    """
    images = IMAGES.value and pathlib.Path(IMAGES.value).stem
    return {
        "seed": SEED.value,
        "label": label,
        "prompt": PROMPT.value,
        "images": images,
    }


def sampling() -> dict[str, Any]:
    """The settings of sampling by field; None for flags not given."""
    given = {flag.name: flag.value for flag in (_QUALITY, _JUMP, _RESAMPLINGS)}
    return sampling_flags.values() | given
