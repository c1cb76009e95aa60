"""Classifier-free guidance.

    l = l_u + s (l_c - l_u),                                                              (1)

with l_c and l_u what the network predicts with and without the condition: a point (or its noise) in
continuous diffusion, the log-probabilities of x_0, up to a constant, in discrete diffusion. A large
s makes points too contrasted, so their deviation over an example can be taken back to that of l_c,
in part:

    l' = r l std(l_c) / std(l) + (1 - r) l                                                (2)

Early in sampling guidance costs variety and late it does nothing, so it may be limited to an
interval of times.

Sources: eq. (1) Ho & Salimans 2022, "Classifier-Free Diffusion Guidance" (arXiv 2207.12598), and
Tang et al. 2022, "Improved Vector Quantized Diffusion Models" (arXiv 2205.16007); eq. (2) Lin et
al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv 2305.08891), section
3.4; intervals Kynkaanniemi et al. 2024, "Applying Guidance in a Limited Interval" (arXiv
2404.07724).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from conprediff_jax.common.errors import FieldError

LOG_ZERO = -70.0  # stands for log 0, so that 0 log 0 is 0; the published models' floor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """How a sampler's two answers are made one.

    Attributes:
        scale: s of eq. (1); 1 for no guidance, at no cost.
        rescale: r of eq. (2), in [0, 1]; of continuous models.
        interval: shares of the T times, low to high, in which there is guidance; elsewhere s is 1,
            and the network is asked once. (0, 1) for all times; t = 0 is the least noise.

    Raises:
        ValueError: a field is out of range.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if self.scale < 0:
            raise FieldError("guidance", f"is {self.scale}: it must not be negative")
        if not 0 <= self.rescale <= 1:
            raise FieldError("guidance_rescale", f"is {self.rescale}: it must lie in [0, 1]")
        if len(self.interval) != 2 or not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise FieldError(
                "guidance_interval",
                f"is {tuple(self.interval)}: give two shares of the times, low and high, in [0, 1]",
            )

    def at(self, t: Int[Array, "batch"], num_steps: int) -> Bool[Array, "batch"] | None:
        """Where there is guidance, of T = `num_steps` times; None for everywhere."""
        low, high = (share * num_steps for share in self.interval)
        return None if (low, high) == (0, num_steps) else (t >= low) & (t < high)


NO_GUIDANCE = Guidance()

Logits = Float[Array, "batch *grid codes"]


def extrapolated(
    conditional: Float[Array, "batch *point"],
    unconditional: Float[Array, "batch *point"],
    scale: float,
) -> Float[Array, "batch *point"]:
    """Eq. (1), float32.

    Args:
        conditional: l_c.
        unconditional: l_u.
        scale: s. 0 is unconditional, 1 conditional, more pushes away from the unconditional.
    """
    conditional, unconditional = conditional.astype(jnp.float32), unconditional.astype(jnp.float32)
    return unconditional + scale * (conditional - unconditional)


def rescaled(
    guided: Float[Array, "batch *point"], conditional: Float[Array, "batch *point"], share: float
) -> Float[Array, "batch *point"]:
    """Eq. (2), float32.

    Args:
        guided: l.
        conditional: l_c.
        share: r. 0 changes nothing, 1 gives the deviation of l_c.
    """
    if not share:
        return guided
    axes = tuple(range(1, guided.ndim))
    wanted, found = (x.astype(jnp.float32).std(axes, keepdims=True) for x in (conditional, guided))
    return guided * (share * wanted / found + 1 - share)


def guided_log_probs(conditional: Logits, unconditional: Logits, scale: float) -> Logits:
    """Guided log-probabilities of x_0, normalised and limited to [LOG_ZERO, 0], float32. Eq. (1).

    Args:
        conditional: Logits, or log-probabilities: a constant added to them changes nothing.
        unconditional: The same without the condition.
        scale: s, see `extrapolated`.
    """
    guided = extrapolated(conditional, unconditional, scale)
    return jnp.clip(jax.nn.log_softmax(guided), LOG_ZERO, 0.0)
