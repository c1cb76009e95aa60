"""Classifier-free guidance of discrete diffusion.

    log p = l_u + s (l_c - l_u) + const,                                                  (1)

with l_c and l_u the log-probabilities of x_0 with and without the condition.

Sources: Ho & Salimans 2022, "Classifier-Free Diffusion Guidance" (arXiv 2207.12598); Tang et al.
2022, "Improved Vector Quantized Diffusion Models" (arXiv 2205.16007).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from conprediff_jax.diffusion.categorical import LOG_ZERO

Logits = Float[Array, "batch *grid codes"]


def guided_log_probs(conditional: Logits, unconditional: Logits, scale: float) -> Logits:
    """Guided log-probabilities of x_0, normalised and limited to [LOG_ZERO, 0], float32. Eq. (1).

    Args:
        conditional: Logits, or log-probabilities: a constant added to them changes nothing.
        unconditional: The same without the condition.
        scale: s. 0 is unconditional, 1 conditional, more pushes away from the unconditional.
    """
    conditional, unconditional = conditional.astype(jnp.float32), unconditional.astype(jnp.float32)
    guided = unconditional + scale * (conditional - unconditional)
    return jnp.clip(jax.nn.log_softmax(guided), LOG_ZERO, 0.0)
