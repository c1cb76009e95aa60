"""Draws images from a diffusion model, by programs that are compiled once for each batch size.

An image is a function of the parameters, the seed and its index. It does not depend on the batch
size or the number of devices. No function here takes parameters of the context decoder.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Int, Int32, Key, Shaped, UInt8

from conprediff_jax import parallel
from conprediff_jax.common import random
from conprediff_jax.common.fields import as_kind
from conprediff_jax.diffusion.tokens import TokenProcess
from conprediff_jax.sampling.drawing import Begun, Drawing, Report, Stage, divided
from conprediff_jax.sampling.model import DiffusionModel
from conprediff_jax.sampling.spec import SamplingSpec

Generate = Callable[..., UInt8[Array, "..."]]


def sampling_keys(
    seed: ArrayLike, indices: ArrayLike, purpose: str = "sample"
) -> tuple[Key[Array, "batch"], Key[Array, "batch"]]:
    """Two keys per image: one for the noise that sampling starts from, and one for its steps.

    Args:
        seed: Seed of all images.
        indices: Indices of the images, [batch].
        purpose: What the images are drawn for; other purposes give other keys.
    """
    prior, steps = (random.stream(seed, f"{purpose}/{name}") for name in ("prior", "steps"))
    return random.example_keys(prior, indices), random.example_keys(steps, indices)


def make_generate(
    model: DiffusionModel, spec: SamplingSpec, mesh: Mesh, report: Report | None = None
) -> Generate:
    """A jitted `(params, frozen, seed, indices, labels, texts) -> images`.

    Images are uint8 `[batch, height, width, channels]`.

    `labels` is None for a model without classes. `texts` holds token ids of captions, and is None
    for a model that reads no captions. Images are divided over the batch axes of the mesh where
    these divide their number.

    Args:
        model: The model.
        spec: The settings of sampling.
        mesh: The devices.
        report: A function that is told how many calls of the network are done, and of how many;
            see `Drawing.in_parts`. None draws by one program, without reports.
    """
    drawing = _drawing(model, spec, mesh)
    return drawing.in_parts(report) if report else drawing.whole()


def make_stages(
    model: DiffusionModel, spec: SamplingSpec, mesh: Mesh, count: int
) -> Callable[..., Iterator[Stage]]:
    """As `make_generate`, but yields a batch stage by stage, from noise to images.

    Args:
        model: The model.
        spec: The settings of sampling.
        mesh: The devices.
        count: Number of stages after the first; see `Drawing.in_stages`.
    """
    visible = functools.partial(visible_points, model)
    return _drawing(model, spec, mesh).in_stages(count, visible)


def visible_points(
    model: DiffusionModel, frozen: Any, points: Shaped[Array, "batch rows columns *channels"]
) -> UInt8[Array, "batch height width image_channels"]:
    """Images of points or tokens on their way from noise to images.

    Masked tokens are grey. Vectors whose root mean square exceeds 1 are scaled down to 1, since
    some processes let points grow with their noise.

    Args:
        model: The model.
        frozen: See `DiffusionModel`.
        points: The points or tokens.
    """
    if not isinstance(model.process, TokenProcess):
        size = jnp.sqrt(jnp.mean(jnp.square(points), axis=(1, 2, 3), keepdims=True))
        return model.first_stage.decode(frozen, points / jnp.maximum(size, 1))
    masked = points == model.process.mask_token
    images = model.first_stage.decode(frozen, jnp.where(masked, 0, points))
    side = model.first_stage.downsampling
    hidden = masked.repeat(side, axis=1).repeat(side, axis=2)
    return jnp.where(hidden[..., None], jnp.uint8(128), images)


def _drawing(model: DiffusionModel, spec: SamplingSpec, mesh: Mesh) -> Drawing:
    """How images are drawn, before it is decided in which pieces."""
    sampler, guidance = spec.make(model.process), spec.make_guidance()

    def begin(params, frozen, seed, indices, labels=None, texts=None):
        prior, steps = sampling_keys(seed, indices)
        x_T = model.process.prior(prior, model.point_shape)
        if len(indices) % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0:
            x_T = jax.lax.with_sharding_constraint(x_T, parallel.batch_sharding(mesh))
        with divided(mesh, len(indices)):
            condition = model.encode_condition(params, frozen, label=labels, tokens=texts)
        return Begun(x_T, steps, condition)

    def walk(params, begun):
        denoise = model.predictor(params, begun.condition, guidance)
        return sampler.walk(denoise, begun.x_T, begun.rngs)

    def end(frozen, begun, points):
        return model.first_stage.decode(frozen, points)

    return Drawing(begin=begin, walk=walk, end=end, mesh=mesh)


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
    label: int | Sequence[int] | None = None,
    texts: Int32[np.ndarray, "texts length"] | None = None,
) -> Iterator[np.ndarray]:
    """Draws images `first` to `first + num - 1`, and yields them in batches of uint8 images.

    All batches are drawn at the same size; what the last one draws beyond `num` is dropped.

    Args:
        generate: A function from `make_generate`.
        params: See `DiffusionModel`.
        frozen: See `DiffusionModel`.
        seed: Seed of the images, in [0, 2^32).
        num: Number of images.
        batch_size: Images at a time.
        first: Index of the first image.
        num_classes: Number of classes of the model; None for a model without classes.
        label: Class of every image, or classes of which image i gets the i-th, over and over; None
            for image i to get class i modulo `num_classes`.
        texts: Token ids of captions, of which image i gets the i-th, over and over; None for a
            model that reads no captions.

    Raises:
        FieldError: The seed, or the index of an image, is out of range.
    """
    seed = random.as_seed(seed)
    as_kind("first", first, range(2**31 - num))
    for start in range(first, first + num, batch_size):
        indices = np.arange(start, start + batch_size)
        given = conditions_of(indices, num_classes, label, texts)
        yield np.asarray(generate(params, frozen, seed, indices, *given))[: first + num - start]


def conditions_of(
    indices: Int[np.ndarray, "batch"],
    num_classes: int | None,
    label: int | Sequence[int] | None,
    texts: Int32[np.ndarray, "texts length"] | None,
) -> tuple[Int[np.ndarray, "batch"] | None, Int32[np.ndarray, "batch length"] | None]:
    """The class and the caption of every image, by its index; `generate_batches` has the rest."""
    labels = None
    if num_classes:
        classes = np.arange(num_classes) if label is None else np.atleast_1d(label)
        labels = classes[indices % len(classes)]
    return labels, None if texts is None else texts[indices % len(texts)]


def make_preview(
    model: DiffusionModel, mesh: Mesh, *, seed: int, num: int | None = None
) -> Callable[[Any, Any], UInt8[np.ndarray, "num height width channels"]]:
    """A function from `params` and `frozen` to images 0 to `num - 1`, as the config draws them.

    The captions are the prompts of the `text` section, over and over; so are the classes.

    Args:
        model: The model.
        mesh: The devices.
        seed: Seed of the images.
        num: Number of images; None for the number in the model's `sampling` section.
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
