"""Distances between the neighbourhoods in samples and those in real images: local structure.

    W_p(P, Q) = (int_0^1 |F_P^-1(u) - F_Q^-1(u)|^p du)^(1/p)                                    (1)

    difference distance   mean_c W_2(x_i^c - x_j^c of samples, the same of real images),
                          over all images and pairs of pixels with 0 < |i - j|_inf <= radius    (2)

    patch distance        (mean_l W_2(<d_l, patch of samples>, <d_l, patch of real images>)^2)^(1/2)
                          over random unit directions d_l                                       (3)

with channels c in [-1, 1]. (2) compares pairs of pixels in the windows from which context
prediction takes its targets. It is computed from whole histograms, so it is exact. (3) is the
sliced Wasserstein distance (Bonneel et al. 2015) between the joint distributions of k x k patches
at random places. The mean colour of each patch is subtracted, so both distances measure local
structure alone, and not the frequencies of colours. Neither distance is 0 for two finite sets from
one distribution.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32, Int, Shaped, UInt8

from conprediff_jax.metrics.bootstrap import Figure, figure

Images = UInt8[np.ndarray, "images height width channels"]

_LEVELS = 511  # differences of two 8-bit values
_SCALE = 127.5  # levels per unit of the channels in [-1, 1]
_BLOCK = 2**20  # pixels that are compared at a time


def wasserstein(
    x: Shaped[np.ndarray, "n"],
    y: Shaped[np.ndarray, "m"],
    x_weights: Shaped[np.ndarray, "n"] | None = None,
    y_weights: Shaped[np.ndarray, "m"] | None = None,
    *,
    order: int = 2,
) -> float:
    """Equation (1) between two weighted sets of numbers, exactly.

    Args:
        x: Numbers, in any order.
        y: Numbers, in any order.
        x_weights: Weights of `x`, not all 0; None for equal weights.
        y_weights: Weights of `y`, not all 0; None for equal weights.
        order: The order p.
    """
    x, below_x = _distribution(x, x_weights)
    y, below_y = _distribution(y, y_weights)
    levels = np.sort(np.concatenate([below_x, below_y]), kind="stable")  # two sorted runs
    gaps = np.abs(x[np.searchsorted(below_x, levels)] - y[np.searchsorted(below_y, levels)])
    return float((np.diff(levels, prepend=0) @ gaps**order) ** (1 / order))


def difference_counts(
    images: Images, radii: Sequence[int]
) -> Int[np.ndarray, "images radii channels 511"]:
    """Histograms for every image: how often neighbours differ by -255 to 255 levels.

    The result takes 18 kB per RGB image for three radii.

    Args:
        images: Images, uint8.
        radii: Chebyshev radii of the windows, rising.

    Raises:
        ValueError: The radii do not rise from at least 1, or reach beyond the images.
    """
    count, height, width, channels = images.shape
    if list(radii) != sorted(set(radii)) or min(radii) < 1 or max(radii) >= min(height, width):
        raise ValueError(
            f"radii are {tuple(radii)}: they must rise, from at least 1 to below {height} x {width}"
        )
    rings = np.zeros((count, max(radii), channels, _LEVELS), np.int32)
    step = max(1, _BLOCK // (height * width))
    for start in range(0, count, step):
        block = images[start : start + step].astype(np.int32)
        for down, right in _half_window(max(radii)):
            ring = max(abs(down), abs(right)) - 1
            rings[start : start + step, ring] += _differences(block, down, right)
    rings += rings[..., ::-1]  # each pixel of a pair is a neighbour of the other
    return rings.cumsum(axis=1, dtype=np.int32)[:, np.asarray(radii) - 1]


def difference_distance(
    samples: Int[np.ndarray, "images channels 511"],
    reference: Int[np.ndarray, "others channels 511"],
) -> float:
    """The difference distance (2), from the histograms for one radius."""
    return weights_distance(*(x.sum(axis=0, dtype=np.int64) for x in (samples, reference)))


def weights_distance(
    samples: Shaped[np.ndarray, "channels 511"], reference: Shaped[np.ndarray, "channels 511"]
) -> float:
    """The difference distance (2), from the weights of the differences -255 to 255."""
    values = np.arange(_LEVELS) / _SCALE
    pairs = zip(samples, reference, strict=True)
    return float(np.mean([wasserstein(values, values, x, y) for x, y in pairs]))


def draw_patches(
    images: Images, *, size: int, count: int, rng: np.random.Generator
) -> Float32[np.ndarray, "images {count} values"]:
    """Patches at random places of every image, in [-1, 1], without their mean colour.

    Args:
        images: Images, uint8.
        size: Height and width of a patch in pixels.
        count: Patches per image.
        rng: Generator that draws the places.
    """
    windows = np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(1, 2))
    heights, widths = windows.shape[1:3]
    rows = rng.integers(heights, size=(len(images), count))
    columns = rng.integers(widths, size=(len(images), count))
    drawn = windows[np.arange(len(images))[:, None], rows, columns].astype(np.float32)
    return _without_mean(drawn / np.float32(_SCALE)).reshape(len(images), count, -1)


def draw_directions(
    count: int, *, size: int, channels: int, rng: np.random.Generator
) -> Float[np.ndarray, "{count} values"]:
    """Random unit directions in the space of patches without their mean colour."""
    directions = _without_mean(rng.normal(size=(count, channels, size, size))).reshape(count, -1)
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


def sliced_distance(
    samples: Shaped[np.ndarray, "*n directions"], reference: Shaped[np.ndarray, "*m directions"]
) -> float:
    """The patch distance (3), from the components of patches along every direction."""
    columns = (x.reshape(-1, x.shape[-1]).T for x in (samples, reference))
    return float(np.sqrt(np.mean([wasserstein(x, y) ** 2 for x, y in zip(*columns, strict=True)])))


def block_means(images: Images, size: int) -> UInt8[np.ndarray, "images rows columns channels"]:
    """Images made smaller: each block of size x size pixels becomes its mean, rounded."""
    count, height, width, channels = images.shape
    blocks = images.reshape(count, height // size, size, width // size, size, channels)
    return np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)


class NeighborhoodJudge:
    """Computes (2) and (3) between sets of samples and the same real images.

    Args:
        reference: Real images, preferably images that were not trained on.
        radii: Radii of (2) in pixels, rising.
        sizes: Sides of the patches of (3) in pixels.
        patches: Number of patches from every image.
        directions: Number of directions of (3).
        replicates: Number of bootstrap replicates of the samples; 0 for no intervals.
        seed: Seed of places, directions and bootstrap, the same for all sets.
    """

    def __init__(
        self,
        reference: Images,
        *,
        radii: Sequence[int] = (1, 2, 3),
        sizes: Sequence[int] = (2, 3),
        patches: int = 8,
        directions: int = 32,
        replicates: int = 100,
        seed: int = 0,
    ):
        self._radii, self._patches = tuple(radii), patches
        self._replicates, self._seed = replicates, seed
        self._counts = difference_counts(reference, radii)
        channels = reference.shape[-1]
        self._directions = {
            size: draw_directions(directions, size=size, channels=channels, rng=self._rng(size))
            for size in sizes
        }
        self._components = {size: self._project(reference, size) for size in sizes}

    def __call__(self, samples: Images) -> dict[str, Figure]:
        """Figures by name."""
        options = {"replicates": self._replicates, "rng": np.random.default_rng(self._seed)}
        figures = {}
        counts = difference_counts(samples, self._radii)
        for index, radius in enumerate(self._radii):
            known = self._counts[:, index]
            figures[f"difference W2, radius {radius}"] = figure(
                lambda rows, known=known: difference_distance(rows, known),
                counts[:, index],
                **options,
            )
        for size, known in self._components.items():
            figures[f"patch W2, {size} x {size}"] = figure(
                lambda rows, known=known: sliced_distance(rows, known),
                self._project(samples, size),
                **options,
            )
        return figures

    def _project(self, images: Images, size: int) -> Float[np.ndarray, "images patches directions"]:
        rng = self._rng(size)
        return draw_patches(images, size=size, count=self._patches, rng=rng) @ (
            self._directions[size].T
        )

    def _rng(self, size: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, size))


def _distribution(values: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The numbers in rising order, and for each the share of the weight up to and including it."""
    order = np.argsort(values)
    weights = np.ones(len(values)) if weights is None else weights[order].astype(np.float64)
    below = np.cumsum(weights)
    return values[order].astype(np.float64), below / below[-1]


def _half_window(radius: int) -> list[tuple[int, int]]:
    """The offsets in a window, one of each opposite pair."""
    span = range(-radius, radius + 1)
    return [offset for offset in itertools.product(span, span) if offset > (0, 0)]


def _differences(block: np.ndarray, down: int, right: int) -> np.ndarray:
    """Counts [images, channels, levels] of the differences between pixels at an offset."""
    count, height, width, channels = block.shape
    left = max(0, -right)
    right = max(0, right)
    first = block[:, : height - down, left : width - right]
    second = block[:, down:, right : width - left]
    slots = _LEVELS * np.arange(count * channels, dtype=np.int32).reshape(count, 1, 1, channels)
    places = first - second + (_LEVELS // 2) + slots
    found = np.bincount(places.ravel(), minlength=count * channels * _LEVELS)
    return found.reshape(count, channels, _LEVELS)


def _without_mean(patches: Shaped[np.ndarray, "*patches size size"]) -> np.ndarray:
    return patches - patches.mean(axis=(-2, -1), keepdims=True)
