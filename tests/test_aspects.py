"""Tests of batches of several shapes, from the choice of a shape to samples of one."""

import functools
import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny
from etils import epath
from PIL import Image

import conprediff_jax
from conprediff_jax import data
from conprediff_jax.common.errors import ConfigError, UserError
from conprediff_jax.config import default_discrete, palette
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.data import aspects
from conprediff_jax.runs.batches import Batches, first_unseen
from conprediff_jax.train.loop import train

SHAPES = ((4, 12), (8, 8), (12, 4))


def test_shapes_have_about_the_area_and_bounded_aspects():
    shapes = aspects.shapes_of((1024, 1024), 64, 4.0)
    published = {(512, 2048), (704, 1472), (832, 1280), (1024, 1024), (1216, 832), (1344, 768)}
    assert published <= set(shapes) == {(width, height) for height, width in shapes}
    area = [height * width / 1024**2 for height, width in shapes]
    assert min(area) > 0.93 and max(area) < 1.07
    ratios = [height / width for height, width in shapes]
    assert ratios == sorted(ratios) and ratios[0] == 1 / 4 and ratios[-1] == 4
    assert aspects.shapes_of((48, 64), 0, 2.0) == ((48, 64),)
    assert aspects.shapes_of((8, 8), 4, 3.0) == SHAPES
    # The ratios 1 and 3 meet at their geometric mean, 1.73.
    sizes = {(100, 172): (8, 8), (100, 174): (4, 12), (172, 100): (8, 8), (900, 100): (12, 4)}
    assert {size: aspects.nearest(SHAPES, size) for size in sizes} == sizes


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images whose colour is their number, in three aspects."""
    folder = tmp_path_factory.mktemp("photos")
    for number, (height, width) in zip(
        range(30), itertools.cycle(((20, 20), (12, 40), (24, 22), (30, 10), (10, 28))), strict=False
    ):
        Image.new("L", (width, height), number).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"")
    return folder


def spec_of(photos, **changes):
    fields = {"image_size": 8, "aspect_step": 4, "max_aspect": 3.0, "channels": 1, "threads": 2}
    return data.DataSpec(name=str(photos), **(fields | changes))


def test_every_image_is_in_a_batch_of_its_shape(photos):
    spec = spec_of(photos)
    assert spec.shapes == SHAPES
    batches = data.make_iterator(spec, batch_size=4, seed=0)
    seen = []
    for batch in itertools.islice(batches, 60):
        data.check_batch(batch | {"image": batch["image"] + np.uint8(2)}, spec, batch_size=4)
        for image in batch["image"]:
            number = int(image[0, 0, 0])
            with Image.open(photos / f"{number}.png") as whole:
                assert image.shape[:2] == aspects.nearest(SHAPES, whole.size[::-1])
            assert (image == number).all()
            seen.append(number)
    counts = np.bincount(seen, minlength=30)
    assert counts.sum() == 240 and counts.min() >= 6 and counts.max() <= 10


def test_batches_go_on_to_the_bit(photos, tmp_path):
    spec = spec_of(photos)
    batches = data.make_iterator(spec, batch_size=4, seed=3)
    states, made = [], []
    for _ in range(12):
        states.append(json.loads(json.dumps(batches.get_state())))
        made.append(next(batches)["image"])
    assert len({images.shape for images in made}) == 3
    assert any(len(state["waiting"]) > 4 for state in states)
    for place in (7, 2, 11):
        again = data.make_iterator(spec, batch_size=4, seed=3)
        again.set_state(states[place])
        for expected in made[place:]:
            np.testing.assert_array_equal(next(again)["image"], expected)
    folder = tmp_path / "data"
    folder.mkdir()
    saved = Batches(batches, (0, 1)).get_state()
    (folder / "process_0-of-1.json").write_bytes(saved)
    onward = Batches(data.make_iterator(spec, batch_size=4, seed=3), (0, 1))
    onward.restore(epath.Path(folder))
    np.testing.assert_array_equal(next(onward)["image"], next(batches)["image"])
    plain = Batches(
        data.make_iterator(spec_of(photos, aspect_step=0), batch_size=4, seed=3), (0, 1)
    )
    plain.restore(epath.Path(folder))  # a run that goes on with one shape
    assert next(plain)["image"].shape == (4, 8, 8, 1)


class InStep:
    """Iterators of several parts that threads call together, as processes would."""

    def __init__(self, spec, parts):
        self.said, self.barrier = [None] * parts, threading.Barrier(parts, timeout=60)
        self.parts = [
            data.make_iterator(
                spec, batch_size=8 // parts, seed=3, process_index=index, process_count=parts,
                exchange=functools.partial(self.exchange, index),
            )
            for index in range(parts)
        ]  # fmt: skip

    def exchange(self, index, own):
        self.said[index] = own
        self.barrier.wait()
        every = np.stack(self.said)
        self.barrier.wait()
        return every

    def __next__(self):
        with ThreadPoolExecutor(len(self.parts)) as pool:
            return list(pool.map(next, self.parts))


def test_several_processes_make_the_batches_of_one(photos):
    spec = spec_of(photos)
    one = data.make_iterator(spec, batch_size=8, seed=3)
    several, states, made = InStep(spec, 4), [], []
    for _ in range(40):
        states.append([json.loads(json.dumps(part.get_state())) for part in several.parts])
        made.append([batch["image"] for batch in next(several)])
        assert {images.shape for images in made[-1]} == {(2, *made[-1][0].shape[1:])}
        expected = next(one)["image"]
        np.testing.assert_array_equal(  # the order in a batch differs
            sorted(np.concatenate(made[-1])[:, 0, 0, 0]), sorted(expected[:, 0, 0, 0])
        )
    assert len({images[0].shape for images in made}) == 3
    assert all(state["waiting"] == group[0]["waiting"] for group in states for state in group)
    again = InStep(spec, 4)
    for part, state in zip(again.parts, states[17], strict=True):
        part.set_state(state)
    for images in made[17:]:
        for found, expected in zip(next(again), images, strict=True):
            np.testing.assert_array_equal(found["image"], expected)
    stored = [{"share": [i, 4], "stream": state} for i, state in enumerate(states[17])]
    assert 0 < first_unseen(stored) == min(states[17][0]["waiting"])
    with pytest.raises(ValueError, match="aspect_step with several processes needs exchange"):
        data.make_iterator(spec, batch_size=4, seed=3, process_index=1, process_count=2)


def test_the_parts_of_a_batch_are_equal_and_mostly_their_own():
    assert aspects.dealt([0, 3, 5, 7, 9, 2], 3) == [[0, 3], [7, 9], [5, 2]]
    places = np.random.default_rng(0).permutation(800)[:64].tolist()
    shares = aspects.dealt(places, 4)
    assert sorted(itertools.chain(*shares)) == sorted(places)
    assert [len(share) for share in shares] == [16] * 4
    moved = sum(place % 4 != part for part, share in enumerate(shares) for place in share)
    counts = np.bincount(np.array(places) % 4, minlength=4)
    assert moved == np.maximum(counts - 16, 0).sum()


def test_a_model_trains_on_all_shapes_and_draws_each(photos, tmp_path, one_device):
    config = tiny.get_config()
    config.context.weight = 0
    config.data.update(name=str(photos), channels=1, label=None, flip=False)
    config.data.update(image_size=(4, 12), aspect_step=4, max_aspect=1.0)
    config.train.update(steps=4, batch_size=4)
    experiment = make_experiment(config)
    assert experiment.data.shapes == ((4, 12), (8, 8))
    train(config, str(tmp_path))
    model = conprediff_jax.load(tmp_path)
    assert model.sample(1, steps=1, size=8).shape == (1, 8, 8, 1)
    with pytest.raises(UserError, match=r"^size: 12 x 5 pixels; this model takes multiples of 2"):
        model.sample(1, size=(5, 12))


def test_what_takes_one_shape_refuses_several():
    config = tiny.get_config()
    config.data.update(aspect_step=3)
    with pytest.raises(ConfigError, match=r"config.data.aspect_step is 3: .* a multiple of 2"):
        make_experiment(config)
    config = default_discrete(palette(4))
    config.data.update(name="a", image_size=8, aspect_step=4)
    with pytest.raises(ConfigError, match=r"'token_transformer' takes images of one shape"):
        make_experiment(config)
    with pytest.raises(ValueError, match=r"aspect_step is 4; it must be 0 with features"):
        data.DataSpec(name="a", latents="b", features="c:d", aspect_step=4)
