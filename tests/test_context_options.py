"""Tests of what context prediction can vary: grids, windows, targets, costs, draws and its end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from scipy.optimize import linear_sum_assignment

from conprediff_jax import context
from conprediff_jax.context import grids, weighting


def prediction(**overrides):
    functions = {"share": lambda t: t / 10, "alpha_bar": lambda t: 1 - (t + 1) / 11}
    settings = {"hidden": 8, "latent": 4, "strides": (1,), "transport": "exact", "weight": 1.0}
    return context.ContextPrediction(**(functions | settings | overrides))


def points(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def constant(params, value):
    """Parameters of a decoder that answers `value` in every channel, whatever it reads."""
    outputs = {name: layer for name, layer in params.items() if name.startswith("out")}
    last = {name for name in outputs if name != "out_hidden"}
    return params | {
        name: {
            "kernel": jnp.zeros_like(outputs[name]["kernel"]),
            "bias": jnp.full_like(outputs[name]["bias"], value),
        }
        for name in last
    }


def distance(term, x_0, h=None, value=0.3):
    """The distances of a decoder with a constant answer; and those of random parameters with h."""
    h = jnp.asarray(points(*x_0.shape[:-1], 4) if h is None else h)
    arranged, target = jax.eval_shape(term.arranged, h, x_0)
    params = term.init(
        jax.random.key(0),
        features=arranged.shape[-1],
        channels=target.shape[-1],
        dimensions=target.ndim - 2,
    )
    rngs = jax.random.split(jax.random.key(1), len(x_0))
    params = params if value is None else constant(params, value)
    return term.loss(params, h, jnp.asarray(x_0), jnp.zeros(len(x_0), int), rngs).distance


# --- grids ----------------------------------------------------------------------------------------


def test_values_are_brought_up_as_scipy_does():
    values = points(2, 3 * 2, 5)
    at = jnp.tile(jnp.arange(6 * 8), (2, 1))
    bring_up = jax.jit(functools.partial(grids.bring_up, cells=(3, 2), grid=(6, 8)))
    found = bring_up(jnp.asarray(values), at)
    for example, mine in zip(values.reshape(2, 3, 2, 5), found.reshape(2, 6, 8, 5), strict=True):
        for channel in range(5):
            expected = scipy.ndimage.zoom(
                example[..., channel], (2, 4), order=1, mode="nearest", grid_mode=True
            )
            np.testing.assert_allclose(mine[..., channel], expected, atol=1e-5)


@pytest.mark.parametrize("cells", [(4,), (2, 3), (2, 1, 2)])
def test_pooling_and_spreading_on_grids_of_any_dimension(cells):
    grid = tuple(2 * size for size in cells)
    x = points(2, *grid, 3)
    found = grids.pooled(jnp.asarray(x), cells)
    h = points(2, *cells, 3 * 2 ** len(cells))
    spread = grids.spread(jnp.asarray(h), grid)
    for cell in np.ndindex(*cells):
        box = tuple(slice(2 * place, 2 * place + 2) for place in cell)
        every = (slice(None), *box)
        np.testing.assert_allclose(
            found[(slice(None), *cell)], x[every].reshape(2, -1, 3).mean(1), atol=1e-6
        )
        np.testing.assert_array_equal(
            np.asarray(spread)[every].reshape(2, -1), h[(slice(None), *cell)]
        )
    with pytest.raises(ValueError, match="the first must be the same as the second, or divide it"):
        grids.box((3, *cells[1:]), grid)


def test_a_dense_layer_of_windows_is_a_convolution():
    h, kernel = points(2, 4, 5, 3), points(3, 3, 3, 6, seed=1)
    at = jnp.asarray([[0, 7, 19], [4, 12, 13]])
    gathered = grids.windows(jnp.asarray(h.reshape(2, 20, 3)), at, grid=(4, 5), side=3)
    found = gathered.reshape(2, 3, 27) @ kernel.reshape(27, 6)
    convolved = jax.lax.conv_general_dilated(
        h, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(2, 20, 6)
    np.testing.assert_allclose(found, np.take_along_axis(convolved, at[..., None], 1), atol=1e-4)


@pytest.mark.parametrize("coarse_tap", ["up", "pool", "spread"])
@pytest.mark.parametrize("decoder", ["distribution", "direct"])
def test_gradients_of_a_coarse_tap_reach_every_cell_and_the_whole_decoder(coarse_tap, decoder):
    term = prediction(coarse_tap=coarse_tap, decoder=decoder, kernel=3, depth=2)
    h, x_0 = jnp.asarray(points(2, 3, 2, 8)), jnp.asarray(points(2, 6, 4, 3))
    arranged, target = term.arranged(h, x_0)
    params = term.init(jax.random.key(0), features=arranged.shape[-1], channels=3)
    rngs = jax.random.split(jax.random.key(1), 2)

    def loss(params, h):
        return term.loss(params, h, x_0, jnp.array([0, 5]), rngs).weighted.mean()

    of_params, of_h = jax.jit(jax.grad(loss, (0, 1)))(params, h)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_params))
    assert (np.abs(of_h).max(-1) > 0).all()
    assert target.shape == {"pool": (2, 3, 2, 3)}.get(coarse_tap, (2, 6, 4, 3))
    width = {"spread": 2}.get(coarse_tap, 8)
    assert params["trunk"]["in"]["kernel"].shape == (9 * width, 8)


# --- targets, costs and draws ---------------------------------------------------------------------


def test_the_smooth_cost_equals_scipys_matching():
    y, t = points(3, 6, 2), 2 * points(3, 6, 2, seed=1)
    found = jax.jit(functools.partial(context.TRANSPORTS["exact"], cost="smooth_l1"))(y, t)
    for value, y_, t_ in zip(found, y, t, strict=True):
        gap = np.abs(y_[:, None] - t_[None])
        cost = np.where(gap < 1, gap**2 / 2, gap - 0.5).mean(-1)
        rows, columns = linear_sum_assignment(cost)
        assert value == pytest.approx(cost[rows, columns].mean(), rel=1e-5)


def test_differences_ignore_an_offset_and_normalised_targets_a_scale_as_well():
    x_0 = points(2, 4, 4, 3)
    moved = 2 * x_0 + np.array([1, -2, 3], np.float32)
    for target, same in {"difference": x_0 * 2, "normalised": x_0}.items():
        term = prediction(target=target)
        found = distance(term, moved)
        np.testing.assert_allclose(found, distance(term, same), rtol=1e-4)
        assert np.abs(found - distance(prediction(), moved)).min() > 0.1
    # The decoder answers 0: its distance is the mean square of the differences to all neighbours.
    term = prediction(target="difference", decoder="direct")
    corner = np.array([x_0[0, 0, 1], x_0[0, 1, 0], x_0[0, 1, 1]]) - x_0[0, 0, 0]
    only = distance(term, x_0[:1, :2, :2], value=0.0)
    window = x_0[0, :2, :2].reshape(4, 3)
    pairs = (window[:, None] - window[None]).reshape(16, 3)
    assert only == pytest.approx(np.square(pairs).sum() / 3 / 12, rel=1e-5)
    assert np.square(corner).mean() > 0


def test_masked_borders_leave_out_points_with_too_few_neighbours():
    x_0 = points(2, 3, 3, 2)  # only the middle one has eight neighbours
    around = np.delete(x_0.reshape(2, 9, 2), 4, axis=1)
    expected = np.square(0.3 - around).mean((1, 2))
    masked = distance(prediction(border="masked"), x_0)
    np.testing.assert_allclose(masked[:, 0], expected, rtol=1e-5)
    assert np.abs(masked - distance(prediction(), x_0)).min() > 1e-4
    with pytest.raises(ValueError, match=r"no point of a grid of .* has samples=8 neighbours"):
        distance(prediction(border="masked"), x_0[:, :2])


def test_several_draws_of_noise_scatter_less_about_the_same_mean():
    x_0 = np.repeat(points(1, 3, 3, 2), 200, axis=0)
    h = np.repeat(points(1, 3, 3, 4), 200, axis=0)
    one, four = (
        np.asarray(distance(prediction(draws=draws, points_per_example=1), x_0, h, value=None))
        for draws in (1, 4)
    )
    error = np.sqrt(one.var() / len(one) + four.var() / len(four))
    assert abs(one.mean() - four.mean()) < 4 * error
    assert four.var() < one.var()


# --- when -----------------------------------------------------------------------------------------


def test_a_term_that_stops_falls_along_half_a_cosine():
    falling = jax.jit(prediction(stop_step=0.25, fall_off=0.5, steps=40).falling)
    found = [float(falling(step, {})) for step in range(40)]
    progress = np.clip((np.arange(40) - 10) / 20, 0, 1)
    np.testing.assert_allclose(found, (1 + np.cos(np.pi * progress)) / 2, atol=1e-6)
    assert found[30] == 0  # exactly, as then nothing is computed
    at_once = prediction(stop_step=0.25, steps=40)
    assert [float(at_once.falling(jnp.int32(step), {})) for step in (9, 10)] == [1, 0]
    assert float(prediction().falling(jnp.int32(7), {})) == 1


def test_the_term_stops_once_the_average_cosine_is_low_and_the_warm_up_over():
    term = prediction(
        **{"auto": True, "cosine_every": 2, "auto_threshold": 0.1, "fall_off": 0.1},
        **{"warmup_steps": 9, "steps": 100},
    )
    cosines = np.linspace(0.5, -1.5, 80)
    state, averages, total, count, stopped = term.init_state(), [], 0.0, 0.0, None
    remember = jax.jit(term.remember)
    for step, cosine in enumerate(cosines.astype(np.float32)):
        state = remember(state, step, cosine)
        if step % 2 == 0 and step > 0 and (stopped is None or step < stopped + 10):
            total, count = 0.9 * total + 0.1 * cosine, 0.9 * count + 0.1
            if stopped is None and total / count < 0.1 and step >= 9:
                stopped = step + 1
        averages.append(float(weighting.average(state)))
    assert averages[-1] == pytest.approx(total / count, abs=1e-5)
    assert stopped is not None and float(state["stopped"]) == stopped
    falling = [float(term.falling(jnp.int32(stopped + more), state)) for more in (0, 5, 10)]
    np.testing.assert_allclose(falling, [1, 0.5, 0], atol=1e-6)
    assert not term.measures(jnp.int32(98), state)
