"""Flow matching: paths between data and noise in continuous time, and their velocity.

Time runs from the data at 0 to the noise at 1. A path is

    x_t = signal(t) x_0 + noise(t) epsilon,    epsilon ~ N(0, I)                          (1)

    linear    signal = 1 - t,          noise = t
    cosine    signal = cos(pi t / 2),  noise = sin(pi t / 2)     ("GVP" in SiT)

and the network predicts its velocity

    v = dx_t / dt = signal'(t) x_0 + noise'(t) epsilon                                    (2)

which is epsilon - x_0 on the linear path. A network that reads large patches cannot pass on the
noise in them, which the velocity contains. It can predict x_0 instead, of which x_t makes a
velocity; the loss is the error of that velocity all the same, which is 1 / t times the error of x_0
on the linear path, with t >= 0.05.

Training draws u in (0, 1), uniformly or from a
logit-normal distribution, logit u ~ N(m, s^2), and shifts it:

    t = k u / (1 + (k - 1) u)                                                             (3)

Images of more points need more noise to hide the same signal. Where k = 1 suits n points, k =
sqrt(m / n) suits m points. Samplers visit shifted times too: `share` is u, and `time_at` is eq.
(3).

The published code of SiT counts from the noise at 0 to the data at 1, so its t is our 1 - t and its
velocity our -v. The paper's direction is ours.

Sources: eqs. (1), (2) Lipman et al. 2023, "Flow Matching for Generative Modeling" (arXiv
2210.02747); Liu et al. 2023, "Flow Straight and Fast" (arXiv 2209.03003); Ma et al. 2024, "SiT"
(arXiv 2401.08740). x_0 under the loss of the velocity Li & He 2025, "Back to Basics: Let Denoising
Generative Models Denoise" (arXiv 2511.13720). Eq. (3) and logit-normal times Esser et al. 2024,
"Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (arXiv 2403.03206), eqs.
(19), (23).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.keys import fixed
from conprediff_jax.diffusion.additive import AnyTime, ContinuousNoise, Scale, numpy_of
from conprediff_jax.diffusion.process import PROCESSES, Time

PATHS = ("linear", "cosine")
PREDICTIONS = ("velocity", "x0")
TIME_DISTRIBUTIONS = ("uniform", "logit_normal")

# Where x_0 is predicted, the weight of its error stops growing below this time.
LEAST_TIME = 0.05


@PROCESSES.register("flow")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowProcess(ContinuousNoise):
    """Flow matching of arrays `[batch, *grid, channels]`; a `Process` in continuous time.

    Attributes:
        path: 'linear' or 'cosine'; see eq. (1).
        prediction: What the network predicts: 'velocity', or 'x0' for networks that read patches.
        times: The distribution of u in training: 'uniform' or 'logit_normal'.
        logit_mean: m of 'logit_normal'. A positive mean favours noisy times, as in the paper. In
            the published training code of diffusers a positive mean favours clean times.
        logit_std: s of 'logit_normal'.
        shift: k of eq. (3). 1 is no shift.
        time_scale: The network reads `time_scale * t`. 1000 makes times as large as the steps of
            DDPM, and is what SD3 has. SiT's networks read 1 - t, which is time_scale 1 here with
            `time_scale=-1` and `time_shift=1` in a `model` section of kind 'dit'.

    Raises:
        ValueError: A field is outside its choices or range; the message names the field.
    """

    path: str = fixed("linear")
    prediction: str = fixed("velocity")
    times: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0
    time_scale: float = fixed(1000.0)

    # Where times are spaced up to both ends, the last one has this share, as in diffusers.
    last_share = 1e-3

    def __post_init__(self):
        for field, choices in (
            ("path", PATHS),
            ("prediction", PREDICTIONS),
            ("times", TIME_DISTRIBUTIONS),
        ):
            if getattr(self, field) not in choices:
                value = getattr(self, field)
                raise FieldError(field, f"is {value!r}; choose one of {', '.join(choices)}")
        for field in ("logit_std", "shift", "time_scale"):
            if getattr(self, field) <= 0:
                raise FieldError(field, f"is {getattr(self, field)}; it must be positive")

    def signal(self, t: AnyTime) -> Scale:
        """Returns the factor of x_0 in eq. (1)."""
        return 1 - t if self.path == "linear" else numpy_of(t).cos(np.pi / 2 * t)

    def noise(self, t: AnyTime) -> Scale:
        """Returns the factor of epsilon in eq. (1)."""
        return t if self.path == "linear" else numpy_of(t).sin(np.pi / 2 * t)

    def target_scales(self, t: AnyTime) -> tuple[Scale, Scale]:
        """Returns those of the velocity, or of x_0, whichever the network predicts."""
        if self.prediction == "velocity":
            return self.velocity_scales(t)
        numpy = numpy_of(t)
        return numpy.ones_like(t), numpy.zeros_like(t)

    def velocity_scales(self, t: AnyTime) -> tuple[Scale, Scale]:
        """Returns the factors of x_0 and epsilon in the velocity, eq. (2)."""
        if self.path == "linear":
            one = numpy_of(t).ones_like(t)
            return -one, one
        return -np.pi / 2 * self.noise(t), np.pi / 2 * self.signal(t)

    def loss_weight(self, t: Time) -> Float[Array, "batch"]:
        """Returns the weight that makes the error of the prediction that of the velocity."""
        if self.prediction == "velocity":
            return jnp.ones_like(t)
        t = jnp.maximum(t, LEAST_TIME)
        to_x_0, to_epsilon = self.velocity_scales(t)
        return jnp.square(to_x_0 - to_epsilon * self.signal(t) / self.noise(t))

    def network_time(self, t: Time) -> Time:
        """Returns `time_scale * t`."""
        return self.time_scale * t

    def share(self, t: Time) -> Float[Array, "batch"]:
        """Returns u of eq. (3), in [0, 1], float32."""
        return t / (self.shift - (self.shift - 1) * t)

    def time_at(
        self, share: float | Float[np.ndarray, "*shape"]
    ) -> float | Float[np.ndarray, "*shape"]:
        """Returns t of eq. (3)."""
        return self.shift * share / (1 + (self.shift - 1) * share)

    def quantile(self, u: Float[Array, "batch"]) -> Float[Array, "batch"]:
        """Returns the training time below which there is a share u of all, in (0, 1)."""
        if self.times == "logit_normal":
            u = jax.nn.sigmoid(self.logit_mean + self.logit_std * jax.scipy.special.ndtri(u))
        return self.shift * u / (1 + (self.shift - 1) * u)

    def cumulative(self, t: Time) -> Float[Array, "batch"]:
        """Returns the share of training times that are below `t`."""
        u = self.share(t)
        if self.times == "uniform":
            return u
        logit = jnp.log(u) - jnp.log1p(-u)
        return jax.scipy.special.ndtr((logit - self.logit_mean) / self.logit_std)
