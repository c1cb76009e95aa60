"""Power-function averages of parameters, and how any of them follows from stored ones.

The average after step t weights the parameters at time tau, in steps, by

    p(tau) = (g + 1) tau^g / t^(g + 1),    0 < tau <= t.                                  (1)

A large exponent g gives a short average, and g = 0 the mean of the whole run. An average is named
by the standard deviation of (1) as a share of t, its relative deviation:

    s = sqrt((g + 1) / ((g + 2)^2 (g + 3))),    0 < s < 1 / sqrt(12).                     (2)

Training keeps it up by one update a step, with theta_t the parameters after step t:

    a_t = b_t a_{t-1} + (1 - b_t) theta_t,    b_t = (1 - 1/t)^(g + 1).                    (3)

Then theta_i has the exact weight of (1) between i - 1 and i, and b_1 = 0, so that the parameters a
run starts from have none. An average that was not kept is close to a sum of averages that were, of
several exponents and from several times. The factors x are those whose sum of weights (1) is next
to the wanted weights in the least squares over tau:

    A x = c,    A_ij = <p_i, p_j>,    c_i = <p_i, p>,                                     (4)

    <p_a, p_b> = (g_a + 1) (g_b + 1) (t_a / t_b)^e / ((g_a + g_b + 1) max(t_a, t_b)),     (5)

where e = g_b if t_a < t_b, and -g_a otherwise. Afterwards x is divided by its sum.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models"
(arXiv 2312.02696), section 3 and appendix C.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from conprediff_jax.common.errors import FieldError

LONGEST = 1 / math.sqrt(12)  # relative deviation of the mean of the whole run


class Profile(NamedTuple):
    """The weights (1) of an average.

    Attributes:
        step: t, the number of steps done.
        deviation: s of (2), the relative deviation.
    """

    step: int
    deviation: float


class Reconstruction(NamedTuple):
    """An average as a sum of stored ones.

    Attributes:
        factors: x of (4), one for each stored average; their sum is 1.
        error: Distance of the sum's weights to the wanted ones, as a share of the norm of these.
    """

    factors: Float[np.ndarray, "stored"]
    error: float


def check_deviation(deviation: float, name: str) -> None:
    """Raises FieldError unless a relative deviation, the value of a field, is one of (2)."""
    if not 0 < deviation < LONGEST:
        raise FieldError(
            name,
            f"is {deviation}: the relative deviation of an average lies between 0 and "
            f"{LONGEST:.3f}, that of the mean of all steps",
        )


def exponent(deviation: float) -> float:
    """The exponent g that has a relative deviation, by (2).

    Args:
        deviation: s, in (0, 1 / sqrt(12)).
    """
    ratio = deviation**-2
    # (2) as a polynomial in g, of which g is the only positive root.
    return float(np.roots([1, 7, 16 - ratio, 12 - ratio]).real.max())


def share_of_newest(t: Int[Array, ""], exponent: float) -> Float[Array, ""]:
    """1 - b_t of (3), float32; exact to float32 however small 1/t is.

    Args:
        t: The number of steps done, from 1 on.
        exponent: g.
    """
    return -jnp.expm1((exponent + 1) * jnp.log1p(-1 / t.astype(jnp.float32)))


def reconstruct(stored: Sequence[Profile], wanted: Profile) -> Reconstruction:
    """Solves (4) in float64.

    Args:
        stored: The averages that there are; no two of them are the same.
        wanted: The average to be made.
    """
    products = _products([*stored, wanted])
    among, right, norm = products[:-1, :-1], products[:-1, -1], products[-1, -1]
    factors = np.linalg.lstsq(among, right)[0]
    factors /= factors.sum()
    distance = norm - 2 * factors @ right + factors @ among @ factors
    return Reconstruction(factors, math.sqrt(max(distance, 0.0) / norm))


def _products(profiles: Sequence[Profile]) -> Float[np.ndarray, "n n"]:
    """Equation (5) for every pair of profiles, float64."""
    t = np.array([profile.step for profile in profiles], float)
    g = np.array([exponent(profile.deviation) for profile in profiles])
    t_a, g_a = t[:, None], g[:, None]
    power = np.where(t_a < t, g, -g_a)
    return (g_a + 1) * (g + 1) * (t_a / t) ** power / ((g_a + g + 1) * np.maximum(t_a, t))
