"""Token transformer parameters to and from the names of VQ-Diffusion's original code.

Names are below the `transformer.transformer.` of a checkpoint, or the `transformer.` of its moving
average. A model with text has two attentions a block, `attn1` and `attn2`, each behind a norm; one
without has a single `attn`. The feed-forward layers are dense, `mlp.0` and `mlp.2`, or
convolutions, `mlp.conv1` and `mlp.conv2`. Layouts are those of `tensors.py`.

Source of the naming: microsoft/VQ-Diffusion.
"""

import re
from collections.abc import Mapping

import numpy as np

from conprediff_jax.models.transformer import TokenTransformer
from conprediff_jax.weights import model_shapes, tensors
from conprediff_jax.weights.tensors import Path

# Our layers -> theirs, within a block. Those of attention and feed-forward depend on the model.
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
    """The parameters of `transformer` out of a state dict of the original code.

    Args:
        state_dict: Tensors by the original names.
        transformer: The model the weights are for.

    Returns:
        The tree under "params", float32 NumPy arrays.

    Raises:
        ValueError: If a tensor is missing, left over or of another shape than the model's, or the
            original code has no such model.
    """
    return table(transformer).read(state_dict)


def table(transformer: TokenTransformer) -> tensors.Table:
    """Where the original code keeps the parameters of a transformer."""
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
    *modules, leaf = path
    block, layer = re.fullmatch(r"(?:block_(\d+)/)?(.+)", "/".join(modules)).groups()
    prefix = [] if block is None else [f"blocks.{block}"]
    return ".".join([*prefix, layers[layer], "bias" if leaf == "bias" else "weight"])
