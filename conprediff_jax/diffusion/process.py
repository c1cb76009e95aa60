"""The contract that continuous and discrete diffusion processes keep.

A process corrupts clean data `x_0` to `x_t` at a time `t`, and compares the output of a network for
`x_t` with what it should have been. It knows no network: `output` is the array that the network
returned. Training and `DiffusionModel` use only the methods of `Process`; a sampler knows one kind
of process.

Time has one direction in the whole project: a larger t is noisier. Where other projects count from
noise to data, their times are turned around at the door. The range of times is the process's own:
0 .. T-1 for a process of T steps, [0, 1] for flow matching, noise levels for EDM. `share` maps
every range to [0, 1], and `time_at` maps back. `times.TableTimes` and `times.ContinuousTimes` are
base classes with the methods about time.

A process may draw times with a large loss more often. For this it keeps a `history` of losses, a
tree of arrays that the trainer stores. The history is None where times are uniform.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Key, Real, Shaped

from conprediff_jax.common.registry import Registry
from conprediff_jax.diffusion.guidance import Guidance

Time = Real[Array, "batch"]


class Times(NamedTuple):
    """The training times of a batch.

    Attributes:
        t: Times, in the process's `time_dtype`.
        weight: q(t) / p(t), float32, where times are drawn with probability (density) p, and the
            loss is defined as a mean over q. For a process of T steps q is 1 / T.
    """

    t: Time
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
    """A forward process, and the loss that trains its inversion.

    Every random draw takes one key per example, so that it does not depend on how a batch is split.
    The fields of a process are the keys of the `process` section of a config; `num_codes` and
    `dtype` may be derived from other sections.

    Attributes:
        discrete: Whether the data are tokens.
        time_dtype: The dtype of times: int32 for the steps of a table, float32 for continuous time.
    """

    discrete: bool
    time_dtype: type

    def share(self, t: Time) -> Float[Array, "batch"]:
        """Returns the position of times between the clean end, 0, and the noisy end, 1, float32."""
        ...

    def time_at(self, share: Any) -> Any:
        """Returns the time at a position in [0, 1]: the inverse of `share`, not rounded.

        Args:
            share: A number or a NumPy array. The result is of the same kind.
        """
        ...

    def evaluated_times(self, count: int) -> Real[np.ndarray, "times"]:
        """Returns the times at which a loss on held-out data is computed, in `time_dtype`.

        Args:
            count: The number of times. A process whose losses add up to a bound takes all of its
                times instead.
        """
        ...

    def network_time(self, t: Time) -> Time:
        """Returns the number that the network reads in the place of `t`."""
        ...

    def network_input(self, x_t: Shaped[Array, "batch *point"], t: Time) -> Array:
        """Returns the points that the network reads in the place of `x_t`, in the same shape."""
        ...

    def init_history(self) -> Any:
        """Returns the history before the first loss."""
        ...

    def sample_time(self, rngs: Key[Array, "batch"], history: Any = None) -> Times:
        """Draws a training time for every example."""
        ...

    def remember(self, history: Any, t: Time, loss: Float[Array, "batch"]) -> Any:
        """Returns the history with the losses of a batch, before weighting, added."""
        ...

    def prior(self, rngs: Key[Array, "batch"], shape: tuple[int, ...]) -> Shaped[Array, "..."]:
        """Draws x_T, from which sampling starts, `[batch, *shape]`."""
        ...

    def corrupt(
        self, rngs: Key[Array, "batch"], x_0: Shaped[Array, "batch *point"], t: Time
    ) -> Corrupted:
        """Draws `x_t` given `x_0`."""
        ...

    def loss(
        self,
        output: Shaped[Array, "batch *prediction"],
        x_0: Shaped[Array, "batch *point"],
        x_t: Shaped[Array, "batch *point"],
        noise: Shaped[Array, "..."],
        t: Time,
    ) -> Float[Array, "batch"]:
        """Returns the denoising loss of every example, float32."""
        ...

    def predict_x0(
        self,
        output: Shaped[Array, "batch *prediction"],
        x_t: Shaped[Array, "batch *point"],
        t: Time,
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

    def alpha_bar(self, t: Time) -> Float[Array, "batch"]:
        """Returns the share of the signal that is kept at `t`, in [0, 1], float32."""
        ...


PROCESSES: Registry[type] = Registry("process")
