"""The whole sampler as one StableHLO program, which runs without the code of the model.

    <folder>/sampler.stablehlo    the program by `jax.export`, for CPU, CUDA and TPU
    <folder>/weights.npz          its first argument
    <folder>/program.json         which JAX wrote it, and which are promised to load it
    <folder>/tokenizer.json       turns captions into token ids, with the library `tokenizers`
    <folder>/config.json          the config of the model

The program takes the weights, a seed and the indices of the images, and returns uint8 images. It
also takes a label for each image if the model has classes, or token ids if it reads captions. The
number of images is symbolic: one program draws any number. Image i depends on the weights, the seed
and i alone, and it is the image that `sample` draws.

`jax.export` promises that a program loads in all releases of the six months after the release that
wrote it. A later one may refuse it; then export the model again.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export

from conprediff_jax.common.target import Target, traced_for
from conprediff_jax.interop.pretrained import Pretrained
from conprediff_jax.sampling.generate import sampling_keys
from conprediff_jax.sampling.model import DiffusionModel
from conprediff_jax.sampling.spec import SamplingSpec

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, WEIGHTS, ABOUT = "sampler.stablehlo", "weights.npz", "program.json"
PROMISE = "JAX {version}, and all releases of the six months after it"


def write(model: Pretrained, folder: pathlib.Path, spec: SamplingSpec) -> None:
    """Writes program and weights into an existing folder.

    Args:
        model: The model.
        folder: The folder.
        spec: The sampler and its settings, which are fixed in the program.
    """
    tree = {"denoiser": model.params} | ({"frozen": model.frozen} if model.frozen else {})
    weights = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(tree, sep="/").items()}
    exported = program(model.diffusion, spec, weights)
    (folder / PROGRAM).write_bytes(exported.serialize())
    np.savez(folder / WEIGHTS, **weights)
    about = {
        "written by": f"jax {jax.__version__}",
        "calling convention": exported.calling_convention_version,
        "platforms": list(exported.platforms),
        "promised to load in": PROMISE.format(version=jax.__version__),
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")


def program(
    model: DiffusionModel, spec: SamplingSpec, weights: Mapping[str, Any]
) -> export.Exported:
    """The exported sampler `(weights, seed, indices[, labels or token ids]) -> uint8 images`.

    Args:
        model: The model.
        spec: The sampler and its settings.
        weights: The parameters of all networks by path, as arrays or shapes.
    """
    sampler = spec.make(model.process)

    # The condition of one image, if any: shapes by name.
    inputs: dict[str, tuple[int, ...]] = {"label": ()} if model.num_classes else {}
    if model.text:
        inputs = {"tokens": (model.text.encoder.length,)}

    def draw(weights: dict[str, jax.Array], seed: jax.Array, index: jax.Array, *given: jax.Array):
        """Draws one image. Many are mapped over it, so that no layer meets a symbolic size."""
        tree = traverse_util.unflatten_dict(weights, sep="/")
        params, frozen, index = tree["denoiser"], tree.get("frozen", {}), index[None]
        prior, steps = sampling_keys(seed, index)
        batch = {name: value[None] for name, value in zip(inputs, given, strict=True)}
        condition = model.encode_condition(params, frozen, **batch)
        denoise = model.predictor(params, condition, spec.make_guidance())
        points = sampler.sample(denoise, model.process.prior(prior, model.point_shape), steps)
        return model.first_stage.decode(frozen, points)[0]

    (count,) = export.symbolic_shape("count")
    shapes = [(count,), *((count, *shape) for shape in inputs.values())]
    arguments = (
        {name: jax.ShapeDtypeStruct(np.shape(w), w.dtype) for name, w in weights.items()},
        jax.ShapeDtypeStruct((), jnp.int32),
        *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes),
    )
    many = jax.jit(jax.vmap(draw, in_axes=(None, None) + (0,) * len(shapes)))
    with traced_for(Target("any")):  # no kernel of one platform is in the program
        return export.export(many, platforms=PLATFORMS)(*arguments)
