"""Tests of the Gaussian process against diffusers, values by hand and its own equations."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from conprediff_jax.diffusion import GaussianProcess, Process, schedules

# (schedule, beta_start, beta_end, diffusers' name)
SCHEDULES = [
    ("linear", 1e-4, 0.02, "linear"),
    ("scaled_linear", 0.0015, 0.0195, "scaled_linear"),
    ("cosine", 1e-4, 0.02, "squaredcos_cap_v2"),
]


def points(seed, shape=(4, 3, 2), dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def torched(x):
    return torch.from_numpy(np.array(x))


@pytest.mark.parametrize(("schedule", "beta_start", "beta_end", "theirs"), SCHEDULES)
def test_schedule_equals_diffusers(schedule, beta_start, beta_end, theirs):
    reference = diffusers.DDPMScheduler(
        beta_schedule=theirs, beta_start=beta_start, beta_end=beta_end
    )
    beta = schedules.betas(schedule, 1000, beta_start, beta_end)
    assert beta.dtype == np.float64
    np.testing.assert_allclose(beta, reference.betas.double().numpy(), rtol=1e-6)
    # Their table is a product of float32 factors 1 - beta, exact to 6e-8 each: a step that keeps
    # 1e-3 of the signal is exact to 6e-5 only. Ours is compared with the product in float64.
    exact = np.cumprod(1 - reference.betas.double().numpy())
    np.testing.assert_allclose(schedules.alpha_bars(beta)[:-1], exact[:-1], rtol=1e-6)
    np.testing.assert_allclose(
        schedules.alpha_bars(beta)[:-1], reference.alphas_cumprod.double().numpy()[:-1], rtol=2e-5
    )


def test_cosine_schedule_follows_the_cosine():
    """Where no variance is clipped, alpha_bar is the published formula itself."""
    t = np.arange(1, 1000)
    signal = np.cos((np.append(0, t) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    alpha_bar = schedules.alpha_bars(schedules.betas("cosine", 1000))
    np.testing.assert_allclose(alpha_bar[:-1], signal[1:] / signal[0], rtol=1e-9)


@pytest.mark.parametrize(("schedule", "beta_start", "beta_end", "theirs"), SCHEDULES)
def test_corruption_and_velocity_equal_diffusers(schedule, beta_start, beta_end, theirs):
    reference = diffusers.DDPMScheduler(
        beta_schedule=theirs, beta_start=beta_start, beta_end=beta_end
    )
    process = GaussianProcess(
        schedule=schedule, beta_start=beta_start, beta_end=beta_end, prediction="v"
    )
    x_0, t = points(0), jnp.array([0, 10, 500, 999])
    x_t, noise = process.corrupt(jax.random.split(jax.random.key(1), 4), x_0, t)
    arguments = torched(x_0), torched(noise), torched(t)
    # At time 0 their float32 difference 1 - 0.9999 is exact to 6e-4, its root 0.01 to 3e-6.
    np.testing.assert_allclose(x_t, reference.add_noise(*arguments), atol=6e-6)
    np.testing.assert_allclose(
        process.target(x_0, noise, t), reference.get_velocity(*arguments), atol=6e-6
    )


def test_draws_depend_on_the_key_of_the_example_only():
    """The time and noise of an example depend on its key only, and cover their ranges."""
    process = GaussianProcess(num_steps=10)
    rngs = jax.random.split(jax.random.key(0), 500)
    t = process.sample_time(rngs).t
    assert set(np.asarray(t)) == set(range(10))
    x_0 = jnp.zeros((500, 7, 3))
    noise = process.corrupt(rngs, x_0, t).noise
    assert abs(noise.mean()) < 0.04 and abs(noise.std() - 1) < 0.03
    np.testing.assert_array_equal(process.sample_time(rngs[3:5]).t, t[3:5])
    np.testing.assert_array_equal(process.corrupt(rngs[3:5], x_0[3:5], t[3:5]).noise, noise[3:5])


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 2, 2, 3), (5, 2, 2, 2, 1)])
def test_the_right_answer_inverts_corruption(prediction, shape):
    process = GaussianProcess(prediction=prediction)
    assert isinstance(process, Process)
    x_0, t = points(0, shape), jnp.array([0, 1, 300, 700, 999])
    x_t, noise = process.corrupt(jax.random.split(jax.random.key(1), 5), x_0, t)
    answer = process.target(x_0, noise, t)
    estimate, epsilon = process.to_x0_and_epsilon(answer, x_t, t)
    # Rounding errors of x_t (6e-8) come back divided by sqrt(alpha_bar) or sqrt(1 - alpha_bar).
    np.testing.assert_allclose(estimate, x_0, atol=5e-5)
    np.testing.assert_allclose(epsilon, noise, atol=5e-5)
    np.testing.assert_array_equal(process.predict_x0(answer, x_t, t), estimate)
    np.testing.assert_allclose(process.loss(answer, x_0, x_t, noise, t), 0, atol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_conversions_stay_finite_at_both_ends(schedule, prediction):
    process = GaussianProcess(schedule=schedule, prediction=prediction, weighting="min_snr")
    t = jnp.array([0, 999])
    x_t, output = points(0, (2, 3)), points(1, (2, 3), np.float16)
    x_0, epsilon = process.to_x0_and_epsilon(output, x_t, t)
    assert x_0.dtype == epsilon.dtype == jnp.float32
    assert np.isfinite(x_0).all() and np.isfinite(epsilon).all()
    # Eq. (1) holds for the two estimates, up to float32 rounding.
    scale = 1 + np.abs(np.sqrt(process.alpha_bar(t)))[:, None] * np.abs(x_0)
    assert np.all(np.abs(process.add_noise(x_0, epsilon, t) - x_t) < 1e-5 * scale)
    assert np.isfinite(process.loss(output, x_0, x_t, epsilon, t)).all()


@pytest.mark.parametrize("loss_norm", ["l1", "l2"])
def test_min_snr_loss_is_the_same_for_every_prediction(loss_norm):
    """The same estimate of x_0 has the same loss in all three parametrisations."""
    t = jnp.array([0, 100, 400, 999])
    x_0, estimate = points(0), points(1)
    x_t, noise = GaussianProcess().corrupt(jax.random.split(jax.random.key(2), 4), x_0, t)
    losses = {}
    for prediction in ("epsilon", "x0", "v"):
        process = GaussianProcess(
            prediction=prediction, weighting="min_snr", snr_min=0.5, loss_norm=loss_norm
        )
        output = process.target(estimate, process.to_epsilon(estimate, x_t, t), t)
        losses[prediction] = process.loss(output, x_0, x_t, noise, t)

    snr = schedules.snr(process.alpha_bars[np.asarray(t)])
    error = np.abs(np.asarray(estimate) - np.asarray(x_0)) ** {"l1": 1, "l2": 2}[loss_norm]
    expected = np.clip(snr, 0.5, 5.0) * error.mean((1, 2))
    for loss in losses.values():
        assert loss.dtype == jnp.float32
        np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_min_snr_weights_are_those_of_the_paper():
    """Hang et al. 2023, section 3.4: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v."""
    for prediction, divisor in (("epsilon", lambda s: s), ("v", lambda s: s + 1)):
        process = GaussianProcess(prediction=prediction, weighting="min_snr")
        snr = process.alpha_bars / (1 - process.alpha_bars)
        np.testing.assert_allclose(process.loss_weights, np.minimum(snr, 5) / divisor(snr))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "sine"}, "schedule is 'sine'; choose one of linear, scaled_linear, cosine"),
        ({"prediction": "score"}, "prediction is 'score'; choose one of epsilon, x0, v"),
        ({"loss_norm": "huber"}, "loss_norm is 'huber'; choose one of l1, l2"),
        ({"weighting": "p2"}, "weighting is 'p2'; choose one of constant, min_snr"),
        ({"num_steps": 0}, "num_steps is 0; it must be at least 1"),
        ({"beta_start": 0.0}, "beta_start is 0.0 .* 0 < beta_start <= beta_end < 1"),
        ({"snr_min": 6.0}, "snr_min is 6.0 and snr_max 5.0"),
        ({"beta_end": 0.9}, "no signal is left"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        GaussianProcess(**fields)
