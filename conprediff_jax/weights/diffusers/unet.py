"""Maps between diffusers' UNets and ours: names and layouts of parameters, and configs.

They fit `UNet2DModel` and, for models with a `text_dim`, `UNet2DConditionModel`. One table of names
serves both directions. The layouts are those of `tensors.py`, with one more:

    GEGLU            theirs [2 x hidden, in]     ours two dense layers, "in" and "gate"

Their options, and our counterparts:

    block_out_channels              channels * channel_mult
    layers_per_block                blocks_per_level
    attention_head_dim              head_channels in UNet2DModel (None: one head), but the *number*
                                    of heads in UNet2DConditionModel
    AttnDownBlock2D, ...            the levels of attention_downsampling
    ResnetDownsampleBlock2D, ...    resblock_updown
    resnet_time_scale_shift         scale_shift_norm; the middle attention then has its norm only if
                                    attn_norm_num_groups is 32
    norm_eps                        norm_epsilon
    freq_shift 0, 1                 time_endpoint False, True
    flip_sin_to_cos                 not sine_first
    downsample_padding 1, 0         centered_downsampling True, False

The published pixel models (google/ddpm-*) have the second value of each of the last three, and an
epsilon of 1e-6. An option that would make another network is refused.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from conprediff_jax.models.layers import GROUPS
from conprediff_jax.models.unet import UNet
from conprediff_jax.weights import model_shapes, tensors
from conprediff_jax.weights.diffusers import blocks as diffusers_blocks
from conprediff_jax.weights.diffusers.options import DiffusersError, Options, multiples

_BLOCKS = ((r"transformer_(\d+)/", r"transformer_blocks.\1."),)

# Our layers -> theirs, in a block. `LAYERS` has those that all of diffusers' networks share.
_LAYERS = diffusers_blocks.LAYERS | {
    "time_embedding_in": "time_embedding.linear_1",
    "time_embedding_out": "time_embedding.linear_2",
    "label_embedding": "class_embedding",
    # Residual blocks.
    "time": "time_emb_proj",
    # Spatial transformers.
    "project_in": "proj_in",
    "project_out": "proj_out",
    "self_norm": "norm1",
    "self_attention/query": "attn1.to_q",
    "self_attention/key": "attn1.to_k",
    "self_attention/value": "attn1.to_v",
    "self_attention/out": "attn1.to_out.0",
    "cross_norm": "norm2",
    "cross_attention/query": "attn2.to_q",
    "cross_attention/key": "attn2.to_k",
    "cross_attention/value": "attn2.to_v",
    "cross_attention/out": "attn2.to_out.0",
    "feed_forward_norm": "norm3",
    "feed_forward/in": "ff.net.0.proj",
    "feed_forward/gate": "ff.net.0.proj",
    "feed_forward/out": "ff.net.2",
}

_POINTWISE = ("shortcut", "project_in", "project_out")  # 1x1 convolutions in diffusers

# Whether a block has attention, and whether it changes the resolution in a residual block; None if
# `downsample_type` and `upsample_type` decide.
_DOWN = {
    "DownBlock2D": (False, False),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, True),
    "CrossAttnDownBlock2D": (True, False),
}
_UP = {
    "UpBlock2D": (False, False),
    "AttnUpBlock2D": (True, None),
    "ResnetUpsampleBlock2D": (False, True),
    "CrossAttnUpBlock2D": (True, False),
}


def params_from_diffusers(state_dict: Mapping[str, np.ndarray], unet: UNet) -> dict:
    """Reads the parameters of a UNet from diffusers' state dict.

    Args:
        state_dict: The tensors by diffusers' names, either today's or those before 0.12.
        unet: The UNet.

    Returns:
        The tree under "params", with float32 NumPy arrays.

    Raises:
        ValueError: A tensor is missing, left over, or does not have the UNet's shape.
    """
    theirs = diffusers_blocks.with_current_names(state_dict)
    in_channels = np.shape(theirs.get("conv_in.weight", np.empty((0, 1))))[1]
    return _table(unet, in_channels).read(theirs)


def params_to_diffusers(params: Mapping, unet: UNet) -> dict[str, np.ndarray]:
    """Writes the parameters of a UNet as diffusers' state dict.

    Args:
        params: The tree under "params".
        unet: The UNet.

    Returns:
        Contiguous float32 arrays by diffusers' names.

    Raises:
        ValueError: A parameter is missing, left over, or does not have the UNet's shape.
    """
    input_conv = params.get("input_conv", {}).get("kernel", np.empty((0, 0, 1)))
    return _table(unet, np.shape(input_conv)[2]).write(params)


def _table(unet: UNet, in_channels: int) -> tensors.Table:
    """The table of a UNet's parameters in diffusers, for `in_channels` input channels."""
    shapes = model_shapes.of_unet(unet, in_channels)
    layers = _LAYERS if unet.text_dim is None else _LAYERS | {"norm": "norm"}
    names = {
        path: diffusers_blocks.their_name(
            path, levels=len(unet.channel_mult), layers=layers, blocks=_BLOCKS
        )
        for path in sorted(shapes, key=lambda path: "gate" in path)  # "in" is before "gate"
    }
    return tensors.Table(model="UNet", shapes=shapes, names=names, pointwise=_POINTWISE)


def config_to_diffusers(unet: UNet, in_channels: int, side: int) -> dict[str, Any]:
    """The config of a `UNet2DModel`, or of a `UNet2DConditionModel` for a model that reads text.

    Args:
        unet: The UNet.
        in_channels: The number of channels of its input.
        side: The number of rows of its input.

    Raises:
        DiffusersError: diffusers has no such UNet.
    """
    text = unet.text_dim is not None
    levels = range(len(unet.channel_mult))
    attended = [2**level in unet.attention_downsampling for level in levels]
    if text and unet.resblock_updown:
        raise DiffusersError(
            "resblock_updown is True: a UNet2DConditionModel resamples in convolutions"
        )
    if unet.resblock_updown:
        down = [("ResnetDownsampleBlock2D", "AttnDownBlock2D")[has] for has in attended]
        up = [("ResnetUpsampleBlock2D", "AttnUpBlock2D")[has] for has in attended]
    else:
        kind = "CrossAttn" if text else "Attn"
        down = [("DownBlock2D", f"{kind}DownBlock2D")[has] for has in attended]
        up = [("UpBlock2D", f"{kind}UpBlock2D")[has] for has in attended]
    config = {
        "_class_name": "UNet2DConditionModel" if text else "UNet2DModel",
        "sample_size": side,
        "in_channels": in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": [unet.channels * mult for mult in unet.channel_mult],
        "layers_per_block": unet.blocks_per_level,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "resnet_time_scale_shift": "scale_shift" if unet.scale_shift_norm else "default",
        "dropout": unet.dropout,
        "norm_num_groups": GROUPS,
        "norm_eps": unet.norm_epsilon,
        "act_fn": "silu",
        "time_embedding_type": "positional",
        "flip_sin_to_cos": not unet.sine_first,
        "freq_shift": int(unet.time_endpoint),
        "downsample_padding": int(unet.centered_downsampling),
    }
    if text:
        return config | {
            "attention_head_dim": _num_heads(unet),
            "cross_attention_dim": unet.text_dim,
            "transformer_layers_per_block": unet.transformer_depth,
        }
    kind = "resnet" if unet.resblock_updown else "conv"
    return config | {
        "downsample_type": kind,
        "upsample_type": kind,
        "attention_head_dim": _head_dim(unet, attended),
        "attn_norm_num_groups": GROUPS,
        "num_class_embeds": unet.num_classes,
    }


def _num_heads(unet: UNet) -> int | list[int]:
    """The number of heads, or one number for each level if they differ."""
    if unet.head_channels is None:
        return unet.num_heads
    # The channels of a level without attention need be no multiple of those of a head.
    return [max(1, unet.channels * m // unet.head_channels) for m in unet.channel_mult]


def _head_dim(unet: UNet, attended: list[bool]) -> int | None:
    """The channels of a head, which are the same at all levels of a `UNet2DModel`."""
    if unet.head_channels is not None:
        return unet.head_channels
    if unet.num_heads == 1:
        return None
    widths = {unet.channels * m for m, has in zip(unet.channel_mult, attended, strict=True) if has}
    widths.add(unet.channels * unet.channel_mult[-1])
    if len(widths) > 1:
        raise DiffusersError(
            f"num_heads is {unet.num_heads} at levels of {sorted(widths)} channels: a UNet2DModel "
            "has the same number of channels per head at all (head_channels here)"
        )
    return widths.pop() // unet.num_heads


def fields_from_diffusers(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Reads the fields of a `UNet`, without dtype, from the config of one of diffusers' UNets.

    Args:
        config: The content of the `config.json` of a UNet2DModel or UNet2DConditionModel.
        where: The name of the config in errors.

    Raises:
        DiffusersError: There is no such `UNet`; the message names the option.
    """
    options = Options(config, where)
    text = config.get("_class_name") == "UNet2DConditionModel"
    channels, mult = multiples(
        options.take(
            "block_out_channels", (320, 640, 1280, 1280) if text else (224, 448, 672, 896)
        ),
        where,
    )
    fields = {
        "channels": channels,
        "channel_mult": mult,
        "out_channels": options.take("out_channels", 4 if text else 3),
        "blocks_per_level": options.take("layers_per_block", 2),
        "scale_shift_norm": _scale_shift(options, text),
        "dropout": options.take("dropout", 0.0),
        "num_classes": options.take("num_class_embeds", None, int),
        "norm_epsilon": float(options.take("norm_eps", 1e-5)),
        "sine_first": not options.take("flip_sin_to_cos", True),
        "time_endpoint": _switch(options, "freq_shift", 0),
        "centered_downsampling": _switch(options, "downsample_padding", 1),
    }
    fields |= _levels(options, text, len(mult))
    fields |= _attention(options, text, [channels * m for m in mult])
    _check_heads(options, fields)
    for name in ("blocks_per_level", "num_heads", "text_dim", "transformer_depth"):
        if isinstance(fields.get(name), tuple):
            raise DiffusersError(f"{where}: {name} differs between levels; one number is needed")
    options.expect(
        mid_block_type="UNetMidBlock2DCrossAttn" if text else "UNetMidBlock2D",
        norm_num_groups=GROUPS,
        center_input_sample=False,
        time_embedding_type="positional",
        mid_block_scale_factor=1,
        add_attention=True,
    )
    options.activation()
    # The caller reads `sample_size`; the parameters show `in_channels`; `num_train_timesteps` is
    # the size of a table that positional embeddings do not have.
    options.ignore("sample_size", "in_channels", "num_train_timesteps")
    _finish_at_defaults(options, _UNET_DEFAULTS)
    return fields


def _attention(options: Options, text: bool, widths: list[int]) -> dict[str, Any]:
    """Reads the options of attention, and those of spatial transformers in a model with text."""
    heads = options.take("attention_head_dim", 8, int)
    if not text:
        single = {"num_heads": 1, "head_channels": None}
        return single if heads is None else {"num_heads": None, "head_channels": heads}
    options.expect(
        use_linear_projection=False, only_cross_attention=False, dual_cross_attention=False
    )
    heads = options.take("num_attention_heads", None, int) or heads
    single = None
    if isinstance(heads, tuple):  # one number for each level: heads may still have one width
        single = widths[-1] // heads[-1]
        if heads == tuple(max(1, width // single) for width in widths):
            heads = None
    return {
        "num_heads": heads,
        "head_channels": single if heads is None else None,
        "text_dim": options.take("cross_attention_dim", 1280, int),
        "transformer_depth": options.take("transformer_layers_per_block", 1),
    }


def _check_heads(options: Options, fields: Mapping[str, Any]) -> None:
    """Raises DiffusersError where the channels of a level cannot be divided among heads.

    diffusers would then make attention with fewer channels, those of whole heads.
    """
    widths = [fields["channels"] * mult for mult in fields["channel_mult"]]
    attended = [
        width for level, width in enumerate(widths) if 2**level in fields["attention_downsampling"]
    ]
    number = fields["head_channels"] or fields["num_heads"]
    for width in [*attended, widths[-1]]:
        if type(number) is not int or number < 1 or width % number:
            given = options.given.get("attention_head_dim")
            raise DiffusersError(
                f"{options.where}: attention_head_dim is {given!r} at a level of {width} channels; "
                "they must be divisible among the heads"
            )


def _switch(options: Options, name: str, default: int) -> bool:
    """Reads an option whose values are 0 and 1.

    Raises:
        DiffusersError: It has another value.
    """
    value = options.take(name, default)
    if value not in (0, 1):
        raise DiffusersError(
            f"{options.where}: {name} is {value}; only 0 and 1 have a counterpart here"
        )
    return bool(value)


# Options of UNet2DConditionModel that do nothing at their defaults.
_UNET_DEFAULTS = {
    "upcast_attention": False,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "addition_embed_type_num_heads": 64,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}


def _finish_at_defaults(options: Options, defaults: Mapping[str, Any]) -> None:
    """Checks that every option was read, apart from those at a default that does nothing."""
    options.ignore(*(name for name, value in defaults.items() if options.given.get(name) == value))
    options.finish()


def _scale_shift(options: Options, text: bool) -> bool:
    shift = options.take("resnet_time_scale_shift", "default")
    groups = options.take("attn_norm_num_groups", None, int)
    if shift not in ("default", "scale_shift"):
        raise DiffusersError(
            f"{options.where}: resnet_time_scale_shift is {shift!r}; "
            "'default' and 'scale_shift' have a counterpart here"
        )
    # With scale and shift, the middle attention has a norm only if the groups are given. Spatial
    # transformers have norms of their own.
    if not text and groups not in ((GROUPS,) if shift == "scale_shift" else (None, GROUPS)):
        raise DiffusersError(
            f"{options.where}: attn_norm_num_groups is {groups} with resnet_time_scale_shift="
            f"{shift!r}; only {GROUPS} has a counterpart here"
        )
    return shift == "scale_shift"


def _levels(options: Options, text: bool, levels: int) -> dict[str, Any]:
    """Reads `attention_downsampling` and `resblock_updown` from the types of blocks."""
    down = options.take(
        "down_block_types",
        ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
        if text
        else ("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
    )
    up = options.take(
        "up_block_types",
        ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
        if text
        else ("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
    )
    kinds = (options.take("downsample_type", "conv"), options.take("upsample_type", "conv"))
    where = options.where
    if not set(kinds) <= {"conv", "resnet"}:
        raise DiffusersError(
            f"{where}: downsample_type and upsample_type are {kinds}; they must be "
            "'conv' or 'resnet'"
        )
    for name, types, known in (("down_block_types", down, _DOWN), ("up_block_types", up, _UP)):
        unknown = [kind for kind in types if kind not in known or text != ("Cross" in kind)]
        unknown = [kind for kind in unknown if kind not in ("DownBlock2D", "UpBlock2D")]
        if unknown or len(types) != levels:
            raise DiffusersError(
                f"{where}: {name} is {types}; {levels} blocks of {tuple(known)} have a "
                "counterpart here"
            )
    attended = [_DOWN[kind][0] for kind in down]
    if attended != [_UP[kind][0] for kind in reversed(up)]:
        raise DiffusersError(f"{where}: up_block_types {up} do not mirror {down}")
    # The last block of each path does not change the resolution.
    changes = [_DOWN[k][1] if _DOWN[k][1] is not None else kinds[0] == "resnet" for k in down[:-1]]
    changes += [_UP[k][1] if _UP[k][1] is not None else kinds[1] == "resnet" for k in up[:-1]]
    if len(set(changes)) > 1:
        raise DiffusersError(
            f"{where}: {down} and {up} with {kinds} change the resolution in convolutions at one "
            "level and in residual blocks at another; here all levels change it in the same way"
        )
    return {
        "attention_downsampling": tuple(2**level for level in range(levels) if attended[level]),
        "resblock_updown": bool(changes and changes[0]),
    }
