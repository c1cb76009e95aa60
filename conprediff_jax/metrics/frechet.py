"""Frechet distance between Gaussians fitted to two sets of features, in float64.

    d^2 = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))                                     (1)

Source: Heusel et al. 2017 (arXiv 1706.08500), equation 6. With any factors C_1 = L_1 L_1', C_2 =
L_2 L_2', the eigenvalues of C_1 C_2 are the squares of the singular values of L_1' L_2, so that

    tr (C_1 C_2)^(1/2) = sum of the singular values of L_1' L_2 <= |L_1| |L_2|                  (2)

in the Frobenius norm; so d^2 is never negative. This takes no root of an eigenvalue. Such a root
would turn a rounding error of 1e-16 into one of 1e-8, for each of the zero eigenvalues that a
covariance has where there are more features than images.

Moments are updated batch by batch (Chan, Golub and LeVeque 1983), so features need not be kept.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from scipy.linalg import lapack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian:
    """The mean and the covariance of a set of features.

    Attributes:
        mean: Mean, float64.
        covariance: Unbiased covariance, float64.
        count: Number of feature vectors; 0 where a file does not say.
    """

    mean: Float[np.ndarray, "features"]
    covariance: Float[np.ndarray, "features features"]
    count: int = 0

    @functools.cached_property
    def factor(self) -> Float[np.ndarray, "features rank"]:
        """A matrix L with L L' the covariance, from a Cholesky decomposition with pivots."""
        lower, pivots, rank, _ = lapack.dpstrf(self.covariance, lower=1)
        factor = np.empty((len(lower), rank))
        factor[pivots - 1] = np.tril(lower)[:, :rank]
        return factor


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
        """Adds a batch.

        Args:
            features: Features of any real dtype.
            weights: How often each vector counts; None for once.
        """
        x = features.astype(np.float64)
        w = np.ones(len(x)) if weights is None else weights.astype(np.float64)
        count = w.sum()
        if not count:
            return
        mean = w @ x / count
        centred = (x - mean) * np.sqrt(w)[:, None]
        self.merge(count, mean, centred.T @ centred)

    def merge(
        self,
        count: float,
        mean: Float[np.ndarray, "features"],
        scatter: Float[np.ndarray, "features features"],
    ) -> None:
        """Adds a batch of which `parts` are known."""
        if self._mean is None:
            self.count, self._mean, self._scatter = count, mean, scatter
            return
        total = self.count + count
        shift = mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(shift, shift) * (self.count * count / total)
        self._mean = self._mean + shift * (count / total)
        self.count = total

    def parts(self) -> dict[str, Any]:
        """The arguments of `merge` that add what is known here to other moments."""
        return {"count": self.count, "mean": self._mean, "scatter": self._scatter}

    def gaussian(self) -> Gaussian:
        """The moments so far.

        Raises:
            ValueError: There are fewer than two feature vectors, or some are no finite numbers.
        """
        if self.count < 2:
            raise ValueError(f"{self.count:.0f} features have no covariance: at least 2")
        covariance = self._scatter / (self.count - 1)
        if not np.isfinite(covariance).all():
            raise ValueError("some features are no finite numbers")
        return Gaussian(mean=self._mean, covariance=covariance, count=round(self.count))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """The squared distance (1), computed by (2); this square is what papers report.

    Raises:
        ValueError: The features differ in size.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"features of size {len(first.mean)} cannot be compared with those of size "
            f"{len(second.mean)}: both sides need the same feature network"
        )
    shift = first.mean - second.mean
    spread = np.square(first.factor).sum() + np.square(second.factor).sum()
    common = np.linalg.svd(first.factor.T @ second.factor, compute_uv=False).sum()
    return float(shift @ shift + max(spread - 2 * common, 0.0))
