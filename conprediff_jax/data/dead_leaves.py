"""Dead leaves: opaque discs of all sizes that cover each other, with the answers to what they show.

    f(r)  ~  r^-3,  a <= r <= b                                     density of the radii        (1)
    p(d)  =  E[g_r(d)] / (2 E[pi r^2] - E[g_r(d)])                  same leaf at a distance d   (2)
    E[g_r(d)]  ~  int_(d/2b)^(min(1, d/2a)) 2 (arccos(u)/u - sqrt(1 - u^2)) du                  (3)

with g_r(d) the area in which two discs of radius r overlap whose centres are d apart. Leaves fall
at uniform places, in uniform colours. A point shows the last leaf that covers it. Of the leaves
that cover one of two points or both, the last one decides: so (2) is the probability that one leaf
covers both, given that it covers one. With the radii (1), images between the scales a and b look
the same at every scale, and share much of their local statistics with photographs (Ruderman 1997;
Lee, Mumford and Huang 2001, "Occlusion models for natural images"). (3) follows from (1) with u = d
/ 2r; factors that (2) does not depend on are left out.

Two pixels on one leaf are equal, and two pixels on different leaves are independent. So the
correlation of two pixels is p(d), and the distribution of their difference is known exactly.

An image is made from the front to the back, until every pixel is covered. This gives exactly the
stationary distribution of leaves that have fallen for ever (Kendall and Thonnes 1999). A pixel
shows the colour at its centre, without blending.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from scipy import integrate

from conprediff_jax.common.errors import FieldError

COLOURS = 256
MEAN, VARIANCE = (COLOURS - 1) / 2, (COLOURS**2 - 1) / 12  # of a channel

_LEAVES = 512  # that fall at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeadLeaves:
    """The law of the images.

    Attributes:
        side: Side of an image in pixels.
        smallest: a, the smallest radius in pixels.
        largest: b, the largest radius in pixels.

    Raises:
        FieldError: A size is out of its range.
    """

    side: int = 32
    smallest: float = 1.0
    largest: float = 16.0

    def __post_init__(self):
        if self.side < 1:
            raise FieldError("side", f"is {self.side}: it must be at least 1")
        if not 0 < self.smallest < self.largest:
            raise FieldError(
                "smallest", f"is {self.smallest}: it must lie between 0 and largest={self.largest}"
            )

    @property
    def description(self) -> str:
        """What the images are, in words."""
        return (
            f"dead leaves of radius {self.smallest:g} to {self.largest:g} pixels with density "
            f"r^-3, {self.side} x {self.side} pixels"
        )

    def radii(self, rng: np.random.Generator, count: int) -> Float[np.ndarray, "{count}"]:
        """Radii of the density (1) in pixels, by the inverse of its distribution function."""
        low, high = self.smallest**-2, self.largest**-2
        return (low - rng.random(count) * (low - high)) ** -0.5

    def draw(
        self, rng: np.random.Generator, count: int
    ) -> UInt8[np.ndarray, "{count} {self.side} {self.side} 3"]:
        """Draws images."""
        return np.stack([self._image(rng) for _ in range(count)])

    def _image(self, rng: np.random.Generator) -> np.ndarray:
        image = np.empty((self.side**2, 3), np.uint8)
        bare = np.arange(self.side**2)
        while bare.size:
            radii = self.radii(rng, _LEAVES)
            # Every place from which the largest leaf can reach the image.
            centres = rng.uniform(-self.largest, self.side - 1 + self.largest, (_LEAVES, 2))
            colours = rng.integers(COLOURS, size=(_LEAVES, 3), dtype=np.uint8)
            outside = np.abs(centres - np.clip(centres, 0, self.side - 1))
            near = np.square(outside).sum(axis=1) <= radii**2
            down, right = np.square(np.arange(self.side)[:, None] - centres[near].T[:, None])
            covered = down[bare // self.side] + right[bare % self.side] <= radii[near] ** 2
            front = covered.argmax(axis=1)
            hit = covered[np.arange(len(bare)), front]
            image[bare[hit]] = colours[near][front[hit]]
            bare = bare[~hit]
        return image.reshape(self.side, self.side, 3)

    def same_leaf(self, distance: float) -> float:
        """The probability (2) that two points show the same leaf.

        Args:
            distance: Distance of the points in pixels, at least 0.
        """
        whole = np.pi * np.log(self.largest / self.smallest)
        if distance == 0:
            return 1.0
        low, high = (min(1.0, distance / (2 * r)) for r in (self.largest, self.smallest))
        overlap, _ = integrate.quad(
            lambda u: 2 * (np.arccos(u) / u - np.sqrt(1 - u**2)), low, high, epsabs=1e-12
        )
        return overlap / (2 * whole - overlap)

    def difference_weights(self, radius: int) -> Float[np.ndarray, "511"]:
        """The distribution of the difference of two neighbours in a channel, -255 to 255.

        Neighbours are all pairs of different pixels of an image at a Chebyshev distance of at most
        `radius`; pairs in the middle of an image have more neighbours than those at its border.

        Args:
            radius: Radius of the window in pixels, at least 1.
        """
        steps = np.arange(radius + 1)
        counts = (self.side - steps) * np.where(steps, 2, 1)  # pairs along one axis, both ways
        pairs = np.outer(counts, counts)
        pairs[0, 0] = 0
        same = [[self.same_leaf(np.hypot(down, right)) for right in steps] for down in steps]
        share = float((pairs * np.array(same)).sum() / pairs.sum())
        weights = (1 - share) * (COLOURS - np.abs(np.arange(-255, 256))) / COLOURS**2
        weights[255] += share
        return weights


def pair_correlation(
    law: DeadLeaves, distances: Shaped[np.ndarray, "distances"]
) -> Float[np.ndarray, "distances"]:
    """The correlation of two pixels in a channel, which is the probability (2).

    Args:
        law: The law of the images.
        distances: Distances in pixels.
    """
    return np.array([law.same_leaf(float(distance)) for distance in distances])
