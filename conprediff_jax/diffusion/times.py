"""Ranges of times: the parts of the contract `Process` that are about time alone.

A process derives from `TableTimes` if its times are the steps of a table, and from
`ContinuousTimes` otherwise. A larger time is noisier in both.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Real

from conprediff_jax.common.keys import fixed
from conprediff_jax.diffusion.importance import TimeImportance
from conprediff_jax.diffusion.process import Time, Times

# The number of intervals of times, all as probable, that importance sampling tells apart.
IMPORTANCE_BINS = 100

# Uniform numbers stay this far from 0 and 1, where some distributions of times are infinite.
_MARGIN = 2.0**-24


class _Unchanged:
    """A network that reads points and times as they are."""

    def network_time(self, t: Time) -> Time:
        """Returns `t`."""
        return t

    def network_input(
        self, x_t: Real[Array, "batch *point"], t: Time
    ) -> Real[Array, "batch *point"]:
        """Returns `x_t`."""
        del t
        return x_t


class TableTimes(_Unchanged):
    """The times 0 .. T-1 of a process with T steps, which training draws uniformly.

    Attributes:
        num_steps: T.
    """

    num_steps: int
    time_dtype = np.int32

    def share(self, t: Time) -> Float[Array, "batch"]:
        """Returns t / T, in [0, 1), float32."""
        return t / self.num_steps

    def time_at(
        self, share: float | Float[np.ndarray, "*shape"]
    ) -> float | Float[np.ndarray, "*shape"]:
        """Returns T times the share, not rounded."""
        return share * self.num_steps

    def evaluated_times(self, count: int) -> Int[np.ndarray, "times"]:
        """Returns `count` times, evenly spaced, or all T if these are fewer."""
        steps = self.num_steps
        if count >= steps:
            return np.arange(steps, dtype=np.int32)
        return np.round((np.arange(count) + 0.5) * steps / count - 0.5).astype(np.int32)

    def init_history(self) -> None:
        """Returns None, since times are uniform."""
        return None

    def sample_time(self, rngs: Key[Array, "batch"], history: None = None) -> Times:
        """Draws a time in 0 .. T-1 for every example, uniformly and with weight 1."""
        del history
        t = jax.vmap(lambda rng: jax.random.randint(rng, (), 0, self.num_steps))(rngs)
        return Times(t, jnp.ones(t.shape))

    def remember(self, history: None, t: Time, loss: Float[Array, "batch"]) -> None:
        """Returns None, since times are uniform."""
        del history, t, loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuousTimes(_Unchanged):
    """Times in an interval, which is [0, 1] if a process does not say otherwise.

    A process with another interval has its own `share` and `time_at`. A process whose training
    times are not uniform has its own `quantile` and `cumulative`.

    Attributes:
        importance: Whether training draws times in proportion to their root mean square loss; see
            `TimeImportance`. The expected loss is the same.
    """

    importance: bool = fixed(False)

    time_dtype = np.float32

    def share(self, t: Time) -> Float[Array, "batch"]:
        """Returns the position of times between the clean end, 0, and the noisy end, 1."""
        return t

    def time_at(
        self, share: float | Float[np.ndarray, "*shape"]
    ) -> float | Float[np.ndarray, "*shape"]:
        """Returns the time at a position in [0, 1]: the inverse of `share`."""
        return share

    def quantile(self, u: Float[Array, "batch"]) -> Float[Array, "batch"]:
        """Returns the training time below which there is a share u of all, in (0, 1)."""
        return u

    def cumulative(self, t: Time) -> Float[Array, "batch"]:
        """Returns the share of training times that are below `t`: the inverse of `quantile`."""
        return t

    def evaluated_times(self, count: int) -> Float[np.ndarray, "times"]:
        """Returns `count` times, float32, whose shares are evenly spaced."""
        return np.asarray(self.time_at((np.arange(count) + 0.5) / count), np.float32)

    def init_history(self) -> TimeImportance | None:
        """Returns a history without losses, or None where times are not drawn by their losses."""
        return TimeImportance.init(IMPORTANCE_BINS) if self.importance else None

    def sample_time(
        self, rngs: Key[Array, "batch"], history: TimeImportance | None = None
    ) -> Times:
        """Draws a time for every example, by its loss if there is a history."""
        if history is None:
            u, weight = jax.vmap(jax.random.uniform)(rngs), jnp.ones(rngs.shape)
        else:
            bin_keys, place_keys = jax.vmap(jax.random.split, out_axes=1)(rngs)
            number, weight = history.draw(bin_keys)
            u = (number + jax.vmap(jax.random.uniform)(place_keys)) / IMPORTANCE_BINS
        return Times(self.quantile(jnp.clip(u, _MARGIN, 1 - _MARGIN)), weight)

    def remember(
        self, history: TimeImportance | None, t: Time, loss: Float[Array, "batch"]
    ) -> TimeImportance | None:
        """Returns the history with the losses of a batch added."""
        if history is None:
            return None
        number = jnp.floor(self.cumulative(t) * IMPORTANCE_BINS).astype(jnp.int32)
        return history.update(jnp.clip(number, 0, IMPORTANCE_BINS - 1), loss)
