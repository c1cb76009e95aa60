"""Euler's method for the flow of a process in continuous time.

With the velocity v = signal'(t) x_0 + noise'(t) epsilon, the step from t to s is

    x_s = x_t + (s - t) v                                                                 (1)

On the linear path of flow matching and in EDM this is a step of DDIM.
"""

import dataclasses

import numpy as np

from conprediff_jax.common.errors import FieldError
from conprediff_jax.diffusion.samplers.base import Coefficients, Sampler, StepTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSampler(Sampler):
    """Base of the samplers that need the velocity of a process in continuous time.

    Attributes:
        process: The process.
        spacing: 'trailing' or 'linspace'; see `continuous_times`.

    Raises:
        ValueError: A field is outside its choices or range; the message names the field.
    """

    spacing: str = "trailing"

    def __post_init__(self):
        if self.has_table:
            raise FieldError(
                "sampler", "is made for continuous time, and this process has a table of steps"
            )
        super().__post_init__()

    def steps_of_time(self) -> tuple[StepTable, StepTable]:
        """Returns the time at the start of every step, and its change, which is negative."""
        return self.times, np.diff(self.times, append=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euler(FlowSampler):
    """Euler's method, which calls the network once in every step.

    Over the same times it equals diffusers' `FlowMatchEulerDiscreteScheduler` for the linear path,
    and `EDMEulerScheduler` without churn for EDM.
    """

    def coefficients(self) -> Coefficients:
        """Returns the table of eq. (1)."""
        t, change = self.steps_of_time()
        of_x_0, of_epsilon = self.process.velocity_scales(t)
        return Coefficients(x_t=np.ones_like(t), x_0=change * of_x_0, epsilon=change * of_epsilon)
