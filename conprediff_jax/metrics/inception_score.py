"""Inception score: are single images of one class, and all of them of many?

    IS = exp( mean_x KL( p(y | x) || mean_x p(y | x) ) )                                        (1)

The mean over a number of splits of the images. Source: Salimans et al. 2016 (arXiv 1606.03498),
section 4. The logits are those without the last bias, as in the original code, ADM's and
torch-fidelity's.
"""

import numpy as np
from jaxtyping import Shaped


def inception_score(logits: Shaped[np.ndarray, "batch classes"], *, splits: int = 10) -> float:
    """Equation (1), in float64, over consecutive splits; shuffle sorted images before.

    Args:
        logits: of every image.
        splits: parts that are scored by themselves.

    Raises:
        ValueError: there are fewer images than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} images do not fill {splits} splits")
    scores = []
    for part in np.array_split(logits, splits):
        part = part.astype(np.float64)
        part = part - part.max(axis=1, keepdims=True)
        log_p = part - np.log(np.exp(part).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        divergence = (p * (log_p - np.log(p.mean(axis=0)))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))
