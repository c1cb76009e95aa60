"""Mask-and-replace diffusion of tokens in discrete time (VQ-Diffusion).

A token is one of K codes, or the mask, which has index K. Each step keeps a code, replaces it with
a code drawn uniformly, or masks it; a mask stays. Several steps compose to one step of the same
kind. With the cumulative alpha_bar and gamma_bar (both linear in t) and
beta_bar = (1 - alpha_bar - gamma_bar) / K,

    q(x_t = j | x_0 = k) = alpha_bar_t [j = k] + beta_bar_t    for codes j
    q(x_t = mask | x_0)  = gamma_bar_t                                                    (1)

and from x_s to x_t, for any s < t,

    alpha = alpha_bar_t / alpha_bar_s,   1 - gamma = (1 - gamma_bar_t) / (1 - gamma_bar_s),
    beta = (1 - alpha - gamma) / K                                                        (2)

A network predicts p(x_0 | x_t). With w_k = p(x_0 = k | x_t) / q(x_t | x_0 = k) and W = sum_k w_k,

    p(x_s = j | x_t) = sum_k q(x_s = j | x_t, x_0 = k) p(x_0 = k | x_t)
                     = q(x_t | x_s = j) (alpha_bar_s w_j / W + beta_bar_s) W   for codes j
                     = q(x_t | x_s = mask) gamma_bar_s W                   for the mask   (3)

which takes O(K) for every token; no transition matrix is built. In the divergence from the true
posterior, where x_0 is known, q(x_t | x_s) cancels:

    KL(q(x_s | x_t, x_0) || p(x_s | x_t)) = -log(q(x_t | x_0) W)
        + sum_j q(x_s = j | x_t, x_0) log((alpha_bar_s [j = x_0] + beta_bar_s)
                                          / (alpha_bar_s w_j / W + beta_bar_s))           (4)

Sources: Gu et al. 2022, "Vector Quantized Diffusion Model for Text-to-Image Synthesis" (arXiv
2111.14822), eqs. (7), (8), (11).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Key

from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.keys import fixed
from conprediff_jax.diffusion.guidance import LOG_ZERO
from conprediff_jax.diffusion.importance import TimeImportance
from conprediff_jax.diffusion.process import PROCESSES, Corrupted, Time, Times
from conprediff_jax.diffusion.times import TableTimes
from conprediff_jax.diffusion.tokens import LogProbs, TokenProcess, Tokens, log_prob_of

Table = Float64[np.ndarray, "time"]


class Arrival(NamedTuple):
    """log q(x_t | x), which takes three values.

    Attributes:
        same: The value where x_t and x are the same code.
        other: The value where x_t and x are different codes.
        mask: The value where x_t is the mask and x is a code.
    """

    same: Array | np.ndarray
    other: Array | np.ndarray
    mask: Array | np.ndarray

    def log_q(self, x_t: Array, x: Array, num_codes: int) -> Array:
        """Returns log q(x_t | x) for tokens and codes that broadcast against each other."""
        codes = jnp.where(x_t == x, self.same, self.other)
        return jnp.where(x_t == num_codes, self.mask, codes)


class Transition(NamedTuple):
    """The coefficients of eqs. (3) and (4), for one step from t to s or for a table of steps.

    Attributes:
        from_x0: log q(x_t | x_0).
        from_xs: log q(x_t | x_s).
        alpha_bar: alpha_bar_s.
        beta_bar: beta_bar_s.
        gamma_bar: gamma_bar_s.
    """

    from_x0: Arrival
    from_xs: Arrival
    alpha_bar: Array | np.ndarray
    beta_bar: Array | np.ndarray
    gamma_bar: Array | np.ndarray

    def predict(self, log_p_x0: Array, x_t: Array) -> tuple[Array, Array]:
        """Returns log(alpha_bar_s w / W + beta_bar_s) and log W.

        Args:
            log_p_x0: Log-probabilities of the codes of x_0, `[batch, *grid, K]`.
            x_t: Tokens at t, `[batch, *grid, 1]`. The entries of this transition must be `aligned`.

        Returns:
            Arrays `[batch, *grid, K]` and `[batch, *grid, 1]`.
        """
        num_codes = log_p_x0.shape[-1]
        log_w = log_p_x0 - self.from_x0.log_q(x_t, jnp.arange(num_codes), num_codes)
        log_total = jax.nn.logsumexp(log_w, axis=-1, keepdims=True)
        share = jnp.exp(log_w - log_total)
        return jnp.log(self.alpha_bar * share + self.beta_bar), log_total

    def aligned(self, ndim: int) -> "Transition":
        """Returns the same in float32, with entries of shape `[batch or 1, 1, ..., 1]`."""
        shape = (-1,) + (1,) * (ndim - 1)
        return jax.tree.map(lambda entry: jnp.asarray(entry, jnp.float32).reshape(shape), self)


def posterior(
    log_p_x0: LogProbs, x_t: Tokens, transition: Transition
) -> Float[Array, "batch *grid codes+1"]:
    """Computes the distribution of x_s from x_t and a distribution of x_0, eq. (3).

    Args:
        log_p_x0: Log-probabilities of the codes of x_0. If they are not normalised, the result is
            not normalised either, by the same factor.
        x_t: Tokens at t, which may be masks.
        transition: The step from t to s. Every entry is a scalar or has shape `[batch]`.

    Returns:
        Log-probabilities of the codes and, last, of the mask, limited to [LOG_ZERO, 0], float32.
    """
    num_codes, x_t = log_p_x0.shape[-1], x_t[..., None]
    step = transition.aligned(log_p_x0.ndim)
    log_codes, log_total = step.predict(log_p_x0, x_t)
    log_codes += step.from_xs.log_q(x_t, jnp.arange(num_codes), num_codes)
    log_mask = jnp.where(x_t == num_codes, jnp.log(step.gamma_bar), -jnp.inf)
    log_p = jnp.concatenate([log_codes, log_mask], axis=-1) + log_total
    return jnp.clip(log_p, LOG_ZERO, 0.0)


def divergence(
    log_p_x0: LogProbs, x_0: Tokens, x_t: Tokens, transition: Transition
) -> Float[Array, "batch *grid"]:
    """Computes the divergence (4) of the predicted from the true posterior, in nats, float32.

    Args:
        log_p_x0: Log-probabilities of the codes of x_0.
        x_0: Clean tokens, without masks.
        x_t: Tokens at t, which may be masks.
        transition: The step from t to s, where s is not the clean end. Every entry is a scalar or
            has shape `[batch]`.
    """
    num_codes, x_0, x_t = log_p_x0.shape[-1], x_0[..., None], x_t[..., None]
    codes = jnp.arange(num_codes)
    step = transition.aligned(log_p_x0.ndim)
    log_predicted, log_total = step.predict(log_p_x0, x_t)
    log_true = jnp.log(jnp.where(codes == x_0, step.alpha_bar, 0.0) + step.beta_bar)
    log_evidence = step.from_x0.log_q(x_t, x_0, num_codes)
    q = jnp.exp(step.from_xs.log_q(x_t, codes, num_codes) + log_true - log_evidence)
    ratio = jnp.sum(q * (log_true - log_predicted), axis=-1)
    return ratio - (log_evidence + log_total)[..., 0]


@PROCESSES.register("mask_and_replace")
@dataclasses.dataclass(frozen=True, kw_only=True)
class CategoricalProcess(TableTimes, TokenProcess):
    """Mask-and-replace diffusion of tokens `[batch, *grid]`; a `Process`.

    The network predicts logits of x_0, `[batch, *grid, K]`. Arithmetic and results are float32.

    Attributes:
        num_codes: K. Codes are 0 .. K-1, and the mask is K.
        num_steps: T, at least 2. Times are 0 .. T-1, and x_0 is slightly noisy at time 0 already.
        alpha_start: alpha_bar at time 0.
        alpha_end: alpha_bar at time T-1.
        gamma_start: gamma_bar at time 0.
        gamma_end: gamma_bar at time T-1.
        auxiliary_weight: The weight of the auxiliary loss. At 0 the loss is the variational bound.
        adaptive_auxiliary: Whether that weight is multiplied by `2 - t/T`.
        importance: Whether training draws times in proportion to their root mean square loss; see
            `TimeImportance`. Otherwise it draws them uniformly.

    Raises:
        ValueError: A field is out of range; the message names the field.
    """

    num_steps: int = fixed(100)
    alpha_start: float = fixed(0.99999)
    alpha_end: float = fixed(9e-6)
    gamma_start: float = fixed(9e-6)
    gamma_end: float = fixed(0.99999)
    auxiliary_weight: float = 5e-4
    adaptive_auxiliary: bool = True
    importance: bool = fixed(True)

    def __post_init__(self):
        super().__post_init__()
        for field, least in (("num_steps", 2), ("auxiliary_weight", 0)):
            if getattr(self, field) < least:
                raise FieldError(field, f"is {getattr(self, field)}; it must be at least {least}")
        if not 0 < self.alpha_end < self.alpha_start:
            raise FieldError(
                "alpha_start",
                f"is {self.alpha_start} and alpha_end {self.alpha_end}; "
                "they must satisfy 0 < alpha_end < alpha_start",
            )
        if not 0 < self.gamma_start < self.gamma_end:
            raise FieldError(
                "gamma_start",
                f"is {self.gamma_start} and gamma_end {self.gamma_end}; "
                "they must satisfy 0 < gamma_start < gamma_end",
            )
        beta = self.beta_bars
        if beta.min() <= 0 or np.any(np.diff(beta / self.alpha_bars) <= 0):
            raise ValueError(
                f"alpha {self.alpha_start} .. {self.alpha_end} with gamma {self.gamma_start} .. "
                f"{self.gamma_end}: alpha + gamma must stay below 1, and every step must replace "
                "some codes, as it does where both sums are equal"
            )

    @functools.cached_property
    def alpha_bars(self) -> Table:
        """The probability that a code is kept until each time, `[T]`, float64."""
        return np.linspace(self.alpha_start, self.alpha_end, self.num_steps)

    @functools.cached_property
    def gamma_bars(self) -> Table:
        """The probability that a code is masked by each time, `[T]`, float64."""
        return np.linspace(self.gamma_start, self.gamma_end, self.num_steps)

    @functools.cached_property
    def beta_bars(self) -> Table:
        """The probability that a code is replaced with a given one by each time, `[T]`, float64."""
        return (1 - self.alpha_bars - self.gamma_bars) / self.num_codes

    @functools.cached_property
    def auxiliary_weights(self) -> Table:
        """The weight of the auxiliary loss at each time, `[T]`, float64."""
        time = np.arange(self.num_steps) / self.num_steps
        return self.auxiliary_weight * (2 - time if self.adaptive_auxiliary else np.ones_like(time))

    @property
    def prior_divergence(self) -> float:
        """KL(q(x_T | x_0) || p(x_T)), where p(x_T) has the mask of q and is uniform over codes."""
        alpha, beta, gamma = (
            table[-1] for table in (self.alpha_bars, self.beta_bars, self.gamma_bars)
        )
        share = (1 - gamma) / self.num_codes
        right = (alpha + beta) * np.log((alpha + beta) / share)
        return float(right + (self.num_codes - 1) * beta * np.log(beta / share))

    def as_bound(self) -> "CategoricalProcess":
        """Returns the same process without the auxiliary loss."""
        return dataclasses.replace(self, auxiliary_weight=0.0)

    def transitions(
        self, times: Int[np.ndarray, "steps"], previous: Int[np.ndarray, "steps"]
    ) -> Transition:
        """Returns the table of steps from `times` to `previous`, float64, eqs. (1) and (2).

        Args:
            times: The times t.
            previous: The earlier times s. -1 is the clean end, where x_s is x_0 and eq. (3) gives
                the prediction itself.
        """
        # The clean end is appended behind time T-1, so that index -1 finds it.
        tables = [(self.alpha_bars, 1.0), (self.beta_bars, 0.0), (self.gamma_bars, 0.0)]
        alpha_bar, beta_bar, gamma_bar = (np.append(table, clean) for table, clean in tables)
        (alpha_t, alpha_s), (beta_t, beta_s), (gamma_t, gamma_s) = (
            (table[times], table[previous]) for table in (alpha_bar, beta_bar, gamma_bar)
        )
        alpha = alpha_t / alpha_s
        gamma = (gamma_t - gamma_s) / (1 - gamma_s)
        # This is (1 - alpha - gamma) / K, without a difference of numbers close to 1.
        beta = (beta_t * alpha_s - beta_s * alpha_t) / ((1 - gamma_s) * alpha_s)
        return Transition(
            Arrival(*(np.log(p) for p in (alpha_t + beta_t, beta_t, gamma_t))),
            Arrival(*(np.log(p) for p in (alpha + beta, beta, gamma))),
            *(alpha_s, beta_s, gamma_s),
        )

    @functools.cached_property
    def _single_steps(self) -> Transition:
        """The steps from every time t to t - 1, in float32."""
        times = np.arange(self.num_steps)
        table = self.transitions(times, times - 1)
        return jax.tree.map(lambda column: column.astype(np.float32), table)

    def alpha_bar(self, t: Time) -> Float[Array, "batch"]:
        """Returns the probability that a code is kept until `t`, in (0, 1), float32."""
        return jnp.asarray(self.alpha_bars, jnp.float32)[t]

    def evaluated_times(self, count: int) -> Int[np.ndarray, "times"]:
        """Returns all T times, since their losses add up to a bound."""
        return super().evaluated_times(max(count, self.num_steps))

    def init_history(self) -> TimeImportance | None:
        """Returns a history without losses, or None where times are uniform."""
        return TimeImportance.init(self.num_steps) if self.importance else None

    def sample_time(
        self, rngs: Key[Array, "batch"], history: TimeImportance | None = None
    ) -> Times:
        """Draws a time for every example, uniformly if there is no history."""
        return super().sample_time(rngs) if history is None else history.draw(rngs)

    def remember(
        self, history: TimeImportance | None, t: Time, loss: Float[Array, "batch"]
    ) -> TimeImportance | None:
        """Returns the history with the losses of a batch added."""
        return None if history is None else history.update(t, loss)

    def corrupt(self, rngs: Key[Array, "batch"], x_0: Tokens, t: Time) -> Corrupted:
        """Draws `x_t`, int32, by eq. (1). The noise is one uniform number for every token."""

        def draw(rng: Array) -> tuple[Array, Array]:
            uniform, code = jax.random.split(rng)
            return (
                jax.random.uniform(uniform, x_0.shape[1:]),
                jax.random.randint(code, x_0.shape[1:], 0, self.num_codes),
            )

        noise, code = jax.vmap(draw)(rngs)
        # Small numbers stand for the rare event (a replacement), since float32 is finest there.
        limits = np.stack([self.num_codes * self.beta_bars, 1 - self.gamma_bars])
        replaced, unmasked = (
            noise < limit.reshape((-1,) + (1,) * (x_0.ndim - 1))
            for limit in jnp.asarray(limits, jnp.float32)[:, t]
        )
        x_t = jnp.where(replaced, code, jnp.where(unmasked, x_0, self.mask_token))
        return Corrupted(x_t.astype(jnp.int32), noise)

    def predict_x0(self, output: LogProbs, x_t: Tokens, t: Time) -> LogProbs:
        """Turns logits into log-probabilities of x_0; see `log_probs`."""
        return self.log_probs(output)

    def posterior(
        self, log_p_x0: LogProbs, x_t: Tokens, t: Time
    ) -> Float[Array, "batch *grid codes+1"]:
        """Returns the distribution of the tokens at t - 1; see the function `posterior`."""
        return posterior(log_p_x0, x_t, self._gather(t))

    def _gather(self, t: Time) -> Transition:
        return jax.tree.map(lambda column: jnp.asarray(column)[t], self._single_steps)

    def loss(
        self, output: LogProbs, x_0: Tokens, x_t: Tokens, noise: Array, t: Time
    ) -> Float[Array, "batch"]:
        """Returns T (L_t + w_t A_t) for every example, in nats per token, float32.

            L_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)),     L_0 = -log p(x_0 | x_t)
            A_t = KL(x_0 || p(x_0 | x_t)) = -log p(x_0 | x_t)

        The factor T makes the first term, with t drawn uniformly, an unbiased estimate of the
        variational bound without its constant prior term. The published loss is this loss times
        the importance weight 1 / (T p(t)).

        Args:
            output: Logits of x_0.
            x_0: Clean tokens, without masks.
            x_t: Corrupted tokens.
            noise: Not used here; it is part of the protocol `Process`.
            t: Diffusion times.
        """
        log_p_x0 = self.predict_x0(output, x_t, t)
        likelihood = -log_prob_of(log_p_x0, x_0)
        # There is no divergence at time 0. The one of time 1 is computed in its place and not used,
        # which keeps infinities out of the gradient.
        kl = divergence(log_p_x0, x_0, x_t, self._gather(jnp.maximum(t, 1)))

        likelihood, kl = (
            jnp.mean(term, axis=tuple(range(1, term.ndim))) for term in (likelihood, kl)
        )
        bound = jnp.where(t == 0, likelihood, kl)
        weight = jnp.asarray(self.auxiliary_weights, jnp.float32)[t]
        return self.num_steps * (bound + weight * likelihood)
