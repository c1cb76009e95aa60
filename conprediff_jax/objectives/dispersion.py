"""Dispersive regularisation: features of different examples are driven apart.

    L = log mean_jk exp(-|h_j - h_k|^2 / (D tau))                                           (1)

The mean is over all pairs of the batch, each example with itself included, and D is the number of
features of an example. There are no parameters and no targets. Source: Wang and He 2025, "Diffuse
and Disperse" (arXiv 2506.09027), the variant with squared distances.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from conprediff_jax.common.fields import require
from conprediff_jax.objectives.term import TERMS, Evaluated, Seen, Term


@TERMS.register("dispersion")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dispersion(Term):
    """Dispersion of features, equation (1). With microbatches, pairs are those of a microbatch.

    Attributes:
        tap: The name of the features.
        temperature: tau of equation (1).
    """

    tap: str = "output"
    temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        require(self, lambda tau: tau > 0, "be positive", "temperature")

    @property
    def taps(self) -> tuple[str, ...]:
        """The tap."""
        return (self.tap,)

    def init_params(self, rng: Key[Array, ""], shapes: Seen) -> Any:
        """Returns no parameters."""
        del rng, shapes
        return {}

    def evaluate(self, params: Any, seen: Seen) -> Evaluated:
        """Returns (1), which is the same for every example of the batch."""
        del params
        h = seen.taps[self.tap].astype(jnp.float32)
        h = h.reshape(len(h), -1)
        squares = jnp.square(h).sum(1)
        product = jnp.matmul(h, h.T, precision=jax.lax.Precision.HIGHEST)
        # Rounding must not make a distance negative, and an example is at no distance from itself.
        squared = jnp.maximum(squares[:, None] + squares[None] - 2 * product, 0.0)
        squared *= 1 - jnp.eye(len(h))
        exponents = -squared / (h.shape[1] * self.temperature)
        dispersion = jax.nn.logsumexp(exponents) - jnp.log(exponents.size)
        return self.mean_distance(jnp.broadcast_to(dispersion, len(h)), seen)
