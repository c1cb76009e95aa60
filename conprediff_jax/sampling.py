"""From a trained denoiser to images: one jitted program a batch size.

An image is a function of the parameters, the seed and its index, whatever batch or number of
devices it is sampled with. The context decoder is no argument of anything here.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from conprediff_jax import parallel, random
from conprediff_jax.diffusion.samplers import SAMPLERS
from conprediff_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingSpec:
    """The `sampling` section: how the grids of a run, and `sample.py` by default, are made.

    Attributes:
        sampler: a key of `diffusion.samplers.SAMPLERS`.
        steps: steps, each one call of the denoiser.
        spacing: which times are visited: 'leading', 'trailing' or 'linspace'.
        steps_offset: added to the times of 'leading'; 1 for the original latent diffusion.
        final: alpha_bar at the end of DDIM: 'one', or 'first' for the original latent diffusion.
        eta: noise of DDIM, 0 for none to 1.
        clip: limit of the estimated clean points, [-clip, clip]; 0 for none.
        num: images of a grid.
    """

    sampler: str = "ddim"
    steps: int = 50
    spacing: str = "trailing"
    steps_offset: int = 0
    final: str = "one"
    eta: float = 0.0
    clip: float = 1.0
    num: int = 64

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}: choose one of {tuple(SAMPLERS)}")
        if self.num < 1:
            raise ValueError(f"num is {self.num}: it must be at least 1")

    def make(self, process: Any) -> Any:
        """The sampler for a process.

        Raises:
            ValueError: steps, spacing, eta or clip are out of range.
        """
        ddim = {"eta": self.eta, "final_alpha_bar": self.final}
        options = ddim if self.sampler == "ddim" else {}
        return SAMPLERS[self.sampler](
            process=process,
            steps=self.steps,
            spacing=self.spacing,
            steps_offset=self.steps_offset,
            clip=self.clip or None,
            **options,
        )

    def overridden(self, process: Any, **flags: Any) -> "SamplingSpec":
        """These settings with those of a command's flags that are not None.

        Raises:
            UserError: a flag does not fit the process; the message names it.
        """
        given = {name: value for name, value in flags.items() if value is not None}
        try:
            spec = dataclasses.replace(self, **given)
            spec.make(process)
        except ValueError as error:
            raise UserError(f"--{error}") from error
        return spec


Generate = Callable[..., UInt8[Array, "..."]]


def make_generate(task: Any, sampler: Any, mesh: Mesh) -> Generate:
    """A jitted `(params, frozen, seed, indices, labels) -> uint8 images [batch, h, w, 3]`.

    `labels` is None for a model without classes. Images are divided over the mesh's batch axes
    where their number allows it.
    """

    @functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))
    def generate(params, frozen, seed, indices, labels=None):
        prior = random.example_keys(random.stream(seed, "sample/prior"), indices)
        steps = random.example_keys(random.stream(seed, "sample/steps"), indices)
        x_T = jax.vmap(lambda rng: jax.random.normal(rng, task.point_shape))(prior)
        if len(indices) % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0:
            x_T = jax.lax.with_sharding_constraint(x_T, parallel.batch_sharding(mesh))

        def denoise(x_t, t):
            return task.denoise(params, x_t, t, label=labels).output

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
    num_classes: int | None = None,
    label: int | None = None,
) -> Iterator[np.ndarray]:
    """Images 0 to num - 1 in batches of one size; what the last one has too much is dropped.

    A model with classes gets `label` for every image, or takes all classes in turn when it is None.
    """
    for start in range(0, num, batch_size):
        indices = jnp.arange(start, start + batch_size)
        labels = None
        if num_classes:
            labels = indices % num_classes if label is None else jnp.full_like(indices, label)
        yield np.asarray(generate(params, frozen, seed, indices, labels))[: num - start]
