"""Tests of folders of images as data: their classes, and files that are damaged or misplaced."""

import numpy as np
import pytest
import tiny
from absl import logging as absl_logging
from PIL import Image

from conprediff_jax import data
from conprediff_jax.common.errors import FieldError
from conprediff_jax.metrics import denoising_loss
from conprediff_jax.runs.classes import with_class_names
from conprediff_jax.runs.restore import load, load_experiment
from conprediff_jax.train.loop import train

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(absl_logging, "warning", lambda text, *values: lines.append(text % values))
    return lines


def write(root, *names, value=50):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (value,) * 3).save(root / name)


def opened(root, **fields):
    return data.open_data(data.DataSpec(name=str(root), image_size=8, threads=0, **fields))


def test_classes_are_folders_linked_ones_and_empty_ones_too(tmp_path, warnings):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    write(root, "dog/1.png", "dog/.ipynb_checkpoints/1-checkpoint.png", ".thumbnails/1.png")
    write(elsewhere, "2.png")
    (root / "cow").symlink_to(elsewhere)
    (root / "bee").mkdir()
    (root / "__MACOSX").mkdir()
    (root / "up").symlink_to(tmp_path)
    source = opened(root)
    assert source.class_names == ("bee", "cow", "dog")
    assert source.files == ("cow/2.png", "dog/1.png") and source.labels == (1, 2)
    assert warnings == [
        f"{root}/up: left out, a link to a folder that it lies in",
        f"{root}: left out 2 hidden folders and images, such as .thumbnails",
        f"{root}: class 'bee', number 0, has no images",
    ]


def test_a_stray_image_is_named(tmp_path, warnings):
    write(tmp_path, "dog/1.png", "cow/2.png", "map.png")
    source = opened(tmp_path)
    assert source.class_names is None and len(source) == 3
    assert warnings == [
        f"{tmp_path}: no classes, since map.png and 0 more of 3 images lie in no subfolder"
    ]


def test_classes_keep_the_numbers_that_they_were_given(tmp_path):
    write(tmp_path, "train/dog/1.png", "train/cow/2.png", "test/cow/3.png")
    names = ("dog", "ant", "cow")
    assert opened(tmp_path, class_names=names).labels == (2, 0)
    assert opened(tmp_path, class_names=names, split="test").labels == (2,)
    with pytest.raises(data.DataError, match=r"class 'cow' is not among .* which are dog, ant$"):
        opened(tmp_path, class_names=names[:2])


def test_data_of_other_classes_are_refused():
    title, names = "cifar10", ("cat", "dog")
    data.sources.check_class_names(title, names, ())
    data.sources.check_class_names(title, names, names)
    with pytest.raises(data.DataError, match=r"cifar10: the classes are cat, dog; .* dog, cat$"):
        data.sources.check_class_names(title, names, names[::-1])


def test_a_file_that_cannot_be_read_is_one_bad_image(tmp_path, warnings):
    write(tmp_path, "0.png", "1.png", "2.png", "3.png")
    (tmp_path / "4.png").symlink_to("nowhere")
    spec = data.DataSpec(name=str(tmp_path), image_size=8, threads=0, shuffle=False)
    iterator = data.make_iterator(spec, batch_size=3, seed=0)
    (tmp_path / "1.png").unlink()  # the folder has been listed
    for _ in range(5):
        assert next(iterator)["image"].shape == (3, 8, 8, 3)
    missing = "No such file or directory"
    assert [line.rsplit(" (", 1)[0] for line in warnings] == [
        f"skipped {tmp_path}/{name}.png: {missing}" for name in (1, 4)
    ]
    masks = [batch["mask"] for batch in data.evaluation_iterator(spec, batch_size=4)]
    np.testing.assert_array_equal(masks, [[True, True, True, False]])  # 0, 2, 3, and the link


def class_config(root, **overrides):
    config = tiny.get_config().unlock()
    config.data.name = str(root)
    config.model.num_classes = 3
    config.context.weight = 0.0
    config.train.update(steps=1, checkpoint_every=1)
    config.update_from_flattened_dict(overrides)
    return config.lock()


@pytest.fixture(scope="module")
def class_run(tmp_path_factory):
    """A run of one step on two classes, and its data."""
    folder = tmp_path_factory.mktemp("classes")
    write(folder / "data", *(f"train/{c}/{i}.png" for c in ("dog", "cow") for i in range(8)))
    train(class_config(folder / "data"), str(folder / "run"))
    return folder


def test_a_run_stores_the_numbers_of_its_classes(class_run):
    root, workdir = class_run / "data", str(class_run / "run")
    assert load_experiment(workdir).data.class_names == ("cow", "dog")
    write(root, "train/ant/1.png")
    try:  # which would be number 0
        with pytest.raises(data.DataError, match=r"'ant' is not among .* which are cow, dog$"):
            train(class_config(root, **{"train.steps": 2}), workdir)
    finally:
        (root / "train/ant/1.png").unlink()
        (root / "train/ant").rmdir()
    said = r"class_names is \['dog', 'cow'\], and was \['cow', 'dog'\]"
    with pytest.raises(FieldError, match=said):
        train(class_config(root, **{"data.class_names": ("dog", "cow")}), workdir)
    unconditional = class_config(root, **{"model.num_classes": None})
    assert with_class_names(unconditional, {}) is unconditional
    assert with_class_names(class_config(root), None).data.class_names == ("cow", "dog")


def test_held_out_noise_belongs_to_the_place_in_the_data(class_run):
    """The loss depends neither on the batches nor on which other images can be decoded."""
    root, workdir = class_run / "data", str(class_run / "run")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    (root / "test/cow").mkdir(parents=True)
    for place, image in enumerate(pixels):
        Image.fromarray(image).save(root / f"test/cow/{place}.png")
    mesh = tiny.mesh_of()
    model, params, frozen, *_ = load(workdir, mesh)
    spec = load_experiment(workdir).data.of_images(split="test")
    of_batch = denoising_loss.make_losses(model, mesh, np.int32([4, 15]))

    def rows(batch_size, num=6):
        batches = data.evaluation_iterator(spec, batch_size=batch_size)
        return np.concatenate(
            list(denoising_loss.losses_of(of_batch, params, frozen, batches, num))
        )

    whole = rows(6)
    assert whole.shape == (6, 2)
    (root / "test/cow/2.png").write_bytes(b"no image")
    for batch_size in (2, 4):
        np.testing.assert_allclose(rows(batch_size), np.delete(whole, 2, 0), rtol=1e-5)
    np.testing.assert_allclose(rows(2, num=3), whole[[0, 1, 3]], rtol=1e-5)
