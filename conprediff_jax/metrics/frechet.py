"""Frechet distance between Gaussians fitted to two sets of features, in float64.

    d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))                                     (1)

Source: Heusel et al. 2017 (arXiv 1706.08500), equation 6. The trace of the root is the sum of the
roots of the eigenvalues of the symmetric matrix C_2^(1/2) C_1 C_2^(1/2), which are those of C_1
C_2; so no root of a matrix that is not symmetric, and no imaginary parts, ever come up.

Moments are updated batch by batch (Chan, Golub and LeVeque 1983), so no features need be held.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float, Shaped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian:
    """What a set of features is reduced to.

    Attributes:
        mean: float64.
        covariance: float64, unbiased.
        count: how many features there were; 0 where a file does not say.
    """

    mean: Float[np.ndarray, "features"]
    covariance: Float[np.ndarray, "features features"]
    count: int = 0

    @functools.cached_property
    def root(self) -> Float[np.ndarray, "features features"]:
        """The symmetric root of the covariance."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T


class Moments:
    """Mean and covariance of features that come in batches, in float64."""

    def __init__(self):
        self.count = 0.0
        self._mean = self._scatter = None

    def update(
        self,
        features: Shaped[np.ndarray, "batch features"],
        weights: Shaped[np.ndarray, "batch"] | None = None,
    ) -> None:
        """Takes a batch.

        Args:
            features: any real dtype.
            weights: how often each counts; once when None.
        """
        x = features.astype(np.float64)
        w = np.ones(len(x)) if weights is None else weights.astype(np.float64)
        count = w.sum()
        if not count:
            return
        mean = w @ x / count
        centred = (x - mean) * np.sqrt(w)[:, None]
        scatter = centred.T @ centred
        if self._mean is None:
            self.count, self._mean, self._scatter = count, mean, scatter
            return
        total = self.count + count
        shift = mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(shift, shift) * (self.count * count / total)
        self._mean = self._mean + shift * (count / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """The moments so far.

        Raises:
            ValueError: fewer than two features came.
        """
        if self.count < 2:
            raise ValueError(f"{self.count:.0f} features have no covariance: at least 2")
        covariance = self._scatter / (self.count - 1)
        return Gaussian(mean=self._mean, covariance=covariance, count=round(self.count))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Equation (1), the square as it is reported; the root of the second's covariance is kept.

    Raises:
        ValueError: the features differ in size.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"features of size {len(first.mean)} cannot be compared with those of size "
            f"{len(second.mean)}: both sides need the same feature network"
        )
    shift = first.mean - second.mean
    product = second.root @ first.covariance @ second.root
    roots = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0))
    spread = np.trace(first.covariance) + np.trace(second.covariance)
    return float(shift @ shift + spread - 2 * roots.sum())
