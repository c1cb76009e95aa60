"""Maps from the token transformers of VQ-Diffusion's original code to ours.

The names begin with `transformer.transformer.` in a checkpoint, and with `transformer.` in its
moving average. With text, each block has two attentions, `attn1` and `attn2`, each behind a norm;
without text, it has a single `attn`. The feed-forward layers are either dense, `mlp.0` and `mlp.2`,
or convolutions, `mlp.conv1` and `mlp.conv2`. The layouts are those of `tensors.py`.

Source of the names: microsoft/VQ-Diffusion.
"""

from collections.abc import Mapping

import numpy as np

from conprediff_jax.models.transformer import TokenTransformer
from conprediff_jax.weights import model_shapes, tensors
from conprediff_jax.weights.tensors import Path

# Our layers -> theirs. The names of attention and feed-forward layers depend on the model.
_LAYERS = {
    "token_embedding": "content_emb.emb",
    "row_embedding": "content_emb.height_emb",
    "column_embedding": "content_emb.width_emb",
    "output_norm": "to_logits.0",
    "output": "to_logits.1",
    "self_norm/index_embedding": "ln1.emb",
    "self_norm/modulation": "ln1.linear",
    "cross_norm/index_embedding": "ln1_1.emb",
    "cross_norm/modulation": "ln1_1.linear",
    "feed_forward_norm": "ln2",
    "feed_forward_norm/index_embedding": "ln2.emb",
    "feed_forward_norm/modulation": "ln2.linear",
}

_PROJECTIONS = {"query": "query", "key": "key", "value": "value", "out": "proj"}


def params_from_original(
    state_dict: Mapping[str, np.ndarray], transformer: TokenTransformer
) -> dict:
    """Reads the parameters of a transformer from a state dict of the original code.

    Args:
        state_dict: The tensors by their original names.
        transformer: The transformer.

    Returns:
        The tree under "params", with float32 NumPy arrays.

    Raises:
        ValueError: A tensor is missing, left over, or does not have the transformer's shape; or the
            original code has no such transformer.
    """
    return table(transformer).read(state_dict)


def table(transformer: TokenTransformer) -> tensors.Table:
    """The table of a transformer's parameters in the original code."""
    if transformer.text_dim is not None and transformer.num_classes is not None:
        raise ValueError("the original code has no transformer with both text and classes")
    text = transformer.text_dim is not None
    layers = dict(_LAYERS)
    for ours, theirs in (("self", "attn1" if text else "attn"), ("cross", "attn2")):
        for projection, name in _PROJECTIONS.items():
            layers[f"{ours}_attention/{projection}"] = f"{theirs}.{name}"
    first, second = ("conv1", "conv2") if transformer.convolutional else ("0", "2")
    layers |= {"feed_forward/in": f"mlp.{first}", "feed_forward/out": f"mlp.{second}"}
    shapes = model_shapes.of_transformer(transformer)
    names = {path: _their_name(path, layers) for path in shapes}
    return tensors.Table(model="token transformer", shapes=shapes, names=names)


def _their_name(path: Path, layers: Mapping[str, str]) -> str:
    """The original name of one of our parameters."""
    block, layer, ending = tensors.split_path(path)
    prefix = [] if block is None else [f"blocks.{block}"]
    return ".".join([*prefix, layers[layer], ending])
