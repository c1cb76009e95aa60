"""Classifier-free guidance.

    l = l_u + s (l_c - l_u),                                                              (1)

with l_c and l_u what the network predicts with and without the condition: a point (or its noise) in
continuous diffusion, the log-probabilities of x_0, up to a constant, in discrete diffusion.

Sources: Ho & Salimans 2022, "Classifier-Free Diffusion Guidance" (arXiv 2207.12598); Tang et al.
2022, "Improved Vector Quantized Diffusion Models" (arXiv 2205.16007).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LOG_ZERO = -70.0  # stands for log 0, so that 0 log 0 is 0; the published models' floor

Logits = Float[Array, "batch *grid codes"]


def extrapolated(
    conditional: Float[Array, "batch *point"],
    unconditional: Float[Array, "batch *point"],
    scale: float,
) -> Float[Array, "batch *point"]:
    """Eq. (1), float32.

    Args:
        conditional: l_c.
        unconditional: l_u.
        scale: s. 0 is unconditional, 1 conditional, more pushes away from the unconditional.
    """
    conditional, unconditional = conditional.astype(jnp.float32), unconditional.astype(jnp.float32)
    return unconditional + scale * (conditional - unconditional)


def guided_log_probs(conditional: Logits, unconditional: Logits, scale: float) -> Logits:
    """Guided log-probabilities of x_0, normalised and limited to [LOG_ZERO, 0], float32. Eq. (1).

    Args:
        conditional: Logits, or log-probabilities: a constant added to them changes nothing.
        unconditional: The same without the condition.
        scale: s, see `extrapolated`.
    """
    guided = extrapolated(conditional, unconditional, scale)
    return jnp.clip(jax.nn.log_softmax(guided), LOG_ZERO, 0.0)
