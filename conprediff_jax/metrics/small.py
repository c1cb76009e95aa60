"""A small evaluation inside the train loop: is the run getting better?

    FD-random-VGG16, KD-random-VGG16    of `num` samples against `num` images of the data

Both need no weights; see `metrics.random_vgg16`. So few images bias the distance upwards, always by
about as much: compare the numbers of a run with each other, and with nothing else.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from conprediff_jax import data
from conprediff_jax.metrics import features
from conprediff_jax.metrics.frechet import Gaussian, Moments, frechet_distance
from conprediff_jax.metrics.kernel import kernel_distance


class SmallEvaluation:
    """Compares samples of the moving average with the data; compiles once.

    Args:
        draw: From `params` and `frozen` of a `DiffusionModel` to the samples, uint8.
        mesh: Devices; all of them compute.
        spec: the data. The first images that its evaluation order gives are the reference, read at
            the first call.
        num: How many images the samples are compared with.
        batch_size: images at a time.
    """

    def __init__(
        self,
        draw: Callable[[Any, Any], UInt8[np.ndarray, "count height width 3"]],
        mesh: Mesh,
        spec: data.DataSpec,
        *,
        num: int = 256,
        batch_size: int = 64,
    ):
        self._draw = draw
        self._spec, self._num = spec, num
        self._runner = features.Runner(features.random_extractor(), mesh, batch_size)
        self._reference: tuple[np.ndarray, Gaussian] | None = None

    def __call__(self, params: Any, frozen: Any) -> dict[str, float]:
        """Metrics by the names they are logged under.

        Args:
            params: See `DiffusionModel`; those of the moving average.
            frozen: See there.

        Raises:
            DataError: the data cannot be read.
        """
        if self._reference is None:
            batches = data.evaluation_iterator(self._spec, batch_size=self._runner.batch_size)
            count = -(-self._num // self._runner.batch_size)
            parts = [batch["image"][batch["mask"]] for batch in itertools.islice(batches, count)]
            self._reference = self._features(np.concatenate(parts)[: self._num])
        rows, gaussian = self._features(self._draw(params, frozen))
        distance = kernel_distance(
            rows, self._reference[0], subsets=1, size=len(rows), rng=np.random.default_rng(0)
        )
        labels = self._runner.extractor.labels
        return {
            f"eval/{labels['frechet']}": frechet_distance(gaussian, self._reference[1]),
            f"eval/{labels['kernel']}": distance.value,
        }

    def _features(self, images: np.ndarray) -> tuple[np.ndarray, Gaussian]:
        size = self._runner.batch_size
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        rows = np.concatenate([self._runner(part)["pool"] for part in parts])
        moments = Moments()
        moments.update(rows)
        return rows, moments.gaussian()
