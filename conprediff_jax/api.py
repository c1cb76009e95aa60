"""Trained models in a notebook.

    import conprediff_jax

    model = conprediff_jax.load("runs/openmoji")
    images = model.sample(16, seed=0, steps=50)             # uint8 [16, height, width, 3]
    again = model.decode(model.encode(images))
    filled = model.inpaint(images, masks)                   # of masks that are true where known

`load` opens a workdir, or a folder that `convert` wrote with `--to=inference` or `import`. Every
function is compiled once for each shape and setting.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped, UInt8

from conprediff_jax import inference, inpainting, parallel
from conprediff_jax.data.holes import Hole
from conprediff_jax.errors import UserError
from conprediff_jax.sampling import Generate, SamplingSpec, generate_batches, make_generate

Images = UInt8[np.ndarray, "count height width 3"]
Points = Shaped[np.ndarray, "count rows columns *channels"]


class Model:
    """A trained denoiser with its first stage, for inference.

    Attributes:
        task: what its config describes: first stage, process, denoiser, sampling.
        params: the denoiser's parameters, on the devices.
        frozen: the first stage's.
        step: training steps behind them.
    """

    def __init__(self, trained: inference.Trained, mesh: jax.sharding.Mesh):
        self.task, self.params, self.frozen, self.step = trained
        self._mesh = mesh
        self._generate = functools.cache(self._make_generate)
        self._fill = functools.cache(self._make_fill)
        self._encode = jax.jit(self.task.first_stage.encode)
        self._decode = jax.jit(self.task.first_stage.decode)

    def __repr__(self) -> str:
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"Model({self.task.describe()}, {size:,} parameters, step {self.step})"

    @property
    def num_classes(self) -> int | None:
        """Classes of the model; None where it has none."""
        return self.task.num_classes

    def sample(
        self,
        num: int,
        seed: int = 0,
        label: int | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        batch_size: int | None = None,
        **sampling: Any,
    ) -> Images:
        """Draws images. Image i is a function of the seed and i, whatever `num`.

        Args:
            num: how many.
            seed: of all of them.
            label: class of every image; all classes in turn when None. For models with classes.
            prompts: captions, taken in turn; those of the config when None. For models that read
                captions.
            batch_size: images at a time; by default all, up to 64.
            **sampling: fields of the model's `sampling` section, such as `sampler`, `steps`, `eta`
                or `guidance`; those of its config where they are not given.

        Raises:
            UserError: a setting does not fit the model.
        """
        if num < 1:
            raise UserError(f"num is {num}: it must be at least 1")
        given = [prompts] if isinstance(prompts, str) else list(prompts or ())
        self._check(label, given)
        spec = self.task.sampling.overridden(self.task, **sampling)
        batches = generate_batches(
            self._generate(spec),
            self.params,
            self.frozen,
            seed=seed,
            num=num,
            batch_size=batch_size or min(num, 64),
            num_classes=self.num_classes,
            label=label,
            texts=self._tokens(given, num),
        )
        return np.concatenate(list(batches))

    def inpaint(
        self,
        images: UInt8[Any, "count height width 3"],
        masks: Shaped[Any, "*images height width"],
        seed: int = 0,
        label: int | None = None,
        *,
        prompt: str = "",
        batch_size: int | None = None,
        **sampling: Any,
    ) -> Images:
        """Fills holes; what is known comes back as it went in, bit for bit.

        A filling depends on the seed, on the image's place among `images`, and on what is known of
        it. By default continuous models fill by RePaint, which calls the network up to 2,410 times.

        Args:
            images: of any size that the model takes.
            masks: true, or not 0, where pixels are known; one for all images, or one for each.
            seed: of all fillings.
            label: class of every image; all classes in turn when None. For models with classes.
            prompt: caption of every image. For models that read captions.
            batch_size: images at a time; by default all, up to 64.
            **sampling: fields of the model's `sampling` section; with `sampler` the known part is
                replaced in its steps, without it `steps`, `jump_length` and `resamplings` are
                RePaint's.

        Raises:
            UserError: a setting does not fit the model, nor does the size of an image or a mask.
        """
        images, masks = _checked(images), np.asarray(masks).astype(bool)
        if masks.shape[-2:] != images.shape[1:3] or masks.shape[:-2] not in ((), (len(images),)):
            raise UserError(
                f"masks are of shape {masks.shape}: {images.shape[:3]} or {images.shape[1:3]} is "
                "expected"
            )
        self._check(label, [prompt] if prompt else [])
        masks = np.broadcast_to(masks, images.shape[:3])
        spec = inpainting.sampling_for(self.task, **sampling)
        filled = inpainting.fill_holes(
            self._fill(spec),
            inference.Trained(self.task, self.params, self.frozen, self.step),
            [Hole(f"image {i}", *pair) for i, pair in enumerate(zip(images, masks, strict=True))],
            seed=seed,
            samples=1,
            batch_size=batch_size or min(len(images), 64),
            label=label,
            prompt=prompt,
        )
        return np.concatenate(filled)

    def _check(self, label: int | None, prompts: Sequence[str]) -> None:
        """Raises UserError where the model does not know a class, or cannot read a caption."""
        if label is not None and not 0 <= label < (self.num_classes or 0):
            known = f"0 to {self.num_classes - 1}" if self.num_classes else "no classes"
            raise UserError(f"label is {label}: the model knows {known}")
        if prompts and self.task.text is None:
            raise UserError(f"prompts is {list(prompts)}: the model reads no captions")
        for prompt in prompts:
            self.task.tokenizer.check(prompt)

    def _tokens(self, prompts: Sequence[str], num: int) -> np.ndarray | None:
        """Token ids of the caption of every image; None for a model that reads none."""
        if self.task.text is None:
            return None
        return self.task.tokenizer(self.task.text.in_turn(num, prompts))

    def encode(self, images: UInt8[Any, "count height width 3"]) -> Points:
        """From uint8 images to the points that are diffused: pixels, latents or tokens."""
        return np.asarray(self._encode(self.frozen, jnp.asarray(_checked(images))))

    def decode(self, points: Shaped[Any, "count rows columns *channels"]) -> Images:
        """From points to uint8 images."""
        return np.asarray(self._decode(self.frozen, jnp.asarray(points)))

    def _make_generate(self, spec: SamplingSpec) -> Generate:
        return make_generate(self.task, spec, self._mesh)

    def _make_fill(self, spec: SamplingSpec) -> inpainting.Fill:
        return inpainting.make_fill(self.task, spec, self._mesh)


def _checked(images: Any) -> Images:
    """Raises UserError for what is no batch of uint8 images, such as floats in [0, 1]."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(
            f"images are {images.dtype} of shape {images.shape}: uint8, 0 to 255, of shape [count, "
            "height, width, 3] is expected"
        )
    return images


def load(path: str, step: int | None = None) -> Model:
    """Opens a model.

    Args:
        path: a workdir, or a folder of a model for use.
        step: which checkpoint; the newest readable one when None.

    Raises:
        UserError: there is none, or it is of a first stage.
    """
    mesh = parallel.make_mesh(parallel.MeshSpec())
    return Model(inference.load_denoiser(path, mesh, step), mesh)
