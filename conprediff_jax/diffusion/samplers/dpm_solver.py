"""DPM-Solver++(2M): a second-order multistep solver of the probability-flow ODE.

With `alpha_t = sqrt(alpha_bar_t)`, `sigma_t = sqrt(1 - alpha_bar_t)` and
`lambda = log(alpha / sigma)`, the step from t to s, where r is the time visited before t, is

    h = lambda_s - lambda_t,    q = (lambda_t - lambda_r) / h
    D = (1 + 1 / (2 q)) x0_hat_t - 1 / (2 q) x0_hat_r                                     (1)
    x_s = sigma_s / sigma_t x_t - alpha_s (exp(-h) - 1) D                                 (2)

A first-order step has D = x0_hat_t and is a step of DDIM.

Source: Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic
Models" (arXiv 2211.01095), algorithm 2.
"""

import dataclasses

import numpy as np
from jaxtyping import Real

from conprediff_jax.diffusion.samplers.base import Coefficients, Sampler, spaced_times


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolverPP2M(Sampler):
    """DPM-Solver++(2M).

    It equals diffusers' `DPMSolverMultistepScheduler` at its defaults
    (`algorithm_type='dpmsolver++'`, `solver_order=2`, `solver_type='midpoint'`,
    `final_sigmas_type='zero'`), for any number of steps. The last step ends at the clean end,
    alpha_bar = 1, where lambda is infinite. It is therefore a first-order step, whatever diffusers'
    `lower_order_final` and `euler_at_final` are. The first step is first-order too, since no step
    precedes it. Where it starts from noise without signal, as in flow matching, lambda is infinite
    there too, and the second step is of first order as well.

    As in diffusers, 'leading' and 'linspace' are computed for one time more than `steps`, of which
    the smallest is left out: it would be time 0, too close to the clean end to be worth a call.
    diffusers' `lambda_min_clipped` is `time_limit` here.
    """

    @property
    def times(self) -> Real[np.ndarray, "steps"]:
        """The times visited, decreasing, `[steps]`."""
        if not self.has_table:
            return super().times
        return spaced_times(
            self.process.num_steps,
            self.steps,
            self.spacing,
            self.steps_offset,
            skip_first=True,
            time_limit=self.time_limit,
        )

    def coefficients(self) -> Coefficients:
        """Returns the table of eqs. (1) and (2)."""
        alpha_bar_t, alpha_bar_s = self.alpha_bar_steps()
        sigma_ratio = np.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t))
        # alpha_s exp(-h) is written as sigma_s alpha_t / sigma_t, since the last h is infinite.
        move = np.sqrt(alpha_bar_s) - sigma_ratio * np.sqrt(alpha_bar_t)

        with np.errstate(divide="ignore"):  # lambda is -infinity where there is no signal
            half_log_snr = 0.5 * np.log(alpha_bar_t / (1 - alpha_bar_t))  # lambda
        h = np.diff(half_log_snr)
        extrapolation = np.zeros(self.steps)  # 1 / (2 q), 0 in a first-order step
        extrapolation[1:-1] = h[1:] / (2 * h[:-1])
        return Coefficients(
            x_t=sigma_ratio,
            x_0=move * (1 + extrapolation),
            previous_x_0=-move * extrapolation,
        ).scaled(*self.length_steps())
