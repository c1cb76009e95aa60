"""The pictures of an evaluation: samples, their nearest images, precision and recall."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Num, UInt8

from conprediff_jax.common import images
from conprediff_jax.metrics import features, report
from conprediff_jax.metrics.image_sets import ImageSet
from conprediff_jax.metrics.precision_recall import nearest
from conprediff_jax.metrics.suite import Results, Suite

# A set of images and its features.
Extracted = tuple[ImageSet, features.Features]

_SHOWN = 64  # images of the grid
_ROWS, _NEIGHBORS = 8, 5  # samples shown with their nearest images, and how many of these


def of_evaluation(
    suite: Suite,
    samples: Extracted,
    reference: Extracted,
    results: Results,
    extractor: features.Extractor,
) -> list[report.Picture]:
    """The pictures of the report.

    Args:
        suite: What was computed.
        samples: The samples, with features that contain `pool`.
        reference: The reference. Where it is only statistics, the samples are the only picture.
        results: What came out.
        extractor: The network of the features.
    """
    shown = next(samples[0].batches(_SHOWN))
    found = [_samples(shown)]
    if reference[0].batches is None:
        return found
    rows = shown[:_ROWS]
    close = _nearest(samples[1].rows["pool"][: len(rows)], reference)
    if close.shape[2:] == rows.shape[1:]:
        found.append(_neighbors(rows, close, extractor))
    return [*found, *_precision_recall(suite, results, extractor)]


def _samples(shown: UInt8[np.ndarray, "n height width 3"]) -> report.Picture:
    return report.Picture(
        file="samples",
        title="Samples",
        note=f"The first {len(shown)} samples, not selected.",
        pixels=images.grid(shown),
    )


def _nearest(
    queries: Num[np.ndarray, "rows features"], reference: Extracted
) -> UInt8[np.ndarray, "rows k height width 3"]:
    """The images of the reference that are nearest to each query."""
    neighbors = min(_NEIGHBORS, reference[1].count)
    found = nearest(queries, reference[1].rows["pool"], k=neighbors).indices
    close = reference[0].pick(found.ravel().tolist())
    return close.reshape(*found.shape, *close.shape[1:])


def _neighbors(
    rows: UInt8[np.ndarray, "rows height width 3"],
    close: UInt8[np.ndarray, "rows k height width 3"],
    extractor: features.Extractor,
) -> report.Picture:
    return report.Picture(
        file="neighbors",
        title="Nearest images of the reference",
        note=f"On the left a sample; on the right its {close.shape[1]} nearest images, nearest "
        f"first, by the features of {extractor.name}. Copies would mean that the model has "
        "memorised images.",
        pixels=report.neighbors_picture(rows, close),
    )


def _precision_recall(
    suite: Suite, results: Results, extractor: features.Extractor
) -> Iterator[report.Picture]:
    """One picture, if both metrics were computed."""
    names = [extractor.labels[metric] for metric in ("precision", "recall")]
    if all(name in results.figures for name in names):
        yield report.Picture(
            file="precision_recall",
            title="Precision and recall",
            note="The curve runs over the number of neighbours k; the orange point is the reported "
            f"one, k = {suite.neighbor}, with its intervals.",
            pixels=report.precision_recall_picture(
                np.array(list(results.curve.values())),
                [f"k = {k}" for k in results.curve],
                *(results.figures[name] for name in names),
            ),
        )
