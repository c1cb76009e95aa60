"""Tests of discrete models in the trainer: tokens, times, guidance, meshes, resuming."""

import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from conprediff_jax import config as config_lib
from conprediff_jax.common.errors import ConfigError, UserError
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.diffusion.guidance import Guidance
from conprediff_jax.diffusion.masked import MaskedProcess
from conprediff_jax.metrics import denoising_loss
from conprediff_jax.models.autoencoder import VQModel
from conprediff_jax.models.first_stage import Tokens, to_uint8
from conprediff_jax.runs import restore
from conprediff_jax.sampling.generate import make_generate
from conprediff_jax.sampling.model import Condition
from conprediff_jax.sampling.spec import MaskedSampling
from conprediff_jax.train import frozen
from conprediff_jax.train.loop import train

pytestmark = pytest.mark.usefixtures("one_device")

# 8 x 8 images to 4 x 4 tokens of 16 codes.
VQ = {
    "channels": 32,
    "channel_mult": (1, 1),
    "blocks_per_level": 1,
    "middle_attention": False,
    "latent_channels": 4,
    "num_codes": 16,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny.write_autoencoder(tmp_path_factory.mktemp("weights") / "vq", VQModel(**VQ))


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(1).integers(0, 256, (8, 8, 8, 3), np.uint8))


@pytest.fixture(scope="module")
def config(weights, tmp_path_factory):
    config = config_lib.default_discrete(config_lib.tokens(str(weights), **VQ)).unlock()
    base = tiny.get_config()
    for section in ("context", "optimizer", "train"):
        config[section] = base[section]
    folder = tiny.write_images(tmp_path_factory.mktemp("data") / "images")
    config.data.update(name=str(folder), image_size=8)
    config.process.num_steps = 6
    config.model.update(width=32, num_layers=1, num_heads=2)
    config.sampling.update(num=4, steps=3)
    return config.lock()


def make(config, **overrides):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(overrides)
    return make_experiment(config)


def load(stage, *batches):
    loaded = frozen.load(stage, lambda: iter([{"image": batch} for batch in batches]))
    return jax.tree.map(jnp.asarray, loaded)


def loaded(experiment):
    """The task and its state, with the frozen parameters."""
    return frozen.prepare(experiment.task, lambda: iter(()))


def complete(history):
    """A history with ten losses for every time, so that times are drawn by importance."""
    squares = np.linspace(1, 9, 60, dtype=np.float32).reshape(6, 10)
    return history._replace(squares=squares, counts=np.full(6, 10, np.int32))


# --- tokens ---------------------------------------------------------------------------------------


def test_tokens_decode_to_the_autoencoders_reconstruction(weights, images):
    model = VQModel(**VQ)
    stage = Tokens(model=model, weights=str(weights))
    stored = load(stage)
    tokens = stage.encode(stored, jnp.asarray(images))
    assert tokens.shape == (8, 4, 4) and tokens.dtype == jnp.int32
    expected, _ = model.apply({"params": stored["autoencoder"]}, images / 127.5 - 1)
    found = np.asarray(stage.decode(stored, tokens), int)
    assert np.abs(found - np.asarray(to_uint8(expected), int)).max() <= 1


def test_unused_codes_are_left_out(weights, images):
    """Of the codes that these images use, the five most frequent are kept and renumbered."""
    whole = Tokens(model=VQModel(**VQ), weights=str(weights))
    stored = load(whole)
    counts = np.bincount(np.asarray(whole.encode(stored, images)).ravel(), minlength=16)
    stage = Tokens(model=VQModel(**VQ), weights=str(weights), used_codes=5)
    kept = load(stage, images[:4], images[4:])
    codes = np.asarray(kept["codes"])
    assert len(codes) == 5 and list(codes) == sorted(codes)
    assert counts[codes].min() >= np.delete(counts, codes).max()
    tokens = np.asarray(stage.encode(kept, images))
    assert set(tokens.ravel()) <= set(range(5))
    # The nearest of the kept codes, in NumPy.
    latents = np.asarray(stage.encode_unscaled(kept["autoencoder"], images))
    codebook = np.asarray(kept["autoencoder"]["quantizer"]["codebook"])[codes]
    distance = np.square(latents[..., None, :] - codebook).sum(-1)
    np.testing.assert_array_equal(tokens, distance.argmin(-1))


def test_context_vectors_are_the_standardised_codes(weights, images):
    stage = Tokens(model=VQModel(**VQ), weights=str(weights))
    stored = load(stage)
    codebook = np.asarray(stored["autoencoder"]["quantizer"]["codebook"])
    standard = (codebook - codebook.mean(0)) / codebook.std(0)
    tokens = stage.encode(stored, images)
    np.testing.assert_allclose(
        stage.vectors(stored, tokens), standard[np.asarray(tokens)], atol=1e-5
    )
    # For a distribution, the result is the expected vector.
    p = np.random.default_rng(0).dirichlet(np.ones(16), (2, 4, 4)).astype(np.float32)
    np.testing.assert_allclose(stage.vectors(stored, jnp.log(p)), p @ standard, atol=1e-5)


# --- training -------------------------------------------------------------------------------------


def test_every_mesh_and_split_gives_the_same_run(config, images):
    """This holds for times that are drawn by importance too: their history has the same bits."""
    batch = {"image": np.asarray(images)}
    whole = make(config)
    task_state = loaded(whole)
    task_state |= {"history": complete(task_state["history"])}
    state, trace = tiny.run_steps(whole, tiny.mesh_of(), batch, task_state=task_state)
    assert state.task_state["history"].counts.sum() == 60 + 3 * len(images)
    for experiment, mesh in [
        (whole, tiny.mesh_of(4, fsdp=2)),
        (whole, tiny.mesh_of(4, tensor=2)),
        (make(config, **{"train.microbatches": 4}), tiny.mesh_of()),
    ]:
        other, other_trace = tiny.run_steps(experiment, mesh, batch, task_state=task_state)
        np.testing.assert_array_equal(
            state.task_state["history"].counts, other.task_state["history"].counts
        )
        for ours, theirs in zip(trace, other_trace, strict=True):
            for name, value in ours.items():
                np.testing.assert_allclose(theirs[name], value, rtol=1e-5, atol=1e-7)


def test_weighted_losses_have_the_mean_of_uniform_times(config, images):
    """E_p[L / (T p)] is the mean over all times, computed here as an exact sum over times."""
    process = make(config).task.model.process
    history = jax.tree.map(jnp.asarray, complete(process.init_history()))
    p = history.probabilities()
    times = process.sample_time(jax.random.split(jax.random.key(0), 4000), history)
    np.testing.assert_allclose(times.weight, 1 / (6 * p[times.t]), rtol=1e-5)
    frequency = np.bincount(times.t, minlength=6) / 4000
    np.testing.assert_allclose(frequency, p, atol=4 * np.sqrt(0.25 / 4000))


@pytest.mark.parametrize("source", ["features", "prediction"])
def test_context_prediction_reaches_the_denoiser(config, images, source):
    """Context prediction uses `context/` unchanged, and changes nothing else."""
    experiment = make(config, **{"context.source": source, "context.weight": 1.0})
    task_state = loaded(experiment)
    params, _ = jax.jit(experiment.task.init)()
    step = jax.jit(experiment.task.step)(params, task_state, {"image": images}, jnp.int32(0))
    plain = make(config, **{"context.weight": 0.0}).task
    alone = jax.jit(plain.step)(
        {"denoiser": params["denoiser"]}, task_state, {"image": images}, jnp.int32(0)
    )
    np.testing.assert_allclose(alone.metrics["loss"], step.metrics["loss/denoise"], rtol=1e-5)
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), step.grads["denoiser"], alone.grads["denoiser"]
    )
    assert max(jax.tree.leaves(moved)) > 1e-4
    assert set(step.metrics) - set(alone.metrics) == {
        "loss/context",
        "distance/stride_1",
        "distance/stride_2",
    }


def test_a_resumed_run_repeats_the_uninterrupted_one(config, tmp_path):
    """This includes the history and the codes. Sampling does not need the weights' folder."""
    state = train(config, str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole/checkpoints/3", tmp_path / "half/checkpoints/3")
    tiny.assert_same(train(config, str(tmp_path / "half")), state)
    assert state.task_state["history"].counts.sum() == 6 * 8

    mesh = tiny.mesh_of()
    model, params, stage, step, *_ = restore.load(str(tmp_path / "half"), mesh)
    assert step == 6
    spec = model.sampling_with(reveal="purity", purity_weight=1.0, truncation=1.0)
    for sampler in (model.sampling, spec):
        drawn = make_generate(model, sampler, mesh)(params, stage, 0, jnp.arange(4))
        assert drawn.shape == (4, 8, 8, 3) and drawn.dtype == jnp.uint8
    with pytest.raises(UserError, match=r"^eta does not fit this model: .*truncation"):
        model.sampling_with(eta=1.0)
    with pytest.raises(UserError, match=r"^guidance is 2.0: .*config.condition.dropout"):
        model.sampling_with(guidance=2.0)


def test_the_bound_counts_every_time_and_the_prior(config, images):
    """On a model with uniform predictions, against sums over transition matrices in NumPy."""
    model = make(config).task.model
    params = jax.tree.map(jnp.zeros_like, jax.jit(model.init)(0)[0])
    process, frozen_ = model.process, jax.tree.map(jnp.asarray, loaded(make(config)))["frozen"]
    times = process.evaluated_times(20)
    assert list(times) == list(range(6))
    losses = denoising_loss.make_losses(model, tiny.mesh_of(), times)
    batch = {"image": images, "mask": np.ones(8, bool)}
    rows = np.concatenate(
        list(denoising_loss.losses_of(losses, params, frozen_, iter([batch] * 99), 792))
    )
    assert rows.shape == (792, 6)

    one = np.eye(17)[3]
    q = [one, *(one @ matrix for matrix in cumulative(process))]  # of x_t, x_0 being code 3
    expected = np.log(16)  # L_0
    single = [np.linalg.solve(a, b) for a, b in itertools.pairwise(cumulative(process))]
    uniform = np.append(np.full(16, 1 / 16), 0)
    for t in range(1, 6):
        before = cumulative(process)[t - 1]
        for x_t in range(17):
            likelihood = single[t - 1][:, x_t]
            true = one @ before * likelihood
            # p(x_s | x_t) averages the posteriors of every x_0 with p(x_0 | x_t) uniform.
            every = before[:16] * likelihood
            every = (every / every.sum(1, keepdims=True) * uniform[:16, None]).sum(0)
            posterior = true / true.sum()
            some = posterior > 0
            kl = np.sum(posterior[some] * np.log(posterior[some] / every[some]))
            expected += q[t + 1][x_t] * kl
    last, gamma = q[-1], process.gamma_bars[-1]
    expected += np.sum(last * np.log(last / np.append(np.full(16, (1 - gamma) / 16), gamma)))
    bits = denoising_loss.bits_per_token(process, rows)
    error = bits.std() / np.sqrt(len(bits))
    assert bits.mean() == pytest.approx(expected / np.log(2), abs=4 * error)
    assert error < 0.02 * bits.mean()


def test_masked_diffusion_trains_samples_and_has_a_bound(config, images):
    """A model with uniform predictions needs log2 16 = 4 bits a token, by its held-out losses."""
    config = config.copy_and_resolve_references().unlock()
    config.process = config_lib.section(MaskedProcess, kind="masked", importance=True)
    config.sampling = config_lib.section(MaskedSampling, num=4, steps=3, reveal="confidence")
    experiment = make(config.lock())
    task_state, mesh = loaded(experiment), tiny.mesh_of()
    batch = {"image": np.asarray(images)}
    state, trace = tiny.run_steps(experiment, mesh, batch, steps=2, task_state=task_state)
    assert state.task_state["history"].counts.sum() == 2 * 8
    assert all(np.isfinite(value) for metrics in trace for value in metrics.values())
    assert trace[0]["loss/context"] > 0
    model, frozen_ = experiment.task.model, jax.tree.map(jnp.asarray, task_state["frozen"])
    drawn = make_generate(model, model.sampling, mesh)(state.ema, frozen_, 0, jnp.arange(4))
    assert drawn.shape == (4, 8, 8, 3) and len(np.unique(np.asarray(drawn), axis=0)) > 1

    params = jax.tree.map(jnp.zeros_like, state.ema)
    losses = denoising_loss.make_losses(model, mesh, model.process.evaluated_times(50))
    batch |= {"mask": np.ones(8, bool)}
    rows = np.concatenate(
        list(denoising_loss.losses_of(losses, params, frozen_, iter([batch] * 25), 200))
    )
    bits = denoising_loss.bits_per_token(model.process, rows)
    error = bits.std() / np.sqrt(len(bits))
    assert bits.mean() == pytest.approx(4, abs=4 * error) and error < 0.03


def cumulative(process):
    """The 17 x 17 matrices of q(x_t | x_0), row x_0, for every time."""
    matrices = []
    for alpha, beta, gamma in zip(
        process.alpha_bars, process.beta_bars, process.gamma_bars, strict=True
    ):
        matrix = np.zeros((17, 17))
        matrix[:16, :16] = alpha * np.eye(16) + beta
        matrix[:16, 16] = gamma
        matrix[16, 16] = 1
        matrices.append(matrix)
    return matrices


# --- conditions -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conditional(config):
    overrides = {"data.label": "label", "model.num_classes": 3, "condition.dropout": 0.4}
    tokens = make(config, **overrides)
    # With as many groups as channels, a norm would remove what a label adds.
    continuous = make(tiny.get_config(), **overrides, **{"model.scale_shift_norm": True})
    return {"discrete": tokens, "continuous": continuous}


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_guidance_combines_the_two_predictions(conditional, kind):
    model = conditional[kind].task.model
    params = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), x.shape) / 5,
        jax.jit(model.init)(0)[0],
    )
    rngs = jax.random.split(jax.random.key(0), 4)
    x_t, t = model.process.prior(rngs, model.point_shape), jnp.array([5, 3, 2, 0])
    label, every = jnp.array([0, 1, 2, 1]), jnp.ones(4, bool)
    condition = Condition(label=label)
    conditional_output = model.denoise(params, x_t, t, condition).output
    output = model.denoise(params, x_t, t, condition, unconditional=every).output
    # Without its condition, an example does not know its label.
    other = model.denoise(
        params, x_t, t, Condition(label=(label + 1) % 3), unconditional=every
    ).output
    np.testing.assert_array_equal(output, other)
    assert np.abs(output - conditional_output).max() > 1e-3
    predict = {
        s: model.predict(params, x_t, t, condition, Guidance(scale=s)) for s in (0.0, 1.0, 3.0)
    }

    def x_0(output):
        return model.process.predict_x0(output, x_t, t)

    np.testing.assert_allclose(x_0(predict[0.0]), x_0(output), atol=1e-4)
    np.testing.assert_allclose(x_0(predict[1.0]), x_0(conditional_output), atol=1e-4)
    expected = model.process.guide(conditional_output, output, Guidance(scale=3.0))
    np.testing.assert_allclose(predict[3.0], expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_dropped_conditions_train_the_null(conditional, images, kind):
    experiment = conditional[kind]
    params, task_state = jax.jit(experiment.task.init)()
    batch = {"image": images, "label": np.zeros(8, np.int32)}
    task_state = loaded(experiment) or task_state
    grads = jax.jit(experiment.task.step)(params, task_state, batch, jnp.int32(0)).grads["denoiser"]
    table = grads["label_embedding"] if kind == "continuous" else (
        grads["blocks"]["feed_forward_norm"]["index_embedding"]
    )  # fmt: skip
    moved = np.abs(table["embedding"]).max(axis=-1)
    if kind == "discrete":  # the UNet's residual branches start at zero and pass nothing on yet
        moved = moved.max(axis=0)  # of all blocks
        assert moved[0] > 0 and moved[3] > 0
    assert moved.shape == (4,) and not moved[1:3].any()


def test_contradictory_configs_are_refused(config):
    for overrides, message in [
        ({"condition.dropout": 0.1}, "config.condition.dropout is 0.1: there is no condition"),
        ({"first_stage.used_codes": 17}, "config.first_stage.used_codes is 17: .* 1 .. 16"),
        ({"sampling.reveal": "best"}, "config.sampling.reveal is 'best'"),
        ({"sampling.guidance": 2.0}, "config.sampling.guidance is 2.0"),
        ({"data.latents": "somewhere"}, "config.data.latents is 'somewhere'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make(config, **overrides)
    pixels = tiny.get_config().unlock()
    vectors = pixels.copy_and_resolve_references()
    vectors.process = config_lib.section(MaskedProcess, kind="masked")
    vectors.sampling = config_lib.section(MaskedSampling)
    with pytest.raises(ConfigError, match=r"config.process.kind is 'masked', which is not for vec"):
        make_experiment(vectors)
    pixels.first_stage.kind = "tokens"
    with pytest.raises(ConfigError, match=r"there is no section config.first_stage.autoencoder"):
        make_experiment(pixels)
