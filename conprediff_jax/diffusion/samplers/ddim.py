"""Denoising diffusion implicit models.

    x_s = sqrt(alpha_bar_s) x0_hat + sqrt(1 - alpha_bar_s - sigma^2) epsilon_hat + sigma z    (1)
    sigma = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s)  (2)

eta = 0 is deterministic; eta = 1 has the marginals, and the steps, of DDPM.

Source: Song et al. 2021, "Denoising Diffusion Implicit Models" (arXiv 2010.02502), eqs. (12), (16).
"""

import dataclasses

import numpy as np

from conprediff_jax.diffusion.samplers.base import Coefficients, Sampler

FINALS = ("one", "first")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM(Sampler):
    """DDIM.

    Equals diffusers' `DDIMScheduler` for 'leading', and for 'trailing' where `steps` divides T.
    Elsewhere that scheduler ends each step at `t - T // steps`, which is not the next time it
    visits; this one ends at the time it visits next. With `clip`, epsilon_hat follows the clipped
    x0_hat, as in ADM (there: `use_clipped_model_output=True`).

    The steps of the original DDIM and latent diffusion code, `range(0, T, c) + 1` ending at
    `alpha_bar_0`, are `spacing='leading', steps_offset=1, final_alpha_bar='first'`
    (there: `steps_offset=1, set_alpha_to_one=False`).

    Attributes:
        eta: Share of DDPM's noise, in [0, 1].
        final_alpha_bar: Where the last step ends: 'one' (the clean end) or 'first' (alpha_bar_0).
    """

    eta: float = 0.0
    final_alpha_bar: str = "one"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; it must lie in [0, 1]")
        if self.final_alpha_bar not in FINALS:
            raise ValueError(
                f"final_alpha_bar is {self.final_alpha_bar!r}; choose one of {', '.join(FINALS)}"
            )

    def coefficients(self) -> Coefficients:
        """The table of eq. (1)."""
        final = 1.0 if self.final_alpha_bar == "one" else self.process.alpha_bars[0]
        alpha_bar_t, alpha_bar_s = self.alpha_bar_steps(final)
        sigma = self.eta * np.sqrt(
            (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
        )
        return Coefficients(
            x_0=np.sqrt(alpha_bar_s),
            epsilon=np.sqrt(1 - alpha_bar_s - sigma**2),
            noise=sigma if self.eta else None,
        )
