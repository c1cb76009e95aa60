"""Heun's method for the flow of a process in continuous time, with EDM's churn.

With the velocity v = signal'(t) x_0 + noise'(t) epsilon, the step from t to s is

    x' = x_t + (s - t) v_t                                                                (1)
    x_s = x_t + (s - t) (v_t + v') / 2 = x' + (s - t) (v' - v_t) / 2                      (2)

where v' is the velocity of x' at s. So a step is two rows of the samplers' table, with one call of
the network each, and the second row needs the estimates of the first. The last step ends at the
clean end, and consists of (1) alone.

In EDM, churn adds noise before a step, from the level t up to

    t_hat = (1 + g) t,    g = min(churn / n, sqrt(2) - 1) if churn_min <= t <= churn_max  (3)
    x_hat = x_t + churn_noise sqrt(t_hat^2 - t^2) z

and the step begins at t_hat. The table has this noise in the last row of the step before. The first
step has no such row, so there the noise that sampling starts from is scaled instead, which draws
from the same distribution.

Source: Karras et al. 2022 (arXiv 2206.00364), algorithms 1 and 2.
"""

import dataclasses

import numpy as np
from jaxtyping import Float64

from conprediff_jax.common.errors import FieldError
from conprediff_jax.diffusion.samplers.base import Coefficients, StepTable
from conprediff_jax.diffusion.samplers.euler import FlowSampler

_MOST_CHURN = 2**0.5 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun(FlowSampler):
    """Heun's method: n steps with 2 n - 1 calls of the network.

    Over the same times it equals diffusers' `FlowMatchHeunDiscreteScheduler` for the linear path.

    Attributes:
        churn: The strength of churn, at least 0; see eq. (3). Only for processes that keep the
            signal and add noise, as EDM's.
        churn_min: The lowest level with churn.
        churn_max: The highest level with churn; None for no limit.
        churn_noise: The factor of the noise that churn adds.

    Raises:
        ValueError: A field is outside its choices or range; the message names the field.
    """

    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float | None = None
    churn_noise: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        for field in ("churn", "churn_min", "churn_noise"):
            if getattr(self, field) < 0:
                raise FieldError(field, f"is {getattr(self, field)}; it must not be negative")
        if self.churn_max is not None and self.churn_max <= self.churn_min:
            raise FieldError(
                "churn_max",
                f"is {self.churn_max} and churn_min {self.churn_min}; it must be larger, or None",
            )
        if self.churn and np.any(self.process.signal(self.times) != 1):
            raise FieldError(
                "churn",
                f"is {self.churn}: this process reduces the signal, and churn only adds noise",
            )

    def _churned(self) -> tuple[StepTable, StepTable]:
        """Returns t_hat of every step and the deviation of the noise that leads to it, eq. (3)."""
        t = self.times
        highest = np.inf if self.churn_max is None else self.churn_max
        inside = (self.churn_min <= t) & (t <= highest)
        t_hat = t * (1 + np.where(inside, min(self.churn / self.steps, _MOST_CHURN), 0.0))
        return t_hat, self.churn_noise * np.sqrt(t_hat**2 - t**2)

    @property
    def start_scale(self) -> float:
        """The factor of the noise that sampling starts from, which includes the first churn."""
        t, (_, deviation) = self.times, self._churned()
        return float(np.sqrt(t[0] ** 2 + deviation[0] ** 2) / t[0])

    @property
    def call_times(self) -> Float64[np.ndarray, "calls"]:
        """The time of every call of the network: the two ends of every step but the last."""
        t_hat, _ = self._churned()
        return _interleaved(t_hat, np.append(self.times[1:], 0.0))

    def coefficients(self) -> Coefficients:
        """Returns the table of eqs. (1) and (2), with two rows for a step."""
        (start, deviation), end = self._churned(), np.append(self.times[1:], 0.0)
        change, one, zero = end - start, np.ones_like(end), np.zeros_like(end)
        before, after = self.process.velocity_scales(start), self.process.velocity_scales(end)
        whole = [change * scale for scale in before]
        return Coefficients(
            x_t=_interleaved(one, one),
            x_0=_interleaved(whole[0], change / 2 * after[0]),
            epsilon=_interleaved(whole[1], change / 2 * after[1]),
            previous_x_0=_interleaved(zero, -whole[0] / 2),
            previous_epsilon=_interleaved(zero, -whole[1] / 2),
            noise=_interleaved(zero, np.append(deviation[1:], 0.0)) if self.churn else None,
        )


def _interleaved(first: StepTable, second: StepTable) -> Float64[np.ndarray, "calls"]:
    """Returns the rows of (1) and (2) in turn, without the second row of the last step."""
    return np.stack([first, second], axis=1).reshape(-1)[:-1]
