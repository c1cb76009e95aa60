"""Checkpoints of VQ-Diffusion without text: `.pth`.

    model
        content_codec.enc.*, .dec.*    the autoencoder, see `original_autoencoder`; the codebook is
                                       in both, as they share it
        transformer.transformer.*      the transformer, see `original_transformer`
        transformer.log_*, Lt_*        tables that follow from the schedule; losses of training
        transformer.empty_text_embed   what stands for no text, in models without text as well
    ema                                the moving average of `transformer.*`

The moving average is taken where there is one.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from conprediff_jax.errors import UserError
from conprediff_jax.interop import original_autoencoder, original_transformer, tensor_files
from conprediff_jax.interop.pretrained import Pretrained
from conprediff_jax.models.first_stage import Tokens

_TRANSFORMER = "transformer."
_TABLES = (
    *("log_at", "log_bt", "log_ct", "log_cumprod_at", "log_cumprod_bt", "log_cumprod_ct"),
    *("log_1_min_ct", "log_1_min_cumprod_ct", "Lt_history", "Lt_count", "empty_text_embed"),
)

# Parts of the codec -> the autoencoder's names.
_CODEC = {
    "content_codec.enc.encoder.": "encoder.",
    "content_codec.enc.quant_conv.": "quant_conv.",
    "content_codec.enc.quantize.": "quantize.",
    "content_codec.dec.decoder.": "decoder.",
    "content_codec.dec.post_quant_conv.": "post_quant_conv.",
    "content_codec.dec.quantize.": "quantize.",
}


def read(path: str, config: ConfigDict) -> Pretrained:
    """A model out of a checkpoint.

    Args:
        path: The file.
        config: What the file does not say: architecture, process, image size.

    Raises:
        UserError: A tensor is missing, left over, or does not fit the config; the tables are not
            those of the config's process.
    """
    content = tensor_files.read(path)
    if "model" not in content:
        raise UserError(f"{path}: no 'model' in it; VQ-Diffusion's checkpoints have one")
    weights = tensor_files.arrays(content["model"], path)
    model = Pretrained(config=config, params={}, frozen={}, step=_step(content), origin=path)
    task = model.task
    if not isinstance(task.first_stage, Tokens):
        raise UserError(f"{path}: VQ-Diffusion needs a config whose first stage is 'tokens'")
    codec = _codec(weights)
    tensor_files.account(
        weights,
        path,
        prefixes=(*_CODEC, f"{_TRANSFORMER}{_TRANSFORMER}"),
        names=tuple(_TRANSFORMER + table for table in _TABLES),
    )
    if "ema" in content:
        where = f"{path}, ema"
        tensors = tensor_files.arrays(content["ema"], where)
        tensor_files.account(tensors, where, prefixes=(_TRANSFORMER,), names=_TABLES)
    else:
        tensors = tensor_files.below(weights, _TRANSFORMER)
        logging.warning("%s: no moving average, taking the weights themselves", path)
    _check_tables(tensors, task.process, path)
    try:
        transformer = original_transformer.params_from_original(
            tensor_files.below(tensors, _TRANSFORMER), task.denoiser
        )
        autoencoder = original_autoencoder.params_from_original(codec, task.first_stage.model)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    codes = np.arange(task.first_stage.num_codes, dtype=np.int32)
    model = Pretrained(
        config=config,
        params=transformer,
        frozen={"autoencoder": autoencoder, "codes": codes},
        step=model.step,
        origin=path,
    )
    model.check()
    return model


def _step(content: Mapping[str, Any]) -> int:
    step = content.get("last_iter", 0)
    return max(step, 0) if isinstance(step, int) else 0


def _codec(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The autoencoder's tensors by its own names."""
    codec: dict[str, np.ndarray] = {}
    for prefix, part in _CODEC.items():
        codec |= {part + k: v for k, v in tensor_files.below(weights, prefix).items()}
    return codec


def _check_tables(tensors: Mapping[str, np.ndarray], process: Any, path: str) -> None:
    """Raises UserError where the file's schedule is not the config's."""
    for name, expected in (
        ("log_cumprod_at", process.alpha_bars),
        ("log_cumprod_ct", process.gamma_bars),
    ):
        if name not in tensors:
            continue
        found = np.exp(tensors[name][:-1])  # behind the last time they have the clean end
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3, atol=1e-6):
            raise UserError(
                f"{path}: {name} has {len(found)} times, {found[0]:.5g} .. {found[-1]:.5g}; the "
                f"config's process has {len(expected)}, {expected[0]:.5g} .. {expected[-1]:.5g}"
            )
