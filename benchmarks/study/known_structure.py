"""Local structure of samples against that of a law whose answer is known.

    C(d)  =  mean over i, |i - j| = d along an axis, of z_i . z_j / channels                   (1)
    TV    =  1/2 sum over 2 x 2 patterns of |share in samples - share in the law|              (2)
    error =  ((G - 1)/G sum_g (f_g - mean f)^2)^(1/2),  f_g without group g                    (3)

with z the points of an image, standardised by the law's own mean and deviation: pixels, or one-hot
vectors of tokens. (1) is the pair correlation: of tokens, (K P(s_i = s_j) - 1)/(K - 1). Differences
between neighbours are compared by `neighborhoods`, as for other images; energies by the distance W2
of their distributions over images. (3) is the jackknife over G groups of images (Efron 1982), the
standard error of any figure that depends on means over images.

For dead leaves, differences and correlations of the law are exact, see `data.dead_leaves`. For
Potts grids they are those of a reference, as large as is asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8

from conprediff_jax.common.palette import palette
from conprediff_jax.data import dead_leaves, potts
from conprediff_jax.data.dead_leaves import DeadLeaves
from conprediff_jax.data.potts import Potts
from study.neighborhoods import difference_counts, wasserstein, weights_distance

GROUPS = 20
RADII = (1, 2, 3)
DISTANCES = (1, 2, 4, 8)

Images = UInt8[np.ndarray, "images rows columns 3"]
Sums = Float[np.ndarray, "groups *quantity"]


class Estimate(NamedTuple):
    """A figure and its standard error (3)."""

    value: float
    error: float


class Quantity(NamedTuple):
    """Something that is measured in every image, and what is read from its mean.

    Attributes:
        rows: A function from images to an array with a row for each image.
        read: A function from a mean row, and the law's, to figures by name.
        known: The law's mean row, if it is exact; None if a reference is needed.
    """

    rows: Callable[[Images], np.ndarray]
    read: Callable[[np.ndarray, np.ndarray], Mapping[str, float]]
    known: np.ndarray | None = None


def pair_correlation(
    points: Float[np.ndarray, "images rows columns channels"], distances: Sequence[int]
) -> Float[np.ndarray, "images distances"]:
    """The pair correlation (1) of every image, over both axes.

    Args:
        points: Standardised points.
        distances: Distances in points, below the sides of the images.
    """
    found = []
    for d in distances:
        down = (points[:, d:] * points[:, :-d]).mean(axis=-1)
        right = (points[:, :, d:] * points[:, :, :-d]).mean(axis=-1)
        both = down.sum(axis=(1, 2)) + right.sum(axis=(1, 2))
        found.append(both / (down[0].size + right[0].size))
    return np.stack(found, axis=1)


def pattern_counts(
    tokens: Int[np.ndarray, "images rows columns"], states: int
) -> Int[np.ndarray, "images patterns"]:
    """How often each of the K^4 patterns of 2 x 2 tokens occurs in every image.

    Args:
        tokens: Tokens, 0 to K - 1.
        states: K, the number of tokens.
    """
    corners = tokens[:, :-1, :-1], tokens[:, :-1, 1:], tokens[:, 1:, :-1], tokens[:, 1:, 1:]
    codes = np.ravel_multi_index(corners, (states,) * 4).reshape(len(tokens), -1)
    slots = states**4 * np.arange(len(tokens))[:, None]
    counts = np.bincount((codes + slots).ravel(), minlength=len(tokens) * states**4)
    return counts.reshape(len(tokens), -1)


def total_variation(
    samples: Shaped[np.ndarray, "patterns"], law: Shaped[np.ndarray, "patterns"]
) -> float:
    """The distance (2), from counts or shares: 0 for equal shares, 1 for no pattern in common."""
    return float(np.abs(samples / samples.sum() - law / law.sum()).sum() / 2)


def tokens_of(images: Images, states: int) -> Int[np.ndarray, "images rows columns"]:
    """The tokens of images in the colours of the palette.

    Raises:
        ValueError: A pixel has another colour.
    """
    same = (images[..., None, :] == palette(states)).all(axis=-1)
    if not same.any(axis=-1).all():
        raise ValueError(f"a pixel has none of the {states} colours of the palette")
    return same.argmax(axis=-1)


def quantities(law: DeadLeaves | Potts) -> dict[str, Quantity]:
    """What is measured for a law."""
    distances = [d for d in DISTANCES if d < law.side]
    differences = Quantity(lambda images: difference_counts(images, RADII), _read_differences)
    correlations = Quantity(
        lambda images: pair_correlation(_points(images, law), distances),
        lambda mean, known: {
            f"correlation at {d}": float(value) for d, value in zip(distances, mean, strict=True)
        },
    )
    if isinstance(law, DeadLeaves):
        weights = [np.tile(law.difference_weights(radius), (3, 1)) for radius in RADII]
        exact = dead_leaves.pair_correlation(law, np.array(distances))
        return {
            "differences": differences._replace(known=np.stack(weights)),
            "correlations": correlations._replace(known=exact),
        }
    bonds = 2 * law.side * (law.side - 1)
    levels = np.arange(-bonds, 1) / bonds

    def energies(images: Images) -> np.ndarray:
        places = np.rint(bonds * (1 + potts.energy(tokens_of(images, law.states)))).astype(int)
        return (np.arange(bonds + 1) == places[:, None]).astype(np.float64)

    return {
        "differences": differences,
        "correlations": correlations,
        "patterns": Quantity(
            lambda images: pattern_counts(tokens_of(images, law.states), law.states),
            lambda mean, known: {"2 x 2 patterns, total variation": total_variation(mean, known)},
        ),
        "energies": Quantity(
            energies,
            lambda mean, known: {
                "energy of a bond": float(levels @ mean),
                "energies, W2": wasserstein(levels, levels, mean, known),
            },
        ),
    }


def _read_differences(mean: np.ndarray, known: np.ndarray) -> dict[str, float]:
    return {
        f"difference W2, radius {radius}": weights_distance(*rows)
        for radius, *rows in zip(RADII, mean, known, strict=True)
    }


def _points(images: Images, law: DeadLeaves | Potts) -> np.ndarray:
    if isinstance(law, DeadLeaves):
        return (images - dead_leaves.MEAN) / dead_leaves.VARIANCE**0.5
    share = 1 / law.states
    return (np.eye(law.states)[tokens_of(images, law.states)] - share) / (
        share * (1 - share)
    ) ** 0.5


class Summed(NamedTuple):
    """The sums of a quantity over groups of images.

    Attributes:
        sums: Sums over the images of a group.
        sizes: Number of images in every group.
    """

    sums: Sums
    sizes: Int[np.ndarray, "groups"]

    @property
    def mean(self) -> np.ndarray:
        """The mean over all images."""
        return self.sums.sum(axis=0) / self.sizes.sum()

    def without(self) -> list[np.ndarray]:
        """The mean over all images but those of a group, for each group."""
        rest = self.sums.sum(axis=0) - self.sums
        return [
            part / (self.sizes.sum() - size) for part, size in zip(rest, self.sizes, strict=True)
        ]


def summed(quantity: Quantity, parts: Sequence[Images]) -> Summed:
    """Sums a quantity over groups of images."""
    sums = [quantity.rows(part).sum(axis=0, dtype=np.float64) for part in parts]
    return Summed(np.stack(sums), np.array([len(part) for part in parts]))


def estimates(quantity: Quantity, found: Summed, known: np.ndarray) -> dict[str, Estimate]:
    """The figures of a quantity with their standard errors (3), by name."""
    values = quantity.read(found.mean, known)
    if len(found.sizes) < 2:
        return {name: Estimate(value, float("nan")) for name, value in values.items()}
    drawn = [quantity.read(mean, known) for mean in found.without()]
    count = len(drawn)
    return {
        name: Estimate(value, float(np.std([d[name] for d in drawn]) * (count - 1) ** 0.5))
        for name, value in values.items()
    }


def groups_of(images: Images) -> list[np.ndarray]:
    """Images in at most `GROUPS` groups of nearly equal size."""
    return np.array_split(images, min(GROUPS, len(images)))


def compared(
    law: Any, sets: Mapping[str, Images], reference: Sequence[Images]
) -> dict[str, dict[str, Estimate]]:
    """Figures by name, and in each by the name of the set; `law` is what is known.

    Args:
        law: The law that the sets should follow.
        sets: Sets of images, by name.
        reference: Images of the law, in groups; not read where the answer is exact.
    """
    table: dict[str, dict[str, Estimate]] = {}
    for quantity in quantities(law).values():
        known = quantity.known
        if known is None:
            of_law = summed(quantity, reference)
            known = of_law.mean
            columns = {"law": estimates(quantity, of_law, known)}
        else:
            columns = {"law": {n: Estimate(v, 0.0) for n, v in quantity.read(known, known).items()}}
        for name, images in sets.items():
            columns[name] = estimates(quantity, summed(quantity, groups_of(images)), known)
        for column, found in columns.items():
            for name, estimate in found.items():
                table.setdefault(name, {})[column] = estimate
    return table
