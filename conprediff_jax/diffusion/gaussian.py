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

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.keys import fixed
from conprediff_jax.diffusion import schedules
from conprediff_jax.diffusion.additive import (
    LOSS_NORMS,
    AdditiveNoise,
    AnyTime,
    Points,
    Scale,
    beside,
)
from conprediff_jax.diffusion.process import PROCESSES, Time
from conprediff_jax.diffusion.times import TableTimes

PREDICTIONS = ("epsilon", "x0", "v")
WEIGHTINGS = ("constant", "min_snr")

# Below this value the signal is lost in float32, and a division by its root makes no sense.
MIN_ALPHA_BAR = 1e-20


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise FieldError(field, f"is {value!r}; choose one of {', '.join(choices)}")


def _at(table: np.ndarray, t: AnyTime) -> Scale:
    """Returns `table[t]`, float64 for times in NumPy and float32 otherwise."""
    return table[t] if isinstance(t, np.ndarray) else jnp.asarray(table, jnp.float32)[t]


@PROCESSES.register("gaussian")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianProcess(AdditiveNoise, TableTimes):
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

    def signal(self, t: AnyTime) -> Scale:
        """Returns sqrt(alpha_bar), the factor of x_0 in eq. (1)."""
        return _at(np.sqrt(self.alpha_bars), t)

    def noise(self, t: AnyTime) -> Scale:
        """Returns sqrt(1 - alpha_bar), the factor of epsilon in eq. (1)."""
        return _at(np.sqrt(1 - self.alpha_bars), t)

    def length(self, t: AnyTime) -> Scale:
        """Returns 1: x_t keeps the variance of x_0 if that is 1."""
        return _at(np.ones(self.num_steps), t)

    def alpha_bar(self, t: AnyTime) -> Scale:
        """Returns the share of the signal's power that is kept at `t`, in (0, 1)."""
        return _at(self.alpha_bars, t)

    def loss_weight(self, t: Time) -> Float[Array, "batch"]:
        """Returns the weight of the error in the prediction's own space, float32."""
        return _at(self.loss_weights, t)

    def target(self, x_0: Points, noise: Points, t: Time) -> Points:
        """Returns what the network should predict: epsilon, x_0 or v (eq. 2), float32."""
        x_0, noise = x_0.astype(jnp.float32), noise.astype(jnp.float32)
        match self.prediction:
            case "epsilon":
                return noise
            case "x0":
                return x_0
            case _:
                signal, sigma = beside(self.signal(t), x_0), beside(self.noise(t), x_0)
                return signal * noise - sigma * x_0

    def to_x0_and_epsilon(self, output: Points, x_t: Points, t: Time) -> tuple[Points, Points]:
        """Converts the network's output into estimates of x_0 and epsilon that satisfy eq. (1).

        Both are finite, since `alpha_bar` is at least `MIN_ALPHA_BAR` (the constructor checks this)
        and at most `1 - beta_0`. However, an error in epsilon is multiplied by `1 / sqrt(SNR_t)` in
        x_0, which is 2e4 at the end of a cosine schedule of 1000 steps.
        """
        output, x_t = output.astype(jnp.float32), x_t.astype(jnp.float32)
        signal, sigma = beside(self.signal(t), x_t), beside(self.noise(t), x_t)
        match self.prediction:
            case "epsilon":
                return (x_t - sigma * output) / signal, output
            case "x0":
                return output, self.to_epsilon(output, x_t, t)
            case _:
                return signal * x_t - sigma * output, signal * output + sigma * x_t
