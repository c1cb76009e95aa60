"""Checkpoints of latent diffusion (CompVis): `model.ckpt`, unconditional or text-to-image.

    state_dict
        model.diffusion_model.*         the UNet, see weights/original/unet.py
        model_ema.*                     its moving average; the names have lost their dots
        first_stage_model.*             the autoencoder, see weights/original/autoencoder.py
        first_stage_model.loss.*        its discriminator and LPIPS, for training only
        cond_stage_model.transformer.*  the text encoder, see weights/original/text.py, with a head
                                        `to_logits` that nothing reads
        scale_factor                    the scale of latents, if it was measured
        betas, alphas_cumprod, ...      tables that follow from the schedule; `betas` is checked

The reader prefers the moving average where there is one. The text encoder has none.
"""

from collections.abc import Mapping

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from conprediff_jax.common.errors import UserError
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.diffusion import schedules
from conprediff_jax.interop.pretrained import Pretrained
from conprediff_jax.models.first_stage import Latents
from conprediff_jax.models.unet import UNet
from conprediff_jax.weights import tensor_files
from conprediff_jax.weights.original import autoencoder as original_autoencoder
from conprediff_jax.weights.original import text as original_text
from conprediff_jax.weights.original import unet as original_unet

_UNET, _EMA, _FIRST_STAGE = "model.diffusion_model.", "model_ema.", "first_stage_model."
_TEXT = "cond_stage_model.transformer."

# Tables that follow from `betas`, and tensors that only training uses.
_TABLES = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"),
    *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"),
    *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
    *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    *("lvlb_weights", "logvar"),
)


def read(path: str, config: ConfigDict) -> Pretrained:
    """Reads a model from a checkpoint.

    Args:
        path: The file.
        config: The config of the model: architecture, process and image size.

    Raises:
        UserError: A tensor is missing, left over, or does not fit the config, or the betas are not
            those of the config's schedule.
    """
    content = tensor_files.read(path)
    state_dict = tensor_files.nested(content, "state_dict", path)
    weights = tensor_files.arrays(state_dict, path, numbers=("scale_factor",))
    weights = tensor_files.unwrapped(weights, (_UNET, _EMA, _FIRST_STAGE, _TEXT))
    diffusion = make_experiment(config).task.model
    if not isinstance(diffusion.first_stage, Latents):
        raise UserError(
            f"{path}: latent diffusion needs a config whose first stage is 'vq' or 'kl'"
        )
    _check_betas(weights, diffusion.process, path)
    prefixes = (_UNET, _EMA, _FIRST_STAGE) + ((_TEXT,) if diffusion.text else ())
    tensor_files.account(weights, path, prefixes=prefixes, names=(*_TABLES, "scale_factor"))
    first_stage = tensor_files.below(weights, _FIRST_STAGE, without="loss.")
    try:
        networks = {
            "denoiser": original_unet.params_from_original(
                _unet_weights(weights, diffusion.denoiser, path), diffusion.denoiser
            ),
            "first_stage": {
                "autoencoder": original_autoencoder.params_from_original(
                    first_stage, diffusion.first_stage.model
                )
            },
        }
        if diffusion.text:
            networks["text_encoder"] = original_text.params_from_original(
                tensor_files.below(weights, _TEXT, without="to_logits."), diffusion.text.encoder
            )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    scale = diffusion.first_stage.scale
    if "scale_factor" in weights:
        if weights["scale_factor"].size != 1:
            raise UserError(f"{path}: scale_factor holds {weights['scale_factor'].size} numbers")
        scale = float(weights["scale_factor"].reshape(()))
    if scale is None:
        raise UserError(f"{path}: no scale_factor; give config.first_stage.scale")
    config = ConfigDict(config.to_dict()).unlock()
    with config.first_stage.ignore_type():
        config.first_stage.scale = scale
    networks["first_stage"]["scale"] = np.float32(scale)
    return Pretrained.assembled(config.lock(), networks, step=_step(content), origin=path)


def _step(content: Mapping) -> int:
    step = content.get("global_step", 0)
    return int(step) if isinstance(step, int) else 0


def _unet_weights(
    weights: Mapping[str, np.ndarray], unet: UNet, path: str
) -> dict[str, np.ndarray]:
    """The UNet's tensors by their names in the UNet, from the moving average where there is one.

    The names in the average have lost their dots. The names of the weights tell where the dots
    were; a file that holds the average alone has the names of `unet`.
    """
    plain, averaged = (tensor_files.below(weights, prefix) for prefix in (_UNET, _EMA))
    if not averaged:
        logging.warning("%s: there is no moving average, so the weights themselves are read", path)
        return plain
    names = plain or original_unet.tensor_names(unet)
    shadows = {f"diffusion_model{name}".replace(".", ""): name for name in names}
    unknown = averaged.keys() - shadows.keys() - {"decay", "num_updates"}
    missing = shadows.keys() - averaged.keys()
    if unknown or missing:
        raise UserError(
            f"{path}: the moving average does not match the UNet: "
            f"{', '.join(f'{_EMA}{name}' for name in sorted(unknown | missing)[:8])}"
        )
    return {name: averaged[shadow] for shadow, name in shadows.items()}


def _check_betas(weights: Mapping[str, np.ndarray], process: object, path: str) -> None:
    """Raises UserError where the file's schedule is not the config's."""
    if "betas" not in weights:
        return
    found = weights["betas"]
    expected = schedules.betas(
        process.schedule, process.num_steps, process.beta_start, process.beta_end
    )
    rtol = tensor_files.precision(found)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=rtol):
        raise UserError(
            f"{path}: {len(found)} betas from {found[0]:.6g} to {found[-1]:.6g}; the config's are "
            f"{process.schedule}, {len(expected)} from {expected[0]:.6g} to {expected[-1]:.6g}"
        )
