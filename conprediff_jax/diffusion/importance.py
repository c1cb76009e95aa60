"""Training at the times that matter: importance sampling of t.

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

HISTORY = 10  # losses remembered of every time
UNIFORM_SHARE = 0.001  # of the draws, so that no weight exceeds 1 / UNIFORM_SHARE


class TimeImportance(NamedTuple):
    """Times drawn in proportion to the root mean square of their last losses.

    A state and its pure functions. They act on the whole batch and move values without adding
    them up, so they give the same bits however the batch is sharded.

    Attributes:
        squares: Squared losses, the last `HISTORY` of every time, `[T, HISTORY]`, float32.
        counts: How many losses every time has had, `[T]`, int32.
    """

    squares: Float[Array, "time history"]
    counts: Int[Array, "time"]

    @classmethod
    def init(cls, num_steps: int) -> "TimeImportance":
        """The state before any loss is known."""
        return cls(jnp.zeros((num_steps, HISTORY)), jnp.zeros(num_steps, jnp.int32))

    def probabilities(self) -> Float[Array, "time"]:
        """The chance of every time: uniform until each has had `HISTORY` losses."""
        root = jnp.sqrt(jnp.mean(self.squares, axis=1)) + 1e-10
        root = root.at[0].set(root[1])  # L_0 is a likelihood, on another scale; as published
        uniform = 1 / len(root)
        learned = (1 - UNIFORM_SHARE) * root / jnp.sum(root) + UNIFORM_SHARE * uniform
        return jnp.where(jnp.all(self.counts >= HISTORY), learned, uniform)

    def draw(self, rngs: Key[Array, "batch"]) -> Times:
        """Draws a time for every example."""
        p = self.probabilities()
        t = jax.vmap(lambda rng: jax.random.categorical(rng, jnp.log(p)))(rngs)
        return Times(t.astype(jnp.int32), 1 / (len(p) * p[t]))

    def update(self, t: Time, loss: Float[Array, "batch"]) -> "TimeImportance":
        """Remembers the losses, not yet weighted, of a batch of examples, in their order."""
        equal = t[:, None] == t[None, :]
        earlier = jnp.sum(jnp.tril(equal, -1), axis=1)  # examples of the same time, before
        later = jnp.sum(jnp.triu(equal, 1), axis=1)
        slot = (self.counts[t] + earlier) % HISTORY
        # Of more than HISTORY equal times the last are kept: two never go to one slot.
        row = jnp.where(later < HISTORY, t, len(self.counts))
        squares = jnp.square(jax.lax.stop_gradient(loss).astype(jnp.float32))
        return TimeImportance(
            self.squares.at[row, slot].set(squares, mode="drop", unique_indices=True),
            self.counts.at[t].add(1),
        )
