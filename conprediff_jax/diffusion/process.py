"""The contract that continuous and discrete diffusion processes keep.

A process corrupts clean data `x_0` to `x_t` at a time `t` in 0 .. T-1, and compares the output of a
network for `x_t` with what it should have been. It knows no network: `output` is the array that the
network returned. Training and `DiffusionModel` use only the methods of `Process`; a sampler knows
one kind of process.

A process may draw times with a large loss more often. For this it keeps a `history` of losses, a
tree of arrays that the trainer stores. The history is None where times are uniform.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from conprediff_jax.common.registry import Registry
from conprediff_jax.diffusion.guidance import Guidance


class Times(NamedTuple):
    """The training times of a batch.

    Attributes:
        t: Times in 0 .. T-1, int32.
        weight: 1 / (T p(t)), float32. With these weights the expected loss is that of uniform
            times.
    """

    t: Int[Array, "batch"]
    weight: Float[Array, "batch"]


class Corrupted(NamedTuple):
    """Corrupted data.

    Attributes:
        x_t: The corrupted data, in the shape of `x_0`.
        noise: The random numbers of the corruption, as far as the loss needs them.
    """

    x_t: Array
    noise: Array


@runtime_checkable
class Process(Protocol):
    """A forward process with T = `num_steps` steps, and the loss that trains its inversion.

    Every random draw takes one key per example, so that it does not depend on how a batch is split.
    The fields of a process are the keys of the `process` section of a config; `num_codes` and
    `dtype` may be derived from other sections.

    Attributes:
        num_steps: T, the number of steps.
        discrete: Whether the data are tokens.
    """

    num_steps: int
    discrete: bool

    def init_history(self) -> Any:
        """Returns the history before the first loss."""
        ...

    def sample_time(self, rngs: Key[Array, "batch"], history: Any = None) -> Times:
        """Draws a training time for every example."""
        ...

    def remember(self, history: Any, t: Int[Array, "batch"], loss: Float[Array, "batch"]) -> Any:
        """Returns the history with the losses of a batch, before weighting, added."""
        ...

    def prior(self, rngs: Key[Array, "batch"], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        """Draws x_T, from which sampling starts, `[batch, *shape]`."""
        ...

    def corrupt(
        self, rngs: Key[Array, "batch"], x_0: Shaped[Array, "batch *point"], t: Int[Array, "batch"]
    ) -> Corrupted:
        """Draws `x_t` given `x_0`."""
        ...

    def loss(
        self,
        output: Shaped[Array, "batch *prediction"],
        x_0: Shaped[Array, "batch *point"],
        x_t: Shaped[Array, "batch *point"],
        noise: Shaped[Array, "..."],
        t: Int[Array, "batch"],
    ) -> Float[Array, "batch"]:
        """Returns the denoising loss of every example, float32."""
        ...

    def predict_x0(
        self,
        output: Shaped[Array, "batch *prediction"],
        x_t: Shaped[Array, "batch *point"],
        t: Int[Array, "batch"],
    ) -> Shaped[Array, "batch *estimate"]:
        """Converts the network's output into an estimate of the clean data."""
        ...

    def guide(
        self,
        conditional: Shaped[Array, "batch *prediction"],
        unconditional: Shaped[Array, "batch *prediction"],
        guidance: Guidance,
    ) -> Shaped[Array, "batch *prediction"]:
        """Combines the outputs with and without the condition by classifier-free guidance."""
        ...

    def alpha_bar(self, t: Int[Array, "batch"]) -> Float[Array, "batch"]:
        """Returns the share of the signal that is kept at `t`, in [0, 1], float32."""
        ...


PROCESSES: Registry[type] = Registry("process")


def uniform_times(rngs: Key[Array, "batch"], num_steps: int) -> Times:
    """Draws a time in 0 .. T-1 for every example, uniformly and with weight 1."""
    t = jax.vmap(lambda rng: jax.random.randint(rng, (), 0, num_steps))(rngs)
    return Times(t, jnp.ones(t.shape))
