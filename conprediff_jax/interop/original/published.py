"""Configs of published models whose files do not describe their networks, by family and name.

    ldm             CompVis/latent-diffusion; the file holds first stage and text encoder too
    adm             openai/guided-diffusion; models of pixels, whose learned variance is not read
    vq-diffusion    microsoft/VQ-Diffusion; the file holds first stage and text encoder too

No file holds the tokenizer of a model that reads captions.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from conprediff_jax.common.errors import FieldError
from conprediff_jax.config import presets
from conprediff_jax.config.denoising import default

_IN_FILE = "(in the checkpoint)"  # stands for the path of a first stage or text encoder


def config(family: str, name: str) -> ConfigDict:
    """The config of a published model.

    Args:
        family: A key of `MODELS`.
        name: The name of a model of the family.

    Raises:
        UserError: There is no model of that name.
    """
    if name not in MODELS[family]:
        raise FieldError("model", f"is {name!r}: choose one of {', '.join(MODELS[family])}")
    made = MODELS[family][name]().unlock()
    # The published models compute in float32.
    made.dtype = "float32"
    return made.lock()


def new_attention_order(family: str, name: str | None) -> bool:
    """Whether a published model stacks query, key and value; see `weights/original/unet.py`."""
    return family == "adm" and name == "imagenet_64"


def _ldm_4(batch_size: int, name: str) -> ConfigDict:
    made = presets.ldm_4(weights=_IN_FILE).unlock()
    made.data.name = name
    made.train.batch_size = batch_size
    made.optimizer.learning_rate = 2e-6 * batch_size
    return made


def _ldm_8() -> ConfigDict:
    made = presets.ldm_8(weights=_IN_FILE).unlock()
    made.data.name = "lsun/church_outdoor"
    return made


def _adm(image_size: int, mult: tuple[int, ...], **model: object) -> ConfigDict:
    """ADM at an image size, with attention at 32, 16 and 8 pixels."""
    made = default().unlock()
    made.data.update(image_size=image_size, flip=True, label=None)
    made.process.schedule = "linear"
    made.model.update(
        channels=256,
        channel_mult=mult,
        blocks_per_level=2,
        attention_downsampling=tuple(image_size // side for side in (32, 16, 8)),
        scale_shift_norm=True,
        resblock_updown=True,
    )
    with made.model.ignore_type():
        made.model.update({"head_channels": 64, **model})
    # ADM learned the variance of its steps, which is not read; DDIM needs none.
    made.sampling.update(sampler="ddim", steps=50, spacing="leading", clip=1.0, num=16)
    return made


def _adm_imagenet_64() -> ConfigDict:
    made = _adm(64, (1, 2, 3, 4), num_classes=1000, dropout=0.1)
    made.process.schedule = "cosine"
    made.model.update(channels=192, blocks_per_level=3)
    made.data.update(name="imagenet2012", label="label")
    return made


def _adm_imagenet(image_size: int, mult: tuple[int, ...], **model: object) -> ConfigDict:
    made = _adm(image_size, mult, **model)
    made.data.name = "imagenet2012"
    if "num_classes" in model:
        made.data.label = "label"
    return made


def _adm_lsun(name: str) -> ConfigDict:
    made = _adm(256, (1, 1, 2, 2, 4, 4), dropout=0.1)
    made.data.name = name
    return made


def _vq_diffusion_ffhq() -> ConfigDict:
    made = presets.vq_diffusion_f16(weights=_IN_FILE).unlock()
    made.data.name = "ffhq"
    with made.model.ignore_type():
        made.model.position_grid = (32, 32)
    return made


def _vq_diffusion_ithq(null: str) -> ConfigDict:
    """ITHQ's config; both published files have an embedding for no text, but one learned it."""
    made = presets.vq_diffusion_ithq(weights=_IN_FILE, text_weights=_IN_FILE).unlock()
    made.condition.null = null
    return made


Models = dict[str, Callable[[], ConfigDict]]

MODELS: dict[str, Models] = {
    "ldm": {
        "celebahq": lambda: _ldm_4(48, "celeb_a_hq/256"),
        "ffhq": lambda: _ldm_4(42, "ffhq"),
        "lsun_bedrooms": lambda: _ldm_4(48, "lsun/bedroom"),
        "lsun_churches": _ldm_8,
        "text2img": lambda: presets.ldm_text(weights=_IN_FILE),
    },
    "adm": {
        "imagenet_64": _adm_imagenet_64,
        "imagenet_128": lambda: _adm_imagenet(
            128, (1, 1, 2, 3, 4), num_classes=1000, num_heads=4, head_channels=None
        ),
        "imagenet_256": lambda: _adm_imagenet(256, (1, 1, 2, 2, 4, 4), num_classes=1000),
        "imagenet_256_uncond": lambda: _adm_imagenet(256, (1, 1, 2, 2, 4, 4)),
        "lsun_bedroom": lambda: _adm_lsun("lsun/bedroom"),
        "lsun_cat": lambda: _adm_lsun("lsun/cat"),
        "lsun_horse": lambda: _adm_lsun("lsun/horse"),
    },
    "vq-diffusion": {
        "ffhq": _vq_diffusion_ffhq,
        "ithq": lambda: _vq_diffusion_ithq("empty"),
        "ithq_learnable": lambda: _vq_diffusion_ithq("learned"),
    },
}
