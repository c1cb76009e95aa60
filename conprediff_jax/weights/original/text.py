"""Maps from the text encoders of latent diffusion and VQ-Diffusion to ours.

    BERTText    latent diffusion's transformer from x-transformers. One list, `attn_layers.layers`,
                holds attention and feed-forward layers in turn, each behind its norm
    CLIPText    OpenAI's CLIP in VQ-Diffusion. One tensor, `in_proj_weight`, stacks query, key and
                value. This tensor and the position table are no modules, so their names have no
                ending

Other heads (`to_logits`, `text_projection`) do not belong to the encoder. The layouts are those of
`tensors.py`.

Sources of the names: CompVis/latent-diffusion, microsoft/VQ-Diffusion.
"""

from collections.abc import Mapping

import flax.linen as nn
import numpy as np

from conprediff_jax.models.text import BERTText, CLIPText
from conprediff_jax.weights import model_shapes, tensors
from conprediff_jax.weights.tensors import Path

# Our layers -> theirs. Layers of a block begin with 0 or 1: the norm, and the layer behind it.
_BERT = {
    "token_embedding": "token_emb",
    "position_embedding": "pos_emb.emb",
    "output_norm": "norm",
    "attention_norm": "0",
    "attention/query": "1.to_q",
    "attention/key": "1.to_k",
    "attention/value": "1.to_v",
    "attention/out": "1.to_out",
    "feed_forward_norm": "0",
    "feed_forward/in": "1.net.0.0",
    "feed_forward/out": "1.net.2",
}

_CLIP = {
    "token_embedding": "token_embedding",
    "output_norm": "ln_final",
    "attention_norm": "ln_1",
    "attention/out": "attn.out_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward/in": "mlp.c_fc",
    "feed_forward/out": "mlp.c_proj",
}

_STACKED = ("query", "key", "value")  # in this order


def params_from_original(state_dict: Mapping[str, np.ndarray], encoder: nn.Module) -> dict:
    """Reads the parameters of a text encoder from a state dict of the original code.

    Args:
        state_dict: The tensors by their original names.
        encoder: A `BERTText` or a `CLIPText`.

    Returns:
        The tree under "params", with float32 NumPy arrays.

    Raises:
        ValueError: A tensor is missing, left over, or does not have the encoder's shape; or the
            encoder is of another kind.
    """
    return table(encoder).read(state_dict)


def table(encoder: nn.Module) -> tensors.Table:
    """The table of an encoder's parameters in the original code."""
    namings = {BERTText: _bert_name, CLIPText: _clip_name}
    kind = type(encoder)
    if kind not in namings:
        raise ValueError(f"a {kind.__name__} is in no original checkpoint; BERT and CLIP are")
    shapes = model_shapes.of_text_encoder(encoder)
    order = sorted(shapes, key=lambda path: _STACKED.index(path[-2]) if path[-2] in _STACKED else 0)
    names = {path: namings[kind](path) for path in order}
    return tensors.Table(model=kind.__name__, shapes=shapes, names=names)


def _bert_name(path: Path) -> str:
    block, layer, ending = tensors.split_path(path)
    if block is None:
        return f"{_BERT[layer]}.{ending}"
    entry = 2 * int(block) + layer.startswith("feed_forward")
    return f"attn_layers.layers.{entry}.{_BERT[layer]}.{ending}"


def _clip_name(path: Path) -> str:
    block, layer, ending = tensors.split_path(path)
    if layer == "position_embedding":
        return "positional_embedding"
    prefix = "" if block is None else f"transformer.resblocks.{block}."
    if layer.endswith(_STACKED):
        return f"{prefix}attn.in_proj_{ending}"
    return f"{prefix}{_CLIP[layer]}.{ending}"
