"""Ancestral sampling.

The posterior of x_s given x_t and x_0, for any two times s < t, is Gaussian. With
`alpha = alpha_bar_t / alpha_bar_s` and `beta = 1 - alpha`,

    mean      sqrt(alpha_bar_s) beta / (1 - alpha_bar_t) x_0
              + sqrt(alpha) (1 - alpha_bar_s) / (1 - alpha_bar_t) x_t                     (1)
    variance  beta (1 - alpha_bar_s) / (1 - alpha_bar_t)                                  (2)

Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239), eqs. (6) and
(7), algorithm 2; skipped steps as in Nichol & Dhariwal 2021 (arXiv 2102.09672), section 4.
"""

import dataclasses

import numpy as np

from conprediff_jax.common.errors import FieldError
from conprediff_jax.diffusion.samplers.base import Coefficients, Sampler, StepTable

VARIANCES = ("fixed_small", "fixed_large")


def posterior(
    alpha_bar_t: StepTable, alpha_bar_s: StepTable, variance: str = "fixed_small"
) -> Coefficients:
    """Returns the step from x_t to x_s by eq. (1), with noise of a fixed variance.

    Args:
        alpha_bar_t: The signal kept at the start of each step.
        alpha_bar_s: The signal kept at its end, which is larger. At 1, the clean end, no noise is
            added.
        variance: 'fixed_small' is eq. (2), which is exact for data at a single point. 'fixed_large'
            is beta, which is exact for standard normal data.
    """
    alpha = alpha_bar_t / alpha_bar_s
    beta = 1 - alpha
    remaining = (1 - alpha_bar_s) / (1 - alpha_bar_t)
    noise_variance = beta * remaining if variance == "fixed_small" else beta
    return Coefficients(
        x_t=np.sqrt(alpha) * remaining,
        x_0=np.sqrt(alpha_bar_s) * beta / (1 - alpha_bar_t),
        noise=np.where(alpha_bar_s < 1, np.sqrt(noise_variance), 0.0),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPM(Sampler):
    """Ancestral sampling, over all T steps or fewer.

    It equals diffusers' `DDPMScheduler`, with one difference: here the last step never adds noise,
    as in the paper. diffusers adds noise under 'fixed_large' if the last time visited is not 0,
    which happens with 'trailing' or an offset.

    Attributes:
        variance: The variance of the noise: 'fixed_small' or 'fixed_large'; see `posterior`.

    Raises:
        ValueError: A field is outside its choices or range; the message names the field.
    """

    variance: str = "fixed_small"

    def __post_init__(self):
        super().__post_init__()
        if self.variance not in VARIANCES:
            raise FieldError(
                "variance", f"is {self.variance!r}; choose one of {', '.join(VARIANCES)}"
            )

    def coefficients(self) -> Coefficients:
        """Returns the table of the posterior's mean and standard deviation."""
        table = posterior(*self.alpha_bar_steps(), self.variance)
        return table.scaled(*self.length_steps())
