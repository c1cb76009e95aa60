"""Own-point prediction: a head inside the denoiser predicts the clean point itself.

    L = mean_i mean_c r(head(h_i, t)_c - x_0,ic),     r(d) = d^2 / 2 if |d| < 1, else |d| - 1/2  (1)

It answers whether the distribution of the *neighbourhood* helps, or any prediction from inside.
Source: SRA 2 (2026), where the head of an early block of a diffusion transformer predicts the clean
latents, with a smooth L1 distance. Here the head reads the diffusion time, as context decoders do.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from conprediff_jax.common.fields import require
from conprediff_jax.context.transport import COSTS
from conprediff_jax.context.weighting import check_choices, fixed
from conprediff_jax.objectives.heads import Head, resized
from conprediff_jax.objectives.term import TERMS, Evaluated, Seen, Term


@TERMS.register("own_point")
@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnPoint(Term):
    """Own-point prediction, equation (1).

    Attributes:
        tap: The name of the features that the head reads.
        cost: The distance in one channel: 'smooth_l1' or 'squared'.
        hidden: The width of the head.
        depth: The number of hidden layers of the head.
        kernel: The side of the window of cells that its first layer reads, an odd number.
    """

    tap: str = fixed("output")
    cost: str = "smooth_l1"
    hidden: int = fixed(128)
    depth: int = fixed(1)
    kernel: int = fixed(1)

    def __post_init__(self):
        super().__post_init__()
        check_choices(self, cost=tuple(COSTS))
        require(self, lambda n: n >= 1, "be at least 1", "hidden", "depth")
        require(self, lambda n: n % 2 == 1, "be odd and positive", "kernel")

    @property
    def taps(self) -> tuple[str, ...]:
        """The tap."""
        return (self.tap,)

    def _head(self, channels: int) -> Head:
        return Head(channels, self.hidden, self.depth, self.kernel, self.dtype)

    def init_params(self, rng: Key[Array, ""], shapes: Seen) -> Any:
        """Returns initial parameters of the head."""
        head, h = self._head(shapes.points.shape[-1]), shapes.taps[self.tap]
        return head.init(rng, jnp.zeros(h.shape, h.dtype), jnp.zeros(h.shape[:1]))["params"]

    def evaluate(self, params: Any, seen: Seen) -> Evaluated:
        """Returns (1); the answer of a coarser tap is brought up to the grid of the points."""
        target = jax.lax.stop_gradient(seen.points.astype(jnp.float32))
        head = self._head(target.shape[-1])
        answer = head.apply({"params": params}, seen.taps[self.tap], self.share(seen.t))
        error = COSTS[self.cost](resized(answer, target.shape[1:-1]) - target)
        return self.mean_distance(error.reshape(len(error), -1).mean(1), seen)
