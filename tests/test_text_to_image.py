"""Tests of captions in the trainer: vocabulary, encoder, null text, guidance and prompts."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny
import torch
import transformers
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from conprediff_jax import config as config_lib
from conprediff_jax.common import images as images_lib
from conprediff_jax.common.errors import ConfigError, UserError
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.config.vocabulary import with_vocabulary
from conprediff_jax.diffusion.gaussian import GaussianProcess
from conprediff_jax.diffusion.guidance import Guidance
from conprediff_jax.runs import restore
from conprediff_jax.runs.checkpoint import newest_config
from conprediff_jax.runs.classes import with_stored_vocabulary
from conprediff_jax.sampling.generate import generate_batches, make_generate
from conprediff_jax.sampling.model import Condition
from conprediff_jax.train import frozen
from conprediff_jax.train.loop import train

pytestmark = pytest.mark.usefixtures("one_device")

CAPTIONS = ["a red square", "a blue square", "a red dot", "a blue dot and more words than fit here"]
SMALL = {"length": 8, "width": 16, "num_layers": 1, "num_heads": 2, "hidden": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared data set of pictures with captions."""
    values = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(8, 8, 3)), "caption": tfds.features.Text()}
    )
    examples = [(i, {"image": x, "caption": CAPTIONS[i % 4]}) for i, x in enumerate(values)]
    builder = tfds.dataset_builders.store_as_tfds_dataset(
        name="squares",
        version="1.0.0",
        features=features,
        split_datasets={"train": examples},
        data_dir=str(tmp_path_factory.mktemp("tfds")),
        file_format="array_record",
    )
    return str(builder.data_path)


@pytest.fixture(scope="module")
def config(folder):
    config = tiny.get_config().unlock()
    config.data.update(name=folder, text="caption", flip=False)
    config.text = config_lib.text(
        "bert", vocab_size=64, head_channels=8, prompts=("a red dot", "a blue square"), **SMALL
    )
    config.condition.dropout = 0.3
    config.model.update(attention_downsampling=(1,), head_channels=16)
    config.sampling.guidance = 2.0
    return config.lock()


def changed(config, **overrides):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(overrides)
    return config


@pytest.fixture(scope="module")
def finished(config, one_device, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(config, str(workdir))


def test_a_run_goes_on_with_its_vocabulary_whatever_the_data_say_now(finished, config):
    stored = restore.load_experiment(str(finished[0])).task.model.text.vocabulary
    newest = newest_config(str(finished[0]))
    assert with_stored_vocabulary(config, newest).text.vocabulary == stored
    assert with_stored_vocabulary(config, None).text.vocabulary == ""
    beginning = changed(config, **{"train.init_from": str(finished[0])})
    assert with_stored_vocabulary(beginning, None).text.vocabulary == stored


def randomised(model):
    """Parameters that are all nonzero, so that a caption affects the output."""
    params, frozen = jax.jit(model.init)(0)
    return jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), x.shape) / 5, params
    ), frozen


def test_a_checkpoint_carries_vocabulary_and_encoder(finished, tmp_path):
    workdir, state = finished
    mesh = tiny.mesh_of()
    model, params, frozen, *_ = restore.load(str(workdir), mesh)
    assert frozen == {} and {"text_encoder"} < set(params)
    tiny.assert_same(params, state.ema)
    assert model.tokenizer(["a red dot"]).shape == (1, 8)
    with pytest.raises(UserError, match="'ψ'"):
        model.tokenizer.check("a red ψ dot")
    generate = make_generate(model, model.sampling, mesh)
    texts = model.tokenizer(CAPTIONS[:3])
    drawn = np.concatenate(
        list(generate_batches(generate, params, frozen, seed=0, num=3, batch_size=2, texts=texts))
    )
    assert drawn.shape == (3, 8, 8, 3)
    grid = images_lib.captioned(drawn, CAPTIONS[:3])
    assert grid.shape[:1] + grid.shape[2:] == (3, 96, 3) and grid.shape[1] > 96
    np.testing.assert_array_equal(grid[:, :96:12, ::12], drawn)


def test_the_encoder_is_trained_along(finished, config):
    model = make_experiment(with_vocabulary(config)).task.model
    initial = jax.jit(model.init)(config.seed)[0]["text_encoder"]
    trained = finished[1].params["denoiser"]["text_encoder"]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), initial, trained)
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize("null", ["learned", "empty"])
def test_guidance_is_between_the_caption_and_no_caption(config, null):
    model = make_experiment(with_vocabulary(changed(config, **{"condition.null": null}))).task.model
    params, frozen = randomised(model)
    assert ("null_text" in params) == (null == "learned")
    x_t = jax.random.normal(jax.random.key(0), (2, *model.point_shape))
    t = jnp.array([3, 15])
    text = model.encode_text(params, frozen, jnp.asarray(model.tokenizer(CAPTIONS[:2])))
    empty = model.encode_text(params, frozen, jnp.asarray(model.tokenizer([""])))
    condition = Condition(text=text, empty=empty)
    conditional = model.denoise(params, x_t, t, condition).output
    if null == "learned":
        every = jnp.ones(2, bool)
        unconditional = model.denoise(params, x_t, t, condition, unconditional=every).output
    else:
        nothing = Condition(text=jnp.concatenate([empty, empty]))
        unconditional = model.denoise(params, x_t, t, nothing).output
    assert np.abs(conditional - unconditional).max() > 1e-3
    guided = model.predict(params, x_t, t, condition, Guidance(scale=3.0))
    np.testing.assert_allclose(guided, unconditional + 3 * (conditional - unconditional), atol=1e-3)
    # Of 20 times, those from 5 to 14 are guided: first neither of the two times, then one of them.
    interval = Guidance(scale=3.0, interval=(0.25, 0.75))
    limited = jax.jit(functools.partial(model.predict, guidance=interval))
    outside = limited(params, x_t, t, condition)
    np.testing.assert_allclose(outside, conditional, atol=1e-5)
    mixed = limited(params, x_t, jnp.array([3, 14]), condition)
    np.testing.assert_allclose(mixed[0], conditional[0], atol=1e-5)
    later = model.predict(params, x_t, jnp.array([3, 14]), condition, Guidance(scale=3.0))
    np.testing.assert_allclose(mixed[1], later[1], atol=1e-3)


def test_rescaled_guidance_is_that_of_diffusers():
    conditional, unconditional = (
        np.random.default_rng(0).normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    )
    guidance = Guidance(scale=5.0, rescale=0.7)
    process = GaussianProcess()
    found = process.guide(jnp.asarray(conditional), jnp.asarray(unconditional), guidance)
    noise, text = (
        torch.from_numpy(unconditional + 5 * (conditional - unconditional)),
        torch.from_numpy(conditional),
    )
    expected = rescale_noise_cfg(noise, text, guidance_rescale=0.7).numpy()
    # diffusers divides by n - 1 in both deviations, which cancels.
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_frozen_encoder_comes_from_its_folder(config, tmp_path):
    """The encoder is CLIP's, as `transformers` writes it. Without a tokenizer it is refused."""
    clip = transformers.CLIPTextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    transformers.CLIPTextModel(clip).save_pretrained(tmp_path)
    vocabulary = with_vocabulary(config).text.vocabulary
    config = changed(config).unlock()
    config.text = config_lib.text("clip", weights=str(tmp_path), vocab_size=64, **SMALL)
    with pytest.raises(ConfigError, match=r"config.text.tokenizer is empty: the frozen encoder"):
        with_vocabulary(config)
    config.text.vocabulary = vocabulary
    experiment = make_experiment(with_vocabulary(config.lock()))
    task_state = frozen.prepare(experiment.task, lambda: iter(()))
    batch = {
        "image": np.zeros((8, 8, 8, 3), np.uint8),
        "text": experiment.task.tokenizer(CAPTIONS * 2),
    }
    state, trace = tiny.run_steps(
        experiment, tiny.mesh_of(2), batch, steps=2, task_state=task_state
    )
    assert "text_encoder" not in state.params["denoiser"]
    tiny.assert_same(
        state.task_state["frozen"]["text_encoder"], task_state["frozen"]["text_encoder"]
    )
    assert np.isfinite(trace[-1]["loss"])
    config.text.encoder.width = 32
    (tmp_path / "config.json").write_text(json.dumps(clip.to_dict()))
    wrong = make_experiment(with_vocabulary(config)).task
    with pytest.raises(UserError, match=r"config.text.weights is .*: width 16 there, 32 here"):
        frozen.prepare(wrong, lambda: iter(()))


def test_contradictory_configs_are_refused(config):
    for overrides, message in [
        ({"model.num_classes": 3}, "a model has one condition"),
        ({"condition.null": "none"}, "config.condition.null is 'none'"),
        ({"data.text": None}, r"config.data: text is None"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make_experiment(with_vocabulary(changed(config, **overrides)))
    wrong = changed(config).unlock()
    wrong.text.kind = "gpt"
    with pytest.raises(ConfigError, match=r"config.text.kind is 'gpt': choose one of"):
        make_experiment(wrong)
