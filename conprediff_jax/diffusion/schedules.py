"""Noise schedules: tables of the noise that each forward step adds, in float64 NumPy.

The forward process adds noise of variance `beta_t` at step t = 0 .. T-1 and keeps
`alpha_t = 1 - beta_t` of the signal's power, so that after step t

    alpha_bar_t = prod_{s <= t} (1 - beta_s)                                              (1)
    SNR_t       = alpha_bar_t / (1 - alpha_bar_t)                                         (2)

    linear          beta_t linear in t                  Ho et al. 2020 (arXiv 2006.11239), section 4
    scaled_linear   sqrt(beta_t) linear in t            Rombach et al. 2022 (arXiv 2112.10752)
    cosine          alpha_bar_t ~ cos^2((t/T + s) / (1 + s) * pi/2)
                                                        Nichol & Dhariwal 2021 (arXiv 2102.09672)

The tables are computed once on the host in float64, and are rounded to float32 only where they
enter a computation, because products of a thousand factors and differences `1 - alpha_bar` lose
digits in float32.
"""

import numpy as np
from jaxtyping import Float64

from conprediff_jax.common.errors import FieldError

SCHEDULES = ("linear", "scaled_linear", "cosine")

Table = Float64[np.ndarray, "time"]


def linear(num_steps: int, beta_start: float, beta_end: float) -> Table:
    """Returns variances equally spaced from `beta_start` to `beta_end`, both included."""
    return np.linspace(beta_start, beta_end, num_steps, dtype=np.float64)


def scaled_linear(num_steps: int, beta_start: float, beta_end: float) -> Table:
    """Returns variances whose roots are equally spaced between those of the two ends."""
    return np.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=np.float64) ** 2


def cosine(num_steps: int, offset: float = 0.008, max_beta: float = 0.999) -> Table:
    """Returns variances for which `alpha_bar` follows a squared cosine.

    Args:
        num_steps: T, the number of forward steps.
        offset: s, which keeps the first variances from being imperceptibly small.
        max_beta: The upper limit of a variance. Without it the last variance would be 1, and all
            signal would be lost.

    Returns:
        `beta_t`, `[T]`, in (0, max_beta].
    """
    edges = np.arange(num_steps + 1, dtype=np.float64) / num_steps
    signal = np.cos((edges + offset) / (1 + offset) * np.pi / 2) ** 2
    return np.minimum(1 - signal[1:] / signal[:-1], max_beta)


def betas(schedule: str, num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Table:
    """Returns the variances of the schedule with the given name.

    Args:
        schedule: One of `SCHEDULES`.
        num_steps: T, the number of forward steps.
        beta_start: The first variance of 'linear' and 'scaled_linear'; 'cosine' does not use it.
        beta_end: The last variance of 'linear' and 'scaled_linear'; 'cosine' does not use it.

    Returns:
        `beta_t`, `[T]`, float64, in (0, 1).

    Raises:
        ValueError: The schedule is unknown, or the variances are out of order or outside (0, 1).
    """
    if schedule not in SCHEDULES:
        raise FieldError("schedule", f"is {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if num_steps < 1:
        raise FieldError("num_steps", f"is {num_steps}; it must be at least 1")
    if not 0 < beta_start <= beta_end < 1:
        raise FieldError(
            "beta_start",
            f"is {beta_start} and beta_end {beta_end}; "
            "they must satisfy 0 < beta_start <= beta_end < 1",
        )
    if schedule == "cosine":
        return cosine(num_steps)
    return {"linear": linear, "scaled_linear": scaled_linear}[schedule](
        num_steps, beta_start, beta_end
    )


def alpha_bars(beta: Table) -> Table:
    """Returns the signal power kept after every step, in (0, 1), decreasing, eq. (1)."""
    return np.cumprod(1 - beta)


def snr(alpha_bar: Table) -> Table:
    """Returns the signal-to-noise ratio after every step, eq. (2)."""
    return alpha_bar / (1 - alpha_bar)
