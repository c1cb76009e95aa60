"""Classifier-free guidance.

    l = l_u + s (l_c - l_u),                                                              (1)

where l_c and l_u are the network's predictions with and without the condition. In continuous
diffusion they are points or their noise; in discrete diffusion they are log-probabilities of x_0,
up to a constant. A large s gives images too much contrast, so the standard deviation over an
example can be brought back, in part, to that of l_c:

    l' = r l std(l_c) / std(l) + (1 - r) l                                                (2)

Guidance reduces variety early in sampling and has no effect late, so it can be limited to an
interval of times.

Sources: eq. (1) Ho & Salimans 2022, "Classifier-Free Diffusion Guidance" (arXiv 2207.12598), and
Tang et al. 2022, "Improved Vector Quantized Diffusion Models" (arXiv 2205.16007); eq. (2) Lin et
al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv 2305.08891), section
3.4; intervals Kynkaanniemi et al. 2024, "Applying Guidance in a Limited Interval" (arXiv
2404.07724).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real

from conprediff_jax.common.errors import FieldError

# Stands for log 0, so that 0 log 0 is 0. The published models have the same value.
LOG_ZERO = -70.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """How the predictions with and without the condition are combined.

    Attributes:
        scale: s of eq. (1). At 1 there is no guidance, and it costs nothing.
        rescale: r of eq. (2), in [0, 1]. Only continuous models use it.
        interval: The times at which there is guidance, as a low and a high share of all times; see
            `Process.share`. At all other times s is 1, and the network computes only l_c. (0, 1)
            means all times.

    Raises:
        ValueError: A field is out of range; the message names the field.
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

    def at(
        self, t: Real[Array, "batch"], time_at: Callable[[float], float]
    ) -> Bool[Array, "batch"] | None:
        """Says which of the times have guidance; None means all times.

        Args:
            t: Times.
            time_at: `Process.time_at`, from shares to times.
        """
        low, high = self.interval
        # There is no limit at the ends, so that rounding excludes neither of them.
        limits = [t >= time_at(low)] if low > 0 else []
        limits += [t < time_at(high)] if high < 1 else []
        return functools.reduce(jnp.logical_and, limits) if limits else None


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
        scale: s. At 0 the result is `unconditional`, at 1 it is `conditional`, and above 1 it moves
            further away from `unconditional`.
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
        share: r. 0 changes nothing, and 1 gives the standard deviation of l_c.
    """
    if not share:
        return guided
    axes = tuple(range(1, guided.ndim))
    wanted, found = (x.astype(jnp.float32).std(axes, keepdims=True) for x in (conditional, guided))
    return guided * (share * wanted / found + 1 - share)


def guided_log_probs(conditional: Logits, unconditional: Logits, scale: float) -> Logits:
    """Eq. (1) for log-probabilities of x_0, normalised and limited to [LOG_ZERO, 0], float32.

    Args:
        conditional: Logits or log-probabilities; an added constant does not change the result.
        unconditional: The same without the condition.
        scale: s; see `extrapolated`.
    """
    guided = extrapolated(conditional, unconditional, scale)
    return jnp.clip(jax.nn.log_softmax(guided), LOG_ZERO, 0.0)
