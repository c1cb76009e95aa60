"""Checkpoints of ADM (guided-diffusion): `.pt` files that hold the tensors of a UNet and no others.

Most of them hold a moving average. In models that learn the variance of their steps, the last
convolution has twice the channels of an image. The second half predicts the variance and is not
read, since DDIM has no variance, and the variance of our DDPM is fixed.
"""

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from conprediff_jax.common.errors import UserError
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.interop.pretrained import Pretrained
from conprediff_jax.weights import tensor_files
from conprediff_jax.weights.original import unet as original_unet

_OUTPUT = ("out.2.weight", "out.2.bias")


def read(path: str, config: ConfigDict, *, new_attention_order: bool = False) -> Pretrained:
    """Reads a model from a checkpoint.

    Args:
        path: The file.
        config: The config of the model: architecture, process and image size.
        new_attention_order: ADM's option of that name, as in the training of the model.

    Raises:
        UserError: A tensor is missing, left over, or does not fit the config.
    """
    content = tensor_files.nested(tensor_files.read(path), "state_dict", path)
    weights = tensor_files.unwrapped(tensor_files.arrays(content, path))
    diffusion = make_experiment(config).task.model
    channels = diffusion.denoiser.out_channels
    if all(len(weights.get(name, ())) == 2 * channels for name in _OUTPUT):
        logging.info(
            "%s: the learned variances, channels %d and up of out.2, are not read", path, channels
        )
        weights |= {name: np.asarray(weights[name])[:channels] for name in _OUTPUT}
    try:
        params = original_unet.params_from_original(
            weights, diffusion.denoiser, new_attention_order=new_attention_order
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return Pretrained.assembled(config, {"denoiser": params}, step=0, origin=path)
