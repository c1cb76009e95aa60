"""The text part of diffusers' pipelines: text encoder, tokenizer, and the condition for no text.

    pipeline                   text encoder           no text              encoded captions
    LDMTextToImagePipeline     bert: LDMBertModel     the empty caption    unchanged, 77 tokens
    StableDiffusionPipeline    CLIPTextModel          the empty caption    unchanged
    VQDiffusionPipeline        CLIPTextModel          learned, or empty    divided by their length

Every tokenizer is written as `tokenizer.json`. Tokenizers of CLIP's or BERT's kind are also written
as the files that CLIP and BERT have. transformers opens a vocabulary that was learned here as a
PreTrainedTokenizerFast.

VQDiffusionPipeline does not open without a text encoder. A token model without text gets a text
encoder of one layer and two words, whose output nothing reads.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from flax import traverse_util

from conprediff_jax import config as config_lib
from conprediff_jax.common.errors import UserError
from conprediff_jax.data import Tokenizer
from conprediff_jax.interop.diffusers.files import read_json, read_weights, write_json, write_part
from conprediff_jax.interop.diffusers.folder import check_guidance, refusal
from conprediff_jax.interop.pretrained import Pretrained
from conprediff_jax.models.autoencoder import AutoencoderKL
from conprediff_jax.models.first_stage import Latents, Tokens
from conprediff_jax.models.text import TEXT_ENCODERS, BERTText, CLIPText
from conprediff_jax.weights import model_shapes, transformers_text
from conprediff_jax.weights.diffusers.options import DiffusersError

LATENT, STABLE = "LDMTextToImagePipeline", "StableDiffusionPipeline"
DISCRETE = "VQDiffusionPipeline"

_GUIDANCE = "learned_classifier_free_sampling_embeddings"
_GUIDANCE_CLASS = "LearnedClassifierFreeSamplingEmbeddings"
# The full name of the module. diffusers no longer finds 'vq_diffusion', the name in older files.
_GUIDANCE_MODULE = "diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion"

_LENGTH = 77  # LATENT pads every caption to this length, whatever its tokenizer says


class Text(NamedTuple):
    """The text part of a model.

    Attributes:
        encoder: The text encoder.
        params: The parameters of the encoder.
        tokenizer: The tokenizer, which makes the encoder's input.
        null: The learned encoding for no text, [length, width]; None for the empty caption.
    """

    encoder: nn.Module
    params: Any
    tokenizer: Tokenizer
    null: np.ndarray | None = None


def pipeline_of(model: Pretrained) -> str:
    """The name of the pipeline that can hold a model that reads captions.

    Raises:
        DiffusersError: No pipeline can; the message says why, and which formats can.
    """
    diffusion = model.diffusion
    encoder, first_stage = diffusion.text.encoder, diffusion.first_stage
    name = DISCRETE if isinstance(first_stage, Tokens) else _continuous_pipeline(model)

    refuse = functools.partial(refusal, model)
    if not isinstance(encoder, CLIPText if name != LATENT else BERTText):
        raise refuse(f"reads captions by {type(encoder).__name__}: {name} has another encoder")
    if isinstance(encoder, CLIPText) and encoder.unit != (name == DISCRETE):
        raise refuse(
            f"has config.text.encoder.unit {encoder.unit}: in {name} it is {not encoder.unit}"
        )
    check_guidance(model, name)
    if name == LATENT and encoder.length != _LENGTH:
        raise refuse(f"reads captions of {encoder.length} tokens: in {name} they have {_LENGTH}")
    if name == LATENT and first_stage.downsampling != 8:
        raise refuse(f"has latents of 1/{first_stage.downsampling} the size: {name}'s are 1/8")
    if name != DISCRETE and model.config.data.image_size % 8:
        raise refuse(f"has images of {model.config.data.image_size}: {name}'s are multiples of 8")
    if name != DISCRETE and diffusion.denoiser.learned_null:
        raise refuse(f"has a learned null text: no text is the empty caption in {name}")
    return name


def _continuous_pipeline(model: Pretrained) -> str:
    first_stage, encoder = model.diffusion.first_stage, model.diffusion.text.encoder
    if not isinstance(first_stage, Latents):
        raise refusal(
            model, "draws pixels from captions: diffusers' pipelines of text draw latents"
        )
    if not isinstance(encoder, CLIPText):
        return LATENT
    if not isinstance(first_stage.model, AutoencoderKL):
        raise refusal(
            model,
            f"has latents of a VQ model and captions by CLIP: {STABLE} decodes by a KL model",
        )
    return STABLE


def of_model(model: Pretrained) -> Text:
    """The text part of a model, or a stand-in if the model has no text."""
    text, networks = model.diffusion.text, model.networks
    if text is None:
        return _stand_in()
    null = networks["denoiser"].get("null_text", {}).get("embedding")
    return Text(text.encoder, networks["text_encoder"], text.tokenize, null)


def _stand_in() -> Text:
    """A text part of one layer and two words, for pipelines that do not open without one."""
    encoder = CLIPText(vocab_size=2, length=3, width=8, num_layers=1, num_heads=1, hidden=8)
    shapes = model_shapes.of_text_encoder(encoder)
    params = traverse_util.unflatten_dict(
        {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    )
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    return Text(encoder, params, Tokenizer.clip(words, [], length=encoder.length))


def write(text: Text, pipeline: str, folder: pathlib.Path) -> dict[str, list[str]]:
    """Writes the parts into a pipeline's folder and returns their entries in `model_index.json`."""
    encoder, tokenizer = text.encoder, text.tokenizer
    config = transformers_text.encoder_to_config(encoder)
    config |= {"pad_token_id": tokenizer.pad, "eos_token_id": tokenizer.end}
    part = _encoder_folder(pipeline)
    weights = transformers_text.params_to_transformers(text.params, encoder)
    write_part(folder / part, config, weights, "model.safetensors")
    library = "latent_diffusion" if pipeline == LATENT else "transformers"
    index = {
        part: [library, config["architectures"][0]],
        "tokenizer": ["transformers", _write_tokenizer(tokenizer, folder / "tokenizer")],
    }
    if pipeline != DISCRETE:
        return index
    config = {"_class_name": _GUIDANCE_CLASS, "learnable": text.null is not None}
    if text.null is not None:
        config |= {"length": text.null.shape[0], "hidden_size": text.null.shape[1]}
    null = np.zeros(0, np.float32) if text.null is None else text.null
    write_part(folder / _GUIDANCE, config, {"embeddings": null})
    return index | {_GUIDANCE: [_GUIDANCE_MODULE, _GUIDANCE_CLASS]}


def _encoder_folder(pipeline: str) -> str:
    return "bert" if pipeline == LATENT else "text_encoder"


def _write_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path) -> str:
    """Writes a tokenizer and returns the name of its class in transformers."""
    content = json.loads(tokenizer.to_json())
    pad = tokenizer.backend.padding["pad_token"]
    config = {"model_max_length": tokenizer.length, "pad_token": pad}
    if content["model"]["type"] == "WordPiece":
        name = "BertTokenizer"
        config["do_lower_case"] = content["normalizer"]["lowercase"]
    elif content["model"].get("end_of_word_suffix") == "</w>":
        name = "CLIPTokenizer"
        config |= dict.fromkeys(("eos_token", "unk_token"), "<|endoftext|>")
        config["bos_token"] = "<|startoftext|>"
    else:
        name = "PreTrainedTokenizerFast"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.to_json() + "\n")
    if name != "PreTrainedTokenizerFast":
        tokenizer.backend.model.save(str(folder))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": name, **config})
    return name


def read(folder: pathlib.Path, pipeline: str, text_dim: int) -> tuple[dict[str, Any], Text]:
    """Reads the text part of a pipeline, and makes the `text` and `condition` sections for it.

    In the config, CLIP keeps its weights in training, and latent diffusion's encoder is trained.

    Args:
        folder: The pipeline's folder.
        pipeline: The name of the pipeline.
        text_dim: The number of channels of an encoded caption that the denoiser reads.

    Returns:
        The two sections by name, and the text part.

    Raises:
        UserError: A part is missing, or does not fit the others.
    """
    part = folder / _encoder_folder(pipeline)
    encoder, params = transformers_text.load(
        part, **({"unit": True} if pipeline == DISCRETE else {})
    )
    kind = next(name for name, cls in TEXT_ENCODERS.items() if isinstance(encoder, cls))
    if kind != ("bert" if pipeline == LATENT else "clip"):
        raise DiffusersError(f"{part}: holds a {type(encoder).__name__}; not {pipeline}'s encoder")
    if encoder.width != text_dim:
        raise DiffusersError(
            f"{folder}: the denoiser reads texts of {text_dim} channels, {part.name} gives "
            f"{encoder.width}"
        )
    _check_captions(folder, part, pipeline, encoder.length)
    tokenizer = Tokenizer.from_file(folder / "tokenizer", length=encoder.length)
    names = [field.name for field in dataclasses.fields(encoder)]
    section = config_lib.text(
        kind,
        weights=str(part) if kind == "clip" else "",
        tokenizer=str(folder / "tokenizer"),
        **{n: getattr(encoder, n) for n in names if n not in ("dtype", "parent", "name")},
    )
    section.vocabulary = tokenizer.to_json()
    null = _read_null(folder / _GUIDANCE) if pipeline == DISCRETE else None
    condition = {"dropout": 0.1, "null": "empty" if null is None else "learned"}
    return {"text": section, "condition": condition}, Text(encoder, params, tokenizer, null)


def _check_captions(folder: pathlib.Path, part: pathlib.Path, pipeline: str, length: int) -> None:
    """Raises DiffusersError where the pipeline would encode captions in another way than we do."""
    if read_json(part / "config.json").get("use_attention_mask"):
        raise DiffusersError(f"{part}: use_attention_mask is set; captions are read whole here")
    source = folder / "tokenizer" / "tokenizer_config.json"
    tokens = read_json(source).get("model_max_length", length) if source.exists() else length
    if pipeline == LATENT:
        source, tokens = pipeline, _LENGTH
    if tokens != length:
        raise DiffusersError(
            f"{part}: reads captions of {length} tokens, but {source} pads them to {tokens}; the "
            "two lengths must be equal"
        )


def _read_null(folder: pathlib.Path) -> np.ndarray | None:
    """The learned encoding for no text, where there is one."""
    if not read_json(folder / "config.json").get("learnable"):
        return None
    weights, file = read_weights(folder)
    if weights.keys() != {"embeddings"}:
        raise UserError(f"{file}: holds {', '.join(weights)}; it must hold embeddings alone")
    return weights["embeddings"]
