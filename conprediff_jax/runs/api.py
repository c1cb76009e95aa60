"""The Python API: trained models in a notebook.

    import conprediff_jax

    model = conprediff_jax.load("runs/openmoji")
    images = model.sample(16, seed=0, steps=50)             # uint8 [16, height, width, 3]
    circles = model.sample(4, label="circles")              # of a model with classes
    again = model.decode(model.encode(images))
    filled = model.inpaint(images, masks)                   # masks are true where pixels are known

`load` opens a workdir, or a folder that the command `convert` wrote for inference. Every function
is compiled once for each shape and setting.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Shaped, UInt8

from conprediff_jax import parallel
from conprediff_jax.common import random
from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.fields import as_kind
from conprediff_jax.common.images import height_and_width
from conprediff_jax.data.holes import Hole
from conprediff_jax.diffusion.tokens import TokenProcess
from conprediff_jax.runs import restore
from conprediff_jax.runs.classes import Label, Numbers, numbers_of
from conprediff_jax.sampling import inpainting
from conprediff_jax.sampling.autoguidance import guided_by
from conprediff_jax.sampling.drawing import Report, Stage
from conprediff_jax.sampling.generate import (
    Generate,
    conditions_of,
    generate_batches,
    make_generate,
    make_stages,
)
from conprediff_jax.sampling.model import TrainedModel
from conprediff_jax.sampling.spec import SamplingSpec

Images = UInt8[np.ndarray, "count height width channels"]
Points = Shaped[np.ndarray, "count rows columns *channels"]


class Model:
    """A trained denoiser with its first stage, for inference.

    Args:
        trained: The model with its parameters.
        mesh: The devices.
        report: A function that is told how far a batch is; see `make_generate`. None for nobody.

    Attributes:
        trained: All of the following together.
        diffusion: The diffusion model: first stage, process, denoiser and defaults of sampling.
        params: Parameters of the denoiser, on the devices.
        frozen: Parameters that are not trained, such as those of the first stage.
        step: Number of training steps.
    """

    def __init__(
        self, trained: TrainedModel, mesh: jax.sharding.Mesh, report: Report | None = None
    ):
        self.trained = trained
        self.diffusion, self.params, self.frozen, self.step, *_ = trained
        self._mesh, self._report = mesh, report
        self._generate = functools.lru_cache(_PROGRAMS)(self._make_generate)
        self._stages = functools.lru_cache(_PROGRAMS)(self._make_stages)
        self._fill = functools.lru_cache(_PROGRAMS)(self._make_fill)
        self._encode = jax.jit(self.diffusion.first_stage.encode)
        self._decode = jax.jit(self.diffusion.first_stage.decode)

    def __repr__(self) -> str:
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"Model({self.diffusion.describe()}, {size:,} parameters, step {self.step})"

    @property
    def num_classes(self) -> int | None:
        """The number of classes; None for a model without classes."""
        return self.diffusion.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes by number; () if there are no classes, or no names."""
        return self.trained.class_names

    def sample(
        self,
        num: int,
        seed: int = 0,
        label: Label | Sequence[Label] | None = None,
        *,
        first: int = 0,
        prompts: str | Sequence[str] | None = None,
        size: int | Sequence[int] | None = None,
        batch_size: int | None = None,
        **sampling: Any,
    ) -> Images:
        """Draws images. Image i depends only on the seed and i, not on `num` or `first`.

        Args:
            num: Number of images.
            seed: Seed of all images, from 0 to 2^32 - 1.
            label: Class by name or number, or several, which images take in turn; None for all
                classes in turn.
            first: Index of the first image: `sample(1, seed, first=i)` draws image i alone.
            prompts: Captions that images take in turn, for models that read captions; None for
                those of the config.
            size: Pixels of a side, or height and width; None for those of the training data. See
                `config.data.aspect_step` for training on several shapes.
            batch_size: Images per batch; by default all, up to 64.
            **sampling: Fields of the `sampling` section, such as `sampler`, `steps`, `eta` or
                `guidance`; the config sets those that are not given.

        Raises:
            UserError: An argument is out of range, or does not fit the model. In most cases it is a
                FieldError, which names the argument.
        """
        num = as_kind("num", num, _COUNTS)
        batch_size = _batch_size(batch_size, num)
        if size is not None:
            size = height_and_width(as_kind("size", size, int | tuple[int, int]))
        batches = generate_batches(
            self._generate(self.diffusion.sampling_with(**sampling), size),
            self.params,
            self.frozen,
            seed=seed,
            num=num,
            first=first,
            batch_size=batch_size,
            num_classes=self.num_classes,
            label=self._numbers_of(label),
            texts=self._tokens(prompts),
        )
        return np.concatenate(list(batches))

    def stages(
        self,
        count: int = 16,
        seed: int = 0,
        label: Label | Sequence[Label] | None = None,
        *,
        index: int = 0,
        prompts: str | Sequence[str] | None = None,
        **sampling: Any,
    ) -> Iterator[Stage]:
        """Draws one image, and yields it on its way from noise: as it is, and as it is predicted.

        Args:
            count: Number of stages after the noise; there are fewer where the network is called
                less often.
            seed: As for `sample`.
            label: As for `sample`.
            index: Index of the image: the last stage has image `index` of `sample`.
            prompts: As for `sample`.
            **sampling: As for `sample`.

        Raises:
            UserError: As for `sample`.
        """
        count, index = as_kind("count", count, _COUNTS), as_kind("index", index, _INDICES)
        indices = np.array([index])
        given = conditions_of(
            indices, self.num_classes, self._numbers_of(label), self._tokens(prompts)
        )
        stages = self._stages(self.diffusion.sampling_with(**sampling), count)
        return stages(self.params, self.frozen, random.as_seed(seed), indices, *given)

    def inpaint(
        self,
        images: UInt8[Any, "count height width channels"],
        masks: Shaped[Any, "*images height width"],
        seed: int = 0,
        label: Label | Sequence[Label] | None = None,
        *,
        prompt: str = "",
        batch_size: int | None = None,
        **sampling: Any,
    ) -> Images:
        """Fills holes in images; known pixels are returned unchanged, bit for bit.

        A filling depends on the seed, on the image's index in `images`, and on its known pixels. By
        default, continuous models fill by RePaint, which calls the network up to 2,410 times, or
        210 times with `quality="fast"`.

        Args:
            images: Images of any size that the model takes.
            masks: Masks that are true, or not 0, where pixels are known; one for all images, or one
                for each.
            seed: Seed of all fillings, from 0 to 2^32 - 1.
            label: Class by name or number, or several, which images take in turn; None for all
                classes in turn.
            prompt: Caption of all images, for models that read captions.
            batch_size: Images per batch; by default all, up to 64.
            **sampling: Fields of the `sampling` section. With `sampler`, the known part replaces
                its estimate in the steps of this sampler. Without it, continuous models use
                RePaint, and `quality`, `steps`, `jump_length` and `resamplings` are its settings.

        Raises:
            UserError: An argument is out of range or does not fit the model, such as the size of
                an image or a mask. In most cases it is a FieldError, which names the argument.
        """
        images = _checked(images, self.diffusion.channels)
        masks = _checked_masks(masks, images.shape[:3])
        if "num" in sampling:
            raise FieldError("num", "does not fit: every image is filled once")
        pairs = zip(images, masks, strict=True)
        holes = [Hole(f"image {i}", *pair) for i, pair in enumerate(pairs)]
        return self._filled(holes, 1, seed, label, prompt, batch_size, sampling)

    def fillings(
        self,
        hole: Hole,
        num: int,
        seed: int = 0,
        label: Label | Sequence[Label] | None = None,
        *,
        prompt: str = "",
        batch_size: int | None = None,
        **sampling: Any,
    ) -> Images:
        """Fills one hole several times; the first filling is that of `inpaint`.

        Args:
            hole: An image of a size that the model takes, and its mask.
            num: Number of fillings.
            seed: As for `inpaint`.
            label: As for `inpaint`; fillings take several in turn.
            prompt: As for `inpaint`.
            batch_size: Fillings per batch; by default all, up to 64.
            **sampling: As for `inpaint`.

        Raises:
            UserError: As for `inpaint`.
        """
        num = as_kind("num", num, _COUNTS)
        return self._filled([hole], num, seed, label, prompt, batch_size, sampling)

    def _filled(
        self,
        holes: Sequence[Hole],
        samples: int,
        seed: int,
        label: Label | Sequence[Label] | None,
        prompt: str,
        batch_size: int | None,
        sampling: dict[str, Any],
    ) -> Images:
        """The fillings of all holes, one after the other."""
        label = self._numbers_of(label)
        self.diffusion.check_prompts([prompt] if prompt != "" else [], name="prompt")
        filled = inpainting.fill_holes(
            self._fill(inpainting.sampling_for(self.diffusion, **sampling)),
            self.trained,
            holes,
            seed=seed,
            samples=samples,
            batch_size=_batch_size(batch_size, len(holes) * samples),
            label=label,
            prompt=prompt,
        )
        return np.concatenate(filled)

    def encode(self, images: UInt8[Any, "count height width channels"]) -> Points:
        """Encodes uint8 images as the points that are diffused: pixels, latents or tokens.

        Raises:
            FieldError: The argument is not images, or the first stage does not take their size.
        """
        images = _checked(images, self.diffusion.channels)
        unit = self.diffusion.first_stage.downsampling
        if images.shape[1] % unit or images.shape[2] % unit:
            raise FieldError(
                "images", f"has the shape {images.shape}: height and width must divide by {unit}"
            )
        return np.asarray(self._encode(self.frozen, jnp.asarray(images)))

    def decode(self, points: Shaped[Any, "count rows columns *channels"]) -> Images:
        """Decodes points to uint8 images.

        Raises:
            FieldError: The argument is not points of the model: its shape is wrong, a number is not
                finite, or a token is not one of the model's.
        """
        points = _array("points", points)
        form = self.diffusion.point_shape[2:]  # channels; tokens have none
        if points.ndim != 3 + len(form) or points.shape[3:] != form or 0 in points.shape:
            raise FieldError(
                "points",
                f"has the shape {points.shape}: [count, rows, columns"
                f"{''.join(f', {size}' for size in form)}] is expected",
            )
        if isinstance(self.diffusion.process, TokenProcess):
            codes = self.diffusion.process.num_codes
            if points.dtype.kind not in "iu" or points.min() < 0 or points.max() >= codes:
                raise FieldError("points", f"must hold tokens, whole numbers from 0 to {codes - 1}")
        if not np.isfinite(points.astype(np.float32)).all():
            raise FieldError("points", "holds values that are not finite")
        return np.asarray(self._decode(self.frozen, jnp.asarray(points)))

    def _numbers_of(self, label: Label | Sequence[Label] | None) -> Numbers:
        return numbers_of(label, self.class_names, self.num_classes)

    def _tokens(self, prompts: Any) -> np.ndarray | None:
        """Token ids of the captions that images take in turn; None for a model without captions."""
        given = [prompts] if isinstance(prompts, str) else prompts
        if given is not None:
            if not isinstance(given, Sequence) or not given:
                raise FieldError("prompts", f"is {given!r}: it must be a text, or a list of texts")
            self.diffusion.check_prompts(given)
        if self.diffusion.text is None:
            return None
        return self.diffusion.tokenizer(given or self.diffusion.text.prompts)

    def _make_generate(self, spec: SamplingSpec, size: tuple[int, int] | None) -> Generate:
        model = self.diffusion.of_size(*size) if size else self.diffusion
        return make_generate(model, spec, self._mesh, self._report)

    def _make_stages(self, spec: SamplingSpec, count: int) -> Callable[..., Iterator[Stage]]:
        return make_stages(self.diffusion, spec, self._mesh, count)

    def _make_fill(self, spec: SamplingSpec) -> inpainting.Fill:
        return inpainting.make_fill(self.diffusion, spec, self._mesh, self._report)


_COUNTS = range(1, 2**31)
_INDICES = range(2**31 - 1)
_PROGRAMS = 16  # settings of sampling whose programs are kept, of those that were used last


def _batch_size(given: Any, num: int) -> int:
    return min(num, 64 if given is None else as_kind("batch_size", given, _COUNTS))


def _array(name: str, value: Any) -> np.ndarray:
    """The value as an array. Raises FieldError if it is not an array of numbers."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise FieldError(name, "is no array: its parts have several shapes") from None
    if array.dtype.kind not in "biuf" and array.dtype != jnp.bfloat16:
        raise FieldError(name, f"holds {array.dtype}: numbers are expected")
    return array


def _checked(images: Any, channels: int) -> Images:
    """The images as an array. Raises FieldError if it is not a batch of uint8 images."""
    images = _array("images", images)
    fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == channels
    if not fits or not images.size:
        raise FieldError(
            "images",
            f"is {images.dtype} of shape {images.shape}: uint8, 0 to 255, of shape [count, height, "
            f"width, {channels}] is expected, and at least one pixel",
        )
    return images


def _checked_masks(masks: Any, shape: tuple[int, int, int]) -> Bool[np.ndarray, "count h w"]:
    """One mask for each image. Raises FieldError if the masks do not fit the images."""
    masks = _array("masks", masks)
    if masks.shape not in (shape, shape[1:]):
        raise FieldError(
            "masks", f"has the shape {masks.shape}: {shape} or {shape[1:]} is expected"
        )
    if np.isnan(masks).any():
        raise FieldError("masks", "holds NaN, which says neither known nor unknown")
    return np.broadcast_to(masks.astype(bool), shape)


def load(
    path: str | os.PathLike,
    step: int | None = None,
    *,
    average: float | None = None,
    guide: Model | None = None,
) -> Model:
    """Opens a trained model.

    Args:
        path: Workdir of a training run, or a folder for inference.
        step: Step of the checkpoint; None for the newest readable one.
        average: Relative deviation of the power-function average that is used, for runs that keep
            such averages (`config.train.power_averages`); None for the moving average.
        guide: A worse model, as this function returns it, which guides this one (autoguidance):
            `guidance` is the scale of its guidance then. None for no guide.

    Raises:
        UserError: There is no such checkpoint or average, the checkpoint holds a first stage, or
            the guide does not fit the model.
    """
    if step is not None:
        step = as_kind("step", step, range(2**31))
    if average is not None:
        average = as_kind("average", average, float)
    mesh = parallel.make_mesh(parallel.MeshSpec())
    trained = restore.load(os.fspath(path), mesh, step, average)
    if guide is not None:
        trained = guided_by(trained, guide.trained, repr(guide))
    return Model(trained, mesh)
