"""Tests of sampling around a known part, against diffusers and cases with a known answer."""

import itertools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from diffusers.schedulers import scheduling_repaint

from conprediff_jax.diffusion import DDIM, GaussianProcess
from conprediff_jax.diffusion.categorical import CategoricalProcess
from conprediff_jax.diffusion.samplers import (
    GENERAL_SAMPLERS,
    Known,
    RePaint,
    jump_schedule,
    step_noise,
)
from conprediff_jax.diffusion.samplers.categorical import CategoricalSampler

SHAPE = (2, 4, 3)  # batch, grid, channels


def run(sampler, denoise, x_T, rngs, known):
    return jax.jit(lambda *args: sampler.sample(denoise, *args))(x_T, rngs, known)


def start(shape=SHAPE, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2 * shape[0]).reshape(2, -1)
    return jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(keys[0]), keys[1]


def half_known(shape=SHAPE, seed=1):
    rng = np.random.default_rng(seed)
    x_0 = rng.normal(size=shape).astype(np.float32)
    return Known(jnp.asarray(x_0), jnp.asarray(rng.random(shape) < 0.5))


def torched(x):
    return torch.from_numpy(np.array(x))


# Against diffusers --------------------------------------------------------------------------------


def network_of(process):
    """A stand-in for a network: epsilon of a bounded, smooth v that depends on all points."""
    mix = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)

    def network(x_t, t):
        v = jnp.tanh(jnp.einsum("bgc,gh->bhc", x_t, mix) + jnp.sin(t / 300).reshape(-1, 1, 1))
        alpha_bar = process.alpha_bar(t).reshape(-1, 1, 1)
        return jnp.sqrt(alpha_bar) * v + jnp.sqrt(1 - alpha_bar) * x_t

    return network


def scheduler_for(sampler, *jumps):
    process = sampler.process
    scheduler = diffusers.RePaintScheduler(
        num_train_timesteps=process.num_steps,
        beta_start=process.beta_start,
        beta_end=process.beta_end,
        clip_sample=False,
    )
    scheduler.set_timesteps(sampler.steps, *jumps)
    return scheduler


def noised(scheduler, x_0, z, time):
    alpha_bar = scheduler.alphas_cumprod[time]
    return alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * z


def inject(monkeypatch, z):
    monkeypatch.setattr(scheduling_repaint, "randn_tensor", lambda *_, **__: z)


def test_a_walk_in_parts_ends_where_the_whole_one_does():
    process, known, (x_T, rngs) = GaussianProcess(num_steps=40), half_known(), start()
    for sampler in (
        RePaint(process=process, steps=8, jump_length=2, resamplings=2),
        DDIM(process=process, steps=8),
    ):
        walk = sampler.walk(network_of(process), x_T, rngs, known)
        part, carried, calls = jax.jit(walk.part), walk.start, sampler.num_model_calls
        for first, last in itertools.pairwise([0, 1, 3, 3, calls]):
            carried = part(carried, first, last)
        whole = run(sampler, network_of(process), x_T, rngs, known)
        # Another program, which may round otherwise.
        np.testing.assert_allclose(walk.finish(carried), whole, atol=1e-5)


def test_replacement_equals_diffusers(monkeypatch):
    """Diffusers inserts the known part after a step and we before the next, which is the same."""
    sampler = DDIM(process=GaussianProcess(), steps=10)
    scheduler = scheduler_for(sampler, 10, 1)
    scheduler.eta = 0.0
    network = network_of(sampler.process)
    (x_T, rngs), known = start(), half_known()
    x_0, mask = torched(known.x_0), torched(known.mask).float()
    z = [torched(step_noise(rngs, 10 + call, SHAPE[1:])) for call in range(10)]
    x = mask * noised(scheduler, x_0, z[0], scheduler.timesteps[0]) + (1 - mask) * torched(x_T)
    for call, time in enumerate(scheduler.timesteps):
        output = torched(network(jnp.asarray(x.numpy()), jnp.full(2, int(time))))
        inject(monkeypatch, z[(call + 1) % 10])  # at the clean end it has no weight
        x = scheduler.step(output, time, x, x_0, mask).prev_sample
    np.testing.assert_allclose(run(sampler, network, x_T, rngs, known), x, rtol=0, atol=1e-5)


def test_repaint_equals_diffusers(monkeypatch):
    """The jumps and steps of diffusers, with the known part inserted as in the original code."""
    process = GaussianProcess(num_steps=20)  # undone steps of skipped times are not exact there
    sampler = RePaint(process=process, steps=20, jump_length=3, resamplings=2)
    scheduler = scheduler_for(sampler, 3, 2)
    scheduler.eta = 1.0
    network = network_of(process)
    np.testing.assert_array_equal([*scheduler.timesteps, -1], sampler.states)
    (x_T, rngs), known = start(), half_known()
    x_0, mask = torched(known.x_0), torched(known.mask).float()
    calls, call = sampler.num_model_calls, -1
    x, variance = torched(x_T), None
    path = list(itertools.pairwise(map(int, sampler.states)))
    for (here, there), following in zip(path, [*path[1:], None], strict=True):
        last = following is None or following[1] < following[0]  # before the next call
        if there < here:
            call += 1
            z_known = torched(step_noise(rngs, calls + call, SHAPE[1:]))
            x = mask * noised(scheduler, x_0, z_known, here) + (1 - mask) * x
            output = torched(network(jnp.asarray(x.numpy()), jnp.full(2, here)))
            variance = scheduler._get_variance(here)
        else:
            beta = scheduler.betas[there]
            variance = (1 - beta) * variance + beta
        # Here a step and the jump after it share one noise, which diffusers gets in its last draw.
        z = torched(step_noise(rngs, call, SHAPE[1:])) if last else torch.zeros(SHAPE)
        if there < here:
            inject(monkeypatch, z)
            x = scheduler.step(output, here, x, x_0, torch.zeros(SHAPE)).prev_sample
        else:
            inject(monkeypatch, z * (variance / beta) ** 0.5)
            x = scheduler.undo_step(x, there)
    x = mask * x_0 + (1 - mask) * x
    assert call == calls - 1
    np.testing.assert_allclose(run(sampler, network, x_T, rngs, known), x, rtol=0, atol=1e-5)


def test_the_published_schedule():
    sampler = RePaint(process=GaussianProcess())
    assert len(sampler.states) - 1 == 4570
    assert sampler.num_model_calls == 2410
    theirs = scheduler_for(sampler, 10, 10).timesteps // 4
    np.testing.assert_array_equal([*theirs, -1], sampler.states)
    assert sampler.call_times[0] == 999 and sampler.call_times[-1] == 0
    reached = np.bincount(sampler.states[1:][np.diff(sampler.states) < 0] + 1)[1:]
    assert set(reached[:240]) == {10} and set(reached[240:249]) == {1}


def test_the_network_is_traced_once_and_sees_what_is_known():
    sampler = RePaint(process=GaussianProcess(), steps=30, jump_length=5, resamplings=3)
    traces, (x_T, rngs), known = [], start(), half_known()

    def denoise(x_t, t):
        traces.append(1)
        return x_t

    run(sampler, denoise, x_T, rngs, known)
    assert len(traces) == 1


# Cases with a known answer ------------------------------------------------------------------------

MEAN = np.array([0.5, 0.0, -0.5])
COVARIANCE = np.array([[1.0, 0.5, 0.3], [0.5, 1.0, 0.5], [0.3, 0.5, 1.0]])
GIVEN = 2.0  # the first point
# The mean and covariance of the other two points, given the first.
CONDITIONAL_MEAN = MEAN[1:] + COVARIANCE[1:, 0] * (GIVEN - MEAN[0])
CONDITIONAL_COVARIANCE = COVARIANCE[1:, 1:] - np.outer(COVARIANCE[1:, 0], COVARIANCE[0, 1:])


def gaussian_denoiser(process):
    """E[x_0 | x_t] for data N(MEAN, COVARIANCE)."""

    def denoise(x_t, t):
        alpha_bar = process.alpha_bar(t)[0]
        noisy = alpha_bar * COVARIANCE + (1 - alpha_bar) * jnp.eye(3)
        gain = jnp.sqrt(alpha_bar) * COVARIANCE @ jnp.linalg.inv(noisy)
        centred = x_t[..., 0] - jnp.sqrt(alpha_bar) * MEAN
        return (MEAN + centred @ gain.T)[..., None]

    return denoise


def fillings(sampler, count=1000):
    x_T, rngs = start((count, 3, 1))
    mask = jnp.broadcast_to(jnp.array([True, False, False])[:, None], x_T.shape)
    known = Known(jnp.full(x_T.shape, GIVEN), mask)
    result = run(sampler, gaussian_denoiser(sampler.process), x_T, rngs, known)
    assert np.all(result[:, 0] == np.float32(GIVEN))
    return np.asarray(result[:, 1:, 0])


def test_repaint_samples_the_conditional_distribution():
    process = GaussianProcess(num_steps=100, beta_start=1e-3, beta_end=0.2, prediction="x0")
    options = {"process": process, "steps": 100, "variance": "fixed_large"}
    found = fillings(RePaint(**options, jump_length=5, resamplings=20))
    np.testing.assert_allclose(found.mean(0), CONDITIONAL_MEAN, atol=0.1)  # 3 standard errors
    np.testing.assert_allclose(np.cov(found.T), CONDITIONAL_COVARIANCE, atol=0.14)
    # Resampling is necessary: with replacement alone this fails.
    replaced = fillings(RePaint(**options, resamplings=1))
    assert np.all(np.abs(replaced.mean(0) - CONDITIONAL_MEAN) > 0.2)


@pytest.mark.parametrize("name", GENERAL_SAMPLERS)
def test_fast_samplers_lean_towards_what_is_known(name):
    process = GaussianProcess(schedule="cosine", prediction="x0")
    found = fillings(GENERAL_SAMPLERS[name](process=process, steps=20), count=500)
    shift, right = found.mean(0) - MEAN[1:], CONDITIONAL_MEAN - MEAN[1:]
    assert np.all((0.3 * right < shift) & (shift < 1.2 * right))


CODES, PLACES = 2, 3
JOINT = np.random.default_rng(0).dirichlet(np.full(CODES**PLACES, 0.7)).reshape(2, 2, 2)
WORDS = np.array(list(itertools.product(range(CODES), repeat=PLACES)))


def best_denoiser(process):
    """log p(x_0 | x_t) of every token, by enumeration of all words."""

    def denoise(x_t, t):
        alpha, gamma, beta = (
            jnp.asarray(table, jnp.float32)[t][:, None, None]
            for table in (process.alpha_bars, process.gamma_bars, process.beta_bars)
        )
        seen = x_t[:, None, :]
        q = jnp.where(seen == CODES, gamma, alpha * (seen == WORDS) + beta)
        weight = jnp.asarray(JOINT.ravel(), jnp.float32) * jnp.prod(q, axis=-1)
        one_hot = jnp.asarray(WORDS[..., None] == np.arange(CODES), jnp.float32)
        return jnp.log(jnp.einsum("bw,wpk->bpk", weight, one_hot))

    return denoise


@pytest.mark.parametrize(
    ("num_steps", "options"),
    [
        (300, {"steps": 300}),  # rarely two tokens in one step
        # Drawing one token at a time, in any order, follows the chain rule.
        (20, {"steps": 20, "reveal": "random", "tokens_per_call": 1}),
        (20, {"steps": 20, "reveal": "purity", "tokens_per_call": 1}),
        (20, {"steps": 20, "reveal": "purity", "purity_temperature": 0.0}),
    ],
)
def test_discrete_fillings_have_the_conditional_frequencies(num_steps, options):
    process = CategoricalProcess(num_codes=CODES, num_steps=num_steps)
    sampler = CategoricalSampler(process=process, **options)
    count = 4000
    # In every other example the middle token is known, in the rest the outer two.
    outer = (np.arange(count) % 2 == 0)[:, None]
    mask = np.where(outer, [True, False, True], [False, True, False])
    word = np.broadcast_to([1, 0, 1], mask.shape).astype(np.int32)
    known = Known(jnp.asarray(np.where(mask, word, 7)), jnp.asarray(mask))
    x_T = jnp.full((count, PLACES), process.mask_token)
    rngs = jax.random.split(jax.random.key(1), count)
    found = np.asarray(run(sampler, best_denoiser(process), x_T, rngs, known))
    np.testing.assert_array_equal(found[mask], word[mask])
    expected = JOINT[1, :, 1] / JOINT[1, :, 1].sum()
    counts = np.bincount(found[0::2, 1], minlength=2)
    assert scipy.stats.chisquare(counts, counts.sum() * expected).pvalue > 1e-3
    expected = (JOINT[:, 0, :] / JOINT[:, 0, :].sum()).ravel()
    counts = np.bincount(found[1::2, [0, 2]] @ [2, 1], minlength=4)
    assert scipy.stats.chisquare(counts, counts.sum() * expected).pvalue > 1e-3


def test_unknown_tokens_follow_the_schedule_of_the_process():
    process = CategoricalProcess(num_codes=6, num_steps=5)
    sampler = CategoricalSampler(process=process, steps=5, reveal="random")
    mask = np.zeros((3, 12), bool)
    mask[1, :4], mask[2] = True, True  # 12, 8 and 0 unknown
    known, seen = Known(jnp.zeros((3, 12), jnp.int32), jnp.asarray(mask)), []

    def denoise(x_t, t):
        jax.debug.callback(lambda x: seen.append(np.sum(np.asarray(x) == 6, axis=1)), x_t)
        return jnp.zeros((*x_t.shape, 6))

    rngs = jax.random.split(jax.random.key(0), 3)
    result = run(sampler, denoise, jnp.full((3, 12), 6), rngs, known)
    jax.effects_barrier()
    np.testing.assert_array_equal(
        np.stack(seen).T, [[12, 9, 6, 3, 0], [8, 6, 4, 2, 0], [0, 0, 0, 0, 0]]
    )
    assert result.max() < 6 and np.all(np.asarray(result)[mask] == 0)


# Limits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resamplings": 0}, "resamplings is 0; it must be at least 1"),
        ({"jump_length": 0}, "jump_length is 0 with steps 10; it must be at least 1"),
        ({"jump_length": 10}, "jump_length is 10 with steps 10; .* less than steps"),
        ({"variance": "learned"}, "variance is 'learned'; choose one of fixed_small"),
        ({"steps": 2000}, "steps is 2000; it must lie in 1 .. 1000"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        RePaint(**{"process": GaussianProcess(), "steps": 10, "jump_length": 3} | fields)


def test_no_jumps_is_ancestral_sampling():
    np.testing.assert_array_equal(jump_schedule(7, 3, 1), range(6, -2, -1))
    process = GaussianProcess()
    (x_T, rngs), known = start(), half_known()
    network = network_of(process)
    options = {"process": process, "steps": 20, "spacing": "linspace"}
    np.testing.assert_allclose(
        run(RePaint(**options, resamplings=1), network, x_T, rngs, known),
        run(GENERAL_SAMPLERS["ddpm"](**options), network, x_T, rngs, known),
        atol=1e-6,
    )
