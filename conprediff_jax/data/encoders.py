"""Fingerprints of the networks that encoded latents and captions, and checks against them."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from conprediff_jax.data import latents, sources

# The fields of an autoencoder that its latents do not depend on.
TRAINING_FIELDS = ("parent", "name", "dropout", "codebook_weight", "commitment_weight", "remat")


def described_model(model: Any) -> dict[str, Any]:
    """The options of an autoencoder that its latents depend on, by name, in types of JSON."""
    options = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in TRAINING_FIELDS
    }
    return json.loads(json.dumps({"class": type(model).__name__, **options}, default=str))


def fingerprint(model: Any, params: Mapping[str, Any]) -> str:
    """SHA-256 over the options of an autoencoder and its parameters, in the order of their paths.

    Args:
        model: The autoencoder, a Flax module.
        params: Its parameters. The arrays may be divided over devices and processes.
    """
    digest = hashlib.sha256(json.dumps(described_model(model), sort_keys=True).encode())
    for path, leaf in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        array = np.asarray(leaf, "<f4")
        digest.update(f"{path} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def text_fingerprint(encoder: Any, params: Mapping[str, Any], vocabulary: str) -> str:
    """As `fingerprint`, for a text encoder and the JSON text of its tokenizer."""
    return hashlib.sha256((fingerprint(encoder, params) + vocabulary).encode()).hexdigest()


def check_first_stage(
    folder: str, model: Any, params: Mapping[str, Any], shape: tuple[int, int, int]
) -> None:
    """Checks that latents were encoded by a given first stage.

    Args:
        folder: Folder of the latents.
        model: The autoencoder.
        params: Its parameters.
        shape: Rows, columns and channels of its latents.

    Raises:
        DataError: The latents have another shape, or come from other weights.
    """
    manifest = latents.read_manifest(folder)
    if manifest.shape != shape:
        raise sources.DataError(
            f"{folder} holds latents of shape {manifest.shape}; the first stage's are {shape}"
        )
    ours = fingerprint(model, params)
    if manifest.fingerprint != ours:
        raise sources.DataError(
            f"{folder} was encoded by a first stage with fingerprint {manifest.fingerprint[:12]}; "
            f"this run's has {ours[:12]}: give the weights of that first stage, or run "
            f"{latents.COMMAND} into another folder"
        )


def check_text(folder: str, encoder: Any, params: Mapping[str, Any], vocabulary: str) -> None:
    """Checks that captions were encoded by a given text encoder.

    Args:
        folder: Folder of the latents.
        encoder: The text encoder.
        params: Its parameters.
        vocabulary: The JSON text of its tokenizer.

    Raises:
        DataError: The captions were encoded by another text encoder.
    """
    theirs = latents.read_manifest(folder).text_fingerprint
    ours = text_fingerprint(encoder, params, vocabulary)
    if theirs != ours:
        raise sources.DataError(
            f"{folder} holds captions of a text encoder with fingerprint {theirs[:12]}; this "
            f"run's has {ours[:12]}: give the weights and the tokenizer of that encoder, or run "
            f"{latents.COMMAND} into another folder"
        )
