"""Checkpoints of VQ-Diffusion, `.pth` files.

    model
        content_codec.enc.*, .dec.*    the autoencoder, see weights/original/autoencoder.py; encoder
                                       and decoder share the codebook, so both names have it. In
                                       ITHQ's file it comes with statistics of training
        transformer.transformer.*      the transformer, see weights/original/transformer.py
        transformer.condition_emb.*    CLIP's text encoder, see weights/original/text.py, with a
                                       projection that nothing reads
        transformer.empty_text_embed   the embedding for no text, in models without text as well
        transformer.log_*, Lt_*        tables that follow from the schedule, and losses of training
    ema                                the moving average of `transformer.*`

The reader prefers the moving average where there is one. Captions are padded with token 0, "!", and
encoded captions are divided by their length.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from conprediff_jax.common.errors import UserError
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.interop.pretrained import Pretrained
from conprediff_jax.models.first_stage import Tokens
from conprediff_jax.sampling.model import DiffusionModel
from conprediff_jax.weights import tensor_files
from conprediff_jax.weights.original import autoencoder as original_autoencoder
from conprediff_jax.weights.original import text as original_text
from conprediff_jax.weights.original import transformer as original_transformer

PAD = "!"  # the token that captions are padded with

_TRANSFORMER, _TEXT, _NULL = "transformer.", "condition_emb.", "empty_text_embed"
_TABLES = (
    *("log_at", "log_bt", "log_ct", "log_cumprod_at", "log_cumprod_bt", "log_cumprod_ct"),
    *("log_1_min_ct", "log_1_min_cumprod_ct", "Lt_history", "Lt_count", _NULL),
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
_STATISTICS = ("quantize.cluster_size", "quantize.embedding_avg")


def read(path: str, config: ConfigDict) -> Pretrained:
    """Reads a model from a checkpoint.

    Args:
        path: The file.
        config: The config of the model: architecture, process and image size.

    Raises:
        UserError: A tensor is missing, left over, or does not fit the config, or the tables are not
            those of the config's process.
    """
    content = tensor_files.read(path)
    if "model" not in content:
        raise UserError(f"{path}: there is no 'model' in it, which VQ-Diffusion's files have")
    weights = tensor_files.arrays(tensor_files.nested(content, "model", path), path)
    weights = tensor_files.unwrapped(weights, (*_CODEC, _TRANSFORMER))
    diffusion = make_experiment(config).task.model
    if not isinstance(diffusion.first_stage, Tokens):
        raise UserError(f"{path}: VQ-Diffusion needs a config whose first stage is 'tokens'")
    if diffusion.first_stage.used_codes:
        raise UserError(
            f"{path}: the file does not say which codes are used: config.first_stage.used_codes "
            "must be None"
        )
    prefixes = (_TRANSFORMER,) + ((_TEXT,) if diffusion.text else ())
    tensor_files.account(
        weights,
        path,
        prefixes=(*_CODEC, *(_TRANSFORMER + prefix for prefix in prefixes)),
        names=tuple(_TRANSFORMER + table for table in _TABLES),
    )
    if "ema" in content:
        where = f"{path}, ema"
        tensors = tensor_files.arrays(tensor_files.nested(content, "ema", path), where)
        tensors = tensor_files.unwrapped(tensors, (*prefixes, *_TABLES))
        tensor_files.account(tensors, where, prefixes=prefixes, names=_TABLES)
    else:
        tensors = tensor_files.below(weights, _TRANSFORMER)
        logging.warning("%s: there is no moving average, so the weights themselves are read", path)
    _check_tables(tensors, diffusion.process, path)
    try:
        networks = _networks(tensors, _codec(weights), diffusion)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return Pretrained.assembled(config, networks, step=_step(content), origin=path)


def _networks(
    tensors: Mapping[str, np.ndarray], codec: Mapping[str, np.ndarray], diffusion: DiffusionModel
) -> dict[str, Any]:
    """The parameters of each network, from the tensors of transformer and autoencoder."""
    networks = {
        "denoiser": original_transformer.params_from_original(
            tensor_files.below(tensors, _TRANSFORMER), diffusion.denoiser.clone(learned_null=False)
        ),
        "first_stage": {
            "autoencoder": original_autoencoder.params_from_original(
                codec, diffusion.first_stage.model
            ),
            "codes": np.arange(diffusion.first_stage.num_codes, dtype=np.int32),
        },
    }
    if diffusion.text:
        networks["text_encoder"] = original_text.params_from_original(
            tensor_files.below(tensors, _TEXT, without="text_projection"), diffusion.text.encoder
        )
        if diffusion.denoiser.learned_null:
            if _NULL not in tensors:
                raise ValueError(f"{_NULL} is missing: config.condition.null must be 'empty'")
            networks["denoiser"]["null_text"] = {"embedding": tensors[_NULL]}
    return networks


def _step(content: Mapping[str, Any]) -> int:
    step = content.get("last_iter", 0)
    return max(step, 0) if isinstance(step, int) else 0


def _codec(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The autoencoder's tensors by their names in the autoencoder."""
    codec: dict[str, np.ndarray] = {}
    for prefix, part in _CODEC.items():
        codec |= {part + k: v for k, v in tensor_files.below(weights, prefix).items()}
    return {name: tensor for name, tensor in codec.items() if name not in _STATISTICS}


def _check_tables(tensors: Mapping[str, np.ndarray], process: Any, path: str) -> None:
    """Raises UserError where the file's schedule is not the config's."""
    for name, expected in (
        ("log_cumprod_at", process.alpha_bars),
        ("log_cumprod_ct", process.gamma_bars),
    ):
        if name not in tensors:
            continue
        logs = tensors[name][:-1]  # the last entry is no time, but the clean end
        found = np.exp(logs)
        rtol = 1e-3 + np.abs(logs) * tensor_files.precision(logs)
        if (
            found.shape != expected.shape
            or not (np.abs(found - expected) <= 1e-6 + rtol * expected).all()
        ):
            raise UserError(
                f"{path}: {name} has {len(found)} times, {found[0]:.5g} .. {found[-1]:.5g}; the "
                f"config's process has {len(expected)}, {expected[0]:.5g} .. {expected[-1]:.5g}"
            )
