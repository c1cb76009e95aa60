"""The whole sampler as one StableHLO program, which runs without the code of the model.

    <folder>/sampler.stablehlo    by `jax.export`; for CPU, CUDA and TPU
    <folder>/weights.npz          its first argument
    <folder>/config.json          what was exported

The program takes weights, a seed, the indices of images and, where the model has classes, a label
for each; it returns uint8 images. The number of images is symbolic: one program serves any. Image i
is a function of the weights, the seed and i, and is the one that `sample` draws.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export

from conprediff_jax import random
from conprediff_jax.errors import UserError
from conprediff_jax.interop.pretrained import Pretrained
from conprediff_jax.sampling import SamplingSpec

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, WEIGHTS = "sampler.stablehlo", "weights.npz"


def write(model: Pretrained, folder: pathlib.Path, spec: SamplingSpec) -> None:
    """Writes program and weights into an existing folder.

    Args:
        model: What to sample from.
        folder: Where to.
        spec: How; it is fixed in the program.

    Raises:
        UserError: The model reads captions, which the program has no tokenizer for.
    """
    if model.task.denoiser.text_dim is not None:
        raise UserError(
            f"{model.origin} reads captions: the program would need their tokenizer; export "
            "--to=inference or safetensors"
        )
    tree = {"denoiser": model.params} | ({"first_stage": model.frozen} if model.frozen else {})
    weights = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(tree, sep="/").items()}
    exported = program(model.task, spec, weights)
    (folder / PROGRAM).write_bytes(exported.serialize())
    np.savez(folder / WEIGHTS, **weights)


def program(task: Any, spec: SamplingSpec, weights: Mapping[str, Any]) -> export.Exported:
    """The exported sampler `(weights, seed, indices[, labels]) -> uint8 images`.

    Args:
        task: The denoising task.
        spec: How to sample.
        weights: Arrays, or their shapes, by the paths of both networks.
    """
    sampler = spec.make(task.process)

    def draw(weights: dict[str, jax.Array], seed: jax.Array, index: jax.Array, label: Any = None):
        """One image. A single one, mapped, so that no layer meets a symbolic size."""
        tree = traverse_util.unflatten_dict(weights, sep="/")
        index, label = index[None], None if label is None else label[None]
        prior = random.example_keys(random.stream(seed, "sample/prior"), index)
        steps = random.example_keys(random.stream(seed, "sample/steps"), index)

        def denoise(x_t: jax.Array, t: jax.Array) -> jax.Array:
            return task.predict(tree["denoiser"], x_t, t, label=label, guidance=spec.guiding())

        points = sampler.sample(denoise, task.process.prior(prior, task.point_shape), steps)
        return task.first_stage.decode(tree.get("first_stage", {}), points)[0]

    axes = (None, None, 0) + (0,) * bool(task.num_classes)
    (count,) = export.symbolic_shape("count")
    many = jax.ShapeDtypeStruct((count,), jnp.int32)
    arguments = (
        {name: jax.ShapeDtypeStruct(np.shape(w), w.dtype) for name, w in weights.items()},
        jax.ShapeDtypeStruct((), jnp.int32),
        *[many] * (len(axes) - 2),
    )
    mapped = jax.jit(jax.vmap(draw, in_axes=axes))
    return export.export(mapped, platforms=PLATFORMS)(*arguments)
