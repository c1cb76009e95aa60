"""Tests of the data that are computed: their laws, their files, and the tokens of a palette."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats
from study import known_structure

from conprediff_jax import data
from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.palette import palette
from conprediff_jax.data import dead_leaves, made, potts
from conprediff_jax.data.dead_leaves import DeadLeaves
from conprediff_jax.data.potts import Potts
from conprediff_jax.models.first_stage import Palette

LEAVES = DeadLeaves(side=16, smallest=1.0, largest=6.0)


# Dead leaves --------------------------------------------------------------------------------------


def test_radii_have_the_same_law_at_every_scale():
    law = DeadLeaves(smallest=0.5, largest=32.0)
    radii = law.radii(np.random.default_rng(0), 20_000)
    mass, _ = integrate.quad(lambda r: r**-3, 0.5, 32)
    edges = 0.5 * 2.0 ** np.arange(7)  # octaves: four times as many leaves in each as in the next
    shares = [
        integrate.quad(lambda r: r**-3, *pair)[0] / mass for pair in itertools.pairwise(edges)
    ]
    seen, _ = np.histogram(radii, edges)
    assert seen.sum() == len(radii)
    assert stats.chisquare(seen, len(radii) * np.array(shares)).pvalue > 0.01
    np.testing.assert_allclose(shares[:-1], 4 * np.array(shares[1:]))
    twice = DeadLeaves(side=64, smallest=2.0, largest=32.0)
    for d in (0.5, 1.0, 3.0, 10.0):
        assert twice.same_leaf(2 * d) == pytest.approx(DeadLeaves().same_leaf(d), rel=1e-9)
    assert LEAVES.same_leaf(0.0) == 1 and LEAVES.same_leaf(12.0) == LEAVES.same_leaf(40.0) == 0


@pytest.fixture(scope="module")
def leaves():
    return LEAVES.draw(np.random.default_rng(1), 1500)


def test_two_points_show_one_leaf_as_often_as_occlusion_says(leaves):
    def areas(d):  # the areas of equation (2), from circles cut by a chord
        lens = lambda r: (  # noqa: E731
            2 * r**2 * np.arccos(d / (2 * r)) - d / 2 * np.sqrt(4 * r**2 - d**2) if d < 2 * r else 0
        )
        both, _ = integrate.quad(lambda r: lens(r) * r**-3, 1, 6, points=[max(1, d / 2)])
        one, _ = integrate.quad(lambda r: np.pi * r**2 * r**-3, 1, 6)
        return both, one

    for down, right in ((0, 1), (1, 1), (2, 1), (4, 0), (3, 4), (0, 11)):
        both, one = areas(np.hypot(down, right))
        expected = LEAVES.same_leaf(np.hypot(down, right))
        assert expected == pytest.approx(both / (2 * one - both), rel=1e-6)
        same = (leaves[:, down:, right:] == leaves[:, : 16 - down, : 16 - right]).all(axis=-1)
        rows = same.mean(axis=(1, 2))
        assert abs(rows.mean() - expected) < 4 * stats.sem(rows)
    assert abs(leaves.mean() - dead_leaves.MEAN) < 4 * stats.sem(leaves.mean(axis=(1, 2, 3)))


def test_samples_of_the_law_have_the_structure_that_is_known(leaves):
    table = known_structure.compared(LEAVES, {"drawn": leaves, "noise": shuffled(leaves)}, [])
    for d in (1, 2, 4, 8):
        row = table[f"correlation at {d}"]
        assert row["law"].value == pytest.approx(LEAVES.same_leaf(float(d)))
        assert abs(row["drawn"].value - row["law"].value) < 5 * row["drawn"].error
        assert abs(row["noise"].value) < 0.02
    for radius in (1, 2, 3):
        row = table[f"difference W2, radius {radius}"]
        assert row["law"].value == 0 and row["drawn"].value < row["noise"].value / 5


def shuffled(images):
    pixels = images.reshape(-1, 3)
    return np.random.default_rng(2).permutation(pixels).reshape(images.shape)


# Potts --------------------------------------------------------------------------------------------


def test_grids_have_the_energies_and_magnetisations_of_an_enumeration():
    law = Potts(side=3, states=3, sweeps=20)
    every = np.array(list(itertools.product(range(3), repeat=9))).reshape(-1, 3, 3)
    pairs = [((r, c), (r + a, c + b)) for r in range(3) for c in range(3)
             for a, b in ((0, 1), (1, 0)) if r + a < 3 and c + b < 3]  # fmt: skip
    equal = sum((every[:, *one] == every[:, *other]).astype(int) for one, other in pairs)
    np.testing.assert_allclose(potts.energy(every), -equal / 12)
    weights = np.exp(np.log(1 + np.sqrt(3)) * equal)
    weights /= weights.sum()
    most = np.max([(every == state).sum(axis=(1, 2)) for state in range(3)], axis=0)

    grids = law.tokens(np.random.default_rng(0), 20_000)
    shares = np.bincount(equal, weights)
    kept = shares > 0
    seen = np.bincount(np.rint(-12 * potts.energy(grids)).astype(int), minlength=13)
    assert seen[~kept].sum() == 0
    assert stats.chisquare(seen[kept], 20_000 * shares[kept]).pvalue > 0.01
    found = potts.magnetisation(grids, 3)
    expected = weights @ ((3 * most / 9 - 1) / 2)
    assert abs(found.mean() - expected) < 4 * stats.sem(found)
    hot = Potts(side=3, states=3, temperature=1e9, sweeps=1).tokens(np.random.default_rng(0), 4000)
    assert abs(potts.energy(hot).mean() + 1 / 3) < 4 * stats.sem(potts.energy(hot))


def test_correlations_and_patterns_count_pairs_and_squares():
    rng = np.random.default_rng(3)
    tokens = rng.integers(3, size=(5, 6, 6))
    law = Potts(side=6)
    images = palette(3)[tokens]
    np.testing.assert_array_equal(known_structure.tokens_of(images, 3), tokens)
    found = known_structure.pair_correlation(known_structure._points(images, law), (1, 2))
    for place, d in enumerate((1, 2)):
        same = [
            np.concatenate([(t[d:] == t[:-d]).ravel(), (t[:, d:] == t[:, :-d]).ravel()]).mean()
            for t in tokens
        ]
        np.testing.assert_allclose(found[:, place], (3 * np.array(same) - 1) / 2, atol=1e-12)
    counts = known_structure.pattern_counts(tokens, 3)
    by_hand = [0] * 81
    for r, c in itertools.product(range(5), repeat=2):
        window = tokens[2, r : r + 2, c : c + 2].ravel()
        by_hand[int("".join(map(str, window)), 3)] += 1
    assert counts[2].tolist() == by_hand
    assert known_structure.total_variation(counts[0], counts[0]) == 0
    assert known_structure.total_variation(np.array([3, 0]), np.array([0, 1])) == 1
    with pytest.raises(ValueError, match="none of the 3 colours"):
        known_structure.tokens_of(images // 2, 3)


def test_a_standard_error_of_a_mean_is_the_usual_one():
    values = np.random.default_rng(4).normal(size=12)
    quantity = known_structure.Quantity(lambda x: x, lambda mean, known: {"mean": float(mean)})
    found = known_structure.summed(quantity, [part for part in values[:, None]])
    estimate = known_structure.estimates(quantity, found, np.zeros(()))["mean"]
    assert estimate == pytest.approx((values.mean(), stats.sem(values)))


# Files --------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(made, "LAWS", {"potts/4": Potts(side=4, sweeps=2)})
    monkeypatch.setattr(made, "SHARD", made.BLOCK)


def read(root, split="train"):
    spec = data.DataSpec(
        name="potts/4", data_dir=str(root), split=split, image_size=4, shuffle=False, threads=0
    )
    return next(data.make_iterator(spec, batch_size=data.num_examples(spec), seed=0))["image"]


def test_computed_data_go_on_where_they_stopped_and_are_read_as_others(
    small, tmp_path, monkeypatch
):
    draw, drawn = Potts.draw, []

    def stop(law, rng, count):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(count)
        return draw(law, rng, count)

    monkeypatch.setattr(Potts, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        made.write("potts/4", tmp_path, num=150, test_num=10, seed=5)
    with pytest.raises(
        data.DataError, match=r"run python -m conprediff_jax\.prepare --name=potts/4"
    ):
        read(tmp_path)
    monkeypatch.setattr(Potts, "draw", draw)
    made.write("potts/4", tmp_path, num=150, test_num=10, seed=5)
    train, test = read(tmp_path), read(tmp_path, "test")
    blocks = np.concatenate(list(made.blocks(made.LAWS["potts/4"], 5, "train", 150)))
    np.testing.assert_array_equal(train, blocks)
    assert len(test) == 10 and not (test == train[:10]).all()
    assert {tuple(pixel) for pixel in train.reshape(-1, 3)} == set(map(tuple, palette(3)))

    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*") if file.is_file()}
    made.write("potts/4", tmp_path, num=150, test_num=10, seed=5)
    assert before == {
        file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*") if file.is_file()
    }
    for changes, said in (({"num": 151}, "train 150, not 151"), ({"seed": 6}, "seed 5, not 6")):
        with pytest.raises(data.DataError, match=said):
            made.write("potts/4", tmp_path, **{"num": 150, "test_num": 10, "seed": 5, **changes})
    made.write("potts/4", tmp_path / "more", num=200, test_num=1, seed=5)
    np.testing.assert_array_equal(read(tmp_path / "more")[:150], train)
    with pytest.raises(data.DataError, match=r"potts/5: is not known; .* potts/4"):
        made.write("potts/5", tmp_path)
    with pytest.raises(FieldError, match="num is 0"):
        made.write("potts/4", tmp_path / "none", num=0)


# The palette --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 256])
def test_tokens_pass_through_a_palette_unchanged(count):
    stage = Palette(num_codes=count)
    tokens = np.random.default_rng(0).integers(count, size=(2, 8, 8)).astype(np.int32)
    images = stage.decode({}, jnp.asarray(tokens))
    assert images.dtype == jnp.uint8 and images.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(stage.encode({}, images), tokens)
    every = np.asarray(stage.vectors({}, jnp.arange(count).reshape(1, 1, count)))[0, 0]
    np.testing.assert_allclose(every.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(every.std(axis=0), 1, rtol=1e-5)
    sure = jnp.log(jnp.eye(count)[tokens] + 1e-30)
    np.testing.assert_allclose(
        stage.vectors({}, sure), stage.vectors({}, jnp.asarray(tokens)), atol=1e-4
    )


def test_a_palette_has_a_colour_for_every_token():
    with pytest.raises(FieldError, match="num_codes is 257"):
        Palette(num_codes=257)
