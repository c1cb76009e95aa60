"""EDM: noise levels in the place of times, and a preconditioned network.

    x_t = x_0 + t epsilon,    epsilon ~ N(0, I)                                           (1)

The time t is the noise level, sigma in the paper. Around the network F there is the denoiser

    D(x, t) = c_skip x + c_out F(c_in x, ln(t) / 4)                                       (2)
    c_skip = s^2 / (t^2 + s^2),   c_out = t s / sqrt(t^2 + s^2),   c_in = 1 / sqrt(t^2 + s^2)

where s is the deviation of the data. So the input of F and what it should give have variance 1 at
every level. The weight of the squared error of D is 1 / c_out^2, which is the weight 1 for F.

Training draws ln t ~ N(m, d^2). Samplers visit n levels and the clean end,

    t_i = (t_max^(1/rho) + i / (n - 1) (t_min^(1/rho) - t_max^(1/rho)))^rho               (3)

and the position on this grid is the share of a time: 0 at t_min and 1 at t_max.

Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models"
(arXiv 2206.00364), table 1, eqs. (5), (7) and (8).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.keys import fixed
from conprediff_jax.diffusion.additive import (
    AnyTime,
    ContinuousNoise,
    Points,
    Scale,
    beside,
    numpy_of,
)
from conprediff_jax.diffusion.process import PROCESSES, Time


@PROCESSES.register("edm")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EDMProcess(ContinuousNoise):
    """EDM's diffusion of arrays `[batch, *grid, channels]`; a `Process` in continuous time.

    Attributes:
        sigma_data: s, the standard deviation of the data. Pixels in [-1, 1] have about 0.5.
        sigma_min: t_min, the lowest noise level that samplers visit.
        sigma_max: t_max, the noise level from which samplers start.
        rho: How much closer to each other low levels are than high ones; see eq. (3).
        log_mean: m, the mean of ln t in training.
        log_std: d, the standard deviation of ln t in training.

    Raises:
        ValueError: A field is out of range; the message names the field.
    """

    sigma_data: float = fixed(0.5)
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    log_mean: float = -1.2
    log_std: float = 1.2

    def __post_init__(self):
        for field in ("sigma_data", "rho", "log_std"):
            if getattr(self, field) <= 0:
                raise FieldError(field, f"is {getattr(self, field)}; it must be positive")
        if not 0 < self.sigma_min < self.sigma_max:
            raise FieldError(
                "sigma_min",
                f"is {self.sigma_min} and sigma_max {self.sigma_max}; "
                "they must satisfy 0 < sigma_min < sigma_max",
            )

    def signal(self, t: AnyTime) -> Scale:
        """Returns 1, the factor of x_0 in eq. (1)."""
        return numpy_of(t).ones_like(t)

    def noise(self, t: AnyTime) -> Scale:
        """Returns t, the factor of epsilon in eq. (1)."""
        return t

    def velocity_scales(self, t: AnyTime) -> tuple[Scale, Scale]:
        """Returns the derivatives of the two factors: 0 and 1."""
        return numpy_of(t).zeros_like(t), numpy_of(t).ones_like(t)

    def target_scales(self, t: AnyTime) -> tuple[Scale, Scale]:
        """Returns a and b for which F should give a x_0 + b epsilon: eqs. (1) and (2) with D = x_0.

        They are (1 - c_skip) / c_out and -c_skip t / c_out, without differences of close numbers.
        """
        c_in = self._input_scale(t)
        return t * c_in / self.sigma_data, -self.sigma_data * c_in

    def loss_weight(self, t: Time) -> Float[Array, "batch"]:
        """Returns 1, the weight of the error of F, float32."""
        return jnp.ones_like(t)

    def network_time(self, t: Time) -> Time:
        """Returns ln(t) / 4."""
        return jnp.log(t) / 4

    def network_input(self, x_t: Points, t: Time) -> Points:
        """Returns c_in x_t, which has variance 1."""
        return beside(self._input_scale(t), x_t) * x_t

    def _input_scale(self, t: AnyTime) -> Scale:
        return (t**2 + self.sigma_data**2) ** -0.5

    def prior(
        self, rngs: Key[Array, "batch"], shape: tuple[int, ...]
    ) -> Float[Array, "batch *grid channels"]:
        """Draws normal points with the standard deviation `sigma_max`, `[batch, *shape]`."""
        return self.sigma_max * super().prior(rngs, shape)

    def share(self, t: Time) -> Float[Array, "batch"]:
        """Returns the position of t on the grid of eq. (3), limited to [0, 1], float32."""
        low, high = self._root_ends
        return jnp.clip((t ** (1 / self.rho) - low) / (high - low), 0.0, 1.0)

    def time_at(
        self, share: float | Float[np.ndarray, "*shape"]
    ) -> float | Float[np.ndarray, "*shape"]:
        """Returns the noise level at a position on the grid of eq. (3)."""
        low, high = self._root_ends
        return (low + share * (high - low)) ** self.rho

    @property
    def _root_ends(self) -> tuple[float, float]:
        """t_min and t_max to the power of 1 / rho."""
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def quantile(self, u: Float[Array, "batch"]) -> Float[Array, "batch"]:
        """Returns the training level below which there is a share u of all, in (0, 1)."""
        return jnp.exp(self.log_mean + self.log_std * jax.scipy.special.ndtri(u))

    def cumulative(self, t: Time) -> Float[Array, "batch"]:
        """Returns the share of training levels that are below `t`."""
        return jax.scipy.special.ndtr((jnp.log(t) - self.log_mean) / self.log_std)
