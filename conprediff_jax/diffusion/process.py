"""What continuous and discrete diffusion have in common.

A process takes clean data `x_0` to corrupted data `x_t` at a time `t` in 0 .. T-1, and says what a
network that saw `x_t` should have answered. It knows no network: `output` is whatever array the
network returned. The trainer, the samplers and the context loss speak to a process through these
five methods only.
"""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, Key, Shaped


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
    """

    num_steps: int

    def sample_time(self, rngs: Key[Array, "batch"]) -> Int[Array, "batch"]:
        """Draws a training time in 0 .. T-1 for every example."""
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

    def alpha_bar(self, t: Int[Array, "batch"]) -> Float[Array, "batch"]:
        """The share of the signal kept at `t`, in [0, 1], float32."""
        ...
