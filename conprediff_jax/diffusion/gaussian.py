"""Gaussian diffusion in discrete time.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon,    epsilon ~ N(0, I)     (1)

The network predicts one of epsilon, x_0 and

    v = sqrt(alpha_bar_t) epsilon - sqrt(1 - alpha_bar_t) x_0                             (2)

Given x_t, each of the three determines the other two, and their errors are multiples of each other:

    |epsilon error|^2 = SNR_t |x_0 error|^2,    |v error|^2 = (SNR_t + 1) |x_0 error|^2   (3)

so a weight w on the x_0 error is the weight w / SNR_t on the epsilon error, and w / (SNR_t + 1) on
the v error.

Sources: eq. (1) Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239);
eq. (2) Salimans & Ho 2022, "Progressive Distillation" (arXiv 2202.00512), appendix D; eq. (3) and
the min-SNR weight Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy"
(arXiv 2303.09556).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.keys import fixed
from conprediff_jax.diffusion import schedules
from conprediff_jax.diffusion.guidance import Guidance, extrapolated, rescaled
from conprediff_jax.diffusion.process import PROCESSES, Corrupted, Time
from conprediff_jax.diffusion.times import TableTimes

PREDICTIONS = ("epsilon", "x0", "v")
LOSS_NORMS = ("l1", "l2")
WEIGHTINGS = ("constant", "min_snr")

# Below this value the signal is lost in float32, and a division by its root makes no sense.
MIN_ALPHA_BAR = 1e-20

Points = Float[Array, "batch *grid channels"]


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise FieldError(field, f"is {value!r}; choose one of {', '.join(choices)}")


def _gather(table: np.ndarray, t: Time, like: Points) -> Float[Array, "batch ..."]:
    """Returns `table[t]` in float32, in a shape that broadcasts against `like`."""
    return jnp.asarray(table, jnp.float32)[t].reshape((-1,) + (1,) * (like.ndim - 1))


@PROCESSES.register("gaussian")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianProcess(TableTimes):
    """Gaussian diffusion of arrays `[batch, *grid, channels]`; a `Process`.

    Arithmetic and results are float32, whatever the dtype of the arguments.

    Attributes:
        schedule: 'linear', 'scaled_linear' or 'cosine'; see `schedules`.
        num_steps: T. Times are 0 .. T-1, and x_0 is slightly noisy at time 0 already.
        beta_start: The first variance of the linear schedules.
        beta_end: The last variance of the linear schedules.
        prediction: What the network predicts: 'epsilon', 'x0' or 'v'.
        loss_norm: 'l2' (squared error) or 'l1' (absolute error), in the prediction's own space.
        weighting: 'constant' is the weight 1 in the prediction's own space. 'min_snr' is the weight
            `clip(SNR_t, snr_min, snr_max)` on the error of x_0, converted by eq. (3).
        snr_max: The largest weight on the error of x_0, gamma in Hang et al.
        snr_min: The smallest weight on the error of x_0. If it is above 0, the weight of an epsilon
            error, `snr_min / SNR_t`, grows without bound as the signal vanishes.

    Raises:
        ValueError: A field is outside its choices or range; the message names the field.
    """

    schedule: str = fixed("linear")
    num_steps: int = fixed(1000)
    beta_start: float = fixed(1e-4)
    beta_end: float = fixed(0.02)
    prediction: str = fixed("epsilon")
    loss_norm: str = "l2"
    weighting: str = "constant"
    snr_max: float = 5.0
    snr_min: float = 0.0

    discrete = False

    def __post_init__(self):
        _check_choice("prediction", self.prediction, PREDICTIONS)
        _check_choice("loss_norm", self.loss_norm, LOSS_NORMS)
        _check_choice("weighting", self.weighting, WEIGHTINGS)
        if not 0 <= self.snr_min <= self.snr_max:
            raise FieldError(
                "snr_min",
                f"is {self.snr_min} and snr_max {self.snr_max}; "
                "they must satisfy 0 <= snr_min <= snr_max",
            )
        if self.alpha_bars[-1] < MIN_ALPHA_BAR:
            raise FieldError(
                "beta_end",
                f"is {self.beta_end} over num_steps {self.num_steps}: no signal is left "
                f"(alpha_bar {self.alpha_bars[-1]:.1e}); lower either until alpha_bar >= "
                f"{MIN_ALPHA_BAR:.0e}",
            )

    @functools.cached_property
    def alpha_bars(self) -> schedules.Table:
        """`alpha_bar_t` for every time, `[T]`, float64. Samplers compute their tables from it."""
        beta = schedules.betas(self.schedule, self.num_steps, self.beta_start, self.beta_end)
        return schedules.alpha_bars(beta)

    @functools.cached_property
    def loss_weights(self) -> schedules.Table:
        """The weight of the loss in the prediction's own space for every time, `[T]`, float64.

        An l1 error is not squared, so its weight has the square roots of the factors in eq. (3).
        """
        if self.weighting == "constant":
            return np.ones(self.num_steps)
        snr = schedules.snr(self.alpha_bars)
        squared_scale = {"epsilon": snr, "x0": np.ones_like(snr), "v": snr + 1}[self.prediction]
        power = {"l1": 0.5, "l2": 1.0}[self.loss_norm]
        return np.clip(snr, self.snr_min, self.snr_max) / squared_scale**power

    def _signal(self, t: Time, like: Points) -> Float[Array, "batch ..."]:
        return _gather(np.sqrt(self.alpha_bars), t, like)

    def _sigma(self, t: Time, like: Points) -> Float[Array, "batch ..."]:
        return _gather(np.sqrt(1 - self.alpha_bars), t, like)

    def alpha_bar(self, t: Time) -> Float[Array, "batch"]:
        """Returns the share of the signal's power that is kept at `t`, in (0, 1), float32."""
        return jnp.asarray(self.alpha_bars, jnp.float32)[t]

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
        return self._signal(t, x_0) * x_0 + self._sigma(t, x_0) * noise

    def target(self, x_0: Points, noise: Points, t: Time) -> Points:
        """Returns what the network should predict: epsilon, x_0 or v (eq. 2), float32."""
        x_0, noise = x_0.astype(jnp.float32), noise.astype(jnp.float32)
        match self.prediction:
            case "epsilon":
                return noise
            case "x0":
                return x_0
            case _:
                return self._signal(t, x_0) * noise - self._sigma(t, x_0) * x_0

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
        weight = jnp.asarray(self.loss_weights, jnp.float32)[t]
        return weight * jnp.mean(error, axis=tuple(range(1, error.ndim)))

    def to_x0_and_epsilon(self, output: Points, x_t: Points, t: Time) -> tuple[Points, Points]:
        """Converts the network's output into estimates of x_0 and epsilon that satisfy eq. (1).

        Both are finite, since `alpha_bar` is at least `MIN_ALPHA_BAR` (the constructor checks this)
        and at most `1 - beta_0`. However, an error in epsilon is multiplied by `1 / sqrt(SNR_t)` in
        x_0, which is 2e4 at the end of a cosine schedule of 1000 steps.
        """
        output, x_t = output.astype(jnp.float32), x_t.astype(jnp.float32)
        signal, sigma = self._signal(t, x_t), self._sigma(t, x_t)
        match self.prediction:
            case "epsilon":
                return (x_t - sigma * output) / signal, output
            case "x0":
                return output, self.to_epsilon(output, x_t, t)
            case _:
                return signal * x_t - sigma * output, signal * output + sigma * x_t

    def to_epsilon(self, x_0: Points, x_t: Points, t: Time) -> Points:
        """Returns the noise in `x_t` for a given `x_0`: eq. (1) solved for epsilon."""
        return (x_t - self._signal(t, x_t) * x_0) / self._sigma(t, x_t)

    def predict_x0(self, output: Points, x_t: Points, t: Time) -> Points:
        """Converts the network's output into an estimate of x_0, float32, not clipped."""
        return self.to_x0_and_epsilon(output, x_t, t)[0]

    def guide(self, conditional: Points, unconditional: Points, guidance: Guidance) -> Points:
        """Applies guidance to the predictions; epsilon, x_0 and v are linear in each other."""
        guided = extrapolated(conditional, unconditional, guidance.scale)
        return rescaled(guided, conditional, guidance.rescale)
