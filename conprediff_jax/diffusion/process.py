"""What continuous and discrete diffusion have in common.

A process takes clean data `x_0` to corrupted data `x_t` at a time `t` in 0 .. T-1, and says what a
network that saw `x_t` should have answered. It knows no network: `output` is whatever array the
network returned. The trainer, the samplers and the context loss speak to a process through these
methods only.

A process may prefer times at which the loss is large. What it remembers of past losses, its
`history`, is a tree of arrays that the trainer keeps; None where times are uniform.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from conprediff_jax.common.registry import Registry
from conprediff_jax.diffusion.guidance import Guidance


class Times(NamedTuple):
    """Training times.

    Attributes:
        t: In 0 .. T-1, int32.
        weight: 1 / (T p(t)), float32: what makes the mean of weighted losses that of uniform times.
    """

    t: Int[Array, "batch"]
    weight: Float[Array, "batch"]


class Corrupted(NamedTuple):
    """Corrupted data.

    Attributes:
        x_t: The corrupted data, of the shape of `x_0`.
        noise: What the corruption drew, as far as the loss needs it.
    """

    x_t: Array
    noise: Array


@runtime_checkable
class Process(Protocol):
    """A forward process with T = `num_steps` steps, and the loss that inverts it.

    Every random draw takes one key per example, so that it does not depend on how a batch is split.
    Its fields are the `process` section; `num_codes` and `dtype` may be derived.

    Attributes:
        num_steps: T.
        discrete: Whether the data are tokens.
    """

    num_steps: int
    discrete: bool

    def init_history(self) -> Any:
        """The history before any loss is known."""
        ...

    def sample_time(self, rngs: Key[Array, "batch"], history: Any = None) -> Times:
        """Draws a training time for every example."""
        ...

    def remember(self, history: Any, t: Int[Array, "batch"], loss: Float[Array, "batch"]) -> Any:
        """The history after a whole batch of losses, not yet weighted."""
        ...

    def prior(self, rngs: Key[Array, "batch"], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        """Draws what sampling starts from, `[batch, *shape]`, `shape` being that of one example."""
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
        """The denoising loss of every example, float32."""
        ...

    def predict_x0(
        self,
        output: Shaped[Array, "batch *prediction"],
        x_t: Shaped[Array, "batch *point"],
        t: Int[Array, "batch"],
    ) -> Shaped[Array, "batch *estimate"]:
        """The estimate of the clean data that a network's output amounts to."""
        ...

    def guide(
        self,
        conditional: Shaped[Array, "batch *prediction"],
        unconditional: Shaped[Array, "batch *prediction"],
        guidance: Guidance,
    ) -> Shaped[Array, "batch *prediction"]:
        """Classifier-free guidance: one output made of those with and without the condition."""
        ...

    def alpha_bar(self, t: Int[Array, "batch"]) -> Float[Array, "batch"]:
        """The share of the signal kept at `t`, in [0, 1], float32."""
        ...


PROCESSES: Registry[type] = Registry("process")


def uniform_times(rngs: Key[Array, "batch"], num_steps: int) -> Times:
    """A time uniform on 0 .. T-1 for every example, of weight 1."""
    t = jax.vmap(lambda rng: jax.random.randint(rng, (), 0, num_steps))(rngs)
    return Times(t, jnp.ones(t.shape))
