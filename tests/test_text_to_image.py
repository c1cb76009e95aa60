"""Captions as a condition in the trainer: vocabulary, encoder, null, guidance, prompts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny
import transformers

from conprediff_jax import config as config_lib
from conprediff_jax import images as images_lib
from conprediff_jax import inference, sampling
from conprediff_jax.errors import ConfigError, UserError
from conprediff_jax.experiment import make_experiment
from conprediff_jax.train.loop import train
from conprediff_jax.train.text import with_vocabulary

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


def randomised(task):
    """Parameters none of which is zero, so that a caption reaches the output."""
    params, extra = jax.jit(task.init)()
    params = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), x.shape) / 5, params["denoiser"]
    )
    return params, extra["frozen"]


def test_a_checkpoint_carries_vocabulary_and_encoder(finished, tmp_path):
    workdir, state = finished
    mesh = tiny.mesh_of()
    task, params, frozen, _ = inference.load(str(workdir), mesh)
    assert frozen == {} and {"text_encoder"} < set(params)
    tiny.assert_same(params, state.ema)
    assert task.tokenizer(["a red dot"]).shape == (1, 8)
    with pytest.raises(UserError, match="'§'"):
        task.tokenizer.check("a red § dot")
    generate = sampling.make_generate(task, task.sampling, mesh)
    texts = task.tokenizer(CAPTIONS[:3])
    drawn = np.concatenate(
        list(
            sampling.generate_batches(
                generate, params, frozen, seed=0, num=3, batch_size=2, texts=texts
            )
        )
    )
    assert drawn.shape == (3, 8, 8, 3)
    grid = images_lib.captioned(drawn, CAPTIONS[:3])
    assert grid.shape[:1] + grid.shape[2:] == (3, 96, 3) and grid.shape[1] > 96
    np.testing.assert_array_equal(grid[:, :96:12, ::12], drawn)


def test_the_encoder_is_trained_along(finished, config):
    task = make_experiment(with_vocabulary(config)).task
    initial = jax.jit(task.init)()[0]["denoiser"]["text_encoder"]
    trained = finished[1].params["denoiser"]["text_encoder"]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), initial, trained)
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize("null", ["learned", "empty"])
def test_guidance_is_between_the_caption_and_no_caption(config, null):
    task = make_experiment(with_vocabulary(changed(config, **{"condition.null": null}))).task
    params, frozen = randomised(task)
    assert ("null_text" in params) == (null == "learned")
    x_t = jax.random.normal(jax.random.key(0), (2, *task.point_shape))
    t = jnp.array([3, 15])
    text = task.encode_text(params, frozen, jnp.asarray(task.tokenizer(CAPTIONS[:2])))
    empty = task.encode_text(params, frozen, jnp.asarray(task.tokenizer([""])))
    told = task.denoise(params, x_t, t, text=text).output
    if null == "learned":
        alone = task.denoise(params, x_t, t, text=text, unconditional=jnp.ones(2, bool)).output
    else:
        alone = task.denoise(params, x_t, t, text=jnp.concatenate([empty, empty])).output
    assert np.abs(told - alone).max() > 1e-3
    guided = task.predict(params, x_t, t, text=text, empty=empty, guidance=3.0)
    np.testing.assert_allclose(guided, alone + 3 * (told - alone), atol=1e-3)


def test_a_frozen_encoder_comes_from_its_folder(config, tmp_path):
    """CLIP's, as `transformers` writes it, with its tokenizer trained by the run."""
    clip = transformers.CLIPTextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    transformers.CLIPTextModel(clip).save_pretrained(tmp_path)
    config = changed(config).unlock()
    config.text = config_lib.text("clip", weights=str(tmp_path), vocab_size=64, **SMALL)
    experiment = make_experiment(with_vocabulary(config.lock()))
    extra = experiment.task.prepare(lambda: iter(()))
    batch = {
        "image": np.zeros((8, 8, 8, 3), np.uint8),
        "text": experiment.task.tokenizer(CAPTIONS * 2),
    }
    state, trace = tiny.run_steps(experiment, tiny.mesh_of(2), batch, steps=2, extra=extra)
    assert "text_encoder" not in state.params["denoiser"]
    tiny.assert_same(state.extra["frozen"]["text_encoder"], extra["frozen"]["text_encoder"])
    assert np.isfinite(trace[-1]["loss"])
    config.text.encoder.width = 32
    (tmp_path / "config.json").write_text(json.dumps(clip.to_dict()))
    wrong = make_experiment(with_vocabulary(config)).task
    with pytest.raises(UserError, match=r"config.text.weights is .*: width 16 there, 32 here"):
        wrong.prepare(lambda: iter(()))


def test_configs_that_contradict_themselves(config):
    for overrides, message in [
        ({"model.num_classes": 3}, "a model has one condition"),
        ({"condition.null": "none"}, "config.condition: null is 'none'"),
        ({"data.text": None}, r"config.data: text is None"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make_experiment(with_vocabulary(changed(config, **overrides)))
    wrong = changed(config).unlock()
    wrong.text.kind = "gpt"
    with pytest.raises(ConfigError, match=r"config.text: kind is 'gpt': choose one of"):
        make_experiment(wrong)
