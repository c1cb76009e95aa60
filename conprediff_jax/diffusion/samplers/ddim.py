"""Denoising diffusion implicit models.

    x_s = sqrt(alpha_bar_s) x0_hat + sqrt(1 - alpha_bar_s - sigma^2) epsilon_hat + sigma z    (1)
    sigma = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s)  (2)

eta = 0 is deterministic; eta = 1 has the marginals, and the steps, of DDPM.

Source: Song et al. 2021, "Denoising Diffusion Implicit Models" (arXiv 2010.02502), eqs. (12), (16).
"""

import dataclasses

import numpy as np
from jaxtyping import Int64

from conprediff_jax.common.errors import FieldError
from conprediff_jax.diffusion.process import Time
from conprediff_jax.diffusion.samplers.base import Coefficients, Points, Sampler, StepTable

FINALS = ("one", "first")
STEP_ENDS = ("next", "stride")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM(Sampler):
    """DDIM, with the conventions of several implementations.

    With `step_end='stride'` it equals diffusers' `DDIMScheduler`. With 'next' it does so too for
    'leading' without an offset, and for 'trailing' where `steps` divides T. With `clip`,
    epsilon_hat is computed from the clipped x0_hat, as in ADM and under diffusers'
    `use_clipped_model_output=True`, unless `clipped_epsilon` is False.

    The original code of DDIM and latent diffusion takes the steps `range(0, T, c) + 1` and ends at
    `alpha_bar_0`. Here this is `spacing='leading', steps_offset=1, final_alpha_bar='first'`, and in
    diffusers it is `steps_offset=1, set_alpha_to_one=False`.

    Attributes:
        eta: The share of DDPM's noise, in [0, 1].
        final_alpha_bar: The alpha_bar at which the last step ends: 'one' (the clean end) or 'first'
            (alpha_bar_0).
        step_end: The time at which the step from t ends: 'next' is the next time visited, and
            'stride' is `t - T // steps`, whether or not the next step begins there. A time below 0
            stands for the end of the last step.
        clipped_epsilon: Whether epsilon_hat is computed from the clipped x0_hat.

    Raises:
        ValueError: A field is outside its choices or range; the message names the field.
    """

    eta: float = 0.0
    final_alpha_bar: str = "one"
    step_end: str = "next"
    clipped_epsilon: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise FieldError("eta", f"is {self.eta}; it must lie in [0, 1]")
        if self.final_alpha_bar not in FINALS:
            raise FieldError(
                "final_alpha_bar", f"is {self.final_alpha_bar!r}; choose one of {', '.join(FINALS)}"
            )
        if self.step_end not in STEP_ENDS:
            raise FieldError(
                "step_end", f"is {self.step_end!r}; choose one of {', '.join(STEP_ENDS)}"
            )
        if not self.has_table and (self.final_alpha_bar, self.step_end) != ("one", "next"):
            name = "step_end" if self.step_end != "next" else "final_alpha_bar"
            raise FieldError(
                name, f"is {getattr(self, name)!r}, which only a process of T steps allows"
            )

    @property
    def ends(self) -> Int64[np.ndarray, "steps"]:
        """The time at the end of every step, `[steps]`; -1 is the end of the last step."""
        if self.step_end == "next":
            return np.append(self.times[1:], -1)
        return np.maximum(self.times - self.process.num_steps // self.steps, -1)

    def alpha_bar_steps(self) -> tuple[StepTable, StepTable]:
        """Returns `alpha_bar` at the start and at the end of every step; see `ends`."""
        if not self.has_table:
            return super().alpha_bar_steps()
        alpha_bars = self.process.alpha_bars
        final = 1.0 if self.final_alpha_bar == "one" else alpha_bars[0]
        # The end of the last step is appended, so that index -1 finds it.
        return alpha_bars[self.times], np.append(alpha_bars, final)[self.ends]

    def coefficients(self) -> Coefficients:
        """Returns the table of eq. (1)."""
        alpha_bar_t, alpha_bar_s = self.alpha_bar_steps()
        sigma = self.eta * np.sqrt(
            (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
        )
        return Coefficients(
            x_0=np.sqrt(alpha_bar_s),
            epsilon=np.sqrt(1 - alpha_bar_s - sigma**2),
            noise=sigma if self.eta else None,
        ).scaled(*self.length_steps())

    def estimate(self, output: Points, x_t: Points, t: Time) -> tuple[Points, Points]:
        """Returns the clipped estimate of x_0 and that of epsilon; see `clipped_epsilon`."""
        x_0, epsilon = super().estimate(output, x_t, t)
        if self.clipped_epsilon:
            return x_0, epsilon
        return x_0, self.process.to_x0_and_epsilon(output, x_t, t)[1]
