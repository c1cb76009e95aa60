"""A small evaluation inside the train loop, which shows whether the run is getting better.

    FD-random-VGG16, KD-random-VGG16    of some samples against `num` images of the data

Both distances need no weight files; see `metrics.networks.random_vgg16`. So few images bias the
Frechet distance upwards, always by about as much: compare the numbers of one run with each other,
and with nothing else.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from conprediff_jax import data
from conprediff_jax.common.fingerprint import fingerprint
from conprediff_jax.metrics import features
from conprediff_jax.metrics.frechet import Gaussian, Moments, frechet_distance
from conprediff_jax.metrics.kernel import kernel_distance


class SmallEvaluation:
    """Compares samples of the moving average with the data; the network is compiled once.

    Args:
        draw: Function from `params` and `frozen` of a `DiffusionModel` to samples, uint8.
        mesh: The devices, which share the work.
        spec: The data. The reference is its first images in the order of evaluation, which are read
            at the first call.
        num: Number of reference images.
        batch_size: Images at a time.

    Attributes:
        settings: What the figures depend on beside the samples; empty before the first call.
    """

    def __init__(
        self,
        draw: Callable[[Any, Any], UInt8[np.ndarray, "count height width channels"]],
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
        self.settings: dict[str, Any] = {}

    def __call__(self, params: Any, frozen: Any) -> dict[str, float]:
        """The metrics by their names in the log.

        Args:
            params: Moving average of the parameters; see `DiffusionModel`.
            frozen: See `DiffusionModel`.

        Raises:
            DataError: The data cannot be read.
        """
        if self._reference is None:
            batches = data.evaluation_iterator(self._spec, batch_size=self._runner.batch_size)
            count = -(-self._num // self._runner.batch_size)
            parts = [batch["image"][batch["mask"]] for batch in itertools.islice(batches, count)]
            images = np.concatenate(parts)[: self._num]
            self._reference = self._features(images)
            self.settings = self._described(images)
        rows, gaussian = self._features(self._draw(params, frozen))
        distance = kernel_distance(
            rows, self._reference[0], subsets=1, size=len(rows), rng=np.random.default_rng(0)
        )
        labels = self._runner.extractor.labels
        return {
            f"eval/{labels['frechet']}": frechet_distance(gaussian, self._reference[1]),
            f"eval/{labels['kernel']}": distance.value,
        }

    def _described(self, images: np.ndarray) -> dict[str, Any]:
        """The reference and the feature network, for the record of figures."""
        extractor = self._runner.extractor
        return {
            "reference": {
                "name": f"{self._spec.name}, split {self._spec.split}",
                "count": len(images),
                "fingerprint": fingerprint([images.tobytes()]),
            },
            "features": f"{extractor.name} ({extractor.fingerprint})",
        }

    def _features(self, images: np.ndarray) -> tuple[np.ndarray, Gaussian]:
        """The features of images, and their moments."""
        size = self._runner.batch_size
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        rows = np.concatenate([self._runner(part)["pool"] for part in parts])
        moments = Moments()
        moments.update(rows)
        return rows, moments.gaussian()
