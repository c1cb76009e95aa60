"""Maps between diffusers' token transformers and ours: names, layouts, and configs.

They fit `Transformer2DModel` over discrete inputs with `norm_type="ada_norm"`,
`attention_bias=True` and `activation_fn="geglu-approximate"`, which the published text-to-image
model has. One table of names serves both directions. The layouts are those of `tensors.py`.

In diffusers' configs, `num_vector_embeds` is our `num_codes` + 1, `num_embeds_ada_norm` is our
`num_steps`, `cross_attention_dim` is our `text_dim`, and `sample_size` is both sides of our `grid`.
diffusers' model takes one time for the whole batch, and returns log-probabilities of shape
[batch, codes, tokens]. It has neither labels nor convolutions.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from conprediff_jax.models.layers import GROUPS
from conprediff_jax.models.transformer import TokenTransformer
from conprediff_jax.weights import model_shapes, tensors
from conprediff_jax.weights.diffusers.options import DiffusersError, Options

# Our layers -> theirs, in a block.
_LAYERS = {
    "token_embedding": "latent_image_embedding.emb",
    "row_embedding": "latent_image_embedding.height_emb",
    "column_embedding": "latent_image_embedding.width_emb",
    "output_norm": "norm_out",
    "output": "out",
    "self_norm/index_embedding": "norm1.emb",
    "self_norm/modulation": "norm1.linear",
    "self_attention/query": "attn1.to_q",
    "self_attention/key": "attn1.to_k",
    "self_attention/value": "attn1.to_v",
    "self_attention/out": "attn1.to_out.0",
    "cross_norm/index_embedding": "norm2.emb",
    "cross_norm/modulation": "norm2.linear",
    "cross_attention/query": "attn2.to_q",
    "cross_attention/key": "attn2.to_k",
    "cross_attention/value": "attn2.to_v",
    "cross_attention/out": "attn2.to_out.0",
    "feed_forward_norm": "norm3",
    "feed_forward/in": "ff.net.0.proj",
    "feed_forward/out": "ff.net.2",
}


def params_from_diffusers(
    state_dict: Mapping[str, np.ndarray], transformer: TokenTransformer
) -> dict:
    """Reads the parameters of a transformer from diffusers' state dict.

    Args:
        state_dict: The tensors by diffusers' names.
        transformer: The transformer.

    Returns:
        The tree under "params", with float32 NumPy arrays.

    Raises:
        ValueError: A tensor is missing, left over, or does not have the transformer's shape; or
            diffusers has no such transformer.
    """
    return _table(transformer).read(state_dict)


def params_to_diffusers(params: Mapping, transformer: TokenTransformer) -> dict[str, np.ndarray]:
    """Writes the parameters of a transformer as diffusers' state dict.

    Args:
        params: The tree under "params".
        transformer: The transformer.

    Returns:
        Contiguous float32 arrays by diffusers' names.

    Raises:
        ValueError: A parameter is missing, left over, or does not have the transformer's shape; or
            diffusers has no such transformer.
    """
    return _table(transformer).write(params)


def _table(transformer: TokenTransformer) -> tensors.Table:
    """The table of a transformer's parameters in diffusers."""
    _check(transformer)
    shapes = model_shapes.of_transformer(transformer)
    names = {path: _their_name(path) for path in shapes}
    return tensors.Table(model="token transformer", shapes=shapes, names=names)


def _check(transformer: TokenTransformer) -> None:
    """Raises DiffusersError, a ValueError, for options that diffusers' transformers do not have."""
    for option, plain in (("num_classes", None), ("convolutional", False), ("position_grid", None)):
        value = getattr(transformer, option)
        if value != plain:
            raise DiffusersError(
                f"{option} is {value}: diffusers has no token transformer with it, only {plain}"
            )


def _their_name(path: tensors.Path) -> str:
    """The name in diffusers of one of our parameters."""
    block, layer, ending = tensors.split_path(path)
    prefix = [] if block is None else [f"transformer_blocks.{block}"]
    return ".".join([*prefix, _LAYERS[layer], ending])


def config_to_diffusers(transformer: TokenTransformer) -> dict[str, Any]:
    """The config of diffusers' `Transformer2DModel` of tokens.

    Raises:
        DiffusersError: There is no such `Transformer2DModel`.
    """
    _check(transformer)
    rows, columns = transformer.grid
    if rows != columns:
        raise DiffusersError(f"the grid is {rows} x {columns}: diffusers has only square ones")
    return {
        "_class_name": "Transformer2DModel",
        "num_attention_heads": transformer.num_heads,
        "attention_head_dim": transformer.width // transformer.num_heads,
        "num_layers": transformer.num_layers,
        "dropout": transformer.dropout,
        "cross_attention_dim": transformer.text_dim,
        "sample_size": rows,
        "num_vector_embeds": transformer.num_codes + 1,
        "num_embeds_ada_norm": transformer.num_steps,
        "attention_bias": True,
        "activation_fn": "geglu-approximate",
        "norm_type": "ada_norm",
        "norm_num_groups": GROUPS,
    }


def fields_from_diffusers(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Reads the fields of a `TokenTransformer`, without dtype, from the config of diffusers' model.

    Args:
        config: The content of the `config.json` of a Transformer2DModel.
        where: The name of the config in errors.

    Raises:
        DiffusersError: There is no such `TokenTransformer`; the message names the option.
    """
    options = Options(config, where)
    heads = options.take("num_attention_heads", 16)
    fields = {
        "num_heads": heads,
        "width": heads * options.take("attention_head_dim", 88),
        "num_layers": options.take("num_layers", 1),
        "dropout": options.take("dropout", 0.0),
        "text_dim": options.take("cross_attention_dim", None, int),
        "grid": (options.take("sample_size", None, int),) * 2,
        "num_codes": (options.take("num_vector_embeds", None, int) or 0) - 1,
        "num_steps": options.take("num_embeds_ada_norm", None, int),
    }
    if fields["num_codes"] < 1:
        raise DiffusersError(
            f"{where}: there are no num_vector_embeds, so this is no transformer of tokens"
        )
    options.expect(
        attention_bias=True,
        activation_fn="geglu-approximate",
        norm_type="ada_norm",
        norm_elementwise_affine=True,
        only_cross_attention=False,
        double_self_attention=False,
        upcast_attention=False,
        norm_eps=1e-5,
        attention_type="default",
    )
    options.ignore("norm_num_groups", "use_linear_projection")  # unused for tokens
    options.finish()
    return fields
