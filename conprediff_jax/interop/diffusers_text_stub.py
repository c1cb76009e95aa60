"""What `VQDiffusionPipeline` needs to open, in the place of the text that a model does not have.

A CLIP text encoder of one layer and two words, whose output nothing reads, its tokenizer, and the
empty embeddings of an unlearned guidance.
"""

import json
import pathlib

import numpy as np
from safetensors import numpy as safetensors

_LENGTH, _WIDTH, _WORDS = 2, 8, ("<|startoftext|>", "<|endoftext|>")

_ENCODER = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": len(_WORDS),
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "projection_dim": _WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": _LENGTH,
    "hidden_act": "quick_gelu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}

_TOKENIZER = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": _LENGTH,
    "bos_token": _WORDS[0],
    "eos_token": _WORDS[1],
    "pad_token": _WORDS[1],
    "unk_token": _WORDS[1],
}


def write(folder: pathlib.Path) -> dict[str, list[str]]:
    """Writes the parts into a pipeline's folder and returns their entries of its index."""
    guidance = "learned_classifier_free_sampling_embeddings"
    names = ("text_encoder", "tokenizer", guidance)
    encoder, tokenizer, embeddings = (folder / name for name in names)
    for part in (encoder, tokenizer, embeddings):
        part.mkdir()
    _write_json(encoder / "config.json", _ENCODER)
    safetensors.save_file(_weights(), encoder / "model.safetensors", metadata={"format": "pt"})
    _write_json(tokenizer / "vocab.json", {word: index for index, word in enumerate(_WORDS)})
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    _write_json(tokenizer / "tokenizer_config.json", _TOKENIZER)
    _write_json(
        embeddings / "config.json",
        {"_class_name": "LearnedClassifierFreeSamplingEmbeddings", "learnable": False},
    )
    safetensors.save_file(
        {"embeddings": np.zeros(0, np.float32)},
        embeddings / "diffusion_pytorch_model.safetensors",
        metadata={"format": "pt"},
    )
    return {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        # Where the class is, in full: 'vq_diffusion', as in older files, is no longer found.
        guidance: [
            "diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion",
            "LearnedClassifierFreeSamplingEmbeddings",
        ],
    }


def _weights() -> dict[str, np.ndarray]:
    """Zeros for every matrix and bias, ones for the scales of norms."""
    matrix, vector = np.zeros((_WIDTH, _WIDTH), np.float32), np.zeros(_WIDTH, np.float32)
    dense = {"weight": matrix, "bias": vector}
    norm = {"weight": np.ones(_WIDTH, np.float32), "bias": vector}
    layer = "text_model.encoder.layers.0"
    modules = {
        "text_model.final_layer_norm": norm,
        f"{layer}.layer_norm1": norm,
        f"{layer}.layer_norm2": norm,
        f"{layer}.mlp.fc1": dense,
        f"{layer}.mlp.fc2": dense,
        **{f"{layer}.self_attn.{part}_proj": dense for part in ("q", "k", "v", "out")},
    }
    embeddings = "text_model.embeddings"
    return {
        f"{embeddings}.token_embedding.weight": np.zeros((len(_WORDS), _WIDTH), np.float32),
        f"{embeddings}.position_embedding.weight": np.zeros((_LENGTH, _WIDTH), np.float32),
        **{
            f"{name}.{leaf}": array
            for name, part in modules.items()
            for leaf, array in part.items()
        },
    }


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
