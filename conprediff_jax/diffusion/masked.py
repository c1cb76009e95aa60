"""Masked diffusion of tokens in continuous time (MD4, MDLM).

Time runs from 0, where the tokens are clean, to 1, where all are masked. Every token becomes the
mask at a random time of its own, and then stays masked. It is masked by time t with probability

    m(t) = t                   'linear'
    m(t) = sin(pi t / 2)       'cosine'                                                    (1)

so alpha_t = 1 - m(t) is the share of tokens that are still clean. A network predicts
p(x_0^i | x_t) for masked tokens i. Tokens that are not masked are carried over, since x_t gives
them away. For the N tokens of an example,

    -log p(x_0) <= int_0^1 m'(t) / m(t) E[sum_{i masked} -log p(x_0^i | x_t)] dt           (2)

which has the same value for every schedule m, if the prediction does not depend on t. Predictions
that are uniform over K codes cost N log K.

The weight m'/m grows without limit towards time 0, and so does the variance of an estimate of (2)
from random times. So the masks of the times up to t_1 = 0.001 are all put on in one step at time 0:

    m(t) = m(t_1)  with the weight  1 / t_1        for t < t_1                             (3)

This step costs E[sum_{i masked} -log p(x_0^i | x_{t_1})], whatever m is. The sum of both parts is
still a bound, and still N log K for uniform predictions.

In reverse, from t to s < t, a masked token is revealed with probability

    (m(t) - m(s)) / m(t)                                                                   (4)

and is then drawn from p(x_0^i | x_t).

Sources: Shi et al. 2024, "Simplified and Generalized Masked Diffusion for Discrete Data" (MD4,
arXiv 2406.04329); Sahoo et al. 2024, "Simple and Effective Masked Diffusion Language Models" (MDLM,
arXiv 2406.07524), where a prediction that carries tokens over is called SUBS. In place of eq. (3),
the published code of both keeps t or m a small distance away from 0, so that uniform predictions
cost slightly less than N log K.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Key

from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.keys import fixed
from conprediff_jax.diffusion.guidance import LOG_ZERO
from conprediff_jax.diffusion.process import PROCESSES, Corrupted, Time
from conprediff_jax.diffusion.times import ContinuousTimes
from conprediff_jax.diffusion.tokens import LogProbs, TokenProcess, Tokens, log_prob_of

SCHEDULES = ("linear", "cosine")
FIRST = 1e-3  # t_1 of eq. (3)


@PROCESSES.register("masked")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedProcess(ContinuousTimes, TokenProcess):
    """Masked diffusion of tokens `[batch, *grid]` in continuous time; a `Process`.

    The network predicts logits of x_0, `[batch, *grid, K]`. Arithmetic and results are float32.
    Training draws the times of a batch independently. MD4 and MDLM spread them evenly, which would
    make the time of an example depend on the other examples.

    Attributes:
        num_codes: K. Codes are 0 .. K-1, and the mask is K.
        schedule: 'linear' or 'cosine', eq. (1).
        importance: See `ContinuousTimes`.

    Raises:
        ValueError: A field is outside its choices or range; the message names the field.
    """

    schedule: str = fixed("linear")

    def __post_init__(self):
        super().__post_init__()
        if self.schedule not in SCHEDULES:
            raise FieldError(
                "schedule", f"is {self.schedule!r}; choose one of {', '.join(SCHEDULES)}"
            )

    @property
    def prior_divergence(self) -> float:
        """KL(q(x_1 | x_0) || p(x_1)), which is 0: all tokens are masked in both."""
        return 0.0

    def as_bound(self) -> "MaskedProcess":
        """Returns the process itself, whose loss is the bound (2)."""
        return self

    def masked_share(self, t: Time) -> Float[Array, "batch"]:
        """Returns m(t), the probability that a token is masked, in (0, 1], float32."""
        t = jnp.maximum(t, FIRST)
        return t if self.schedule == "linear" else jnp.sin(jnp.pi / 2 * t)

    def time_of_masked_share(
        self, share: Float64[np.ndarray, "times"]
    ) -> Float64[np.ndarray, "times"]:
        """Returns the times at which these shares of the tokens are masked, float64."""
        return share if self.schedule == "linear" else np.arcsin(share) * 2 / np.pi

    def weight(self, t: Time) -> Float[Array, "batch"]:
        """Returns the weight of the loss in eq. (2) or (3), in [0, 1 / t_1], float32."""
        inside = jnp.maximum(t, FIRST)
        if self.schedule == "linear":
            return 1 / inside
        weight = jnp.pi / 2 / jnp.tan(jnp.pi / 2 * inside)
        return jnp.where(t < FIRST, 1 / FIRST, jnp.maximum(weight, 0.0))

    def alpha_bar(self, t: Time) -> Float[Array, "batch"]:
        """Returns alpha_t, the share of tokens that are still clean at `t`, in [0, 1), float32."""
        return 1 - self.masked_share(t)

    def network_time(self, t: Time) -> Float[Array, "batch"]:
        """Returns 1000 t: the embedding of the transformer is made for numbers of this size."""
        return 1000 * t

    def corrupt(self, rngs: Key[Array, "batch"], x_0: Tokens, t: Time) -> Corrupted:
        """Draws `x_t`, int32, by eq. (1). The noise is one uniform number for every token."""
        noise = jax.vmap(lambda rng: jax.random.uniform(rng, x_0.shape[1:]))(rngs)
        masked = noise < self.masked_share(t).reshape((-1,) + (1,) * (x_0.ndim - 1))
        return Corrupted(jnp.where(masked, self.mask_token, x_0).astype(jnp.int32), noise)

    def predict_x0(self, output: LogProbs, x_t: Tokens, t: Time) -> LogProbs:
        """Turns logits into log-probabilities of x_0, limited to [LOG_ZERO, 0], float32.

        Tokens that are not masked are certain.

        Raises:
            ValueError: There are not K logits.
        """
        x_t = x_t[..., None]
        carried = jnp.where(x_t == jnp.arange(self.num_codes), 0.0, LOG_ZERO)
        return jnp.where(x_t == self.mask_token, self.log_probs(output), carried)

    def loss(
        self, output: LogProbs, x_0: Tokens, x_t: Tokens, noise: Array, t: Time
    ) -> Float[Array, "batch"]:
        """Returns the loss of every example, in nats per token, float32.

        Its mean over uniform times and over `x_t` is the bound (2), (3), divided by N.

        Args:
            output: Logits of x_0.
            x_0: Clean tokens, without masks.
            x_t: Corrupted tokens.
            noise: Not used here; it is part of the protocol `Process`.
            t: Diffusion times in [0, 1].
        """
        log_p = log_prob_of(self.predict_x0(output, x_t, t), x_0)
        return -self.weight(t) * jnp.mean(log_p, axis=tuple(range(1, log_p.ndim)))
