"""Tests of masked diffusion against enumeration, orders of tokens, a discrete process and draws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.extend.random import define_prng_impl, threefry_prng_impl

from conprediff_jax.diffusion import Process
from conprediff_jax.diffusion.categorical import CategoricalProcess
from conprediff_jax.diffusion.masked import MaskedProcess
from conprediff_jax.diffusion.samplers import Known, MaskedSampler
from conprediff_jax.diffusion.tokens import draw

pytestmark = pytest.mark.every_python

RNG = np.random.default_rng(3)
CODES, TOKENS = 3, 3
STATES = np.array(list(itertools.product(range(CODES + 1), repeat=TOKENS)))  # 64, with masks
CLEAN = np.array(list(itertools.product(range(CODES), repeat=TOKENS)))  # 27
DATA = RNG.dirichlet(np.full(len(CLEAN), 0.5))
LOGITS = RNG.normal(size=(len(STATES), TOKENS, CODES)).astype(np.float32)


def index(x):
    """The row of `STATES` that holds the tokens x."""
    return x @ (CODES + 1) ** np.arange(TOKENS)[::-1]


def best_log_p():
    """The marginals of p(x_0 | x_t) for every state, by enumeration: `[64, tokens, codes]`."""
    fits = ((STATES[:, None] == CODES) | (STATES[:, None] == CLEAN)).all(2)
    p = fits * DATA
    onehot = np.eye(CODES)[CLEAN]
    return np.log(np.einsum("sx,xik->sik", p / p.sum(1, keepdims=True), onehot) + 1e-30)


def mean_over_orders(log_p, x):
    """-log p(x) of a model that predicts one token after the other, the mean over all orders."""
    total = []
    for order in itertools.permutations(range(TOKENS)):
        state, cost = np.full(TOKENS, CODES), 0.0
        for i in order:
            cost -= log_p[index(state), i, x[i]]
            state[i] = x[i]
        total.append(cost)
    return np.mean(total)


def bound(process, log_p, x):
    """The mean loss over times and masks, in nats: Gauss's quadrature, and all masks enumerated."""
    nodes, weights = np.polynomial.legendre.leggauss(12)
    first = 1e-3  # the loss is constant below
    times = np.append(first / 2, first + (1 - first) * (nodes + 1) / 2)
    weights = np.append(first, (1 - first) * weights / 2)
    masks = np.array(list(itertools.product([False, True], repeat=TOKENS)))
    x_t = np.where(masks, CODES, x)
    t, row = (each.ravel() for each in np.meshgrid(times, np.arange(8), indexing="ij"))
    t = jnp.asarray(t, jnp.float32)
    x_0 = jnp.asarray(np.tile(x, (len(t), 1)))
    output = jnp.asarray(log_p[index(x_t)][row], jnp.float32)
    loss = jax.jit(process.loss)(output, x_0, jnp.asarray(x_t[row]), jnp.zeros(()), t)
    share = np.asarray(process.masked_share(t), np.float64)[:, None]
    probability = np.where(masks[row], share, 1 - share).prod(1)
    return TOKENS * weights @ (probability * np.asarray(loss, np.float64)).reshape(-1, 8).sum(1)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_bound_is_the_mean_over_all_orders_of_the_tokens(schedule):
    """So with the best predictions it is exact: the chain rule gives -log p(x) in every order."""
    process = MaskedProcess(num_codes=CODES, schedule=schedule)
    assert isinstance(process, Process)
    arbitrary = scipy.special.log_softmax(LOGITS.astype(np.float64), axis=-1)
    for x in ([0, 2, 1], [1, 1, 0]):
        x = np.array(x)
        expected = mean_over_orders(arbitrary, x)
        assert bound(process, LOGITS, x) == pytest.approx(expected, rel=2e-4)
        exact = -np.log(DATA[(x == CLEAN).all(1)][0])
        assert bound(process, best_log_p(), x) == pytest.approx(exact, rel=2e-4)
        uniform = np.zeros_like(LOGITS)
        assert bound(process, uniform, x) == pytest.approx(TOKENS * np.log(CODES), rel=2e-6)


def test_the_bound_is_the_limit_of_a_discrete_process_that_only_masks():
    """The distance from the bound of T steps halves as T doubles."""
    x, log_p = np.array([0, 2, 1]), scipy.special.log_softmax(LOGITS, axis=-1)
    masks = np.array(list(itertools.product([False, True], repeat=TOKENS)))
    x_t = np.where(masks, CODES, x)
    carried = np.where(np.eye(CODES)[x], 0.0, -70.0)
    log_p = np.where(masks[..., None], log_p[index(x_t)], carried).astype(np.float32)

    def discrete(steps):
        ends = np.array([1, steps]) / (steps + 1)
        options = dict(zip(("gamma_start", "gamma_end"), ends, strict=True))
        options |= dict(zip(("alpha_start", "alpha_end"), 1 - ends - 1e-7, strict=True))
        process = CategoricalProcess(
            num_codes=CODES, num_steps=steps, auxiliary_weight=0.0, **options
        )
        t, row = (
            each.ravel() for each in np.meshgrid(np.arange(steps), np.arange(8), indexing="ij")
        )
        x_0 = jnp.asarray(np.tile(x, (len(t), 1)))
        loss = jax.jit(process.loss)(
            jnp.asarray(log_p[row]), x_0, jnp.asarray(x_t[row]), jnp.zeros(()), t
        )
        gamma = process.gamma_bars[t][:, None]
        probability = np.where(masks[row], gamma, 1 - gamma).prod(1)
        losses = probability @ np.asarray(loss, np.float64) / steps
        return TOKENS * (losses + process.prior_divergence)

    limit = bound(MaskedProcess(num_codes=CODES), LOGITS, x)
    far, near = (discrete(steps) - limit for steps in (100, 200))
    assert 0 < near < 0.01 * limit and near / far == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_tokens_are_masked_as_often_as_the_schedule_says(schedule):
    process = MaskedProcess(num_codes=CODES, schedule=schedule)
    rngs = jax.random.split(jax.random.key(0), 4)
    t = jnp.array([0.0, 0.3, 0.9, 1.0])
    x_0 = jnp.tile(jnp.arange(20_000) % CODES, (4, 1))
    x_t = np.asarray(jax.jit(process.corrupt)(rngs, x_0, t).x_t)
    masked = x_t == process.mask_token
    np.testing.assert_array_equal(x_t[~masked], np.asarray(x_0)[~masked])
    share = {"linear": [1e-3, 0.3, 0.9, 1], "cosine": [np.pi / 2e3, 0.45399, 0.98769, 1]}[schedule]
    np.testing.assert_allclose(masked.mean(1), share, atol=4 * 0.5 / np.sqrt(20_000))
    np.testing.assert_allclose(process.alpha_bar(t), 1 - np.array(share), atol=1e-5)
    np.testing.assert_allclose(
        process.time_of_masked_share(np.array(share)), [1e-3, *t[1:]], atol=1e-5
    )
    alone = jax.jit(process.corrupt)(rngs[1:2], x_0[1:2], t[1:2]).x_t
    np.testing.assert_array_equal(alone[0], x_t[1])  # it depends on its own key only


def test_tokens_that_are_not_masked_are_carried_over_and_have_no_loss():
    process = MaskedProcess(num_codes=CODES)
    x_t = jnp.array([[0, 3, 2]])
    output, t = jnp.asarray(LOGITS[5:6]), jnp.array([0.5])
    p = np.exp(process.predict_x0(output, x_t, t))
    np.testing.assert_allclose(p[0, [0, 2]], np.eye(3)[[0, 2]], atol=1e-12)
    np.testing.assert_allclose(p[0, 1], scipy.special.softmax(LOGITS[5, 1]), rtol=1e-5)
    x_0 = jnp.array([[0, 1, 2]])
    grad = jax.grad(lambda output: process.loss(output, x_0, x_t, jnp.zeros(()), t).sum())(output)
    assert not grad[0, [0, 2]].any() and grad[0, 1].all()


def test_ancestral_sampling_with_the_best_predictions_gives_the_data():
    process = MaskedProcess(num_codes=CODES, schedule="cosine")
    sampler = MaskedSampler(process=process, steps=200)
    table = jnp.asarray(best_log_p(), jnp.float32)

    @jax.jit
    def sample(rngs):
        denoise = lambda x_t, t: table[index(x_t)]  # noqa: E731
        return sampler.sample(denoise, process.prior(rngs, (TOKENS,)), rngs)

    rngs = jax.random.split(jax.random.key(1), 4000)
    drawn = np.asarray(sample(rngs))
    counts = np.bincount(index(drawn), minlength=64)[index(CLEAN)]
    assert counts.sum() == 4000  # no mask is left
    likely = DATA > 1e-3
    expected = np.append(DATA[likely], DATA[~likely].sum()) * 4000
    found = np.append(counts[likely], counts[~likely].sum())
    assert scipy.stats.chisquare(found, expected).pvalue > 1e-3


def test_confidence_reveals_as_many_tokens_as_maskgit():
    """The codes are certain after truncation, so that the most confident ones come first."""
    process = MaskedProcess(num_codes=4, schedule="cosine")
    options = {"reveal": "confidence", "confidence_temperature": 0.0, "truncation": 0.3}
    sampler = MaskedSampler(process=process, steps=8, **options)
    place = RNG.permutation(256).reshape(16, 16)
    right = RNG.integers(0, 4, (16, 16))
    logits = jnp.asarray(np.eye(4)[right] * (1 + place[..., None] / 64), jnp.float32)
    calls = []

    def denoise(x_t, t):
        jax.debug.callback(lambda *call: calls.append(jax.device_get(call)), x_t, t, ordered=True)
        return jnp.broadcast_to(logits, (*x_t.shape, 4))

    @jax.jit
    def sample(known, rngs):
        return sampler.sample(denoise, process.prior(rngs, (16, 16)), rngs, known)

    for num_known, expected in [
        (0, [256, 251, 236, 212, 181, 142, 97, 49, 0]),  # floor(256 cos(pi k / 16))
        (64, [192, 188, 177, 159, 135, 106, 73, 37, 0]),
        (254, [2, 1, 1, 1, 1, 1, 1, 1, 0]),
    ]:
        given = np.arange(256).reshape(1, 16, 16) < num_known
        rngs = jax.random.split(jax.random.key(0), 1)
        calls.clear()
        result = sample(Known(jnp.ones((1, 16, 16), jnp.int32), jnp.asarray(given)), rngs)
        jax.effects_barrier()
        # The time is the one at which training masks this share of all tokens.
        np.testing.assert_allclose([t[0] for _, t in calls], 1 - np.arange(8) / 8, atol=1e-6)
        for x_t, left in zip([*(x_t for x_t, _ in calls), result], expected, strict=True):
            order = np.sort(place[~given[0]])
            hidden = ~given & (place <= order[left - 1]) & (left > 0)
            np.testing.assert_array_equal(x_t, np.where(given, 1, np.where(hidden, 4, right)))
            assert hidden.sum() == left


def likely_to_be_rare(key, bit_width, shape):
    """Random bits of which JAX makes noise for code 1 that is large: x < 2^-16 in -log(-log1p(-x)).

    The noise is that of one draw in 65,536, and a rare code is never drawn with other noise.
    """
    bits = threefry_prng_impl.random_bits(key, bit_width, shape)
    return bits.at[0, ..., 1].set(bits[0, ..., 1] >> 16) if shape[0] == 2 else bits


def test_rare_tokens_are_drawn_as_often_as_they_should():
    """With less noise than the samplers draw, this code would not be drawn at all."""
    fields = {name: getattr(threefry_prng_impl, name) for name in ("key_shape", "split", "fold_in")}
    seed = threefry_prng_impl.seed
    impl = define_prng_impl(**fields, seed=seed, random_bits=likely_to_be_rare)
    p, count = 1e-8, 50_000
    log_p = jnp.tile(jnp.log(jnp.array([1 - p, p])), (1, count, 1))
    found = draw(jax.random.key(0, impl=impl)[None], log_p).sum()
    low, high = scipy.stats.poisson.interval(0.99, count * p * 2**16)
    assert low <= found <= high


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (MaskedProcess, {"num_codes": 0}, "num_codes is 0; it must be at least 1"),
        (MaskedProcess, {"schedule": "line"}, "schedule is 'line'; choose one of linear, cosine"),
        (MaskedSampler, {"steps": 0}, "steps is 0; it must be at least 1"),
        (MaskedSampler, {"truncation": 1.5}, "truncation is 1.5; it must lie in"),
        (MaskedSampler, {"reveal": "purity"}, "reveal is 'purity'; choose one of posterior, conf"),
        (MaskedSampler, {"spacing": "even"}, "spacing is 'even'; choose one of linear, cosine"),
        (MaskedSampler, {"confidence_temperature": -1.0}, "confidence_temperature is -1.0"),
    ],
)
def test_wrong_fields_are_named(cls, fields, message):
    process = {"num_codes": CODES}
    if cls is MaskedSampler:
        process = {"process": MaskedProcess(**process), "steps": 10}
    with pytest.raises(ValueError, match=message):
        cls(**process | fields)
