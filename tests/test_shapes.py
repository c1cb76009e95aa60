"""Tests of images that are grey, transparent or not square, from data to samples and metrics."""

import io
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import ExifTags, Image, ImageEnhance

from conprediff_jax import data
from conprediff_jax.common import images
from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.fields import as_kind, parse
from conprediff_jax.data import transforms
from conprediff_jax.models.first_stage import Pixels

pytestmark = pytest.mark.usefixtures("one_device")


def test_a_size_is_a_number_or_two():
    kind = int | tuple[int, int]
    assert parse("size", "64", kind) == 64 and parse("size", "(48, 64)", kind) == (48, 64)
    assert parse("size", "48,64", kind) == as_kind("size", [48, 64], kind) == (48, 64)
    for text in ("1,2,3", "x", "1.5", "None"):
        with pytest.raises(FieldError, match="a whole number of 32 bits or 2 whole numbers"):
            parse("size", text, kind)


def test_pillow_agrees_on_every_shape_and_mode(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (31, 47, 4), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    whole = Image.open(io.BytesIO(file.getvalue()))
    white = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    for channels, expected in {1: white.convert("L"), 3: white, 4: whole}.items():
        decoded = transforms.decode(file.getvalue(), channels=channels)
        for size, box in {(31, 20): (14, 0, 34, 31), (10, 47): (0, 10, 47, 20)}.items():
            part = np.asarray(expected.crop(box)).reshape(*size, channels)
            np.testing.assert_array_equal(transforms.cropped(decoded, size), part)
    grey = images.as_rgb(np.full((2, 3, 3, 1), 7, np.uint8))
    assert grey.shape == (2, 3, 3, 3) and (grey == 7).all()
    on_white = images.as_rgb(pixels)
    assert np.abs(on_white.astype(int) - np.asarray(white)).max() <= 1


def test_points_have_the_shape_of_images():
    stage = Pixels(patch=4, channels=1)
    assert stage.point_shape((8, 12)) == (2, 3, 16)
    batch = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 1), np.uint8)
    points = stage.encode({}, jnp.asarray(batch))
    np.testing.assert_array_equal(stage.decode({}, points), batch)
    with pytest.raises(FieldError, match=r"must divide the image size \(8, 10\)"):
        stage.point_shape((8, 10))


def test_jpegs_of_the_right_size_are_decoded_to_the_same_pixels(monkeypatch):
    base = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    cases = itertools.product(
        ((32, 32), (40, 32), (32, 45)), (0, 1, 2), (False, True), ("RGB", "L")
    )
    found = []
    for size, subsampling, progressive, mode in cases:
        file = io.BytesIO()
        image = Image.fromarray(base).resize(size).convert(mode)
        image.save(file, "JPEG", subsampling=subsampling, progressive=progressive)
        content = file.getvalue()
        fast = transforms.cut_from_jpeg(content, (32, 32), 0.3)
        found.append(fast is not None)
        record = {"image": content, "name": "a"}
        choices = {"offset": 0.3, "mirrored": False, "choice": 0.0}
        made = transforms.ToExample(size=32).make(record, **choices)["image"]
        np.testing.assert_array_equal(
            made, transforms.cropped(transforms.decode(content, 64), 32, 0.3)
        )
    assert found == [True, False] * 18
    assert transforms.cut_from_jpeg(content[:-20], (32, 32), 0.3) is None
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(base).resize((32, 32)).save(turned, "JPEG", exif=exif)
    assert transforms.cut_from_jpeg(turned.getvalue(), (32, 32), 0.3) is None


def test_augmentation_belongs_to_the_example_and_leaves_other_draws_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    record = {"image": file.getvalue(), "name": "a", "text": ["a", "b", "c"]}

    def made(seed, **options):
        example = transforms.ToExample(size=16, crop="random", text="text", **options)
        return example(record, np.random.default_rng(seed))

    options = {"min_crop": 0.5, "jitter": 0.3}
    for seed in range(5):
        first, again, plain = made(seed, **options), made(seed, **options), made(seed)
        np.testing.assert_array_equal(first["image"], again["image"])
        assert first["text"] == plain["text"] and (first["image"] != plain["image"]).any()
        offset, _, _, smaller, other, *colours = np.random.default_rng(seed).random(8)
        side = round((1 - smaller / 2) * 40)
        left, top = round(offset * (60 - side)), round(other * (40 - side))
        part = Image.fromarray(pixels).crop((left, top, left + side, top + side))
        part = part.resize(
            (16, 16), Image.Resampling.BOX if side == 32 else Image.Resampling.LANCZOS
        )
        bright, contrast, colour = (1 + 0.3 * (2 * value - 1) for value in colours)
        part = ImageEnhance.Brightness(part).enhance(bright)
        part = ImageEnhance.Color(ImageEnhance.Contrast(part).enhance(contrast)).enhance(colour)
        assert np.abs(np.asarray(part).astype(int) - first["image"]).mean() < 2
    with pytest.raises(ValueError, match=r"min_crop is 0.5; .* unless crop is 'random'"):
        data.DataSpec(name="a", min_crop=0.5)
    with pytest.raises(ValueError, match=r"jitter is 0.1; .* be 0 with latents"):
        data.DataSpec(name="a", latents="b", jitter=0.1)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_pictures_are_written_and_read_with_their_channels(tmp_path, channels, mode):
    image = np.random.default_rng(0).integers(0, 256, (8, 12, channels), np.uint8)
    images.write_picture(tmp_path / "a.png", image)
    with Image.open(tmp_path / "a.png") as read:
        assert read.mode == mode
        np.testing.assert_array_equal(np.asarray(read).reshape(image.shape), image)
    images.write_picture(tmp_path / "a.jpg", image)
    assert images.grid(image[None].repeat(3, axis=0)).shape[-1] == channels
    assert images.captioned(image[None], ["what it is"]).shape[-1] == 3


def test_a_grey_wide_run_trains_samples_fills_and_is_measured(tmp_path):
    """A run of grey images of 8 x 16 pixels, from its folder to a filled hole."""
    from conprediff_jax.metrics import image_sets
    from conprediff_jax.runs.api import load
    from conprediff_jax.train.loop import train

    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 16, 3), np.uint8)
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i}.png")
    config = tiny.get_config()
    config.data.update(name=str(tmp_path / "in"), image_size=(8, 16), channels=1, label=None)
    config.context.weight = 0
    config.train.update(steps=2)
    train(config, str(tmp_path / "run"))
    with Image.open(next((tmp_path / "run" / "samples").glob("*.png"))) as grid:
        assert grid.mode == "L"
    model = load(tmp_path / "run")
    drawn = model.sample(2, steps=2)
    assert drawn.shape == (2, 8, 16, 1)
    mask = np.ones((8, 16), bool)
    mask[2:6, 4:9] = False
    filled = model.inpaint(drawn, mask, sampler="ddpm", steps=2)
    np.testing.assert_array_equal(filled[:, mask], drawn[:, mask])
    spec = data.DataSpec(name=str(tmp_path / "in"), image_size=(8, 16), channels=1, label=None)
    (batch,) = image_sets.from_data(spec).batches(8)
    assert batch.shape == (8, 8, 16, 3) and (batch == batch[..., :1]).all()
    with pytest.raises(FieldError, match=r"width, 1\] is expected"):
        model.encode(np.zeros((1, 8, 16, 3), np.uint8))
