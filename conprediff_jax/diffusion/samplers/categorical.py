"""Sampling of a mask-and-replace process.

Every call of the network gives p(x_0 | x_t). What happens then depends on the `reveal`:

    posterior   every token is drawn from p(x_s | x_t), s the next time visited          (1)
    random      a fixed number of masked tokens, chosen at random, is drawn from p(x_0 | x_t);
                the others stay as they are                                              (2)
    purity      the same, tokens being chosen in proportion to their purity, max_k p(x_0 = k | x_t),
                and drawn from p ** (1 + r purity), normalised                           (3)

Under 'posterior' a step makes independent draws for tokens that depend on each other; the other two
choose how many tokens are drawn together. The last call draws every token from p(x_0 | x_t).

Tokens that are known stand in x_t as they are, at every call, and are never drawn. The others
follow the process's own schedule: of u unknown tokens out of n, (2) and (3) have revealed
floor(u c / n) when they would have revealed c of n.

Sources: eq. (1), its skipped steps and truncation: Gu et al. 2022, "Vector Quantized Diffusion
Model for Text-to-Image Synthesis" (arXiv 2111.14822) and its published code; eqs. (2), (3): Tang et
al. 2022, "Improved Vector Quantized Diffusion Models" (arXiv 2205.16007), eq. (11).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int64, Key

from conprediff_jax.common.errors import FieldError
from conprediff_jax.diffusion.categorical import (
    LOG_ZERO,
    CategoricalProcess,
    LogProbs,
    Tokens,
    posterior,
)
from conprediff_jax.diffusion.samplers.base import Denoise, Known, spaced_times

REVEALS = ("posterior", "random", "purity")


def truncate(log_probs: LogProbs, rate: float) -> LogProbs:
    """Keeps the most probable codes, as many as have less than `rate` mass before them.

    Args:
        log_probs: Log-probabilities.
        rate: In (0, 1]. The most probable code is kept always, and codes as probable as the last
            one kept are kept too.

    Returns:
        Log-probabilities with LOG_ZERO for the codes left out; the others are not renormalised.
    """
    ordered = jnp.flip(jnp.sort(log_probs, axis=-1), axis=-1)
    mass = jnp.cumsum(jnp.exp(ordered), axis=-1)
    before = jnp.pad(mass[..., :-1], [(0, 0)] * (mass.ndim - 1) + [(1, 0)])
    least = jnp.min(jnp.where(before < rate, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(log_probs >= least, log_probs, LOG_ZERO)


class Calls(NamedTuple):
    """The calls of the network, in order, all of shape `[calls]`.

    Attributes:
        times: The time the network is told.
        previous: Where the step under way ends; -1 is the clean end.
        counts: Masked tokens to reveal, where it is not the posterior that decides.
    """

    times: Int64[np.ndarray, "calls"]
    previous: Int64[np.ndarray, "calls"]
    counts: Int64[np.ndarray, "calls"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CategoricalSampler:
    """Ancestral sampling of tokens, over all T steps or fewer.

    Skipped steps are exact: from t to s by the posterior of the composed steps.

    Attributes:
        process: The process to invert.
        steps: Number of times visited, 1 .. T, spaced evenly down from T-1 ('trailing').
        truncation: Share of the mass that `truncate` keeps, in (0, 1]; 1 keeps all.
        reveal: 'posterior', 'random' (high-quality inference) or 'purity'; see the module.
        tokens_per_call: At most so many tokens are revealed by one call; a step that has more to
            reveal takes several calls. None: one call a step. Not for 'posterior'.
        purity_weight: r in eq. (3). Only for 'purity'.
        purity_temperature: Of the choice of tokens in 'purity': 1 is in proportion to purity, as
            published; 0 reveals the purest first.

    Raises:
        ValueError: If a field is outside its choices or range; the message names the field.
    """

    process: CategoricalProcess
    steps: int
    truncation: float = 1.0
    reveal: str = "posterior"
    tokens_per_call: int | None = None
    purity_weight: float = 0.0
    purity_temperature: float = 1.0

    def __post_init__(self):
        if not 1 <= self.steps <= self.process.num_steps:
            raise FieldError(
                "steps",
                f"is {self.steps}; it must lie in 1 .. {self.process.num_steps}, the "
                "process's num_steps",
            )
        if not 0 < self.truncation <= 1:
            raise FieldError("truncation", f"is {self.truncation}; it must lie in (0, 1]")
        if self.reveal not in REVEALS:
            raise FieldError("reveal", f"is {self.reveal!r}; choose one of {', '.join(REVEALS)}")
        if self.tokens_per_call is not None and (
            self.tokens_per_call < 1 or self.reveal == "posterior"
        ):
            raise FieldError(
                "tokens_per_call",
                f"is {self.tokens_per_call} with reveal {self.reveal!r}; it must "
                "be at least 1 and goes with 'random' or 'purity', or be None",
            )
        for field, default in (("purity_weight", 0.0), ("purity_temperature", 1.0)):
            value = getattr(self, field)
            if value < 0 or (value != default and self.reveal != "purity"):
                raise FieldError(
                    field,
                    f"is {value} with reveal {self.reveal!r}; it must be at least 0, and "
                    f"{default} unless reveal is 'purity'",
                )

    def calls(self, num_tokens: int) -> Calls:
        """The calls of the network for a grid of so many tokens.

        'random' and 'purity' reveal as many tokens until each time as the process leaves unmasked
        there on average, rounded; steps that reveal none make no call.
        """
        times = spaced_times(self.process.num_steps, self.steps, "trailing")
        previous = np.append(times[1:], -1)
        if self.reveal == "posterior":
            return Calls(times, previous, np.zeros_like(times))
        unmasked = np.round(num_tokens * (1 - self.process.gamma_bars[times[1:]]))
        counts = np.diff(unmasked.astype(np.int64), prepend=0)
        most = self.tokens_per_call or max(num_tokens, 1)
        parts = [np.minimum(most, count - np.arange(0, count, most)) for count in counts]
        repeats = [*map(len, parts), 1]
        return Calls(
            np.repeat(times, repeats),
            np.repeat(previous, repeats),
            np.concatenate([*parts, [num_tokens]]).astype(np.int64),
        )

    def sample(
        self,
        denoise: Denoise,
        x_T: Tokens,
        rngs: Key[Array, "batch"],
        known: Known | None = None,
    ) -> Tokens:
        """Runs the reverse process. Jit the caller: the network is compiled once.

        Args:
            denoise: The network: `(x_t [batch, *grid] int32, t [batch] int32)` to logits of x_0,
                `[batch, *grid, K]`, guided or not.
            x_T: Where to start: `process.mask_token` everywhere.
            rngs: One key per example. An example's result depends on its own key and not on the
                batch around it.
            known: The tokens that are given; None for none.

        Returns:
            Tokens without masks, of the shape of `x_T`, int32. The known ones are `known.x_0`.
        """
        num_tokens = int(np.prod(x_T.shape[1:]))
        calls = self.calls(num_tokens)
        table = jax.tree.map(
            lambda column: column.astype(np.float32),
            self.process.transitions(calls.times, calls.previous),
        )

        unknown = jnp.full(len(x_T), num_tokens)
        if known is not None:
            unknown = jnp.sum(~known.mask, axis=tuple(range(1, x_T.ndim)))

        def given(x: Array) -> Array:
            return x if known is None else known.into(x)

        def step(x_t, this_call):
            index, time, final, before, after, transition = this_call
            t = jnp.full(x_t.shape[:1], time)
            log_p = self.process.predict_x0(denoise(x_t, t), x_t, t)
            if self.truncation < 1:
                log_p = truncate(log_p, self.truncation)
            keys = jax.vmap(lambda rng: jax.random.fold_in(rng, index))(rngs)
            if self.reveal == "posterior":
                return given(_draw(keys, posterior(log_p, x_t, transition))), None
            counts = unknown * after // num_tokens - unknown * before // num_tokens
            return given(self._reveal(keys, log_p, x_t, counts, final)), None

        revealed = np.cumsum(calls.counts).astype(np.int32)
        columns = (
            jnp.arange(len(calls.times)),
            calls.times.astype(np.int32),
            calls.previous < 0,
            revealed - calls.counts.astype(np.int32),
            revealed,
            table,
        )
        return jax.lax.scan(step, given(x_T.astype(jnp.int32)), columns)[0]

    def _reveal(
        self,
        keys: Key[Array, "batch"],
        log_p: LogProbs,
        x_t: Tokens,
        counts: Int[Array, "batch"],
        final: Bool[Array, ""],
    ) -> Tokens:
        """Draws so many of the masked tokens, or in the final call all tokens. Eqs. (2), (3)."""
        draw_keys, choice_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        rank = jnp.zeros(x_t.shape)
        temperature = 1.0
        if self.reveal == "purity":
            rank = jnp.max(log_p, axis=-1)  # the logarithm of the purity
            temperature = self.purity_temperature
            # Relative to the purest token of the example, as published.
            purity = jnp.exp(rank - jnp.max(rank, axis=tuple(range(1, rank.ndim)), keepdims=True))
            power = 1 + self.purity_weight * jnp.where(final, 0.0, purity)
            log_p = power[..., None] * log_p
        chosen = _choose(choice_keys, rank, temperature, x_t == self.process.mask_token, counts)
        return jnp.where(final | chosen, _draw(draw_keys, log_p), x_t)


def _draw(keys: Key[Array, "batch"], log_p: LogProbs) -> Tokens:
    """Draws a token everywhere, int32."""
    return jax.vmap(jax.random.categorical)(keys, log_p).astype(jnp.int32)


def _choose(
    keys: Key[Array, "batch"],
    log_score: Float[Array, "batch *grid"],
    temperature: float,
    eligible: Bool[Array, "batch *grid"],
    counts: Int[Array, "batch"],
) -> Bool[Array, "batch *grid"]:
    """Chooses so many eligible tokens of every example, or all where there are fewer.

    At temperature 1 this is drawing without replacement in proportion to the scores, by Gumbel
    noise and sorting.
    """

    def one(key: Array, log_score: Array, eligible: Array, count: Array) -> Array:
        noisy = log_score + temperature * jax.random.gumbel(key, log_score.shape)
        noisy = jnp.where(eligible, noisy, -jnp.inf).reshape(-1)
        place = jnp.argsort(jnp.argsort(noisy, descending=True)).reshape(eligible.shape)
        return eligible & (place < count)

    return jax.vmap(one)(keys, log_score, eligible, counts)
