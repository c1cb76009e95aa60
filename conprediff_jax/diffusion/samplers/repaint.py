"""RePaint: ancestral sampling around a known part, with resampling so that both parts agree.

If the known part were only replaced, the network could not fit the sampled part to it at times when
noise hides it. So the sampler goes back in time: after every `jump_length` steps it adds the noise
of as many steps and takes the steps again, `resamplings` times in all. `jump_schedule` gives its
path through the times visited, counted from the clean end. 250 steps with jumps of 10 and 10
resamplings are 4,570 transitions, 2,410 of which call the network.

A step from t to s is ancestral, x_s = a x_t + b x0_hat + c z (`ddpm.posterior`). The steps of a
jump from s up to u compose to one draw of q(x_u | x_s), so that step and jump together are

    x_u = r (a x_t + b x0_hat) + sqrt(r^2 c^2 + 1 - r^2) z,    r^2 = alpha_bar_u / alpha_bar_s (1)

which is again a row of the samplers' table. So there is one row for every call of the network.

Source: Lugmayr et al. 2022, "RePaint: Inpainting using Denoising Diffusion Probabilistic Models"
(arXiv 2201.09865), algorithm 1 and appendix. In the original code the network also predicts the
variance, and the known part is inserted before every call, as it is here. diffusers'
`RePaintScheduler` inserts it after every step, and jumps back from one time earlier.
"""

import dataclasses

import numpy as np
from jaxtyping import Int64, Real

from conprediff_jax.common.errors import FieldError
from conprediff_jax.diffusion.samplers.base import Coefficients, Sampler
from conprediff_jax.diffusion.samplers.ddpm import VARIANCES, posterior


def jump_schedule(
    steps: int, jump_length: int = 10, resamplings: int = 10
) -> Int64[np.ndarray, "states"]:
    """Returns the path of the reverse process, as indices of the times visited.

    The path comes down to every multiple of `jump_length` below `steps - jump_length`
    `resamplings` times.

    Args:
        steps: The number of times visited.
        jump_length: The number of steps of a jump back.
        resamplings: How often the steps of a jump are taken; 1 means no jumps.

    Returns:
        `[transitions + 1]`, from `steps - 1` to -1, which is the clean end. Neighbours differ by 1.
    """
    jumps = {start: resamplings - 1 for start in range(0, steps - jump_length, jump_length)}
    states = [steps - 1]
    while states[-1] >= 0:
        here = states[-1]
        if jumps.get(here):
            jumps[here] -= 1
            states.extend(range(here + 1, here + jump_length + 1))
        states.append(states[-1] - 1)
    return np.array(states)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RePaint(Sampler):
    """RePaint, for `sample` with a known part. Without one it is DDPM at a higher cost.

    Attributes:
        steps: The number of times visited.
        spacing: See `spaced_times`. The original code has 'linspace'.
        jump_length: The number of steps of a jump back, at least 1 and less than `steps`.
        resamplings: How often the steps of a jump are taken. At 1 it is ancestral sampling that
            replaces the known part.
        variance: The variance of the noise: 'fixed_small' or 'fixed_large'; see `ddpm.posterior`.

    Raises:
        ValueError: A field is outside its choices or range; the message names the field.
    """

    steps: int = 250
    spacing: str = "linspace"
    jump_length: int = 10
    resamplings: int = 10
    variance: str = "fixed_small"

    def __post_init__(self):
        super().__post_init__()
        if self.resamplings < 1:
            raise FieldError("resamplings", f"is {self.resamplings}; it must be at least 1")
        if self.jump_length < 1 or (self.resamplings > 1 and self.jump_length >= self.steps):
            raise FieldError(
                "jump_length",
                f"is {self.jump_length} with steps {self.steps}; it must be at least 1 "
                "and less than steps",
            )
        if self.variance not in VARIANCES:
            raise FieldError(
                "variance", f"is {self.variance!r}; choose one of {', '.join(VARIANCES)}"
            )

    @property
    def states(self) -> Int64[np.ndarray, "states"]:
        """The path; see `jump_schedule`."""
        return jump_schedule(self.steps, self.jump_length, self.resamplings)

    @property
    def call_times(self) -> Real[np.ndarray, "calls"]:
        """The time of every call of the network, in order."""
        start, _ = self._calls()
        return self.times[::-1][start]

    def coefficients(self) -> Coefficients:
        """Returns the table of eq. (1)."""
        start, end = self._calls()
        # The clean end is appended, so that index -1 finds it.
        alpha_bars = np.append(self.process.alpha_bar(self.times[::-1]), 1.0)
        lengths = np.append(self.process.length(self.times[::-1]), 1.0)
        step = posterior(alpha_bars[start], alpha_bars[end], self.variance)
        landing = np.append(start[1:], -1)  # where the next call begins
        r = np.sqrt(alpha_bars[landing] / alpha_bars[end])  # 1 where there is no jump
        return Coefficients(
            x_t=r * step.x_t, x_0=r * step.x_0, noise=np.sqrt((r * step.noise) ** 2 + 1 - r**2)
        ).scaled(lengths[start], lengths[landing])

    def _calls(self) -> tuple[Int64[np.ndarray, "calls"], Int64[np.ndarray, "calls"]]:
        """Returns the states before and after every call of the network."""
        before, after = self.states[:-1], self.states[1:]
        down = after < before
        return before[down], after[down]
