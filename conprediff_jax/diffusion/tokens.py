"""What the processes of tokens and their samplers share.

A token is one of K codes, 0 .. K-1, or the mask, which has index K. A network predicts logits of
the codes of the clean tokens x_0; the mask has no logit.
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.keys import derived
from conprediff_jax.diffusion.guidance import LOG_ZERO, Guidance, guided_log_probs

Tokens = Int[Array, "batch *grid"]
LogProbs = Float[Array, "batch *grid codes"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenProcess(abc.ABC):
    """Base of the processes of tokens `[batch, *grid]`, which end in masks.

    Attributes:
        num_codes: K.

    Raises:
        ValueError: `num_codes` is below 1.
    """

    num_codes: int = derived()

    discrete = True

    def __post_init__(self):
        if self.num_codes < 1:
            raise FieldError("num_codes", f"is {self.num_codes}; it must be at least 1")

    @property
    def mask_token(self) -> int:
        """The index of the mask, K. Sampling starts with every token masked."""
        return self.num_codes

    @property
    @abc.abstractmethod
    def prior_divergence(self) -> float:
        """KL(q(x_T | x_0) || p(x_T)) in nats per token: the term of the bound without a network."""

    @abc.abstractmethod
    def as_bound(self) -> "TokenProcess":
        """Returns the same process, whose mean loss over all times is the other terms of the bound.

        The loss is in nats per token.
        """

    def prior(self, rngs: Key[Array, "batch"], shape: tuple[int, ...]) -> Int[Array, "batch *grid"]:
        """Returns masks everywhere, `[batch, *shape]`, int32."""
        return jnp.full((len(rngs), *shape), self.mask_token, jnp.int32)

    def log_probs(self, output: LogProbs) -> LogProbs:
        """Turns logits into log-probabilities, limited to [LOG_ZERO, 0], float32.

        Raises:
            ValueError: There are not K logits.
        """
        if output.shape[-1] != self.num_codes:
            raise ValueError(
                f"output has {output.shape[-1]} logits a token; it must have {self.num_codes}, "
                "the process's num_codes (the mask has no logit)"
            )
        return jnp.clip(jax.nn.log_softmax(output.astype(jnp.float32)), LOG_ZERO, 0.0)

    def guide(self, conditional: LogProbs, unconditional: LogProbs, guidance: Guidance) -> LogProbs:
        """Returns guided log-probabilities of x_0; see `guidance.guided_log_probs`."""
        return guided_log_probs(conditional, unconditional, guidance.scale)


def log_prob_of(log_p: LogProbs, tokens: Tokens) -> Float[Array, "batch *grid"]:
    """Returns the entries of `log_p` for the given codes.

    It sums over codes, since the gradient of an index would be a scatter.
    """
    right = tokens[..., None] == jnp.arange(log_p.shape[-1])
    return jnp.sum(jnp.where(right, log_p, 0.0), axis=-1)


def draw(rngs: Key[Array, "batch"], log_p: LogProbs) -> Tokens:
    """Draws a token at every place, int32.

    The Gumbel noise has two words of random bits. With one, which is JAX's default, it does not
    exceed 16, so that a code of probability 1e-7 would be drawn half as often as it should, and one
    of 1e-8 never. See Zheng et al. 2024 (arXiv 2409.02908).

    Args:
        rngs: One key per example.
        log_p: Log-probabilities, which need not be normalised.
    """

    def one(rng: Array, log_p: Array) -> Array:
        return jax.random.categorical(rng, log_p, mode="high")

    return jax.vmap(one)(rngs, log_p).astype(jnp.int32)


def truncate(log_probs: LogProbs, rate: float) -> LogProbs:
    """Keeps the most probable codes: those for which the more probable codes sum to below `rate`.

    Args:
        log_probs: Log-probabilities.
        rate: The sum of probabilities, in (0, 1]. The most probable code is always kept, and so are
            codes that are as probable as the last one that is kept.

    Returns:
        Log-probabilities, LOG_ZERO for the codes that are left out. They are not normalised again.
    """
    ordered = jnp.flip(jnp.sort(log_probs, axis=-1), axis=-1)
    mass = jnp.cumsum(jnp.exp(ordered), axis=-1)
    before = jnp.pad(mass[..., :-1], [(0, 0)] * (mass.ndim - 1) + [(1, 0)])
    least = jnp.min(jnp.where(before < rate, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(log_probs >= least, log_probs, LOG_ZERO)
