"""Inception score: are single images of one class, and all of them of many?

    IS = exp( mean_x KL( p(y | x) || mean_x p(y | x) ) )                                        (1)

The mean over a number of splits of the images. Source: Salimans et al. 2016 (arXiv 1606.03498),
section 4. The logits are those without the last bias, as in the original code, ADM's and
torch-fidelity's.
"""

import numpy as np
from jaxtyping import Shaped
from scipy import special


def inception_score(logits: Shaped[np.ndarray, "batch classes"], *, splits: int = 10) -> float:
    """Equation (1), in float64, over consecutive splits; shuffle sorted images before.

    All is computed from logarithms: a probability that rounds to 0 counts as one of 0.

    Args:
        logits: of every image.
        splits: parts that are scored by themselves.

    Raises:
        ValueError: there are fewer images than splits, or a logit is no finite number.
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
