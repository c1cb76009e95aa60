"""Denoising diffusion implicit models.

    x_s = sqrt(alpha_bar_s) x0_hat + sqrt(1 - alpha_bar_s - sigma^2) epsilon_hat + sigma z    (1)
    sigma = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s)  (2)

eta = 0 is deterministic; eta = 1 has the marginals, and the steps, of DDPM.

Source: Song et al. 2021, "Denoising Diffusion Implicit Models" (arXiv 2010.02502), eqs. (12), (16).
"""

import dataclasses

import numpy as np
from jaxtyping import Array, Int, Int64

from conprediff_jax.common.errors import FieldError
from conprediff_jax.diffusion.samplers.base import Coefficients, Points, Sampler, StepTable

FINALS = ("one", "first")
STEP_ENDS = ("next", "stride")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM(Sampler):
    """DDIM.

    Equals diffusers' `DDIMScheduler` with `step_end='stride'`, and with 'next' too for 'leading'
    without an offset, and for 'trailing' where `steps` divides T. With `clip`, epsilon_hat follows
    the clipped x0_hat, as in ADM (there: `use_clipped_model_output=True`), unless
    `clipped_epsilon` is False.

    The steps of the original DDIM and latent diffusion code, `range(0, T, c) + 1` ending at
    `alpha_bar_0`, are `spacing='leading', steps_offset=1, final_alpha_bar='first'`
    (there: `steps_offset=1, set_alpha_to_one=False`).

    Attributes:
        eta: Share of DDPM's noise, in [0, 1].
        final_alpha_bar: Where the last step ends: 'one' (the clean end) or 'first' (alpha_bar_0).
        step_end: Where the step from t ends: 'next' (the time visited next) or 'stride'
            (`t - T // steps`, wherever the next step begins; below 0 as the last step does).
        clipped_epsilon: Whether epsilon_hat follows the clipped x0_hat.
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

    @property
    def ends(self) -> Int64[np.ndarray, "steps"]:
        """The time at the end of every step, `[steps]`; -1 is where the last step ends."""
        if self.step_end == "next":
            return np.append(self.times[1:], -1)
        return np.maximum(self.times - self.process.num_steps // self.steps, -1)

    def alpha_bar_steps(self) -> tuple[StepTable, StepTable]:
        """`alpha_bar` at the start and at the end of every step; see `ends`."""
        alpha_bars = self.process.alpha_bars
        final = 1.0 if self.final_alpha_bar == "one" else alpha_bars[0]
        # Index -1 finds the end of the last step.
        return alpha_bars[self.times], np.append(alpha_bars, final)[self.ends]

    def coefficients(self) -> Coefficients:
        """The table of eq. (1)."""
        alpha_bar_t, alpha_bar_s = self.alpha_bar_steps()
        sigma = self.eta * np.sqrt(
            (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
        )
        return Coefficients(
            x_0=np.sqrt(alpha_bar_s),
            epsilon=np.sqrt(1 - alpha_bar_s - sigma**2),
            noise=sigma if self.eta else None,
        )

    def estimate(
        self, output: Points, x_t: Points, t: Int[Array, "batch"]
    ) -> tuple[Points, Points]:
        """The estimates of x_0, limited to [-clip, clip], and of epsilon; see `clipped_epsilon`."""
        x_0, epsilon = super().estimate(output, x_t, t)
        if self.clipped_epsilon:
            return x_0, epsilon
        return x_0, self.process.to_x0_and_epsilon(output, x_t, t)[1]
