"""RePaint: ancestral sampling around a known part, resampled until both agree.

Replacing the known part alone leaves the sampled part ignorant of it wherever noise hides it. So
the sampler goes back in time: after every `jump_length` steps it adds the noise of as many steps,
and takes them again, `resamplings` times in all. Its path through the times visited, counted from
the clean end, is that of `jump_schedule`; 250 steps with jumps of 10 and 10 resamplings are 4,570
transitions, 2,410 of which call the network.

A step from t to s is ancestral, x_s = a x_t + b x0_hat + c z (`ddpm.posterior`). The steps of a
jump from s up to u compose to one draw of q(x_u | x_s), so that step and jump together are

    x_u = r (a x_t + b x0_hat) + sqrt(r^2 c^2 + 1 - r^2) z,    r^2 = alpha_bar_u / alpha_bar_s (1)

which is again a row of the samplers' table: one row a call of the network, no call wasted.

Source: Lugmayr et al. 2022, "RePaint: Inpainting using Denoising Diffusion Probabilistic Models"
(arXiv 2201.09865), algorithm 1 and appendix. There the network also gives the variance, and the
known part is merged before every call, as here; diffusers' `RePaintScheduler` merges it after every
step, and jumps back from one time earlier.
"""

import dataclasses

import numpy as np
from jaxtyping import Int64

from conprediff_jax.common.errors import FieldError
from conprediff_jax.diffusion.samplers.base import Coefficients, Sampler
from conprediff_jax.diffusion.samplers.ddpm import VARIANCES, posterior


def jump_schedule(
    steps: int, jump_length: int = 10, resamplings: int = 10
) -> Int64[np.ndarray, "states"]:
    """The states of the reverse process, as indices of the times visited, -1 being the clean end.

    Every multiple of `jump_length` below `steps - jump_length` is reached from above `resamplings`
    times.

    Args:
        steps: Number of times visited.
        jump_length: Steps that are taken back.
        resamplings: How often each stretch is gone through; 1 for no jumps.

    Returns:
        `[transitions + 1]`, from `steps - 1` to -1; neighbours differ by 1.
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
    """RePaint, for `sample` with a known part; without one it only costs more than DDPM.

    Attributes:
        steps: Number of times visited.
        spacing: 'linspace' is the original's.
        jump_length: Steps that are taken back, at least 1 and fewer than `steps`.
        resamplings: How often each stretch is gone through; 1 is ancestral sampling with
            replacement.
        variance: Of the noise: 'fixed_small' or 'fixed_large'; see `ddpm.posterior`.

    Raises:
        ValueError: If a field is outside its choices or range; the message names the field.
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
        """See `jump_schedule`; one fewer transitions than states."""
        return jump_schedule(self.steps, self.jump_length, self.resamplings)

    @property
    def call_times(self) -> Int64[np.ndarray, "calls"]:
        """The time of every call of the network, in order."""
        start, _ = self._calls()
        return self.times[::-1][start]

    def coefficients(self) -> Coefficients:
        """The table of eq. (1)."""
        start, end = self._calls()
        # Index -1 finds the clean end.
        alpha_bars = np.append(self.process.alpha_bars[self.times[::-1]], 1.0)
        step = posterior(alpha_bars[start], alpha_bars[end], self.variance)
        landing = alpha_bars[np.append(start[1:], -1)]  # where the next call, if any, begins
        r = np.sqrt(landing / alpha_bars[end])  # 1 where nothing is taken back
        return Coefficients(
            x_t=r * step.x_t, x_0=r * step.x_0, noise=np.sqrt((r * step.noise) ** 2 + 1 - r**2)
        )

    def _calls(self) -> tuple[Int64[np.ndarray, "calls"], Int64[np.ndarray, "calls"]]:
        """The states that a call of the network leads from and to."""
        before, after = self.states[:-1], self.states[1:]
        down = after < before
        return before[down], after[down]
