"""Loading networks that are not trained, and measuring the scale of latents or the codes in use."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from conprediff_jax.common.errors import DataError, UserError
from conprediff_jax.data import encoders, latents
from conprediff_jax.models import quantizer
from conprediff_jax.models.first_stage import Autoencoded, Latents, Tokens
from conprediff_jax.runs.first_stage import load_params
from conprediff_jax.sampling.text import TextCondition
from conprediff_jax.tasks.denoising import Denoising
from conprediff_jax.tasks.first_stage import FirstStageTraining
from conprediff_jax.tasks.task import Batch, Task
from conprediff_jax.weights import transformers_text
from conprediff_jax.weights.model_shapes import differing_fields

SCALE_BATCHES = 8
CODE_BATCHES = 256
MEASURED_AT_ONCE = 16  # images per call while measuring


def prepare(task: Task, batches: Callable[[], Iterator[Batch]]) -> Any:
    """The task's state of a fresh run, with everything loaded or measured that it needs.

    Args:
        task: What is trained.
        batches: A function that opens this process's batches from the beginning.

    Returns:
        The task's state; None if there is nothing to load.

    Raises:
        UserError: Weights are missing or do not fit.
    """
    if isinstance(task, FirstStageTraining):
        return task.with_perceptual_weights()
    if not isinstance(task, Denoising):
        return None
    frozen, first_stage = {}, task.model.first_stage
    if isinstance(first_stage, Autoencoded):
        if task.latents and isinstance(first_stage, Latents) and first_stage.scale is None:
            # The scale was measured when the images were encoded.
            scale = latents.read_manifest(task.latents).scale
            first_stage = dataclasses.replace(first_stage, scale=scale)
        frozen |= load(first_stage, batches)
    if task.model.text and task.model.text.has_fixed_weights:
        frozen["text_encoder"] = load_text_encoder(task.model.text)
    if not frozen:
        return None
    return task.state(frozen)


def check_latents(task: Denoising, task_state: dict[str, Any]) -> None:
    """Raises DataError if other networks than this run's encoded the latents or captions.

    The same holds for features of another shape than a term reads.
    """
    model, frozen = task.model, task_state["frozen"]
    encoders.check_first_stage(
        task.latents, model.first_stage.model, frozen["autoencoder"], model.point_shape
    )
    shape = latents.read_manifest(task.latents).features_shape
    for name, term in task.terms.items():
        if term.reads_encoded and term.shape != shape:
            raise DataError(
                f"{task.latents} holds features of shape {shape}; config.terms.{name}.shape is "
                f"{term.shape}"
            )
    if task.encoded_text:
        encoders.check_text(
            task.latents, model.text.encoder, frozen["text_encoder"], model.text.vocabulary
        )


def load(first_stage: Autoencoded, batches: Callable[[], Iterator[Batch]]) -> dict[str, Any]:
    """The frozen parameters that `first_stage.abstract()` describes.

    Besides the autoencoder's parameters, these are the scale of latents, given or measured, or the
    indices of the codes that tokens number.

    Args:
        first_stage: The first stage, with the path of its weights.
        batches: A function that opens this process's batches; called only to measure something.

    Raises:
        FirstStageError: The weights are missing, or have other shapes or another architecture.
    """
    params = load_params(first_stage)
    if isinstance(first_stage, Tokens):
        return {"autoencoder": params, "codes": _kept_codes(first_stage, params, batches)}
    scale = first_stage.scale
    if scale is None:
        scale = _measured_scale(first_stage, params, batches())
        logging.info("first stage: latents are scaled by %.5f, measured", scale)
    return {"autoencoder": params, "scale": np.float32(scale)}


def load_text_encoder(text: TextCondition) -> Any:
    """The parameters of a text encoder, from the folder that `config.text.weights` names.

    Raises:
        UserError: The weights are missing, or belong to another encoder.
    """
    loaded = transformers_text.load(text.weights)
    ours = jax.eval_shape(text.init, jax.random.key(0))
    if jax.tree.map(jnp.shape, loaded.params) != jax.tree.map(jnp.shape, ours):
        raise UserError(
            f"config.text.weights is {text.weights}, of other sizes than config.text.encoder: "
            f"{differing_fields(loaded.encoder, text.encoder)}"
        )
    return loaded.params


def _parts(images: Any) -> list[np.ndarray]:
    """A batch in equal parts, small enough for one device that also holds the train state."""
    size = max(size for size in range(1, MEASURED_AT_ONCE + 1) if len(images) % size == 0)
    return np.split(np.asarray(images), len(images) // size)


def _measured_scale(first_stage: Latents, params: Any, batches: Iterator[Batch]) -> float:
    """1 / the standard deviation of the latents in the first batches of all processes."""
    encode = jax.jit(first_stage.encode_unscaled)
    variances = []
    for _ in range(SCALE_BATCHES):
        encoded = [encode(params, part) for part in _parts(next(batches)["image"])]
        variances.append(jnp.var(jnp.concatenate(encoded)))
    variance = multihost_utils.process_allgather(jnp.stack(variances)).mean()
    return float(1 / np.sqrt(variance))


def _kept_codes(
    first_stage: Tokens, params: Any, batches: Callable[[], Iterator[Batch]]
) -> np.ndarray:
    """Indices of the kept codes, ascending, int32: the most used ones in `CODE_BATCHES` batches.

    Fewer batches are counted if the data have no more.
    """
    total = first_stage.model.num_codes
    if first_stage.num_codes == total:
        return np.arange(total, dtype=np.int32)

    @jax.jit
    def count(params: Any, images: Any) -> Any:
        vectors = first_stage.encode_unscaled(params, images)
        indices = quantizer.nearest_codes(vectors, params["quantizer"]["codebook"])
        return quantizer.count_codes(indices, total)

    counts = np.zeros(total, np.int64)
    for batch in itertools.islice(batches(), CODE_BATCHES):
        for part in _parts(batch["image"]):
            counts += np.asarray(count(params, part), np.int64)
    counts = multihost_utils.process_allgather(counts).reshape(-1, total).sum(axis=0)
    kept = np.sort(np.argsort(-counts, kind="stable")[: first_stage.num_codes])
    logging.info(
        "first stage: %d of %d codes are used; the %d kept stand for %.3f %% of %d tokens",
        (counts > 0).sum(), total, len(kept), 100 * counts[kept].sum() / counts.sum(), counts.sum(),
    )  # fmt: skip
    return kept.astype(np.int32)
