"""Maps between diffusers' DiT and ours: names and layouts of parameters, and configs.

They fit `DiTTransformer2DModel`, which older files call `Transformer2DModel`. One table of names
serves both directions. The layouts are those of `tensors.py`. In diffusers, every block has its own
embeddings of times and labels, `norm1.emb`. Our blocks share one, so only files in which all blocks
have the same embeddings can be read, as in all published files.

diffusers has two conventions of its own, and the reader sets them, so that a model computes the
same here: the frequencies of times are 10000^(-k / 127) (`time_endpoint`), and the norm before the
feed-forward layers has an epsilon of 1e-5 (`mlp_norm_epsilon`). facebook/DiT-XL-2-256 and -512 hold
weights of the original code, which were trained with 10000^(-k / 128) and 1e-6. Set
`time_endpoint=False` and `mlp_norm_epsilon=1e-6` to use them as they were trained.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from conprediff_jax.models.dit import DiT
from conprediff_jax.weights import dit as layout
from conprediff_jax.weights import tensors
from conprediff_jax.weights.diffusers.options import DiffusersError, Options

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")

_OUTPUT = "proj_out_2"
_FIRST = "transformer_blocks.0.norm1.emb."

# Our layers -> theirs.
_LAYERS = {
    "input": "pos_embed.proj",
    "time_embedding_in": f"{_FIRST}timestep_embedder.linear_1",
    "time_embedding_out": f"{_FIRST}timestep_embedder.linear_2",
    "label_embedding": f"{_FIRST}class_embedder.embedding_table",
    "modulation": "norm1.linear",
    "self_attention/query": "attn1.to_q",
    "self_attention/key": "attn1.to_k",
    "self_attention/value": "attn1.to_v",
    "self_attention/out": "attn1.to_out.0",
    "feed_forward/in": "ff.net.0.proj",
    "feed_forward/out": "ff.net.2",
    "output_modulation": "proj_out_1",
    "output": _OUTPUT,
}

# Options of which only this value has a counterpart here.
_ONLY = {
    "dropout": 0.0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}


def params_from_diffusers(state_dict: Mapping[str, np.ndarray], dit: DiT) -> dict:
    """Reads the parameters of a DiT from diffusers' state dict.

    Args:
        state_dict: The tensors by diffusers' names.
        dit: The DiT. If the file has twice its `out_channels`, the channels of a learned variance
            are dropped.

    Returns:
        The tree under "params", with float32 NumPy arrays.

    Raises:
        ValueError: A tensor is missing, left over, or does not have the DiT's shape; or diffusers
            has no such DiT.
        DiffusersError: The embeddings of the blocks differ.
    """
    in_channels = np.shape(state_dict.get("pos_embed.proj.weight", np.empty((0, 1))))[1]
    state_dict = layout.without_variance(_with_one_embedding(state_dict, dit), dit, _OUTPUT)
    state_dict = layout.without_positions(state_dict, dit, "pos_embed.pos_embed")
    return layout.with_dense(_table(dit, in_channels).read(state_dict))


def params_to_diffusers(params: Mapping, dit: DiT) -> dict[str, np.ndarray]:
    """Writes the parameters of a DiT as diffusers' state dict.

    Args:
        params: The tree under "params".
        dit: The DiT.

    Returns:
        Contiguous float32 arrays by diffusers' names.

    Raises:
        ValueError: A parameter is missing, left over, or does not have the DiT's shape; or
            diffusers has no such DiT.
    """
    in_channels = params["input"]["kernel"].shape[0] // dit.patch**2
    state_dict = _table(dit, in_channels).write(layout.with_convolution(params, dit))
    for name in _shared(state_dict):
        copies = (_of_block(name, i) for i in range(1, dit.num_layers))
        state_dict |= {copy: state_dict[name].copy() for copy in copies}
    return state_dict


def _with_one_embedding(state_dict: Mapping[str, np.ndarray], dit: DiT) -> dict[str, np.ndarray]:
    """Removes the embeddings of all blocks but the first."""
    state_dict = dict(state_dict)
    for name in _shared(state_dict):
        for copy in (_of_block(name, i) for i in range(1, dit.num_layers)):
            if copy not in state_dict:
                raise ValueError(f"weights do not fit the DiT: {copy} is missing")
            if not np.array_equal(state_dict.pop(copy), state_dict[name]):
                raise DiffusersError(f"{copy} is not the same as in block 0; here blocks share one")
    return state_dict


def _shared(state_dict: Mapping[str, np.ndarray]) -> list[str]:
    """The names of the first block's embeddings."""
    return [name for name in state_dict if name.startswith(_FIRST)]


def _of_block(name: str, block: int) -> str:
    """The name in another block of a tensor in the first."""
    return name.replace("transformer_blocks.0.", f"transformer_blocks.{block}.", 1)


def _table(dit: DiT, in_channels: int) -> tensors.Table:
    """The table of a DiT's parameters in diffusers, for `in_channels` input channels."""
    _check_conditions(dit)
    shapes = layout.shapes(dit, in_channels)
    names = {path: _their_name(path) for path in shapes}
    return tensors.Table(model="DiT", shapes=shapes, names=names)


def _their_name(path: tensors.Path) -> str:
    """The name in diffusers of one of our parameters."""
    block, layer, ending = tensors.split_path(path)
    prefix = [] if block is None else [f"transformer_blocks.{block}"]
    return ".".join([*prefix, _LAYERS[layer], ending])


def _check_conditions(dit: DiT) -> None:
    """Raises DiffusersError unless the DiT has classes, a learned null label, and no text."""
    if dit.text_dim is not None or dit.num_classes is None or not dit.learned_null:
        raise DiffusersError(
            f"num_classes is {dit.num_classes}, learned_null {dit.learned_null}, text_dim "
            f"{dit.text_dim}: diffusers' DiT has classes with a learned null, and no text"
        )


def config_to_diffusers(dit: DiT, in_channels: int, sample_size: int) -> dict[str, Any]:
    """The config of diffusers' `DiTTransformer2DModel`.

    Args:
        dit: The DiT.
        in_channels: The number of channels of its input.
        sample_size: The number of points along a side of the square grid.

    Raises:
        DiffusersError: There is no such `DiTTransformer2DModel`.
    """
    _check_conditions(dit)
    for option, only in (("time_endpoint", True), ("time_scale", 1.0), ("time_shift", 0.0)):
        if getattr(dit, option) != only:
            raise DiffusersError(f"{option} is {getattr(dit, option)}: diffusers' DiT has {only}")
    return {
        "_class_name": CLASSES[0],
        "num_attention_heads": dit.num_heads,
        "attention_head_dim": dit.width // dit.num_heads,
        "in_channels": in_channels,
        "out_channels": dit.out_channels,
        "num_layers": dit.num_layers,
        "sample_size": sample_size,
        "patch_size": dit.patch,
        "num_embeds_ada_norm": dit.num_classes,
        "norm_eps": dit.mlp_norm_epsilon,
        **_ONLY,
    }


def fields_from_diffusers(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Reads the fields of a `DiT`, without dtype, from the config of a `DiTTransformer2DModel`.

    Args:
        config: The content of `config.json`.
        where: The name of the config in errors.

    Returns:
        The fields. `out_channels` does not count the channels of a learned variance.

    Raises:
        DiffusersError: There is no such `DiT`; the message names the option.
    """
    options = Options(config, where)
    heads = options.take("num_attention_heads", 16)
    channels = options.take("in_channels", 4)
    fields = {
        "out_channels": channels,
        "patch": options.take("patch_size", 2),
        "width": heads * options.take("attention_head_dim", 72),
        "num_layers": options.take("num_layers", 28),
        "num_heads": heads,
        "num_classes": options.take("num_embeds_ada_norm", 1000),
        "learned_null": True,
        "time_endpoint": True,
        "mlp_norm_epsilon": options.take("norm_eps", 1e-5),
    }
    if options.take("out_channels", channels, int) not in (None, channels, 2 * channels):
        raise DiffusersError(f"{where}: out_channels must be in_channels={channels} or twice that")
    # These options of `Transformer2DModel` have no use in a DiT.
    options.expect(**_ONLY)
    options.expect(
        only_cross_attention=False, double_self_attention=False, attention_type="default"
    )
    options.ignore("sample_size", "norm_num_groups", "use_linear_projection")
    options.finish()
    return fields
