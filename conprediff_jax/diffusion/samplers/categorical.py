"""Sampling of a mask-and-replace process.

Every call of the network gives p(x_0 | x_t). What the sampler does with it depends on `reveal`:

    posterior   Every token is drawn from p(x_s | x_t), where s is the next time visited.   (1)
    random      A fixed number of masked tokens, chosen at random, is drawn from p(x_0 | x_t);
                the other tokens stay as they are.                                          (2)
    purity      As 'random', but tokens are chosen in proportion to their purity,
                max_k p(x_0 = k | x_t), and drawn from p ** (1 + r purity), normalised.     (3)

Under 'posterior' a step makes independent draws for tokens that depend on each other. The other two
set the number of tokens that are drawn together. The last call draws every token from p(x_0 | x_t).

Known tokens keep their values in x_t at every call, and are never drawn. The unknown tokens keep to
the schedule of the process: if (2) and (3) would have revealed c of n tokens, they have revealed
floor(u c / n) of u unknown tokens.

Sources: eq. (1), its skipped steps and truncation: Gu et al. 2022, "Vector Quantized Diffusion
Model for Text-to-Image Synthesis" (arXiv 2111.14822) and its published code; eqs. (2), (3): Tang et
al. 2022, "Improved Vector Quantized Diffusion Models" (arXiv 2205.16007), eq. (11).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int64, Key

from conprediff_jax.common.errors import FieldError
from conprediff_jax.diffusion.categorical import CategoricalProcess, posterior
from conprediff_jax.diffusion.samplers.base import Denoise, Known, Walk, spaced_times
from conprediff_jax.diffusion.samplers.tokens import TokenSampler, choose, step_keys
from conprediff_jax.diffusion.tokens import LogProbs, Tokens, draw

REVEALS = ("posterior", "random", "purity")


class Calls(NamedTuple):
    """The calls of the network, in order, as arrays of shape `[calls]`.

    Attributes:
        times: The time that the network gets.
        previous: The time at which the step ends; -1 is the clean end.
        counts: The number of masked tokens to reveal. 'posterior' does not use it.
    """

    times: Int64[np.ndarray, "calls"]
    previous: Int64[np.ndarray, "calls"]
    counts: Int64[np.ndarray, "calls"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CategoricalSampler(TokenSampler):
    """Ancestral sampling of tokens, over all T steps or fewer.

    A step from t to s may skip times. It uses the posterior of the composed steps, which is exact.

    Attributes:
        steps: The number of times visited, 1 .. T, spaced evenly from T-1 downwards ('trailing').
        reveal: 'posterior', 'random' (high-quality inference) or 'purity'; see the module.
        tokens_per_call: The largest number of tokens that one call reveals. A step that reveals
            more makes several calls. None means one call per step. Not for 'posterior'.
        purity_weight: r in eq. (3). Only for 'purity'.
        purity_temperature: The temperature at which 'purity' chooses tokens. 1 chooses in
            proportion to purity, as published, and 0 reveals the purest tokens first.

    Raises:
        ValueError: A field is outside its choices or range; the message names the field.
    """

    process: CategoricalProcess
    steps: int
    reveal: str = "posterior"
    tokens_per_call: int | None = None
    purity_weight: float = 0.0
    purity_temperature: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.steps <= self.process.num_steps:
            raise FieldError(
                "steps",
                f"is {self.steps}; it must lie in 1 .. {self.process.num_steps}, the "
                "process's num_steps",
            )
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
        """Returns the calls of the network for a grid of `num_tokens` tokens.

        With 'random' and 'purity', the number of tokens that are revealed at each time is the mean
        number that the process leaves unmasked there, rounded. Steps that reveal no token make no
        call.
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

    def walk(
        self,
        denoise: Denoise,
        x_T: Tokens,
        rngs: Key[Array, "batch"],
        known: Known | None = None,
    ) -> Walk:
        """The reverse process step by step; `sample` explains the arguments."""
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

        def step(x_t, row):
            index, time, final, before, after, transition = row
            t = jnp.full(x_t.shape[:1], time)
            log_p = self._predict(denoise, x_t, t)
            keys = step_keys(rngs, index)
            if self.reveal == "posterior":
                return given(draw(keys, posterior(log_p, x_t, transition)))
            counts = unknown * after // num_tokens - unknown * before // num_tokens
            return given(self._reveal(keys, log_p, x_t, counts, final))

        revealed = np.cumsum(calls.counts).astype(np.int32)
        rows = (
            jnp.arange(len(calls.times)),
            calls.times.astype(np.int32),
            calls.previous < 0,
            revealed - calls.counts.astype(np.int32),
            revealed,
            table,
        )
        return Walk(given(x_T.astype(jnp.int32)), rows, step, lambda x_0: x_0)

    def _reveal(
        self,
        keys: Key[Array, "batch"],
        log_p: LogProbs,
        x_t: Tokens,
        counts: Int[Array, "batch"],
        final: Bool[Array, ""],
    ) -> Tokens:
        """Draws `counts` of the masked tokens, or all tokens in the final call, eqs. (2), (3)."""
        draw_keys, choice_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        rank = jnp.zeros(x_t.shape)
        temperature = 1.0
        if self.reveal == "purity":
            rank = jnp.max(log_p, axis=-1)  # the logarithm of the purity
            temperature = self.purity_temperature
            # This is relative to the purest token of the example, as in the published code.
            purity = jnp.exp(rank - jnp.max(rank, axis=tuple(range(1, rank.ndim)), keepdims=True))
            power = 1 + self.purity_weight * jnp.where(final, 0.0, purity)
            log_p = power[..., None] * log_p
        chosen = choose(choice_keys, rank, temperature, x_t == self.process.mask_token, counts)
        return jnp.where(final | chosen, draw(draw_keys, log_p), x_t)
