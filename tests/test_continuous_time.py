"""Tests of flow matching and EDM: closed forms, diffusers' schedulers, and the whole model."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from scipy import stats

from conprediff_jax.common.errors import FieldError, UserError
from conprediff_jax.common.keys import derived
from conprediff_jax.config import section
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.diffusion import DDIM, DDPM, DPMSolverPP2M, EDMProcess, FlowProcess
from conprediff_jax.diffusion.guidance import Guidance
from conprediff_jax.diffusion.samplers import SDE, Euler, Heun, RePaint, step_noise
from conprediff_jax.diffusion.samplers.sde import DIFFUSIONS
from conprediff_jax.metrics import denoising_loss
from conprediff_jax.models.denoiser import DENOISERS, Denoised
from conprediff_jax.sampling import inpainting
from conprediff_jax.sampling.spec import EDMSampling, FlowSampling

MEAN, STD = 0.5, 0.3
SHAPE = (2, 4, 3)  # batch, grid, channels
FLOWS = {
    "linear": FlowProcess(),
    "shifted": FlowProcess(shift=2.0),
    "cosine": FlowProcess(path="cosine"),
}
EDM = EDMProcess()


# --- closed forms ---------------------------------------------------------------------------------


def gaussian_chain(sampler, mean=MEAN, std=STD):
    """The map of a sampler's table where the data are N(mean, std^2), in float64.

    The best estimates are then affine in x_t, so the end is slope * x_T + constant + noise.

    Returns:
        The slope, the constant and the variance of the noise.
    """
    process, table = sampler.process, sampler.coefficients()
    affine, covariance = np.array([sampler.start_scale, 0.0]), np.zeros((3, 3))
    before = np.zeros((2, 2))  # the estimates of the previous call, affine in x_T
    signals, noises = process.signal(sampler.call_times), process.noise(sampler.call_times)
    for index, (signal, noise) in enumerate(zip(signals, noises, strict=True)):
        variance = (signal * std) ** 2 + noise**2
        slopes = np.array([signal * std**2, noise]) / variance  # of x_0 and epsilon in x_t
        estimates = np.outer(slopes, affine - np.array([0, signal * mean]))
        estimates[0, 1] += mean
        x_t, x_0, epsilon, old_x_0, old_epsilon, z = (
            0.0 if column is None else column[index] for column in table
        )
        step = np.zeros((3, 3))
        step[0] = x_t + np.dot([x_0, epsilon], slopes), old_x_0, old_epsilon
        step[1:, 0] = slopes
        covariance = step @ covariance @ step.T
        covariance[0, 0] += z**2
        affine = x_t * affine + np.array([x_0, epsilon]) @ estimates
        affine, before = affine + np.array([old_x_0, old_epsilon]) @ before, estimates
    return *affine, covariance[0, 0]


@pytest.mark.parametrize("name", FLOWS)
def test_flow_samplers_map_noise_to_gaussian_data_at_their_order(name):
    """The exact flow maps x_T to mean + std * x_T."""
    errors = {}
    for cls in (Euler, Heun, DPMSolverPP2M):
        for steps in (128, 256, 512):
            options = {"process": FLOWS[name], "steps": steps, "spacing": "trailing"}
            slope, constant, variance = gaussian_chain(cls(**options))
            assert variance == 0 and abs(constant - MEAN) < 0.003
            errors[cls, steps] = abs(slope - STD)
    assert errors[Euler, 512] < 0.005 and errors[Heun, 512] < 1e-4
    for steps in (128, 256):
        assert errors[Euler, steps] / errors[Euler, 2 * steps] == pytest.approx(2, rel=0.1)
        assert errors[Heun, steps] / errors[Heun, 2 * steps] == pytest.approx(4, rel=0.1)
    assert errors[DPMSolverPP2M, 512] < 0.2 * errors[Euler, 512]


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_every_diffusion_of_the_sde_keeps_the_marginals(name, diffusion):
    sampler = SDE(process=FLOWS[name], steps=4000, diffusion=diffusion, last_step=1e-3)
    slope, constant, variance = gaussian_chain(sampler)
    assert constant == pytest.approx(MEAN, abs=1e-3)
    assert slope**2 + variance == pytest.approx(STD**2, rel=0.03)


def test_the_last_step_of_the_sde_is_its_mean():
    """Without noise at the end, constant diffusion shrinks a deviation of .3 to .16."""
    slope, _, variance = gaussian_chain(
        SDE(process=FLOWS["linear"], steps=250, diffusion="constant")
    )
    assert np.sqrt(slope**2 + variance) == pytest.approx(0.16, abs=0.003)


@pytest.mark.parametrize("process", [FLOWS["shifted"], EDMProcess(sigma_data=STD)])
def test_ancestral_samplers_work_in_continuous_time(process):
    noise = float(process.time_at(1.0))
    repaint = functools.partial(RePaint, resamplings=2)
    for cls in (DDPM, repaint):
        slope, constant, variance = gaussian_chain(
            cls(process=process, steps=2000, spacing="trailing")
        )
        assert constant == pytest.approx(MEAN, abs=2e-3)
        assert np.sqrt((slope * noise) ** 2 + variance) == pytest.approx(STD, abs=0.005)


def test_ddim_is_eulers_method_on_straight_lines():
    for process in (FLOWS["linear"], FLOWS["shifted"], EDM):
        options = {"process": process, "steps": 20, "spacing": "linspace"}
        maps = [gaussian_chain(cls(**options)) for cls in (Euler, DDIM)]
        np.testing.assert_allclose(*maps, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps, error", [(18, 0.0553), (36, 0.0122), (72, 0.0029)])
def test_edm_from_the_highest_level_to_the_data(steps, error):
    """F = 0 is the best network for N(0, 1/4); the exact flow scales x by s / sqrt(t^2 + s^2)."""
    slope, _, _ = gaussian_chain(Heun(process=EDM, steps=steps, spacing="linspace"), 0.0, 0.5)
    assert slope * np.sqrt(80**2 + 0.25) / 0.5 - 1 == pytest.approx(error, abs=1e-4)


def test_churn_keeps_the_distribution():
    sampler = Heun(process=EDM, steps=400, spacing="linspace", churn=40.0, churn_min=0.05)
    slope, _, variance = gaussian_chain(sampler, 0.0, 0.5)
    assert sampler.start_scale > 1.0
    assert np.sqrt((80 * slope) ** 2 + variance) == pytest.approx(0.5, rel=2e-3)


def test_the_network_of_edm_reads_and_gives_numbers_of_variance_1():
    t = jnp.asarray([0.002, 0.3, 5.0, 80.0])
    x_0 = 0.5 * jax.random.normal(jax.random.key(0), (4, 4000, 1))
    rngs = jax.random.split(jax.random.key(1), 4)
    x_t, noise = EDM.corrupt(rngs, x_0, t)
    zero = jnp.zeros_like(x_t)
    np.testing.assert_allclose(EDM.network_input(x_t, t).var((1, 2)), 1, rtol=0.1)
    # F = 0 is the best network for these data, and its expected weighted loss is 1.
    np.testing.assert_allclose(EDM.loss(zero, x_0, x_t, noise, t), 1, rtol=0.1)
    # D = c_skip x + c_out F, as the paper writes it, and its weight.
    output = jax.random.normal(jax.random.key(2), x_t.shape)
    s, d = np.asarray(t, np.float64)[:, None, None], 0.5
    denoised = d**2 / (s**2 + d**2) * x_t + s * d / np.sqrt(s**2 + d**2) * output
    np.testing.assert_allclose(EDM.predict_x0(output, x_t, t), denoised, rtol=1e-4, atol=1e-5)
    weight = (s**2 + d**2) / (s * d) ** 2
    expected = (weight * (denoised - x_0) ** 2).mean((1, 2))
    np.testing.assert_allclose(EDM.loss(output, x_0, x_t, noise, t), expected, rtol=1e-3)


@pytest.mark.parametrize("process", [*FLOWS.values(), FlowProcess(prediction="x0"), EDM])
def test_a_prediction_determines_data_and_noise(process):
    t = jnp.asarray(process.evaluated_times(4))
    x_0, noise = jax.random.normal(jax.random.key(0), (2, 4, 5, 1))
    x_t = process.add_noise(x_0, noise, t)
    found = process.to_x0_and_epsilon(process.target(x_0, noise, t), x_t, t)
    np.testing.assert_allclose(found[0], x_0, atol=1e-4)
    np.testing.assert_allclose(found[1], noise, atol=1e-4)
    np.testing.assert_allclose(process.time_at(np.asarray(process.share(t))), t, rtol=1e-4)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_velocity_is_the_derivative_of_the_path(path):
    process, t = FlowProcess(path=path), jnp.asarray([0.1, 0.5, 0.9])
    for scale, change in zip(
        (process.signal, process.noise), process.velocity_scales(t), strict=True
    ):
        np.testing.assert_allclose(jax.vmap(jax.grad(scale))(t), change, rtol=1e-4)


def test_the_loss_is_the_error_of_the_velocity_whatever_is_predicted():
    for path in ("linear", "cosine"):
        velocity, clean = FlowProcess(path=path), FlowProcess(path=path, prediction="x0")
        t = jnp.asarray([0.06, 0.3, 0.8])
        x_0, noise, output = jax.random.normal(jax.random.key(0), (3, 3, 5, 1))
        x_t = velocity.add_noise(x_0, noise, t)
        _, epsilon = clean.to_x0_and_epsilon(output, x_t, t)
        as_velocity = velocity.target(output, epsilon, t)
        expected = velocity.loss(as_velocity, x_0, x_t, noise, t)
        np.testing.assert_allclose(clean.loss(output, x_0, x_t, noise, t), expected, rtol=1e-4)


# --- training times -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "process, distribution",
    [
        (FlowProcess(times="logit_normal", logit_mean=1.0), stats.norm(1.0, 1.0)),
        (EDM, stats.norm(-1.2, 1.2)),
    ],
)
def test_times_have_their_distribution_and_a_positive_mean_favours_noise(process, distribution):
    t, weight = process.sample_time(jax.random.split(jax.random.key(0), 4000))
    assert t.dtype == jnp.float32 and (weight == 1).all()
    assert (process is EDM) or t.mean() > 0.6
    logarithm = np.log(t) - (0 if process is EDM else np.log1p(-t))
    assert stats.kstest(logarithm, distribution.cdf).pvalue > 0.001
    np.testing.assert_allclose(process.cumulative(t), distribution.cdf(logarithm), atol=1e-5)


def test_shift_moves_times_towards_the_noise_as_diffusers_does():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 28, 28))
    sampler = Euler(process=FlowProcess(shift=3.0), steps=28)
    np.testing.assert_allclose(sampler.times, scheduler.sigmas[:-1], rtol=1e-6)


def test_importance_draws_costly_times_more_often_without_changing_the_mean():
    """The loss is that of t drawn from the process's own distribution."""
    process = FlowProcess(importance=True, shift=2.0)
    u = (jnp.arange(1000) + 0.5) / 1000

    @jax.jit
    def draw(rngs):
        history = process.remember(process.init_history(), process.quantile(u), 0.1 + u**2)
        return history.counts, process.sample_time(rngs, history)

    counts, (t, weight) = draw(jax.random.split(jax.random.key(0), 20_000))
    assert (counts == 10).all()
    at = process.cumulative(t)
    assert at.mean() > 0.6
    assert jnp.mean(weight * at**2) == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize("process", [FLOWS["shifted"], EDM])
def test_guidance_in_an_interval_of_shares_includes_both_ends_of_time(process):
    t = jnp.asarray(process.time_at(np.array([0.0, 0.3, 0.6, 1.0])), jnp.float32)
    for interval, inside in {
        (0.0, 0.5): [True, True, False, False],
        (0.5, 1.0): [False, False, True, True],
        (0.2, 0.5): [False, True, False, False],
    }.items():
        found = Guidance(scale=3.0, interval=interval).at(t, process.time_at)
        assert found.tolist() == inside
    assert Guidance(scale=3.0).at(t, process.time_at) is None


# --- other implementations ------------------------------------------------------------------------


def network(x, t):
    """A bounded, smooth, nonlinear stand-in for a network."""
    mix = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32))
    return jnp.tanh(x @ mix * 0.5 + jnp.sin(3 * t.reshape(-1, 1, 1)))


def sample(sampler, x_T, rngs):
    process = sampler.process

    def denoise(x_t, t):
        return network(process.network_input(x_t, t), process.network_time(t))

    return jax.jit(lambda x, keys: sampler.sample(denoise, x, keys))(x_T, rngs)


def run_diffusers(scheduler, x_T, scale=1.0, **arguments):
    x, evaluate = torch.from_numpy(np.array(x_T)), jax.jit(network)
    for time in scheduler.timesteps:
        given = scheduler.scale_model_input(x, time) if scale is None else x
        t = np.full(len(x), float(time) * (1.0 if scale is None else scale), np.float32)
        output = torch.from_numpy(np.array(evaluate(jnp.asarray(given.numpy()), t)))
        x = scheduler.step(output, time, x, **arguments).prev_sample
    return x.numpy()


@pytest.mark.parametrize("cls, scheduler, spacing", [
    (Euler, FlowMatchEulerDiscreteScheduler, "linspace"),
    (Heun, FlowMatchHeunDiscreteScheduler, "linspace"),
    (Euler, EDMEulerScheduler, "linspace"),
    (DPMSolverPP2M, DPMSolverMultistepScheduler, "trailing"),
])  # fmt: skip
def test_samplers_equal_those_of_diffusers(cls, scheduler, spacing):
    flow = scheduler is not EDMEulerScheduler
    process = FlowProcess(time_scale=1.0) if flow else EDM
    sampler = cls(process=process, steps=9, spacing=spacing)
    options = {}
    if scheduler is DPMSolverMultistepScheduler:
        options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    other = scheduler(**options)
    other.set_timesteps(9)
    x_T = process.prior(jax.random.split(jax.random.key(0), 2), SHAPE[1:])
    if scheduler is DPMSolverMultistepScheduler:
        # It visits 1 - 1/T where we visit 1, and rounds its timesteps.
        other.sigmas[:-1] = torch.from_numpy(sampler.times.astype(np.float32))
        other.timesteps = 1000 * other.sigmas[:-1]
    keys = jax.random.split(jax.random.key(1), 2)
    expected = run_diffusers(other, x_T, 1 / 1000 if flow else None)
    np.testing.assert_allclose(sample(sampler, x_T, keys), expected, rtol=1e-5, atol=1e-5)


def test_stochastic_heun_equals_algorithm_2_of_the_paper():
    options = {"churn": 4.0, "churn_min": 0.05, "churn_max": 50.0, "churn_noise": 1.003}
    sampler = Heun(process=EDM, steps=6, spacing="linspace", **options)
    keys = jax.random.split(jax.random.key(1), 2)
    x_T = EDM.prior(jax.random.split(jax.random.key(0), 2), SHAPE[1:])

    def denoise(x, sigma):
        d = 0.5
        c_in, c_skip = 1 / np.sqrt(sigma**2 + d**2), d**2 / (sigma**2 + d**2)
        c_out = sigma * d * c_in
        level = np.full(len(x), np.log(sigma) / 4, np.float32)
        return c_skip * x + c_out * np.asarray(network(jnp.asarray(c_in * x, jnp.float32), level))

    sigmas = [
        *((80 ** (1 / 7) + i / 5 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(6)),
        0,
    ]
    x = np.asarray(x_T, np.float64)
    for i in range(6):
        gamma = min(4.0 / 6, np.sqrt(2) - 1) if 0.05 <= sigmas[i] <= 50.0 else 0.0
        hat = sigmas[i] + gamma * sigmas[i]
        if gamma:
            z = np.asarray(step_noise(keys, 2 * i - 1, SHAPE[1:]), np.float64)
            x = x + np.sqrt(hat**2 - sigmas[i] ** 2) * 1.003 * z
        slope = (x - denoise(x, hat)) / hat
        end = x + (sigmas[i + 1] - hat) * slope
        if sigmas[i + 1]:
            other = (end - denoise(end, sigmas[i + 1])) / sigmas[i + 1]
            end = x + (sigmas[i + 1] - hat) * (slope + other) / 2
        x = end
    np.testing.assert_allclose(sample(sampler, x_T, keys), x, rtol=1e-4, atol=1e-4)


# --- the whole model ------------------------------------------------------------------------------


@DENOISERS.register("test_two_layers")
class TwoLayers(nn.Module):
    """A denoiser of two layers at every point."""

    out_channels: int = derived()

    discrete, downsampling, num_classes, learned_null = False, 1, None, False

    @nn.compact
    def __call__(self, x, t, *, label=None, text=None, unconditional=None, train=False):
        h = nn.silu(nn.Dense(8)(x) + t[:, None, None, None])
        return Denoised(nn.Dense(self.out_channels)(h), h)


@pytest.mark.parametrize(
    "process, sampling, filling",
    [
        (
            section(FlowProcess, kind="flow", importance=True, time_scale=1.0),
            section(FlowSampling, steps=3),
            {"resamplings": 2, "jump_length": 1, "steps": 3},
        ),
        (
            section(EDMProcess, kind="edm"),
            section(EDMSampling, steps=3, churn=1.0),
            {"sampler": "heun"},
        ),
    ],
)
def test_a_model_in_continuous_time_trains_is_measured_and_fills_holes(process, sampling, filling):
    config = tiny.get_config().unlock()
    config.model = section(TwoLayers, kind="test_two_layers")
    config.process, config.sampling = process, sampling
    config.context.update(strides=(1,), samples=2, iterations=2)
    mesh, rng = tiny.mesh_of(), np.random.default_rng(0)
    experiment = make_experiment(config)
    batch = {"image": rng.integers(0, 256, (8, 8, 8, 3), np.uint8)}
    state, trace = tiny.run_steps(experiment, mesh, batch, steps=2)
    assert all(np.isfinite(row["loss/context"]) and np.isfinite(row["loss"]) for row in trace)
    model, params, frozen = experiment.task.model, state.params["denoiser"], {}
    if process.get("importance"):
        assert state.task_state["history"].counts.sum() == 16

    times = model.process.evaluated_times(3)
    losses = denoising_loss.make_losses(model, mesh, times)(params, frozen, batch, 0)
    assert losses.shape == (8, 3) and np.isfinite(losses).all()

    masks = np.ones((2, 8, 8), bool)
    masks[:, :4] = False
    fill = inpainting.make_fill(model, inpainting.sampling_for(model, **filling), mesh)
    arguments = (np.uint32(0), np.arange(2), np.zeros(2, int), batch["image"][:2], masks)
    filled = np.asarray(fill(params, frozen, *arguments))
    np.testing.assert_array_equal(filled[:, 4:], batch["image"][:2, 4:])
    assert (filled[0, :4] != filled[1, :4]).any()


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FlowProcess(path="curved"), "path is 'curved'"),
        (lambda: FlowProcess(shift=0.0), "shift is 0.0; it must be positive"),
        (lambda: EDMProcess(sigma_min=90.0), "sigma_min is 90.0 and sigma_max 80.0"),
        (lambda: Euler(process=EDM, steps=0), "steps is 0; it must be at least 1"),
        (lambda: DDIM(process=EDM, steps=5), "spacing is 'leading'; choose one of trailing"),
        (lambda: Heun(process=FlowProcess(), steps=5, churn=1.0), "churn is 1.0: this process"),
        (lambda: SDE(process=FlowProcess(), steps=5, last_step=1.0), "last_step is 1.0; it must"),
        (lambda: EDMSampling(sampler="sde"), "sampler is 'sde', which does not fit the process"),
        (lambda: FlowSampling(eta=1.0), "eta is 1.0: only 'ddim' reads it, and the sampler is"),
        (
            lambda: DDIM(process=FlowProcess(), steps=5, spacing="trailing", time_limit=3),
            "time_limit is 3: a process in continuous time has no such limit",
        ),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises((FieldError, UserError), match=message.replace("(", r"\(")):
        make()


def test_another_sampler_drops_the_fields_that_it_does_not_read():
    spec = EDMSampling(churn=30.0).with_settings(sampler="ddim", eta=0.5)
    assert (spec.churn, spec.eta) == (0.0, 0.5)
    with pytest.raises(FieldError, match=r"churn is 1\.0: only 'heun' reads it"):
        spec.with_settings(churn=1.0)
