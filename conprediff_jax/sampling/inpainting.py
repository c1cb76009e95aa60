"""Fills holes in images with a diffusion model, by programs that are compiled once a batch size.

    image, hole painted over -> encode -> sample around the known points -> decode -> blend -> image

The pixels in the hole never enter the program. Before an image is encoded, they take the colour of
the nearest known pixel, so that the encoder sees no artificial edge.

Known pixels are not changed. Where the first stage loses detail, they do not quite meet the decoded
hole. So the local mean of the difference at the rim of the hole is added to the pixels in the hole,
and fades inwards over about one patch of the first stage.

Filling j of image i is a function of the parameters, the seed, i and j. It does not depend on the
batch size or the number of devices.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from einops import rearrange
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, UInt8

from conprediff_jax import parallel
from conprediff_jax.common import images as images_lib
from conprediff_jax.common import random
from conprediff_jax.common.errors import FieldError, UserError
from conprediff_jax.common.progress import ProgressLine
from conprediff_jax.data.fitting import Fitted
from conprediff_jax.data.holes import Hole, painted_over
from conprediff_jax.diffusion.samplers import Known
from conprediff_jax.models.first_stage import FirstStage, Pixels
from conprediff_jax.parallel import share
from conprediff_jax.sampling.drawing import Begun, Drawing, Report, divided
from conprediff_jax.sampling.generate import sampling_keys
from conprediff_jax.sampling.model import DiffusionModel, TrainedModel
from conprediff_jax.sampling.shards import leave_out
from conprediff_jax.sampling.spec import (
    ContinuousSampling,
    RePaintSampling,
    SamplingSpec,
)

Images = UInt8[Array, "batch height width channels"]
Masks = Bool[Array, "batch height width"]
Fill = Callable[..., Images]


# Settings of RePaint by name. The network is called 210 times, or 2,410 times as in the paper.
QUALITIES = {
    "fast": {"steps": 50, "jump_length": 10, "resamplings": 5},
    "best": {"steps": 250, "jump_length": 10, "resamplings": 10},
}


def sampling_for(
    model: DiffusionModel, *, quality: str | None = None, usual: str = "best", **settings: Any
) -> SamplingSpec:
    """The settings for filling holes, by RePaint or by a sampler that replaces the known part.

    Models of vectors fill by RePaint unless `settings` name a sampler. Models of tokens use their
    own `sampling` section.

    Args:
        model: The model.
        quality: A key of `QUALITIES`, for RePaint alone. It takes all steps of a shorter process.
        usual: The quality where `quality` is None.
        **settings: New values by field of the settings; None leaves a field as it is.

    Raises:
        UserError: A setting does not fit the model; the message names it.
    """
    own = model.sampling
    if quality not in (None, *QUALITIES):
        raise FieldError("quality", f"is {quality!r}: choose one of {', '.join(QUALITIES)}")
    if not isinstance(own, ContinuousSampling) or settings.get("sampler") is not None:
        if quality is not None:
            raise FieldError(
                "quality",
                f"is {quality!r}: it goes with RePaint, for which a model "
                "must be continuous and no sampler given",
            )
        return model.sampling_with(**settings)
    shared = [field.name for field in dataclasses.fields(ContinuousSampling)]
    chosen = QUALITIES[quality or usual]
    steps = {"steps": min(chosen["steps"], getattr(model.process, "num_steps", math.inf))}
    repaint = RePaintSampling(**{name: getattr(own, name) for name in shared} | chosen | steps)
    return model.checked_sampling(repaint, **settings)


def warn_without_known_points(model: DiffusionModel, holes: Sequence[Hole]) -> None:
    """Logs a warning where a mask is so fine that no point of the first stage is known."""
    if isinstance(model.first_stage, Pixels):
        return
    p = model.first_stage.downsampling
    unknown = [
        hole.name
        for hole in holes
        if not rearrange(hole.mask, "(r p) (c q) -> (r c) (p q)", p=p, q=p).all(axis=1).any()
    ]
    if unknown:
        logging.warning(
            "%d of %d images, %s first, have no patch of %d x %d pixels that is wholly known: the "
            "model sees nothing of them, so their fillings do not fit",
            len(unknown), len(holes), unknown[0], p, p,
        )  # fmt: skip


def known_points(first_stage: FirstStage, frozen: Any, images: Images, masks: Masks) -> Known:
    """The known points of images, with a mask that says which points are known.

    The mask of `Pixels` is rearranged like the pixels, so it stays exact. A latent or a token is
    known where all pixels of its patch are known.

    Args:
        first_stage: The first stage.
        frozen: Its parameters.
        images: Images whose holes are painted over; see `painted_over`.
        masks: True where pixels are known.
    """
    x_0 = first_stage.encode(frozen, images)
    if isinstance(first_stage, Pixels):
        white = jnp.where(masks, jnp.uint8(255), jnp.uint8(0))[..., None]
        mask = first_stage.encode(frozen, jnp.broadcast_to(white, images.shape)) > 0
    else:
        rows, columns = x_0.shape[1:3]
        whole = rearrange(masks, "b (r p) (c q) -> b r c (p q)", r=rows, c=columns).all(axis=-1)
        mask = jnp.broadcast_to(whole.reshape(*whole.shape, *(1,) * (x_0.ndim - 3)), x_0.shape)
    return Known(x_0, mask)


def blend(images: Images, decoded: Images, masks: Masks, width: int) -> Images:
    """Known pixels as they are, and elsewhere decoded pixels, shifted to meet them at the rim.

    With G the mean under a Gaussian window of deviation `width`, m the mask and d the difference
    of image and decoded image, G(m d) / max(G(m), 1/2) is added to the decoded pixels. At a
    straight rim G(m) is one half, and the sum is the local mean of d; it fades to nothing inwards.
    Where the first stage is exact, d is zero and nothing is added.

    Args:
        images: Images, of which only the known pixels are used.
        decoded: Decoded images of the same shape.
        masks: True where pixels are known.
        width: Deviation of the window in pixels.
    """
    known = masks[..., None].astype(jnp.float32)

    def local_mean(x: Float[Array, "batch height width c"]) -> Float[Array, "batch height width c"]:
        rows, columns = (_window(side, width) for side in x.shape[1:3])
        return jnp.einsum("ij,bjkc,lk->bilc", rows, x, columns, precision="highest")

    difference = known * (images.astype(jnp.float32) - decoded)
    shift = local_mean(difference) / jnp.maximum(local_mean(known), 0.5)
    shifted = jnp.round(jnp.clip(decoded + shift, 0, 255)).astype(jnp.uint8)
    return jnp.where(masks[..., None], images, shifted)


def _window(side: int, width: int) -> Float[np.ndarray, "side side"]:
    """For each pixel along a side, Gaussian weights of all pixels, with sum 1; float32."""
    place = np.arange(side)
    weights = np.exp(-0.5 * ((place - place[:, None]) / width) ** 2)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def make_fill(
    model: DiffusionModel, spec: SamplingSpec, mesh: Mesh, report: Report | None = None
) -> Fill:
    """A jitted `(params, frozen, seed, indices, numbers, images, masks, label, tokens) -> images`.

    `indices` are the numbers of the images, and `numbers` those of their fillings. The holes of
    `images`, uint8, are painted over; see `painted_over`. `label` and `tokens` are the arguments of
    `DiffusionModel.encode_condition`. Images are divided over the batch axes of the mesh where
    these divide their number. `make_generate` explains the arguments.
    """
    sampler, guidance = spec.make(model.process), spec.make_guidance()

    def begin(params, frozen, seed, indices, numbers, images, masks, label=None, tokens=None):
        keys = sampling_keys(seed, indices, "inpaint")
        prior, steps = (jax.vmap(jax.random.fold_in)(each, numbers) for each in keys)
        if len(indices) % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0:
            sharding = parallel.batch_sharding(mesh)
            images, masks = jax.lax.with_sharding_constraint((images, masks), (sharding, sharding))
        with divided(mesh, len(indices)):
            known = known_points(model.first_stage, frozen, images, masks)
            condition = model.encode_condition(params, frozen, label=label, tokens=tokens)
        x_T = model.process.prior(prior, known.x_0.shape[1:])
        return Begun(x_T, steps, condition, known, (images, masks))

    def walk(params, begun):
        denoise = model.predictor(params, begun.condition, guidance)
        return sampler.walk(denoise, begun.x_T, begun.rngs, begun.known)

    def end(frozen, begun, points):
        images, masks = begun.kept
        decoded = model.first_stage.decode(frozen, points)
        return blend(images, decoded, masks, images.shape[1] // points.shape[1])

    drawing = Drawing(begin=begin, walk=walk, end=end, mesh=mesh)
    return drawing.in_parts(report) if report else drawing.whole()


def laid_over(
    fitted: Fitted, filling: UInt8[np.ndarray, "height width channels"]
) -> UInt8[np.ndarray, "rows columns channels"]:
    """The photo with a filling enlarged and laid over its hole, and blended in at the rim.

    Args:
        fitted: The photo and its image.
        filling: A filling of the image.

    Returns:
        A photo of the size of the original, whose known pixels are those of the original.
    """
    photo, mask = fitted.photo.image, fitted.photo.mask
    if fitted.placement.is_identity:
        return filling
    pasted = fitted.placement.pasted(filling, photo)
    width = max(1, round(fitted.placement.scale))
    batch = (jnp.asarray(each)[None] for each in (photo, pasted, mask))
    return np.asarray(blend(*batch, width))[0]


def fill_holes(
    fill: Fill,
    trained: TrainedModel,
    holes: Sequence[Hole],
    *,
    seed: int,
    samples: int,
    batch_size: int,
    label: int | Sequence[int] | None = None,
    prompt: str = "",
) -> list[UInt8[np.ndarray, "samples height width channels"]]:
    """Fillings of every hole; the images may differ in size.

    A model with classes gets `label`, or else the image's own class, or else all classes in turn.
    Filling j of image i takes turn i + j. A model that reads captions gets `prompt`.

    Args:
        fill: A function from `make_fill`.
        trained: The model with its parameters.
        holes: The images with their masks.
        seed: Seed of the fillings, in [0, 2^32).
        samples: Number of fillings of each hole.
        batch_size: Fillings at a time.
        label: Class of every image, or several, which fillings take in turn; None for the image's
            own.
        prompt: Caption of every image.

    Raises:
        UserError: The model does not take the size of an image, or does not know its class.
    """
    filling = _Filling(fill, trained, holes, seed, label, prompt)
    jobs = _jobs(holes, samples)
    found = [np.empty((samples, *hole.image.shape), np.uint8) for hole in holes]
    for (index, number), image in filling.of(jobs, min(batch_size, len(jobs))):
        found[index][number] = image
    return found


def fill_holes_to(
    folder: epath.PathLike,
    fill: Fill,
    trained: TrainedModel,
    holes: Sequence[Hole],
    *,
    seed: int,
    samples: int,
    batch_size: int,
    label: int | Sequence[int] | None = None,
    prompt: str = "",
    progress: ProgressLine,
    done: Callable[[int, int, np.ndarray], None] | None = None,
) -> list[UInt8[np.ndarray, "samples height width channels"]]:
    """As `fill_holes`, but continues where an earlier call was interrupted.

    Several processes share the fillings among them, and all but the first get none back.

    Args:
        folder: A folder that all processes see, which keeps the fillings; remove it when they are
            used.
        fill: See `fill_holes`.
        trained: See `fill_holes`.
        holes: See `fill_holes`.
        seed: See `fill_holes`.
        samples: See `fill_holes`.
        batch_size: Fillings at a time, in every process.
        label: See `fill_holes`.
        prompt: See `fill_holes`.
        progress: What logs how many fillings are done.
        done: A function that is called with every filling as soon as it is made: the place of its
            hole in `holes`, its number and its pixels.

    Raises:
        UserError: As for `fill_holes`, or a filling cannot be written.
    """
    folder, jobs = epath.Path(folder), _jobs(holes, samples)
    files = {job: folder / "{:06}_{:06}.npz".format(*job) for job in jobs}
    filling = _Filling(fill, trained, holes, seed, label, prompt)
    missing = share.from_first(lambda: [job for job in jobs if not files[job].exists()])
    mine = share.mine(missing)
    leave_out(progress, len(jobs) - len(mine))
    for job, image in filling.of(mine, min(batch_size, len(jobs)), progress):
        if done:
            done(*job, image)
        images_lib.write_npz(files[job], image[None])
    share.wait_for_all()
    if not share.is_first():
        return []
    return [
        np.concatenate([images_lib.read_npz(files[index, number]) for number in range(samples)])
        for index in range(len(holes))
    ]


def _jobs(holes: Sequence[Hole], samples: int) -> list[tuple[int, int]]:
    """The place of a hole and the number of a filling, for all fillings."""
    return [(index, number) for index in range(len(holes)) for number in range(samples)]


class _Filling:
    """Fills holes; see `fill_holes` for the arguments and the errors."""

    def __init__(
        self,
        fill: Fill,
        trained: TrainedModel,
        holes: Sequence[Hole],
        seed: int,
        label: int | Sequence[int] | None,
        prompt: str,
    ):
        model = trained.model
        self._fill, self._trained, self._holes = fill, trained, holes
        self._seed, self._label, self._prompt = random.as_seed(seed), label, prompt
        _labels(model.num_classes, holes, np.zeros(len(holes), int), label)  # checks early
        for hole in holes:
            model.check_image_size(*hole.mask.shape, hole.name)
        warn_without_known_points(model, holes)

    def of(
        self, jobs: Sequence[tuple[int, int]], size: int, progress: ProgressLine | None = None
    ) -> Iterator[tuple[tuple[int, int], UInt8[np.ndarray, "height width channels"]]]:
        """Yields the fillings of some jobs, each with its job, in batches of `size`."""
        model, by_size = self._trained.model, collections.defaultdict(list)
        for job in jobs:
            by_size[self._holes[job[0]].mask.shape].append(job)
        if progress and jobs:
            progress.compiling()
        batches = (
            same[start : start + size]
            for same in by_size.values()
            for start in range(0, len(same), size)
        )
        for batch in batches:
            if progress:
                progress.batch = len(batch)
            padded = batch + batch[:1] * (size - len(batch))  # one shape, one compilation
            indices, numbers = np.array(padded).T
            chosen = [self._holes[index] for index in indices]
            turns = indices + numbers
            condition = {"label": _labels(model.num_classes, chosen, turns, self._label)}
            if model.text:
                condition["tokens"] = model.tokenizer([self._prompt] * size)
            draws = self._seed, indices, numbers
            filled = _run(self._fill, self._trained, draws, chosen, condition)
            if progress:
                progress.add(len(batch))
            yield from zip(batch, filled, strict=False)


def _run(
    fill: Fill,
    trained: TrainedModel,
    draws: tuple[np.uint32, np.ndarray, np.ndarray],
    holes: Sequence[Hole],
    condition: dict[str, np.ndarray | None],
) -> np.ndarray:
    """The fillings of one batch."""
    images = np.stack([painted_over(hole) for hole in holes])
    masks = np.stack([hole.mask for hole in holes])
    return np.asarray(fill(trained.params, trained.frozen, *draws, images, masks, **condition))


def _labels(
    num_classes: int | None,
    holes: Sequence[Hole],
    turns: np.ndarray,
    label: int | Sequence[int] | None,
) -> np.ndarray | None:
    """The class of every filling, int32, or None for a model without classes."""
    if not num_classes:
        return None
    if label is not None:
        classes = np.atleast_1d(label)
        return classes[turns % len(classes)].astype(np.int32)
    labels = np.array(
        [
            turn % num_classes if hole.label is None else hole.label
            for hole, turn in zip(holes, turns, strict=True)
        ],
        np.int32,
    )
    if labels.max() >= num_classes:
        raise UserError(
            f"images have labels up to {labels.max()}, and the model knows 0 to {num_classes - 1}: "
            "give a label for all of them"
        )
    return labels
