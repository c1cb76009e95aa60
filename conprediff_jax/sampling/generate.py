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
from jaxtyping import Array, Int32, UInt8

from conprediff_jax import parallel
from conprediff_jax.common import random
from conprediff_jax.common.fields import as_kind
from conprediff_jax.sampling.spec import SamplingSpec

Generate = Callable[..., UInt8[Array, "..."]]


def make_generate(task: Any, spec: SamplingSpec, mesh: Mesh) -> Generate:
    """A jitted `(params, frozen, seed, indices, labels, texts) -> uint8 images [batch, h, w, 3]`.

    `labels` is None for a model without classes, and `texts`, token ids of captions, for one that
    reads none. Images are divided over the mesh's batch axes
    where their number allows it.
    """
    sampler = spec.make(task.process)

    @functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
    def generate(params, frozen, seed, indices, labels=None, texts=None):
        prior = random.example_keys(random.stream(seed, "sample/prior"), indices)
        steps = random.example_keys(random.stream(seed, "sample/steps"), indices)
        x_T = task.process.prior(prior, task.point_shape)
        if len(indices) % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0:
            x_T = jax.lax.with_sharding_constraint(x_T, parallel.batch_sharding(mesh))

        def denoise(x_t, t):
            return task.predict(params, x_t, t, **told, guidance=spec.guiding())

        with parallel.divided_batch(mesh, len(indices), 2 * len(indices)):  # guided: both answers
            told = task.told(params, frozen, label=labels, tokens=texts)
            return task.first_stage.decode(frozen, sampler.sample(denoise, x_T, steps))

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
