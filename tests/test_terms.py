"""Tests of the terms of the loss: rivals against NumPy, mixing them, and stopping them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.spatial.distance import pdist, squareform

from conprediff_jax.common.errors import ConfigError
from conprediff_jax.config import sections, term
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.objectives import TERMS, Seen

pytestmark = pytest.mark.usefixtures("one_device")

FUNCTIONS = {"share": lambda t: t / 10, "alpha_bar": lambda t: 1 - (t + 1) / 11}


def values(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def seen(**given):
    """A batch of two examples."""
    points = values(2, 4, 4, 3, seed=9)
    plain = {"points": points, "x_t": points, "t": jnp.array([0, 5]), "taps": {}}
    arrays = {
        name: value if callable(value) else jax.tree.map(jnp.asarray, value)
        for name, value in (plain | given).items()
    }
    return Seen(rngs=jax.random.split(jax.random.key(0), 2), **arrays)


def evaluated(kind, batch, params=None, **settings):
    """The distances of the examples, by a weight of 1; parameters are initial ones by default."""
    built = TERMS[kind](**FUNCTIONS, weight=1.0, **settings)
    initial = built.init_params(jax.random.key(0), batch)
    return np.asarray(built.evaluate(params(initial) if params else initial, batch).weighted)


def answering(bias):
    """A function of initial parameters whose head answers `bias`, whatever it reads."""
    return lambda params: (
        params
        | {"out": {"kernel": jnp.zeros_like(params["out"]["kernel"]), "bias": jnp.asarray(bias)}}
    )


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


# --- rivals ---------------------------------------------------------------------------------------


def test_own_point_prediction_is_a_smooth_distance_to_the_point_itself():
    batch = seen(taps={"middle": values(2, 2, 2, 8)}, points=2 * values(2, 4, 4, 3))
    answer = np.array([0.5, -0.2, 0.1], np.float32)
    found = evaluated("own_point", batch, answering(answer), tap="middle", kernel=3, hidden=8)
    gap = np.abs(answer - batch.points)
    expected = np.where(gap < 1, gap**2 / 2, gap - 0.5).mean((1, 2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_ordered_neighbours_are_compared_at_their_places():
    batch = seen(taps={"output": values(2, 4, 4, 8)})
    settings = {"decoder": "direct", "strides": (1,), "hidden": 8}

    def params(initial):
        out = initial["out_0"]
        bias = jnp.arange(out["bias"].size, dtype=jnp.float32) / 10
        return initial | {"out_0": {"kernel": 0 * out["kernel"], "bias": bias}}

    found = evaluated("context", batch, params, **settings)
    errors = [[], []]
    offsets = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
    for example, row, column in np.ndindex(2, 4, 4):
        for place, (i, j) in enumerate(offsets):
            if 0 <= row + i < 4 and 0 <= column + j < 4:
                answer = np.arange(3 * place, 3 * place + 3) / 10
                truth = batch.points[example, row + i, column + j]
                errors[example].append(np.square(answer - truth).mean())
    np.testing.assert_allclose(found, [np.mean(e) for e in errors], rtol=1e-5)


def test_layers_are_aligned_by_their_cosine_and_the_later_one_is_not_moved():
    taps = {"block_1": values(2, 4, 4, 8), "block_2": values(2, 4, 4, 8, seed=1)}
    settings = {"tap": "block_1", "target_tap": "block_2"}
    found = evaluated("layer_alignment", seen(taps=taps), **settings)
    expected = 1 - cosine(taps["block_1"], taps["block_2"]).mean((1, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    built = TERMS["layer_alignment"](**FUNCTIONS, **settings)
    grads = jax.grad(lambda taps: built.evaluate({}, seen(taps=taps)).weighted.sum())(taps)
    assert np.abs(grads["block_1"]).min() > 0 and not grads["block_2"].any()
    narrow = taps | {"block_2": values(2, 4, 4, 5)}
    with pytest.raises(ValueError, match="'block_2', of 5 channels: it needs 8"):
        evaluated("layer_alignment", seen(taps=narrow), **settings)


def test_dispersion_is_the_log_of_the_mean_over_pairs():
    h = values(5, 2, 2, 3)
    batch = seen(taps={"middle": h}, t=jnp.zeros(5, int))
    found = evaluated("dispersion", batch, tap="middle", temperature=0.5)
    squared = squareform(pdist(h.reshape(5, -1).astype(np.float64), "sqeuclidean"))
    expected = np.log(np.exp(-squared / (12 * 0.5)).mean())
    np.testing.assert_allclose(found, np.full(5, expected), rtol=1e-5)


def test_alignment_with_an_encoder_is_a_cosine_to_its_features():
    encoded, answer = values(2, 2, 2, 5, seed=3), values(5, seed=4)
    batch = seen(taps={"output": values(2, 4, 4, 8)}, encoded=encoded)
    settings = {"hidden": 8, "shape": (2, 2, 5)}
    found = evaluated("encoder_alignment", batch, answering(answer), **settings)
    expected = 1 - cosine(answer, encoded).mean((1, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    deviation = encoded.std((1, 2), keepdims=True)
    encoded = (encoded - encoded.mean((1, 2), keepdims=True)) / deviation
    found = evaluated("encoder_alignment", batch, answering(answer), normalised=True, **settings)
    np.testing.assert_allclose(found, 1 - cosine(answer, encoded).mean((1, 2)), rtol=1e-3)


@pytest.mark.parametrize("num_codes", [None, 7])
def test_a_share_of_the_input_is_hidden_in_cells(num_codes):
    read = []
    x_t = values(2, 4, 4, 3) if num_codes is None else np.zeros((2, 4, 4), int)
    batch = seen(x_t=x_t, denoising_loss=lambda x: read.append(np.asarray(x)) or jnp.ones(2))
    settings = {"hidden_share": 0.5, "cell": 2, "num_codes": num_codes}
    np.testing.assert_allclose(evaluated("masked_input", batch, **settings), 1)
    hidden = read[0] == num_codes if num_codes else (read[0] == 0).all(-1)
    np.testing.assert_array_equal(hidden.sum((1, 2)), 8)
    cells = hidden.reshape(2, 2, 2, 2, 2).swapaxes(2, 3).reshape(8, 4)
    assert (cells.all(1) | ~cells.any(1)).all()
    np.testing.assert_array_equal(read[0][~hidden], x_t[~hidden])


# --- in training ----------------------------------------------------------------------------------


def config_of(**context):
    config = tiny.get_config()
    config.context.update(**context)
    return config


def batch(size=8):
    images = np.random.default_rng(1).integers(0, 256, (size, 8, 8, 3), np.uint8)
    return {"image": jnp.asarray(images)}


def stepped(config, step=0):
    task = make_experiment(config).task
    params, state = jax.jit(task.init)()
    last = params["denoiser"]["output_conv"]  # initially 0, so that no gradient would pass it
    last["kernel"] = jnp.asarray(0.1 * values(*last["kernel"].shape))
    return params, jax.jit(task.step)(params, state, batch(), jnp.int32(step))


def test_any_mix_of_terms_trains_and_each_reaches_what_it_reads():
    config = config_of(tap=("middle", "output"), samples=2, iterations=2).unlock()
    config.train.microbatches = 2
    config.terms.own = term("own_point", tap="down_0", hidden=8)
    config.terms.apart = term("dispersion", tap="middle")
    config.terms.layers = term("layer_alignment", tap="down_0", target_tap="up_0")
    config.terms.hidden = term("masked_input", weight=0.5)
    config.terms.unused = term("dispersion", weight=0.0)
    params, done = stepped(config, step=250)  # within the warm-up
    assert set(params) == {"denoiser", "context", "own", "hidden"}
    assert set(params["context"]) == {"middle", "output"}
    losses = [f"loss/{name}" for name in ("context", "own", "apart", "layers", "hidden")]
    total = sum(float(done.metrics[name]) for name in ("loss/denoise", *losses))
    assert float(done.metrics["loss"]) == pytest.approx(total, rel=1e-5)
    assert {"distance/middle/stride_1", "own/distance"} <= set(done.metrics)
    for name in ("own", "hidden", "context"):
        assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(done.grads[name])), name
    assert set(done.task_state) == {"frozen", "history"}


def test_the_cosine_is_that_of_two_gradients_and_a_stopped_term_leaves_no_gradient():
    settings = {"weight": 0.5, "tap": ("middle",)}
    _, whole = stepped(config_of(**settings))
    _, plain = stepped(config_of(weight=0.0))
    _, measured = stepped(config_of(**settings, cosine_every=1))
    for a, b in zip(*(jax.tree.leaves(d.grads) for d in (whole, measured)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)

    below = [name for name in plain.grads["denoiser"] if not name.startswith(("up_", "output_"))]

    def flat(gradient):
        leaves = jax.tree.leaves([gradient["denoiser"][name] for name in below])
        return np.concatenate([np.ravel(leaf) for leaf in leaves])

    expected = cosine(flat(whole.grads) - flat(plain.grads), flat(plain.grads))
    assert float(measured.metrics["cosine/context"]) == pytest.approx(float(expected), abs=1e-3)
    _, stopped = stepped(config_of(**settings, stop_step=0.5), step=3)
    _, same = stepped(config_of(weight=0.0), step=3)
    assert not any(leaf.any() for leaf in jax.tree.leaves(stopped.grads["context"]))
    assert float(stopped.metrics["loss/context"]) == 0
    for name, leaf in same.grads["denoiser"].items():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            leaf,
            stopped.grads["denoiser"][name],
        )


def test_taps_leave_no_trace_in_what_samples():
    def program(**context):
        model = make_experiment(config_of(**context)).task.model
        params = jax.eval_shape(lambda: model.init(0)[0])
        x, t, _ = model.example()
        return str(jax.make_jaxpr(model.predict)(params, x, t)), params

    assert program(tap=("middle", "up_0")) == program(weight=0.0)


def test_terms_are_set_by_keys_and_wrong_ones_are_named():
    config = tiny.get_config()
    sections.override(config, "terms.own", "own_point")
    sections.override(config, "terms.own.tap", "middle")
    sections.override(config, "context.tap", "('down_0', 'middle')")
    task = make_experiment(config).task
    assert task.terms["own"].tap == "middle" and task.taps == ("down_0", "middle")
    with pytest.raises(ConfigError, match=r"config.terms.x.kind is 'own': choose one of \('cont"):
        sections.override(config, "terms.x", "own")
    with pytest.raises(ConfigError, match=r"config.terms has no entry 'x': set config.terms.x to"):
        sections.override(config, "terms.x.tap", "middle")
    sections.override(config, "terms.own.tap", "midle")
    with pytest.raises(ConfigError, match=r"config.terms.own.tap is 'midle': did you mean 'middl"):
        make_experiment(config)
    config.context.tap = ("block_1",)
    with pytest.raises(ConfigError, match=r"config.context.tap is 'block_1': .*down_0, middle"):
        make_experiment(config)


def test_a_run_of_a_dit_with_a_tap_of_its_own_opens_as_it_was():
    config = tiny.get_config().unlock()
    model = {"kind": "dit", "patch": 1, "width": 16, "num_layers": 2, "num_heads": 2, "tap": 1}
    config.model = model
    task = make_experiment(config).task
    assert task.taps == ("block_1",) and task.context.coarse_tap == "spread"
