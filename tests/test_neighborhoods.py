"""Tests of image neighbourhoods and paired intervals against SciPy, POT and counts by hand."""

import itertools

import numpy as np
import ot
import pytest
from scipy import stats
from study import neighborhoods, paired

from conprediff_jax.metrics.bootstrap import Figure


def rng(seed=0):
    return np.random.default_rng(seed)


def pictures(count, size=6, seed=0, high=256):
    return rng(seed).integers(0, high, (count, size, size, 3), np.uint8)


# Distances ----------------------------------------------------------------------------------------


def test_wasserstein_distances_are_those_of_scipy_and_pot():
    x, y = rng().normal(size=37), rng(1).exponential(size=52)
    a, b = rng(2).integers(0, 4, 37), rng(3).random(52)  # some weights are 0
    for weights in ((None, None), (a, b)):
        found = neighborhoods.wasserstein(x, y, *weights, order=1)
        assert found == pytest.approx(stats.wasserstein_distance(x, y, *weights), rel=1e-12)
    expected = ot.wasserstein_1d(x, y, a / a.sum(), b / b.sum(), p=2)
    assert neighborhoods.wasserstein(x, y, a, b) == pytest.approx(expected**0.5, rel=1e-12)
    assert neighborhoods.wasserstein(x, x[::-1]) == pytest.approx(0, abs=1e-12)


def test_a_sliced_distance_is_pots_along_the_same_directions():
    x, y = rng().normal(size=(5, 8, 4)), rng(1).normal(0.3, 2, size=(30, 4))
    expected = ot.sliced_wasserstein_distance(x.reshape(-1, 4), y, projections=np.eye(4), p=2)
    assert neighborhoods.sliced_distance(x, y) == pytest.approx(expected, rel=1e-12)


# Differences and patches --------------------------------------------------------------------------


def counted_by_hand(image, radius, channel):
    """Every ordered pair of different pixels of a window."""
    found, size = np.zeros(511, int), len(image)
    for i in itertools.product(range(size), repeat=2):
        for j in itertools.product(range(size), repeat=2):
            if 0 < max(abs(i[0] - j[0]), abs(i[1] - j[1])) <= radius:
                found[int(image[*i, channel]) - int(image[*j, channel]) + 255] += 1
    return found


def test_neighbours_are_counted_as_by_hand(monkeypatch):
    images = pictures(3)
    monkeypatch.setattr(neighborhoods, "_BLOCK", 2 * 36)  # two images at a time
    counts = neighborhoods.difference_counts(images, (1, 3))
    for image, radius, channel in ((0, 1, 0), (1, 3, 2), (2, 3, 1)):
        np.testing.assert_array_equal(
            counts[image, (1, 3).index(radius), channel],
            counted_by_hand(images[image], radius, channel),
        )
    # Windows of the corners, the edges and the inside of 6 x 6 pixels.
    assert counts[0, 0, 0].sum() == 4 * 3 + 16 * 5 + 16 * 8
    with pytest.raises(ValueError, match=r"radii are \(2, 6\): they must rise"):
        neighborhoods.difference_counts(images, (2, 6))


def test_the_difference_distance_is_that_of_the_pairs_themselves():
    sets = pictures(2, size=4), pictures(3, size=4, seed=1, high=100)
    distances = []
    for channel in range(3):
        lists = []
        for images in sets:
            counts = sum(counted_by_hand(image, 2, channel) for image in images)
            lists.append((np.repeat(np.arange(511), counts) - 255) / 127.5)
        distances.append(ot.wasserstein_1d(*lists, p=2) ** 0.5)
    counts = [neighborhoods.difference_counts(images, (2,))[:, 0] for images in sets]
    found = neighborhoods.difference_distance(*counts)
    assert found == pytest.approx(np.mean(distances), rel=1e-10)


def test_patches_lie_in_their_images_and_have_no_mean():
    images = pictures(5)
    drawn = neighborhoods.draw_patches(images, size=2, count=40, rng=rng())
    places = set()
    for image, patches in zip(images, drawn, strict=True):
        windows = {}
        for row, column in itertools.product(range(5), repeat=2):
            patch = image[row : row + 2, column : column + 2].transpose(2, 0, 1) / 127.5
            windows[row, column] = (patch - patch.mean(axis=(1, 2), keepdims=True)).ravel()
        for patch in patches:
            near = [place for place, w in windows.items() if np.allclose(w, patch, atol=1e-5)]
            assert near
            places |= set(near)
    assert len(places) == 25  # every place is drawn some time
    directions = neighborhoods.draw_directions(9, size=3, channels=3, rng=rng())
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1)
    np.testing.assert_allclose(directions.reshape(9, 3, 9).mean(axis=2), 0, atol=1e-12)


def smooth(count, seed):
    return neighborhoods.block_means(pictures(count, 32, seed), 4)


def test_distances_rise_with_noise_and_have_intervals():
    judge = neighborhoods.NeighborhoodJudge(smooth(60, 1), radii=(1, 2), sizes=(2,), replicates=20)
    noise = rng(3).normal(0, 1, (60, 8, 8, 3))
    found = [
        judge((smooth(60, 2) + level * noise).clip(0, 255).astype(np.uint8))
        for level in (0, 20, 60)
    ]
    assert list(found[0]) == [
        "difference W2, radius 1", "difference W2, radius 2", "patch W2, 2 x 2"
    ]  # fmt: skip
    for name in found[0]:
        clean, noisy, noisier = (figures[name] for figures in found)
        assert clean.low <= clean.value <= clean.high
        assert 2 * clean.value < noisy.value < noisier.value


def test_block_means_are_means():
    images = pictures(2)
    small = neighborhoods.block_means(images, 3)
    assert small.shape == (2, 2, 2, 3)
    assert abs(float(small[1, 0, 1, 2]) - images[1, :3, 3:, 2].mean()) <= 0.5


# Matched pairs ------------------------------------------------------------------------------------


def test_paired_intervals_are_those_of_scipy():
    a, b = rng().normal(size=6), rng(1).normal(0.3, 1, size=6)
    figure, differences = paired.paired_difference(a.tolist(), b.tolist())
    test = stats.ttest_rel(a, b)
    assert figure.value == pytest.approx(np.mean(a - b))
    assert figure[1:] == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert differences == pytest.approx(tuple(a - b))
    assert paired.paired_difference([3.0], [1.0]).figure == Figure(2.0)
    assert paired.paired_difference([3.0, 4.0], [1.0, 2.0]).figure == Figure(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="2 values and 1 of the baseline"):
        paired.paired_difference([1.0, 2.0], [1.0])


def test_independent_intervals_of_normal_means_add_in_squares():
    found = paired.independent_difference(Figure(5, 5 - 3, 5 + 6), Figure(1, 1 - 8, 1 + 4))
    assert found == pytest.approx((4, 4 - 5, 4 + 10))
    assert paired.independent_difference(Figure(5.0), Figure(1, 0, 2)) == Figure(4.0)
