"""Maps from the autoencoders of taming-transformers and latent diffusion to ours.

Both paths count levels from the full resolution, as ours do. Attention consists of four 1x1
convolutions. The first stages of VQ-Diffusion have the same names, but ITHQ's codebook is called
`quantize.embedding`. The layouts are those of `tensors.py`.

Sources of the names: CompVis' taming-transformers and latent-diffusion, microsoft/VQ-Diffusion.
"""

import re
from collections.abc import Mapping

import numpy as np

from conprediff_jax.models.autoencoder import AutoencoderKL, VQModel
from conprediff_jax.weights import model_shapes, tensors
from conprediff_jax.weights.tensors import Path

CODEBOOK = "quantize.embedding.weight"
_CODEBOOKS = (CODEBOOK, "quantize.embedding")

# Our blocks -> theirs.
_BLOCKS = (
    (r"(down|up)_(\d+)_block_(\d+)", r"\1.\2.block.\3"),
    (r"(down|up)_(\d+)_attention_(\d+)", r"\1.\2.attn.\3"),
    (r"(down|up)_(\d+)_resample", r"\1.\2.\1sample"),
    (r"middle_block_0", "mid.block_1"),
    (r"middle_block_1", "mid.block_2"),
    (r"middle_attention", "mid.attn_1"),
)

# Our layers -> theirs, within a block.
_LAYERS = {
    "input_conv": "conv_in",
    "output_norm": "norm_out",
    "output_conv": "conv_out",
    "norm_in": "norm1",
    "conv_in": "conv1",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "shortcut": "nin_shortcut",
    "conv": "conv",
    "norm": "norm",
    "attention/query": "q",
    "attention/key": "k",
    "attention/value": "v",
    "attention/out": "proj_out",
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
}

_POINTWISE = ("shortcut", "query", "key", "value", "out", "quant_conv", "post_quant_conv")


def params_from_original(
    state_dict: Mapping[str, np.ndarray], autoencoder: VQModel | AutoencoderKL
) -> dict:
    """Reads the parameters of an autoencoder from a state dict of the original code.

    Args:
        state_dict: The tensors by their original names.
        autoencoder: The autoencoder.

    Returns:
        The tree under "params", with float32 NumPy arrays.

    Raises:
        ValueError: A tensor is missing, left over, or does not have the autoencoder's shape; or the
            autoencoder works on patches.
    """
    theirs = {CODEBOOK if k in _CODEBOOKS else k: v for k, v in state_dict.items()}
    in_channels = np.shape(theirs.get("encoder.conv_in.weight", np.empty((0, 1))))[1]
    return table(autoencoder, in_channels).read(theirs)


def table(autoencoder: VQModel | AutoencoderKL, in_channels: int) -> tensors.Table:
    """The table of the parameters in the original code, for images of `in_channels` channels."""
    if autoencoder.patch != 1:
        raise ValueError(f"patch={autoencoder.patch}: the original autoencoders have patches of 1")
    shapes = model_shapes.of_autoencoder(autoencoder, in_channels)
    names = {path: _their_name(path) for path in shapes}
    model = type(autoencoder).__name__
    return tensors.Table(model=model, shapes=shapes, names=names, pointwise=_POINTWISE)


def _their_name(path: Path) -> str:
    """The original name of one of our parameters."""
    if path == ("quantizer", "codebook"):
        return CODEBOOK
    *modules, leaf = path
    coder = [modules.pop(0)] if modules[0] in ("encoder", "decoder") else []
    block = []
    for ours, theirs in _BLOCKS:
        if re.fullmatch(ours, modules[0]):
            block = [re.sub(ours, theirs, modules.pop(0))]
            break
    layer = _LAYERS["/".join(modules)]
    return ".".join([*coder, *block, layer, "bias" if leaf == "bias" else "weight"])
