"""Tests of the Python API: what it draws, how it reports wrong arguments, and seeds."""

import dataclasses
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from quick import environment

from conprediff_jax.common import random
from conprediff_jax.common.errors import FieldError
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.models.denoiser import Denoised
from conprediff_jax.runs.api import Model
from conprediff_jax.sampling.model import TrainedModel

ROOT = pathlib.Path(__file__).parent.parent
LARGEST = 2**32 - 1


def make_model():
    """A tiny model with three classes and random parameters."""
    config = tiny.get_config()
    config.model.num_classes = 3
    diffusion = make_experiment(config).task.model
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32),
        jax.eval_shape(diffusion.init, 0)[0],
    )
    return Model(TrainedModel(diffusion, params, {}, 7), tiny.mesh_of())


@pytest.fixture(scope="module")
def model():
    return make_model()


# --- seeds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 5, 2**31 - 1, 2**31, LARGEST])
def test_a_seed_is_the_low_word_of_threefrys_key(seed):
    """Both outside a compiled program and as its argument, where JAX's own int32 ends at 2^31."""
    key = jax.random.key(random.as_seed(seed))
    np.testing.assert_array_equal(jax.random.key_data(key), np.array([0, seed], np.uint32))
    expected = jax.random.key_data(random.stream(seed, "name", 3))
    traced = jax.jit(lambda seed: random.stream(seed, "name", 3))(random.as_seed(seed))
    np.testing.assert_array_equal(jax.random.key_data(traced), expected)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "1", None, True])
def test_invalid_seeds_are_refused(seed):
    with pytest.raises(FieldError, match=r"^seed is .*: it must be a whole number from 0 to"):
        random.as_seed(seed)


def test_one_image_of_a_seed_can_be_drawn_alone(model):
    """An image keeps its class and does not depend on those before it, for the largest seed too."""
    drawn = model.sample(5, LARGEST, batch_size=1)
    again = model.sample(1, LARGEST, first=4, batch_size=1)
    np.testing.assert_array_equal(again, drawn[4:])
    labelled = model.sample(1, LARGEST, first=4, label=1, batch_size=1)
    np.testing.assert_array_equal(labelled, again)  # 4 modulo 3
    assert (drawn != model.sample(5, 2**31, batch_size=1)).any()


class Grey(nn.Module):
    """Predicts black images of class 0, grey ones of class 1, and white ones of class 2."""

    num_classes = 3
    discrete = learned_null = False
    downsampling = 1

    def __call__(self, x, t, *, label, **_):
        return Denoised(jnp.zeros_like(x) + (label.reshape(-1, 1, 1, 1) - 1), x)


def test_classes_have_names():
    config = tiny.get_config()
    config.process.prediction = "x0"
    diffusion = dataclasses.replace(make_experiment(config).task.model, denoiser=Grey())
    names = ("black", "grey", "white")
    model = Model(TrainedModel(diffusion, {}, {}, 7, class_names=names), tiny.mesh_of())
    assert model.class_names == names
    hidden = np.zeros((3, 8, 8, 3), np.uint8), np.zeros((8, 8))
    for label, expected in (
        ("white", [255, 255, 255]),
        (1, [128, 128, 128]),
        ("white, 0", [255, 0, 255]),
        ([2, "grey"], [255, 128, 255]),
        (None, [0, 128, 255]),
    ):
        assert model.sample(3, label=label)[:, 0, 0, 0].tolist() == expected
        filled = model.inpaint(*hidden, label=label, sampler="ddim")
        assert filled[:, 0, 0, 0].tolist() == expected
    with pytest.raises(FieldError, match="label names 'gray': did you mean 'grey'"):
        model.inpaint(*hidden, label="gray")


def test_holes_are_filled_from_any_seed(model):
    images = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    mask = np.ones((8, 8), np.float32)
    mask[2:6, 2:6] = 0
    options = {"sampler": "ddim", "label": 0}
    filled = [model.inpaint(images, mask, seed, **options) for seed in (0, LARGEST)]
    np.testing.assert_array_equal(filled[0][:, mask > 0], images[:, mask > 0])
    assert (filled[0] != filled[1]).any()


# --- sampling -------------------------------------------------------------------------------------


def test_another_sampler_drops_the_settings_of_ddim(model):
    ddim = model.diffusion.sampling_with(eta=0.5)
    assert model.diffusion.checked_sampling(ddim, sampler="ddpm").eta == 0
    assert model.diffusion.checked_sampling(ddim, steps=np.int64(2)).steps == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1.5}, "steps is 1.5: it must be a whole number"),
        ({"steps": "4"}, "steps is '4': it must be a whole number"),
        ({"steps": True}, "steps is True: it must be a whole number"),
        ({"steps": 21}, "steps is 21; it must lie in 1 .. 20"),
        ({"eta": np.nan}, "eta is nan: it must be a finite number"),
        ({"eta": 0.5, "sampler": "ddpm"}, "eta is 0.5: only 'ddim' reads it"),
        ({"final": "first", "sampler": "dpm_solver"}, "final is 'first': only 'ddim' reads it"),
        ({"clip": -1.0}, "clip is -1.0: it must be positive, or 0 for no limit"),
        ({"spacing": "even"}, "spacing is 'even'; choose one of leading"),
        ({"guidance": np.inf}, "guidance is inf: it must be a finite number"),
        ({"guidance_interval": (0.2,)}, "guidance_interval is .*: it must be 2 finite numbers"),
        ({"truncation": 0.5}, "truncation does not fit this model: its sampling has steps"),
        ({"batch_size": 0}, "batch_size is 0: it must be a whole number from 1"),
        ({"batch_size": -2}, "batch_size is -2: it must be a whole number from 1"),
        ({"first": -1}, "first is -1: it must be a whole number from 0"),
        ({"first": 2**31}, "first is 2147483648: it must be a whole number from 0 to 2147483646"),
        ({"label": 3}, "label is 3: it must be a whole number from 0 to 2"),
        ({"label": []}, r"label is \[\]: it must name a class"),
        ({"prompts": "a cat"}, "prompts is 'a cat': the model reads no captions"),
        ({"prompts": []}, r"prompts is \[\]: it must be a text, or a list of texts"),
        ({"seed": 2**32}, "seed is 4294967296: it must be a whole number from 0 to 4294967295"),
    ],
)
def test_invalid_arguments_are_reported_in_one_sentence(model, settings, message):
    with pytest.raises(FieldError, match=f"^{message}") as caught:
        model.sample(1, **settings)
    assert "--" not in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_types_are_reported_in_one_sentence():
    """This runs in a process that does not check annotations, like a notebook."""
    calls = [
        "model.sample(2.5)",
        "model.sample('2')",
        "model.sample(0)",
        "model.sample(1, seed=1.5)",
        "model.sample(1, label='cat')",
        "model.sample(1, label=True)",
        "model.sample(1, prompts=3)",
        "model.sample(1, batch_size=1.5)",
        "model.inpaint(images, np.ones((8, 8)), seed=-1)",
        "model.inpaint(images, [[1, 2], [1]])",
        "model.inpaint(images, np.full((8, 8), np.nan))",
        "model.inpaint(images, np.ones((4, 8)))",
        "model.inpaint(images, np.ones((8, 8)), num=3)",
        "model.inpaint(images, np.ones((8, 8)), prompt='a cat')",
        "model.inpaint(images[:0], np.ones((8, 8)))",
        "model.encode(images / 255)",
        "model.encode(images[:, :7])",
        "model.encode([[1], [1, 2]])",
        "model.encode(None)",
        "model.decode(np.ones((1, 4, 4)))",
        "model.decode(np.ones((0, 4, 4, 12)))",
        "model.decode(np.full((1, 4, 4, 12), np.inf))",
        "model.decode('points')",
        "conprediff_jax.load('nowhere', step=1.5)",
        "conprediff_jax.load('nowhere', step=-1)",
    ]
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import numpy as np
import conprediff_jax
from conprediff_jax.common.errors import FieldError
from test_api import make_model

model, images = make_model(), np.zeros((2, 8, 8, 3), np.uint8)
for call in {calls!r}:
    try:
        print(call, "returned", eval(call))
    except FieldError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    arguments = "num num num seed label label prompts batch_size seed masks masks masks num prompt"
    arguments += " images" * 5 + " points" * 4 + " step step"
    said = done.stdout.splitlines()
    assert [line.partition(" ")[0] for line in said] == arguments.split(), done.stdout
    assert not any("--" in line for line in said)


def test_points_are_pixels_rearranged(model):
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    points = model.encode(images)
    assert points.shape == (2, 4, 4, 12)
    np.testing.assert_array_equal(model.decode(points), images)
    np.testing.assert_array_equal(model.decode(jnp.asarray(points)), images)
