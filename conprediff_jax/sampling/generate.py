"""From a trained denoiser to images: one jitted program a batch size.

An image is a function of the parameters, the seed and its index, whatever batch or number of
devices it is sampled with. The context decoder is no argument of anything here.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Int32, Key, UInt8

from conprediff_jax import parallel
from conprediff_jax.common import random
from conprediff_jax.common.fields import as_kind
from conprediff_jax.sampling.model import DiffusionModel
from conprediff_jax.sampling.spec import SamplingSpec

Generate = Callable[..., UInt8[Array, "..."]]


def sampling_keys(
    seed: ArrayLike, indices: ArrayLike, purpose: str = "sample"
) -> tuple[Key[Array, "batch"], Key[Array, "batch"]]:
    """One key per image for what sampling starts from, and one for its steps."""
    prior, steps = (random.stream(seed, f"{purpose}/{name}") for name in ("prior", "steps"))
    return random.example_keys(prior, indices), random.example_keys(steps, indices)


def make_generate(model: DiffusionModel, spec: SamplingSpec, mesh: Mesh) -> Generate:
    """A jitted `(params, frozen, seed, indices, labels, texts) -> uint8 images [batch, h, w, 3]`.

    `labels` is None for a model without classes, and `texts`, token ids of captions, for one that
    reads none. Images are divided over the mesh's batch axes
    where their number allows it.
    """
    sampler = spec.make(model.process)

    @functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
    def generate(params, frozen, seed, indices, labels=None, texts=None):
        prior, steps = sampling_keys(seed, indices)
        x_T = model.process.prior(prior, model.point_shape)
        if len(indices) % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0:
            x_T = jax.lax.with_sharding_constraint(x_T, parallel.batch_sharding(mesh))

        with parallel.divided_batch(mesh, len(indices), 2 * len(indices)):  # guided: both answers
            denoise = model.predictor(
                params, frozen, label=labels, tokens=texts, guidance=spec.make_guidance()
            )
            return model.first_stage.decode(frozen, sampler.sample(denoise, x_T, steps))

    return generate


def generate_batches(
    generate: Generate,
    params: Any,
    frozen: Any,
    *,
    seed: int,
    num: int,
    batch_size: int,
    first: int = 0,
    num_classes: int | None = None,
    label: int | None = None,
    texts: Int32[np.ndarray, "texts length"] | None = None,
) -> Iterator[np.ndarray]:
    """Images `first` to `first + num - 1` in batches of one size; what is too much is dropped.

    A model with classes gets `label` for every image, or takes all classes in turn when it is None.
    A model that reads captions takes those of `texts`, token ids, in turn: image i the i-th.

    Raises:
        FieldError: the seed, or the index of an image, is out of range.
    """
    seed = random.as_seed(seed)
    as_kind("first", first, range(2**31 - num))
    for start in range(first, first + num, batch_size):
        indices = np.arange(start, start + batch_size)
        labels = None
        if num_classes:
            labels = indices % num_classes if label is None else np.full_like(indices, label)
        told = None if texts is None else texts[indices % len(texts)]
        drawn = generate(params, frozen, seed, indices, labels, told)
        yield np.asarray(drawn)[: first + num - start]


def make_preview(
    model: DiffusionModel, mesh: Mesh, *, seed: int, num: int | None = None
) -> Callable[[Any, Any], UInt8[np.ndarray, "num height width 3"]]:
    """A function from `params` and `frozen` to the first images of a seed, by the model's sampling.

    Captions are those of the `text` section, in turn, and classes are taken in turn.

    Args:
        model: The model.
        mesh: The devices.
        seed: Seed of the images.
        num: How many images; as many as the model's `sampling` section says when None.
    """
    generate = make_generate(model, model.sampling, mesh)
    num = num or model.sampling.num
    texts = model.tokenizer(model.text.captions_for(num)) if model.text else None

    def draw(params: Any, frozen: Any) -> np.ndarray:
        batches = generate_batches(
            generate,
            params,
            frozen,
            seed=seed,
            num=num,
            batch_size=min(num, 64),
            num_classes=model.num_classes,
            texts=texts,
        )
        return np.concatenate(list(batches))

    return draw
