"""Context prediction: every point also predicts the distribution of its neighbourhood.

This folder works on grids, points and arrays. Of the rest of the package it imports only
`common/linear.py`, so you can use it in another trainer: `from conprediff_jax import context`.
Start reading at `context.ContextPrediction`.

Source: *Improving Diffusion-Based Image Synthesis with Context Prediction*, NeurIPS 2023,
arXiv 2401.02015.
"""

from conprediff_jax.context.head import DirectDecoder, DistributionDecoder
from conprediff_jax.context.loss import ContextLoss, ContextPrediction
from conprediff_jax.context.neighborhood import (
    draw_neighbors,
    draw_points,
    gather_points,
    neighbor_counts,
    ordered_neighbors,
)
from conprediff_jax.context.transport import TRANSPORTS
from conprediff_jax.context.weighting import Weighting

__all__ = [
    "TRANSPORTS",
    "ContextLoss",
    "ContextPrediction",
    "DirectDecoder",
    "DistributionDecoder",
    "Weighting",
    "draw_neighbors",
    "draw_points",
    "gather_points",
    "neighbor_counts",
    "ordered_neighbors",
]
