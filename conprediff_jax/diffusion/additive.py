"""The part that all processes share which add Gaussian noise to points.

    x_t = signal(t) x_0 + noise(t) epsilon,    epsilon ~ N(0, I)                          (1)

Such a process is defined by the two functions, and by what its network predicts. With

    r(t) = sqrt(signal^2 + noise^2),    alpha_bar(t) = (signal / r)^2                     (2)

x_t / r(t) keeps the variance of x_0 if that is 1. So everything that is written in terms of
alpha_bar, as DDPM, DDIM, DPM-Solver++ and RePaint are, holds for every process of this kind.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Real

from conprediff_jax.diffusion.guidance import Guidance, extrapolated, rescaled
from conprediff_jax.diffusion.process import Corrupted, Time
from conprediff_jax.diffusion.times import ContinuousTimes

LOSS_NORMS = ("l1", "l2")

Points = Float[Array, "batch *grid channels"]

# Times as samplers' tables have them, in float64, and as programs have them.
AnyTime = Real[np.ndarray, "*shape"] | Real[Array, "*shape"]
Scale = Float[np.ndarray, "*shape"] | Float[Array, "*shape"]


def numpy_of(t: AnyTime) -> Any:
    """Returns the library that computes with `t`: NumPy in float64, or JAX."""
    return np if isinstance(t, np.ndarray) else jnp


def beside(values: Float[Array, "batch"], like: Points) -> Float[Array, "batch ..."]:
    """Returns a number for every example, in a shape that broadcasts against `like`."""
    return values.reshape((-1,) + (1,) * (like.ndim - 1))


class AdditiveNoise(abc.ABC):
    """Gaussian diffusion of arrays `[batch, *grid, channels]`; a `Process` without its times.

    Arithmetic and results are float32, whatever the dtype of the arguments. The functions of time
    alone return float64 for times in NumPy, from which samplers compute their tables.
    """

    discrete = False
    loss_norm = "l2"

    @abc.abstractmethod
    def signal(self, t: AnyTime) -> Scale:
        """Returns the factor of x_0 in eq. (1)."""

    @abc.abstractmethod
    def noise(self, t: AnyTime) -> Scale:
        """Returns the factor of epsilon in eq. (1)."""

    @abc.abstractmethod
    def target(self, x_0: Points, noise: Points, t: Time) -> Points:
        """Returns what the network should predict, float32."""

    @abc.abstractmethod
    def loss_weight(self, t: Time) -> Float[Array, "batch"]:
        """Returns the weight of the error in the prediction's own space."""

    @abc.abstractmethod
    def to_x0_and_epsilon(self, output: Points, x_t: Points, t: Time) -> tuple[Points, Points]:
        """Converts the network's output into estimates of x_0 and epsilon that satisfy eq. (1)."""

    def length(self, t: AnyTime) -> Scale:
        """Returns r(t) of eq. (2)."""
        return (self.signal(t) ** 2 + self.noise(t) ** 2) ** 0.5

    def alpha_bar(self, t: AnyTime) -> Scale:
        """Returns the share of the signal in the power of x_t, in [0, 1], eq. (2)."""
        signal, noise = self.signal(t) ** 2, self.noise(t) ** 2
        return signal / (signal + noise)

    def prior(
        self, rngs: Key[Array, "batch"], shape: tuple[int, ...]
    ) -> Float[Array, "batch *grid channels"]:
        """Draws standard normal points, `[batch, *shape]`, float32."""
        return jax.vmap(lambda rng: jax.random.normal(rng, shape, jnp.float32))(rngs)

    def corrupt(self, rngs: Key[Array, "batch"], x_0: Points, t: Time) -> Corrupted:
        """Draws standard normal noise and adds it to `x_0` by eq. (1)."""
        noise = jax.vmap(lambda rng: jax.random.normal(rng, x_0.shape[1:], jnp.float32))(rngs)
        return Corrupted(self.add_noise(x_0, noise, t), noise)

    def add_noise(self, x_0: Points, noise: Points, t: Time) -> Points:
        """Computes `x_t` from clean data and noise by eq. (1)."""
        return beside(self.signal(t), x_0) * x_0 + beside(self.noise(t), x_0) * noise

    def loss(
        self, output: Points, x_0: Points, x_t: Points, noise: Points, t: Time
    ) -> Float[Array, "batch"]:
        """Returns the weighted error of every example, a mean over points and channels, float32.

        Args:
            output: The output of the network for `x_t`.
            x_0: Clean data.
            x_t: Corrupted data. It is not used here, but is part of the protocol `Process`.
            noise: The standard normal noise in `x_t`.
            t: Diffusion times.
        """
        del x_t
        error = output.astype(jnp.float32) - self.target(x_0, noise, t)
        error = jnp.square(error) if self.loss_norm == "l2" else jnp.abs(error)
        return self.loss_weight(t) * jnp.mean(error, axis=tuple(range(1, error.ndim)))

    def to_epsilon(self, x_0: Points, x_t: Points, t: Time) -> Points:
        """Returns the noise in `x_t` for a given `x_0`: eq. (1) solved for epsilon."""
        return (x_t - beside(self.signal(t), x_t) * x_0) / beside(self.noise(t), x_t)

    def predict_x0(self, output: Points, x_t: Points, t: Time) -> Points:
        """Converts the network's output into an estimate of x_0, float32, not clipped."""
        return self.to_x0_and_epsilon(output, x_t, t)[0]

    def guide(self, conditional: Points, unconditional: Points, guidance: Guidance) -> Points:
        """Applies guidance to the predictions, of which x_0 and epsilon are affine functions."""
        guided = extrapolated(conditional, unconditional, guidance.scale)
        return rescaled(guided, conditional, guidance.rescale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuousNoise(AdditiveNoise, ContinuousTimes):
    """Additive noise in continuous time.

    Without noise in the sampler, points move from noise to data along the flow

        dx_t / dt = signal'(t) x_0 + noise'(t) epsilon                                    (3)

    where x_0 and epsilon are the estimates for x_t. The network predicts a combination of them:

        target = a(t) x_0 + b(t) epsilon                                                  (4)

    With eq. (1) these are two linear equations, so that a prediction determines x_0 and epsilon:

        x_0 = (b x_t - noise target) / d,    epsilon = (signal target - a x_t) / d,
        d = signal b - noise a                                                            (5)

    Attributes:
        last_share: Where samplers space times up to both ends, the last time has this share.
    """

    last_share = 0.0

    @abc.abstractmethod
    def velocity_scales(self, t: AnyTime) -> tuple[Scale, Scale]:
        """Returns signal'(t) and noise'(t) of eq. (3)."""

    @abc.abstractmethod
    def target_scales(self, t: AnyTime) -> tuple[Scale, Scale]:
        """Returns a(t) and b(t) of eq. (4), for which d of eq. (5) is not 0."""

    def target(self, x_0: Points, noise: Points, t: Time) -> Points:
        """Returns what the network should predict, eq. (4), float32."""
        a, b = (beside(scale, x_0) for scale in self.target_scales(t))
        return a * x_0.astype(jnp.float32) + b * noise.astype(jnp.float32)

    def to_x0_and_epsilon(self, output: Points, x_t: Points, t: Time) -> tuple[Points, Points]:
        """Converts the network's output into estimates of x_0 and epsilon by eq. (5)."""
        output, x_t = output.astype(jnp.float32), x_t.astype(jnp.float32)
        scales = (self.signal(t), self.noise(t), *self.target_scales(t))
        signal, noise, a, b = (beside(scale, x_t) for scale in scales)
        d = signal * b - noise * a
        return (b * x_t - noise * output) / d, (signal * output - a * x_t) / d
