"""Maps between our text encoders and those of the library transformers, and a reader of folders.

The maps fit `CLIPTextModel` and the text half of `CLIPModel`, `T5EncoderModel` and the encoder of
T5 1.1's `T5ForConditionalGeneration`, and diffusers' `LDMBertModel`. Each encoder has one table of
names for both directions; the layouts are those of `tensors.py`. Other parts of a model (image
tower, decoder, projections, heads) are left aside in reading, and are not written.

`load` reads a folder that `save_pretrained` wrote: `config.json` and `model.safetensors`, in one
piece or in shards, in full or half precision, or an older `pytorch_model.bin`.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from conprediff_jax.common import hub
from conprediff_jax.common.errors import UserError
from conprediff_jax.models.text import BERTText, CLIPText, T5Text
from conprediff_jax.weights import model_shapes, tensor_files, tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """The names of a transformer's layers in the library.

    Attributes:
        layers: Our layers outside the blocks -> theirs.
        block: The name of a block, with {} for its number.
        block_layers: Our layers within a block -> theirs.
    """

    layers: Mapping[str, str]
    block: str
    block_layers: Mapping[str, str]

    def __call__(self, path: tensors.Path) -> str:
        """The name in the library of one of our parameters."""
        block, layer, ending = tensors.split_path(path)
        if block is None:
            return f"{self.layers[layer]}.{ending}"
        return f"{self.block.format(block)}.{self.block_layers[layer]}.{ending}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Family:
    """The counterpart of one kind of encoder.

    Attributes:
        names: The names of its layers.
        reads: The pattern of the names that belong to the encoder, once `synonyms` are replaced.
        synonyms: The patterns of other names in use -> their replacements.
        options: Our options -> keys of their config.
        fixed: Keys of their config -> the only value that fits.
        written: Further keys that are written into a config.
    """

    names: Names
    reads: str
    synonyms: Mapping[str, str]
    options: Mapping[str, str]
    fixed: Mapping[str, Any]
    written: Mapping[str, Any]

    def select(self, state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensors of the encoder, by the names in `names`."""
        selected = {}
        for name, tensor in state_dict.items():
            for pattern, replacement in self.synonyms.items():
                name = re.sub(pattern, replacement, name)
            if re.match(self.reads, name):
                selected[name] = tensor
        return selected


# The layers of `Block`, which both of CLIP's towers have.
CLIP_BLOCK_LAYERS = {
    "attention_norm": "layer_norm1",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "feed_forward_norm": "layer_norm2",
    "feed_forward/in": "mlp.fc1",
    "feed_forward/out": "mlp.fc2",
}

CLIP_NAMES = Names(
    layers={
        "token_embedding": "text_model.embeddings.token_embedding",
        "position_embedding": "text_model.embeddings.position_embedding",
        "output_norm": "text_model.final_layer_norm",
    },
    block="text_model.encoder.layers.{}",
    block_layers=CLIP_BLOCK_LAYERS,
)

_CLIP = _Family(
    names=CLIP_NAMES,
    reads=r"text_model\.(?!embeddings\.position_ids$)",
    synonyms={r"^(embeddings|encoder|final_layer_norm)\.": r"text_model.\1."},  # transformers 5
    options={
        "vocab_size": "vocab_size",
        "length": "max_position_embeddings",
        "width": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "hidden": "intermediate_size",
        "activation": "hidden_act",
    },
    fixed={"layer_norm_eps": 1e-5},
    written={"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]},
)

_T5 = _Family(
    names=Names(
        layers={
            "token_embedding": "shared",
            "distance_embedding": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
            "output_norm": "encoder.final_layer_norm",
        },
        block="encoder.block.{}",
        block_layers={
            "attention_norm": "layer.0.layer_norm",
            "attention/query": "layer.0.SelfAttention.q",
            "attention/key": "layer.0.SelfAttention.k",
            "attention/value": "layer.0.SelfAttention.v",
            "attention/out": "layer.0.SelfAttention.o",
            "feed_forward_norm": "layer.1.layer_norm",
            "feed_forward/gate": "layer.1.DenseReluDense.wi_0",
            "feed_forward/in": "layer.1.DenseReluDense.wi_1",
            "feed_forward/out": "layer.1.DenseReluDense.wo",
        },
    ),
    reads=r"shared\.|encoder\.",
    synonyms={r"^encoder\.embed_tokens\.": "shared."},
    options={
        "vocab_size": "vocab_size",
        "width": "d_model",
        "num_layers": "num_layers",
        "num_heads": "num_heads",
        "head_channels": "d_kv",
        "hidden": "d_ff",
        "num_buckets": "relative_attention_num_buckets",
        "max_distance": "relative_attention_max_distance",
        "pad": "pad_token_id",
    },
    fixed={"feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6},
    written={"model_type": "t5", "architectures": ["T5EncoderModel"], "is_encoder_decoder": False},
)

_BERT = _Family(
    names=Names(
        layers={
            "token_embedding": "model.embed_tokens",
            "position_embedding": "model.embed_positions",
            "output_norm": "model.layer_norm",
        },
        block="model.layers.{}",
        block_layers={
            "attention_norm": "self_attn_layer_norm",
            "attention/query": "self_attn.q_proj",
            "attention/key": "self_attn.k_proj",
            "attention/value": "self_attn.v_proj",
            "attention/out": "self_attn.out_proj",
            "feed_forward_norm": "final_layer_norm",
            "feed_forward/in": "fc1",
            "feed_forward/out": "fc2",
        },
    ),
    reads=r"model\.",
    synonyms={},
    options={
        "vocab_size": "vocab_size",
        "length": "max_position_embeddings",
        "width": "d_model",
        "num_layers": "encoder_layers",
        "num_heads": "encoder_attention_heads",
        "head_channels": "head_dim",
        "hidden": "encoder_ffn_dim",
    },
    fixed={"activation_function": "gelu", "scale_embedding": False},
    written={"model_type": "ldmbert", "architectures": ["LDMBertModel"]},
)

_FAMILIES = {CLIPText: _CLIP, T5Text: _T5, BERTText: _BERT}
_MODEL_TYPES = {"clip": CLIPText, "clip_text_model": CLIPText, "t5": T5Text, "ldmbert": BERTText}

# Their defaults that do not fit. A config that leaves these keys out is refused.
_UNFIT_DEFAULTS = {"feed_forward_proj": "relu"}


class Loaded(NamedTuple):
    """A text encoder and its parameters, the tree under "params" with float32 NumPy arrays."""

    encoder: nn.Module
    params: dict


def params_from_transformers(state_dict: Mapping[str, np.ndarray], encoder: nn.Module) -> dict:
    """Reads the parameters of a text encoder from a state dict.

    Args:
        state_dict: The tensors by their names. Those of other parts of a model are left aside.
        encoder: One of `TEXT_ENCODERS`.

    Returns:
        The tree under "params", with float32 NumPy arrays.

    Raises:
        ValueError: A tensor is missing, left over, or does not have the encoder's shape.
    """
    return _table(encoder).read(_FAMILIES[type(encoder)].select(state_dict))


def params_to_transformers(params: Mapping, encoder: nn.Module) -> dict[str, np.ndarray]:
    """Writes the parameters of a text encoder as a state dict.

    Args:
        params: The tree under "params".
        encoder: One of `TEXT_ENCODERS`.

    Returns:
        Contiguous float32 arrays by their names.

    Raises:
        ValueError: A parameter is missing, left over, or does not have the encoder's shape.
    """
    return _table(encoder).write(params)


def encoder_from_config(config: Mapping[str, Any], **options: Any) -> nn.Module:
    """Makes the text encoder that a config describes.

    Args:
        config: The content of `config.json`. Keys that it leaves out have our defaults.
        **options: Options that a config does not have: `length` of T5, `unit` of CLIP, `dtype` and
            `remat`.

    Raises:
        ValueError: The config describes another kind of model.
    """
    kind = config.get("model_type")
    if kind not in _MODEL_TYPES:
        raise ValueError(f"model_type is {kind!r}; a text encoder's is one of {list(_MODEL_TYPES)}")
    config = config.get("text_config", config)
    family = _FAMILIES[_MODEL_TYPES[kind]]
    for key, value in family.fixed.items():
        given = config.get(key, _UNFIT_DEFAULTS.get(key, value))
        if given != value:
            raise ValueError(f"{key} is {given!r}; only {value!r} fits")
    given = {ours: config[theirs] for ours, theirs in family.options.items() if theirs in config}
    return _MODEL_TYPES[kind](**given | options)


def encoder_to_config(encoder: nn.Module) -> dict[str, Any]:
    """The config of a text encoder, the content of `config.json`.

    Args:
        encoder: One of `TEXT_ENCODERS`.
    """
    family = _FAMILIES[type(encoder)]
    options = {theirs: getattr(encoder, ours) for ours, theirs in family.options.items()}
    return {**family.written, **family.fixed, **options}


def find(folder: str | os.PathLike) -> pathlib.Path:
    """The file of a text encoder's weights in a folder that `save_pretrained` wrote.

    Args:
        folder: The folder, or its address on the Hub.

    Raises:
        UserError: A file is missing.
    """
    folder = pathlib.Path(hub.local(folder)).expanduser()
    weights = tensor_files.find(folder, "model", "pytorch_model")
    if weights is None or not (folder / "config.json").exists():
        raise UserError(
            f"{folder}: there is no text encoder; expected config.json and model.safetensors, as "
            "save_pretrained writes them"
        )
    return weights


def load(folder: str | os.PathLike, **options: Any) -> Loaded:
    """Reads a text encoder from a folder that `save_pretrained` wrote.

    Args:
        folder: The folder, or its address on the Hub.
        **options: Options that a config does not have; see `encoder_from_config`.

    Raises:
        UserError: A file is missing or damaged, or the model is of another kind.
    """
    weights = find(folder)
    folder = weights.parent
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        encoder = encoder_from_config(config, **options)
        return Loaded(encoder, params_from_transformers(tensor_files.read_whole(weights), encoder))
    except tensor_files.FileError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: not a readable text encoder: {error}") from error


def _table(encoder: nn.Module) -> tensors.Table:
    """The table of an encoder's parameters in a state dict."""
    shapes = model_shapes.of_text_encoder(encoder)
    names = {path: _FAMILIES[type(encoder)].names(path) for path in shapes}
    return tensors.Table(model=type(encoder).__name__, shapes=shapes, names=names)
