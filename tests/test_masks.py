"""The masks of inpainting, and the files they can be read from."""

import numpy as np
import pytest
from PIL import Image

from conprediff_jax.data import masks
from conprediff_jax.data.holes import Picture, cut, is_folder, read_data, read_folder
from conprediff_jax.data.masks import FREE_FORMS, MASKS, filled_share, make_mask, read_mask
from conprediff_jax.data.pipeline import DataSpec
from conprediff_jax.errors import UserError


def draw(name, seed=0, height=256, width=256):
    return make_mask(name, height, width, np.random.default_rng(seed))


def test_fixed_masks_keep_what_the_protocol_says():
    rows, columns = np.mgrid[:256, :256]
    centre = np.abs(rows - 127.5) < 32
    expected = {
        "every_second_line": rows % 2 == 0,
        "super_resolve": (rows % 2 == 0) & (columns % 2 == 0),
        "expand": centre & centre.T,  # 64 x 64
        "half": columns < 128,
        "box": ~((np.abs(rows - 127.5) < 64) & (np.abs(columns - 127.5) < 64)),
    }
    assert set(expected) == set(masks.FIXED)
    for name, mask in expected.items():
        np.testing.assert_array_equal(draw(name), mask)
    shares = [filled_share(mask) for mask in expected.values()]
    np.testing.assert_allclose(shares, [0.5, 0.75, 1 - 1 / 16, 0.5, 0.25])


@pytest.mark.parametrize("name", FREE_FORMS)
def test_free_form_masks_are_seeded_and_fill_a_part(name):
    drawn = [draw(name, seed, 64, 48) for seed in range(20)]
    np.testing.assert_array_equal(drawn[3], draw(name, 3, 64, 48))
    shares = [filled_share(mask) for mask in drawn]
    assert min(shares) > 0 and max(shares) <= 0.5
    assert len(set(shares)) > 10
    filled = ~np.stack(drawn)
    assert filled[:, :16].any() and filled[:, -16:].any() and filled[:, :, -12:].any()


def test_thin_masks_are_thinner_than_thick_ones():
    """By what is left after a window of 16 of 256 pixels must fit into the hole."""

    def wide(mask):
        windows = np.lib.stride_tricks.sliding_window_view(~mask, (17, 17))
        return windows[::4, ::4].all(axis=(2, 3)).mean()

    shares = {name: np.mean([wide(draw(name, seed)) for seed in range(8)]) for name in FREE_FORMS}
    assert shares["thin"] < 0.03 < shares["strokes"] < shares["thick"]


def test_masks_do_not_depend_on_the_number_of_images():
    pictures = [Picture(str(i), np.full((16, 16, 3), i, np.uint8)) for i in range(5)]
    for name in MASKS:
        few, many = (cut(pictures[:count], name, seed=4) for count in (2, 5))
        for first, second in zip(few, many, strict=False):
            np.testing.assert_array_equal(first.mask, second.mask)
    hole = cut(pictures, "half")[3]
    np.testing.assert_array_equal(hole.masked[0, :, 0], [3] * 8 + [128] * 8)


def test_polarity_of_files(tmp_path):
    white = draw("half", height=4, width=6)
    Image.fromarray(np.where(white, 200, 60).astype(np.uint8)).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), white)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", "fill"), ~white)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_folders_pair_images_and_masks_by_name(tmp_path):
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (4, 6, 3), np.uint8) for name in ("b", "a/c", "d")}
    for name, pixels in images.items():
        save(tmp_path / "images" / f"{name}.png", pixels)
        save(tmp_path / "masks" / f"{name}.webp", np.full((4, 6), 255 * (name == "b"), np.uint8))
    assert is_folder(str(tmp_path / "images")) and not is_folder("openmoji/people")
    pictures = read_folder(str(tmp_path / "images"))
    assert [picture.name for picture in pictures] == ["a/c", "b", "d"]
    for picture in pictures:
        np.testing.assert_array_equal(picture.image, images[picture.name])
    holes = cut(pictures, str(tmp_path / "masks"))
    assert [filled_share(hole.mask) for hole in holes] == [1, 0, 1]
    assert len(read_folder(str(tmp_path / "images"), num=2)) == 2


def test_a_data_set_gives_its_split_without_what_cannot_be_decoded(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 5)):
        for index in range(count):
            save(tmp_path / split / f"{index}.png", rng.integers(0, 256, (9, 12, 3), np.uint8))
    (tmp_path / "test" / "2.png").write_bytes(b"no image")
    spec = DataSpec(name=str(tmp_path), split="test", image_size=8, flip=True, threads=1)
    pictures = read_data(spec)
    assert [picture.name for picture in pictures] == [f"{i:06}" for i in range(4)]
    assert {picture.image.shape for picture in pictures} == {(8, 8, 3)}
    assert len(read_data(spec, num=3)) == 3


def test_bad_input_is_named(tmp_path):
    picture = Picture("a", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "empty").mkdir()
    save(tmp_path / "small" / "a.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    for folder in ("twice/a.png", "twice/a.jpg"):
        save(tmp_path / folder, np.zeros((4, 4, 3), np.uint8))

    def refused(function, *arguments, message):
        with pytest.raises(UserError, match=message) as caught:
            function(*arguments)
        assert "\n" not in str(caught.value)

    refused(read_folder, str(tmp_path / "empty"), message="empty: no images there")
    nowhere = DataSpec(name=str(tmp_path / "none"))
    refused(read_data, nowhere, message="none: there is no such folder")
    refused(read_folder, str(tmp_path / "broken"), message="a.png: not a readable image")
    refused(read_folder, str(tmp_path / "twice"), message="another image is called a too")
    refused(cut, [picture], "wide", message="--masks=wide: no such file .* none of thin, strokes")
    refused(cut, [picture], str(tmp_path / "empty"), message="no mask for image a: .*a.png")
    refused(cut, [picture], str(tmp_path / "broken"), message="a.png: not a readable mask")
    refused(
        cut, [picture], str(tmp_path / "small" / "a.png"),
        message="small/a.png: 4 x 4 pixels, but image a has 8 x 8 pixels",
    )  # fmt: skip
    with pytest.raises(ValueError, match="mask 'wide': choose one of thin"):
        draw("wide")
