"""Sampling of a masked process, in T steps that each call the network once.

After step k of T the share m_k of the tokens is masked, and the time is the one with m(t) = m_k:

    m_k = 1 - k / T            'linear'
    m_k = cos(pi k / (2 T))    'cosine'                                                    (1)

A call of the network gives p(x_0 | x_t) for the masked tokens. All of them are drawn from it, and
some of them are revealed, which `reveal` chooses:

    posterior    Every token independently, with probability (m_k - m_{k+1}) / m_k. This is
                 ancestral sampling.                                                       (2)
    confidence   Those with the largest log p(drawn token | x_t) + r (1 - (k+1)/T) g, with
                 Gumbel noise g, so that floor(N m_{k+1}) of N tokens stay masked. Of two or more
                 masked tokens at least one is revealed; at least one stays masked.        (3)

Tokens that are revealed stay as they are. The last step reveals all. Known tokens are never masked;
N is then the number of unknown tokens.

Tokens that are drawn in one step are drawn independently, although they depend on each other.
'confidence' reveals those that fit best, so that fewer steps are enough, but then probable tokens
are more frequent in samples than in the data.

Sources: eq. (2) and the cosine in (1) Shi et al. 2024, "Simplified and Generalized Masked Diffusion
for Discrete Data" (arXiv 2406.04329); eq. (3) Chang et al. 2022, "MaskGIT: Masked Generative Image
Transformer" (arXiv 2202.04200), section 3.2, and its published code, which has r = 4.5.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, Int, Int64, Key

from conprediff_jax.common.errors import FieldError
from conprediff_jax.diffusion.masked import MaskedProcess
from conprediff_jax.diffusion.samplers.base import Denoise, Known, Walk
from conprediff_jax.diffusion.samplers.tokens import TokenSampler, choose, step_keys
from conprediff_jax.diffusion.tokens import Tokens, draw, log_prob_of

SPACINGS = ("linear", "cosine")
REVEALS = ("posterior", "confidence")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedSampler(TokenSampler):
    """Ancestral sampling of tokens, or sampling in the order of confidence.

    Attributes:
        steps: T, the number of steps, at least 1.
        reveal: 'posterior' or 'confidence'; see the module.
        spacing: 'linear' or 'cosine', eq. (1).
        confidence_temperature: r in eq. (3), at least 0. Only for 'confidence'.

    Raises:
        ValueError: A field is outside its choices or range; the message names the field.
    """

    process: MaskedProcess
    steps: int
    reveal: str = "posterior"
    spacing: str = "cosine"
    confidence_temperature: float = 4.5

    def __post_init__(self):
        super().__post_init__()
        if self.steps < 1:
            raise FieldError("steps", f"is {self.steps}; it must be at least 1")
        for field, choices in (("reveal", REVEALS), ("spacing", SPACINGS)):
            if getattr(self, field) not in choices:
                raise FieldError(
                    field, f"is {getattr(self, field)!r}; choose one of {', '.join(choices)}"
                )
        if self.confidence_temperature < 0:
            raise FieldError(
                "confidence_temperature",
                f"is {self.confidence_temperature}; it must be at least 0",
            )

    @property
    def masked_shares(self) -> Float64[np.ndarray, "times"]:
        """m_k of eq. (1), from 1 to 0, float64."""
        done = np.arange(self.steps + 1) / self.steps
        shares = 1 - done if self.spacing == "linear" else np.cos(np.pi / 2 * done)
        return np.append(shares[:-1], 0.0)

    def masked_counts(self, num_tokens: int) -> Int64[np.ndarray, "steps unknown"]:
        """floor(N m_{k+1}) of eq. (3) for every step and for N = 0 .. `num_tokens`."""
        # The small number is for products that are whole numbers but for their rounding.
        return np.floor(np.outer(self.masked_shares[1:], np.arange(num_tokens + 1)) + 1e-9).astype(
            np.int64
        )

    def walk(
        self,
        denoise: Denoise,
        x_T: Tokens,
        rngs: Key[Array, "batch"],
        known: Known | None = None,
    ) -> Walk:
        """The reverse process step by step; `sample` explains the arguments."""
        x_T = x_T.astype(jnp.int32) if known is None else known.into(x_T).astype(jnp.int32)
        unknown = self._num_masked(x_T)

        def step(x_t, row):
            index, time, revealed_share, temperature, counts = row
            t = jnp.full(x_t.shape[:1], time)
            log_p = self._predict(denoise, x_t, t)
            keys = step_keys(rngs, index)
            draw_keys, choice_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
            drawn, masked = draw(draw_keys, log_p), x_t == self.process.mask_token
            if self.reveal == "posterior":
                noise = jax.vmap(lambda key: jax.random.uniform(key, x_t.shape[1:]))(choice_keys)
                return jnp.where(masked & (noise < revealed_share), drawn, x_t)
            confidence = log_prob_of(log_p, drawn)
            num_masked = self._num_masked(x_t)
            left = jnp.clip(counts[unknown], 1, jnp.maximum(num_masked - 1, 1))
            left = jnp.where(index + 1 < self.steps, left, 0)
            chosen = choose(choice_keys, confidence, temperature, masked, num_masked - left)
            return jnp.where(chosen, drawn, x_t)

        return Walk(x_T, self._rows(int(np.prod(x_T.shape[1:]))), step, lambda x_0: x_0)

    def _rows(self, num_tokens: int) -> tuple[np.ndarray, ...]:
        """What `sample` needs in every step: index, time, and the numbers of eqs. (2) and (3)."""
        shares, index = self.masked_shares, np.arange(self.steps)
        revealed = (shares[:-1] - shares[1:]) / shares[:-1]
        temperature = self.confidence_temperature * (1 - (index + 1) / self.steps)
        return (
            index.astype(np.int32),
            self.process.time_of_masked_share(shares[:-1]).astype(np.float32),
            revealed.astype(np.float32),
            temperature.astype(np.float32),
            self.masked_counts(num_tokens).astype(np.int32),
        )

    def _num_masked(self, x_t: Tokens) -> Int[Array, "batch"]:
        return jnp.sum(x_t == self.process.mask_token, axis=tuple(range(1, x_t.ndim)))
