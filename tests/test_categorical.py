"""Tests of discrete diffusion against diffusers, matrix products, enumeration and draws."""

import collections
import itertools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from conprediff_jax.diffusion import Process
from conprediff_jax.diffusion.categorical import CategoricalProcess, posterior
from conprediff_jax.diffusion.guidance import LOG_ZERO, guided_log_probs
from conprediff_jax.diffusion.importance import HISTORY, TimeImportance
from conprediff_jax.diffusion.samplers.categorical import CategoricalSampler
from conprediff_jax.diffusion.tokens import truncate

NOISY = {"alpha_start": 0.8, "alpha_end": 0.1, "gamma_start": 0.1, "gamma_end": 0.8}
SMALL = CategoricalProcess(num_codes=3, num_steps=4, **NOISY)


def random_log_probs(seed, shape):
    logits = 3 * np.random.default_rng(seed).normal(size=shape)
    return scipy.special.log_softmax(logits, axis=-1).astype(np.float32)


def recorded(denoise, seen):
    """The same denoiser, which adds every x_t of a call to the list `seen`."""

    def wrapped(x_t, t):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x_t, ordered=True)
        return denoise(x_t, t)

    return wrapped


def run(sampler, denoise, x_T, rngs):
    result = np.asarray(jax.jit(lambda x, keys: sampler.sample(denoise, x, keys))(x_T, rngs))
    jax.effects_barrier()
    return result


def matrices(process):
    """q(x_t = column | x_0 = row) for every time, then the clean end: `[T + 1, K + 1, K + 1]`."""
    K = process.num_codes
    table = np.tile(np.eye(K + 1), (process.num_steps + 1, 1, 1))
    bars = zip(process.alpha_bars, process.gamma_bars, strict=True)
    for t, (alpha_bar, gamma_bar) in enumerate(bars):
        table[t, :K, :K] = alpha_bar * np.eye(K) + (1 - alpha_bar - gamma_bar) / K
        table[t, :K, K] = gamma_bar
    return table


def bayes(process, p_x0, t, s):
    """p(x_s | x_t) for every x_t (row), by matrix products and the rule of Bayes."""
    from_clean = matrices(process)
    step = np.linalg.solve(from_clean[s], from_clean[t])
    q = from_clean[:, : process.num_codes]  # x_0 is a code
    return np.einsum("ak,ks,sa,ka->as", p_x0, q[s], step, 1 / q[t])


def test_posterior_equals_diffusers():
    process = CategoricalProcess(num_codes=6)
    assert isinstance(process, Process)
    scheduler = diffusers.VQDiffusionScheduler(num_vec_classes=7)
    times = np.array([1, 2, 37, 98, 99])
    log_p = random_log_probs(0, (5, 8, 6))
    x_t = np.random.default_rng(1).integers(0, 7, size=(5, 8))
    x_t[:, 0] = 6
    result = jax.jit(process.posterior)(log_p, jnp.asarray(x_t), times)
    for i, t in enumerate(times):
        expected = scheduler.q_posterior(
            torch.from_numpy(log_p[i : i + 1]).transpose(1, 2), torch.from_numpy(x_t[i : i + 1]), t
        )
        expected = np.clip(expected[0].T.numpy(), LOG_ZERO, 0)
        possible = expected > -50  # below, they and we have different stand-ins for log 0
        np.testing.assert_allclose(result[i][possible], expected[possible], atol=1e-5)
        np.testing.assert_allclose(np.exp(result[i]), np.exp(expected), atol=5e-6)


@pytest.mark.parametrize("skipped", [0, 1])
def test_posterior_equals_matrix_products(skipped):
    """Compares every time and token. A previous time of -1 is the clean end."""
    times = np.arange(skipped, SMALL.num_steps)
    previous = times - 1 - skipped
    log_p = random_log_probs(0, (4, 3))  # one row for every x_t
    table = SMALL.transitions(times, previous)
    for i, (t, s) in enumerate(zip(times, previous, strict=True)):
        step = jax.tree.map(lambda column, i=i: jnp.asarray(column[i]), table)
        result = jax.jit(posterior)(log_p, jnp.arange(4), step)
        expected = bayes(SMALL, np.exp(log_p, dtype=np.float64), t, s)
        np.testing.assert_allclose(np.exp(result), expected, atol=1e-6)
        np.testing.assert_allclose(expected.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("t", [0, 2, 3])
def test_corruption_has_the_closed_form_marginals(t):
    x_0 = jnp.full((20, 500), 2)
    corrupt = jax.jit(SMALL.corrupt)
    x_t = corrupt(jax.random.split(jax.random.key(t), 20), x_0, jnp.full(20, t)).x_t
    counts = np.bincount(np.asarray(x_t).ravel(), minlength=4)
    assert scipy.stats.chisquare(counts, matrices(SMALL)[t, 2] * counts.sum()).pvalue > 1e-3


def test_draws_depend_on_the_key_of_the_example_only():
    process = CategoricalProcess(num_codes=9)
    sample_time, corrupt = jax.jit(process.sample_time), jax.jit(process.corrupt)
    rngs = jax.random.split(jax.random.key(0), 64)
    t = sample_time(rngs).t
    assert t.min() < 15 and t.max() > 85
    x_0 = jnp.tile(jnp.arange(9), (64, 1))
    corrupted = corrupt(rngs, x_0, t)
    assert corrupted.x_t.dtype == jnp.int32
    np.testing.assert_array_equal(sample_time(rngs[3:5]).t, t[3:5])
    alone = corrupt(rngs[3:5], x_0[3:5], t[3:5])
    np.testing.assert_array_equal(alone.x_t, corrupted.x_t[3:5])


def test_loss_is_the_variational_bound():
    """Two tokens, three steps, an arbitrary denoiser: every path of the chain is enumerated."""
    process = CategoricalProcess(num_codes=3, num_steps=3, auxiliary_weight=0.0, **NOISY)
    pairs = np.array(list(itertools.product(range(4), repeat=2)))  # 16 states
    clean = [i for i, pair in enumerate(pairs) if (pair < 3).all()]
    logits = np.random.default_rng(0).normal(size=(3, 16, 2, 3)).astype(np.float32)
    p_x0 = scipy.special.softmax(logits.astype(np.float64), axis=-1)

    def joint(single):  # [4, 4], or one for each token and state of both -> [16, 16]
        first, second = np.broadcast_to(single, (16, 2, 4, 4)).swapaxes(0, 1)
        rows = np.arange(16)
        return np.einsum("si,sj->sij", first[rows, pairs[:, 0]], second[rows, pairs[:, 1]]).reshape(
            16, 16
        )

    table = matrices(process)
    forward = [joint(np.linalg.solve(table[t - 1], table[t])) for t in range(3)]
    reverse = []
    for t in range(3):
        rows = [[bayes(process, np.tile(p, (4, 1)), t, t - 1) for p in both] for both in p_x0[t]]
        reverse.append(joint(np.array(rows)))
    gamma_bar = process.gamma_bars[-1]
    prior = joint(np.tile([*[(1 - gamma_bar) / 3] * 3, gamma_bar], (4, 1)))[0]

    negative_log_likelihood = -np.log((prior @ reverse[2] @ reverse[1] @ reverse[0])[clean])
    q = np.einsum("xa,ab,bc->xabc", forward[0], forward[1], forward[2])[clean]
    p = np.einsum("c,cb,ba,ax->xabc", prior, reverse[2], reverse[1], reverse[0])[clean]
    exact = scipy.special.rel_entr(q, p).sum((1, 2, 3))
    assert np.all(exact >= negative_log_likelihood)

    grid = np.array(list(itertools.product(range(3), clean, range(16))))
    t, x_0, x_t = grid[:, 0], pairs[grid[:, 1]], pairs[grid[:, 2]]
    losses = jax.jit(process.loss)(logits[t, grid[:, 2]], x_0, x_t, jnp.zeros(()), t)
    from_clean = np.stack([joint(table[t])[clean] for t in range(3)])
    terms = np.asarray(losses, np.float64).reshape(3, len(clean), 16) * 2 / 3  # 2 tokens, T = 3
    bound = np.sum(from_clean * terms, axis=(0, 2)) + scipy.special.rel_entr(
        from_clean[2], prior
    ).sum(1)
    np.testing.assert_allclose(bound, exact, rtol=1e-5)


@pytest.mark.parametrize("adaptive", [True, False])
def test_auxiliary_loss_and_a_batch_of_several_times(adaptive):
    plain = CategoricalProcess(num_codes=5, auxiliary_weight=0.0)
    process = CategoricalProcess(num_codes=5, adaptive_auxiliary=adaptive)
    log_p, t = random_log_probs(0, (3, 2, 2, 5)), jnp.array([0, 40, 99])
    x_0 = jnp.asarray(np.random.default_rng(1).integers(0, 5, (3, 2, 2)))
    x_t, noise = process.corrupt(jax.random.split(jax.random.key(0), 3), x_0, t)
    likelihood = -np.take_along_axis(log_p, np.asarray(x_0)[..., None], -1)[..., 0].mean((1, 2))
    weight = 5e-4 * (np.array([2, 1.6, 1.01]) if adaptive else 1)
    bound, together = (jax.jit(p.loss)(log_p, x_0, x_t, noise, t) for p in (plain, process))
    np.testing.assert_allclose(together, bound + 100 * weight * likelihood, rtol=1e-5)
    for i in range(3):
        alone = jax.jit(process.loss)(*(a[i : i + 1] for a in (log_p, x_0, x_t, noise, t)))
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-6)


def test_gradients_are_finite_and_right_predictions_have_no_loss():
    process = CategoricalProcess(num_codes=5)
    t = jnp.array([0, 1, 50, 99])
    x_0 = jnp.tile(jnp.arange(5), (4, 1))
    x_t = jnp.array([[0, 5, 2, 1, 5]] * 4)
    right = 1e4 * jax.nn.one_hot(x_0, 5)
    loss = jax.jit(
        jax.value_and_grad(lambda output: process.loss(output, x_0, x_t, jnp.zeros(()), t).sum())
    )
    for output in (right, -right, jnp.zeros_like(right), right.astype(jnp.bfloat16)):
        value, gradient = loss(output)
        assert np.isfinite(value) and np.isfinite(gradient.astype(jnp.float32)).all()
    np.testing.assert_allclose(loss(right)[0], 0, atol=1e-4)


RNG = np.random.default_rng(3)
PAIRS = {  # distributions over pairs of three codes
    "dependent": RNG.dirichlet(np.full(9, 0.7)).reshape(3, 3),
    "independent": np.outer(*RNG.dirichlet(np.full(3, 2.0), size=2)),
}


def best_denoiser(process, data):
    """The marginals of p(x_0 | x_t), by enumeration."""
    q = matrices(process)[:-1, :3]  # [T, x_0, x_t]
    joint = np.einsum("ij,tia,tjb->tabij", data, q, q)
    joint /= joint.sum((3, 4), keepdims=True)
    table = jnp.asarray(np.log(np.stack([joint.sum(4), joint.sum(3)], axis=3)), jnp.float32)
    return lambda x_t, t: table[t, x_t[:, 0], x_t[:, 1]]


@pytest.mark.parametrize(
    ("data", "num_steps", "options"),
    [
        # Both tokens are drawn in one step only once in num_steps samples.
        ("dependent", 300, {"steps": 300}),
        # Drawing one token at a time, in any order, follows the chain rule.
        ("dependent", 20, {"steps": 20, "reveal": "random"}),
        ("dependent", 20, {"steps": 20, "reveal": "purity"}),
        ("dependent", 20, {"steps": 20, "reveal": "purity", "purity_temperature": 0.0}),
        # Independent tokens may be drawn together, so skipped steps are exact.
        ("independent", 20, {"steps": 3}),
    ],
)
def test_best_denoiser_gives_back_the_data(data, num_steps, options):
    process = CategoricalProcess(num_codes=3, num_steps=num_steps)
    sampler = CategoricalSampler(process=process, **options)
    x_T, rngs = jnp.full((4000, 2), 3), jax.random.split(jax.random.key(2), 4000)
    pairs = run(sampler, best_denoiser(process, PAIRS[data]), x_T, rngs)
    assert pairs.min() >= 0 and pairs.max() < 3
    counts = np.bincount(pairs @ [3, 1], minlength=9)
    assert scipy.stats.chisquare(counts, 4000 * PAIRS[data].ravel()).pvalue > 1e-3


def test_a_sample_does_not_depend_on_its_batch_and_traces_the_network_once():
    process = CategoricalProcess(num_codes=4, num_steps=10)
    sampler = CategoricalSampler(process=process, steps=7, truncation=0.9)
    traces = []
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)

    def denoise(x_t, t):
        assert x_t.dtype == jnp.int32 and t.dtype == jnp.int32 and t.shape == x_t.shape[:1]
        traces.append(1)
        return weights[x_t] + weights[x_t].mean((1, 2), keepdims=True)

    x_T, rngs = jnp.full((5, 2, 3), 4), jax.random.split(jax.random.key(0), 5)
    together = run(sampler, denoise, x_T, rngs)
    assert len(traces) == 1
    np.testing.assert_array_equal(run(sampler, denoise, x_T[1:3], rngs[1:3]), together[1:3])
    assert len(np.unique(together, axis=0)) > 1


def test_truncation():
    log_p = jnp.log(jnp.array([[0.1, 0.5, 0.3, 0.1], [0.02, 0.02, 0.94, 0.02]]))[:, None]
    for rate, expected in [
        # 0.5, then 0.3 with 0.5 before it, then both 0.1 with 0.8 before; 0.94 alone is enough.
        (0.86, [[1, 1, 1, 1], [0, 0, 1, 0]]),
        (0.79, [[0, 1, 1, 0], [0, 0, 1, 0]]),
        (0.01, [[0, 1, 0, 0], [0, 0, 1, 0]]),
    ]:
        kept = np.asarray(truncate(log_p, rate)[:, 0]) > LOG_ZERO
        np.testing.assert_array_equal(kept, expected)
    log_p = random_log_probs(0, (2, 5, 20))
    order = np.argsort(-log_p, axis=-1)
    mass = np.cumsum(np.exp(np.take_along_axis(log_p, order, -1), dtype=np.float64), -1)
    for rate in (0.3, 0.86, 1.0):
        kept = np.empty(log_p.shape, bool)
        np.put_along_axis(kept, order, np.insert(mass, 0, 0, -1)[..., :-1] < rate, -1)
        result = truncate(jnp.asarray(log_p), rate)
        np.testing.assert_array_equal(result, np.where(kept, log_p, LOG_ZERO))


def test_guidance():
    conditional, unconditional = random_log_probs(0, (2, 3, 4)), random_log_probs(1, (2, 3, 4))
    guided = guided_log_probs(jnp.asarray(conditional), jnp.asarray(unconditional), 3.0)
    expected = 3 * conditional.astype(np.float64) - 2 * unconditional
    expected = np.clip(scipy.special.log_softmax(expected, axis=-1), -70, 0)
    np.testing.assert_allclose(guided, expected, atol=1e-5)
    logits = jnp.asarray(conditional) + 7, jnp.asarray(unconditional) - 5
    np.testing.assert_allclose(guided_log_probs(*logits, 3.0), guided, atol=2e-5)
    np.testing.assert_allclose(guided_log_probs(*logits, 1.0), conditional, atol=1e-5)
    far = guided_log_probs(jnp.array([[200.0, 0.0]]), jnp.zeros((1, 2)), 2.0)
    np.testing.assert_array_equal(far, [[0.0, -70.0]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # round(12 (1 - gamma_bar)) are unmasked at times 3, 2, 1, 0; the last call draws all.
        ({"steps": 5, "reveal": "random"}, [12, 9, 6, 3, 0, 0]),
        (
            {"steps": 5, "reveal": "purity", "tokens_per_call": 2},
            [12, 10, 9, 7, 6, 4, 3, 1, 0, 0],
        ),
        ({"steps": 2, "reveal": "random"}, [12, 3, 0]),  # times 4, 1
    ],
)
def test_number_of_revealed_tokens_follows_the_schedule(options, expected):
    process = CategoricalProcess(num_codes=6, num_steps=5)
    sampler = CategoricalSampler(process=process, **options)
    logits = jnp.asarray(random_log_probs(0, (5, 3, 4, 6)))
    seen = []
    denoise = recorded(lambda x_t, t: logits[t], seen)
    x_T, rngs = jnp.full((2, 3, 4), 6), jax.random.split(jax.random.key(0), 2)
    result = run(sampler, denoise, x_T, rngs)
    masks = np.sum(np.stack([*seen, result]) == 6, axis=(2, 3))
    np.testing.assert_array_equal(masks.T, [expected, expected])
    assert len(sampler.calls(12).times) == len(expected) - 1
    for before, after in itertools.pairwise(seen):  # what is revealed stays
        np.testing.assert_array_equal(after[before < 6], before[before < 6])


def test_high_quality_inference_of_the_published_size():
    """1024 tokens in 100 steps of 10 or 11, as the published table; then one call for the rest."""
    process = CategoricalProcess(num_codes=9)
    calls = CategoricalSampler(process=process, steps=100, reveal="random").calls(1024)
    assert len(calls.times) == 100 and set(calls.counts[:-1]) == {10, 11}
    assert calls.counts[:-1].sum() == 1024
    few = CategoricalSampler(process=process, steps=100, reveal="random").calls(16)
    assert len(few.times) == 17  # no calls that reveal nothing


def test_purity_prior_prefers_pure_tokens_and_sharpens_them():
    process = CategoricalProcess(num_codes=2, num_steps=3)
    purity = np.array([0.9, 0.6, 0.8, 0.7])
    logits = jnp.asarray(np.log(np.stack([purity, 1 - purity], -1)), jnp.float32)
    options = {"steps": 3, "reveal": "purity", "purity_temperature": 0.0, "purity_weight": 100.0}
    sampler = CategoricalSampler(process=process, **options)
    seen = []
    denoise = recorded(lambda x_t, t: jnp.broadcast_to(logits, (*x_t.shape, 2)), seen)
    run(sampler, denoise, jnp.full((50, 4), 2), jax.random.split(jax.random.key(0), 50))
    # The two purest first, and so sharp that the less probable code never comes up.
    np.testing.assert_array_equal(seen[1], np.tile([0, 2, 0, 2], (50, 1)))


def test_importance_remembers_the_last_losses():
    state, reference = TimeImportance.init(5), [collections.deque(maxlen=HISTORY) for _ in range(5)]
    rng = np.random.default_rng(0)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    update = jax.jit(TimeImportance.update)
    np.testing.assert_allclose(state.probabilities(), 0.2)
    for i in range(4):
        t = rng.choice(5, size=32, p=[0.6, 0.1, 0.1, 0.1, 0.1]).astype(np.int32)
        loss = rng.exponential(1 + t).astype(np.float32)
        sharded = update(state, *jax.device_put((t, loss), sharding))
        state = update(state, t, loss)
        jax.tree.map(np.testing.assert_array_equal, sharded, state)
        for time, value in zip(t, loss, strict=True):
            reference[time].append(value**2)
        if i == 0:
            assert state.counts.min() < HISTORY
            np.testing.assert_allclose(state.probabilities(), 0.2)  # not yet ten of each
    for row, values in zip(state.squares, reference, strict=True):
        np.testing.assert_array_equal(np.sort(row), np.sort(values))
    root = np.sqrt(np.mean(reference, axis=1))
    root[0] = root[1]
    p = np.asarray(state.probabilities())
    np.testing.assert_allclose(p, 0.999 * root / root.sum() + 0.0002, rtol=1e-5)

    rngs = jax.random.split(jax.random.key(0), 5000)
    t, weight = state.draw(rngs)
    assert scipy.stats.chisquare(np.bincount(t, minlength=5), 5000 * p).pvalue > 1e-3
    # Unbiased: the probability of a time multiplied by its weight is that of a uniform draw.
    np.testing.assert_allclose(p[t] * weight, 0.2, rtol=1e-5)
    np.testing.assert_array_equal(state.draw(rngs[7:9])[0], t[7:9])


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (CategoricalProcess, {"num_codes": 0}, "num_codes is 0; it must be at least 1"),
        (CategoricalProcess, {"num_steps": 1}, "num_steps is 1; it must be at least 2"),
        (CategoricalProcess, {"auxiliary_weight": -1.0}, "auxiliary_weight is -1.0"),
        (CategoricalProcess, {"alpha_end": 1.0}, "0 < alpha_end < alpha_start"),
        (CategoricalProcess, {"gamma_end": 0.0}, "0 < gamma_start < gamma_end"),
        (CategoricalProcess, {"gamma_end": 1.0}, "alpha . gamma must stay below 1"),
        (CategoricalSampler, {"steps": 101}, "steps is 101; it must lie in 1 .. 100"),
        (CategoricalSampler, {"truncation": 0.0}, "truncation is 0.0; it must"),
        (CategoricalSampler, {"reveal": "all"}, "'all'; choose one of posterior, random, purity"),
        (CategoricalSampler, {"tokens_per_call": 4}, "tokens_per_call is 4 with reveal"),
        (CategoricalSampler, {"purity_weight": 1.0}, "purity_weight is 1.0 with"),
    ],
)
def test_wrong_fields_are_named(cls, fields, message):
    process = {"num_codes": 3}
    if cls is CategoricalSampler:
        process = {"process": CategoricalProcess(**process), "steps": 10}
    with pytest.raises(ValueError, match=message):
        cls(**process | fields)


def test_logits_of_another_codebook_are_refused():
    x_t = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="output has 4 logits a token; it must have 3"):
        SMALL.predict_x0(jnp.zeros((1, 2, 4)), x_t, x_t[:, 0])
