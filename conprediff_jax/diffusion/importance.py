"""Importance sampling of training times, which draws times with a large loss more often.

    p(t) proportional to sqrt(E[L_t^2]),   L = E_{t ~ p}[L_t / (T p(t))]                  (1)

Source: Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models" (arXiv
2102.09672), eq. (18).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from conprediff_jax.diffusion.process import Times

Time = Int[Array, "batch"]

HISTORY = 10  # the number of losses that are kept for every time
UNIFORM_SHARE = 0.001  # the share of uniform draws, so that no weight exceeds 1 / UNIFORM_SHARE


class TimeImportance(NamedTuple):
    """A history of losses, which draws times in proportion to their root mean square loss.

    For continuous time, a "time" here is one of T intervals that are all as probable.

    Its methods are pure functions. They act on the whole batch and only move values, without
    adding them up, so the result has the same bits however the batch is sharded.

    Attributes:
        squares: The last `HISTORY` squared losses of every time, `[T, HISTORY]`, float32.
        counts: The number of losses that every time has had, `[T]`, int32.
    """

    squares: Float[Array, "time history"]
    counts: Int[Array, "time"]

    @classmethod
    def init(cls, num_steps: int) -> "TimeImportance":
        """Returns the history before the first loss."""
        return cls(jnp.zeros((num_steps, HISTORY)), jnp.zeros(num_steps, jnp.int32))

    def probabilities(self) -> Float[Array, "time"]:
        """Returns the probability of every time, uniform until each has had `HISTORY` losses."""
        root = jnp.sqrt(jnp.mean(self.squares, axis=1)) + 1e-10
        # L_0 is a likelihood and has another scale, so the published code takes that of time 1.
        root = root.at[0].set(root[1])
        uniform = 1 / len(root)
        learned = (1 - UNIFORM_SHARE) * root / jnp.sum(root) + UNIFORM_SHARE * uniform
        return jnp.where(jnp.all(self.counts >= HISTORY), learned, uniform)

    def draw(self, rngs: Key[Array, "batch"]) -> Times:
        """Draws a time for every example."""
        p = self.probabilities()
        t = jax.vmap(lambda rng: jax.random.categorical(rng, jnp.log(p)))(rngs)
        return Times(t.astype(jnp.int32), 1 / (len(p) * p[t]))

    def update(self, t: Time, loss: Float[Array, "batch"]) -> "TimeImportance":
        """Returns the history with the losses of a batch, before weighting, added in order."""
        equal = t[:, None] == t[None, :]
        # For every example, the numbers of earlier and later examples with the same time.
        earlier = jnp.sum(jnp.tril(equal, -1), axis=1)
        later = jnp.sum(jnp.triu(equal, 1), axis=1)
        slot = (self.counts[t] + earlier) % HISTORY
        # Of more than HISTORY equal times the last are kept, so that no two share a slot.
        row = jnp.where(later < HISTORY, t, len(self.counts))
        squares = jnp.square(jax.lax.stop_gradient(loss).astype(jnp.float32))
        return TimeImportance(
            self.squares.at[row, slot].set(squares, mode="drop", unique_indices=True),
            self.counts.at[t].add(1),
        )
