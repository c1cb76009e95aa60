"""The names of the blocks that diffusers' UNets and autoencoders share."""

import re
from collections.abc import Mapping

import numpy as np

from conprediff_jax.weights.tensors import Path

# Our blocks -> theirs.
_BLOCKS = (
    (r"\b(down|up)_(\d+)_block_(\d+)/", r"\1_blocks.\2.resnets.\3."),
    (r"\b(down|up)_(\d+)_attention_(\d+)/", r"\1_blocks.\2.attentions.\3."),
    (r"\b(down|up)_(\d+)_resample/", r"\1_blocks.\2.\1samplers.0."),
    (r"\bmiddle_block_(\d+)/", r"mid_block.resnets.\1."),
    (r"\bmiddle_attention/", "mid_block.attentions.0."),
)

# Our layers -> theirs, within a block.
LAYERS = {
    "input_conv": "conv_in",
    "output_norm": "conv_norm_out",
    "output_conv": "conv_out",
    # Residual blocks and resampling.
    "norm_in": "norm1",
    "conv_in": "conv1",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "shortcut": "conv_shortcut",
    "conv": "conv",
    # Self-attention blocks.
    "norm": "group_norm",
    "attention/query": "to_q",
    "attention/key": "to_k",
    "attention/value": "to_v",
    "attention/out": "to_out.0",
}

# The names of self-attention before diffusers 0.12, which many published files still have.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def their_name(
    path: Path, *, levels: int, layers: Mapping[str, str], blocks: tuple[tuple[str, str], ...] = ()
) -> str:
    """The name in diffusers of one of our parameters.

    Args:
        path: The path of the parameter.
        levels: The number of levels of the model. diffusers counts those of the up path backwards.
        layers: Our layers -> theirs, in a block.
        blocks: Patterns of our blocks -> theirs, in addition to the shared ones.
    """
    *modules, leaf = path
    module = re.sub(
        r"\bup_(\d+)", lambda match: f"up_{levels - 1 - int(match[1])}", "/".join(modules)
    )
    for ours, theirs in (*_BLOCKS, *blocks):
        module = re.sub(ours, theirs, module)
    *block, layer = module.rsplit(".", 1)
    return ".".join([*block, layers[layer], "bias" if leaf == "bias" else "weight"])


def with_current_names(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors with today's names of attention in the place of those before 0.12."""
    old = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.")
    return {
        old.sub(lambda match: f"{match[1]}.{_OLD_NAMES[match[2]]}.", name): tensor
        for name, tensor in state_dict.items()
    }
