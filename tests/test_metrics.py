"""Tests of metrics against independent implementations: torch, SciPy, brute force."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image, ImageFilter
from torch.nn import functional as F

from conprediff_jax.metrics import (
    bootstrap,
    features,
    frechet,
    inception_score,
    kernel,
    precision_recall,
)
from conprediff_jax.metrics.networks import random_vgg16


def rng(seed=0):
    return np.random.default_rng(seed)


def gaussian(rows):
    moments = frechet.Moments()
    moments.update(rows)
    return moments.gaussian()


# Frechet distance ---------------------------------------------------------------------------------


def test_frechet_distance_is_the_formula_with_scipys_root():
    x, y = (
        rng().normal(1, 2, (300, 12)),
        rng(1).normal(0, 1, (200, 12)) @ rng(2).normal(size=(12, 12)),
    )
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    shift = x.mean(0) - y.mean(0)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    expected = shift @ shift + np.trace(cov_x + cov_y - 2 * root)
    assert frechet.frechet_distance(gaussian(x), gaussian(y)) == pytest.approx(expected, rel=1e-10)
    assert frechet.frechet_distance(gaussian(x), gaussian(x)) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="size 12 cannot be compared with those of size 3"):
        frechet.frechet_distance(gaussian(x), gaussian(x[:, :3]))


@pytest.mark.parametrize("count", [2, 10, 100, 400])
def test_frechet_distance_of_few_images_is_exact_and_never_negative(count):
    """Of centred rows X and Y, tr (C_x C_y)^(1/2) is the nuclear norm of X Y', a small matrix."""
    x, y = rng(count).normal(0, 10, (count, 160)), rng(1).normal(1, 11, (count, 160))
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    common = np.linalg.svd(centred_x @ centred_y.T, compute_uv=False).sum()
    spread = np.square(centred_x).sum() + np.square(centred_y).sum()
    expected = np.square(x.mean(0) - y.mean(0)).sum() + (spread - 2 * common) / (count - 1)
    assert frechet.frechet_distance(gaussian(x), gaussian(y)) == pytest.approx(expected, rel=1e-10)
    shuffled = gaussian(rng().permutation(x))
    for same in (gaussian(x), shuffled):
        assert 0 <= frechet.frechet_distance(gaussian(x), same) < 1e-9


def test_features_that_are_no_numbers_have_no_moments():
    x = rng().normal(size=(9, 3))
    with pytest.raises(ValueError, match="no finite numbers"):
        gaussian(np.where(x == x.max(), np.nan, x))


def test_moments_come_in_any_batches_and_keep_their_digits_far_from_zero():
    x = (rng().normal(size=(101, 5)) + 1e4).astype(np.float32)
    times = rng(1).integers(0, 3, 101)
    moments = frechet.Moments()
    for start, stop in ((0, 1), (1, 60), (60, 101)):
        moments.update(x[start:stop], times[start:stop])
    repeated = x.repeat(times, axis=0).astype(np.float64)
    np.testing.assert_allclose(moments.gaussian().mean, repeated.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.gaussian().covariance, np.cov(repeated.T), rtol=1e-8)
    assert moments.gaussian().count == times.sum()


# Kernel distance, inception score, precision and recall -------------------------------------------


def brute_force_kernel_distance(x, y):
    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def within(z):
        return np.mean([k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])

    return within(x) + within(y) - 2 * np.mean([k(a, b) for a in x for b in y])


def test_kernel_distance_is_brute_force_and_influence_is_what_a_sample_does():
    x, y = rng().normal(0.3, 1, (40, 3)), rng(1).normal(size=(40, 3))
    whole = kernel.kernel_distance(x, y, size=40, rng=rng())
    assert whole.value == pytest.approx(brute_force_kernel_distance(x, y), rel=1e-10)
    without = [
        brute_force_kernel_distance(np.delete(x, index, axis=0), y) - whole.value
        for index in range(4)
    ]
    # Leaving a sample out undoes its share, to first order in 1 / n.
    np.testing.assert_allclose(-whole.influence[:4] / 39, without, rtol=0.15)
    subsets = kernel.kernel_distance(x, y, subsets=400, size=20, rng=rng(2))
    assert subsets.value == pytest.approx(whole.value, abs=0.05)


def test_inception_score_is_torchs_divergence_over_splits():
    logits = rng().normal(0, 3, (50, 7)).astype(np.float32)
    scores = []
    for part in torch.from_numpy(logits).double().chunk(5):
        p = part.softmax(1)
        mean = p.mean(0, keepdim=True).log().expand_as(p)
        scores.append(F.kl_div(mean, p, reduction="batchmean").exp().item())
    expected = np.mean(scores)
    assert inception_score.inception_score(logits, splits=5) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("sureness", [10.0, 746.0, 1e4, 1e30])
def test_inception_score_of_a_network_that_is_sure_is_the_number_of_classes(sureness):
    """Probabilities of 0, and such as round to 0 in the mean, take no part."""
    logits = (sureness * np.eye(5, dtype=np.float32)).repeat(3, axis=0)
    found = inception_score.inception_score(logits, splits=1)
    assert found == pytest.approx(5, rel=1e-2 if sureness == 10 else 1e-12)
    with pytest.raises(ValueError, match="no finite numbers"):
        inception_score.inception_score(np.where(logits > 0, np.nan, logits), splits=1)


def test_precision_and_recall_are_brute_force_in_any_blocks(monkeypatch):
    x, y = rng().normal(0, 0.7, (70, 4)) + 50, rng(1).normal(size=(45, 4)) + 50
    monkeypatch.setattr(precision_recall, "BLOCK", 16)
    found = precision_recall.precision_recall(x, y, ks=(1, 3))
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    across = torch.cdist(tx, ty)
    for column, k in enumerate((1, 3)):
        radii = [torch.cdist(z, z).kthvalue(k + 1).values for z in (tx, ty)]
        np.testing.assert_array_equal(found.samples[:, column], (across <= radii[1]).any(1))
        np.testing.assert_array_equal(found.reference[:, column], (radii[0] >= across.T).any(1))
    distances, indices = across.topk(3, largest=False)
    nearest = precision_recall.nearest(x, y, k=3)
    np.testing.assert_array_equal(nearest.indices, indices)
    np.testing.assert_allclose(nearest.distances, distances, atol=1e-5)
    with pytest.raises(ValueError, match="2 images have no 4 neighbours"):
        precision_recall.precision_recall(x[:2], y, ks=(3,))


# Confidence intervals -----------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_that_of_normal_theory():
    values = rng().normal(5, 2, 400)
    found = bootstrap.mean_figure(values, replicates=2000, rng=rng(1))
    half = 1.96 * values.std() / np.sqrt(400)
    np.testing.assert_allclose(
        found, [values.mean(), found.value - half, found.value + half], rtol=0.01
    )
    assert bootstrap.mean_figure(values, replicates=0, rng=rng()) == (values.mean(), None, None)


def test_frechet_and_kernel_intervals_are_as_wide_as_other_samples_make_them():
    """The spread over fresh samples is what the interval of a single set promises."""
    reference = rng(99).normal(size=(2000, 3))

    def draw(seed):
        return rng(seed).normal(0.4, 1.3, (300, 3))

    def kernel_value(rows):
        return kernel.kernel_distance(rows, reference, subsets=1, size=300, rng=rng())

    distances = [
        frechet.frechet_distance(gaussian(draw(s)), gaussian(reference)) for s in range(60)
    ]
    kernels = [kernel_value(draw(s)).value for s in range(60)]
    rows = draw(1000)
    options = {"replicates": 200, "rng": rng(5)}
    found = bootstrap.frechet_figure(gaussian(rows), rows, gaussian(reference), **options)
    value, influence = kernel_value(rows)
    for figure, fresh in (
        (found, distances),
        (bootstrap.mean_figure(value + influence, **options), kernels),
    ):
        assert figure.low < figure.value < figure.high
        assert (figure.high - figure.low) / 3.92 == pytest.approx(np.std(fresh), rel=0.35)


# Random VGG-16 ------------------------------------------------------------------------------------


def philox(key, counter):
    """Philox-4x64-10 of Salmon et al. 2011, by its definition."""
    low = 2**64 - 1
    a, b, c, d = counter, 0, 0, 0
    keys = [key, 0]
    for _ in range(10):
        high_a, high_c = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (
            (high_c >> 64) ^ b ^ keys[0],
            high_c & low,
            (high_a >> 64) ^ d ^ keys[1],
            high_a & low,
        )
        keys = [(keys[0] + 0x9E3779B97F4A7C15) & low, (keys[1] + 0xBB67AE8584CAA73B) & low]
    return [a, b, c, d]


def test_the_random_network_is_as_documented():
    params = random_vgg16.params()
    bits = [value for counter in range(1, 8) for value in philox(16, counter)][:27]
    drawn = [(2 * (value >> 11) / 2**53 - 1) * np.sqrt(6 / 27) for value in bits]
    first = params["trunk"]["features_0"]["kernel"][..., 0]  # [row, column, in] of the first output
    np.testing.assert_allclose(first.transpose(2, 0, 1).ravel(), drawn, rtol=1e-6)

    images = rng().integers(0, 256, (2, 16, 24, 3), np.uint8)
    x = torch.from_numpy(images.repeat(2, 1).repeat(2, 2)).permute(0, 3, 1, 2) / 127.5 - 1
    expected = []
    for stage, layers in enumerate(([0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]), 1):
        x = F.max_pool2d(x, 2) if stage > 1 else x
        for layer in layers:
            window = torch.from_numpy(params["trunk"][f"features_{layer}"]["kernel"].copy())
            x = F.relu(F.conv2d(x, window.permute(3, 2, 0, 1), padding=1))
        projection = params[f"projection_{stage}"]["kernel"]
        expected.append(x.mean((2, 3)).numpy() @ projection)
    found = random_vgg16.RandomVGG16().apply({"params": params}, jnp.asarray(images))
    np.testing.assert_allclose(found, np.concatenate(expected, axis=1), atol=1e-5)


@pytest.fixture(scope="module")
def distances():
    """FD-random-VGG16 and KD-random-VGG16 of changed drawings to other, unchanged ones."""
    from conprediff_jax.data.openmoji import openmoji_dataset_builder as openmoji

    drawings = openmoji.drawings()
    count = 40
    paths = [list(drawings)[i] for i in rng().choice(len(drawings), 2 * count, replace=False)]
    faces = [svg for svg, (_, category) in drawings.items() if category == "face"]

    def render(paths):
        pngs = (openmoji.render(svg, 32) for svg in paths)
        return np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in pngs])

    good = render(paths[:count])
    noise = rng(1).normal(size=good.shape)

    def noisy(deviation):
        return (good + deviation * noise).clip(0, 255).astype(np.uint8)

    def blurred(radius):
        blur = ImageFilter.GaussianBlur(radius)
        return np.stack([np.asarray(Image.fromarray(image).filter(blur)) for image in good])

    def trained(progress):
        """From the prior of a diffusion model to drawings, as its samples get on."""
        prior = 127.5 * (1 + noise)
        return (progress * good + (1 - progress) * prior).clip(0, 255).astype(np.uint8)

    apply = jax.jit(features.random_extractor().apply)
    params = random_vgg16.params()

    def rows(images):
        return np.asarray(apply(params, images)["pool"])

    reference = rows(render(paths[count:]))

    def distance(images):
        found = rows(images)
        kd = kernel.kernel_distance(found, reference, subsets=1, size=count, rng=rng())
        return frechet.frechet_distance(gaussian(found), gaussian(reference)), kd.value

    best = distance(good)
    steps = {
        "training": [trained(0.8), trained(0)],
        "noise": [noisy(40), noisy(80)],
        "blur": [blurred(0.7), blurred(1.5)],
        "modes": [render(faces[:count])],
    }
    return {name: [best, *map(distance, sets)] for name, sets in steps.items()}


@pytest.mark.parametrize("change", ["training", "noise", "blur", "modes"])
def test_random_distances_rise_with_every_fault_and_fall_with_training(distances, change):
    """Each list goes from what is right to what is worse."""
    assert (np.diff(distances[change], axis=0) > 0).all(), distances[change]
