"""What the samplers of tokens share."""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from conprediff_jax.common.errors import FieldError
from conprediff_jax.diffusion.samplers.base import Denoise, Known, Walk
from conprediff_jax.diffusion.tokens import LogProbs, TokenProcess, Tokens, truncate


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSampler(abc.ABC):
    """Base of the samplers of tokens, which start from masks.

    Attributes:
        process: The process to invert.
        steps: The number of steps.
        truncation: The share of the probability that `truncate` keeps, in (0, 1]; 1 keeps all.

    Raises:
        ValueError: `truncation` is out of range.
    """

    process: TokenProcess
    steps: int
    truncation: float = 1.0

    def __post_init__(self):
        if not 0 < self.truncation <= 1:
            raise FieldError("truncation", f"is {self.truncation}; it must lie in (0, 1]")

    def sample(
        self,
        denoise: Denoise,
        x_T: Tokens,
        rngs: Key[Array, "batch"],
        known: Known | None = None,
    ) -> Tokens:
        """Runs the reverse process. Call it under `jit`; the network is then compiled once.

        Args:
            denoise: The network, a function from `x_t [batch, *grid]`, int32, and the times
                `t [batch]` of the process to logits of x_0, `[batch, *grid, K]`, with or without
                guidance.
            x_T: The tokens to start from: `process.mask_token` everywhere.
            rngs: One key per example. The result of an example depends on its own key, and not on
                the other examples of the batch.
            known: The tokens that are given, or None.

        Returns:
            Tokens without masks, in the shape of `x_T`, int32. The known ones are `known.x_0`.
        """
        return self.walk(denoise, x_T, rngs, known).whole()

    @abc.abstractmethod
    def walk(
        self,
        denoise: Denoise,
        x_T: Tokens,
        rngs: Key[Array, "batch"],
        known: Known | None = None,
    ) -> Walk:
        """The reverse process step by step; `sample` explains the arguments."""

    def _predict(self, denoise: Denoise, x_t: Tokens, t: Array) -> LogProbs:
        """Returns log p(x_0 | x_t), truncated."""
        log_p = self.process.predict_x0(denoise(x_t, t), x_t, t)
        return truncate(log_p, self.truncation) if self.truncation < 1 else log_p


def step_keys(rngs: Key[Array, "batch"], index: Int[Array, ""]) -> Key[Array, "batch"]:
    """Returns the key of every example for the step of this index."""
    return jax.vmap(lambda rng: jax.random.fold_in(rng, index))(rngs)


def choose(
    rngs: Key[Array, "batch"],
    log_score: Float[Array, "batch *grid"],
    temperature: float | Float[Array, ""],
    eligible: Bool[Array, "batch *grid"],
    counts: Int[Array, "batch"],
) -> Bool[Array, "batch *grid"]:
    """Chooses `counts` eligible tokens of every example, or all of them if there are fewer.

    It adds Gumbel noise to the scores and takes the largest sums. So at temperature 1 it draws
    without replacement in proportion to the scores, and at 0 it takes the largest scores.

    Args:
        rngs: One key per example.
        log_score: The logarithms of the scores.
        temperature: The factor of the noise, at least 0.
        eligible: The tokens to choose from.
        counts: The numbers of tokens to choose.
    """

    def one(rng: Array, log_score: Array, eligible: Array, count: Array) -> Array:
        noisy = log_score + temperature * jax.random.gumbel(rng, log_score.shape)
        noisy = jnp.where(eligible, noisy, -jnp.inf).reshape(-1)
        place = jnp.argsort(jnp.argsort(noisy, descending=True)).reshape(eligible.shape)
        return eligible & (place < count)

    return jax.vmap(one)(rngs, log_score, eligible, counts)
