"""Tests of the samplers against diffusers' schedulers, and on data with a known best denoiser."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm

from conprediff_jax.diffusion import DDIM, DDPM, DPMSolverPP2M, GaussianProcess
from conprediff_jax.diffusion.samplers import GENERAL_SAMPLERS, RePaint, step_noise
from conprediff_jax.diffusion.samplers.base import spaced_times

SHAPE = (2, 4, 3)  # batch, grid, channels
SCHEDULES = {  # ours: (diffusers' name, first and last variance)
    "linear": ("linear", 1e-4, 0.02),
    "scaled_linear": ("scaled_linear", 0.0015, 0.0195),
    "cosine": ("squaredcos_cap_v2", 1e-4, 0.02),
}
PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
SPACINGS = ("leading", "trailing", "linspace")
# Every prediction with every schedule; the spacings take turns, so that epsilon meets cosine at
# 'leading': at its last time, 999, the rounding of an epsilon comes back in x_0 times 2e4, in
# diffusers and here.
COMBINATIONS = [
    (prediction, schedule, SPACINGS[(i + j + 1) % 3])
    for i, prediction in enumerate(PREDICTIONS)
    for j, schedule in enumerate(SCHEDULES)
]


def make_process(schedule, prediction, num_steps=1000):
    _, beta_start, beta_end = SCHEDULES[schedule]
    return GaussianProcess(
        schedule=schedule,
        num_steps=num_steps,
        beta_start=beta_start,
        beta_end=beta_end,
        prediction=prediction,
    )


def make_scheduler(cls, sampler, **extra):
    """The scheduler of diffusers that corresponds to `sampler`."""
    process = sampler.process
    scheduler = cls(
        num_train_timesteps=process.num_steps,
        beta_schedule=SCHEDULES[process.schedule][0],
        beta_start=process.beta_start,
        beta_end=process.beta_end,
        prediction_type=PREDICTIONS[process.prediction],
        timestep_spacing=sampler.spacing,
        steps_offset=sampler.steps_offset,
        **extra,
    )
    scheduler.set_timesteps(sampler.steps)
    return scheduler


def answer(process, x_t, t, v):
    """The output of a network that predicts `v`, converted to what the process expects."""
    signal = jnp.asarray(np.sqrt(process.alpha_bars), jnp.float32)[t].reshape(-1, 1, 1)
    sigma = jnp.asarray(np.sqrt(1 - process.alpha_bars), jnp.float32)[t].reshape(-1, 1, 1)
    return {"epsilon": signal * v + sigma * x_t, "x0": signal * x_t - sigma * v, "v": v}[
        process.prediction
    ]


def smooth_denoiser(process):
    """A stand-in for a network: a bounded, smooth, nonlinear function that mixes the channels."""
    mix = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32))

    def denoise(x_t, t):
        time = t.reshape(-1, 1, 1) / process.num_steps
        return answer(process, x_t, t, jnp.tanh(x_t @ mix * 0.5 + jnp.sin(3 * time)))

    return denoise


def start(shape=SHAPE, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2 * shape[0]).reshape(2, -1)
    x_T = jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(keys[0])
    return x_T, keys[1]


def run(sampler, denoise, x_T, rngs):
    return jax.jit(lambda x, keys: sampler.sample(denoise, x, keys))(x_T, rngs)


def run_diffusers(scheduler, sampler, denoise, x_T, rngs, monkeypatch, **step_arguments):
    """The reverse loop of diffusers' pipelines, with the sampler's own noise."""
    denoise, draw = jax.jit(denoise), jax.jit(step_noise, static_argnums=2)
    x = torch.from_numpy(np.array(x_T))
    np.testing.assert_array_equal(scheduler.timesteps, sampler.times)
    for index, time in enumerate(scheduler.timesteps):
        t = jnp.full(x_T.shape[:1], int(time))
        output = torch.from_numpy(np.array(denoise(jnp.asarray(x.numpy()), t)))
        z = torch.from_numpy(np.array(draw(rngs, index, x_T.shape[1:])))
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, z=z, **__: z)
        if "eta" in step_arguments:
            step_arguments["variance_noise"] = z
        x = scheduler.step(output, time, x, **step_arguments).prev_sample
    return x.numpy()


def assert_equal_to_diffusers(
    cls, sampler, monkeypatch, *, extra=None, atol=1e-5, **step_arguments
):
    scheduler = make_scheduler(cls, sampler, **(extra or {}))
    denoise = smooth_denoiser(sampler.process)
    x_T, rngs = start()
    expected = run_diffusers(scheduler, sampler, denoise, x_T, rngs, monkeypatch, **step_arguments)
    result = run(sampler, denoise, x_T, rngs)
    np.testing.assert_allclose(result, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("prediction", "schedule", "spacing"), COMBINATIONS)
def test_ddpm_equals_diffusers(prediction, schedule, spacing, monkeypatch):
    process = make_process(schedule, prediction)
    sampler = DDPM(process=process, steps=7, spacing=spacing)  # 7 does not divide 1000
    assert_equal_to_diffusers(
        diffusers.DDPMScheduler, sampler, monkeypatch, extra={"clip_sample": False}
    )


def test_ddpm_with_large_variance_and_clipping_equals_diffusers(monkeypatch):
    process = make_process("linear", "epsilon", num_steps=20)
    sampler = DDPM(process=process, steps=20, variance="fixed_large", clip=0.5)
    extra = {"variance_type": "fixed_large", "clip_sample": True, "clip_sample_range": 0.5}
    assert_equal_to_diffusers(diffusers.DDPMScheduler, sampler, monkeypatch, extra=extra)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("prediction", "schedule", "spacing"), COMBINATIONS)
def test_ddim_equals_diffusers(prediction, schedule, spacing, eta, monkeypatch):
    """Their steps have the length T // steps, so most of them do not end at the next time."""
    process = make_process(schedule, prediction)
    sampler = DDIM(process=process, steps=7, spacing=spacing, eta=eta, step_end="stride")
    options = {"extra": {"clip_sample": False}, "eta": eta}
    # diffusers computes 1 - alpha_bar in float32, with three digits for a step that ends at time 0.
    assert_equal_to_diffusers(diffusers.DDIMScheduler, sampler, monkeypatch, atol=1e-4, **options)


def test_steps_of_ddim_end_at_the_next_time_unless_they_keep_their_stride():
    make = functools.partial(DDIM, process=make_process("linear", "epsilon"))
    for fields in ({"steps": 7}, {"steps": 8, "spacing": "trailing"}):
        np.testing.assert_array_equal(make(**fields).ends, make(**fields, step_end="stride").ends)
    seven = make(steps=7, spacing="linspace")
    assert seven.times.tolist() == [999, 832, 666, 500, 333, 166, 0]
    assert seven.ends.tolist() == [832, 666, 500, 333, 166, 0, -1]
    assert make(steps=7, spacing="linspace", step_end="stride").ends.tolist()[:2] == [857, 690]


@pytest.mark.parametrize("follows", [True, False])
def test_ddim_with_clipping_equals_diffusers(follows, monkeypatch):
    sampler = DDIM(
        process=make_process("linear", "epsilon"),
        steps=5,
        eta=0.5,
        clip=0.5,
        clipped_epsilon=follows,
    )
    extra = {"clip_sample": True, "clip_sample_range": 0.5}
    assert_equal_to_diffusers(
        diffusers.DDIMScheduler,
        sampler,
        monkeypatch,
        extra=extra,
        eta=0.5,
        use_clipped_model_output=follows,
    )


def test_ddim_of_latent_diffusion(monkeypatch):
    """The original steps: range(0, T, c) + 1, ending at alpha_bar_0."""
    process = make_process("scaled_linear", "epsilon")
    sampler = DDIM(process=process, steps=10, steps_offset=1, final_alpha_bar="first", eta=1.0)
    assert sampler.times[::-1].tolist() == [time + 1 for time in range(0, 1000, 100)]
    assert sampler.alpha_bar_steps()[1][-1] == process.alpha_bars[0]
    extra = {"clip_sample": False, "set_alpha_to_one": False}
    assert_equal_to_diffusers(diffusers.DDIMScheduler, sampler, monkeypatch, extra=extra, eta=1.0)


@pytest.mark.parametrize(("prediction", "schedule", "spacing"), COMBINATIONS)
def test_dpm_solver_equals_diffusers(prediction, schedule, spacing, monkeypatch):
    steps = 20 if prediction == "v" else 7  # diffusers treats fewer than 15 steps apart
    sampler = DPMSolverPP2M(
        process=make_process(schedule, prediction), steps=steps, spacing=spacing
    )
    assert_equal_to_diffusers(diffusers.DPMSolverMultistepScheduler, sampler, monkeypatch)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_time_limit_equals_the_smallest_lambda_of_diffusers(spacing, monkeypatch):
    """With the cosine schedule, 'linspace' begins at 994 and not at 999."""
    process = make_process("cosine", "v")
    lambdas = 0.5 * np.log(process.alpha_bars / (1 - process.alpha_bars))
    limit = int(np.sum(lambdas >= -5.1))
    assert 990 < limit < 1000
    sampler = DPMSolverPP2M(process=process, steps=16, spacing=spacing, time_limit=limit)
    extra = {"lambda_min_clipped": -5.1}
    cls = diffusers.DPMSolverMultistepScheduler
    assert_equal_to_diffusers(cls, sampler, monkeypatch, extra=extra)


def test_times_equal_those_of_diffusers():
    """For all numbers of steps. Ties of 'trailing' are rounded as the sums of `arange`."""
    process = make_process("linear", "epsilon", num_steps=200)
    for spacing in SPACINGS:
        for steps in range(1, 201):
            scheduler = diffusers.DDPMScheduler(200, timestep_spacing=spacing)
            scheduler.set_timesteps(steps)
            times = spaced_times(process.num_steps, steps, spacing)
            assert len(times) == steps
            np.testing.assert_array_equal(times, scheduler.timesteps[:steps], err_msg=str(steps))


@pytest.mark.parametrize("make", [DDIM, DDPM, RePaint, DPMSolverPP2M])
@pytest.mark.parametrize("num_steps", [20, 1000])
def test_times_that_are_too_few_or_begin_too_late_are_refused(make, num_steps):
    process = make_process("cosine", "v", num_steps)
    options = {"jump_length": 1, "resamplings": 1} if make is RePaint else {}
    for spacing in SPACINGS:
        for steps in range(1, num_steps + 1, max(1, num_steps // 100)):
            try:
                sampler = make(process=process, steps=steps, spacing=spacing, **options)
            except ValueError as error:
                assert "steps" in str(error) and spacing != "trailing"
                continue
            assert len(sampler.times) == steps
            assert sampler.times[0] >= 0.6 * num_steps


def test_the_last_step_of_ddpm_adds_no_noise():
    process = make_process("linear", "epsilon")
    for spacing in SPACINGS:
        table = DDPM(process=process, steps=10, spacing=spacing, variance="fixed_large")
        noise = table.coefficients().noise
        assert noise[-1] == 0 and np.all(noise[:-1] > 0)


MEAN, DEVIATION = np.array([0.7, -0.3, 0.0]), np.array([0.2, 0.5, 1.0])  # of the data, by channel


def gaussian_denoiser(process):
    """E[x_0 | x_t] for data N(MEAN, DEVIATION^2), converted to what the process expects."""

    def denoise(x_t, t):
        alpha_bar = process.alpha_bar(t).reshape(-1, 1, 1)
        gain = jnp.sqrt(alpha_bar) * DEVIATION**2 / (alpha_bar * DEVIATION**2 + 1 - alpha_bar)
        estimate = MEAN + gain * (x_t - jnp.sqrt(alpha_bar) * MEAN)
        return process.target(estimate, process.to_epsilon(estimate, x_t, t), t)

    return denoise


def deviation_error(sampler):
    """The error in the deviation of samples of Gaussian data, for a deterministic sampler."""
    x_T = jnp.stack([jnp.zeros((1, 3)), jnp.ones((1, 3))])
    low, high = run(sampler, gaussian_denoiser(sampler.process), x_T, start()[1])
    np.testing.assert_allclose(low[0], MEAN, atol=1e-4)
    return np.abs((high - low)[0] - DEVIATION).max()


def test_deterministic_samplers_converge_to_the_data_at_their_order():
    process = make_process("cosine", "v")
    ratio, least = {}, {}
    for cls in (DDIM, DPMSolverPP2M):
        coarse, fine = (
            deviation_error(cls(process=process, steps=steps, spacing="trailing"))
            for steps in (20, 80)
        )
        ratio[cls], least[cls] = coarse / fine, fine
    assert 3 < ratio[DDIM] < 5  # four times the steps, first order
    assert ratio[DPMSolverPP2M] > 16  # second order at least
    assert least[DDIM] < 0.02 and least[DPMSolverPP2M] < 0.001


@pytest.mark.parametrize(
    ("cls", "fields"), [(DDPM, {}), (DDPM, {"variance": "fixed_large"}), (DDIM, {"eta": 1.0})]
)
def test_stochastic_samplers_have_the_moments_of_the_data(cls, fields):
    process = make_process("cosine", "x0", num_steps=200)
    sampler = cls(process=process, steps=200, **fields)
    x_T, rngs = start((4, 2500, 3), seed=1)
    samples = np.asarray(run(sampler, gaussian_denoiser(process), x_T, rngs)).reshape(-1, 3)
    np.testing.assert_allclose(samples.mean(0), MEAN, atol=0.03)
    np.testing.assert_allclose(samples.std(0), DEVIATION, rtol=0.04)


@pytest.mark.parametrize("name", GENERAL_SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(name):
    process = make_process("linear", "epsilon")
    fields = {"eta": 1.0} if name == "ddim" else {}
    sampler = GENERAL_SAMPLERS[name](process=process, steps=4, **fields)
    denoise = smooth_denoiser(process)
    x_T, rngs = start((3, 4, 3))
    together = run(sampler, denoise, x_T, rngs)
    alone = run(sampler, denoise, x_T[1:2], rngs[1:2])
    np.testing.assert_allclose(together[1:2], alone, atol=1e-6)
    assert sampler.num_model_calls == 4
    if name != "dpm_solver":  # and it does depend on its own noise
        assert np.abs(run(sampler, denoise, x_T, rngs[::-1])[0] - together[0]).max() > 0.01


def test_the_network_is_traced_once():
    process = make_process("linear", "epsilon")
    traces = []

    def denoise(x_t, t):
        assert x_t.dtype == jnp.float32 and t.dtype == jnp.int32 and t.shape == (2,)
        traces.append(1)
        return 0.1 * x_t.astype(jnp.bfloat16)

    result = run(DDIM(process=process, steps=50), denoise, *start())
    assert len(traces) == 1 and result.dtype == jnp.float32


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (DDIM, {"spacing": "even"}, "spacing is 'even'; choose one of leading, trailing, linspace"),
        (DDIM, {"steps": 1001}, "steps is 1001; it must lie in 1 .. 1000"),
        (DDIM, {"steps": 1000, "steps_offset": 1}, "the times visited are 1000 .. 1"),
        (DPMSolverPP2M, {"steps": 1000}, "they must differ"),
        (DDIM, {"spacing": "trailing", "steps_offset": 1}, "steps_offset is 1 with spacing"),
        (DDIM, {"steps": 1}, "steps is 1 with spacing 'leading': .* time visited would be 0 of"),
        (DDPM, {"steps": 1, "spacing": "linspace"}, "time visited would be 0 of 0 .. 999"),
        (DDPM, {"steps": 501}, "time visited would be 500 of 0 .. 999"),
        (DPMSolverPP2M, {"time_limit": 300}, "time visited would be 270 of 0 .. 999"),
        (DDPM, {"time_limit": 1001}, "time_limit is 1001; it must lie in 1 .. 1000"),
        (DDPM, {"time_limit": 800, "spacing": "trailing"}, "visits only 8 times below it"),
        (DDIM, {"step_end": "last"}, "step_end is 'last'; choose one of next, stride"),
        (DDIM, {"clip": 0.0}, "clip is 0.0; it must be positive"),
        (DDIM, {"eta": 1.5}, r"eta is 1.5; it must lie in \[0, 1\]"),
        (DDIM, {"final_alpha_bar": "zero"}, "final_alpha_bar is 'zero'; choose one of one, first"),
        (DDPM, {"variance": "learned"}, "variance is 'learned'; choose one of fixed_small"),
    ],
)
def test_wrong_fields_are_named(cls, fields, message):
    with pytest.raises(ValueError, match=message):
        cls(**{"process": GaussianProcess(), "steps": 10} | fields)
