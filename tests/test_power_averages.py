"""Tests of power-function averages, and of those that are made from stored ones."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from scipy.integrate import quad

from conprediff_jax.common.errors import FieldError
from conprediff_jax.runs.averages import power_average
from conprediff_jax.runs.checkpoint import CheckpointError, Checkpoints
from conprediff_jax.tasks.power_averages import (
    Profile,
    exponent,
    reconstruct,
    share_of_newest,
)


def weights(profile):
    """What the average gives to the parameters after each step: its profile between two steps."""
    power = exponent(profile.deviation)
    edges = np.arange(profile.step + 1) / profile.step
    return np.diff(edges ** (power + 1))


@pytest.mark.parametrize("deviation", [0.05, 0.1, 0.2])
def test_an_average_has_its_deviation_and_weights(deviation):
    power = exponent(deviation)
    mean, square = (quad(lambda x, k=k: (power + 1) * x ** (power + k), 0, 1)[0] for k in (1, 2))
    assert np.sqrt(square - mean**2) == pytest.approx(deviation, rel=1e-6)
    path = np.random.default_rng(0).normal(size=40).cumsum()
    average = 1e9  # what a run starts from does not count
    for step, value in enumerate(path, 1):
        share = float(share_of_newest(jnp.int32(step), power))
        assert step > 1 or share == 1
        average += share * (value - average)
    assert average == pytest.approx(path @ weights(Profile(40, deviation)), rel=1e-5)
    late = float(share_of_newest(jnp.int32(10**7), power))
    assert late == pytest.approx((power + 1) / 1e7, rel=1e-5)


def test_other_averages_follow_from_stored_ones():
    stored = [Profile(*pair) for pair in itertools.product((1, 2), (0.05, 0.1))]
    factors, _ = reconstruct(stored, Profile(2, 0.15))
    np.testing.assert_allclose(factors, [-0.01450, 0.05014, -0.34051, 1.30487], atol=5e-6)
    for index, profile in enumerate(stored):
        factors, error = reconstruct(stored, profile)
        np.testing.assert_allclose(factors, np.eye(4)[index], atol=1e-12)
        assert error < 1e-6


def test_the_error_is_the_distance_of_the_weights():
    """The weights of every step, where snapshots lie far apart against one step."""
    stored = [Profile(*pair) for pair in itertools.product(range(250, 2001, 250), (0.05, 0.1))]
    for deviation in (0.03, 0.15, 0.2):
        wanted = weights(Profile(2000, deviation))
        factors, error = reconstruct(stored, Profile(2000, deviation))
        made = sum(
            factor * np.pad(weights(profile), (0, 2000 - profile.step))
            for factor, profile in zip(factors, stored, strict=True)
        )
        assert made.sum() == pytest.approx(1)
        distance = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
        assert error == pytest.approx(distance, rel=0.02)


def test_averages_are_made_from_checkpoints(tmp_path):
    """A run of 40 steps that stores the averages of 0.05 and 0.1 after every fourth step."""
    trace = np.random.default_rng(0).normal(size=(40, 3)).cumsum(axis=0).astype(np.float32)

    def average(step, deviation):
        return {"kernel": jnp.float32(weights(Profile(step, deviation)) @ trace[:step])}

    def kept(step):
        return {str(deviation): average(step, deviation) for deviation in (0.05, 0.1)}

    with Checkpoints(str(tmp_path)) as checkpoints:
        for step in range(4, 41, 4):
            state = small_run.state_at(step).replace(power_averages=kept(step))
            checkpoints.save(state, small_run.batches(), small_run.CONFIG)
    like = jax.device_put(average(40, 0.05), jax.devices()[0])
    with Checkpoints(str(tmp_path), read_only=True) as checkpoints:

        def made(step, deviation):
            return power_average(checkpoints, (0.05, 0.1), step, deviation, like)["kernel"]

        np.testing.assert_array_equal(made(24, 0.1), kept(24)["0.1"]["kernel"])
        spread = np.abs(trace - trace[-1]).max()
        expected = average(40, 0.15)["kernel"]
        np.testing.assert_allclose(made(40, 0.15), expected, atol=0.02 * spread)
        said = (
            r"0.25 at step 8: the nearest is 73% off; stored are averages of 0.05, 0.1 at 2 steps"
        )
        with pytest.raises(CheckpointError, match=f"deviation {said}, 4 to 8$"):
            made(8, 0.25)
        with pytest.raises(CheckpointError, match=r"/7 holds no power-function averages"):
            made(7, 0.1)
        with pytest.raises(FieldError, match=r"average is 0.3: .* between 0 and 0.289"):
            made(8, 0.3)
        with pytest.raises(CheckpointError, match=r"/8 holds no power-function averages"):
            power_average(checkpoints, (), 8, 0.1, like)
