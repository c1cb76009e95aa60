"""Inception score: whether each image shows one class clearly, and all images show many classes.

    IS = exp( mean_x KL( p(y | x) || mean_x p(y | x) ) )                                        (1)

The score is the mean of (1) over a number of splits of the images. Source: Salimans et al. 2016
(arXiv 1606.03498), section 4. The logits leave out the last bias, as in the original code, in ADM's
and in torch-fidelity's.
"""

import numpy as np
from jaxtyping import Shaped
from scipy import special


def inception_score(logits: Shaped[np.ndarray, "batch classes"], *, splits: int = 10) -> float:
    """The mean of (1) over consecutive splits, in float64; images must be in random order.

    Everything is computed from logarithms, so that a probability that rounds to 0 contributes 0.

    Args:
        logits: Logits of every image.
        splits: Number of splits, each of which is scored by itself.

    Raises:
        ValueError: There are fewer images than splits, or a logit is no finite number.
    """
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} images do not fill {splits} splits")
    if not np.isfinite(logits).all():
        raise ValueError("some logits are no finite numbers")
    scores = []
    for part in np.array_split(logits, splits):
        log_p = special.log_softmax(part.astype(np.float64), axis=1)
        log_mean = special.logsumexp(log_p, axis=0) - np.log(len(part))
        divergence = (np.exp(log_p) * (log_p - log_mean)).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))
