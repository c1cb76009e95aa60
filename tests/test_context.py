"""Tests of context prediction against brute force, SciPy and POT, and of its properties."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import ot
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.stats import chisquare

from conprediff_jax import context
from conprediff_jax.context import transport

pytestmark = pytest.mark.every_python


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def brute_neighbors(grid, stride, point):
    """Flat indices of the true neighbours, by looking at every point of the grid."""
    centre = np.array(np.unravel_index(point, grid))
    distance = [np.abs(np.array(other) - centre).max() for other in np.ndindex(*grid)]
    return {i for i, d in enumerate(distance) if 0 < d <= stride}


def draw(rngs, points, **window):
    return np.asarray(jax.jit(functools.partial(context.draw_neighbors, **window))(rngs, points))


def distances(name, **settings):
    return jax.jit(functools.partial(context.TRANSPORTS[name], **settings))


GRIDS = [(7,), (5, 6), (3, 4, 3), (1, 5)]


# --- neighbourhoods -------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
def test_neighbors_are_the_true_ones_on_any_grid(grid):
    strides, num_points = (1, 2, 3), int(np.prod(grid))
    points = jnp.arange(num_points)[None]
    # With Q far above the size of the largest neighbourhood, stratification draws every neighbour.
    drawn = draw(keys(1), points, grid=grid, strides=strides, samples=400)
    in_order = {
        s: jax.device_get(context.ordered_neighbors(points, grid=grid, stride=s)) for s in strides
    }
    for (s, stride), point in itertools.product(enumerate(strides), range(num_points)):
        truth = brute_neighbors(grid, stride, point)
        assert set(drawn[0, point, s].tolist()) == truth
        assert context.neighbor_counts(grid, stride).reshape(-1)[point] == len(truth)
        ordered, valid = (a[0, point] for a in in_order[stride])
        assert ordered[valid].tolist() == sorted(truth)
        assert len(ordered) == (2 * stride + 1) ** len(grid) - 1


def test_with_as_many_samples_as_neighbors_each_is_drawn_once():
    centre = jnp.full((50, 1), 12)
    drawn = draw(keys(50), centre, grid=(5, 5), strides=(1,), samples=8)
    assert (np.sort(drawn[:, 0, 0]) == sorted(brute_neighbors((5, 5), 1, 12))).all()


@pytest.mark.parametrize("point", [0, 2, 12])  # corner, border, inside: 8, 14, 24 neighbours
def test_every_neighbor_is_drawn_equally_often(point):
    points = jnp.full((4000, 1), point)
    drawn = draw(keys(4000), points, grid=(5, 5), strides=(2,), samples=5)
    _, counts = np.unique(drawn, return_counts=True)
    assert len(counts) == len(brute_neighbors((5, 5), 2, point))
    assert chisquare(counts).pvalue > 1e-3


def test_grids_without_neighbors_are_refused():
    with pytest.raises(ValueError, match="no neighbours"):
        context.neighbor_counts((1, 1), 1)


# --- transport ------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 48])
def test_exact_equals_scipy_and_pot(channels):
    y, t = normal(6, 8, channels), normal(6, 8, channels, seed=1)
    found = distances("exact")(y, t)
    for i in range(6):
        cost = ot.dist(np.asarray(y[i], np.float64), np.asarray(t[i], np.float64)) / channels
        assert found[i] == pytest.approx(cost[linear_sum_assignment(cost)].mean(), rel=1e-5)
        assert found[i] == pytest.approx(ot.emd2([], [], cost), rel=1e-5)


def test_sinkhorn_equals_pot_and_approaches_exact():
    y, t = normal(64, 8, 3), normal(64, 8, 3, seed=1)
    exact = distances("exact")(y, t)
    default = distances("sinkhorn")(y, t)
    assert jnp.mean(jnp.abs(default / exact - 1)) < 0.05  # the default setting's promise
    converged = distances("sinkhorn", epsilon=0.05, iterations=500)(y, t)
    for i in range(4):
        cost = ot.dist(np.asarray(y[i], np.float64), np.asarray(t[i], np.float64)) / 3
        plan = ot.sinkhorn([], [], cost, 0.05 * cost.mean(), stopThr=1e-9, numItermax=5000)
        assert converged[i] == pytest.approx((plan * cost).sum(), rel=1e-3)


def test_gaussian_equals_the_bures_distance():
    y, t = normal(50, 4), 1 + 0.3 * normal(50, 4, seed=1)
    found = distances("gaussian")(y, t)
    y, t = np.asarray(y, np.float64), np.asarray(t, np.float64)
    bures = ot.gaussian.bures_wasserstein_distance(
        y.mean(0), t.mean(0), np.diag(y.var(0)), np.diag(t.var(0))
    )
    assert found == pytest.approx(bures**2 / 4, rel=1e-4)


def test_divergence_vanishes_for_equal_sets_where_plain_sinkhorn_does_not():
    y = normal(16, 8, 3)
    shuffled = y[:, ::-1]
    assert jnp.abs(distances("sinkhorn_divergence")(y, shuffled)).max() < 1e-5
    biased = [
        distances("sinkhorn", epsilon=e, iterations=200)(y, shuffled).mean()
        for e in (0.5, 0.1, 0.02)
    ]
    assert biased[0] > 10 * biased[1] > 100 * jnp.abs(biased[2])
    assert jnp.abs(distances("exact")(y, shuffled)).max() < 1e-6


@pytest.mark.parametrize("name", context.TRANSPORTS)
def test_order_of_the_points_does_not_matter(name):
    distance = distances(name)
    y, t = normal(2, 5, 8, 3), normal(2, 5, 8, 3, seed=1)
    np.testing.assert_allclose(distance(y, t), distance(y[:, :, ::-1], t), rtol=1e-4)
    np.testing.assert_allclose(distance(y, t), distance(y, jnp.roll(t, 3, 2)), rtol=1e-4)


@pytest.mark.parametrize("name", context.TRANSPORTS)
def test_gradients_are_finite_wherever_points_fall(name):
    distance = distances(name)
    y = normal(8, 3)
    far = y.at[0].set(1e3)  # one point far from all: its kernel row underflows
    sets = {
        "identical": (y, y),
        "all one point": (jnp.ones((8, 3)), jnp.ones((8, 3))),
        "predictions coincide": (jnp.zeros((8, 3)), y),
        "targets coincide": (y, jnp.zeros((8, 3))),
        "an outlier": (far, y),
        "tiny": (1e-20 * y, 1e-20 * y[::-1]),
    }
    batch = [jnp.stack(side) for side in zip(*sets.values(), strict=True)]
    for dtype, channels in itertools.product((jnp.float32, jnp.bfloat16), (3, 1)):
        a, b = (side[..., :channels].astype(dtype) for side in batch)
        value, grad = jax.value_and_grad(lambda a, b=b: distance(a, b).sum())(a)
        assert np.isfinite(value) and value.dtype == jnp.float32
        finite = np.isfinite(np.asarray(grad, np.float32)).all((1, 2))
        assert finite.all(), [n for n, ok in zip(sets, finite, strict=True) if not ok]


def test_gradient_of_exact_transport_equals_finite_differences():
    y, t = normal(8, 3), normal(8, 3, seed=1)
    direction = normal(8, 3, seed=2)
    exact = distances("exact")
    slope = jnp.vdot(jax.grad(exact)(y, t), direction)
    ahead, behind = (exact(y + h * direction, t) for h in (1e-3, -1e-3))
    assert float(slope) == pytest.approx(float(ahead - behind) / 2e-3, rel=1e-2)


def test_both_computations_of_the_cost_agree():
    y, t = normal(3, 8, 20), normal(3, 8, 20, seed=1)
    product = transport._squared_distances(y, t)
    np.testing.assert_allclose(
        product, jnp.square(y[:, :, None] - t[:, None]).mean(-1).transpose(1, 2, 0), rtol=1e-4
    )


# --- the loss -------------------------------------------------------------------------------------


def prediction(**overrides):
    settings = {
        "share": lambda t: t / 10,
        "alpha_bar": lambda t: 1 - (t + 1) / 11,
        "hidden": 16,
        "latent": 4,
    }
    return context.ContextPrediction(**(settings | overrides))


def inputs(grid=(6, 6), batch=3, features=5, channels=2):
    h = normal(batch, *grid, features)
    x_0 = normal(batch, *grid, channels, seed=1)
    return h, x_0, jnp.arange(batch) * 4, keys(batch)


@pytest.mark.parametrize("grid", [(9,), (5, 6), (3, 4, 3)])
@pytest.mark.parametrize("decoder", ["distribution", "direct"])
def test_gradients_reach_features_and_decoder_but_not_targets(grid, decoder):
    term = prediction(decoder=decoder, strides=(1, 2))
    h, x_0, t, rngs = inputs(grid)
    params = term.init(jax.random.key(0), features=5, channels=2, dimensions=len(grid))

    @jax.grad
    def gradient(tree):
        return term.loss(tree["params"], tree["h"], tree["x_0"], t, rngs).weighted.mean()

    grads = gradient({"params": params, "h": h, "x_0": x_0})
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads["params"]))
    assert (np.abs(grads["h"]).max(-1) > 0).all()  # every point
    assert not grads["x_0"].any()


def test_random_points_are_an_unbiased_estimate():
    h, x_0, t, _ = inputs(batch=1)
    draws = 400
    h, x_0, t = (jnp.repeat(x, draws, axis=0) for x in (h, x_0, t))
    term = functools.partial(prediction, transport="gaussian")
    params = term().init(jax.random.key(0), features=5, channels=2)
    full = term().loss(params, h, x_0, t, keys(draws)).distance
    some = term(points_per_example=5).loss(params, h, x_0, t, keys(draws, seed=1)).distance
    error = np.sqrt(full.var(0) / draws + some.var(0) / draws)
    assert (np.abs(full.mean(0) - some.mean(0)) < 4 * error).all()
    assert (some.var(0) > full.var(0)).all()  # they are indeed other, fewer points


def test_the_loss_of_an_example_does_not_depend_on_its_batch():
    term = prediction(points_per_example=7)
    h, x_0, t, rngs = inputs()
    params = term.init(jax.random.key(0), features=5, channels=2)
    whole = term.loss(params, h, x_0, t, rngs).distance
    alone = term.loss(params, h[1:2], x_0[1:2], t[1:2], rngs[1:2]).distance
    np.testing.assert_allclose(whole[1:2], alone, rtol=1e-5)


def test_time_weightings_and_stride_weights():
    h, x_0, t, rngs = inputs()
    params = prediction().init(jax.random.key(0), features=5, channels=2)

    def ratio(**settings):
        result = prediction(weight=0.5, **settings).loss(params, h, x_0, t, rngs)
        return result.weighted, result.distance

    alpha_bar = 1 - (np.array([0, 4, 8]) + 1) / 11
    expected = {
        "constant": np.ones(3),
        "signal": alpha_bar,
        "snr": np.minimum(1, alpha_bar / (1 - alpha_bar)),
        "noise": 1 - alpha_bar,
        "bell": 4 * alpha_bar * (1 - alpha_bar),
    }
    for name, factor in expected.items():
        weighted, distance = ratio(time_weighting=name)
        np.testing.assert_allclose(weighted, 0.5 * factor * distance.mean(1), rtol=1e-5)
    weighted, distance = ratio(stride_weights=(1.0, 0.0, 2.0))
    np.testing.assert_allclose(weighted, 0.5 * (distance[:, 0] + 2 * distance[:, 2]), rtol=1e-5)
    assert prediction(warmup_steps=10).warmup(jnp.array(5)) == 0.5
    assert prediction(warmup_steps=0).warmup(jnp.array(0)) == 1


def flops(**settings):
    """Floating-point operations of the loss and its gradients, by XLA's own count."""
    term = prediction(**settings)
    h, x_0, t, rngs = inputs(grid=(12, 12), batch=1)
    params = term.init(jax.random.key(0), features=5, channels=2)
    step = jax.jit(jax.grad(lambda p, h: term.loss(p, h, x_0, t, rngs).weighted.mean(), (0, 1)))
    return step.lower(params, h).compile().cost_analysis()["flops"]


def test_cost_is_flat_in_the_stride_for_the_distribution_decoder_only():
    settings = {"transport": "gaussian"}
    assert flops(strides=(3,), **settings) == pytest.approx(
        flops(strides=(1,), **settings), rel=0.02
    )
    assert flops(strides=(3,), decoder="direct") > 3 * flops(strides=(1,), decoder="direct")


def test_decoder_learns_the_neighbourhood_of_a_pattern():
    """On stripes, a point determines its neighbours, so reading its value must lower the loss."""
    rows = jnp.tile(jnp.array([-1.0, 1.0]), 3)
    x_0 = jnp.broadcast_to(rows[None, :, None, None], (2, 6, 6, 1))
    term = prediction(strides=(1,), transport="exact")
    params = term.init(jax.random.key(0), features=2, channels=1)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def final_loss(h):
        def loss(params, rng):
            rngs = jax.random.split(rng, 2)
            return term.loss(params, h, x_0, jnp.zeros(2, int), rngs).weighted.mean()

        def step(carry, rng):
            params, moments = carry
            value, grads = jax.value_and_grad(loss)(params, rng)
            updates, moments = optimizer.update(grads, moments)
            return (optax.apply_updates(params, updates), moments), value

        return jax.lax.scan(step, (params, optimizer.init(params)), keys(300))[1][-50:].mean()

    # The decoder normalises over channels, so the point's value is given as two opposite ones.
    informed = jnp.concatenate([x_0, -x_0], -1)
    assert final_loss(informed) < 0.75 * final_loss(jnp.zeros_like(informed))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transport": "emd"}, r"transport is 'emd': choose one of .*'sinkhorn'"),
        ({"strides": (0, 1)}, "radii of at least 1"),
        ({"stride_weights": (1.0,)}, "one a stride"),
        ({"weight": -1.0}, "must not be negative"),
        ({"epsilon": 0.0}, "must be positive"),
        ({"kernel": 2}, "kernel is 2: it must be odd"),
        ({"depth": 0}, "depth is 0: it must be at least 1"),
        ({"tap": ("output", "output")}, "tap is .*: name one tap or several, each once"),
        ({"transport": "gaussian", "cost": "smooth_l1"}, "knows 'squared' alone"),
        ({"stop_step": 1.5}, "stop_step is 1.5: it must lie in"),
        ({"stop_step": 0.5}, "steps is 0"),
        ({"fall_off": 0.1, "steps": 9}, "the term never stops; set stop_step below 1, or auto"),
        ({"auto": True}, "auto is True: it needs a cosine"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        prediction(**settings)
