"""Compares two ways to train by matched pairs of runs, which share seed, data order and steps.

    d = mean_k d_k,     d +- t_{n-1} s / sqrt(n)                                                (1)

with d_k the difference of pair k, s their standard deviation and t the quantile of Student's
distribution. The interval (1) describes how the difference varies over seeds. It holds for normal
d_k; from fewer than `FEW` pairs, it is wide and not reliable. It does not describe how the figures
of one run vary over samples. For that, (2) combines the ends of two independent intervals (Zou and
Donner 2008, "Construction of confidence limits about effect measures", eq. 8),

    low = a - b - ((a - low_a)^2 + (high_b - b)^2)^(1/2),   high likewise                       (2)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from conprediff_jax.metrics.bootstrap import LEVEL, Figure

FEW = 5


class Paired(NamedTuple):
    """A mean difference over pairs.

    Attributes:
        figure: Equation (1) at `bootstrap.LEVEL`; a single pair has no interval.
        differences: The difference of every pair.
    """

    figure: Figure
    differences: tuple[float, ...]


def paired_difference(setting: Sequence[float], baseline: Sequence[float]) -> Paired:
    """The mean difference (1) of the setting minus the baseline.

    Args:
        setting: A value for each pair.
        baseline: The value of its partner, in the same order.

    Raises:
        ValueError: There are no pairs, or a value has no partner.
    """
    if len(setting) != len(baseline) or not len(setting):
        raise ValueError(
            f"{len(setting)} values and {len(baseline)} of the baseline: each needs a partner"
        )
    differences = np.asarray(setting, np.float64) - np.asarray(baseline, np.float64)
    mean, count = float(differences.mean()), len(differences)
    found = Figure(mean)
    if count > 1:
        reach = stats.t.ppf((1 + LEVEL) / 2, count - 1) * stats.sem(differences)
        found = Figure(mean, float(mean - reach), float(mean + reach))
    return Paired(found, tuple(differences.tolist()))


def independent_difference(setting: Figure, baseline: Figure) -> Figure:
    """The difference with the interval (2); without one where either figure has none."""
    difference = setting.value - baseline.value
    if setting.low is None or baseline.low is None:
        return Figure(difference)
    down = np.hypot(setting.value - setting.low, baseline.high - baseline.value)
    up = np.hypot(setting.high - setting.value, baseline.value - baseline.low)
    return Figure(difference, float(difference - down), float(difference + up))
